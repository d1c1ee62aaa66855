"""What `mambakit plan` knows: figures of records, as mambakit/planning/recorded.json holds them."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.record import ROOT
from benchmarks.tables.records import Records

FILE = ROOT / "mambakit" / "planning" / "recorded.json"
_TRAIN = ("model", "batch", "length", "how", "tokens_per_second", "gib")
_STEP = ("shape", "batch", "seconds")
H100_TRAIN, H100_STEP = "2026-11-28-h100-train-step", "2026-11-28-h100-generation"
H200_TRAIN = "2026-11-27-h200-train-step"
# Steps of packed weights beside plain ones of the same run.
H100_PACKED = "2026-11-25-h100-generation"
CPU = "2026-11-25-epyc-zen3-cpu"
# The H200's read bandwidth, as a decoding benchmark measured it.
H200_BANDWIDTH = "2026-11-29-h200-engine"


def _kept(rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names if row.get(name) is not None} for row in rows]


def content() -> str:
    """recorded.json's text."""
    records = Records()
    loaded = {name: records.load(name) for name in (H100_TRAIN, H100_STEP, H200_TRAIN, CPU, H200_BANDWIDTH)}
    step = _kept(records.rows(H100_STEP, "step"), _STEP)
    h100 = loaded[H100_STEP]["results"]["bandwidth"]
    h200 = loaded[H200_BANDWIDTH]["results"]["bandwidth"]
    times = {
        row.get("format", "plain"): row["seconds"] for row in records.rows(H100_PACKED, "step", shape="1.4b", batch=1)
    }
    packed = {name: round(times[name] / times["plain"], 3) for name in ("int8", "int4")}
    recompute = _kept(records.rows(H200_TRAIN, "train_step", how="recompute"), _TRAIN)
    cpu = loaded[CPU]["results"]
    shares = {row["what"]: row["share"] for row in cpu["rows"] if "share" in row}
    seconds = cpu["training"][0]["seconds"]
    found = {
        "h100": {
            "name": loaded[H100_TRAIN]["machine"], "kind": "cuda", "gib": 79.2, "bandwidth": h100,
            # recompute_selection was measured on an H200 alone, whose plain step is 3 % faster than an H100's.
            "train": _kept(records.rows(H100_TRAIN, "train_step"), _TRAIN) + recompute,
            "step": step, "sources": [H100_TRAIN, H100_STEP, H100_PACKED], "more": {"peak": 989e12, "packed": packed},
        },
        "h200": {
            "name": loaded[H200_TRAIN]["machine"], "kind": "cuda", "gib": 139.8, "bandwidth": h200,
            "train": _kept(records.rows(H200_TRAIN, "train_step"), _TRAIN),
            "step": step, "reading": round(h200 / h100, 3),
            "scaled": "decoding is scaled from an H100's steps by the read bandwidth",
            "sources": [H200_TRAIN, H100_STEP, H100_PACKED, H200_BANDWIDTH], "more": {"peak": 989e12, "packed": packed},
        },
        "cpu": {
            "name": loaded[CPU]["machine"], "kind": "cpu", "gib": None, "bandwidth": cpu["bandwidth"],
            "train": [
                {"model": "130m", "batch": 1, "length": 512, "how": how, "tokens_per_second": round(512 / seconds, 1)}
                for how in ("graph", "recompute")
            ],
            "step": [], "sources": [CPU],
            "more": {
                "threads": 2,
                # float32 throughout: twice an H100's bytes of the same step, which is no measurement.
                "activations": [[1, 30.0]],
                "share": {
                    "float32": shares["decode, batch 1, float32"], "bfloat16": shares["bfloat16"],
                    "int8": shares["int8"], "int4": shares["int4"],
                },
            },
        },
    }  # fmt: skip
    return json.dumps(found, indent=1) + "\n"
