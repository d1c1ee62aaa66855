"""Tables of training, generation and serving on GPUs."""

from __future__ import annotations

from benchmarks.tables.records import Content, Records, cell, latest, select


def train_step(records: Records) -> Content:
    new, old, peer = "2026-11-28-h100-train-step", "2026-11-27-h200-train-step", "2026-11-23-h100-mamba-ssm"
    head = [
        "model", "batch", "H100: ms", "tokens/s", "GiB", "H200: ms", "tokens/s", "with `recompute_selection`, GiB",
        "mamba-ssm, H100 (recorded)", "goal, H100",
    ]  # fmt: skip
    rows = []
    for row in records.rows(new, "train_step", how="graph"):
        case = {key: row[key] for key in ("model", "batch", "length")}
        h200 = records.row(old, "train_step", how="graph", **case)
        less = records.row(old, "train_step", how="recompute", **case)
        theirs, goal = records.row(peer, "train_step", **case), records.goal("train_step", **case)
        rate = "{tokens_per_second:,.0f}"
        rows.append(
            [
                case["model"], cell("{batch} x {length}", row), cell("{ms:.1f}", row), cell(rate, row),
                cell("{gib:.1f}", row),
                cell("{ms:.1f}", h200), cell(rate, h200), cell(rate + ", {gib:.1f}", less),
                cell(rate + ", {gb} GB", theirs) or cell(rate, theirs), cell(rate + ", {note}", goal) or cell(rate,
                goal),
            ]
        )  # fmt: skip
    return head, rows


def decode_steps(records: Records) -> Content:
    new, peer = "2026-11-28-h100-generation", "2026-11-23-h100-mamba-ssm"
    found = records.rows(new, "step", format="plain")
    batches = sorted({row["batch"] for row in found})
    rows = []
    for name in dict.fromkeys(row["shape"] for row in found):
        cells = []
        for batch in batches:
            row = records.row(new, "step", format="plain", shape=name, batch=batch)
            ms, share = cell("{seconds:.3f}", row, seconds=1e3), cell(" ({share:.0%})", row).replace("%", " %")
            cells.append(ms + share)
        theirs, goal = records.row(peer, "step", shape=name), records.goal("step", shape=name)
        rows.append([name, *cells, f"{theirs['seconds'] * 1e3:.2f}; {goal['seconds'] * 1e3:g}"])
    return ["ms a step (share of the bandwidth)", *map(str, batches), "recorded mamba-ssm; goal, batch 1"], rows


def generate(records: Records) -> Content:
    new, before, h200 = "2026-11-28-h100-generate", "2026-11-28-h100-generate-before", "2026-11-27-h200-generation"
    compiled, peer = "2026-11-25-h100-generation", "2026-11-23-h100-mamba-ssm"
    head = [
        "batch", "mambakit: tokens/s, GiB", "Llama", "", "the revision before, H100", "H200: mambakit, Llama",
        "Llama, static cache and torch.compile, H100", "mamba-ssm (recorded)", "goal",
    ]  # fmt: skip
    rate, rows = "{tokens_per_second:,.0f}", []
    for ours in records.rows(new, "generate", who="mambakit", shape="1.4b"):
        batch = ours["batch"]
        llama = records.row(new, "generate", who="Llama", batch=batch)
        fast = records.row(compiled, "generate", who="Llama, compiled", shape="1.4b", batch=batch)
        theirs, faster = llama.get("tokens_per_second"), fast.get("tokens_per_second")
        peers = records.row(peer, "generate", batch=batch)
        other = [cell(rate, records.row(h200, "generate", who=who, batch=batch)) for who in ("mambakit", "Llama")]
        rows.append(
            [
                str(batch), cell(rate + ", {gib:.1f}", ours), cell(rate + ", {gib:.1f}", llama) or "out of memory",
                f"{ours['tokens_per_second'] / theirs:.3g}x" if theirs else "",
                cell(rate, records.row(before, "generate", batch=batch)), ", ".join(other),
                f"{faster:,.0f}: {ours['tokens_per_second'] / faster:.1f}x" if faster else "",
                cell(rate, peers) or ("out of memory" if peers else ""), cell(rate, records.goal("generate",
                batch=batch)),
            ]
        )  # fmt: skip
    return head, rows


def engine(records: Records) -> Content:
    rows = records.rows("2026-11-29-h200-engine", "engine")
    lines = [
        [r["shape"], r["how"], f"{r['engine']:,.0f}", f"{r['generate']:,.0f}", f"{r['engine'] / r['generate']:.2f}"]
        for r in rows
    ]
    return ["shape", "choice", "`Engine`", "`generate`", "ratio"], lines


