"""A package for C++: it is the model, at any batch, and a C++ program runs it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from mambakit import CheckpointError, MambaCache
from mambakit.cli import main
from mambakit.errors import UsageError
from mambakit.export import aoti
from tests.models.configurations import pair
from tests.models.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.mark.parametrize("name", ["plain", "use_bias", "falcon"])
def test_the_step_is_the_model(name):
    model = pair(name)[0].eval()
    step = aoti.TokenStep(model)
    cache = MambaCache(model.config, 2, dtype=torch.float32)
    states = cache.conv_states.clone(), cache.ssm_states.clone()
    ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in range(9):
            expected = model(ids[:, t : t + 1], cache_params=cache).logits
            logits, *states = step(ids[:, t : t + 1], *states)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[0], cache.conv_states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[1], cache.ssm_states, rtol=1e-4, atol=1e-5)


def test_refused(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="not a MambaModel"):
        aoti.to_aoti(pair("plain")[0].backbone, tmp_path / "a.pt2")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="install g"):
        aoti.to_aoti(pair("plain")[0], tmp_path / "a.pt2")


@needs_compiler
@pytest.mark.slow
def test_a_program_in_cpp(tmp_path, capsys):
    model = save_tiny(tmp_path / "m", hidden_size=16)
    package = tmp_path / "m.pt2"
    assert main(["export", str(tmp_path / "m"), str(package), "--to", "aoti"]) == 0
    assert "differs from the model by" in capsys.readouterr().out
    with torch.no_grad():
        model.backbone.layers[1].mixer.D.add_(0.1)
    with pytest.raises(CheckpointError, match="the package differs from the model by"):
        aoti.check(model, package)
    with torch.no_grad():
        model.backbone.layers[1].mixer.D.sub_(0.1)

    # As examples/cpp/CMakeLists.txt does, without CMake.
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    (folder,) = cpp_extension.library_paths()
    program = tmp_path / "generate"
    command = [
        "g++", "-std=c++20", "-O0", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", *include,
        str(ROOT / "examples" / "cpp" / "generate.cpp"), "-o", str(program), f"-L{folder}", f"-Wl,-rpath,{folder}",
        "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=550)
    prompt = [5, 9, 100, 7]
    config = model.config
    sizes = [config.num_hidden_layers, config.intermediate_size, config.conv_kernel, config.state_size, 6]
    done = subprocess.run(
        [str(program), str(package), *map(str, sizes), *map(str, prompt)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert done.stdout.split() == [str(token) for token in expected[0, 4:].tolist()]
