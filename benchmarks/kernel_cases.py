"""Every Triton and CUDA C++ kernel of the project, and calls that launch it.

`TRITON_CASES` and `CUDA_CASES` are calls of the ops' own code on tensors of one device. On a CPU with `compile_only`
nothing is launched: each kernel is compiled for a card as its code would launch it there
(`benchmarks/architectures.py`). On a GPU they run, small (`.ci/sanitizers.py`). `triton_kernels` and `cuda_kernels`
find what there is in the sources, so that a test sees a kernel that no case launches.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.ops.decode.weights import LayerWeights, ModelWeights
from mambakit.ops.linear import pack

PACKAGE = Path(__file__).resolve().parents[1] / "mambakit"


@dataclass(frozen=True)
class Card:
    """What a plan asks of a card.

    Attributes:
        name: of a card of this architecture.
        processors: its multiprocessors.
        shared: bytes of shared memory that a CTA may have.
    """

    name: str
    processors: int
    shared: int


CARDS = {
    80: Card("A100", 108, 163 * 1024),
    86: Card("RTX 3090", 82, 99 * 1024),
    89: Card("RTX 4090", 128, 99 * 1024),
    90: Card("H100", 132, 227 * 1024),
    100: Card("B200", 148, 227 * 1024),
    120: Card("RTX 5090", 170, 99 * 1024),
}
"""By compute capability."""


# -- what there is -----------------------------------------------------------------------------------------------------


def triton_functions() -> dict[str, ast.FunctionDef]:
    """By "file:name", the functions of the package that Triton compiles."""
    found = {}
    for path in sorted((PACKAGE / "ops").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(".jit" in ast.unparse(d) for d in node.decorator_list):
                found[f"{path.relative_to(PACKAGE)}:{node.name}"] = node
    return found


def triton_kernels() -> list[str]:
    """Those of `triton_functions` that are launched: the others are called by them."""
    functions = triton_functions()
    launched = set()
    for path in sorted((PACKAGE / "ops").rglob("*.py")):
        launched |= set(re.findall(r"(\w+)\[\(", path.read_text(encoding="utf-8")))
    return [name for name in functions if name.split(":")[1] in launched]


def cuda_kernels() -> list[str]:
    """ "file:name" of every CUDA C++ kernel."""
    found = []
    for path in sorted([*PACKAGE.rglob("*.cu"), *PACKAGE.rglob("*.cuh")]):
        text = path.read_text(encoding="utf-8")
        names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", text)
        found += [f"{path.relative_to(PACKAGE)}:{name}" for name in names]
    return found


# -- compiling without a card ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """A kernel as one launch compiles it.

    Attributes:
        kernel: "file:name".
        shared: bytes of shared memory of a program.
        warps: of a program.
    """

    kernel: str
    shared: int
    warps: int


class _Driver:
    """In place of Triton's driver: a card that there is not."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        card = CARDS[capability]
        self._capability, self._target = capability, GPUTarget("cuda", capability, 32)
        properties = {"max_shared_mem": card.shared, "multiprocessor_count": card.processors}
        self.utils = type("Utilities", (), {"get_device_properties": staticmethod(lambda _: properties)})()

    def get_current_device(self) -> int:
        return self._capability  # kernels are kept by device

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