def first_token(records: Records) -> Content:
    found = records.rows("2026-11-30-h200-first-token", "first_token")
    sizes = list(dict.fromkeys((row["shape"], row["tokens"]) for row in found))
    lines = [
        [who, *(f"{select(found, shape=shape, tokens=n, who=who)[0]['ms']:.1f}" for shape, n in sizes)]
        for who in dict.fromkeys(row["who"] for row in found)
    ]
    return ["ms", *(f"{shape}, {n} tokens" for shape, n in sizes)], lines


def eager(records: Records) -> Content:
    """Layers and models beside mamba-ssm in one run. Op by op: another run, on another host."""
    peers, inference = "2026-11-30-h200-eager-peers", "2026-11-29-h200-eager"
    ordinary, before = "2026-11-29-h200-eager-paths", "2026-11-29-h200-eager-before"
    rows = []
    for part, name, old in (
        ("mixers", peers, ordinary), ("models", peers, ordinary), ("inference", inference, before)
    ):  # fmt: skip
        for now in records.rows(name, part, path="prepared"):
            case = {key: now[key] for key in ("h", "layers", "b", "l") if key in now}
            drop_in, theirs, by_op = (
                (select(records.rows(of, part), path=path, **case) or [{}])[0]
                for of, path in ((name, "drop-in"), (name, "mamba-ssm"), (old, "ordinary"))
            )
            what = {"mixers": "mixer", "models": "model", "inference": "inference"}[part]
            layers = f" x {now['layers']}" if "layers" in now else ""
            rows.append(
                [
                    f"{what}, width {now['h']}{layers}, {now['b']} x {now['l']}", cell("{ms:.2f}", now),
                    cell("{ms:.2f}", drop_in), cell("{ms:.2f}", theirs),
                    f"{theirs['ms'] / now['ms']:.1f}x" if theirs else "", cell("{one_thread_ms:.2f}", now),
                    cell("{card_ms:.2f}", now), cell("{card_ms:.2f}", theirs), cell("{ms:.2f}", by_op),
                ]
            )  # fmt: skip
    heads = [
        "ms", "as a plan", "the drop-in", "mamba-ssm", "", "a plan, autograd in the calling thread",
        "the card alone", "mamba-ssm's", "op by op",
    ]  # fmt: skip
    return heads, rows


def packed_prompts(records: Records) -> Content:
    """Prompts and `generate` of 1.4b by format."""
    prompts = records.rows("2026-11-30-h200-packed-prompts", "prompts")
    written = records.rows("2026-11-30-h200-generate-fp8", "generate")
    sizes = list(dict.fromkeys((r["batch"], r["length"]) for r in prompts))
    rates = {r["who"].removeprefix("mambakit").strip(", ") or "bf16": r["tokens_per_second"] for r in written}
    lines = []
    for format in dict.fromkeys(r["format"] for r in prompts):
        each = [select(prompts, format=format, batch=b, length=length)[0]["ms"] for b, length in sizes]
        lines.append(
            [
                {"bf16": "bfloat16"}.get(format, format), *(f"{ms:.1f}" for ms in each),
                f"{rates[format]:,.0f}" if format in rates else "",
            ]
        )  # fmt: skip
    heads = ["1.4b", *(f"{b} x {length:,}, ms" for b, length in sizes), "128 rows, 2,048 + 128, tokens/s"]
    return heads, lines


def serving_sampled(records: Records) -> Content:
    runs = (
        ("130m, 128 slots", "2026-11-29-h200-serving"),
        ("1.4b, 64 slots, 128 requests at a time", "2026-11-30-h200-serving"),
        ("1.4b, 64 slots, 256 requests at a time", "2026-11-30-h200x2-serving"),
    )  # fmt: skip
    lines = [
        [
            model + (f", {r['replicas']} replicas" if r["replicas"] > 1 else ""),
            r["sampling"],
            f"{r['requests_per_second']:.0f}",
            f"{r['tokens_per_second']:,.0f}",
            cell("{share_of_generate:.2f}", r),
            f"{r['first_token_p50'] * 1e3:.0f}, {r['first_token_p99'] * 1e3:.0f} ms",
        ]
        for model, name in runs
        for r in records.rows(name, "serving")
    ]
    heads = ["", "choice", "requests/s", "tokens/s", "share of `generate`'s"]
    return [*heads, "first token, median and 99th percentile"], lines


