"""Tables of the kernels by card: what was compiled, what was run, and what each card would get."""

from __future__ import annotations

from benchmarks.record import FOLDER
from benchmarks.tables.records import Content, Records, latest, select


def architectures(records: Records) -> Content:
    """Shared memory of every kernel by architecture, of the latest record, and the tools that it ran under."""
    from benchmarks.kernel_cases import CARDS

    found = records.rows(latest("architectures"), "architectures")
    ran: list[dict] = []
    if any(FOLDER.glob("*-sanitizers.json")):
        ran = records.rows(latest("sanitizers"), "sanitizers", covered=True)
    compiled = [capability for capability in CARDS if select(found, capability=capability)]
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in found):
        cells = []
        for capability in compiled:
            (row,) = select(found, kernel=kernel, capability=capability)
            cells.append(f"{row['shared'] / 1024:.1f}" if row["launches"] else "not compiled")
        file, name = kernel.split(":")
        cells.append(", ".join(row["tool"] for row in select(ran, kernel=kernel)))
        lines.append([f"`{file.removeprefix('ops/')}` {name}", *cells])
    heads = [f"sm_{capability}" for capability in compiled]
    return ["KiB of shared memory of a CTA", *heads, "run on a card under"], lines


def cards(records: Records) -> Content:
    """How many rows the persistent kernel would decode on each card, in bfloat16: stages of its ring at the first."""
    from benchmarks.architectures import persistent
    from benchmarks.kernel_cases import CARDS, SHAPES
    from mambakit.ops.decode.persistent_plan import MOST_ROWS

    lines = []
    for shape in SHAPES:
        cells = []
        for card in CARDS.values():
            plans = [persistent(card, shape, None, rows) for rows in range(1, MOST_ROWS + 1)]
            served = [rows for rows, plan in enumerate(plans, 1) if not isinstance(plan, str)]
            cells.append(f"1 to {max(served)} ({plans[0].macros['STAGES']})" if served else "none")
        lines.append([shape, *cells])
    names = [f"sm_{capability} ({card.name})" for capability, card in CARDS.items()]
    return ["rows (stages at one row)", *names], lines
