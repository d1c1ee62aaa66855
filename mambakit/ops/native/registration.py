"""Attach the native kernels to the ops' CPU dispatch key.

float32 and bfloat16 run on the kernels; float16 is converted to float32 around them; float64, and filters wider than 8,
are the reference's. Where the library is missing, the first call warns and the reference serves.
"""

from __future__ import annotations

from collections.abc import Callable

from mambakit.ops._library import implement, without_autocast
from mambakit.ops.causal_conv1d import reference as conv_reference
from mambakit.ops.native import conv, library, norm, scan
from mambakit.ops.rms_norm import reference as norm_reference
from mambakit.ops.selective_scan import reference as scan_reference

_IMPLEMENTATIONS: dict[str, tuple[Callable, Callable, Callable]] = {
    # op: the kernel's Python side, its reference, and whether the kernel serves these arguments
    "selective_scan": (scan.forward, scan_reference.forward, scan.serves),
    "selective_scan_backward": (scan.backward, scan_reference.backward, scan.serves),
    "selective_scan_": (scan.forward_, scan_reference.forward_, scan.serves),
    "causal_conv1d": (conv.forward, conv_reference.forward, conv.serves),
    "causal_conv1d_backward": (conv.backward, conv_reference.backward, conv.serves_backward),
    "causal_conv1d_": (conv.forward_, conv_reference.forward_, conv.serves_in_place),
    "rms_norm": (norm.forward, norm_reference.forward, norm.serves),
    "rms_norm_backward": (norm.backward, norm_reference.backward, norm.serves),
}


def register() -> None:
    """Serve every op's "CPU" dispatch key from the native library. Call it once, after the ops are defined."""
    for name, (native, reference, serves) in _IMPLEMENTATIONS.items():
        implement(name, _choice(native, without_autocast(reference), serves), "CPU")


def _choice(native: Callable, reference: Callable, serves: Callable[..., bool]) -> Callable:
    def call(*args):
        if not library.is_available():
            library.warn_missing()
            return reference(*args)
        return native(*args) if serves(*args) else reference(*args)

    return call
