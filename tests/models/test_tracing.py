"""Masks, packed rows and positions where a call is recorded to run again: right for other values, or refused by
name."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import mambakit
from mambakit.models.documents import Marks
from mambakit.models.inputs import IGNORE, shifted_labels
from mambakit.models.mamba import classification
from mambakit.modules import packing
from tests.models.configurations import BASE, pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")

ONES = torch.ones(2, 12, dtype=torch.int64)
MASKS = {
    "left": torch.tensor([[0] * 3 + [1] * 9, [1] * 12]),
    "right": torch.tensor([[1] * 12, [1] * 8 + [0] * 4]),
    "holes": torch.tensor([[0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0], [1] * 5 + [0] * 3 + [1] * 4]),
    "none": ONES,
    "one token each": torch.tensor([[0] * 11 + [1], [1] + [0] * 11]),
    "bool": torch.tensor([[0] * 5 + [1] * 7, [0] * 2 + [1] * 10]).bool(),
    "a row of nothing": torch.tensor([[0] * 12, [1] * 12]),
}
PACKED = [
    torch.tensor(cuts, dtype=torch.int32) for cuts in ([0, 5, 9, 24], [0, 1, 20, 24], [0, 24, 24, 24], [0, 0, 11, 24])
]


class Logits(torch.nn.Module):
    """A model as tracers like it: tensors in, one tensor out."""

    def __init__(self, model: torch.nn.Module, name: str = "attention_mask"):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, ids, extra):
        return self.model(ids, use_cache=False, **{self.name: extra}).logits


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pair("use_bias")[0]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def states(cache) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.conv_states, cache.ssm_states


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("name", ["use_bias", "falcon_odd"])
def test_the_fixed_shape_is_the_packing_of_the_real_tokens(name, filled, gradients, monkeypatch):
    """Eagerly, over random masks: outputs, losses, states and gradients."""
    model = pair(name)[0]
    generator = torch.Generator().manual_seed(3)
    for trial in range(12):
        b, length = (
            int(torch.randint(1, 5, (), generator=generator)),
            int(torch.randint(1, 14, (), generator=generator)),
        )
        mask = torch.rand(b, length, generator=generator) < (0.5, 0.9, 1.0)[trial % 3]
        ids = torch.randint(1, 61, (b, length), generator=generator)
        before = torch.randint(1, 61, (b, 3), generator=generator)
        found = []
        for hidden in (False, True):
            monkeypatch.setattr(packing, "values_are_hidden", lambda _, hidden=hidden: hidden)
            model.zero_grad()
            with torch.set_grad_enabled(gradients):
                cache = model(before, use_cache=True).cache_params if filled else None
                out = model(
                    ids, attention_mask=mask, labels=ids, cache_params=cache, use_cache=True, output_hidden_states=True
                )
            tensors = [out.logits, *out.hidden_states, *states(out.cache_params)]
            if out.loss.isfinite():
                tensors.append(out.loss)
            if gradients:
                (out.logits.sum() + out.cache_params.ssm_states.square().sum()).backward()
                tensors += [p.grad for p in model.parameters()]
            found.append(tensors)
        for ours, theirs in zip(found[1], found[0], strict=True):
            assert worst(ours, theirs) < 2e-5


def test_padding_that_is_no_number_reaches_nothing(model, monkeypatch):
    monkeypatch.setattr(packing, "values_are_hidden", lambda _: True)
    mask = MASKS["holes"]
    embeds = torch.randn(2, 12, 32).masked_fill(mask[..., None] == 0, float("nan")).requires_grad_()
    model.zero_grad()
    out = model(inputs_embeds=embeds, attention_mask=mask)
    assert out.logits.isfinite().all()
    out.logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert embeds.grad.isfinite().all()


def test_compiled_once_for_every_mask(model):
    ids = tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for mask in MASKS.values():
            expected = model(ids, attention_mask=mask.long(), use_cache=True, output_hidden_states=True, labels=ids)
            out = compiled(ids, attention_mask=mask.long(), use_cache=True, output_hidden_states=True, labels=ids)
            assert worst(out.logits, expected.logits) < 1e-5
            assert worst(out.loss, expected.loss) < 1e-5
            for ours, theirs in zip(states(out.cache_params), states(expected.cache_params), strict=True):
                assert worst(ours, theirs) < 1e-5
    for kind in (torch.bool, torch.float32):
        assert (
            worst(compiled(ids, attention_mask=MASKS["bool"].to(kind)).logits, model(ids, MASKS["bool"]).logits) < 1e-5
        )


def test_compiled_with_a_cache(model):
    ids = tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = []
    with torch.no_grad():
        for call in (model, compiled):
            cache = model.backbone.new_cache(2)
            parts = [call(ids, attention_mask=MASKS["left"], cache_params=cache).logits]
            parts += [call(ids[:, t : t + 1], cache_params=cache).logits for t in range(3)]
            longer = torch.cat([MASKS["left"], ONES[:, :3], MASKS["holes"]], 1)
            parts.append(call(ids, attention_mask=longer, cache_params=cache).logits)
            found.append([*parts, *states(cache)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert worst(ours, theirs) < 1e-5


def test_compiled_training(model):
    ids = tokens(2, 12)
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager", dynamic=True)
    try:
        for mask in (MASKS["left"], MASKS["holes"]):
            found = []
            for call in (model, compiled):
                model.zero_grad()
                call(ids, attention_mask=mask, labels=ids).loss.backward()
                found.append([p.grad.clone() for p in model.parameters()])
            for ours, theirs in zip(found[1], found[0], strict=True):
                assert worst(ours, theirs) < 1e-4
    finally:
        model.eval()


def test_a_compiled_model_generates(model):
    ids = tokens(2, 12)
    expected = model.generate(ids, attention_mask=MASKS["left"], max_new_tokens=9)
    compiled = pair("use_bias")[0]
    compiled.load_state_dict(model.state_dict())
    compiled.compile(fullgraph=True, backend="eager")
    assert torch.equal(compiled.generate(ids, attention_mask=MASKS["left"], max_new_tokens=9), expected)


def test_compiled_classification():
    model = mambakit.MambaForSequenceClassification(mambakit.MambaConfig(**BASE, num_labels=3)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, labels = tokens(2, 12), torch.tensor([2, 0])
    padded = ids.clone()
    padded[0, 7:] = model.config.pad_token_id
    with torch.no_grad():
        for mask in (MASKS["left"], MASKS["right"], MASKS["holes"]):
            out, expected = compiled(ids, mask, labels=labels), model(ids, mask, labels=labels)
            assert worst(out.logits, expected.logits) < 1e-5
            assert worst(out.loss, expected.loss) < 1e-5
        for rows in (ids, padded):
            assert worst(compiled(rows).logits, model(rows).logits) < 1e-5


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("first", ["left", "none", "holes"])
def test_jit_trace(model, first, gradients):
    """Of one mask, for others; another length too. The recorded program holds ops, no Python."""
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(Logits(model), (tokens(2, 12), MASKS[first].long()), check_trace=False)
        assert "PythonOp" not in str(traced.inlined_graph)
        for mask in MASKS.values():
            ids = tokens(2, 12)
            assert worst(traced(ids, mask.long()), model(ids, mask).logits) < 1e-5
        ids = tokens(2, 7)
        assert worst(traced(ids, MASKS["holes"][:, 5:]), model(ids, MASKS["holes"][:, 5:]).logits) < 1e-5


def test_export(model):
    ids = tokens(2, 12)
    rows, length = torch.export.Dim("rows", min=2), torch.export.Dim("length", min=2)
    sizes = {0: rows, 1: length}
    program = torch.export.export(
        Logits(model), (ids, MASKS["left"]), dynamic_shapes={"ids": sizes, "extra": sizes}
    ).module()
    for mask in MASKS.values():
        assert worst(program(ids, mask.long()), model(ids, mask).logits) < 1e-5
    ids, mask = tokens(3, 7), torch.tensor([[0] * 2 + [1] * 5, [1] * 7, [1] * 3 + [0] * 4])
    assert worst(program(ids, mask), model(ids, mask).logits) < 1e-5


def test_a_model_itself_can_be_exported_and_traced(model):
    """An exported program returns tensors: the configuration's use_cache makes no state there."""
    ids, mask = tokens(2, 12), MASKS["right"]
    expected = model(ids, mask).logits
    program = torch.export.export(model, (ids,), {"attention_mask": MASKS["left"]}).module()
    assert worst(program(ids, attention_mask=mask).logits, expected) < 1e-5
    traced = torch.jit.trace(model, (ids, MASKS["left"]), strict=False, check_trace=False)
    assert worst(traced(ids, mask)["logits"], expected) < 1e-5
    with pytest.warns(UserWarning, match="cache_params is None"):
        torch.export.export(model, (ids,), {"use_cache": True})


