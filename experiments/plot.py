"""Plots and tables of finished experiments, from their JSON files.

    python -m experiments.plot runs/experiments --out docs/experiments --records docs/benchmarks
    python benchmarks/render.py

Writes NAME.png for each NAME.json there is, the generated digits as WAV, and results.md: a table for each, every number
the mean over seeds with the smallest and the largest. A run that the budget cut short is counted, and said to be. With
--records each table is also kept as a record of the run, and results.md names it, for `benchmarks/render.py` to fill
in.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import statistics
import wave
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.contenders import MAMBA, TRANSFORMER
from experiments.selective_copying import INVARIANT, SELECTIVE

Content = tuple[list[str], list[list[str]]]  # heads and rows of a table
_COLOURS = {MAMBA: "C0", SELECTIVE: "C0", TRANSFORMER: "C1", INVARIANT: "C1"}


def spread(values: Iterable[float], form: str = ".3f") -> str:
    """The mean, and the range where there is more than one value."""
    values = list(values)
    mean = format(statistics.fmean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def by_model(record: dict) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for run in record["runs"]:
        groups.setdefault(run["model"], []).append(run)
    return groups


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def selective_copying(record: dict, figure: Any) -> Content:
    axes = figure.subplots()
    rows = []
    for model, runs in by_model(record).items():
        for run in runs:
            axes.plot(
                [p["step"] for p in run["curve"]], [p["accuracy"] for p in run["curve"]], color=_COLOURS[model],
                alpha=0.7, linewidth=0.8, label=model if run is runs[0] else None,
            )  # fmt: skip
        rows.append(
            [
                model, f"{runs[0]['parameters']:,}", spread((100 * r["accuracy"] for r in runs), ".2f"),
                spread((r["steps"] for r in runs), ",.0f"), spread((r["seconds"] for r in runs), ".0f"), str(len(runs)),
            ]
        )  # fmt: skip
    axes.set(xlabel="steps", ylabel="accuracy on training batches", ylim=(0, 1.02), title="Selective copying")
    axes.legend()
    length = record["settings"]["lengths"][-1]
    return ["model", "parameters", f"accuracy at {length}, %", "steps", "seconds", "seeds"], rows


def induction_heads(record: dict, figure: Any) -> Content:
    axes = figure.subplots()
    rows = []
    for run in record["runs"]:
        points = run["accuracies"]
        axes.plot([p["power"] for p in points], [p["accuracy"] for p in points], "o-", label=f"seed {run['seed']}")
        wrong = [f"2^{p['power']}: {100 * p['accuracy']:.1f}" for p in points if p["accuracy"] < 1]
        reached = "nothing"
        if points:
            reached = (
                f"2^{points[0]['power']} ({points[0]['rows']} rows) to 2^{points[-1]['power']} ({points[-1]['rows']})"
            )
        rows.append(
            [
                str(run["seed"]), f"{run['parameters']:,}", f"{run['steps']:,}", f"{run['seconds']:.0f}", reached,
                ", ".join(wrong) or "perfect",
            ]
        )  # fmt: skip
    axes.axvline(record["settings"]["length"].bit_length() - 1, color="grey", linestyle=":", label="trained at")
    axes.set(xlabel="length, powers of 2", ylabel="accuracy", ylim=(0, 1.05), title="Induction heads")
    axes.legend()
    return ["seed", "parameters", "steps", "seconds", "evaluated", "accuracy below 100 %"], rows


def language(record: dict, figure: Any) -> Content:
    bits = "heldout_bits_per_character"
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    rows = []
    for model, runs in by_model(record).items():
        for axes, key in ((by_tokens, "tokens"), (by_seconds, "seconds")):
            for run in runs:
                axes.plot(
                    [p[key] for p in run["curve"]], [p[bits] for p in run["curve"]], ".-", color=_COLOURS[model],
                    alpha=0.7, label=model if run is runs[0] else None,
                )  # fmt: skip
        last = [run["curve"][-1] for run in runs]
        rows.append(
            [
                model, f"{runs[0]['parameters']:,}", f"{runs[0]['learning_rate']:g}", spread(p[bits] for p in last),
                spread((p["tokens"] / 1e6 for p in last), ".1f"), spread((p["seconds"] for p in last), ".1f"),
                str(len(runs)),
            ]
        )  # fmt: skip
    by_tokens.set(xlabel="tokens", ylabel="held-out bits per character", title="Language")
    by_seconds.set(xlabel="seconds of training")
    by_tokens.legend()
    head = ["model", "parameters", "rate", "held-out bits per character", "million tokens", "seconds", "seeds"]
    return head, rows


def genomics(record: dict, figure: Any) -> Content:
    axes = figure.subplots()
    contexts = sorted({p["context"] for run in record["runs"] for p in run["perplexities"]})
    rows = []
    for model, runs in by_model(record).items():
        found = {c: [p["perplexity"] for r in runs for p in r["perplexities"] if p["context"] == c] for c in contexts}
        for run in runs:
            axes.plot(
                [p["context"] for p in run["perplexities"]], [p["perplexity"] for p in run["perplexities"]], "o-",
                color=_COLOURS[model], alpha=0.7, label=model if run is runs[0] else None,
            )  # fmt: skip
        rows.append(
            [model, f"{runs[0]['parameters']:,}", *(spread(found[c], ".4f") if found[c] else "-" for c in contexts)]
        )
    markov = record["markov"]
    axes.axhline(markov["perplexity"], color="grey", linestyle=":", label=f"Markov, order {markov['order']}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="context, nucleotides", ylabel="perplexity per nucleotide", title="E. coli after Klebsiella")
    axes.legend()
    rows.append([f"Markov, order {markov['order']}", "-", f"{markov['perplexity']:.4f}", *["-"] * (len(contexts) - 1)])
    return ["model", "parameters", *(f"{c:,}" for c in contexts)], rows


def audio(record: dict, figure: Any) -> Content:
    panels = figure.subplots(1, 2)
    rows = []
    for axes, task, key, form in (
        (panels[0], "generation", "bits_per_sample", ".3f"),
        (panels[1], "classification", "accuracy", ".4f"),
    ):
        runs = [run for run in record["runs"] if run["task"] == task]
        for run in runs:
            axes.plot([p["step"] for p in run["curve"]], [p["loss"] for p in run["curve"]], label=f"seed {run['seed']}")
        axes.set(xlabel="steps", ylabel="training loss, nats", title=task)
        if runs:
            axes.legend()
            rows.append(
                [
                    task, f"{runs[0]['parameters']:,}", key.replace("_", " "), spread((r[key] for r in runs), form),
                    spread((r["steps"] for r in runs), ",.0f"), str(len(runs)),
                ]
            )  # fmt: skip
    rows.append(
        ["generation, Markov", "-", "bits per sample", format(record["markov"]["bits_per_sample"], ".3f"), "-", "-"]
    )
    return ["task", "parameters", "test measure", "value", "steps", "seeds"], rows


PANELS: dict[str, Callable[[dict, Any], Content]] = {
    "selective_copying": selective_copying,
    "induction_heads": induction_heads,
    "language": language,
    "genomics": genomics,
    "audio": audio,
}


def write_wav(record: dict, out: Path) -> None:
    """The generated digits one after the other, a short silence between them, as 16-bit WAV at 8 kHz."""
    import torch

    from experiments.audio import decode_mu_law

    for run in record["runs"]:
        if not run.get("generated"):
            continue
        with wave.open(str(out / "audio.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            for encoded in run["generated"]:
                codes = torch.tensor(list(base64.b64decode(encoded)), dtype=torch.int64)
                samples = (decode_mu_law(codes) * 32767).round().to(torch.int16)
                file.writeframes(samples.numpy().tobytes() + bytes(2 * 2000))


def keep(name: str, head: list[str], rows: list[list[str]], where: dict, folder: Path) -> str:
    """Write a table as a record of its run; returns the comments between which `benchmarks/render.py` puts it."""
    from benchmarks import record

    title = f"{where['date']}-experiment-{name.replace('_', '-')}"
    content = {
        "machine": where["device"], "date": where["date"], "commit": record.commit(), "command": f"python -m "
        f"experiments.{name}",
        "software": {"torch": where["torch"]}, "results": {name: [dict(zip(head, row, strict=True)) for row in rows]},
    }  # fmt: skip
    (folder / f"{title}.json").write_text(record.text(content), encoding="utf-8")
    return f"<!-- table: {title}/{name} -->\n<!-- end -->"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.plot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"), help="folder to write to")
    parser.add_argument("--records", type=Path, help="folder for a record of each table (docs/benchmarks)")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error('pictures need matplotlib: pip install "mambakit[train]"')
    from matplotlib.figure import Figure

    options.out.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, draw in PANELS.items():
        path = options.results / f"{name}.json"
        if not path.is_file():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        if not record["runs"]:
            print(f"{path} holds no finished run; left out")
            continue
        figure = Figure(figsize=(9, 4), layout="constrained")
        head, rows = draw(record, figure)
        text = markdown(head, rows)
        print(text)
        figure.savefig(options.out / f"{name}.png", dpi=110)
        if name == "audio":
            write_wav(record, options.out)
        where = record["environment"]
        if options.records is not None:
            text = keep(name, head, rows, where, options.records)
        note = "" if record["complete"] else " The budget cut it short: not every run was made, or made to its end."
        machine = f"{where['device']}, torch {where['torch']}, {where['date']}, {record['seconds']:.0f} s in all.{note}"
        sections.append(f"## {name.replace('_', ' ').capitalize()}\n\n{text}\n\n{machine}\n\n![{name}]({name}.png)\n")
    if not sections:
        parser.error(f"no finished experiment in {options.results}")
    (options.out / "results.md").write_text("# Results\n\n" + "\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
