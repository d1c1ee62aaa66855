"""The numbers of an inspection are those of a float64 loop over tokens, for any chunks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import mambakit
from mambakit.errors import UsageError
from mambakit.inspection import implicit_attention, inspect
from mambakit.inspection import numbers as module
from mambakit.inspection.attention import attention_rows
from tests.models.configurations import pair
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype="float64").eval()
    return model, mambakit.AutoTokenizer.from_pretrained(folder)


def norm(module, x):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + module.eps) * module.weight


@torch.no_grad()
def loop(model, ids):
    """Token by token: surprise (l,), and of each layer u, delta (l, d), B, C (l, n), y (l, d) before the gate, and what
    is added to the state (l, d, n)."""
    layers = [{name: [] for name in ("u", "delta", "B", "C", "y", "added")} for _ in model.backbone.layers]
    states = [None] * len(layers)
    logits = []
    for token in ids:
        stream = model.backbone.embeddings.weight[token]
        for index, block in enumerate(model.backbone.layers):
            mixer = block.mixer
            u, z = (mixer.in_proj.weight @ norm(block.norm, stream)).chunk(2)
            window, h = states[index] or (u.new_zeros(len(u), mixer.conv_kernel_size), 0)
            window = torch.cat([window[:, 1:], u[:, None]], 1)
            u = F.silu((window * mixer.conv1d.weight[:, 0]).sum(1) + mixer.conv1d.bias)
            n = mixer.ssm_state_size
            dt, B, C = (mixer.x_proj.weight @ u).split([mixer.time_step_rank, n, n])
            delta = torch.log1p(torch.exp(mixer.dt_proj.weight @ dt + mixer.dt_proj.bias))
            added = (delta * u)[:, None] * B
            h = torch.exp(delta[:, None] * -torch.exp(mixer.A_log)) * h + added
            y = h @ C + mixer.D * u
            states[index] = window, h
            for name, value in {"u": u, "delta": delta, "B": B, "C": C, "y": y, "added": added}.items():
                layers[index][name].append(value)
            stream = stream + mixer.out_proj.weight @ (y * F.silu(z))
        logits.append(model.lm_head.weight @ norm(model.backbone.norm_f, stream))
    surprise = -torch.stack(logits).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    return surprise, [{name: torch.stack(values) for name, values in layer.items()} for layer in layers]


@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_every_number_is_the_loops(both, chunk):
    model, tokenizer = both
    text = torch.randint(1, 300, (40,))
    found = inspect(model, tokenizer, text, chunk_size=chunk, layers=[1], channels=[3, 40, 0])
    ids = torch.cat([torch.tensor([tokenizer.eos_token_id]), text])
    surprise, layers = loop(model, ids)
    close = {"rtol": 1e-7, "atol": 1e-8}  # the softplus of the scan in PyTorch is linear above 20: 2e-9
    assert torch.equal(found.tokens, ids)
    torch.testing.assert_close(found.surprise[1:].double(), surprise, rtol=1e-6, atol=1e-6)  # the scores are float32
    assert found.surprise[0] == 0
    for index, layer in enumerate(layers):
        A = -torch.exp(model.backbone.layers[index].mixer.A_log.double())
        torch.testing.assert_close(found.step[index], layer["delta"].mean(1), **close)
        torch.testing.assert_close(found.kept[index], torch.exp(layer["delta"][..., None] * A).mean((1, 2)), **close)
        torch.testing.assert_close(found.let_in[index], layer["added"].square().mean((1, 2)).sqrt(), **close)
        half_life = math.log(2) / (layer["delta"].mean(0)[:, None] * -A)
        torch.testing.assert_close(found.half_life[index], half_life, **close)
    trace = found.layers[1]
    assert trace.channels.tolist() == [0, 3, 40]
    for at, channel in enumerate(trace.channels.tolist()):
        torch.testing.assert_close(trace.delta[:, at], layers[1]["delta"][:, channel], **close)
        y = trace.attention(channel) @ trace.u[:, at] + model.backbone.layers[1].mixer.D[channel] * trace.u[:, at]
        torch.testing.assert_close(y, layers[1]["y"][:, channel], **close)


def test_attention_by_blocks_is_the_formula():
    torch.manual_seed(0)
    length, n = 37, 4
    delta = torch.rand(length, dtype=torch.float64)
    A = -torch.rand(n, dtype=torch.float64) * 30
    B, C = torch.randn(2, length, n, dtype=torch.float64)
    expected = torch.zeros(length, length, dtype=torch.float64)
    for t in range(length):
        for s in range(t + 1):
            expected[t, s] = (C[t] * torch.exp(A * delta[s + 1 : t + 1].sum()) * delta[s] * B[s]).sum()
    torch.testing.assert_close(implicit_attention(delta, A, B, C), expected, rtol=1e-10, atol=1e-13)
    for rows in (1, 5, 36, 37):
        parts = [(start, block) for start, block in attention_rows(delta, A, B, C, rows)]
        assert [start for start, _ in parts] == list(range(0, length, rows))
        for start, block in parts:
            theirs = expected[start : start + len(block), : block.shape[1]]
            torch.testing.assert_close(block, theirs, rtol=1e-10, atol=1e-13)
    # Steps so long that nothing is left of what came before: no overflow, no NaN.
    huge = implicit_attention(delta * 1e4, A, B, C)
    assert huge.isfinite().all()


@pytest.mark.parametrize("cells", [None, 100, 20, 7, 1])
def test_shares_pool_to_means_of_sums(both, cells):
    model, tokenizer = both
    trace = inspect(model, tokenizer, torch.randint(1, 300, (40,)), layers=[0], channels=[1, 2]).layers[0]
    whole = torch.zeros(41, 41, dtype=torch.float64)
    for channel in (1, 2):
        alpha = trace.attention(channel).abs()
        whole += alpha / alpha.sum(1, keepdim=True) / 2
    shares = trace.shares(cells)
    width = 1 if cells is None else math.ceil(41 / cells)
    size = math.ceil(41 / width)
    assert shares.shape == (size, size)
    for i in range(size):
        for j in range(size):
            cell = whole[i * width : (i + 1) * width, j * width : (j + 1) * width]
            assert float(shares[i, j]) == pytest.approx(float(cell.sum(1).mean()), abs=1e-12)
    torch.testing.assert_close(shares.sum(1), torch.ones(size, dtype=torch.float64))


def test_pieces_make_up_the_text(both):
    model, tokenizer = both
    text = "naïve 日本語 🙂 end"
    found = inspect(model, tokenizer, text)
    assert "".join(found.pieces[1:]) == text
    assert len(found.pieces) == len(found.tokens)
    assert set(found.arrays()) > {"surprise", "half_life", "layer0_delta", "layer1_B"}


def test_the_default_channels_go_from_short_to_long_memory(both):
    model, tokenizer = both
    found = inspect(model, tokenizer, "The cat sat on the mat")
    longest = found.half_life[0].amax(1)
    channels = found.layers[0].channels.tolist()
    assert len(channels) == module._CHANNELS
    assert {int(longest.argmin()), int(longest.argmax())} <= set(channels)


def test_a_falcon_model_and_what_cannot_be_shown(both):
    _, tokenizer = both
    falcon = pair("falcon")[0].double().eval()
    text = torch.randint(1, 30, (20,))
    found = inspect(falcon, tokenizer, text)
    ids = torch.cat([torch.tensor([tokenizer.eos_token_id]), text])
    with torch.no_grad():
        expected = -falcon(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, text[:, None])[:, 0]
    torch.testing.assert_close(found.surprise[1:].double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="in eval mode"):
        inspect(falcon.train(), tokenizer, text)


def test_mistakes(both):
    model, tokenizer = both
    for arguments, message in (
        ({"text": ""}, "empty"),
        ({"layers": [2]}, "layer 2 is not among the model's: 0 to 1"),
        ({"channels": [-1]}, "channel -1"),
        ({"layers": []}, "no layer is named"),
    ):
        with pytest.raises(UsageError, match=message):
            inspect(model, tokenizer, **{"text": "x", **arguments})
    with pytest.raises(ValueError, match="was not traced"):
        inspect(model, tokenizer, "x", channels=[1]).layers[0].attention(0)
