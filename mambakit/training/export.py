"""The end of a run: weights, tokenizer and an honest model card in one folder, and the held-out score."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import torch

from mambakit.generation.score import Score
from mambakit.training.config import TrainConfig
from mambakit.training.evaluate import score_documents
from mambakit.training.folder import RunFolder
from mambakit.training.prepare import Prepared
from mambakit.training.report import FinalLoss, generate_command
from mambakit.training.tokenizer import Vocabulary

_CARD = """---
library_name: mambakit
pipeline_tag: text-generation
tags: [mamba]
---
# {name}

A Mamba model of {parameters:,} parameters ({layers} layers, width {width}, state {state}, vocabulary {vocabulary}),
trained by `mambakit train` on {date}.

| | |
|---|---|
| started from | {start} |
| trained on | {train_files}: {train_size:,} {unit}s in {documents:,} documents |
| tokens | {tokenizer} |
| steps | {steps:,} of {batch_size} x {sequence_length} tokens: {tokens:,} tokens, {passes:.1f} passes{best} |
| optimiser | AdamW, peak rate {learning_rate}, {schedule}, weight decay {weight_decay}, clip {clip} |
| time | {minutes:.1f} minutes on {device} |
| weights | {dtype}; A_log, D and dt_proj.bias float32 |
| held out | {heldout_files} |
| training loss | {training_loss} |
| held-out bits per {unit} | {bits} |
| held-out perplexity per token | {perplexity} |

The held-out score is of the weights as saved, computed in float32; each document is read from its start, with the
state carried to its end.
{sample}
## Limits

It is small and has read only what is named above: it holds no facts worth trusting, repeats the views of its sources,
and is not tuned to follow instructions.

## Recipe

```json
{recipe}
```
"""

_SAMPLE = """
## A sample

Prompt in bold; temperature 0.8, top-p 0.95, seed 0, not chosen among several.

> **{prompt}**{text}
"""


@torch.no_grad()
def export(
    model: Any, data: Prepared, config: TrainConfig, folder: RunFolder, *, steps: int, seconds: float,
    training_loss: FinalLoss, best_step: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Save the model in ``export_dtype``, score the held-out documents with what was saved, write README.md (the card).

    Returns the summary, which is also in summary.json; the score's key is ``heldout_bits_per_`` and the vocabulary's
    unit. All of it is put in the run's folder together: weights, configuration, card and summary are of one model.

    Args:
        best_step: the step whose weights these are; 0: the last one.
    """
    device = next(model.parameters()).device
    model = model.eval().to(getattr(torch, config.export_dtype))
    model.generation_config.pad_token_id = model.config.pad_token_id
    summary: dict[str, Any] = {}

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary, max_shard_size=config.max_shard_size)
        summary.update(_summary(model.float(), data, config, folder.path, steps, seconds, training_loss))
        summary["weights_of_step"] = best_step or steps
        if data.sample_rate:
            rate = {"sampling_rate": data.sample_rate, "encoding": "mu-law, 256 levels"}
            (temporary / "preprocessor_config.json").write_text(json.dumps(rate, indent=2), encoding="utf-8")
        (temporary / "README.md").write_text(_card(model, config, summary, data, device), encoding="utf-8")
        (temporary / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")

    folder.place("model", write)
    return summary


def _summary(
    model: Any, data: Prepared, config: TrainConfig, out: Path, steps: int, seconds: float, training_loss: FinalLoss
) -> dict[str, Any]:
    """Scores of what was saved: the rounded weights, with float32 arithmetic."""
    vocabulary, measured = data.vocabulary, data.heldout is not None
    device = next(model.parameters()).device
    total = Score()
    if data.heldout is not None:
        chunk_size = 8192 if device.type == "cuda" else 1024
        total = score_documents(model, data.heldout, vocabulary, config.ambiguous == "mask", chunk_size)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": steps * config.batch_size * config.sequence_length,
        "seconds": round(seconds, 1),
        "training_loss": None if training_loss.mean is None else round(training_loss.mean, 4),
        "training_loss_steps": [training_loss.first, training_loss.last],
        "heldout_loss": round(total.nats_per_token, 4) if measured else None,
        f"heldout_bits_per_{vocabulary.unit}": round(total.bits_per_character, 4) if measured else None,
        "heldout_perplexity": round(total.perplexity, 3) if measured else None,
        f"heldout_{vocabulary.unit}s": total.characters,
        "model": str(config.out),
        "generate": generate_command(config, vocabulary),
        "sample": _sample(model, config, out, device) if vocabulary.kind == "text" else None,
    }


