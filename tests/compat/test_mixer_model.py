"""compat's blocks and language model: residual streams, initial values, checkpoints both ways, generation."""

from __future__ import annotations

import functools
import inspect
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mambakit
from mambakit.compat import early_block
from mambakit.compat.block import Block
from mambakit.compat.generation import InferenceParams, decode
from mambakit.compat.hub import load_config_hf, load_state_dict_hf
from mambakit.compat.mamba import Mamba
from mambakit.compat.mixer_model import MambaConfig, MambaLMHeadModel, MixerModel, create_block
from mambakit.compat.mlp import GatedMLP
from mambakit.compat.norm import RMSNorm
from mambakit.compat.sampling import modify_logit_for_repetition_penalty, sample
from tests.compat.oracles import error
from tests.models.tiny import save_tiny

TINY = {"d_model": 24, "n_layer": 3, "vocab_size": 37}


def tiny(**fields) -> MambaLMHeadModel:
    torch.manual_seed(1)
    model = MambaLMHeadModel(MambaConfig(**TINY | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("norm", [RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("fused", [True, False])
def test_blocks(norm, fused):
    """Both blocks are add, norm, mixer; their constructors have upstream's two signatures."""
    x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    block = Block(24, Mamba, nn.Identity, norm, fused, True)
    early = early_block.Block(24, Mamba, norm, fused, True)
    early.load_state_dict(block.state_dict())
    for stream in (residual, None):
        y, total = block(x, stream)
        right = x if stream is None else x + stream
        assert torch.equal(total, right)
        assert error(y, block.mixer(nn.functional.layer_norm(right, (24,), block.norm.weight, block.norm.bias,
                     block.norm.eps) if norm is nn.LayerNorm else block.norm(right))) < 1e-6  # fmt: skip
        assert torch.equal(early(x, stream)[0], y)
    half, total = block.bfloat16()(x.bfloat16(), residual)
    assert (half.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert list(inspect.signature(Block).parameters)[:3] == ["dim", "mixer_cls", "mlp_cls"]
    assert list(inspect.signature(early_block.Block).parameters)[:3] == ["dim", "mixer_cls", "norm_cls"]
    states = block.allocate_inference_cache(2, 9)
    assert [tuple(s.shape) for s in states] == [(2, 48, 4), (2, 48, 16)]


def test_a_block_with_an_mlp():
    mlp = functools.partial(GatedMLP, hidden_features=32, multiple_of=16)
    for fused in (True, False):
        block = Block(24, Mamba, mlp, RMSNorm, fused)
        x = torch.randn(2, 5, 24)
        y, total = block(x)
        mixed = block.mixer(block.norm(x))
        assert error(total, x + mixed) < 1e-6
        assert error(y, block.mlp(block.norm2(x + mixed))) < 1e-6
    assert GatedMLP(30).fc2.in_features == 128  # 80, rounded up
    with pytest.raises(ValueError, match="fused_add_norm knows nn.LayerNorm and mamba_ssm's RMSNorm, not Identity"):
        Block(24, Mamba, nn.Identity, lambda dim: nn.Identity(), True)


def test_initial_values():
    """out_proj is divided by sqrt(layers), embeddings are N(0, 0.02), biases 0 but for the time steps'."""
    model = MambaLMHeadModel(MambaConfig(d_model=64, n_layer=4, vocab_size=5000, ssm_cfg={"bias": True}))
    edge = 1 / math.sqrt(128) / math.sqrt(4)
    weight = model.backbone.layers[1].mixer.out_proj.weight
    assert 0.95 * edge < weight.abs().max() <= edge
    assert abs(model.backbone.embedding.weight.std() - 0.02) < 1e-3
    assert model.backbone.layers[0].mixer.in_proj.bias.abs().max() == 0
    assert model.backbone.layers[0].mixer.dt_proj.bias.abs().min() > 0
    assert model.lm_head.weight is model.backbone.embedding.weight
    untied = MambaLMHeadModel(MambaConfig(**TINY, tie_embeddings=False, pad_vocab_size_multiple=1))
    assert untied.lm_head.weight is not untied.backbone.embedding.weight
    assert untied.lm_head.weight.shape == (37, 24)


@pytest.mark.parametrize("fields", [{}, {"fused_add_norm": False, "residual_in_fp32": False}])
def test_a_checkpoint_is_mambakit_s_too(tmp_path, fields):
    """Written here, read by AutoModelForCausalLM: the same logits; and back."""
    model = tiny(**fields)
    model.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, 37, (2, 9))
    ours = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert error(ours(ids).logits, model(ids).logits) < 2e-6
    ours.save_original(tmp_path / "ours")
    again = MambaLMHeadModel.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert error(again(ids).logits, model(ids).logits) < 2e-6
    half = MambaLMHeadModel.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16


def test_files_that_do_not_fit(tmp_path):
    save_tiny(tmp_path / "transformers")
    with pytest.raises(ValueError, match="a model in transformers' format opens with mambakit.AutoModelForCausalLM"):
        MambaLMHeadModel.from_pretrained(tmp_path / "transformers")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_config_hf(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no pytorch_model\.bin or model\.safetensors"):
        load_state_dict_hf(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id|is not a folder"):
        load_config_hf("no such/thing/at all")


def test_what_mambakit_does_not_have_is_named():
    with pytest.raises(NotImplementedError, match="layer = 'Mamba2'; mambakit has Mamba-1 layers"):
        MambaLMHeadModel(MambaConfig(**TINY, ssm_cfg={"layer": "Mamba2"}))
    with pytest.raises(NotImplementedError, match="layer 1 is one of attention"):
        MambaLMHeadModel(MambaConfig(**TINY, attn_layer_idx=[1]))
    with pytest.raises(TypeError, match="pass ssm_cfg= by name"):
        create_block(24, {"d_state": 8})
    with pytest.raises(TypeError, match="pass vocab_size= by name"):
        MixerModel(24, 2, 37)
    assert MixerModel(d_model=24, n_layer=1, vocab_size=8, d_intermediate=32)(torch.zeros(1, 2).long()).shape[2] == 24


def greedy(model, ids, length):
    with torch.no_grad():
        while ids.shape[1] < length:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("rms_norm", [True, False])
def test_generate_is_the_forward(rms_norm):
    model = tiny(rms_norm=rms_norm)
    ids = torch.randint(0, 37, (3, 5))
    expected = greedy(model, ids, 12)
    assert torch.equal(model.generate(ids, 12), expected)
    out = model.generate(ids, 12, return_dict_in_generate=True, output_scores=True, cg=True)
    assert torch.equal(out.sequences, expected)
    with torch.no_grad():
        logits = model(expected).logits
        assert error(torch.stack(out.scores, 1), logits[:, 4:-1]) < 1e-5
        assert error(model(expected, num_last_tokens=2).logits, logits[:, -2:]) < 1e-6
    assert model.generate(ids, 12, return_dict_in_generate=True).scores is None


def test_steps_are_the_forward():
    model = tiny()
    ids = torch.randint(0, 37, (2, 7))
    with torch.no_grad():
        whole = model(ids).logits
        for states in ({}, model.allocate_inference_cache(2, 7)):
            params = InferenceParams(7, 2, key_value_memory_dict=states)
            found = []
            for piece in ids.split([3, 1, 1, 2], 1):
                found.append(model(piece, inference_params=params).logits)
                params.seqlen_offset += piece.shape[1]
            assert error(torch.cat(found, 1), whole) < 2e-6
    params.reset(9, 3)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (9, 3, 0)


class Streamer:
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, tokens):
        self.seen.append(tokens)

    def end(self):
        self.ended = True


def test_generate_s_options(capsys):
    model, streamer = tiny(), Streamer()
    ids = torch.randint(0, 37, (2, 4))
    plain = greedy(model, ids, 10)
    teacher = torch.randint(0, 37, (2, 7))
    out = model.generate(ids, 10, teacher_outputs=teacher, streamer=streamer, enable_timing=True)
    assert torch.equal(out[:, 4:7], teacher[:, 4:7])
    assert torch.equal(out, greedy(model, out[:, :7], 10))
    assert torch.equal(torch.cat(streamer.seen, 1), out)
    assert streamer.ended
    assert "decoding time" in capsys.readouterr().out
    end = int(plain[0, 5])
    stopped = model.generate(ids, 10, eos_token_id=end)
    for row in range(2):  # each row as without the token, up to its own, which it repeats
        ends = (plain[row, 4:] == end).nonzero().flatten().tolist()
        place = 4 + ends[0] if ends else stopped.shape[1] - 1
        assert torch.equal(stopped[row, : place + 1], plain[row, : place + 1])
        assert (stopped[row, place + 1 :] == end).all()
    assert model.generate(ids, 10, vocab_size=5)[:, 4:].max() < 5
    assert torch.equal(model.generate(ids, 3), ids)
    torch.manual_seed(0)
    drawn = model.generate(ids, 30, top_k=0, top_p=0.9, temperature=2.0)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, 30, top_k=0, top_p=0.9, temperature=2.0), drawn)
    assert not torch.equal(drawn, greedy(model, ids, 30))
    penalised = decode(ids, model, 30, repetition_penalty=100.0).sequences
    assert all(len(set(row.tolist()[4:])) == 26 for row in penalised)
    with pytest.raises(ValueError, match="expected .b, l. with at least one token"):
        model.generate(torch.zeros(2, 0, dtype=torch.long), 4)


def test_sampling_keeps_what_it_says():
    """Shares of 4,000 draws, within six deviations."""
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = probabilities.log().repeat(4000, 1)

    def shares(**options):
        return torch.bincount(sample(logits.clone(), **options), minlength=4) / 4000

    def close(found, expected):
        expected = torch.tensor(expected)
        return bool(((found - expected).abs() <= 6 * (expected * (1 - expected) / 4000).sqrt()).all())

    assert close(shares(top_k=0), [0.5, 0.25, 0.125, 0.125])
    assert close(shares(top_k=2), [2 / 3, 1 / 3, 0.0, 0.0])
    assert close(shares(top_k=0, top_p=0.7), [2 / 3, 1 / 3, 0.0, 0.0])
    assert close(shares(top_k=0, min_p=0.4), [2 / 3, 1 / 3, 0.0, 0.0])
    assert close(shares(top_k=1, temperature=9.0), [1.0, 0.0, 0.0, 0.0])
    for options, message in (({"top_p": 1.5}, "top_p is 1.5"), ({"temperature": 0.0}, "temperature is 0.0")):
        with pytest.raises(ValueError, match=message):
            sample(logits, top_k=0, **options)
    penalised = modify_logit_for_repetition_penalty(torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[0, 1]]), 2.0)
    assert penalised.tolist() == [[1.0, -4.0, 1.0]]
    one = torch.tensor([0.1, 3.0, 0.2])
    assert sample(one).shape == sample(one, top_k=2).shape == sample(one, top_k=0, top_p=0.5).shape == ()
    assert int(sample(one, top_k=0, top_p=0.5)) == 1


def test_outputs_by_name_and_by_place():
    model, ids = tiny(), torch.zeros(1, 2, dtype=torch.long)
    plain = model.generate(ids, 4, return_dict_in_generate=True)
    assert plain["sequences"] is plain[0] is plain.sequences
    assert list(plain) == ["sequences"]
    assert "scores" not in plain
    with pytest.raises(KeyError):
        plain["scores"]
    scored = model.generate(ids, 4, return_dict_in_generate=True, output_scores=True)
    assert scored[1] is scored["scores"] is scored.scores
    assert scored[:2] == scored.to_tuple()


@pytest.mark.parametrize("kept", ["lm_head.weight", "backbone.embedding.weight"])
def test_a_tied_weight_under_one_name(tmp_path, kept):
    """As safetensors writes it. Where the two are not tied, both have to be there."""
    model, ids = tiny(), torch.randint(0, 37, (2, 5))
    model.save_pretrained(tmp_path)
    tensors = load_state_dict_hf(tmp_path)
    del tensors["backbone.embedding.weight" if kept == "lm_head.weight" else "lm_head.weight"]
    (tmp_path / "pytorch_model.bin").unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(MambaLMHeadModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    fields = load_config_hf(tmp_path) | {"tie_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(RuntimeError, match="Missing key"):
        MambaLMHeadModel.from_pretrained(tmp_path)
