"""Both directions: each token knows what is before and after it, padding nothing; the reverse complement is exact."""

from __future__ import annotations

import copy

import pytest
import torch

import mambakit
from mambakit import CheckpointError
from mambakit.export.onnx import to_onnx
from mambakit.export.pt2 import to_pt2
from mambakit.models.checkpoints import describe
from tests.models.configurations import worst

COMPLEMENT = [0, 4, 3, 2, 1, 5, 6, 7]  # END, A, C, G, T, N, MASK and one more


def made(cls="BiMambaForMaskedLM", **fields):
    torch.manual_seed(0)
    given = {"vocab_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "initializer_range": 0.3, "num_labels": 3}
    model = getattr(mambakit, cls)(mambakit.BiMambaConfig(**{**given, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1, where a mistake could hide
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def ids(b=2, length=11):
    torch.manual_seed(1)
    return torch.randint(0, 8, (b, length))


def logits(model, tokens, **arguments):
    with torch.no_grad():
        return model(tokens, **arguments).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_layer_is_the_sum_of_two_mixers(tied):
    """Written down anew from the mixers alone."""
    model = made("BiMambaModel", tie_projections=tied)
    x = model.embeddings(ids())
    with torch.no_grad():
        residual = torch.zeros_like(x)
        for block in model.layers:
            residual = residual + x
            y = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + 1e-5) * block.norm.weight
            x = block.mixer(y) + block.backward_mixer(y.flip(1)).flip(1)
        residual = residual + x
        expected = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + 1e-5) * model.norm_f.weight
        output = model(ids(), output_hidden_states=True)
    assert worst(output.last_hidden_state, expected) < 1e-5
    assert len(output.hidden_states) == 4
    assert worst(output.hidden_states[2], residual) < 1e-5


def test_every_token_counts_for_every_other():
    model = made()
    before = logits(model, ids())
    for place in (0, 5, 10):
        changed = ids()
        changed[:, place] = (changed[:, place] + 1) % 8
        difference = (logits(model, changed) - before).abs().amax((0, 2))
        assert (difference > 1e-6).all(), f"token {place} reaches not every place"


def test_tied_projections_are_one_weight():
    tied, own = made(), made(tie_projections=False)
    names = [n for n, _ in tied.named_parameters() if "backward_mixer" in n]
    assert names
    assert not any("in_proj" in n or "out_proj" in n for n in names)
    block = tied.backbone.layers[0]
    assert block.backward_mixer.in_proj is block.mixer.in_proj
    copied = copy.deepcopy(tied)
    with torch.no_grad():
        copied.backbone.layers[0].mixer.in_proj.weight.zero_()
    assert not copied.backbone.layers[0].backward_mixer.in_proj.weight.any()
    assert block.mixer.in_proj.weight.any(), "a copy has weights of its own"
    mixer = own.backbone.layers[0]
    assert not torch.equal(mixer.backward_mixer.in_proj.weight, mixer.mixer.in_proj.weight)


@pytest.mark.parametrize("complement", [None, COMPLEMENT])
@pytest.mark.parametrize("cls", ["BiMambaForMaskedLM", "BiMambaForTokenClassification"])
def test_padding_and_packing_change_nothing(cls, complement):
    model, tokens = made(cls, complement=complement), ids()
    mask = torch.tensor([[0] * 4 + [1] * 7, [1] * 8 + [0] * 3])
    padded = logits(model, tokens, attention_mask=mask)
    first, second = logits(model, tokens[:1, 4:]), logits(model, tokens[1:, :8])
    assert worst(padded[:1, 4:], first) < 1e-5
    assert worst(padded[1:, :8], second) < 1e-5
    row = torch.cat([tokens[0, 4:], tokens[1, :8]])[None]
    packed = logits(model, row, cu_seqlens=torch.tensor([0, 7, 15], dtype=torch.int32))
    assert worst(packed, torch.cat([first, second], 1)) < 1e-5


def test_the_other_strand():
    """Logits of the reverse complement are reversed, and every token's column is its complement's."""
    table, tokens = torch.tensor(COMPLEMENT), ids()
    other = table[tokens].flip(1)
    model = made(complement=COMPLEMENT)
    assert worst(logits(model, other).flip(1)[..., table], logits(model, tokens)) < 1e-5
    plain = made()
    assert worst(logits(plain, other).flip(1)[..., table], logits(plain, tokens)) > 0.1, "no test of a model without"
    labels = made("BiMambaForTokenClassification", complement=COMPLEMENT)
    assert worst(logits(labels, other).flip(1), logits(labels, tokens)) < 1e-5
    texts = made("BiMambaForSequenceClassification", complement=COMPLEMENT)
    mask = torch.tensor([[1] * 11, [1] * 8 + [0] * 3])
    assert worst(
        logits(texts, other, attention_mask=mask.flip(1)), logits(texts, tokens, attention_mask=mask)
    ) < 1e-5  # fmt: skip
    with torch.no_grad():
        states, swapped = (model.backbone(t).last_hidden_state for t in (tokens, other))
    assert states.shape == (2, 11, 48)
    assert worst(swapped.flip(1).roll(24, -1), states) < 1e-5


def test_masked_tokens_are_learned():
    """The masked token is the one after it: a causal model could not know."""
    torch.manual_seed(0)
    model = mambakit.BiMambaForMaskedLM(mambakit.BiMambaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=2))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(120):
        tokens = torch.randint(1, 6, (16, 6)).repeat_interleave(2, 1)
        masked, labels = tokens.clone(), torch.full_like(tokens, -100)
        masked[:, ::2], labels[:, ::2] = 6, tokens[:, ::2]
        loss = model(masked, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1, "chance is ln 5 = 1.6"


@pytest.mark.parametrize(
    ("cls", "auto"),
    [("BiMambaForMaskedLM", "AutoModelForMaskedLM"),
     ("BiMambaForTokenClassification", "AutoModelForTokenClassification"),
     ("BiMambaForSequenceClassification", "AutoModelForSequenceClassification")],
)  # fmt: skip
def test_saved_and_loaded(cls, auto, tmp_path):
    model = made(cls, complement=COMPLEMENT)
    model.save_pretrained(tmp_path)
    again = getattr(mambakit, auto).from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config.complement == COMPLEMENT
    assert torch.equal(logits(again, ids()), logits(model, ids()))
    assert describe(tmp_path).state_bytes == 0
    assert describe(tmp_path).parameters == model.num_parameters()
    with pytest.raises(ValueError, match="bimamba has no BiMambaForCausalLM"):
        mambakit.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = made(complement=COMPLEMENT).train()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids(), labels=ids()).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert all(g.any() for g in gradients[-1])
    for plain, again in zip(*gradients, strict=True):
        assert worst(again, plain) < 1e-5


def test_wrong_values(tmp_path):
    for complement, message in (
        ([0, 1], "complement has 2 entries, the vocabulary 8 tokens"),
        ([1, 2, 0, 3, 4, 5, 6, 7], r"complement\[0\] is 1"),
        ([0, 1, 2, 3, 4, 5, 6, 8], r"complement\[7\] is 8"), ("ACGT", "complement has 'ACGT'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mambakit.BiMambaConfig(vocab_size=8, hidden_size=8, complement=complement)
    model = made(complement=COMPLEMENT)
    with pytest.raises(ValueError, match="inputs_embeds has no complement"):
        model(inputs_embeds=torch.zeros(1, 3, 24))
    with pytest.raises(ValueError, match="exactly one of"):
        model()
    with pytest.raises(ValueError, match="its weights are not packed"):
        model.quantize("int8")
    with pytest.raises(ValueError, match="labels have shape"):
        model(ids(), labels=torch.zeros(2, 3, dtype=torch.int64))
    for save in (model.save_gguf, model.save_original, lambda path: to_onnx(model, path), lambda p: to_pt2(model, p)):
        with pytest.raises(CheckpointError, match="bimamba"):
            save(tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
