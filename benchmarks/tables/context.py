"""The table of new tokens a second by context: `benchmarks/context.py` measures it."""

from __future__ import annotations

from benchmarks.tables.records import Content, Records, Row, latest, select

CONTEXTS = ("128+512", "2048+128", "8192+256", "32768+256")
OURS, STATES, COMPILED, PLAIN = "mambakit", "mambakit, states in bfloat16", "Llama, compiled", "Llama"
CONTENDERS = (OURS, STATES, COMPILED, PLAIN)


def context(records: Records) -> Content:
    """Of the latest record of `generation.py --parts context`."""
    return table(records.rows(latest("context"), "context"))


def best(rows: list[Row], **where: object) -> Row | None:
    """The fastest of the rows that match."""
    matching = [row for row in select(rows, **where) if row["tokens_per_second"] is not None]
    return max(matching, key=lambda row: row["tokens_per_second"], default=None)


def against(rows: list[Row], context: str) -> dict[str, float]:
    """Our best rate over that of each other contender."""
    ours = best(rows, context=context, who=OURS)
    found = {}
    for who in (COMPILED, PLAIN):
        theirs = best(rows, context=context, who=who)
        if ours is not None and theirs is not None:
            found[who] = ours["tokens_per_second"] / theirs["tokens_per_second"]
    return found


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """For the documentation: each contender's best rate and batch by context, and the ratio to the compiled Llama."""
    contexts = [c for c in CONTEXTS if select(rows, context=c)]
    lines = []
    for who in CONTENDERS:
        cells = []
        for context in contexts:
            row = best(rows, context=context, who=who)
            tried = select(rows, context=context, who=who)
            missing = "out of memory" if tried else ""
            cells.append(missing if row is None else f"{row['tokens_per_second']:,.0f} ({row['batch']})")
        if any(cells):
            lines.append([who, *cells])
    ratios = [against(rows, context).get(COMPILED) for context in contexts]
    lines.append(["mambakit against the compiled Llama", *("" if r is None else f"{r:.1f}x" for r in ratios)])
    return ["tokens/s (rows)", *(f"{int(c.split('+')[0]):,} + {c.split('+')[1]}" for c in contexts)], lines
