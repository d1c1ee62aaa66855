"""The end of a run: weights, tokenizer and an honest model card in one folder, and the held-out score."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mambakit.generation.score import Score, score_text
from mambakit.training.config import TrainConfig

_CARD = """---
language: en
library_name: mambakit
pipeline_tag: text-generation
tags: [mamba]
---
# {name}

A Mamba language model of {parameters:,} parameters ({layers} layers, width {width}, state {state}, vocabulary {vocabulary}),
trained by `mambakit train` on {date}.

| | |
|---|---|
| training text | {train_files}: {train_characters:,} characters |
| tokenizer | byte-level BPE, {vocabulary} tokens |
| steps | {steps:,} of {batch_size} x {sequence_length} tokens: {tokens:,} tokens, {passes:.1f} passes over the text |
| optimiser | AdamW, peak rate {learning_rate}, {schedule}, weight decay {weight_decay}, clip {clip} |
| time | {minutes:.1f} minutes on {device} |
| weights | {dtype}; A_log, D and dt_proj.bias float32 |
| held-out text | {heldout_files}: {heldout_characters:,} characters |
| held-out bits per character | {bits} |
| held-out perplexity per token | {perplexity} |

The held-out score is of the weights as saved, computed in {score_dtype}; each document is read from its start, with the
state carried to its end (`mambakit score`).

## A sample

Prompt in bold; temperature 0.8, top-p 0.95, seed 0, not chosen among several.

> **{prompt}**{sample}

## Limits

It is small and has read only the text named above: it writes in that text's manner, holds no facts worth trusting, repeats
the views of its time and authors, and is not tuned to follow instructions.

## Recipe

```json
{recipe}
```
"""


@torch.no_grad()
def export(
    model: Any, tokenizer: Any, config: TrainConfig, out: Path, console: Console, *,
    heldout: list[str], steps: int, tokens: int, seconds: float, train_characters: int,
) -> dict[str, Any]:  # fmt: skip
    """Save the model in ``export_dtype``, score the held-out documents with what was saved, write README.md (the card)."""
    from transformers import AutoTokenizer

    device = next(model.parameters()).device
    model = model.eval().to(getattr(torch, config.export_dtype))
    model.generation_config.pad_token_id = model.config.pad_token_id
    model.save_pretrained(out, max_shard_size=config.max_shard_size)
    # Score what was saved: the rounded weights, with float32 arithmetic.
    model = model.float()
    fast = AutoTokenizer.from_pretrained(out)
    total = Score()
    for document in heldout:
        total = total + score_text(model, fast, document, chunk_size=8192 if device.type == "cuda" else 1024)
    prompt = fast(config.sample_prompt, return_tensors="pt").input_ids.to(device)
    sample = model.generate(prompt, max_new_tokens=160, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, seed=0)
    text = fast.decode(sample[0, prompt.shape[1] :], skip_special_tokens=True)
    summary = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "heldout_bits_per_character": round(total.bits_per_character, 4) if heldout else None,
        "heldout_perplexity": round(total.perplexity, 3) if heldout else None,
        "heldout_characters": total.characters,
        "sample": config.sample_prompt + text,
    }
    (out / "README.md").write_text(_card(model, config, summary, text, train_characters, device), encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    console.print(f"held out: {summary['heldout_bits_per_character']} bits per character; model in {out}")
    return summary


def _card(
    model: Any, config: TrainConfig, summary: dict, text: str, train_characters: int, device: torch.device
) -> str:
    names = lambda files: ", ".join(f"`{Path(f).name}`" for f in files) or "none"  # noqa: E731
    fields = model.config
    recipe = {k: v for k, v in vars(config).items() if k not in ("train_files", "heldout_files", "out", "resume")}
    bits = summary["heldout_bits_per_character"]
    return _CARD.format(
        name=Path(config.out).name, parameters=summary["parameters"], layers=fields.num_hidden_layers,
        width=fields.hidden_size, state=fields.state_size, vocabulary=fields.vocab_size,
        date=datetime.date.today().isoformat(), train_files=names(config.train_files), train_characters=train_characters,
        steps=summary["steps"], batch_size=config.batch_size, sequence_length=config.sequence_length,
        tokens=summary["tokens"], passes=summary["tokens"] * _characters_per_token(summary) / max(1, train_characters),
        learning_rate=config.learning_rate, schedule=config.schedule, weight_decay=config.weight_decay, clip=config.clip,
        minutes=summary["seconds"] / 60, dtype=config.export_dtype, heldout_files=names(config.heldout_files),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "a CPU", score_dtype="float32",
        heldout_characters=summary["heldout_characters"], bits="not measured" if bits is None else f"{bits:.3f}",
        perplexity=summary["heldout_perplexity"] or "not measured", prompt=config.sample_prompt,
        sample=text.replace("\n", "\n> "), recipe=json.dumps(recipe, indent=2),
    )  # fmt: skip


def _characters_per_token(summary: dict) -> float:
    """From the held-out text's own figures: bits per character against nats per token."""
    bits = summary["heldout_bits_per_character"]
    if not bits:
        return 0.0
    return math.log(summary["heldout_perplexity"]) / math.log(2) / bits
