"""What `provide` gives beside installations of every kind. Each case is a process of its own, with its own packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import mambakit
from mambakit.compat.surface import ABSENT, EXTENSIONS, MODULES, TRITON

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, folder: Path, **options) -> subprocess.CompletedProcess:
    """``code`` in a new process whose modules are this checkout's, and before them those of ``folder``."""
    start = f"import json, sys, warnings; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n"
    command = [sys.executable, "-c", start + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, **options)


def told(code: str, folder: Path):
    """What ``code`` prints, as JSON."""
    done = python(code, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def write(folder: Path, files: dict[str, str]) -> Path:
    """``{"a/b": text}`` as a/b.py, with the packages' __init__.py."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
        path.write_text(textwrap.dedent(text))
    return folder


# A torch that says this on every machine, and is imported in no time.
TORCH = """
import types
sys.modules["torch"] = torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(is_available=lambda: {})
"""
CUDA, NO_CUDA = TORCH.format(True), TORCH.format(False)


def test_nothing_installed(tmp_path):
    """Everything is given, found by find_spec, and imports; asking what is given imports no torch."""
    found = told(
        """
        import importlib.metadata, importlib.util, mambakit
        before = importlib.util.find_spec("mamba_ssm") is None
        given = mambakit.provide()
        light = "torch" not in sys.modules
        specs = [importlib.util.find_spec(name) is not None for name in given]
        again = mambakit.provide() == given, sum(type(f).__module__.startswith("mambakit") for f in sys.meta_path)
        import mamba_ssm, causal_conv1d
        attributes = mamba_ssm.ops.triton.layer_norm.RMSNorm.__name__, mamba_ssm.__version__
        for name in given:
            importlib.import_module(name)
        from mamba_ssm.ops.selective_scan_interface import *
        versions = [importlib.metadata.version(n) for n in ("mamba-ssm", "mamba_ssm", "causal_conv1d")]
        print(json.dumps([before, list(given), set(given.values()) == {"not installed"}, light, all(specs), again,
                          attributes, versions, "selective_scan_fn" in globals()]))
        """,
        tmp_path,
    )
    before, names, missing, light, specs, again, attributes, versions, star = found
    assert (before, missing, light, specs, star) == (True, True, True, True, True)
    assert names == list(MODULES)
    assert again == [True, 2]
    assert attributes == ["RMSNorm", "1.2.2+mambakit"]
    assert versions == ["1.2.2+mambakit", "1.2.2+mambakit", "1.5.2+mambakit"]


def test_what_cannot_be_given_says_so(tmp_path):
    found = told(
        f"""
        import importlib, mambakit
        mambakit.provide()
        import mamba_ssm
        messages = []
        for statement in ("from mamba_ssm import Mamba2",
                          "from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined"):
            try:
                exec(statement)
            except ImportError as error:
                messages.append(str(error))
        from mamba_ssm.modules.mamba2 import Mamba2
        from mamba_ssm.modules.mamba3 import Mamba3
        from mamba_ssm.modules.mha import MHA
        for layer in (Mamba2, Mamba3, MHA):
            try:
                layer(d_model=8)
            except ImportError as error:
                messages.append(str(error))
        failed = 0
        for name in {sorted(ABSENT)!r}:
            try:
                importlib.import_module(name)
            except ImportError:
                failed += 1
        print(json.dumps([messages, failed, hasattr(mamba_ssm, "Mamba2"), hasattr(mamba_ssm, "nothing")]))
        """,
        tmp_path,
    )
    messages, failed, *attributes = found
    assert len(messages) == 5
    assert all("which mambakit does not have" in message for message in messages)
    assert [message.partition(",")[0] for message in messages[2:]] == [
        "Mamba2 is Mamba-2", "Mamba3 is Mamba-3", "MHA is attention",
    ]  # fmt: skip
    assert failed == len(ABSENT)
    assert attributes == [False, False]


VENDORED = {
    "mamba_ssm/__init__": "from mamba_ssm.modules.mamba_simple import Mamba\nNAME = 'vendored'\n",
    "mamba_ssm/modules/mamba_simple": """
        import causal_conv1d_cuda, selective_scan_cuda
        from causal_conv1d import causal_conv1d_fn
        class Mamba:
            where = "vendored"
    """,
}


def test_a_vendored_copy_wins(tmp_path):
    """Only what it lacks is given, down to single modules of it."""
    found = told(
        """
        import mambakit
        given = mambakit.provide()
        from mamba_ssm import Mamba, NAME
        from mamba_ssm.ops.triton import layernorm
        import selective_scan_cuda, causal_conv1d
        print(json.dumps([given, Mamba.where, NAME, layernorm.__spec__.origin, selective_scan_cuda.__spec__.origin]))
        """,
        write(tmp_path, VENDORED),
    )
    given, where, name, norm, extension = found
    assert set(MODULES) - set(given) == {"mamba_ssm", "mamba_ssm.modules", "mamba_ssm.modules.mamba_simple"}
    assert given["mamba_ssm.ops.triton.layernorm"] == "the installed mamba_ssm does not have it"
    assert (where, name) == ("vendored", "vendored")
    assert norm == "mambakit"
    assert extension == "mambakit"


def test_interfaces_bind_the_extensions(tmp_path):
    """As theirs do, for code that asks whether they are None, also through a star."""
    assert (
        told(
            """
        import mambakit; mambakit.provide()
        import causal_conv1d_cuda, selective_scan_cuda
        from causal_conv1d import causal_conv1d_interface, cpp_functions
        from mamba_ssm.ops import selective_scan_interface as scans
        everything = {}
        exec("from mamba_ssm.ops.selective_scan_interface import *", everything)
        bound = [everything["selective_scan_cuda"], scans.selective_scan_cuda]
        conv = [scans.causal_conv1d_cuda, causal_conv1d_interface.causal_conv1d_cuda, cpp_functions.causal_conv1d_cuda]
        print(json.dumps([
            all(x is selective_scan_cuda for x in bound), all(x is causal_conv1d_cuda for x in conv),
            "selective_scan_cuda" in dir(scans),
        ]))
        """,
            tmp_path,
        )
        == [True] * 3
    )


def test_override_comes_first(tmp_path):
    found = told(
        """
        import mambakit
        given = mambakit.provide(override=True)
        import mamba_ssm
        print(json.dumps([len(given), mamba_ssm.__version__, hasattr(mamba_ssm, "NAME")]))
        """,
        write(tmp_path, VENDORED),
    )
    assert found == [len(MODULES), "1.2.2+mambakit", False]


def test_the_version_is_that_of_what_is_imported(tmp_path):
    """transformers asks for it, and takes Mamba-2's functions from 2.0.4 on; pip takes it for installed."""
    pip = pytest.importorskip("pip")
    assert pip
    write(tmp_path, {"mamba_ssm/__init__": "__version__ = '2.2.2'"})
    (tmp_path / "mamba_ssm-2.2.2.dist-info").mkdir()
    (tmp_path / "mamba_ssm-2.2.2.dist-info" / "METADATA").write_text("Name: mamba-ssm\nVersion: 2.2.2\n")
    code = """
        import importlib.metadata, mambakit
        mambakit.provide({})
        import mamba_ssm
        print(json.dumps([mamba_ssm.__version__, *map(importlib.metadata.version, ("mamba_ssm", "causal.conv1d"))]))
    """
    assert told(code.format(""), tmp_path) == ["2.2.2", "2.2.2", "1.5.2+mambakit"]
    assert told(code.format("override=True"), tmp_path) == ["1.2.2+mambakit", "1.2.2+mambakit", "1.5.2+mambakit"]
    command = [sys.executable, "-m", "mambakit", "run", "-m", "pip", "install", "--dry-run", "--no-index"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    names = ["mamba_ssm", "causal-conv1d>=1.4"]
    done = subprocess.run([*command, *names], capture_output=True, text=True, env=variables, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Requirement already satisfied") == 2


def test_names_are_listed_and_modules_loaded_again(tmp_path):
    found = told(
        """
        import importlib, mambakit
        mambakit.provide()
        import mamba_ssm, mamba_ssm.modules.mamba_simple as simple
        listed = [name in dir(mamba_ssm) for name in ("Mamba", "modules", "__version__")]
        kept = simple.Mamba
        print(json.dumps([*listed, importlib.reload(mamba_ssm) is mamba_ssm, importlib.reload(simple).Mamba is kept]))
        """,
        tmp_path,
    )
    assert found == [True] * 5


def test_an_installed_package_without_its_extension(tmp_path):
    """As a plain install of mamba-ssm 2.3.2: the extension alone is given, and Triton's modules are the package's."""
    modules = {name.replace(".", "/"): "where = 'installed'" for name in MODULES if name not in EXTENSIONS}
    found = told(
        CUDA
        + """
import mambakit
given = mambakit.provide()
import selective_scan_cuda
from mamba_ssm.ops.triton.layer_norm import where
print(json.dumps([given, selective_scan_cuda.__spec__.origin, where]))
""",
        write(tmp_path, _with_packages(modules)),
    )
    given, module, where = found
    assert set(given) == set(EXTENSIONS)
    assert module == "mambakit"
    assert where == "installed"


def _with_packages(modules: dict[str, str]) -> dict[str, str]:
    """A package's own text goes into its __init__.py."""
    inside = {name for name in modules if any(other.startswith(f"{name}/") for other in modules)}
    return {f"{name}/__init__" if name in inside else name: text for name, text in modules.items()}


def test_a_complete_install_gives_nothing(tmp_path):
    """With a CUDA device; without one its extensions and Triton modules are replaced."""
    modules = _with_packages({name.replace(".", "/"): "where = 'installed'" for name in MODULES})
    code = """
import mambakit
with warnings.catch_warnings():
    warnings.simplefilter("error")
    given = mambakit.provide()
import causal_conv1d_cuda, mamba_ssm, selective_scan_cuda
from mamba_ssm.ops.triton.selective_state_update import __file__ as file
print(json.dumps([given, [hasattr(m, "where") for m in (causal_conv1d_cuda, mamba_ssm, selective_scan_cuda)], file]))
"""
    write(tmp_path, modules)
    given, theirs, _ = told(CUDA + code, tmp_path)
    assert given == {}
    assert theirs == [True, True, True]
    given, theirs, file = told(NO_CUDA + code, tmp_path)
    assert set(given) == {*EXTENSIONS, *TRITON}
    assert set(given.values()) == {"there is no CUDA device"}
    assert theirs == [False, True, False]
    assert file == str(ROOT / "mambakit" / "compat" / "__init__.py")


@pytest.fixture(scope="session")
def suffix() -> str:
    from importlib.machinery import EXTENSION_SUFFIXES

    return EXTENSION_SUFFIXES[0]


def test_a_broken_extension_is_replaced_with_a_warning(tmp_path, suffix):
    """A file that the loader refuses, as it does one with an undefined symbol."""
    (tmp_path / f"selective_scan_cuda{suffix}").write_bytes(b"\x7fELF no library")
    found = told(
        CUDA
        + """
import mambakit
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    given = mambakit.provide()
    import selective_scan_cuda
    mambakit.provide()
print(json.dumps([given["selective_scan_cuda"], selective_scan_cuda.__spec__.origin,
                  [str(w.message) for w in caught if "mambakit" in str(w.message)]]))
""",
        tmp_path,
    )
    why, module, warned = found
    assert why.startswith("it does not load: ")
    assert module == "mambakit"
    assert len(warned) == 1
    assert str(tmp_path) in warned[0]
    assert why in warned[0]


def test_a_broken_extension_that_appears_later(tmp_path, suffix):
    """A folder that goes on sys.path after provide(): the import itself finds out."""
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / f"causal_conv1d_cuda{suffix}").write_bytes(b"no library")
    done = python(
        CUDA
        + """
import mambakit
mambakit.provide()
sys.path.insert(0, "late")
import causal_conv1d_cuda
print(causal_conv1d_cuda.__spec__.origin)
""",
        tmp_path,
    )
    assert done.stdout.strip() == "mambakit", done.stderr
    assert "mambakit serves in place of" in done.stderr


def test_an_extension_that_loads_is_loaded_once(tmp_path):
    write(tmp_path, {"selective_scan_cuda": "import sys; print('loaded', file=sys.stderr); fwd = None"})
    done = python(
        CUDA + "import mambakit; mambakit.provide(); import selective_scan_cuda; print(selective_scan_cuda.__file__)",
        tmp_path,
    )
    assert done.stdout.strip() == str(tmp_path / "selective_scan_cuda.py")
    assert done.stderr.count("loaded") == 1


def test_names_that_were_imported_before(tmp_path):
    write(tmp_path, {"selective_scan_cuda": "fwd = bwd = None", **VENDORED})
    found = told(
        NO_CUDA
        + """
import selective_scan_cuda as early
import mambakit
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    mambakit.provide()
import selective_scan_cuda
print(json.dumps([selective_scan_cuda is early, [str(w.message) for w in caught]]))
""",
        tmp_path,
    )
    assert found[0] is True
    (message,) = found[1]
    assert message.startswith("selective_scan_cuda: imported before mambakit.provide()")


def test_a_name_that_is_blocked(tmp_path):
    found = told(
        """
        import mambakit
        sys.modules["causal_conv1d_cuda"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mambakit.provide()
        print(json.dumps([str(w.message) for w in caught]))
        """,
        tmp_path,
    )
    assert found == [
        "causal_conv1d_cuda: None in sys.modules, so that Python imports nothing of that name; delete the entry"
    ]


def test_loaded_again_it_has_one_pair_of_finders(tmp_path):
    """Plugin systems and notebooks drop a package from sys.modules, or reload it."""
    found = told(
        """
        import importlib, importlib.metadata
        import mambakit
        mambakit.provide(override=True)
        importlib.reload(sys.modules["mambakit.compat.finder"])
        for name in [name for name in sys.modules if name.startswith("mambakit")]:
            del sys.modules[name]
        import mambakit
        given = mambakit.provide()
        import mambakit.compat.finder as finder
        ours = [f for f in sys.meta_path if type(f).__module__ == finder.__name__]
        names = [d.metadata["Name"] for d in importlib.metadata.distributions()]
        print(json.dumps([[f in (finder.FRONT, finder.MISSING) for f in ours], finder.FRONT.override,
                          names.count("mamba-ssm")]))
        """,
        tmp_path,
    )
    assert found == [[True, True], True, 1]


def test_override_is_a_bool():
    for value in ("mamba_ssm", 1, None):
        with pytest.raises(TypeError, match="override is .*; it must be True or False"):
            mambakit.provide(value)


def test_a_folder_of_that_name_beside_the_script(tmp_path):
    """Python takes a bare folder for a package; it hides nothing, and what is in it is found."""
    (tmp_path / "causal_conv1d" / "csrc").mkdir(parents=True)
    (tmp_path / "causal_conv1d" / "causal_conv1d_varlen.py").write_text("where = 'beside'")
    found = told(
        """
        import mambakit
        given = mambakit.provide()
        import causal_conv1d
        from causal_conv1d.causal_conv1d_varlen import where
        print(json.dumps([given["causal_conv1d"], where, "causal_conv1d.causal_conv1d_varlen" in given]))
        """,
        tmp_path,
    )
    assert found == ["a folder without __init__.py", "beside", False]


def test_whole_models_are_pickled(tmp_path):
    """Classes are found again by their names, also in a process without provide()."""
    path = tmp_path / "model.pt"
    code = f"""
        import mambakit, torch
        mambakit.provide()
        from mamba_ssm.models.mixer_seq_simple import MambaConfig, MambaLMHeadModel
        from mamba_ssm.modules.mamba_simple import Block
        model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=8))
        torch.save([model, Block(16, torch.nn.Identity)], {str(path)!r})
        print(1)
    """
    told(code, tmp_path)
    reading = f"import torch; print(len(torch.load({str(path)!r}, weights_only=False)))"
    assert told(reading, tmp_path) == 2
