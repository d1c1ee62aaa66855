"""The baseline, the ablation and the Markov model are what they say they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from experiments.audio import Audio, FrameClassifier
from experiments.contenders import MAMBA, TRANSFORMER, make_contender, make_mamba, next_token_loss
from experiments.harness import parameter_count
from experiments.markov import MarkovModel
from experiments.settings import parse
from experiments.time_invariant import TimeInvariantMixer, fast_size, long_convolution, without_selection
from experiments.transformer import Transformer, TransformerConfig, rotate
from mambakit.ops import selective_scan


def small_transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(11, 32, 2, 48, head_size=8, max_length=64))


def test_the_transformer_is_causal():
    model = small_transformer()
    tokens = torch.randint(0, 11, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_attention_depends_on_relative_position_alone():
    torch.manual_seed(0)
    model = small_transformer()
    q, k = torch.randn(2, 1, 8)
    q, k = q.expand(64, 8), k.expand(64, 8)
    products = rotate(q, model.cos, model.sin) @ rotate(k, model.cos, model.sin).T
    torch.testing.assert_close(products[5, 2], products[40, 37], atol=1e-5, rtol=1e-5)
    assert not math.isclose(products[5, 2].item(), products[5, 4].item(), abs_tol=1e-3)


def test_rows_longer_than_the_table_are_refused():
    with pytest.raises(ValueError, match="65 tokens exceed max_length 64"):
        small_transformer()(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="head_size"):
        TransformerConfig(11, 30, 2, 48, head_size=8)


@pytest.mark.parametrize("width,layers", [(128, 12), (320, 8)])
def test_contenders_are_of_equal_size_and_start_at_uniform(width, layers):
    torch.manual_seed(0)
    sizes = {}
    for kind in (MAMBA, TRANSFORMER):
        model = make_contender(kind, 64, width, layers, 32, 64)
        sizes[kind] = parameter_count(model)
        tokens = torch.randint(0, 64, (2, 17))
        loss = next_token_loss(model, tokens[:, :-1], tokens[:, 1:])
        assert abs(loss.item() - math.log(64)) < 0.6
    assert abs(sizes[TRANSFORMER] / sizes[MAMBA] - 1) < 0.01, sizes


def test_without_selection_is_the_scan_with_constants():
    """The FFT equals the selective scan given the same Delta, B and C at every token, channel by channel."""
    torch.manual_seed(0)
    mixer = TimeInvariantMixer(make_mamba(8, 16, 1).backbone.layers[0].mixer)
    d, n = mixer.A_log.shape
    length = 37
    u = torch.randn(2, length, d)
    result = long_convolution(u, mixer.kernel(length))
    for channel in range(0, d, 5):
        expected, _ = selective_scan(
            u[:, :, channel : channel + 1],
            mixer.delta_bias[channel].detach().expand(2, length, 1).contiguous(),
            -torch.exp(mixer.A_log[channel : channel + 1]).detach(),
            torch.ones(2, length, n),
            mixer.C[channel].detach().expand(2, length, n).contiguous(),
            delta_softplus=True,
        )
        # The FFT's rounding is relative to the largest output of the row.
        torch.testing.assert_close(result[:, :, channel : channel + 1], expected, atol=1e-5, rtol=1e-4)


def test_without_selection_time_steps_do_not_depend_on_the_input():
    torch.manual_seed(0)
    model = without_selection(make_mamba(8, 16, 2))
    names = {name for name, _ in model.named_parameters()}
    assert not any("x_proj" in name or "dt_proj" in name for name in names)
    mixer = model.backbone.layers[0].mixer
    x = torch.randn(1, 9, mixer.A_log.shape[0])
    kernel = mixer.kernel(9)
    # Linear: the response to a sum is the sum of the responses.
    torch.testing.assert_close(
        long_convolution(x + 1, kernel), long_convolution(x, kernel) + long_convolution(torch.ones_like(x), kernel),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    loss = nn.functional.cross_entropy(model(torch.arange(8)[None], use_cache=False).logits[0], torch.arange(8))
    loss.backward()
    assert mixer.C.grad.abs().sum() > 0
    assert mixer.delta_bias.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="use_cache=False"):
        model(torch.arange(8)[None], use_cache=True)


def test_everything_trains_under_autocast():
    """As on a GPU: bfloat16 products, float32 parameters; gradients are finite."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 8, (2, 24))
    classifier = FrameClassifier(parse(Audio, ["--steps", "1", "--hidden-size", "16", "--frame", "8"], ""))
    for model, run in (
        (without_selection(make_mamba(8, 16, 2)), lambda m: m(tokens, use_cache=False).logits),
        (make_contender(MAMBA, 8, 16, 2, 8, 24), lambda m: m(tokens, use_cache=False).logits),
        (small_transformer(), lambda m: m(tokens)),
        (classifier, lambda m: m(tokens)),
    ):
        expected = run(model)
        with torch.autocast("cpu", torch.bfloat16):
            result = run(model)
        result.float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        # bfloat16 keeps 8 bits; a handful of layers add up to a few percent of the largest value.
        torch.testing.assert_close(result.float(), expected.float(), atol=0.05 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("least,size", [(1, 2), (8223, 8232), (8192, 8192), (41, 42)])
def test_fft_sizes(least, size):
    assert fast_size(least) == size


def test_markov_model_against_a_count_by_hand():
    stream = torch.tensor([0, 1, 0, 1, 0, 0])
    model = MarkovModel([stream], 2, 1, 1.0)
    # Order 0: p(0) = (4 + 1/2) / 7. Order 1 after 0 (seen 3 times, twice before 1): p(1 | 0) = (2 + p(1)) / 4.
    p0, p1 = 4.5 / 7, 2.5 / 7
    bits = model.bits_per_symbol(torch.tensor([0, 1]))
    assert bits[0] == pytest.approx(-(math.log2(p0) + math.log2(p1)) / 2)
    assert bits[1] == pytest.approx(-(math.log2(p0) + math.log2((2 + p1) / 4)) / 2)


def test_markov_probabilities_add_up_to_one():
    torch.manual_seed(0)
    model = MarkovModel([torch.randint(0, 3, (50,)), torch.randint(0, 3, (7,))], 3, 2, 0.5)
    total = 0.0
    for last in range(3):  # the last symbol's cost alone: the difference to the prefix
        whole = torch.tensor([2, 1, 0, last])
        total += 2 ** -(4 * model.bits_per_symbol(whole)[2] - 3 * model.bits_per_symbol(whole[:3])[2])
    assert total == pytest.approx(1.0)
