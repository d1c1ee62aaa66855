"""Audio: spoken digits as raw mu-law samples, generated and recognised.

    python -m experiments.audio --data DATA --out runs/experiments --budget-seconds 120

Reads ``audio/speech_digits.npz`` (Free Spoken Digit Dataset, 8 kHz, 8-bit mu-law codes). The standard split: recordings
0 to 4 of each speaker and digit are the test (300 of 3,000). Two tasks, each with every seed:

- generation: one Mamba over samples; bits per sample of the test recordings, each read from an empty state, beside a
  Markov model of the last samples;
- classification: a Mamba over frames of ``frame`` consecutive samples' embeddings, mean-pooled; test accuracy.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.contenders import make_mamba, next_token_loss
from experiments.harness import (
    Budget,
    Results,
    Step,
    device_of,
    half_precision,
    parameter_count,
    require_file,
    say,
    train,
)
from experiments.markov import MarkovModel
from experiments.settings import Settings, option, parse
from mambakit import MambaConfig, MambaForCausalLM, MambaModel
from mambakit.training.optimizer import make_optimizer, schedule_factor

CODES = 256
START = 256  # stands before a recording, and pads
_VOCABULARY = 264
_FILE = "audio/speech_digits.npz"
GENERATION, CLASSIFICATION = "generation", "classification"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audio(Settings):
    tasks: tuple[str, ...] = option((CLASSIFICATION, GENERATION), "which")
    test_indices: int = option(5, "recordings with an index below this are the test")
    hidden_size: int = option(128, "width")
    layers: int = option(8, "Mamba layers of the generating model")
    length: int = option(2048, "samples of a generation training row")
    batch_size: int = option(32, "rows of a generation batch")
    learning_rate: float = option(4e-3, "peak of both tasks")
    classifier_layers: int = option(6, "Mamba layers of the classifier")
    classifier_length: int = option(8192, "samples that the classifier reads; longer recordings are cut")
    classifier_batch_size: int = option(64, "recordings of a classification batch")
    frame: int = option(16, "samples of a frame")
    weight_decay: float = option(0.1, "on matrices")
    steps: int = option(0, "of a run; 0: as many as its share of the budget holds, by measured speed")
    largest_steps: int = option(6000, "bound on the steps chosen by the budget")
    samples: int = option(8, "recordings to generate with the first seed, kept in the results (base64 mu-law codes)")
    sample_length: int = option(4000, "samples of each")

    def __post_init__(self) -> None:
        if not self.steps and not self.budget_seconds:
            raise ValueError("steps is 0 and there is no budget to choose them by; give --steps or --budget-seconds")
        for task in self.tasks:
            if task not in (GENERATION, CLASSIFICATION):
                raise ValueError(f"unknown task {task!r}; choose {GENERATION!r} or {CLASSIFICATION!r}")
        if self.classifier_length % self.frame:
            raise ValueError(f"frame {self.frame} does not divide classifier_length {self.classifier_length}")


@dataclasses.dataclass
class Recordings:
    """Recordings of one split on the device: joined codes (samples,) int64, and each one's start, length and digit."""

    codes: Tensor
    starts: Tensor
    lengths: Tensor
    digits: Tensor

    @property
    def count(self) -> int:
        return self.starts.numel()

    def rows(self, which: Tensor, length: int) -> Tensor:
        """(rows, length) int64: the chosen recordings' first samples, START after their end."""
        time = torch.arange(length, device=self.codes.device)
        inside = time < self.lengths[which][:, None]
        at = (self.starts[which][:, None] + time).clamp(max=self.codes.numel() - 1)
        return torch.where(inside, self.codes[at], START)


