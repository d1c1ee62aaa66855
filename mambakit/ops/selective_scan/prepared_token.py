"""One token of the scan in place as an item of a launch list: in Triton, as `cuda.py` says why."""

from __future__ import annotations

import torch
import triton

from mambakit.ops._backends.launch_list import Item, Place
from mambakit.ops._backends.prepared_triton import PreparedTriton, Unaligned
from mambakit.ops._sums import ALIKE
from mambakit.ops.selective_scan import triton as launches
from mambakit.ops.selective_scan.prepared import ForwardPlaces, Inputs


class PreparedToken:
    """`_forward_kernel` on a pool of contiguous states, of which row i has slot i; called as `PreparedForward`."""

    scratch_bytes = 0
    checkpoint_count = 0

    def __init__(self, inputs: Inputs):
        u, delta, A, B, C, _, z, _ = inputs
        b, length, d = u.shape
        n = A.shape[1]
        block = launches._block_d(b, d)
        names = ("su", "sdelta", "sz", "sB", "sC", "su_b", "sdelta_b", "sz_b", "sB_b", "sC_b")
        of_rows = Unaligned(u.dtype) if (B.data_ptr() | C.data_ptr()) % 16 else u.dtype
        self._launch = PreparedTriton(
            launches._forward_kernel,
            (b, triton.cdiv(d, block)),
            {
                "u_ptr": u.dtype, "delta_ptr": u.dtype, "A_ptr": torch.float32, "B_ptr": of_rows, "C_ptr": of_rows,
                "D_ptr": torch.float32, "z_ptr": u.dtype, "bias_ptr": torch.float32, "cu_ptr": None,
                "init_ptr": torch.float32, "final_ptr": torch.float32, "slot_ptr": None, "y_ptr": u.dtype,
                "check_ptr": torch.float32, "length": length, "d": d, "n": n,
                **dict(zip(names, launches._strides([u, delta, z, B, C]), strict=True)), "n_checks": 0,
            },
            {
                "HAS_D": True, "HAS_Z": True, "HAS_BIAS": True, "SOFTPLUS": True, "PACKED": False, "HAS_INIT": True,
                "HAS_SLOTS": False, "INTERVAL": 0, "BD": block, "BN": triton.next_power_of_2(n), "num_warps": 1,
                **ALIKE,
            },
        )  # fmt: skip

    def items(self, places: ForwardPlaces, scratch: Place) -> list[Item]:
        """``scratch`` is not used."""
        p = places
        assert p.initial is not None
        # The last address is that of checkpoints, which are not written.
        return [self._launch.item(p.u, p.delta, p.A, p.B, p.C, p.D, p.z, p.bias, p.initial, p.final, p.y, p.final)]
