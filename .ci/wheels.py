"""Build a wheel for each platform on this machine, with the compiler and C libraries of PyPI's ``ziglang``.

    pip install scikit-build-core ziglang cmake ninja
    python .ci/wheels.py --output dist                      # all of them
    python .ci/wheels.py --output dist --platform linux-aarch64

The native library has a plain C interface and links neither PyTorch nor Python, so one wheel serves every Python.
CMakeLists.txt compiles it here as it does in a source install; only the toolchain is another.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = "mambakit/ops/_backends"


@dataclass(frozen=True)
class Platform:
    """A platform of wheels.

    Attributes:
        target: zig's name of it; behind the dot of Linux's the oldest glibc.
        system, processor: CMake's names.
        tag: of the wheel.
        library: the file that CMake makes.
    """

    target: str
    system: str
    processor: str
    tag: str
    library: str


PLATFORMS = {
    "linux-x86_64": Platform(
        "x86_64-linux-gnu.2.17", "Linux", "x86_64", "manylinux_2_17_x86_64.manylinux2014_x86_64",
        "libmambakit_native.so",
    ),
    "linux-aarch64": Platform(
        "aarch64-linux-gnu.2.17", "Linux", "aarch64", "manylinux_2_17_aarch64.manylinux2014_aarch64",
        "libmambakit_native.so",
    ),
    "macos-arm64": Platform(
        "aarch64-macos.11.0", "Darwin", "arm64", "macosx_11_0_arm64", "libmambakit_native.dylib"
    ),
    "windows-x86_64": Platform(
        "x86_64-windows-gnu", "Windows", "AMD64", "win_amd64", "libmambakit_native.dll"
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder for the wheels (default: dist)")
    parser.add_argument("--platform", choices=PLATFORMS, action="append", help="one platform; may be repeated")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pure = pure_wheel(Path(folder))
        for name in args.platform or PLATFORMS:
            library = native_library(PLATFORMS[name], Path(folder) / name)
            print(packed(pure, library, PLATFORMS[name], args.output), flush=True)


def pure_wheel(folder: Path) -> Path:
    """The package without a native library, as the build backend makes it."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-C", "wheel.cmake=false",
        "--wheel-dir", str(folder), str(ROOT))  # fmt: skip
    (wheel,) = folder.glob("mambakit-*.whl")
    return wheel


def native_library(platform: Platform, build: Path) -> Path:
    """Compile the library for ``platform``."""
    build.mkdir()
    tools = {tool: compiler_script(build, tool, platform.target) for tool in ("cc", "c++")}
    options = {
        # CMake asks for these on macOS; nothing of the build calls them.
        "Darwin": (
            "-DCMAKE_INSTALL_NAME_TOOL=/bin/true", "-DCMAKE_OSX_SYSROOT=/", "-DCMAKE_OSX_DEPLOYMENT_TARGET=",
            "-DCMAKE_SHARED_LINKER_FLAGS=-s",
        ),
        # No options at the link: zig then takes the build of Windows' C library, of 500 files, that
        # .ci/check_library.cpp also takes. What -s would leave out is in a file of its own, which no wheel has.
        "Windows": ("-DCMAKE_CXX_FLAGS_RELEASE=-DNDEBUG",),
        "Linux": ("-DCMAKE_SHARED_LINKER_FLAGS=-s",),
    }  # fmt: skip
    run(
        "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_SYSTEM_NAME={platform.system}", f"-DCMAKE_SYSTEM_PROCESSOR={platform.processor}",
        f"-DCMAKE_CXX_COMPILER={tools['c++']}",
        "-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY",  # no check links either
        *options[platform.system],
    )  # fmt: skip
    run("cmake", "--build", str(build), "--target", "mambakit_native")
    library = build / platform.library
    if not library.is_file():
        raise SystemExit(
            f"{platform.target}: CMake made no {platform.library}: {sorted(p.name for p in build.iterdir())}"
        )
    return library


def compiler_script(build: Path, tool: str, target: str) -> Path:
    """An executable that is zig's compiler for ``target``."""
    path = build / f"zig-{tool}"
    # CMake links a program to know its compiler, with other options than the library's; for these zig would build the
    # platform's C and C++ libraries, hundreds of files, a second time.
    path.write_text(
        f"""#!/bin/sh
case "$*" in *CMakeCXXCompilerId.cpp*) set -- "$@" -c ;; esac
exec {sys.executable} -m ziglang {tool} -target {target} "$@"
""",
        encoding="utf-8",
    )
    path.chmod(0o755)
    return path


def packed(pure: Path, library: Path, platform: Platform, output: Path) -> Path:
    """The wheel of ``platform``: the pure one's files, the library, and their RECORD."""
    distribution = "-".join(pure.name.split("-")[:2])
    target = output / f"{distribution}-py3-none-{platform.tag}.whl"
    info = f"{distribution}.dist-info"
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(pure) as wheel:
        for name in wheel.namelist():
            if not name.endswith("/") and name != f"{info}/RECORD":
                files[name] = wheel.read(name)
    content = library.read_bytes()
    files[f"{PLACE}/{platform.library}"] = without_time(content) if platform.system == "Windows" else content
    described = files[f"{info}/WHEEL"].decode().splitlines()
    described = [line for line in described if line and not line.startswith(("Tag:", "Root-Is-Purelib:"))]
    described += ["Root-Is-Purelib: false", *(f"Tag: py3-none-{tag}" for tag in platform.tag.split("."))]
    files[f"{info}/WHEEL"] = ("\n".join(described) + "\n").encode()
    record = [f"{name},sha256={digest(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = ("\n".join([*record, f"{info}/RECORD,,"]) + "\n").encode()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in files.items():
            # The same sources give the same bytes: no file has the time at which it was packed.
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = (0o755 if name.endswith(platform.library) else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            wheel.writestr(entry, content)
    return target


def without_time(library: bytes) -> bytes:
    """A Windows library without the time of its link: the header's, those of the debug directory, and the identity of
    the debug file that is made from it."""
    content = bytearray(library)
    (header,) = struct.unpack_from("<I", content, 0x3C)
    if content[header : header + 4] != b"PE\0\0":
        raise SystemExit("the Windows library has no PE header")
    sections, optional = struct.unpack_from("<H12xH", content, header + 6)
    struct.pack_into("<I", content, header + 8, 0)
    debug, size = struct.unpack_from("<II", content, header + 24 + 112 + 6 * 8)  # the seventh directory of 64 bits
    for section in range(header + 24 + optional, header + 24 + optional + 40 * sections, 40):
        length, address, _, place = struct.unpack_from("<IIII", content, section + 8)
        if not address <= debug < address + length:
            continue
        for entry in range(place + debug - address, place + debug - address + size, 28):
            struct.pack_into("<I", content, entry + 4, 0)
            (where,) = struct.unpack_from("<I", content, entry + 24)
            if content[where : where + 4] == b"RSDS":
                content[where + 4 : where + 20] = bytes(16)
    return bytes(content)


def digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def run(*command: str) -> None:
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is not installed; pip install cmake ninja")
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