def test_make_fx(model):
    ids = tokens(2, 12)
    with torch.no_grad():
        program = make_fx(Logits(model), tracing_mode="real")(ids, MASKS["left"])
        for mask in MASKS.values():
            assert worst(program(ids, mask.long()), model(ids, mask).logits) < 1e-5


def test_packed_rows(model):
    ids = tokens(1, 24)
    call = Logits(model, "cu_seqlens")
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        traced = torch.jit.trace(call, (ids, PACKED[0]), check_trace=False)
        program = torch.export.export(call, (ids, PACKED[0])).module()
        for cuts in PACKED:
            expected = model(ids, cu_seqlens=cuts, labels=ids)
            out = compiled(ids, cu_seqlens=cuts, labels=ids)
            assert worst(out.loss, expected.loss) < 1e-5
            for logits in (out.logits, traced(ids, cuts), program(ids, cuts)):
                assert worst(logits, expected.logits) < 1e-5


def test_labels_of_packed_rows_and_masks():
    """Targets by operations of fixed shape, and what they should be."""
    labels = torch.arange(24)[None]
    for cuts in PACKED:
        expected = labels.clone()
        for start in cuts[:-1].tolist():
            if 0 < start < 24:
                expected[0, start] = IGNORE
        expected = torch.cat([expected[:, 1:], torch.full((1, 1), IGNORE)], 1)
        assert torch.equal(shifted_labels(labels, None, Marks(cu_seqlens=cuts)), expected)
    labels, mask = tokens(2, 12), MASKS["holes"]
    given = labels.clone()
    expected = torch.cat([labels.masked_fill(mask == 0, IGNORE)[:, 1:], torch.full((2, 1), IGNORE)], 1)
    assert torch.equal(shifted_labels(labels, mask, Marks()), expected)
    assert torch.equal(labels, given)  # the caller's stay as they are


