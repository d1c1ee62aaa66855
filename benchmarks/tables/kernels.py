"""Tables of the GPU kernels."""

from __future__ import annotations

from benchmarks.tables.records import Content, Records, cell, milliseconds, plain, ratio, select, shape


def scan(records: Records) -> Content:
    new, before = "2026-11-28-h100-scan", "2026-11-28-h100-scan-before"
    head = [
        "b, d, l", "forward, ms", "of the floor", "mamba-ssm", "ratio", "forward + backward, ms", "mamba-ssm", "ratio",
        "both ratios before", "goal ms",
    ]  # fmt: skip
    rows = []
    for forward in records.rows(new, "scan", kind="forward"):
        size = forward["shape"]
        both, old = records.row(new, "scan", kind="both", shape=size), records.row(before, "scan", shape=size)
        goal = records.goal("scan", shape=size)
        goals = [plain(goal.get(key)) or "-" for key in ("forward_ms", "both_ms")] if goal else []
        line = [shape(forward)]
        for r in (forward, both):
            share = [f"{r['share_of_floor'] * 100:.0f} %"] if r is forward else []
            peer = r["measured_peer_ms"]
            value = ratio(r, r["ms"], peer)
            line += [
                milliseconds(r["ms"]),
                *share,
                milliseconds(peer),
                f"**{value}**" if float(value) >= 2.5 else value,
            ]
        rows.append([*line, cell("{forward_ratio:.2f}, {both_ratio:.2f}", old), "; ".join(goals)])
    return head, rows


def conv(records: Records) -> Content:
    new, peer = "2026-11-25-h100-conv", "2026-11-23-h100-mamba-ssm"
    rows = []
    for forward in records.rows(new, "ops", op="conv forward"):
        both = records.row(new, "ops", op="conv both", shape=forward["shape"])
        theirs = records.row(peer, "conv", shape=forward["shape"])
        line = [shape(forward)]
        for r, ms in ((forward, theirs["forward_ms"]), (both, theirs["both_ms"])):
            line += [f"{r['ms']:.3f} ({r['share'] * 100:.0f} %)", ratio(r, r["ms"], ms)]
        rows.append(line)
    return ["b, d, l", "forward ms (of 3.0 TB/s)", "peer / ours", "forward + backward ms", "peer / ours"], rows


def norm(records: Records) -> Content:
    new, rows = "2026-11-28-h100-norm-head", []
    for forward in records.rows(new, "ops", op="norm forward"):
        both = forward, records.row(new, "ops", op="norm backward", shape=forward["shape"])
        rows.append([shape(forward), *(text for r in both for text in (f"{r['ms']:.3f}", f"{r['share'] * 100:.0f} %"))])
    return ["rows, h", "forward ms", "of 3.0 TB/s", "backward ms", "of 3.0 TB/s"], rows


def cross_entropy(records: Records) -> Content:
    new, rows = "2026-11-28-h100-norm-head", []
    for r in records.rows(new, "ops", op="head both", variant="mambakit"):
        tokens, h, v = r["shape"]
        theirs = records.row(new, "ops", op="head both", variant="PyTorch", shape=r["shape"])
        speed = f"{6 * tokens * h * v / r['ms'] / 1e9:.0f}"
        peer = f"{theirs['ms']:.2f}, {theirs['peak_MiB']:,.0f}"
        rows.append([shape(r), f"{r['ms']:.2f}", speed, f"{r['peak_MiB']:,.0f}", peer])
    return ["tokens, h, v", "ms", "TFLOP/s", "MiB at most", "PyTorch ms, MiB"], rows


def decode_ways(records: Records) -> Content:
    found = records.rows("2026-11-28-h100-decode-ways", "ways")
    counts, rows = sorted({row["rows"] for row in found}), []
    for name, way in dict.fromkeys((row["shape"], row["way"]) for row in found):
        line = [name, way]
        for count in counts:
            here = select(found, shape=name, rows=count)
            mine = select(here, way=way)
            best = min((row["ms"] for row in here), default=0)
            line.append(
                "" if not mine else f"**{mine[0]['ms']:.3f}**" if mine[0]["ms"] == best else f"{mine[0]['ms']:.3f}"
            )
        rows.append(line)
    return ["shape", "decoder", *map(str, counts)], rows


def layouts(records: Records) -> Content:
    """(b, d, l) operands relative to channels-last ones of the same run, bfloat16 and in brackets float32."""
    found = records.rows("2026-11-30-h200-layouts", "layouts")
    lines = []
    for size in dict.fromkeys(tuple(row["shape"]) for row in found):
        groups = f"{size[4]} groups, (b, d, l)"
        cells = []
        for op, case in (("scan", "(b, d, l)"), ("scan", groups), ("conv", "(b, d, l)")):
            for kind in ("forward", "both"):
                rows = [
                    select(found, op=op, kind=kind, case=case, shape=list(size), dtype=dtype)
                    for dtype in ("bfloat16", "float32")
                ]
                half, single = (f"{row[0]['ratio']:.2f}" if row else "" for row in rows)
                cells.append(f"{half} ({single})" if half else "")
        lines.append([", ".join(map(str, size[:4])), *cells])
    names = ("scan", "scan, 4 groups of channels", "convolution")
    return ["b, d, l, n", *(f"{name}, {kind}" for name in names for kind in ("forward", "with its gradient"))], lines
