"""The numbers that define how tokens are chosen, each declared once with its range and default. It does not import
torch.

`SamplingParams`, the requests of the engine and of streams, and the server's API validate their numbers by these
declarations.
"""

from __future__ import annotations

from mambakit.number import INT64, LARGEST, SEED, Number

__all__ = ["CHUNK_SIZE", "INT64", "NEW_TOKENS", "SAMPLING", "Number"]

SAMPLING = {
    "temperature": Number(1.0, 0, LARGEST),
    "top_k": Number(0, 0, INT64[1], whole=True),
    "top_p": Number(1.0, 0, 1, above=True, remedy="temperature 0 is greedy"),
    "min_p": Number(0.0, 0, 1),
    "repetition_penalty": Number(1.0, 0, LARGEST, above=True, remedy="1 is off"),
    "seed": SEED,
    "typical_p": Number(1.0, 0, 1, above=True, remedy="temperature 0 is greedy"),
    "epsilon_cutoff": Number(0.0, 0, 1),
    "presence_penalty": Number(0.0, -100, 100),
    "frequency_penalty": Number(0.0, -100, 100),
}
"""In the order of the fields of `SamplingParams`."""

BIAS = Number(0.0, -1e30, 1e30)  # added to a token's logit

NEW_TOKENS = Number(256, 1, INT64[1], whole=True)
CHUNK_SIZE = Number(None, 1, INT64[1], whole=True)
