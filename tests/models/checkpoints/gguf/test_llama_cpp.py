"""One file, two programs: llama.cpp's logits and tokens beside ours. llama-cpp-python is no dependency of the tests;
without it they are skipped (docs/guides/gguf.md holds what they printed)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mambakit
from mambakit.models.checkpoints import convert
from tests.models.configurations import worst
from tests.models.tiny import TEXT, save_tiny

llama_cpp = pytest.importorskip("llama_cpp")

# float32: sums in another order (3e-7 was found). llama.cpp rounds activations to the weights' half dtype (6e-4, 6e-3),
# and to 8 bits for quantised weights, where ours have 16 or 32 (6e-3; 2.3e-2 with FalconMamba's norms).
LIMITS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "q8_0": 4e-2, "q4_0": 4e-2}
FALCON = {"layer_norm_epsilon": 1e-5, "mixer_rms_eps": 1e-5}


def opened(path: Path):
    return llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, logits_all=True, verbose=False)


def both(path: Path, ids: list[int]) -> float:
    """The largest difference of logits, relative to the largest logit."""
    theirs = opened(path)
    theirs.eval(ids)
    logits = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    ours = mambakit.AutoModelForCausalLM.from_pretrained(path)
    if ours.dtype != torch.float32:
        ours = mambakit.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return worst(ours.eval()(torch.tensor([ids])).logits[0], logits)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize("dtype", LIMITS)
def test_logits_of_a_file_that_we_write(dtype, family, tmp_path):
    save(tmp_path / "m", family)
    plain = dtype if dtype.startswith("q") else getattr(torch, dtype)
    convert(tmp_path / "m", tmp_path / "m.gguf", "gguf", plain)
    torch.manual_seed(1)
    assert both(tmp_path / "m.gguf", torch.randint(1, 300, (40,)).tolist()) < LIMITS[dtype]


def save(folder: Path, family: str) -> None:
    save_tiny(folder, hidden_size=256, vocab_size=512, initializer_range=0.05)
    if family == "falcon_mamba":
        torch.manual_seed(0)
        config = mambakit.FalconMambaConfig(
            vocab_size=512, hidden_size=256, num_hidden_layers=2, initializer_range=0.3, **FALCON
        )
        mambakit.FalconMambaForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0", "Q4_K_M", "Q6_K", "Q5_0", "Q5_K_M", "Q4_1", "Q5_1"])
def test_logits_of_a_file_that_llama_cpp_quantised(type, tmp_path):
    save(tmp_path / "m", "mamba")
    convert(tmp_path / "m", tmp_path / "f32.gguf", "gguf")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type}")
    settings.nthread = 1
    path = tmp_path / f"{type}.gguf"
    assert llama_cpp.llama_model_quantize(str(tmp_path / "f32.gguf").encode(), str(path).encode(), settings) == 0
    torch.manual_seed(1)
    assert both(path, torch.randint(1, 300, (40,)).tolist()) < 3e-2


def test_tokens(tmp_path):
    save_tiny(tmp_path / "m", hidden_size=64)
    convert(tmp_path / "m", tmp_path / "m.gguf", "gguf")
    theirs, ours = opened(tmp_path / "m.gguf"), mambakit.AutoTokenizer.from_pretrained(tmp_path / "m.gguf")
    for text in (TEXT, "It's 12345 o'clock\n\n  a\tb", "<|endoftext|>naïve 🙂", " x"):
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ours(text).input_ids


def test_greedy_text(tmp_path):
    save_tiny(tmp_path / "m", hidden_size=64)
    convert(tmp_path / "m", tmp_path / "m.gguf", "gguf")
    prompt = mambakit.AutoTokenizer.from_pretrained(tmp_path / "m.gguf")("The cat").input_ids
    model = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    ours = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)[0].tolist()
    theirs = opened(tmp_path / "m.gguf").generate(prompt, temp=0.0, repeat_penalty=1.0)
    assert ours[len(prompt) :] == [next(theirs) for _ in range(16)]
