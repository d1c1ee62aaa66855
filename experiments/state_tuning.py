"""State tuning beside LoRA of equal size and a prompt, on a text and on a DNA task.

    python experiments/state_tuning.py --data DATA --device cuda --json docs/benchmarks/DATE-MACHINE-state-tuning.json
    python experiments/state_tuning.py --json docs/benchmarks/....json --plot docs/experiments/state_tuning.png

text  The embedded model, which has read novels, is to read Shakespeare (``eval/tinyshakespeare.txt``): windows of 256
      tokens, each behind the end-of-text token; the last tenth of the text is the test. Bits per token.
dna   A small model, trained here on *Klebsiella* (`experiments.genomics`'s data), is to read genes of *E. coli* from
      their start codon: open reading frames of 600 nucleotides and more on either strand, the first 512 nucleotides of
      each; those of the last fifth of the genome are the test. Bits per nucleotide.

Contenders, each with the same batches of a seed:

    base    from zeros
    prompt  from the state after a part of the training text: the best of 12 by validation, 256 to 4,096 tokens long
    state   the initial state is learned (`mambakit.training.state_tuning`)
    lora    adapters on in_proj and out_proj (arXiv 2106.09685), of the rank whose size is nearest to the state's

The rate of the two that learn is chosen on validation windows with a seed that is not reported.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mambakit
from benchmarks import record
from experiments.contenders import make_mamba, next_token_loss
from experiments.curves import draw
from experiments.genomics import START, draw_rows, read_fasta
from experiments.harness import half_precision
from mambakit.assets import default_model_path
from mambakit.modules import StateCache
from mambakit.ops import linear_cross_entropy
from mambakit.training.optimizer import make_optimizer, schedule_factor, set_learning_rate
from mambakit.training.state_tuning import add_initial_state, freeze_weights, initial_state_of

TUNING_SEED = 1000
# Positions in a window, from the first token on, over which the loss is also given.
PLACES = ((0, 16), (16, 64), (64, 256), (256, 2**30))


class LowRank(nn.Module):
    """A linear layer and a learned low-rank change of it, alpha = 2 r: zero at first."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.empty(rank, layer.in_features, device=layer.weight.device))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))
        nn.init.kaiming_uniform_(self.down, math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2 * nn.functional.linear(nn.functional.linear(x, self.down), self.up)


def add_lora(model: Any, wanted: int) -> None:
    """Freeze the model and adapt in_proj and out_proj with about ``wanted`` parameters."""
    model.requires_grad_(False)
    mixers = [block.mixer for block in model.backbone.layers]
    each = sum(sum(layer.weight.shape) for mixer in mixers for layer in (mixer.in_proj, mixer.out_proj))
    rank = max(1, round(wanted / each))
    for mixer in mixers:
        mixer.in_proj, mixer.out_proj = LowRank(mixer.in_proj, rank), LowRank(mixer.out_proj, rank)


def learned(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# -- the tasks ---------------------------------------------------------------------------------------------------------


class Task:
    """A base model, and windows (rows, length + 1) whose first token is the start: to train on, choose by, test."""

    def __init__(self, model: Any, train: Tensor, test: Tensor, device: torch.device):
        self.model = model.to(device).eval()
        kept = max(1, len(train) // 10)
        shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))].to(device)
        self.train, self.validation, self.test, self.device = shuffled[kept:], shuffled[:kept], test.to(device), device
        self.spec = model.backbone.new_cache(0).spec


def text_task(options: argparse.Namespace, device: torch.device) -> Task:
    folder = options.model or str(default_model_path())
    tokenizer = mambakit.AutoTokenizer.from_pretrained(folder)
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if getattr(model.config, "quantization_config", None):
        model.dequantize()
    text = Path(options.data, options.text).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    split = int(0.9 * len(ids))
    parts = [windows(part, options.length, tokenizer.eos_token_id) for part in (ids[:split], ids[split:])]
    return Task(model, *parts, device)


