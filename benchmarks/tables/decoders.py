"""The table of decoders, in the order of `mambakit.decoding.registry.DECODERS`."""

from __future__ import annotations

from benchmarks.tables.records import Content, Records

# What each serves, by its name there; a decoder that has no line here, and a line without a decoder, are errors.
SERVES = {
    "native library (CPU)": (
        "any format of weights on a CPU, of float32 up to 32 slots; one call into C++ a step for every 16 slots"
    ),
    "persistent kernel (CUDA)": (
        "bfloat16, float16, int8, int4, fp8; up to 8 slots (of 1.4b 6, of 2.8b 5, in bfloat16); 16 states; widths that "
        "are multiples of 128 (int4: 256); one kernel a step"
    ),
    "kernels for few rows (Triton)": (
        "up to 4 slots of what the persistent kernel does not serve: float32, other state sizes, other widths "
        "of packed weights; four kernels a layer"
    ),
    "kernels for many rows (Triton)": (
        "plain weights, up to 512 slots (of 1.4b 128, of 2.8b 64; in float32 32, of 2.8b 16); packed ones of a model "
        "in bfloat16 or float16, up to 128 (of 1.4b 32, in fp8 64); six kernels a layer"
    ),
    "captured forward (CUDA graph)": "any other plain model on a GPU; the forward's own kernels, in one CUDA graph",
    "forward": "everything: models with hooks, on several devices, in training mode",
}


def decoders(records: Records) -> Content:
    from mambakit.decoding.registry import DECODERS

    names = [kind.name for kind in DECODERS]
    if set(names) != set(SERVES):
        raise KeyError(f"SERVES describes {sorted(SERVES)}, the registry has {sorted(names)}")
    return ["decoder", "serves"], [[name, SERVES[name]] for name in names]
