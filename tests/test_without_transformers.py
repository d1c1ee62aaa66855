"""ops and modules where transformers is not installed: they work, and everything else says which extra brings it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mambakit"
# What an interpreter does that has no transformers, nor what comes with it.
HIDDEN = """
import sys
from importlib import metadata
from importlib.abc import MetaPathFinder

GONE = ("transformers", "tokenizers", "huggingface_hub", "accelerate", "peft")

class Hide(MetaPathFinder):
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in GONE else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
installed = metadata.version

def version(package):
    if package in GONE:
        raise metadata.PackageNotFoundError(package)
    return installed(package)

metadata.version = version
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:mambakit", "-c", HIDDEN + code],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_of(*layers: str) -> list[str]:
    files = [path for layer in layers for path in sorted((PACKAGE / layer).rglob("*.py"))]
    return [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files]


def test_every_module_imports_or_names_the_extra():
    """Those of ops and modules import; those above them do so, too, or end with the one error.

    A module of `mambakit.models` that holds no public name may end with Python's own: the table of families lies there,
    which `import mambakit` reads.
    """
    below = [name for name in modules_of("ops", "modules", "compat", "nn") if "triton" not in name]
    above = modules_of("decoding", "models", "generation", "evaluation", "training", "serving", "commands")
    above = [name for name in above if name != "mambakit.commands.__main__"]
    out = run(f"""
import importlib
from mambakit.errors import RequirementError
for name in {below}:
    importlib.import_module(name)
for name in {above}:
    try:
        importlib.import_module(name)
    except RequirementError as error:
        assert str(error).endswith('pip install "mambakit[hf]"'), error
        print("refused", name)
    except ModuleNotFoundError as error:
        inner = name.rpartition(".")[0] == "mambakit.models" and name != "mambakit.models.auto"
        assert error.name.partition(".")[0] not in GONE or inner, (name, error)
""")
    refused = set(out.split())
    assert {"mambakit.models.mamba.modeling", "mambakit.generation.stream", "mambakit.models.auto"} <= refused
    assert "mambakit.models.families" not in refused


def test_public_names():
    run("""
import mambakit
from mambakit import MambaCache, MambaMixer, ops
assert {"MambaConfig", "AutoModelForCausalLM", "MambaMixer", "ops", "pipeline"} <= set(dir(mambakit))
kept = {"CheckpointError", "MambaCache", "MambaMixer", "nn", "ops", "__version__", "provide"}
for name in set(mambakit.__all__) - kept:
    try:
        value = getattr(mambakit, name)
        assert name == "register"  # a function that asks when it is called
        value()
    except ImportError as error:
        assert str(error).endswith('pip install "mambakit[hf]"'), (name, error)
    else:
        raise AssertionError(name)
assert "transformers" not in sys.modules
""")


def test_a_network_of_layers_trains_and_decodes():
    out = run("""
import torch
from mambakit.modules import LayerConfig, MambaBlock, MambaMixer, RMSNorm, new_cache
config = LayerConfig(hidden_size=24, state_size=4, num_hidden_layers=2)
blocks = torch.nn.ModuleList(MambaBlock(config, i) for i in range(2))
x = torch.randn(2, 9, 24)

def network(x, cache=None):
    residual = None
    for block in blocks:
        x, residual = block(x, residual, cache)
    return x + residual

whole = network(x)
whole.square().mean().backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in blocks.parameters())
with torch.no_grad():
    cache = new_cache(config, 2)
    parts = torch.cat([network(x[:, :4], cache), *(network(x[:, t : t + 1], cache) for t in range(4, 9))], 1)
assert (parts - whole).abs().max() <= 1e-5 * whole.abs().max()
try:
    MambaMixer(LayerConfig(hidden_size=24, hidden_act="gelu"))
except ImportError as error:
    print(error)
""")
    assert "hidden_act is 'gelu'" in out
    assert 'pip install "mambakit[hf]"' in out


@pytest.mark.parametrize("command, status, says", [
    (["--help"], 0, "generate"), (["env"], 0, "selective_scan"), (["generate", "x"], 2, 'pip install "mambakit[hf]"'),
    (["score", "README.md"], 2, 'pip install "mambakit[hf]"'), (["info", "x"], 2, 'pip install "mambakit[hf]"'),
])  # fmt: skip
def test_commands(command, status, says):
    out = run(f"""
import contextlib, io
from mambakit.cli import main
text = io.StringIO()
with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
    try:
        status = main({command})
    except SystemExit as ended:
        status = ended.code or 0
print(status)
print(text.getvalue())
""")
    assert out.splitlines()[0] == str(status), out
    assert says in out
    assert "Traceback" not in out


@pytest.mark.parametrize("field, value", [
    ("hidden_size", 0), ("hidden_size", 2.5), ("state_size", -1), ("conv_kernel", True), ("time_step_rank", "many"),
    ("expand", 0), ("expand", 0.3), ("mixer_rms_eps", 0), ("mixer_rms_eps", True), ("mixer_norm_weights", True),
])  # fmt: skip
def test_a_layer_configuration_is_checked(field, value):
    from mambakit.modules import LayerConfig

    with pytest.raises(ValueError, match=f"^{field} is {value!r}"):
        LayerConfig(**{"hidden_size": 24, field: value})


def test_a_layer_is_that_of_a_model():
    """`LayerConfig` has the names and defaults of transformers' configuration."""
    from dataclasses import fields

    config = pytest.importorskip("transformers").MambaConfig(hidden_size=40)
    from mambakit.modules import LayerConfig

    ours = LayerConfig(hidden_size=40)
    # FalconMamba's and Jamba's, and those of a whole model
    other = {"mixer_rms_eps", "mixer_norm_weights", "num_hidden_layers", "dtype"}
    for name in {each.name for each in fields(ours)} - other:
        assert getattr(ours, name) == getattr(config, name), name
