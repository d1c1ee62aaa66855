"""pt2: a saved program of any batch and length, state in and state out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mambakit import CheckpointError
from mambakit.cli import main
from mambakit.export import pt2
from tests.models.configurations import pair
from tests.models.tiny import save_tiny


@pytest.mark.parametrize("name", ["plain", "use_bias", "falcon"])
def test_any_batch_and_length_from_a_state(name, tmp_path):
    model = pair(name)[0]
    pt2.to_pt2(model, tmp_path / "m.pt2")
    assert pt2.check(model, tmp_path / "m.pt2") < 1e-5


def test_a_program_that_differs_is_refused(tmp_path):
    model = pair("plain")[0]
    pt2.to_pt2(model, tmp_path / "m.pt2")
    with torch.no_grad():
        model.backbone.layers[1].mixer.D.add_(0.01)
    with pytest.raises(CheckpointError, match="the program differs from the model by"):
        pt2.check(model, tmp_path / "m.pt2")
    with pytest.raises(CheckpointError, match="not a MambaModel"):
        pt2.to_pt2(model.backbone, tmp_path / "a.pt2")


def test_the_command_and_another_process(tmp_path, capsys):
    """The ops are all that a reader imports: no model, no transformers."""
    save_tiny(tmp_path / "m", hidden_size=32)
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "m.pt2"), "--to", "pt2"]) == 0
    assert "differs from the model by" in capsys.readouterr().out
    code = (
        "import sys, torch, mambakit.ops\n"
        f"program = torch.export.load({str(tmp_path / 'm.pt2')!r}).module()\n"
        "logits, conv, ssm = program(torch.ones(3, 5, dtype=torch.int64), torch.zeros(2, 3, 64, 3), "
        "torch.zeros(2, 3, 64, 16))\n"
        "assert logits.shape == (3, 5, 304) and ssm.shape == (2, 3, 64, 16) and ssm.any()\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