def windows(ids: Tensor, length: int, start: int) -> Tensor:
    rows = ids[: len(ids) // length * length].view(-1, length)
    return torch.cat([torch.full_like(rows[:, :1], start), rows], 1)


def dna_task(options: argparse.Namespace, device: torch.device) -> Task:
    torch.manual_seed(0)
    known = read_fasta(Path(options.data, "dna", "klebsiella_mgh78578.fna.xz")).to(device)
    model = make_mamba(8, options.dna_width, options.dna_layers).to(device)
    train_base(model, known, options)
    genome = read_fasta(Path(options.data, "dna", "ecoli_536.fna.gz"))
    split = int(0.8 * len(genome))
    frames = [open_frames(part, options.dna_length, options.shortest) for part in (genome[:split], genome[split:])]
    parts = [torch.cat([torch.full_like(rows[:, :1], START), rows], 1) for rows in frames]
    return Task(model, *parts, device)


def train_base(model: Any, genome: Tensor, options: argparse.Namespace) -> None:
    optimizer = make_optimizer(model, 4e-3, (0.9, 0.95), 0.1)
    length = min(1024, len(genome) // 2)
    for step in range(options.base_steps):
        set_learning_rate(optimizer, 4e-3 * schedule_factor(step / options.base_steps, "cosine", 0.05, 0.01))
        loss = next_token_loss(model, *draw_rows(genome, options.base_rows, length))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(f"dna, base: step {step}, {float(loss.detach()) / math.log(2):.4f} bits", flush=True)


def open_frames(genome: Tensor, length: int, shortest: int) -> Tensor:
    """(genes, length): the beginnings of open reading frames, from ATG on, of either strand; A, C, G, T are 0 to 3."""
    found = []
    for strand in (genome, (3 - genome).flip(0)):
        codons = strand[:-2] * 16 + strand[1:-1] * 4 + strand[2:]  # of every position
        starts, stops = codons == 0 * 16 + 3 * 4 + 2, torch.zeros_like(codons, dtype=torch.bool)
        for letters in ((3, 0, 0), (3, 0, 2), (3, 2, 0)):  # TAA, TAG, TGA
            stops |= codons == letters[0] * 16 + letters[1] * 4 + letters[2]
        for frame in range(3):
            begin = None
            events = torch.nonzero((starts | stops)[frame::3])[:, 0] * 3 + frame
            for at, stop in zip(events.tolist(), stops[events].tolist(), strict=True):
                if not stop and begin is None:
                    begin = at
                elif stop and begin is not None:
                    if at - begin >= max(shortest, length):
                        found.append(strand[begin : begin + length])
                    begin = None
    if not found:
        raise ValueError(f"no open reading frame of {shortest} nucleotides in {len(genome)}; lower --shortest")
    return torch.stack(found)


TASKS = {"text": text_task, "dna": dna_task}


# -- losses ------------------------------------------------------------------------------------------------------------


def loss_of(model: Any, rows: Tensor, cache: StateCache | None) -> Tensor:
    with half_precision(rows.device):
        hidden = model.backbone(rows[:, :-1], use_cache=False, cache_params=cache).last_hidden_state
        return linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, rows[:, 1:].flatten())


@torch.no_grad()
def bits_by_position(model: Any, rows: Tensor, state: StateCache | None, at_once: int = 64) -> Tensor:
    """(length,) mean over the windows of -log2 p of the token at each position; ``state`` is of one row."""
    total = torch.zeros(rows.shape[1] - 1, dtype=torch.float64, device=rows.device)
    for part in rows.split(at_once):
        cache = None if state is None else state.select([0] * len(part))
        with half_precision(rows.device):
            hidden = model.backbone(part[:, :-1], use_cache=False, cache_params=cache).last_hidden_state
            logits = model.lm_head(hidden).float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        total += losses.view(len(part), -1).double().sum(0)
    return total / len(rows) / math.log(2)


# -- contenders --------------------------------------------------------------------------------------------------------


def tune(task: Task, kind: str, seed: int, rate: float, options: argparse.Namespace) -> tuple[Any, Any, list[dict]]:
    """(model, learned state or None, curve on the validation windows)."""
    torch.manual_seed(seed)
    model = copy.deepcopy(task.model).train()
    size = sum(math.prod(t.shape) for layer in task.spec.layers for t in layer)
    if kind == "state":
        add_initial_state(model)
        freeze_weights(model)
    else:
        add_lora(model, size)
    model.to(task.device)
    initial = initial_state_of(model)
    optimizer = make_optimizer(model, rate, (0.9, 0.95), 0.0)
    draws, curve = torch.Generator().manual_seed(seed), []
    for step in range(options.steps + 1):
        if step % max(1, options.steps // options.points) == 0 or step == options.steps:
            state = None if initial is None else frozen(initial)
            bits = float(bits_by_position(model, task.validation[: options.checked], state).mean())
            curve.append({"step": step, "bits": round(bits, 5)})
        if step == options.steps:
            break
        set_learning_rate(optimizer, rate * schedule_factor(step / options.steps, "cosine", 0.05, 0.01))
        rows = task.train[torch.randint(0, len(task.train), (options.batch,), generator=draws).to(task.device)]
        loss = loss_of(model, rows, None if initial is None else initial.cache(len(rows)))
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, None if initial is None else frozen(initial), curve


@torch.no_grad()
def frozen(initial: Any) -> StateCache:
    return initial.cache(1)


@torch.no_grad()
def best_prompt(task: Task, seed: int, options: argparse.Namespace) -> StateCache:
    """The state after the part of the training windows, one after another, that helps the validation windows most."""
    draw_places, best = random.Random(seed), (math.inf, None)
    flat = task.train.flatten()
    for length in options.prompts:
        for _ in range(4):
            start = draw_places.randrange(max(1, len(flat) - length))
            cache = task.model.backbone.new_cache(1)
            task.model.backbone(flat[None, start : start + length], cache_params=cache)
            bits = float(bits_by_position(task.model, task.validation[: options.checked], cache).mean())
            best = min(best, (bits, cache), key=lambda pair: pair[0])
    assert best[1] is not None
    return best[1]


def rows_of(task: str, kind: str, seed: int, bits: Tensor, **more: Any) -> dict[str, Any]:
    row = {"task": task, "model": kind, "seed": seed, "bits": round(float(bits.mean()), 4)}
    for low, high in PLACES:
        if low < len(bits):
            row[f"bits {low} to {min(high, len(bits))}"] = round(float(bits[low:high].mean()), 4)
    return row | more


def run(name: str, options: argparse.Namespace, results: dict[str, list], keep: Any) -> None:
    task = TASKS[name](options, torch.device(options.device))
    print(f"{name}: {len(task.train)} windows to train on, {len(task.test)} to test", flush=True)
    results["summary"].append(rows_of(name, "base", 0, bits_by_position(task.model, task.test, None), learned=0))
    for kind in ("prompt", "state", "lora"):
        rates = {}
        for rate in options.rates[kind] if kind in options.rates and len(options.rates[kind]) > 1 else ():
            rates[rate] = tune(task, kind, TUNING_SEED, rate, options)[2][-1]["bits"]
            results["tuning"].append({"task": name, "model": kind, "rate": rate, "validation bits": rates[rate]})
            print(results["tuning"][-1], flush=True)
        rate = min(rates, key=rates.__getitem__) if rates else options.rates.get(kind, [None])[0]
        for seed in options.seeds:
            began = time.perf_counter()
            if kind == "prompt":
                model, state, size = task.model, best_prompt(task, seed, options), 0
            else:
                model, state, curve = tune(task, kind, seed, rate, options)
                size = learned(model)
                results[name] += [{"model": kind, "seed": seed, **point} for point in curve]
            seconds = round(time.perf_counter() - began, 1)
            bits = bits_by_position(model, task.test, state)
            results["summary"].append(rows_of(name, kind, seed, bits, learned=size, rate=rate, seconds=seconds))
            print(results["summary"][-1], flush=True)
            keep()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of the data files (experiments/README.md)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of a contender that learns")
    parser.add_argument("--batch", type=int, default=32, help="windows of a step")
    parser.add_argument("--points", type=int, default=10, help="of a curve")
    parser.add_argument("--checked", type=int, default=256, help="validation windows of a point, and of a prompt")
    parser.add_argument("--state-rates", nargs="+", type=float, default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--lora-rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--prompts", nargs="+", type=int, default=[256, 1024, 4096], help="lengths, four tries each")
    parser.add_argument("--model", help="text: the base (default: the embedded model)")
    parser.add_argument("--text", default="eval/tinyshakespeare.txt", help="text: the file, in the data folder")
    parser.add_argument("--length", type=int, default=256, help="text: tokens of a window")
    parser.add_argument("--dna-length", type=int, default=512, help="dna: nucleotides of a window")
    parser.add_argument("--shortest", type=int, default=600, help="dna: nucleotides of an open reading frame")
    parser.add_argument("--dna-width", type=int, default=192)
    parser.add_argument("--dna-layers", type=int, default=8)
    parser.add_argument("--base-steps", type=int, default=1000, help="dna: of the base model's training")
    parser.add_argument("--base-rows", type=int, default=64, help="dna: rows of 1,024 nucleotides in such a step")
    parser.add_argument("--plot", type=Path, help="draw the curves of --json, run nothing")
    record.add_argument(parser)
    options = parser.parse_args(arguments)
    if options.plot:
        return draw(options.json, options.plot, dict.fromkeys(TASKS, ("step", "bits")))
    options.rates = {"state": options.state_rates, "lora": options.lora_rates}
    results: dict[str, Any] = {"summary": [], "tuning": [], **{name: [] for name in options.tasks}}

    def keep() -> None:
        record.write(options.json, results, gpus=int(options.device.startswith("cuda")))

    for name in options.tasks:
        run(name, options, results, keep)
    return results


if __name__ == "__main__":
    main()
