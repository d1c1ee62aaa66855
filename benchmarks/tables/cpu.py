"""Tables of a CPU."""

from __future__ import annotations

from benchmarks.tables.records import Content, Records, cell, plain, select


def cpu(records: Records) -> Content:
    new, earlier = "2026-11-25-epyc-zen3-cpu", "2026-11-25-epyc-zen3-cpu-earlier"
    head = ["", "tokens/s", "against transformers float32", "against llama.cpp at the same precision", "share of"]
    rows = []
    for row in records.rows(new, "rows"):
        before = records.row(earlier, "rows", what=row["what"])
        rate = row["tokens_per_second"]
        rows.append(
            [
                row["what"], f"{rate:.0f}" if rate > 300 else f"{rate:.1f}",
                f"{row['against_transformers']:.1f}x ({before['against_transformers']:.1f}x)",
                f"{row['against_llama']:.3g}x ({before['against_llama']:.3g}x) {row['llama_format']}",
                f"{row['share'] * 100:.0f} % ({before['share'] * 100:.0f} %) of {row['share_of']}",
            ]
        )  # fmt: skip
    return head, rows


def cpu_others(records: Records) -> Content:
    rows = []
    for name in ("2026-11-30-epyc-zen4-cpu", "2026-11-23-xeon-avx512-cpu"):
        for r in records.rows(name, "rows"):
            share = cell("{share:.0%} of {share_of}", r).replace("%", " %")
            rate = r["tokens_per_second"]
            rows.append(
                [
                    records.load(name)["machine"], r["what"], f"{rate:,.0f}" if rate > 300 else f"{rate:.1f}",
                    cell("{against_transformers:.1f}x", r), cell("{against_llama:.3g}x {llama_format}", r), share,
                ]
            )  # fmt: skip
    return ["processor", "", "tokens/s", "against transformers float32", "against llama.cpp", "share of"], rows


def busy_machine(records: Records) -> Content:
    found = records.rows("2026-11-28-epyc-busy-machine", "medians")
    cases = [(case, situation) for case in ("training", "prompt", "decode") for situation in ("quiet", "busy")]
    names = {300: "300 (ours)", 300_000: "300,000 (the runtime's)"}
    rows = []
    for spins in dict.fromkeys(row["spins"] for row in found):
        line = [select(found, spins=spins, case=case, situation=situation)[0] for case, situation in cases]
        rows.append([names.get(spins, f"{spins:,}"), *(f"{r['median']:,.0f} ({r['worst']:,.0f})" for r in line)])
    return ["GOMP_SPINCOUNT", *(f"{case}, {situation}" for case, situation in cases)], rows


def numerics(records: Records) -> Content:
    rows = records.rows("2026-11-23-cpu-numerics", "numerics")
    return ["", "outputs", "final state"], [
        [r["how"], *(f"{r[key]:.1e}".replace("e-0", "e-") for key in ("outputs", "final_state"))] for r in rows
    ]


def long_prompt(records: Records) -> Content:
    found = records.rows("2026-11-28-epyc-long-prompt", "long_prompt")
    names = {
        "newcomer": "newcomer's first token", "gap": "gap between a text's tokens, 90th percentile",
        "gap_prefix_cache": "the same through a prefix cache", "long_prompt": "reading the long prompt",
    }  # fmt: skip
    return ["seconds", *(r["how"] for r in found)], [
        [text, *(plain(r.get(k)) for r in found)] for k, text in names.items()
    ]


def reuse(records: Records) -> Content:
    rows = records.rows("2026-11-24-epyc-avx512-reuse", "reuse")
    return ["embedded model, float32", "time against reading everything"], [
        [r["what"], f"{r['ratio']:.2g}"] for r in rows
    ]


def guesses(records: Records) -> Content:
    rows = records.rows("2026-11-25-epyc-guesses", "guesses")
    head = ["guesses kept, 4 at a time, embedded model", "greedy", "temperature 0.8"]
    return head, [[r["what"], f"{r['greedy'] * 100:.0f} %", f"{r['temperature_0.8'] * 100:.0f} %"] for r in rows]


