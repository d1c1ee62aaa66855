"""Render the tables of README.md and docs/ from the records in docs/benchmarks.

    python benchmarks/render.py            # writes the files that changed
    python benchmarks/render.py --check    # writes nothing; exit status 1 where a file is not what would be rendered

A table stands between two comments, and what is there is replaced:

    <!-- table: train-step -->
    <!-- end -->

A name is one of `tables`, or RECORD/PART: the rows of one part of one record, as they are. Below a table its records
are named, with machine, date and command (not in README.md, which links to them). The figures that `mambakit plan`
reads are written, too.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import tables
from benchmarks.record import FOLDER, ROOT
from benchmarks.tables import planning

BLOCK = re.compile(r"(<!-- table: (?P<name>[^ ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def block(name: str, path: Path) -> str:
    """A table and the line that names its records."""
    records = tables.Records()
    content = markdown(*tables.table(name, records)) + "\n"
    if path.name == "README.md" and path.parent == ROOT:
        return content
    sources = []
    for record in records.used:
        found = records.load(record)
        link = os.path.relpath(FOLDER / f"{record}.json", path.parent)
        sources.append(f"[{found['machine']}, {found['date']}]({link}): `{found['command']}`")
    return content + ("\n" + "; ".join(sources) + ".\n" if sources else "")


def rendered(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return BLOCK.sub(lambda m: m[1] + block(m["name"], path) + m[3], text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    stale = []
    for path in documents():
        new = rendered(path)
        if new != path.read_text(encoding="utf-8"):
            stale.append(path)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if planning.FILE.read_text(encoding="utf-8") != planning.content():
        stale.append(planning.FILE)
        if not options.check:
            planning.FILE.write_text(planning.content(), encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'is not what the records say' if options.check else 'written'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
