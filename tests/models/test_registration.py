"""The page's two snippets, from a hub id in an offline cache: with mambakit's imports, and with transformers' own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
NAME = "state-spaces/mamba-130m-hf"

PIPELINE = """
{imports}
pipe = pipeline(task="text-generation", model="state-spaces/mamba-130m-hf", dtype="auto")
text = pipe("Plants create energy through a process known as", max_new_tokens=5)[0]["generated_text"]
assert text.startswith("Plants create energy"), text
assert type(pipe.model).__module__.startswith("mambakit."), type(pipe.model)
"""
AUTO = """
import torch
{imports}
tokenizer = AutoTokenizer.from_pretrained("state-spaces/mamba-130m-hf")
model = AutoModelForCausalLM.from_pretrained("state-spaces/mamba-130m-hf", dtype="auto", device_map="auto")
input_ids = tokenizer("Plants create energy through a process known as", return_tensors="pt").to(model.device)
output = model.generate(**input_ids, max_length=50)
print(tokenizer.decode(output[0], skip_special_tokens=True))
assert output.shape[1] <= 50
assert type(model).__module__.startswith("mambakit."), type(model)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache as huggingface_hub lays it out, holding one model."""
    root = tmp_path_factory.mktemp("hub")
    repository = root / ("models--" + NAME.replace("/", "--"))
    save_tiny(repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    return root


def run(code: str, hub: Path) -> None:
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("snippet", [PIPELINE, AUTO], ids=["pipeline", "auto"])
@pytest.mark.parametrize(
    "imports",
    [
        "from mambakit import AutoModelForCausalLM, AutoTokenizer, pipeline",
        "import mambakit\nmambakit.register()\nmambakit.register()\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline",
    ],
    ids=["mambakit", "registered"],
)
def test_the_pages_snippets(imports, snippet, hub):
    run(snippet.format(imports=imports), hub)


def test_registering_changes_nothing_else(hub):
    run(
        "import transformers, mambakit\n"
        "before = transformers.AutoConfig.for_model('gpt2').__class__\n"
        "mambakit.register()\n"
        "assert transformers.AutoConfig.for_model('gpt2').__class__ is before\n"
        "assert isinstance(transformers.AutoConfig.for_model('mamba'), mambakit.MambaConfig)\n"
        "config = transformers.AutoConfig.for_model(\n"
        "    'falcon_mamba', hidden_size=16, num_hidden_layers=1, vocab_size=32)\n"
        "model = transformers.AutoModelForCausalLM.from_config(config)\n"
        "assert type(model) is mambakit.FalconMambaForCausalLM\n",
        hub,
    )
