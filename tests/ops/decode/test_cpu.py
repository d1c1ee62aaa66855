"""DecodeStep against the references, token by token, and its independence of the batch."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops._backends import native
from mambakit.ops.decode import reference
from mambakit.ops.decode.cpu import DecodeStep
from mambakit.ops.decode.cpu_parts import DecodeParts
from mambakit.ops.decode.cpu_verify import VerifyStep
from mambakit.ops.decode.packed import PackedLayer
from mambakit.ops.linear import pack
from mambakit.ops.linear.cpu import KINDS
from tests.ops.closeness import relative_error

H, D, N, R, K, VOCABULARY, LAYERS = 40, 80, 16, 5, 4, 99, 3


EPS = 1e-3  # of the norms of dt, B and C
NORMS = {"plain": (None, False), "falcon": (EPS, False), "jamba": (EPS, True)}
"""Their epsilon, and whether they have weights."""


def make_layers(format="float32", weighted=False):
    dtype = torch.bfloat16 if format == "lossless16" else torch.float32

    def matrix(rows, columns):
        return pack((torch.randn(rows, columns) / columns**0.5).to(dtype), format)

    return [
        PackedLayer(
            norm=torch.rand(H) + 0.5, in_proj=matrix(2 * D, H), in_proj_bias=torch.randn(2 * D),
            conv=torch.randn(D, K), conv_bias=torch.randn(D), x_proj=matrix(R + 2 * N, D), dt_proj=matrix(D, R),
            dt_bias=torch.randn(D), A=-torch.rand(D, N) * 8, D=torch.randn(D), out_proj=matrix(H, D),
            out_proj_bias=None,
            **({"dt_norm": torch.randn(R), "B_norm": torch.randn(N), "C_norm": torch.randn(N)} if weighted else {}),
        )
        for _ in range(LAYERS)
    ]  # fmt: skip


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("norms", NORMS)
def test_tokens_in_a_row(isa, format, norms):
    mixer_eps, weighted = NORMS[norms]
    layers, final_norm = make_layers(format, weighted), torch.rand(H)
    dtype = torch.bfloat16 if format == "lossless16" else torch.float32
    head = pack(torch.randn(VOCABULARY, H, dtype=dtype), format)
    b = 3
    # Rounding to 16 bits: a number that differs by 1e-7 may go the other way, by 2^-16 of its group's largest.
    bound = 2e-4 if format in ("int8", "int4") else 1e-5
    conv, ssm = torch.randn(LAYERS, b, D, K - 1), torch.randn(LAYERS, b, D, N)
    expected_conv, expected_ssm = conv.double(), ssm.double()
    step = DecodeStep(layers, final_norm, head, 1e-5, conv, ssm, mixer_eps)
    for _ in range(4):
        x = torch.randn(b, H)
        logits = step(x)
        want, expected_conv, expected_ssm = reference.decode(
            x, layers, final_norm, head, 1e-5, expected_conv, expected_ssm, mixer_eps, x_in_16_bits=True
        )
        assert relative_error(logits, want) < bound
    assert relative_error(ssm, expected_ssm) < bound
    assert relative_error(conv, expected_conv) < bound


@pytest.mark.parametrize("norms", NORMS)
def test_a_row_alone_is_the_row_of_a_batch(isa, norms):
    mixer_eps, weighted = NORMS[norms]
    layers, final_norm, head = (
        make_layers(weighted=weighted),
        torch.rand(H),
        pack(torch.randn(VOCABULARY, H), "float32"),
    )
    conv, ssm, x = torch.randn(LAYERS, 5, D, K - 1), torch.randn(LAYERS, 5, D, N), torch.randn(5, H)
    alone = []
    for row in range(5):
        states = (s[:, row : row + 1].clone() for s in (conv, ssm))
        alone.append(DecodeStep(layers, final_norm, head, 1e-5, *states, mixer_eps)(x[row : row + 1]))
    assert torch.equal(DecodeStep(layers, final_norm, head, 1e-5, conv, ssm, mixer_eps)(x), torch.cat(alone))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("format", ["float32", "int8"])
@pytest.mark.parametrize("b", [1, 17, 40])
def test_parts_have_the_bits_of_their_rows(isa, b, format, threads):
    """Any number of rows, on fewer threads than there are parts, and on more; states are updated in place."""
    layers, final_norm, head = make_layers(format), torch.rand(H), pack(torch.randn(VOCABULARY, H), format)
    conv, ssm = torch.randn(LAYERS, b, D, K - 1), torch.randn(LAYERS, b, D, N)
    alone, before = (conv.clone(), ssm.clone()), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = DecodeParts(layers, final_norm, head, 1e-5, conv, ssm)
    finally:
        torch.set_num_threads(before)
    rows = [[s[:, row : row + 1].clone() for s in alone] for row in range(b)]
    one = [DecodeStep(layers, final_norm, head, 1e-5, *states) for states in rows]
    for _ in range(3):
        x = torch.randn(b, H)
        assert torch.equal(step(x), torch.cat([single(x[i : i + 1]) for i, single in enumerate(one)]))
    assert torch.equal(conv, torch.cat([states[0] for states in rows], 1))
    assert torch.equal(ssm, torch.cat([states[1] for states in rows], 1))


def test_parts_after_a_fork(isa, monkeypatch):
    """The other threads are gone in a child; the one that is left computes all parts."""
    layers, final_norm, head = make_layers(), torch.rand(H), pack(torch.randn(VOCABULARY, H), "float32")
    states = [torch.randn(LAYERS, 40, D, K - 1), torch.randn(LAYERS, 40, D, N)]
    others, x = [s.clone() for s in states], torch.randn(40, H)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    step, expected = (DecodeParts(layers, final_norm, head, 1e-5, *s) for s in (states, others))
    monkeypatch.setattr(native._State, "forked", True)
    monkeypatch.setattr(step._others, "submit", None)
    found = step(x)
    monkeypatch.setattr(native._State, "forked", False)
    assert torch.equal(found, expected(x))


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("format", ["float32", "int4"])
@pytest.mark.parametrize("b", [1, 3])
def test_verification_has_the_bits_of_steps(isa, b, format, norms):
    """Logits of every token; the state after the tokens that are kept."""
    mixer_eps, weighted = NORMS[norms]
    layers, final_norm, head = make_layers(format, weighted), torch.rand(H), pack(torch.randn(VOCABULARY, H), format)
    conv, ssm, x = torch.randn(LAYERS, b, D, K - 1), torch.randn(LAYERS, b, D, N), torch.randn(5, b, H)
    others = conv.clone(), ssm.clone()
    verify = VerifyStep(layers, final_norm, head, 1e-5, conv, ssm, 5, mixer_eps)
    step = DecodeStep(layers, final_norm, head, 1e-5, *others, mixer_eps)
    logits = verify(x)
    states = []
    for i in range(3):
        assert torch.equal(logits[i], step(x[i])), i
        states.append((others[0].clone(), others[1].clone()))
    kept = [3, 1, 2][:b]
    verify.commit(kept)
    for row, tokens in enumerate(kept):
        assert torch.equal(conv[:, row], states[tokens - 1][0][:, row])
        assert torch.equal(ssm[:, row], states[tokens - 1][1][:, row])


def test_what_it_does_not_serve(isa):
    layers, final_norm, head = make_layers(), torch.rand(H), pack(torch.randn(VOCABULARY, H), "float32")
    with pytest.raises(ValueError, match="serves 1 to 16"):
        DecodeStep(layers, final_norm, head, 1e-5, torch.zeros(LAYERS, 17, D, K - 1), torch.zeros(LAYERS, 17, D, N))
    with pytest.raises(ValueError, match="the batch is 0"):
        DecodeParts(layers, final_norm, head, 1e-5, torch.zeros(LAYERS, 0, D, K - 1), torch.zeros(LAYERS, 0, D, N))
    strided = torch.zeros(LAYERS, 1, D, 2 * N)[..., ::2]
    with pytest.raises(ValueError, match="contiguous"):
        DecodeStep(layers, final_norm, head, 1e-5, torch.zeros(LAYERS, 1, D, K - 1), strided)
