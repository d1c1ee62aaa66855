"""What a command imports before its first token. An import takes most of the time that a person waits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Seconds of imports that no text needs.
SLOW = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy")
# The packages that may be imported on the way of a model on a CPU, with what they import themselves. transformers is
# none of them, whose import takes as long as torch's own; nor is Triton.
ALLOWED = {
    "mambakit", "torch", "numpy", "safetensors", "rich", "tokenizers",
    # torch's; a release with CUDA has the last two
    "torchgen", "functorch", "typing_extensions", "tqdm", "cuda", "cython_runtime",
}  # fmt: skip


def imported_by(*arguments: str) -> tuple[set[str], str]:
    """The modules that a command has loaded at its end, and what it printed."""
    code = f"""
import json, sys
from mambakit.cli import main
status = main({list(arguments)!r})
assert status == 0, status
print("\\n" + json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    text, _, modules = done.stdout.rstrip("\n").rpartition("\n")
    return set(json.loads(modules)), text


@pytest.mark.parametrize("arguments", [
    ("generate", "It was", "--max-new-tokens", "2", "--greedy"), ("generate", "It was", "--max-new-tokens", "2"),
    ("generate", "It was", "--max-new-tokens", "2", "--json", "--logprobs", "1"),
    ("generate", "It was", "--max-new-tokens", "2", "--stop", "dog", "--num-return-sequences", "2"),
    ("score", "--prefix", "It was", "--choice", " a dog"),
])  # fmt: skip
def test_what_writing_a_text_imports(arguments):
    modules, text = imported_by(*arguments, "--device", "cpu")
    assert text.strip()
    assert not modules & set(SLOW)
    packages = {name.partition(".")[0] for name in modules if not name.startswith(("_", "__"))}
    editable = {name for name in packages if "editable" in name or name in ("sitecustomize", "usercustomize")}
    assert packages - set(sys.stdlib_module_names) - ALLOWED - editable == set()


@pytest.mark.parametrize("statement", ["import mambakit", "import mambakit.ops", "import mambakit.modules"])
def test_what_the_lower_layers_import(statement):
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    modules = set(json.loads(done.stdout))
    assert not modules & {*SLOW, "transformers", "tokenizers", "huggingface_hub", "triton", "rich"}
    assert ("torch" in modules) == (statement != "import mambakit")