def test_a_traced_mask_is_a_mask_alone(model):
    """Numbers of documents in the mask are another program; a traced one says so when it is given some."""
    ids, numbers = tokens(2, 12), ONES.clone()
    numbers[0, 5:] = 2
    traced = torch.jit.trace(Logits(model), (ids, ONES), check_trace=False)
    program = torch.export.export(Logits(model), (ids, ONES)).module()
    compiled = torch.compile(Logits(model), fullgraph=True, backend="aot_eager")
    for call in (traced, program, compiled):
        call(ids, MASKS["left"])
        with pytest.raises(RuntimeError, match="traced for padding alone"):
            call(ids, numbers)
    with pytest.raises(Exception, match="drop what attention_mask leaves out"):
        torch.export.export(model, (tokens(1, 24), torch.ones(1, 24)), {"cu_seqlens": PACKED[0]})


def test_positions_are_refused_where_they_are_traced(model):
    """Where documents begin is a matter of values: without fullgraph that part runs outside of the graph."""
    ids, positions = tokens(2, 12), torch.arange(12).repeat(2, 1)
    positions[0, 5:] -= 5
    call = Logits(model, "position_ids")
    for trace in (
        lambda: torch.jit.trace(call, (ids, positions)),
        lambda: torch.export.export(call, (ids, positions)),
        lambda: torch.compile(call, fullgraph=True, backend="eager")(ids, positions),
    ):
        with pytest.raises(Exception, match="position_ids.* give cu_seqlens"):
            trace()
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(call, backend="eager")(ids, positions)
        assert worst(out, call(ids, positions)) < 1e-5


@pytest.mark.slow
def test_inductor(model):
    ids = tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for mask in (MASKS["left"], MASKS["holes"]):
            assert worst(compiled(ids, attention_mask=mask).logits, model(ids, mask).logits) < 1e-5


@pytest.mark.cuda
def test_a_masked_forward_can_be_captured():
    model = pair("use_bias")[0].cuda()
    ids, mask = tokens(2, 12).cuda(), MASKS["left"].cuda()
    with torch.no_grad():
        model(ids, mask)  # compiles what a capture must not
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = model(ids, mask, use_cache=False).logits
        for other in MASKS.values():
            mask.copy_(other)
            graph.replay()
            assert worst(out, model(ids, other.cuda()).logits) < 1e-4


def test_eager_calls_still_look_at_the_mask(model):
    """No work on padding, and none at all on a mask without padding."""
    assert packing.Packing.from_batch(ONES.bool(), None, False, (2, 12)) is None
    packed = packing.Packing.from_batch(MASKS["left"].bool(), None, False, (2, 12))
    assert packed.tokens.shape == (21,)
    assert not classification.values_are_hidden(ONES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(2, 12), MASKS["left"])
