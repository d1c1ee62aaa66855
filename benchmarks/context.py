"""`generation.py --parts context`: tokens a second by the length of the prompt, each model at its best batch that fits.

A Mamba text needs the same memory and time a token whatever its length; a Transformer's does not. So each contender
writes at batches of its own: the largest that its states or keys and values should leave room for, and its half. The
Transformer is transformers' Llama of as many parameters, with a static cache and torch.compile, and as it comes. Time
is that of the whole call, prompt included; the figure is new tokens a second.

One call has room for a part of it (compilation takes minutes): --contexts and --contenders choose, and a record that
is there already keeps its other rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.generation import VOCABULARY, Clock, fits, llama, mamba, released
from benchmarks.tables.context import COMPILED, CONTENDERS, CONTEXTS, PLAIN, STATES, against
from benchmarks.tables.records import Row

_MOST_ROWS = 512
_MOST_TOKENS = 1 << 22  # of all prompts together: more texts of such lengths do not raise the rate
_WARM_UP = 8  # new tokens of the call before, which compiles and captures what the timed one runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("context")
    group.add_argument("--contexts", nargs="+", default=list(CONTEXTS), metavar="PROMPT+NEW")
    group.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    group.add_argument("--context-shape", default="1.4b")
    group.add_argument("--context-rows", nargs="+", type=int, help="batches; default: by the memory that is free")
    group.add_argument("--context-tries", type=int, choices=(1, 2, 3), default=3, help="of those batches")


def cache_bytes(model: Any, tokens: int) -> int:
    """Of one text of so many tokens: keys and values, or the state."""
    if hasattr(model.config, "num_key_value_heads"):
        config = model.config
        width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
        return 2 * config.num_hidden_layers * width * tokens * model.dtype.itemsize
    return int(model.config.state_spec(model.dtype).nbytes)


def batches(model: Any, tokens: int, free: int, tries: int) -> list[int]:
    """The largest power of 2 whose caches take half of the free memory at most, up to 512 rows; with more tries its
    half, and half as much again, which may fit, too. A static cache, a copy of it and the activations of the prompt
    have the rest."""
    most = max(1, min(_MOST_ROWS, int(0.5 * free // cache_bytes(model, tokens)), _MOST_TOKENS // tokens))
    largest = 1 << (most.bit_length() - 1)
    candidates = (largest, largest // 2, largest * 3 // 2 if largest < _MOST_ROWS else largest)
    return sorted({rows for rows in candidates[:tries] if rows})


def make(who: str, options: argparse.Namespace, longest: int) -> tuple[Any, dict[str, Any]]:
    """(the model, arguments of its `generate`)."""
    if who.startswith("Llama"):
        extra = {"cache_implementation": "static"} if who == COMPILED else {}
        return llama(options.context_shape, options.device, longest), extra
    model = mamba(options.context_shape, options.device)
    if who == STATES:
        model.config.ssm_state_dtype = "bfloat16"
    return model, {}


def stopping_at(length: int) -> dict[str, Any]:
    """An argument of transformers' `generate`: whole texts of so many tokens are enough."""
    from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

    return {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(length)])}


def measure(options: argparse.Namespace, clock: Clock, record: dict[str, Any], save: Callable[[], None]) -> None:
    """``save`` writes the record, after every batch."""
    found = earlier(options.json, options.contexts, options.contenders)
    record["context"] = found
    print(f"\ncontext: {options.context_shape}\n{'context':>10} {'who':>30} {'rows':>5} {'tokens/s':>10} {'GiB':>6}")
    for context in options.contexts:
        prompt, new = map(int, context.split("+"))
        for who in options.contenders:
            model, extra = make(who, options, prompt + new)
            free = torch.cuda.mem_get_info()[0] if options.device == "cuda" else 2**28
            for rows in options.context_rows or batches(model, prompt + new, free, options.context_tries):
                released()
                ids = torch.randint(0, VOCABULARY, (rows, prompt), device=options.device)
                mask = torch.ones_like(ids)

                def run(m=model, i=ids, a=mask, e=extra, n=new):
                    return m.generate(i, attention_mask=a, max_new_tokens=n, do_sample=False, **e)

                def timed(r=run, w=who, p=prompt, extra=extra):
                    # The Llama's caches and compiled graphs are of prompt and new tokens: it stops early.
                    torch.compiler.reset()
                    r(**({"e": extra | stopping_at(p + _WARM_UP)} if w.startswith("Llama") else {"n": _WARM_UP}))
                    return clock.peak(r)

                measured: Any = fits(timed)
                row = {"context": context, "prompt": prompt, "new": new, "who": who, "batch": rows}
                row |= {"shape": options.context_shape, "tokens_per_second": None, "gib": None}
                if measured is not None:
                    row |= {"tokens_per_second": rows * new / measured[0], "gib": measured[1]}
                found.append(row)
                rate = row["tokens_per_second"]
                text = "out of memory" if rate is None else f"{rate:10,.0f} {row['gib'] or 0:6.1f}"
                print(f"{context:>10} {who:>30} {rows:>5} {text}", flush=True)
                save()
            del model
            torch.compiler.reset()
            released()
    for context in dict.fromkeys(row["context"] for row in found):
        if ratios := against(found, context):
            print(f"{context:>10} " + ", ".join(f"{who}: {ratio:.2f}x" for who, ratio in ratios.items()))


def earlier(path: Path | None, contexts: list[str], contenders: list[str]) -> list[Row]:
    """The rows of a record of an earlier call that this one does not measure again."""
    if path is None or not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["results"].get("context", [])
    return [row for row in rows if not (row["context"] in contexts and row["who"] in contenders)]


def draw(rows: list[Row], machine: str, path: Path) -> None:
    """The picture of the README: our rate over each Llama's, by context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = [c for c in CONTEXTS if against(rows, c)]
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    colours = {COMPILED: "#4c72b0", PLAIN: "#b8c6de"}
    shown = [who for who in colours if any(who in against(rows, c) for c in contexts)]
    width = 0.76 / len(shown)
    for i, who in enumerate(shown):
        offset, colour = (i - (len(shown) - 1) / 2) * width, colours[who]
        values = [against(rows, c).get(who, 0.0) for c in contexts]
        places = [at + offset for at in range(len(contexts))]
        bars = axes.bar(places, values, width, label=f"against {who}", color=colour)
        axes.bar_label(bars, [f"{v:.1f}x" if v else "" for v in values], fontsize=8)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xticks(range(len(contexts)), [f"{int(c.split('+')[0]):,} + {c.split('+')[1]}" for c in contexts])
    axes.set(xlabel="prompt + new tokens", ylabel="new tokens/s over the Llama's")
    axes.set_title(f"1.4b, each at the best batch tried, {machine}", fontsize=10)
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
