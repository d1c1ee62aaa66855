"""README.md's tables."""

from __future__ import annotations

from benchmarks.tables.records import Content, Records, cell


def readme_cpu(records: Records) -> Content:
    name = "2026-11-25-epyc-zen3-cpu"
    found = {r["what"]: r for r in records.rows(name, "rows")}

    def line(text: str, *whats: str) -> list[str]:
        theirs = "; ".join(f"{found[what]['against_transformers']:.2g}x" for what in whats)
        return [text, theirs, "; ".join(f"{found[what]['against_llama']:.3g}x" for what in whats)]

    rows = [
        line("reading a prompt of 512 tokens", "prefill 512"),
        line(
            "a token, float32; the same numbers in 28 bits", "decode, batch 1, float32", "float32, lossless (28 bits)"
        ),
        line("a token, bfloat16; the same numbers in 12 bits", "bfloat16", "bfloat16, lossless (12 bits)"),
        line("a token, int8; int4", "int8", "int4"),
    ]
    least = records.row(name, "training")["ratio_at_least"]
    rows.append(["a training step of 512 tokens", f"{least}x or more", ""])
    return ["a 130m model on two cores (AMD EPYC, AVX2)", "transformers float32", "llama.cpp, same precision"], rows


def readme_gpu(records: Records) -> Content:
    h100, peer = (
        ("2026-11-28-h100-train-step", "2026-11-28-h100-generation", "2026-11-28-h100-generate"),
        "2026-11-23-h100-mamba-ssm",
    )
    h200 = ("2026-11-27-h200-train-step", "2026-11-27-h200-generation", "2026-11-27-h200-generation")
    compiled = "2026-11-25-h100-generation"
    rate, rows = "{tokens_per_second:,.0f} tokens/s", []
    for model, batch in (("130m", 16), ("1.4b", 4)):
        where = {"model": model, "batch": batch, "length": 2048}
        ours = [
            cell(rate + ", {gib:.0f} GiB", records.row(x[0], "train_step", how="graph", **where)) for x in (h200, h100)
        ]
        rows.append([f"training {model}, {batch} x 2048", *ours, cell(rate, records.row(peer, "train_step", **where))])
    for name in ("130m", "1.4b"):
        times = [
            records.row(r, "step", shape=name, batch=1, **f)
            for r, f in ((h200[1], {"format": "plain"}), (h100[1], {"format": "plain"}), (peer, {}))
        ]
        rows.append([f"a token, {name}, batch 1", *(cell("{seconds:.2f} ms", r, seconds=1e3) for r in times)])
    packed = records.row(compiled, "step", shape="1.4b", format="int4", batch=1)
    rows.append(["the same in int4", "", cell("{seconds:.2f} ms", packed, seconds=1e3), ""])
    for batch in (8, 64, 128):
        cells = []
        for record in (h200[2], h100[2]):
            ours, llama = (records.row(record, "generate", who=who, batch=batch) for who in ("mambakit", "Llama"))
            fast = records.row(compiled, "generate", who="Llama, compiled", batch=batch) if record in h100 else {}
            others = cell("{tokens_per_second:,.0f}", llama) or "out of memory"
            cells.append(f"{cell(rate, ours)} (Llama: {others}{cell('; compiled {tokens_per_second:,.0f}', fast)})")
        theirs = records.row(peer, "generate", batch=batch)
        rows.append(
            [
                f"a prompt of 2,048 and 128 new tokens, 1.4b, batch {batch}",
                *cells,
                cell(rate, theirs) or ("out of memory" if theirs else ""),
            ]
        )
    return ["bfloat16", "mambakit, one H200", "mambakit, one H100", "mamba-ssm, one H100 (recorded)"], rows