def load_recordings(settings: Audio, device: torch.device) -> tuple[Recordings, Recordings]:
    """The training and the test split."""
    with np.load(require_file(Path(settings.data, _FILE), "spoken digits")) as file:
        codes, offsets, digits, index = (file[k] for k in ("codes", "offsets", "digit", "index"))
    splits = []
    for chosen in (index >= settings.test_indices, index < settings.test_indices):
        numbers = np.flatnonzero(chosen)
        parts = [codes[offsets[i] : offsets[i + 1]] for i in numbers]
        lengths = np.array([part.size for part in parts], np.int64)
        arrays = (np.concatenate(parts), np.cumsum(lengths) - lengths, lengths, digits[numbers])
        splits.append(Recordings(*(torch.from_numpy(a.astype(np.int64)).to(device) for a in arrays)))
    return splits[0], splits[1]


def decode_mu_law(codes: Tensor) -> Tensor:
    """Codes 0 to 255 -> amplitudes in [-1, 1] (mu = 255, G.711's continuous formula); START is silence."""
    y = codes.float() / 255 * 2 - 1
    x = torch.sign(y) * (torch.pow(256.0, y.abs()) - 1) / 255
    return x.masked_fill(codes == START, 0.0)


def encode_mu_law(x: Tensor) -> Tensor:
    """Amplitudes in [-1, 1] -> codes 0 to 255."""
    y = torch.sign(x) * torch.log1p(255 * x.abs().clamp(max=1)) / math.log(256)
    return ((y + 1) / 2 * 255).round().long()


class FrameClassifier(nn.Module):
    """Frames of raw samples -> Mamba -> mean over the recording's frames -> ten scores."""

    def __init__(self, settings: Audio):
        super().__init__()
        h, self.frame = settings.hidden_size, settings.frame
        self.embedding = nn.Embedding(CODES + 1, 16)
        self.frames = nn.Linear(16 * settings.frame, h, bias=False)
        self.backbone = MambaModel(
            MambaConfig(vocab_size=1, hidden_size=h, num_hidden_layers=settings.classifier_layers, use_cache=False)
        )
        self.score = nn.Linear(h, 10)

    def forward(self, codes: Tensor) -> Tensor:
        """(b, l) codes, START as padding, l a multiple of the frame -> (b, 10)."""
        b = codes.shape[0]
        frames = self.embedding(codes).view(b, -1, 16 * self.frame)  # (b, frames, 16 * frame)
        hidden = self.backbone(inputs_embeds=self.frames(frames), use_cache=False).last_hidden_state
        real = (codes.view(b, -1, self.frame) != START).any(-1)[..., None].float()  # (b, frames, 1)
        return self.score((hidden.float() * real).sum(1) / real.sum(1))


def augmented(rows: Tensor) -> Tensor:
    """Each recording at another loudness (0.4 to 1.4) and speed (0.85 to 1.15), with a little noise."""
    b, length = rows.shape
    wave = decode_mu_law(rows)
    speed = 0.85 + 0.3 * torch.rand(b, 1, device=rows.device)
    at = torch.arange(length, device=rows.device) * speed
    left = at.long().clamp(max=length - 2)
    part = at - left
    mixed = wave.gather(1, left) * (1 - part) + wave.gather(1, left + 1) * part
    mixed = mixed * (0.4 + torch.rand_like(speed)) + 0.003 * torch.rand_like(speed) * torch.randn_like(mixed)
    beyond = (at > length - 1) | (rows.gather(1, left) == START)
    return torch.where(beyond, START, encode_mu_law(mixed.clamp(-1, 1)))


