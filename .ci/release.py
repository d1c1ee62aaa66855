"""The steps of a release up to the upload, each checked: `python .ci/release.py 0.2.0`.

1  the tree is clean, and the version is the same in pyproject.toml, mambakit/__init__.py, CITATION.cff, CHANGELOG.md
2  CI passes in a fresh clone (--skip-ci: it has)
3  the source distribution and a wheel for each platform, twice: the second build gives the same bytes
4  each wheel holds what it should, and the one of this platform runs in a fresh environment
5  checksums, and the commands that are left: tag and upload, which a person types

pip install build twine scikit-build-core ziglang cmake ninja
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# file -> what stands before the version there
PLACES = {
    "pyproject.toml": r'^version = "(.+)"$',
    "mambakit/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
    "CHANGELOG.md": r"^## ([\d.]+), \d{4}-\d\d-\d\d$",
}
LIBRARIES = {"linux": "libmambakit_native.so", "macosx": "libmambakit_native.dylib", "win": "libmambakit_native.dll"}
LARGEST = 100 * 2**20  # the package index's limit of a file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="a new or empty folder (default: dist)")
    parser.add_argument("--platform", action="append", help="of .ci/wheels.py; all of them when absent")
    parser.add_argument("--skip-ci", action="store_true", help="CI has passed on this commit")
    parser.add_argument("--allow-dirty", action="store_true", help="try the steps on an uncommitted tree")
    args = parser.parse_args()
    if args.output.is_dir() and any(args.output.iterdir()):
        raise SystemExit(f"{args.output} is not empty; remove it, or name another --output")
    check_versions(args.version)
    if not args.allow_dirty and run("git", "status", "--porcelain", "--untracked-files=no"):
        raise SystemExit("the tree has changes that are not committed; commit or stash them")
    if not args.skip_ci:
        check_in_a_clone()
    wheels = build(args.output, args.platform)
    for wheel in wheels:
        check_wheel(wheel, args.version)
    try_here(wheels)
    say_end(args.output, args.version)


def versions() -> dict[str, str]:
    """The version that each file says; a changelog's is the newest one."""
    found = {}
    for name, pattern in PLACES.items():
        match = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        if match is None:
            raise SystemExit(f"{name} has no line {pattern}")
        found[name] = match[1]
    return found


def check_versions(version: str) -> None:
    wrong = {name: said for name, said in versions().items() if said != version}
    if wrong:
        raise SystemExit(f"not {version}: " + ", ".join(f"{name} says {said}" for name, said in wrong.items()))
    print(f"version {version} in {', '.join(PLACES)}")


def check_in_a_clone() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        run("git", "clone", "--quiet", str(ROOT), str(clone))
        subprocess.run(["bash", ".ci/run"], cwd=clone, check=True)


def build(output: Path, platforms: list[str] | None) -> list[Path]:
    chosen = [word for name in platforms or () for word in ("--platform", name)]
    with tempfile.TemporaryDirectory() as again:
        for folder in (str(output), again):
            run(sys.executable, str(ROOT / ".ci" / "wheels.py"), "--output", folder, *chosen)
        for wheel in sorted(output.glob("*.whl")):
            if digest(wheel) != digest(Path(again) / wheel.name):
                raise SystemExit(f"{wheel.name}: the second build gave other bytes")
            print(f"{wheel.name}: twice the same bytes")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(output), str(ROOT))
    run(sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(output.iterdir())))
    return sorted(output.glob("*.whl"))


def check_wheel(wheel: Path, version: str) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        metadata = opened.read(f"mambakit-{version}.dist-info/METADATA").decode()
    system = next(key for key in LIBRARIES if key in wheel.name.rsplit("-", 1)[1])
    wanted = {
        f"mambakit/ops/_backends/{LIBRARIES[system]}",
        "mambakit/assets/books/model.safetensors",
        "mambakit/py.typed",
    }
    missing = sorted(wanted - set(names))
    sources = [name for name in names if name.endswith(".cpp") or name.startswith(("tests/", "docs/"))]
    if missing or sources or f"Version: {version}" not in metadata or wheel.stat().st_size > LARGEST:
        raise SystemExit(f"{wheel.name}: missing {missing}, not wanted {sources}, {wheel.stat().st_size:,} bytes")
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MB, {len(names)} files")


def try_here(wheels: list[Path]) -> None:
    """Install this platform's wheel over this environment's packages, and write a text."""
    here = {"Linux": "linux", "Darwin": "macosx", "Windows": "win"}[platform.system()]
    machine = {"AMD64": "amd64"}.get(platform.machine(), platform.machine())
    mine = [w for w in wheels if here in w.name and w.name.endswith(f"{machine}.whl")]
    if not mine:
        print("no wheel of this platform was built: none was tried")
        return
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder) / "venv"
        run(sys.executable, "-m", "venv", str(venv))
        python = venv / ("Scripts" if here == "win" else "bin") / "python"
        packages = run(str(python), "-c", "import site; print(site.getsitepackages()[0])")
        see_packages(Path(packages), sys.path)
        run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", str(mine[0]))
        text = run(str(python), "-m", "mambakit", "generate", "It was", "--max-new-tokens", "5", "--greedy", cwd=folder)
        path = run(str(python), "-c", "import mambakit; print(mambakit.__file__)", cwd=folder)
        if str(venv) not in path:
            raise SystemExit(f"not the wheel's, but {path}")
        print(f"{mine[0].name} writes: {text}")


def see_packages(folder: Path, path: list[str]) -> None:
    """Let an environment import another's packages: ``folder`` is its site-packages, ``path`` the other's sys.path.

    Folders alone: a .pth file of theirs may be that of an editable install of mambakit, whose finder would give the
    sources in place of the wheel.
    """
    lines = [entry for entry in path if entry.endswith(("site-packages", "dist-packages"))]
    (folder / "base.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def say_end(output: Path, version: str) -> None:
    files = sorted(path for path in output.iterdir() if path.suffix in (".whl", ".gz"))
    (output / "SHA256SUMS").write_text("".join(f"{digest(path)}  {path.name}\n" for path in files), encoding="utf-8")
    print((output / "SHA256SUMS").read_text(encoding="utf-8"), end="")
    print(f"left to do:\n  git tag -s v{version} && git push origin v{version}")
    print(f"  twine upload {output}/*.whl {output}/*.tar.gz")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(*command: str, cwd: str | Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
