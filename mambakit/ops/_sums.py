"""Sums over lanes in Triton's kernels."""

# Launch options of a kernel that sums products over lanes. Afterwards every lane holds the sum, and any of them may be
# the one that stores it. With fused multiply-add a lane adds its own product unrounded to the others' rounded ones, so
# that sums would differ in the last bit between lanes (compute-sanitizer's racecheck reports it in shared memory).
ALIKE = {"enable_fp_fusion": False}
