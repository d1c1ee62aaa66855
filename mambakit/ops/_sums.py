"""Sums over lanes in Triton's kernels."""

# Options of a launch whose kernel adds up products that lie on several lanes. All of them then hold the sum, and any of
# them may be the one whose value is written. With fused multiply-add a lane adds its own product unrounded to the
# others' rounded ones, so that their sums differ in the last bit (compute-sanitizer's racecheck reports it where they
# meet in shared memory).
ALIKE = {"enable_fp_fusion": False}
