"""The harness's command line on machines with and without a GPU. The harness itself need not be installed."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from mambakit.errors import UsageError
from mambakit.models.devices import default_device, usable_device
from tests.models.tiny import save_tiny


@pytest.fixture
def harness(monkeypatch):
    """mambakit.evaluation.harness over an empty lm_eval, which keeps the command line it is given."""
    seen: list[list[str]] = []
    modules = {
        name: types.ModuleType(name)
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry", "lm_eval.__main__")
    }
    modules["lm_eval.api.model"].TemplateLM = type("TemplateLM", (), {})
    modules["lm_eval.api.registry"].register_model = lambda name: lambda cls: cls
    modules["lm_eval.__main__"].cli_evaluate = lambda: seen.append(sys.argv)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    if importlib.util.find_spec("yaml") is None:
        pytest.skip("the harness's own YAML reader is not installed")
    monkeypatch.delitem(sys.modules, "mambakit.evaluation.harness", raising=False)
    module = importlib.import_module("mambakit.evaluation.harness")
    monkeypatch.setattr(sys, "argv", ["mambakit"])
    module.seen = seen
    yield module
    sys.modules.pop("mambakit.evaluation.harness", None)


@pytest.mark.parametrize(("there", "device"), [(False, "cpu"), (True, "cuda")])
def test_the_device_that_there_is(there, device, harness, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    asked = ["run", "--model", "mambakit", "--tasks", "lambada_openai", "--gen_kwargs", "a=1"]
    harness.run_harness(asked)
    harness.run_harness(asked[1:])  # the harness puts the "run" in
    assert harness.seen == [["lm_eval", *words, "--device", device] for words in (asked, asked[1:])]
    config = tmp_path / "c.yaml"
    for more in (["--device", "cuda:1"], ["--device=cpu"], ["--dev", "mps"], ["--help"], ["-h"]):
        assert harness.with_device([*asked, *more]) == [*asked, *more]
    for text, given in (
        ("device: cuda:3", True),
        ("tasks: [a]", False),
        ("device:", False),
        ("[", False),
        ("- a", False),
    ):
        config.write_text(text)
        for option in ("--config", "-C"):
            line = ["run", option, str(config)]
            assert (harness.with_device(line) == line) is given, text
    for line in ([], ["ls", "tasks"], ["validate", "--tasks", "a"]):
        assert harness.with_device(line) == line


@pytest.mark.filterwarnings("ignore")
def test_a_model_without_a_device(harness, monkeypatch, tmp_path):
    save_tiny(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert harness.MambaHarnessLM(str(tmp_path)).model.device.type == "cpu"
    if torch.version.cuda is None:  # a build that has no CUDA at all
        with pytest.raises(UsageError, match=r"device cuda:0: .*use one that `mambakit env` lists"):
            harness.MambaHarnessLM(str(tmp_path), device="cuda:0")
    for name in ("", " "):
        with pytest.raises(ValueError, match="the name of a checkpoint is empty"):
            harness.MambaHarnessLM(name)


def test_devices():
    assert default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert usable_device("cpu") == torch.device("cpu")
    for name in ("meta", "cuda:99", "gpu", "", "cpu:x", None, 1.5):
        with pytest.raises(UsageError, match="--device"):
            usable_device(name, "--device")