class Classification:
    """Train the classifier on whole recordings, and count what it gets right."""

    name = CLASSIFICATION

    def __init__(self, train_split: Recordings, settings: Audio):
        self.split, self.settings = train_split, settings
        self.model: nn.Module = FrameClassifier(settings).to(train_split.codes.device).train()

    def draw(self) -> tuple[Tensor, ...]:
        settings, split = self.settings, self.split
        which = torch.randint(0, split.count, (settings.classifier_batch_size,), device=split.codes.device)
        rows = augmented(split.rows(which, settings.classifier_length))
        with half_precision(rows.device):
            scores = self.model(rows)
        loss = F.cross_entropy(scores.float(), split.digits[which], label_smoothing=0.1)
        return loss, (scores.argmax(-1) == split.digits[which]).float().mean()

    @torch.no_grad()
    def evaluate(self, test: Recordings) -> dict:
        self.model.eval()
        right = 0
        for which in torch.arange(test.count, device=test.codes.device).split(self.settings.classifier_batch_size):
            scores = self.model(test.rows(which, self.settings.classifier_length))
            right += int((scores.argmax(-1) == test.digits[which]).sum())
        self.model.train()
        return {"accuracy": right / test.count, "test_recordings": test.count}


class Generation:
    """Train the autoregressive model on windows of the joined recordings, and measure bits per sample."""

    name = GENERATION

    def __init__(self, train_split: Recordings, settings: Audio):
        self.settings = settings
        device = train_split.codes.device
        self.model = make_mamba(_VOCABULARY, settings.hidden_size, settings.layers).to(device)
        # Each recording behind its own START; the last one's end pads the final window.
        order = torch.arange(train_split.codes.numel(), device=device)
        recording = torch.searchsorted(train_split.starts, order, right=True)  # 1 for the first
        self.stream = torch.full((order.numel() + train_split.count + 1,), START, device=device)
        self.stream[order + recording] = train_split.codes
        self.offsets = torch.arange(settings.length + 1, device=device)

    def draw(self) -> tuple[Tensor, ...]:
        last = self.stream.numel() - self.settings.length - 1
        starts = torch.randint(0, last + 1, (self.settings.batch_size, 1), device=self.stream.device)
        rows = self.stream[starts + self.offsets]
        targets = rows[:, 1:].masked_fill(rows[:, 1:] == START, -100)
        return (next_token_loss(self.model, rows[:, :-1], targets),)

    @torch.no_grad()
    def evaluate(self, test: Recordings) -> dict:
        """Bits per sample over every sample of the test split."""
        self.model.eval()
        nats = 0.0
        by_length = test.lengths.argsort()
        for which in by_length.split(16):
            targets = test.rows(which, int(test.lengths[which].max()))
            inputs = torch.cat([torch.full_like(targets[:, :1], START), targets[:, :-1]], 1)
            targets = targets.masked_fill(targets == START, -100)
            nats += float(next_token_loss(self.model, inputs, targets)) * int(test.lengths[which].sum())
        self.model.train()
        return {
            "bits_per_sample": nats / math.log(2) / int(test.lengths.sum()),
            "test_samples": int(test.lengths.sum()),
        }


TASKS: dict[str, type] = {GENERATION: Generation, CLASSIFICATION: Classification}


@torch.no_grad()
def generate(model: MambaForCausalLM, count: int, length: int, eager: bool) -> Tensor:
    """(count, length) codes drawn from the model, one sample at a time from a carried state.

    On CUDA one step is captured and replayed: the state is updated in place, so nothing else changes between samples.
    """
    device = model.lm_head.weight.device
    model.eval()
    cache = model.backbone.new_cache(count)
    last = torch.full((count, 1), START, device=device)
    output = torch.zeros(count, length, dtype=torch.int64, device=device)

    def one_sample() -> None:
        logits = model(last, cache_params=cache).logits[:, 0, :CODES]
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-20, 1 - 1e-7)))  # Gumbel: argmax samples
        last.copy_((logits + noise).argmax(-1, keepdim=True))

    graph = None
    for position in range(length):
        if graph is not None:
            graph.replay()
        else:
            one_sample()
        output[:, position] = last[:, 0]
        if position == 2 and device.type == "cuda" and not eager:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # captured, not run
                one_sample()
    return output


def make_step(task: type, seed: int, train_split: Recordings, settings: Audio) -> tuple[Any, Step]:
    torch.manual_seed(seed)
    work = task(train_split, settings)
    optimizer = make_optimizer(work.model, settings.learning_rate, (0.9, 0.95), settings.weight_decay)
    torch.manual_seed(seed)
    return work, Step(work.model, optimizer, work.draw, capture=not settings.eager)


