"""Nothing that somebody puts on a module is passed by: not by a step of the whole model, nor by a layer's fused
mixer in training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mambakit.decoding.registry import token_step, verifier
from mambakit.generation.engine import Engine, Request
from mambakit.generation.stream import Sampling
from mambakit.modules import MambaMixer
from mambakit.modules.interception import Watch, any_intercepted, intercepted, is_ours, modules_of, untouched
from mambakit.modules.mixers.time_steps import TimeStepProjection
from mambakit.ops._backends import native
from tests.decoding.eager_graph import native_serves
from tests.models.configurations import pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")
LAYER = ["", ".norm", ".mixer", ".mixer.in_proj", ".mixer.conv1d", ".mixer.x_proj", ".mixer.dt_proj", ".mixer.out_proj"]
PLACES = [
    "backbone",
    "backbone.embeddings",
    "backbone.norm_f",
    "lm_head",
    *(f"backbone.layers.1{name}" for name in LAYER),
]


def model_of() -> Any:
    torch.manual_seed(0)
    model = pair("untied")[0]
    model.generation_config.eos_token_id = None
    return model


class Wrapper(nn.Module):
    """Somebody's module around another one."""

    def __init__(self, inner: nn.Module, heard: Callable[[], None]):
        super().__init__()
        self.inner, self.heard = inner, heard

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.heard()
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Same(nn.Module):
    """A parametrisation that changes nothing."""

    def __init__(self, heard: Callable[[], None]):
        super().__init__()
        self.heard = heard

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.heard()
        return weight * 1