def sampling(records: Records) -> Content:
    keys = ("op", "choose", "transformers")
    rows = records.rows("2026-11-29-h200-sampling", "sampling", rows=128)
    lines = [[r["how"], *(f"{r[key] * 1e6:,.0f}" for key in keys)] for r in rows]
    return ["choice", "op, us", "`Sampler.choose`, us", "transformers, us"], lines


def drafts(records: Records, record: str = "drafts") -> Content:
    """Of the latest record of `drafts.py`: the best number of guesses of each drafter."""
    found = records.rows(latest(record), "drafts")
    lines = []
    for rows in sorted({row["rows"] for row in found}):
        cells = []
        for drafter in ("model", "packed", "free"):
            tried = [r for r in select(found, rows=rows, drafter=drafter) if r["acceptance"] == 0.7]
            fastest = max(tried, key=lambda r: r["speedup"], default=None)
            cells.append("" if fastest is None else f"{fastest['speedup']:.2f}x ({fastest['draft_tokens']})")
        (plain,) = select(found, rows=rows, drafter="none")
        lines.append([str(rows), f"{plain['tokens_per_second']:,.0f}", *cells])
    return ["rows", "plain, tokens/s", "by 130m (guesses)", "by 130m in int4", "guesses that are free"], lines


def drafts_7b(records: Records) -> Content:
    return drafts(records, "drafts-7b")


def prompt_lengths(records: Records) -> Content:
    found = records.rows("2026-11-28-h100-generation", "length")
    lengths = sorted({row["tokens"] for row in found})
    rows = []
    for who in ("mambakit", "Llama"):
        times = [select(found, who=who, tokens=length)[0]["seconds"] * 1e3 for length in lengths]
        rows.append([who, *(f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}" for ms in times)])
    return ["ms", *(f"{length:,}" for length in lengths)], rows


def multi_gpu_training(records: Records) -> Content:
    rows = []
    for r in records.rows("2026-11-27-h200x2-multi-gpu", "training"):
        mode = r["how"].removesuffix(", CUDA graph")
        how = mode if r["gpus"] == 1 else f"`parallel={mode}`"
        speedup = f"{r['speedup']:.2f}x" if r["gpus"] > 1 else "1"
        rate = f"{r['tokens_per_second']:,.0f}"
        rows.append([how, str(r["gpus"]), r["rows a GPU"].replace("x", " x "), rate, speedup, f"{r['gib']:.1f}"])
    return ["", "GPUs", "rows a GPU", "tokens/s", "", "GiB a GPU"], rows


def multi_gpu_context(records: Records) -> Content:
    rows = []
    for r in records.rows("2026-11-27-h200x2-multi-gpu", "context"):
        case = f"{r['length']:,} tokens, {r['model']}, {r['how']}"
        error = r.get("gradient_error")
        rows.append(
            [
                case, f"{r['seconds']:.3f}" + cell(": {speedup:.2f}x", r),
                f"{r['gib']:.1f}" + (f": {r['memory_ratio'] * 100:.0f} %" if "memory_ratio" in r else ""),
                f"{r['loss']:.6f}",
                "" if error is None else f"{error * 100:.2g} %",
            ]
        )  # fmt: skip
    return ["", "seconds", "GiB a GPU", "loss", "gradients, distance from one GPU's"], rows


def serving_replicas(records: Records) -> Content:
    found = records.rows("2026-11-27-h200x2-serving", "serving")
    rows = []
    for r in found:
        more = r["tokens_per_second"] / found[0]["tokens_per_second"]
        rate = f"{r['tokens_per_second']:,.0f}" + (f": {more:.2f}x" if r is not found[0] else "")
        first = f"{r['first_token_p50'] * 1e3:.0f}, {r['first_token_p99'] * 1e3:.0f} ms"
        rows.append([str(r["replicas"]), f"{r['requests_per_second']:.1f}", rate, first])
    return ["replicas", "requests/s", "tokens/s", "first token, median and 99th percentile"], rows


def falcon(records: Records) -> Content:
    """A step and prompts of the 7B shape, FalconMamba and in brackets plain Mamba, by format of the weights."""
    found = records.rows("2026-11-29-h200-falcon-mamba", "falcon")
    formats = list(dict.fromkeys(str(row["format"]) for row in found))
    lines = []
    for what in dict.fromkeys(str(row["what"]) for row in found):
        cells = []
        for format in formats:
            times = [select(found, what=what, format=format, who=who) for who in ("FalconMamba", "Mamba")]
            mine, plain = (f"{row[0]['seconds'] * 1e3:.2f}" if row else "-" for row in times)
            cells.append(f"{mine} ({plain})")
        lines.append([what, *cells])
    return ["ms", *formats], lines
