"""`torch.multinomial` of one token a row on a CPU: the same tokens and random numbers, in a tenth of the time.

The generator's state is read and written as `torch.get_rng_state` has it, 5,056 bytes: the seed (8), how many words are
left plus 1 (4), whether it is seeded (4), the next word (8), 624 words of 8 bytes each, and what normal numbers need.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mambakit.ops._backends import native
from mambakit.ops._backends.memory import all_plain, empty
from mambakit.ops._backends.structures import FLOAT32, INT32, address, check, structure

_Arguments = structure("Arguments", "p state position tokens drawable", "b v")
_BYTES, _WORDS, _FIRST = 5056, 624, 24
_INT64 = (torch.int64,)


def serves(probabilities: Tensor) -> bool:
    """Whether `multinomial` computes these: contiguous float32 on the CPU, beside the native library."""
    return (
        probabilities.device.type == "cpu"
        and probabilities.dtype == torch.float32
        and probabilities.is_contiguous()
        and all_plain((probabilities,))
        and native.is_available()
    )


def multinomial(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of ``probabilities`` (b, v), float32, with the CPU's global generator.

    The tokens and the generator's next state are those of ``torch.multinomial(probabilities, 1)``. No other thread may
    draw from that generator meanwhile.

    Returns:
        (b,) int64 tokens, and (b,) bool, False for a row with a NaN or of zeros, from which nothing can be drawn.
    """
    b, v = probabilities.shape
    state = torch.default_generator.get_state()
    assert state.numel() == _BYTES, "the state of torch's generator has another form"
    left, following = state[8:12].view(torch.int32), state[16:24].view(torch.int64)
    words = state[_FIRST : _FIRST + 8 * _WORDS].view(torch.int64)
    own = words.to(torch.int32)
    position = following.clone() if left.item() != 1 else torch.full_like(following, _WORDS)
    tokens, drawable = (empty(b, dtype=torch.int64) for _ in range(2))
    arguments = _Arguments(
        address(probabilities, FLOAT32, b * v), address(own, INT32, _WORDS), address(position, _INT64, 1),
        address(tokens, _INT64, b), address(drawable, _INT64, b), b, v,
    )  # fmt: skip
    check(native.kernel("exponential_race")(ctypes.byref(arguments), ctypes.c_int64(0)))
    words.copy_(own.to(torch.int64) & 0xFFFFFFFF)
    following.copy_(position)
    left.copy_(_WORDS + 1 - position)
    torch.default_generator.set_state(state)
    return tokens, drawable.bool()