def quantization(records: Records) -> Content:
    head = ["weights", "perplexity per token", "bits per character", "weights on disk"]
    rows = records.rows("2026-11-25-cpu-quantization", "quantization")
    lines = [
        [r["weights"], f"{r['perplexity']:.3f}", f"{r['bits_per_character']:.4f}", f"{r['mib']} MiB"] for r in rows
    ]
    return head, lines


def embedded_model(records: Records) -> Content:
    rows = records.rows("2026-11-28-embedded-model", "evaluation")
    keys = ("what", "now", "before", "first")
    return ["", "now, `fresh_rows=0.1`", "before", "first"], [[str(row[key]) for key in keys] for row in rows]


def cpu_isa(records: Records) -> Content:
    head = ["format", "instruction set", "ms, median (smallest)", "share of bandwidth", "GB/s", "time, of the first"]
    rows = [
        [
            row["format"], row["set"], f"{row['seconds'] * 1e3:.2f} ({row['best_seconds'] * 1e3:.2f})",
            f"{row['share_of_bandwidth'] * 100:.0f} %", f"{row['bandwidth'] / 1e9:.1f}",
            f"{row['time_over_first']:.2f}",
        ]
        for row in records.rows("2026-11-29-xeon-cpu-isa", "rows")
    ]  # fmt: skip
    return head, rows


def falcon_cpu(records: Records) -> Content:
    rows = records.rows("2026-11-30-epyc-zen4-falcon-mamba", "falcon")
    first = rows[0]["seconds"]
    names = {"FalconMamba": "mambakit", "FalconMamba's forward": "the model's forward"}
    return ["7B shape in int4, a token", "ms", "of mambakit's time"], [
        [names.get(r["who"], "llama.cpp, Q4_0"), f"{r['seconds'] * 1e3:.0f}", f"{r['seconds'] / first:.2f}"]
        for r in rows
    ]


def soak(records: Records) -> Content:
    head = [
        "streams", "minutes", "tokens/s", "texts", "lost", "wrong", "between tokens, ms: median, 99th percentile",
        "first token, s", "growth of memory",
    ]  # fmt: skip
    rows = [
        [
            f"{r['streams']:,}", f"{r['seconds'] / 60:.1f}", f"{r['tokens_per_second']:,.0f}", f"{r['texts']:,}",
            str(r["lost"]), str(r["wrong"]),
            f"{r['gap_p50'] * 1e3:.0f}, {r['gap_p99'] * 1e3:.0f} ({r['gap_p99'] / r['gap_p50']:.1f}x)",
            f"{r['first_p50']:.2f}, {r['first_p99']:.2f}", f"{r['growth_mb']:.0f} MB of {r['memory_mb']:,.0f}",
        ]
        for r in records.rows("2026-11-30-epyc-soak", "soak")
    ]  # fmt: skip
    return head, rows


def second_turn(records: Records) -> Content:
    rows = records.rows("2026-11-30-epyc-second-turn", "turns")
    return ["where the state is", "tokens before the turn", "first token, ms: median (least)"], [
        [r["state"], f"{r['tokens']:,}", f"{r['median_seconds'] * 1e3:.1f} ({r['least_seconds'] * 1e3:.1f})"]
        for r in rows
    ]


def serving_peer(records: Records) -> Content:
    head = ["8 slots, Q8_0", "tokens/s", "first token, ms: median, 99th percentile", "MB for each idle conversation"]
    return head, [
        [
            r["server"], f"{r['tokens_per_second']:.0f}",
            f"{r['first_token_p50'] * 1e3:.0f}, {r['first_token_p99'] * 1e3:,.0f}", f"{r['idle_mb']:.2f}",
        ]
        for r in records.rows("2026-11-30-epyc-serving-peer", "peers")
    ]  # fmt: skip
