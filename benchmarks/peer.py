"""mamba-ssm's selective scan, built from a checkout of its repository, for benchmarks to measure in the same run.

Only the instantiations that are measured are compiled (bfloat16 inputs, real float32 A): a minute instead of many. The
kernels are untouched. It needs nvcc and ninja; nothing of it is kept in this repository.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from torch import Tensor

_SOURCES = ("selective_scan.cpp", "selective_scan_fwd_bf16.cu", "selective_scan_bwd_bf16_real.cu")


def build(checkout: Path, folder: Path | None = None):
    """The extension's module (``fwd``, ``bwd``); ``folder`` keeps what was built."""
    from torch.utils.cpp_extension import load

    source = checkout / "csrc" / "selective_scan"
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not there: --peer takes a checkout of github.com/state-spaces/mamba")
    folder = folder or Path(tempfile.mkdtemp(prefix="mamba_ssm_"))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    main = folder / _SOURCES[0]
    text = main.read_text()
    # The dispatch over dtypes, to the one that is compiled.
    for name, type in (
        ("DISPATCH_ITYPE_FLOAT_AND_HALF_AND_BF16", "using input_t = at::BFloat16;"),
        ("DISPATCH_WTYPE_FLOAT_AND_COMPLEX", "using weight_t = float;"),
    ):
        body = rf"#define {name}\(.*?\n    \}}\n"
        text, count = re.subn(
            body, f"#define {name}(TYPE, NAME, ...) {{ {type} __VA_ARGS__(); }}\n", text, flags=re.DOTALL
        )
        assert count == 1, name
    main.write_text(text)
    forward = folder / _SOURCES[1]
    forward.write_text("".join(line for line in forward.read_text().splitlines(True) if "complex_t>" not in line))
    return load(
        "mamba_ssm_selective_scan", [str(folder / name) for name in _SOURCES], build_directory=str(folder),
        extra_cuda_cflags=["-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda",
                           "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__",
                           "-U__CUDA_NO_BFLOAT16_OPERATORS__",
                           "-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_BFLOAT162_OPERATORS__",
                           "-U__CUDA_NO_BFLOAT162_CONVERSIONS__", "-gencode=arch=compute_90,code=sm_90"],
    )  # fmt: skip


class Scan:
    """Its forward and backward on our channels-last operands, laid out as it wants them beforehand."""

    def __init__(self, module, u, delta, A, B, C, D, z, delta_bias, softplus: bool, dy):
        def turned(t: Tensor) -> Tensor:
            return t.transpose(1, 2).contiguous()

        self._module, self._softplus = module, softplus
        self._operands = [turned(u), turned(delta), A, turned(B)[:, None], turned(C)[:, None], D, turned(z), delta_bias]
        self._dy = turned(dy)

    def forward(self) -> Tensor:
        """(b, d, l)"""
        return self._module.fwd(*self._operands, self._softplus)[2]

    def both(self) -> list[Tensor]:
        """Gradients of u, delta, A, B, C, D, delta_bias, z, in its layout."""
        out, x, _ = self._module.fwd(*self._operands, self._softplus)
        return self._module.bwd(*self._operands, self._dy, x, out, None, self._softplus, False)

    def results(self) -> dict[str, Tensor]:
        """What both passes give, in our layout."""
        du, ddelta, dA, dB, dC, dD, dbias, dz = self.both()
        rows = {"y": self.forward(), "du": du, "ddelta": ddelta, "dB": dB.squeeze(1), "dC": dC.squeeze(1), "dz": dz}
        return {name: t.transpose(1, 2) for name, t in rows.items()} | {"dA": dA, "dD": dD, "dbias": dbias}
