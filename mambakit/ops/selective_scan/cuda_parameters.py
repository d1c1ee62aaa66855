"""The scan's CUDA parameter structures: the same fields in the same order as the `struct`s of the .cuh files.

`tests/ops/_backends/test_cuda_parameters.py` compares them. Pointers and 64-bit integers only, so that there is no
padding.
"""

from __future__ import annotations

from mambakit.ops._backends.structures import structure

# Addresses; then strides over rows (_b) and over tokens (_t) in elements, sizes, and what the launch does.
ForwardParams = structure(
    "ForwardParams",
    "u delta z B C A D bias initial slots ids cu y final checkpoints carries delta_sums tickets",
    "u_b delta_b z_b B_b C_b u_t delta_t z_t B_t C_t l d n channel_tiles chunk_length chunks phase interval"
    " u_c delta_c z_c B_g C_g group_tiles group_channels",
)
BackwardParams = structure(
    "BackwardParams",
    "dy u delta z B C A D bias initial dfinal checkpoints ids cu du ddelta dz dinitial carries delta_sums partial"
    " dA_parts dD_parts dbias_parts dB_parts dC_parts tickets",
    "dy_b u_b delta_b z_b B_b C_b dy_t u_t delta_t z_t B_t C_t dz_b dz_t l d n channel_tiles chunk_length chunks"
    " first_chunk rows interval dy_c u_c delta_c z_c B_g C_g group_tiles group_channels",
)
ReduceParams = structure(
    "ReduceParams",
    "partial dA_parts dD_parts dbias_parts dA_scale dB dC dA dD dbias",
    "rows channel_tiles n d parts groups row_t",
)
SequencesParams = structure("SequencesParams", "cu ids source target", "state_size")