def choose_steps(train_split: Recordings, settings: Audio, budget: Budget) -> dict[str, int]:
    """Steps of each task's runs: an equal share of the time for every run, by measured speed."""
    if settings.steps:
        return dict.fromkeys(settings.tasks, settings.steps)
    speeds = {task: make_step(TASKS[task], 0, train_split, settings)[1].seconds_per_step(10) for task in settings.tasks}
    # 15 % for evaluations, and for capturing each run's graph.
    share = 0.85 * budget.left() / (len(settings.seeds) * len(settings.tasks))
    return {task: max(1, min(int(share / speed), settings.largest_steps)) for task, speed in speeds.items()}


def run_one(
    task: type, seed: int, steps: int, splits: tuple[Recordings, Recordings], settings: Audio, seconds: float
) -> dict:
    """Train one task's model with one seed within ``seconds`` (0: no limit), and evaluate it."""
    budget = Budget(seconds)
    work, step = make_step(task, seed, splits[0], settings)
    curve: list[dict] = []

    def check(taken: int, means: list[float]) -> bool:
        names = ("loss", "accuracy")[: len(means)]
        curve.append({"step": taken, "seconds": budget.elapsed(), **dict(zip(names, means, strict=True))})
        return False

    def schedule(progress: float) -> float:
        return settings.learning_rate * schedule_factor(progress, "cosine", 0.1, 0.01)

    taken, ended = train(step, steps, schedule, max(1, steps // 20), check, lambda: budget.left() < 0)
    record = {
        "task": work.name, "seed": seed, "parameters": parameter_count(work.model), "steps": taken,
        "planned_steps": steps, "seconds": budget.elapsed(), "ended": ended, "curve": curve,
        **work.evaluate(splits[1]),
    }  # fmt: skip
    if work.name == GENERATION and seed == settings.seeds[0] and settings.samples:
        codes = generate(work.model, settings.samples, settings.sample_length, settings.eager)
        record["generated"] = [base64.b64encode(bytes(row.tolist())).decode("ascii") for row in codes]
    return record


def markov_baseline(splits: tuple[Recordings, Recordings]) -> dict:
    """Bits per sample under the last 0, 1 or 2 samples; the smoothing is fixed at 16 symbols' worth."""
    train_split, test = splits
    bits = MarkovModel([train_split.codes], CODES, 2, 16.0).bits_per_symbol(test.codes)
    return {"bits_per_sample_of_order": bits, "bits_per_sample": min(bits)}


def main(arguments: list[str] | None = None) -> Results:
    settings = parse(Audio, arguments, __doc__ or "")
    results = Results("audio", settings)
    splits = load_recordings(settings, device_of(settings))
    results.note(markov=markov_baseline(splits), train_recordings=splits[0].count, test_recordings=splits[1].count)
    say(f"audio, Markov: {results.record['markov']}, {results.budget.elapsed():.0f} s")
    steps = choose_steps(splits[0], settings, results.budget)
    say(f"audio: steps {steps}, {results.budget.elapsed():.0f} s")
    for seed, task, _ in results.shares((seed, task) for seed in settings.seeds for task in settings.tasks):
        # The steps were chosen to fit: a run may take all that is left, so that only the last ones can be cut short.
        seconds = 0.95 * results.budget.left() if settings.budget_seconds else 0.0
        record = run_one(TASKS[task], seed, steps[task], splits, settings, seconds)
        results.add(record, record["ended"] == "budget")
        shown = {k: record[k] for k in ("accuracy", "bits_per_sample") if k in record}
        say(f"audio, {task}, seed {seed}: {shown} after {record['steps']} steps, {record['seconds']:.0f} s")
    return results.finish()


if __name__ == "__main__":
    main()