@contextmanager
def compile_only(capability: int) -> Iterator[list[Compiled]]:
    """Compile what is launched meanwhile for a card of this capability, and launch nothing.

    Yields:
        The kernels, in the order of their launches.
    """
    import triton
    from triton.runtime.jit import JITFunction

    from mambakit.ops.causal_conv1d import triton as conv
    from mambakit.ops.decode import triton_many_rows
    from mambakit.ops.linear import triton as linear

    found: list[Compiled] = []
    run, active, card = JITFunction.run, triton.runtime.driver._active, CARDS[capability]
    processors, within = conv._processors, triton_many_rows.ManyRowsStep.__init__
    without, assembly = linear.WITHOUT_CARD, linear.ASM

    def compile_it(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if "ASM" in options:
            options["ASM"] = True  # off for a CPU's interpreter
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        path = Path(self.fn.__code__.co_filename).relative_to(PACKAGE)
        found.append(Compiled(f"{path}:{self.fn.__name__}", kernel.metadata.shared, kernel.metadata.num_warps))
        return kernel

    def with_the_cards_memory(self: Any, *arguments: Any, **options: Any) -> None:
        within(self, *arguments, **(options | {"shared": card.shared}))

    triton.runtime.driver.set_active(_Driver(capability))
    try:
        JITFunction.run = compile_it
        conv._processors = lambda _device: card.processors
        linear.WITHOUT_CARD, linear.ASM = (card.processors, card.shared, divmod(capability, 10)), True
        triton_many_rows.ManyRowsStep.__init__ = with_the_cards_memory
        yield found
    finally:
        JITFunction.run, conv._processors, triton_many_rows.ManyRowsStep.__init__ = run, processors, within
        linear.WITHOUT_CARD, linear.ASM, triton.runtime.driver._active = without, assembly, active


# -- calls -------------------------------------------------------------------------------------------------------------

SHAPES = {"130m": (768, 24), "370m": (1024, 48), "1.4b": (2048, 48), "2.8b": (2560, 64), "7B": (4096, 64)}
"""(h, layers)."""


def weights_of(
    h: int, layers: int, v: int, dtype: torch.dtype, device: str, format: str | None = None, fill: bool = True,
    norms: int = 0,
) -> ModelWeights:  # fmt: skip
    """A model whose layers share one layer's weights. Without ``fill`` their memory is not touched. ``norms`` of dt, B
    and C: 0 none, 1 without weights, 2 with weights."""

    def make(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        empty = torch.empty if format is None else torch.zeros  # what is packed must be numbers
        values = empty(shape, dtype=kind, device=device)
        return values.normal_(std=0.02) if fill else values

    def large(*shape: int) -> Any:
        return make(*shape) if format is None else pack(make(*shape).float(), format)

    d, n, r = 2 * h, 16, -(-h // 16)
    layer = LayerWeights(
        norm=make(h), in_proj=large(2 * d, h), in_proj_bias=None, conv=make(d, 4), conv_bias=make(d),
        x_proj=large(r + 2 * n, d), dt_proj=make(d, r), dt_bias=make(d, kind=torch.float32),
        A_log=make(d, n, kind=torch.float32), D=make(d, kind=torch.float32), out_proj=large(h, d), out_proj_bias=None,
        **(dict(zip(("dt_norm", "B_norm", "C_norm"), map(make, (r, n, n)), strict=True)) if norms == 2 else {}),
    )  # fmt: skip
    return ModelWeights([layer] * layers, make(v, h), make(h), large(v, h), 1e-5, 1e-6 if norms else None)


def states_of(weights: ModelWeights, rows: int, ssm: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(conv_states, ssm_states) of so many rows."""
    first, device = weights.layers[0], weights.final_norm.device
    d, layers = first.conv.shape[0], len(weights.layers)
    conv = torch.zeros(layers, rows, d, first.conv.shape[1] - 1, dtype=weights.final_norm.dtype, device=device)
    return conv, torch.zeros(layers, rows, d, first.A_log.shape[1], dtype=ssm, device=device)


Case = Callable[[str, bool], None]
"""``case(device, small)``: launches its kernels on tensors of a device, of a small shape or of the 1.4b model's."""


def _width(small: bool) -> tuple[int, int]:
    return (128, 320) if small else (2048, 50280)


def few_rows(format: str | None, dtype: torch.dtype, norms: int = 0) -> Case:
    def case(device: str, small: bool) -> None:
        from mambakit.ops.decode.triton_few_rows import FewRowsStep

        h, v = _width(small)
        weights = weights_of(h, 1, v, dtype, device, format, norms=norms)
        for rows in (1, 4):
            FewRowsStep(weights, *states_of(weights, rows), 2)(choose=True)

    return case


def many_rows(rows: int, dtype: torch.dtype, ssm: torch.dtype = torch.float32, norms: int = 0) -> Case:
    def case(device: str, small: bool) -> None:
        from mambakit.ops.decode.triton_many_rows import ManyRowsStep

        h, v = _width(small)
        weights = weights_of(h, 1, v, dtype, device, norms=norms)
        ManyRowsStep(weights, *states_of(weights, rows, ssm), 2)(choose=True)

    return case


def packed_rows(rows: int, format: str) -> Case:
    def case(device: str, small: bool) -> None:
        from mambakit.ops.decode.triton_packed_rows import PackedRowsStep

        h, v = _width(small)
        weights = weights_of(h, 1, v, torch.bfloat16, device, format)
        PackedRowsStep(weights, *states_of(weights, rows), 2)(choose=True)

    return case


def packed_products(format: str) -> Case:
    def case(device: str, small: bool) -> None:
        from mambakit.ops.linear import triton as gpu
        from mambakit.ops.linear import triton_plan
        from mambakit.ops.linear.schema import parts_of

        n, widths = (96, (192, 576)) if small else (2048, (4096,))  # of the small ones, the second's sums are split
        for k in widths:
            weight = pack(torch.randn(n, k, device=device), format)
            gpu.dequantize(*parts_of(weight), format, k, weight.group)
            for rows in (3, 20, 50, 100, 300):
                x = torch.randn(rows, k, device=device).to(torch.bfloat16)
                bias, shared = x[0, :1].expand(n).contiguous(), gpu.card_of(x)[1] - gpu.KEPT
                gpu.in_registers(
                    x, weight, bias, triton_plan.tile_of(format, rows).fitting(format, weight.group, 2, shared)
                )
                if gpu.takes_hopper(x, weight):
                    plan = triton_plan.product_of(format, x.dtype, weight.group, rows, shared, True)
                    gpu.in_registers(x, weight, bias, plan)
        if format == "fp8" and gpu.card_of(x)[2] >= triton_plan.FLOAT8_CAPABILITY:  # others refuse such weights
            gpu.rows_in_float8(x)
            gpu.norm_in_float8(x, x[0], x.float(), 1e-5, torch.float32, torch.bfloat16)

    return case


def drafts(slots: int, tokens: int, dtype: torch.dtype, norms: int = 0) -> Case:
    def case(device: str, small: bool) -> None:
        from mambakit.ops.decode.triton_verify import ManyRowsVerification

        h, v = _width(small)
        weights = weights_of(h, 1, v, dtype, device, norms=norms)
        verify = ManyRowsVerification(weights, *states_of(weights, slots), tokens)
        verify()
        verify.kept.fill_(tokens // 2)
        verify.commit()

    return case


def rounds(device: str, small: bool) -> None:
    """The small steps of a round of speculation."""
    from mambakit.ops.decode import triton_round as ops

    b, k = (3, 2) if small else (8, 4)
    fields, columns = ops.FIELDS.value, ops.TOKENS.value

    def integers(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.int64, device=device)

    rows, asked, picks, tokens = integers(b, fields + 4), integers(b, 3), integers(k, b), integers(b, k + 1)
    inputs, counts, accepted, broken, kept, at = (integers(b) for _ in range(6))
    ops.begin(rows, asked, inputs, counts)
    ops.second(rows, picks[0], inputs)
    ops.assemble(rows, picks, tokens)
    ops.accept(tokens, tokens.clone(), counts, accepted)
    ops.finish(rows, asked, tokens, accepted, counts, broken, k, integers(b, columns + k + 1), kept, at)


def convolution(transposed: bool, packed: bool, dtype: torch.dtype) -> Case:
    def case(device: str, small: bool) -> None:
        from mambakit.ops.causal_conv1d import triton as conv

        d, length, k = (96, 72, 4) if small else (4096, 2048, 4)
        b = 1 if packed else 2
        x = torch.randn(b, d, length, dtype=dtype, device=device).transpose(1, 2)
        if not transposed:
            x = x.contiguous()
        weight, bias = torch.randn(d, k, dtype=dtype, device=device), torch.randn(d, dtype=dtype, device=device)
        starts = torch.tensor([0, 17, length], dtype=torch.int32, device=device) if packed else None
        rows = 2
        state = torch.randn(rows, d, k - 1, dtype=dtype, device=device)
        y, final = conv.forward(x, weight, bias, "silu", state, starts)
        conv.backward(torch.randn_like(y), torch.randn_like(final), x, weight, bias, "silu", state, starts)
        if transposed and not packed:
            uneven = torch.randn(b, d, length - 3, dtype=dtype, device=device).transpose(1, 2)
            for of_tokens in (x, uneven):
                y, _ = conv.forward(of_tokens, weight, bias, "silu", None, None)
                conv.backward(torch.randn_like(y), None, of_tokens, weight, bias, "silu", None, None)
        slots = torch.arange(rows, dtype=torch.int32, device=device)
        conv.forward_(state.clone(), slots, x, weight, bias, "silu", starts)
        if not packed and not transposed:
            conv.forward_(state.clone(), slots, x[:, :1].contiguous(), weight, bias, "silu", None)

    return case


def norm(dtype: torch.dtype) -> Case:
    def case(device: str, small: bool) -> None:
        from mambakit.ops.rms_norm import triton as norm

        h, tokens = (96, 50) if small else (2048, 4096)
        x, weight = torch.randn(tokens, h, dtype=dtype, device=device), torch.ones(h, dtype=dtype, device=device)
        residual = torch.randn(tokens, h, device=device)
        y, kept = norm.forward(x, weight, residual, 1e-5, torch.float32, dtype)
        norm.backward(torch.randn_like(y), torch.randn_like(kept), kept, weight, 1e-5, dtype, True)

    return case


def selection_norm(dtype: torch.dtype, weighted: bool) -> Case:
    def case(device: str, small: bool) -> None:
        from mambakit.ops.selection_norm import triton as norm

        (r, n), tokens = ((6, 16), 50) if small else ((128, 16), 4096)
        x = torch.randn(tokens, r + 2 * n, dtype=dtype, device=device)
        weights = [torch.ones(size, device=device) if weighted else None for size in (r, n, n)]
        y = norm.forward(x, *weights, r, 1e-6)
        norm.backward(torch.randn_like(y), x, *weights, r, 1e-6)

    return case


def scan_inputs(device: str, small: bool, dtype: torch.dtype, n: int = 16, length: int | None = None) -> list[Any]:
    """u, delta, A, B, C, D, z, delta_bias of the scan."""
    d = 96 if small else 4096
    length = length or (70 if small else 512)
    u, delta, z = (torch.randn(2, length, d, dtype=dtype, device=device) for _ in range(3))
    A, (B, C) = -torch.rand(d, n, device=device), torch.randn(2, 2, length, n, dtype=dtype, device=device)
    D, bias = torch.randn(2, d, device=device)
    return [u, delta.abs(), A, B, C, D, z, bias]


def triton_scan(dtype: torch.dtype) -> Case:
    def case(device: str, small: bool) -> None:
        from mambakit.ops.selective_scan import triton as scan

        inputs = scan_inputs(device, small, dtype)
        u, A = inputs[0], inputs[2]
        initial = torch.randn(2, u.shape[2], A.shape[1], device=device)
        y, final, checkpoints = scan.forward(*inputs, True, initial, None, 64)
        scan.backward(
            torch.randn_like(y), torch.randn_like(final), *inputs, True, initial, None, checkpoints, 64
        )  # fmt: skip
        slots = torch.arange(2, dtype=torch.int32, device=device)
        scan.forward_(initial.clone(), slots, *(t[:, :1] if t.dim() == 3 else t for t in inputs), True, None)

    return case


def cross_entropy(dtype: torch.dtype) -> Case:
    def case(device: str, small: bool) -> None:
        from mambakit.ops.linear_cross_entropy import triton as loss

        h, v, tokens = (32, 300, 20) if small else (256, 50280, 64)
        hidden, weight = (torch.randn(n, h, dtype=dtype, device=device) for n in (tokens, v))
        targets = torch.randint(0, v, (tokens,), device=device)
        loss.forward(hidden, weight, targets, -100, True, True)

    return case


def sampling(device: str, small: bool) -> None:
    from mambakit.ops.sampling.triton import sample

    rows, v = 4, 300 if small else 50280
    logits = torch.randn(rows, v, device=device)
    columns = [(0.0, 0, 1.0, 0.0, 1.0, 0.0), (0.8, 20, 0.9, 0.05, 1.0, 0.0), (1.0, 0, 1.0, 0.0, 0.5, 0.0)]
    columns.append((1.0, 0, 1.0, 0.0, 1.0, 0.01))
    uniform = torch.rand(rows, dtype=torch.float64, device=device)
    sample(logits, uniform, torch.tensor(columns, dtype=torch.float32, device=device))


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TRITON_CASES: dict[str, Case] = {
    "decode, few rows, float32": few_rows(None, F32),
    "decode, few rows, int8": few_rows("int8", BF16),
    "decode, few rows, int4": few_rows("int4", BF16),
    "decode, few rows, FalconMamba": few_rows(None, BF16, 1),
    "decode, 16 rows": many_rows(16, BF16),
    "decode, 16 rows, Jamba's norms": many_rows(16, BF16, norms=2),
    "decode, 64 rows, states in bfloat16": many_rows(64, BF16, BF16),
    "decode, 128 rows": many_rows(128, F16),
    "decode, 512 rows": many_rows(512, BF16),
    "decode, 32 rows, float32": many_rows(32, F32),
    "decode, few rows, fp8": few_rows("fp8", BF16),
    "decode, 48 rows, int8": packed_rows(48, "int8"),
    "decode, 128 rows, int4": packed_rows(128, "int4"),
    "decode, 128 rows, fp8": packed_rows(128, "fp8"),
    "products, int8": packed_products("int8"),
    "products, int4": packed_products("int4"),
    "products, fp8": packed_products("fp8"),
    "drafts of 8 slots": drafts(8, 4, BF16),
    "a round's small steps": rounds,
    "drafts of 32 slots": drafts(32, 5, BF16),
    "drafts, float32": drafts(2, 3, F32),
    "drafts, FalconMamba": drafts(4, 4, BF16, 1),
    "convolution": convolution(False, False, BF16),
    "convolution, packed": convolution(False, True, F32),
    "convolution, (b, d, l)": convolution(True, False, BF16),
    "convolution, (b, d, l), packed": convolution(True, True, F16),
    "norm": norm(BF16),
    "norm, float32": norm(F32),
    "norms of dt, B and C": selection_norm(BF16, False),
    "norms of dt, B and C, weights": selection_norm(F32, True),
    "decode, few rows, norms": few_rows(None, F32, 1),
    "decode, 16 rows, norms": many_rows(16, BF16, norms=2),
    "drafts of 8 slots, norms": drafts(8, 4, BF16, 1),
    "scan": triton_scan(BF16),
    "scan, float32": triton_scan(F32),
    "head and loss": cross_entropy(BF16),
    "head and loss, float32": cross_entropy(F32),
    "sampling": sampling,
}


def cuda_scan(length: int, packed: bool, dtype: torch.dtype, transposed: bool = False) -> Case:
    def case(device: str, small: bool) -> None:
        from mambakit.ops.selective_scan import cuda as scan

        inputs = scan_inputs(device, small, dtype, length=length)
        u, A = inputs[0], inputs[2]
        starts, sequences = None, u.shape[0]
        if packed:
            inputs = [t if t.dim() < 3 else t[:1].contiguous() for t in inputs]
            starts, sequences = torch.tensor([0, 17, length], dtype=torch.int32, device=device), 2
        if transposed:
            for at in (0, 1, 6):  # u, delta, z
                inputs[at] = inputs[at].transpose(1, 2).contiguous().transpose(1, 2)
        initial = torch.randn(sequences, u.shape[2], A.shape[1], device=device)
        y, final, checkpoints = scan.forward(*inputs, True, initial, starts, 256)
        for dy in (torch.randn_like(y), torch.randn(y.shape, dtype=dtype, device=device)):
            scan.backward(dy, torch.randn_like(final), *inputs, True, initial, starts, checkpoints, 256)
        slots = torch.arange(sequences, dtype=torch.int32, device=device)
        scan.forward_(initial.clone(), slots, *inputs, True, starts)

    return case


def persistent_step(rows: int, format: str | None, verify: bool = False, norms: int = 0) -> Case:
    def case(device: str, small: bool) -> None:
        from mambakit.ops.decode.cuda_persistent import PersistentStep

        weights = weights_of(256, 2, 512, torch.bfloat16, device, format, norms=norms)
        states = states_of(weights, rows + verify)
        step = PersistentStep(weights, *states, verify=verify)
        step()
        step()  # what the first one left is read

    return case


def mixer_parameters(device: str, small: bool) -> None:
    from mambakit.ops._backends.launch_list import Place
    from mambakit.ops.fused_mixer.parameters import PreparedBias, PreparedParameters

    counts, states, rows, channels = [100, 4096, 7], 320, 5, 96
    sources = [torch.randn(n, device=device) for n in counts]
    targets = [torch.empty(n, dtype=torch.bfloat16, device=device) for n in counts]
    A_log, A = torch.randn(states, device=device), torch.empty(states, device=device)
    bias = torch.randn(channels, device=device).to(torch.bfloat16)
    arrays = [*sources, *targets, A_log, A, bias, bias.new_empty(rows, channels)]
    (first, second, third, *to), index = [Place(i) for i in range(len(arrays))], torch.device(device).index or 0
    items = PreparedParameters(counts, states, torch.bfloat16, index).items(
        [first, second, third], to[:3], to[3], to[4]
    )
    items += PreparedBias(rows, channels, torch.bfloat16, index).items(to[5], to[6])
    for item in items:
        item.run(torch.cuda.current_stream().cuda_stream, arrays, [array.data_ptr() for array in arrays])
    torch.cuda.synchronize()


def mixer_padding(device: str, small: bool) -> None:
    from mambakit.ops._backends.launch_list import Place
    from mambakit.ops.fused_mixer.padding import PreparedPadding

    rows, length, channels, taps = 3, 37, 264, 3
    pads = torch.tensor([0, 2, length], device=device)
    window, x, delta = (
        torch.randn(rows, *s, device=device) for s in ((channels, taps), (length, 600), (length, channels))
    )
    index = torch.device(device).index or 0
    for dtype in (torch.float32, torch.bfloat16):
        arrays = [pads, *(t.to(dtype) for t in (window, x, delta))]
        padding = PreparedPadding(rows, length, channels, x.stride(1), taps, dtype, index)
        for item in [*padding.window(Place(0), Place(1), Place(2)), *padding.steps(Place(0), Place(3))]:
            item.run(torch.cuda.current_stream().cuda_stream, arrays, [array.data_ptr() for array in arrays])
    torch.cuda.synchronize()


_SCAN = "ops/selective_scan/"
_BACKWARD = (f"{_SCAN}backward.cuh:selective_scan_backward", f"{_SCAN}backward.cuh:selective_scan_reduce")
_FORWARD = f"{_SCAN}forward.cuh:selective_scan_forward"
_STEP = ("ops/decode/persistent.cu:decode_step",)
CUDA_CASES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "scan in CUDA C++": (cuda_scan(70, False, BF16), (_FORWARD, *_BACKWARD)),
    "scan in CUDA C++, several chunks": (
        cuda_scan(1500, False, F32), (_FORWARD, *_BACKWARD, f"{_SCAN}backward.cuh:selective_scan_backward_carries"),
    ),
    "scan in CUDA C++, packed": (
        cuda_scan(300, True, BF16), (_FORWARD, *_BACKWARD, f"{_SCAN}common.cuh:selective_scan_sequences"),
    ),
    "scan in CUDA C++, (b, d, l)": (cuda_scan(70, False, BF16, transposed=True), (_FORWARD, *_BACKWARD)),
    "scan in CUDA C++, (b, d, l), whole vectors": (cuda_scan(72, True, BF16, transposed=True), (_FORWARD, *_BACKWARD)),
    "decode step in one kernel": (persistent_step(1, None), _STEP),
    "decode step in one kernel, 8 rows": (persistent_step(8, None), _STEP),
    "decode step in one kernel, int8": (persistent_step(2, "int8"), _STEP),
    "decode step in one kernel, int4": (persistent_step(4, "int4"), _STEP),
    "decode step in one kernel, fp8": (persistent_step(1, "fp8"), _STEP),
    "decode step in one kernel, FalconMamba": (persistent_step(3, None, norms=1), _STEP),
    "drafts in one kernel": (persistent_step(4, None, verify=True), _STEP),
    "parameters of the fused mixer": (
        mixer_parameters,
        ("ops/fused_mixer/parameters.cu:mixer_parameters", "ops/fused_mixer/parameters.cu:mixer_bias"),
    ),
    "padding of the fused mixer": (
        mixer_padding, ("ops/fused_mixer/padding.cu:mixer_window", "ops/fused_mixer/padding.cu:mixer_steps"),
    ),
}  # fmt: skip
"""Calls that launch kernels of CUDA C++, on a GPU alone, and which ones they launch."""
