"""Error of the scan where decays are near 1: delta |A| about 1e-7 over 2^20 tokens.

    python benchmarks/numerics.py [--device cuda] [--tokens 1048576]

The state is then nearly a plain sum of a million inputs. Each figure is ||x - exact|| / ||exact|| of the outputs and of
the final state against float64, for a token-by-token loop in float32 (what a decoder does) and for the op, as one call
and in chunks of 4,096 tokens with a carried state.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from mambakit.ops import selective_scan
from mambakit.ops.implementations import implementations


def loop(u, delta, A, B, C, dtype):
    """y, h token by token in ``dtype``; numpy, since a million torch calls take minutes."""
    u, delta, A, B, C = (
        t[0].numpy().astype(dtype) if t.dim() == 3 else t.numpy().astype(dtype) for t in (u, delta, A, B, C)
    )
    h = np.zeros(A.shape, dtype)
    y = np.empty(u.shape, dtype)
    for t in range(u.shape[0]):
        h = np.exp(delta[t][:, None] * A) * h + (delta[t] * u[t])[:, None] * B[t]
        y[t] = h @ C[t]
    return torch.from_numpy(y)[None], torch.from_numpy(h)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=2**20)
    record.add_argument(parser)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    length, d, n = arguments.tokens, 4, 8
    u = torch.randn(1, length, d) + 1  # a mean, so that the sum grows
    delta = torch.rand(1, length, d) * 2e-7
    A = -torch.rand(d, n) - 0.5
    B, C = torch.randn(1, length, n) + 1, torch.randn(1, length, n)
    exact = loop(u, delta, A, B, C, np.float64)
    error = lambda a, b: ((a.double().cpu() - b).norm() / b.norm()).item()  # noqa: E731

    served = next(i.serves for i in implementations() if i.op == "selective_scan" and i.device == arguments.device)
    rows = {"float32 loop, token by token": loop(u, delta, A, B, C, np.float32)}
    u, delta, A, B, C = (t.to(arguments.device) for t in (u, delta, A, B, C))
    rows[f"{served}, one call"] = selective_scan(u, delta, A, B, C)
    state, parts = None, []
    for at in range(0, length, 4096):
        cut = [t[:, at : at + 4096] for t in (u, delta, B, C)]
        part, state = selective_scan(cut[0], cut[1], A, cut[2], cut[3], initial_state=state)
        parts.append(part)
    rows[f"{served}, 4,096 tokens a call"] = torch.cat(parts, 1), state
    print(f"{length:,} tokens, delta |A| about 1e-7; relative error of")
    found = [
        {"how": name, "outputs": error(y, exact[0]), "final_state": error(h, exact[1])} for name, (y, h) in rows.items()
    ]
    for row in found:
        print(f"{row['how']:45} outputs {row['outputs']:.1e}   final state {row['final_state']:.1e}")
    record.write(arguments.json, {"numerics": found}, gpus=int(arguments.device == "cuda"))


if __name__ == "__main__":
    main()