@contextlib.contextmanager
def put(way: str, module: nn.Module, model: nn.Module, place: str, heard: Callable[[], None]) -> Iterator[None]:
    """Something on a module's calls, for a while."""

    def listen(*_: Any, **__: Any) -> None:
        heard()

    def wrapped(forward: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            heard()
            return forward(*args, **kwargs)

        return call

    if way == "forward":
        module.forward = wrapped(module.forward)  # type: ignore[method-assign]
        yield
        del module.forward
    elif way == "forward hook":
        with contextlib.closing(_Removed(module.register_forward_hook(listen))):
            yield
    elif way == "hook with kwargs":
        with contextlib.closing(_Removed(module.register_forward_pre_hook(listen, with_kwargs=True))):
            yield
    elif way == "hook of all modules":
        handle = nn.modules.module.register_module_forward_pre_hook(lambda m, *_: heard() if m is module else None)
        with contextlib.closing(_Removed(handle)):
            yield
    elif way == "class":
        kind, forward = type(module), type(module).forward

        def instead(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self is module:
                heard()
            return forward(self, *args, **kwargs)

        kind.forward = instead  # type: ignore[method-assign]
        yield
        kind.forward = forward  # type: ignore[method-assign]
    elif way == "subclass":
        kind = type(module)
        module.__class__ = type(
            "Theirs", (kind,), {"forward": lambda self, *a, **k: (heard(), kind.forward(self, *a, **k))[1]}
        )
        yield
        module.__class__ = kind
    else:
        parent = model.get_submodule(place.rpartition(".")[0])
        setattr(parent, place.rpartition(".")[2], Wrapper(module, heard))
        yield
        setattr(parent, place.rpartition(".")[2], module)


class _Removed:
    def __init__(self, handle: Any):
        self.close = handle.remove


WAYS = ["forward", "forward hook", "hook with kwargs", "hook of all modules", "class", "subclass"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
def test_generate_calls_it_at_every_step(way, place):
    """Also where an earlier call has made a step, and not any longer when it is taken away."""
    model, ids, calls = model_of(), tokens(2, 5), []
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    module = model.get_submodule(place)
    with put(way, module, model, place, lambda: calls.append(1)):
        found = model.generate(ids, **options)
        assert len(calls) == 4, "one prompt and three steps"
        assert any_intercepted(modules_of(model))
    assert torch.equal(found, expected)
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(calls) == 4
    assert not any_intercepted(modules_of(model))
    if native.is_available():
        assert native_serves(model, model.backbone.new_cache(1))


@pytest.mark.parametrize("place", [p for p in PLACES if ".mixer." in p or p.endswith(("lm_head", "norm_f", ".norm"))])
def test_a_module_around_another_one_is_called_at_every_step(place):
    model, ids, calls = model_of(), tokens(2, 5), []
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with put("around", model.get_submodule(place), model, place, lambda: calls.append(1)):
        found = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(calls) == 4
    assert torch.equal(found, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYER[2:])
def test_training_calls_it(way, name):
    model, ids, calls = model_of().train(), tokens(2, 9), []
    model(ids, labels=ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    place = f"backbone.layers.1{name}"
    with put(way, model.get_submodule(place), model, place, lambda: calls.append(1)):
        model(ids, labels=ids).loss.backward()
        assert len(calls) == 1
    for n, p in model.named_parameters():
        assert worst(p.grad, expected[n]) < 1e-4, n


@pytest.mark.parametrize("name", LAYER[3:])
def test_a_backward_hook_in_training_fires(name):
    model, ids, calls = model_of().train(), tokens(2, 9), []
    module = model.get_submodule(f"backbone.layers.1{name}")
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.register_full_backward_pre_hook(lambda *_: calls.append("before"))
    model(ids, labels=ids).loss.backward()
    assert sorted(calls) == ["backward", "before"]


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj", "conv1d"])
def test_a_parametrisation_is_used(name):
    model, ids, calls = model_of(), tokens(2, 9), []
    expected = model(ids).logits
    module = model.backbone.layers[0].mixer.get_submodule(name)
    parametrize.register_parametrization(module, "weight", Same(lambda: calls.append(1)))
    calls.clear()
    model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(calls) >= 3
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    calls.clear()
    model.train()(ids, labels=ids).loss.backward()
    assert calls
    assert module.parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "pruned"])
def test_older_reparametrisations_are_used(kind):
    from torch.nn.utils import prune

    model, ids = model_of(), tokens(1, 6)
    layer = model.backbone.layers[0].mixer.x_proj
    if kind == "pruned":
        prune.l1_unstructured(layer, "weight", 0.5)
    else:
        getattr(nn.utils, kind)(layer)
    model.eval()
    out = model.generate(
        ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
    )
    whole = model(out.sequences[:, :-1]).logits[:, 5:]
    assert worst(torch.stack(out.logits, 1), whole) < 1e-4


@pytest.mark.parametrize("way", ["forward", "hook with kwargs", "class"])
@pytest.mark.parametrize("place", ["", "backbone", *(f"backbone.layers.1{name}" for name in LAYER)])
@torch.no_grad()
def test_a_step_a_verification_and_the_engine_call_it(way, place):
    model, calls = model_of(), []
    module = model.get_submodule(place)
    plain = token_step(model, model.backbone.new_cache(1))(torch.tensor([3]))
    with put(way, module, model, place, lambda: calls.append(1)):
        step = token_step(model, model.backbone.new_cache(1))
        assert worst(step(torch.tensor([3])), plain) < 1e-4
        step(torch.tensor([4]))
        assert len(calls) == 2
        calls.clear()
        cache = model.backbone.new_cache(1)
        verify = verifier(model, cache, 4)
        logits = verify(torch.tensor([[3, 4, 5]]))[0]
        assert worst(logits[:1], plain) < 1e-4
        assert calls
        verify.commit([2])
        calls.clear()
        Engine(model, 2).write([Request(tokens(1, 4)[0], Sampling(temperature=0), max_new_tokens=4) for _ in range(2)])
        assert len(calls) >= 4
    other = model.backbone.new_cache(1)
    model(torch.tensor([[3, 4]]), cache_params=other)
    assert worst(cache.ssm_states, other.ssm_states) < 1e-4
    assert worst(cache.conv_states, other.conv_states) < 1e-4


@torch.no_grad()
def test_a_step_that_is_made_hears_of_a_hook_put_on_later():
    model, calls = model_of(), []
    cache, other = model.backbone.new_cache(1), model.backbone.new_cache(1)
    step, plain = token_step(model, cache), token_step(model, other)
    ids = [torch.tensor([t]) for t in range(1, 9)]
    expected = [plain(i).clone() for i in ids]
    found = [step(i).clone() for i in ids[:2]]
    for way in ("forward", "forward hook"):
        with put(way, model.backbone.layers[0].mixer.in_proj, model, "", lambda: calls.append(1)):
            found += [step(i).clone() for i in ids[len(found) : len(found) + 2]]
    assert len(calls) == 4
    found += [step(i).clone() for i in ids[6:]]
    assert len(calls) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert worst(ours, theirs) < 1e-4
    assert worst(cache.ssm_states, other.ssm_states) < 1e-4
    assert cache.get_seq_length() == other.get_seq_length() == 8


def test_an_engine_hears_of_a_hook_put_on_while_it_writes():
    model, calls = model_of(), []
    prompt = tokens(1, 4)[0]
    (alone,) = Engine(model, 2).write([Request(prompt, Sampling(temperature=0), max_new_tokens=8)])
    engine = Engine(model, 2)
    engine.submit(request := Request(prompt, Sampling(temperature=0), max_new_tokens=8))
    for number, _ in enumerate(engine.run()):
        if number == 2:
            handle = model.backbone.layers[1].mixer.x_proj.register_forward_hook(lambda *_: calls.append(1))
        if number == 5:
            handle.remove()
    assert calls
    assert request.tokens == alone.tokens


def test_what_is_untouched():
    model = model_of()
    m = model.backbone.layers[0].mixer
    assert untouched(m.in_proj, nn.Linear)
    assert untouched(m.dt_proj, TimeStepProjection)
    assert not untouched(m.dt_proj, nn.Linear)
    assert untouched(m, MambaMixer)
    assert is_ours(model)
    watch = Watch(modules_of(model))
    assert watch.holds()
    m.in_proj.forward = m.in_proj.forward  # what is left when a wrapper is taken away
    assert not intercepted(m.in_proj)
    assert watch.holds()
    m.in_proj.forward = m.out_proj.forward
    assert intercepted(m.in_proj)
    assert not watch.holds()
    del m.in_proj.forward
    m.in_proj.compile(backend="eager")
    assert intercepted(m.in_proj)
    m.in_proj = nn.Linear(m.in_proj.in_features, m.in_proj.out_features)
    assert not watch.holds(), "it is another module"


def test_transforms_and_modes_are_not_passed_by():
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = model_of(), tokens(1, 5)
    cache = model.backbone.new_cache(1)
    with FlopCounterMode(display=False) as counter:
        assert not native_serves(model, cache)
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    first = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert counter.get_total_flops() > first, "every step is counted"
    with torch.autocast("cpu", torch.bfloat16):
        assert not native_serves(model, cache)


@pytest.mark.parametrize(
    "fields", ["use_bias", "no_conv_bias", "conv_kernel_3", "falcon", "gelu", "residual_in_model_dtype"]
)
@torch.no_grad()
def test_the_convolution_by_its_module_is_the_op(fields):
    """Whole, in chunks, packed, padded, token by token, with and without a state."""
    model = pair(fields)[0]
    ids, mask = tokens(3, 11), torch.ones(3, 11, dtype=torch.int64)
    mask[0, :4] = mask[1, -3:] = mask[2, 5] = 0
    cu_seqlens = torch.tensor([0, 1, 3, 3, 11], dtype=torch.int32)

    def run() -> list[torch.Tensor]:
        whole = model(ids, use_cache=True)
        padded = model(ids, attention_mask=mask, use_cache=True)
        packed = model(ids[:1], cu_seqlens=cu_seqlens, use_cache=True)
        cache = model.backbone.new_cache(3)
        parts = [model(ids[:, a:b], cache_params=cache).logits for a, b in ((0, 2), (2, 3), (3, 9), (9, 11))]
        written = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        with torch.enable_grad():
            trained = model(ids, attention_mask=mask, use_cache=False).logits
        states = [t for c in (whole, padded, packed) for t in (c.cache_params.conv_states, c.cache_params.ssm_states)]
        return [
            whole.logits,
            padded.logits,
            packed.logits,
            *parts,
            *states,
            cache.conv_states,
            written.double(),
            trained,
        ]

    expected = run()
    calls = []
    for block in model.backbone.layers:
        block.mixer.conv1d.register_forward_hook(lambda *_: calls.append(1))
    found = run()
    assert calls
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert worst(ours, theirs) < 1e-4, i


@pytest.mark.parametrize("fields", [{"padding": (3,)}, {"dilation": (2,)}, {"stride": (2,)}])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_convolution_of_another_shape_is_refused_by_name(fields, hooked, training):
    """Also where nothing is on it, and its weight alone would be read."""
    model = model_of().train(training)
    conv = model.backbone.layers[0].mixer.conv1d
    for name, value in fields.items():
        setattr(conv, name, value)
    if hooked:
        conv.register_forward_hook(lambda *_: None)
    calls = [lambda: model(tokens(1, 9), use_cache=not training)]
    if not training:
        calls.append(lambda: model.generate(tokens(1, 5), max_new_tokens=3))
    for call in calls:
        with pytest.raises(ValueError, match=r"conv1d answered .*must not be padded further"):
            call()


def test_adapters_on_the_convolution_count():
    peft = pytest.importorskip("peft")
    model, ids = model_of(), tokens(2, 7)
    expected = model(ids).logits
    groups = model.config.intermediate_size
    config = peft.LoraConfig(r=groups, target_modules=["conv1d"], init_lora_weights=False)
    try:
        peft.inject_adapter_in_model(config, model.backbone.layers)
    except (ValueError, NotImplementedError) as error:
        pytest.skip(f"this peft has no adapters for grouped convolutions: {error}")
    assert worst(model.eval()(ids).logits, expected) > 1e-3


class Around(nn.Module):
    """A module around another one that shows nothing of it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("place", ["backbone.norm_f", "backbone.layers.1", "backbone.layers.0.mixer", "lm_head"])
def test_a_module_that_hides_what_is_in_it(place):
    """Whether a fast path may be taken is found out without its attributes."""
    model, ids = model_of(), tokens(2, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    parent, _, name = place.rpartition(".")
    around = Around(model.get_submodule(place))
    setattr(model.get_submodule(parent), name, around)
    assert torch.equal(model.generate(ids, **options), expected)
    assert around.calls == 4
    with torch.no_grad():
        cache = model(ids[:1], use_cache=True).cache_params
        assert verifier(model, cache, 2)(torch.tensor([[3, 4]])).shape[1] == 2


def test_training_without_the_bias_of_the_steps():
    """As generation does; `dt_proj` is a linear layer, and those have a bias or none."""
    model, ids = model_of().train(), tokens(2, 5)
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():
        mixer.dt_proj.bias.zero_()
    model(ids, labels=ids).loss.backward()
    expected = mixer.x_proj.weight.grad.clone()
    model.zero_grad()
    mixer.dt_proj.bias = None
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(mixer.x_proj.weight.grad, expected, rtol=1e-4, atol=1e-7)