def _sample(model: Any, config: TrainConfig, out: Path, device: torch.device) -> str | None:
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(out)
    prompt = fast(config.sample_prompt, return_tensors="pt").input_ids.to(device)
    if not prompt.numel():
        return None
    sample = model.generate(prompt, max_new_tokens=160, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, seed=0)
    return config.sample_prompt + fast.decode(sample[0, prompt.shape[1] :], skip_special_tokens=True)


def _card(model: Any, config: TrainConfig, summary: dict[str, Any], data: Prepared, device: torch.device) -> str:
    names = lambda files: ", ".join(f"`{Path(f).name}`" for f in files) or "none"  # noqa: E731
    fields, vocabulary = model.config, data.vocabulary
    recipe = {
        k: v
        for k, v in vars(config).items()
        if k not in ("train_files", "heldout_files", "token_cache", "out", "resume", "overwrite", "export_only")
    }
    bits, loss = summary[f"heldout_bits_per_{vocabulary.unit}"], summary["training_loss"]
    heldout = names(config.heldout_files)
    if data.heldout is not None:
        where = f"{config.validation_fraction:.1%} of the documents" if config.validation_fraction else heldout
        heldout = f"{where}: {summary[f'heldout_{vocabulary.unit}s']:,} {vocabulary.unit}s"
    of, sample = summary["weights_of_step"], ""
    if summary["sample"] is not None:
        text = summary["sample"].removeprefix(config.sample_prompt).replace("\n", "\n> ")
        sample = _SAMPLE.format(prompt=config.sample_prompt, text=text)
    return _CARD.format(
        name=Path(config.out).name, parameters=summary["parameters"], layers=fields.num_hidden_layers,
        width=fields.hidden_size, state=fields.state_size, vocabulary=fields.vocab_size,
        date=datetime.date.today().isoformat(), start=_start(config), train_files=names(config.train_files),
        train_size=int(data.train.characters.sum()), unit=vocabulary.unit, documents=len(data.train),
        tokenizer=_tokens(vocabulary), steps=summary["steps"], batch_size=config.batch_size,
        sequence_length=config.sequence_length, tokens=summary["tokens"],
        passes=summary["tokens"] / max(1, data.train.tokens), learning_rate=config.learning_rate,
        schedule=config.schedule, weight_decay=config.weight_decay, clip=config.clip, minutes=summary["seconds"] / 60,
        dtype=config.export_dtype, heldout_files=heldout,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "a CPU",
        training_loss="not on record" if loss is None else f"{loss:.4f} nats per token",
        bits="not measured" if bits is None else f"{bits:.3f}",
        best="" if of == summary["steps"] else f"; the weights are those of step {of:,}, the best held-out loss",
        perplexity=summary["heldout_perplexity"] or "not measured", sample=sample, recipe=json.dumps(recipe, indent=2),
    )  # fmt: skip


def _start(config: TrainConfig) -> str:
    if not config.init_from:
        return "new weights"
    if config.lora_rank:
        targets = ", ".join(config.lora_targets)
        return f"`{config.init_from}`, through adapters of rank {config.lora_rank} on {targets}, merged"
    return f"`{config.init_from}`"


def _tokens(vocabulary: Vocabulary) -> str:
    if vocabulary.kind == "bytes":
        return "bytes"
    if vocabulary.kind == "nucleotides":
        return "nucleotides: A, C, G, T and N"
    return f"{vocabulary.size} tokens of text"
