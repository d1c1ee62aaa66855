"""What a command imports before its first token. An import takes most of the time that a person waits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Seconds of imports that no text needs: what transformers' PreTrainedModel and GenerationMixin bring.
SLOW = (
    "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy",
    "transformers.modeling_utils", "transformers.generation.utils", "transformers.activations", "accelerate", "peft",
    "mambakit.models.mamba.modeling", "mambakit.models.pretrained",
)  # fmt: skip
# The packages that may be imported on the way, with what they import themselves.
ALLOWED = {
    # ours
    "mambakit", "torch", "numpy", "safetensors", "rich", "transformers", "tokenizers", "huggingface_hub", "filelock",
    # torch's: a release with CUDA or a machine with Triton has these
    "torchgen", "functorch", "triton", "cuda", "typing_extensions", "jinja2", "markupsafe", "yaml", "packaging",
    # rich's
    "pygments", "markdown_it", "mdurl",
    # transformers' and huggingface_hub's
    "regex", "tqdm", "fsspec", "hf_xet", "requests", "urllib3", "charset_normalizer", "idna", "certifi", "PIL",
    "httpx", "httpx2", "httpcore", "httpcore2", "h11", "h2", "anyio", "sniffio", "click", "truststore", "typer",
    "shellingham", "cython_runtime", "defusedxml", "psutil", "socksio", "zstandard", "brotli", "brotlicffi", "hpack",
    "hyperframe",
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
    ("score", "--prefix", "It was", "--choice", " a dog"),
])  # fmt: skip
def test_what_writing_a_text_imports(arguments):
    modules, text = imported_by(*arguments)
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
