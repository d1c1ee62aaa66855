"""transformers' own Mamba with what `provide` gives, and modelling files that were imported before it."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
ROOT = Path(__file__).resolve().parents[2]
# Of each of transformers' models that look for mamba_ssm: logits, a gradient, tokens.
RUN = """
import json, sys, warnings
import torch
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mambakit
    given = mambakit.provide() if {provided} else None
    from transformers.models.falcon_mamba import modeling_falcon_mamba as falcon
    from transformers.models.mamba import modeling_mamba as mamba
    from transformers.utils.import_utils import is_mamba_2_ssm_available
found = []
for modeling, name in ((mamba, "Mamba"), (falcon, "FalconMamba")):
    config = getattr(modeling, name + "Config")(
        hidden_size=32, num_hidden_layers=2, vocab_size=40, state_size=8, use_mambapy=False)
    torch.manual_seed(0)
    model = getattr(modeling, name + "ForCausalLM")(config).eval()
    ids = torch.arange(12).view(1, 12)
    logits = model(ids).logits
    logits.square().mean().backward()
    gradient = model.backbone.layers[0].mixer.x_proj.weight.grad
    text = model.generate(ids, max_new_tokens=6, do_sample=False)
    found.append([t.flatten().tolist() for t in (logits, gradient, text)])
used = "mambakit.compat.state_update" in sys.modules
print(json.dumps([found, used, bool(is_mamba_2_ssm_available()), [str(w.message) for w in caught]]))
"""


@functools.cache
def run(provided: bool, before: str = "") -> list:
    code = RUN.format(provided=provided, before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", [0, 1], ids=["mamba", "falcon_mamba"])
def test_before_and_after(model):
    """The same logits, gradients and tokens with mambakit's functions in the place of transformers' loops."""
    (plain, unused, *_), (given, used, mamba_2, warned) = run(False), run(True)
    assert (unused, used, mamba_2, warned) == (False, True, False, [])
    for found, expected in zip(given[model][:2], plain[model][:2], strict=True):
        scale = sum(x * x for x in expected) ** 0.5
        assert sum((a - b) ** 2 for a, b in zip(found, expected, strict=True)) ** 0.5 < 1e-5 * scale
    assert given[model][2] == plain[model][2]


def test_modelling_files_that_were_imported_before():
    _, used, _, warned = run(True, "import transformers.models.mamba.modeling_mamba as early")
    (message,) = (m for m in warned if "mambakit" in m)
    assert message.startswith("transformers.models.mamba.modeling_mamba: imported before mambakit.provide()")
    assert used  # by FalconMamba, whose file was imported after it
