"""Induction heads: answer what followed a trigger, however long ago (arXiv 2312.00752, table 11 and appendix E.1).

    python -m experiments.induction_heads --out runs/experiments --budget-seconds 90

A row is random tokens. The trigger stands once at a place drawn uniformly from the whole row, and again at the end; the
answer is the token that followed it. Trained on rows of at most 256, evaluated at every power of two up to 2^20, in
chunks with the state carried in a `MambaCache`, so in memory that does not grow with the length. As in the paper: fresh
rows, loss on the answer alone, Adam without decay, the sizes of the model. Unlike there (204,800 steps of 8 rows of
256, constant rate 1e-3):

- Rows are short at first, and double once most answers are right. From the first step at 256 the loss stays at chance
  (ln 16) for as long as we waited, 182,000 steps; presumably what one token leaves in the state is lost among 255
  others until a layer can tell it apart. At 16 that is learned within some hundred steps, and then holds at the next
  lengths at once.
- Time steps start small. From the usual start every token writes a little into the state, which is invisible at 256 and
  drowns the answer in longer rows (after 800 steps on a CPU: all right up to 2^10, 31 % at 2^15).
- The projection that makes the time steps starts constant, the reference's other choice, so that all channels open and
  close together. From a random start, channels of the opposite sign opened to everything but the answer, by up to 1e-3
  a token; that is nothing at 256, but presumably their states fill up beyond (on a CPU, seed 0: 64 rows of 64 right at
  2^10, 14 of 16 at 2^14, 2 of 4 at 2^18).
- Few steps, of 32 rows, at a rate of 3e-3 that falls linearly to 0 at the last length. From a random start of the
  projection, 9,000 steps at 256 and this constant rate, on an H100, left one seed at 50 % at 2^20 and one at 49 % at
  256 itself.

The steps taken never depend on the accuracy at more than 256 positions. The start of the time steps and the schedule
were chosen by it, on a CPU, up to 2^20, on some of the seeds that are run by default.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.harness import Budget, Results, Step, device_of, parameter_count, say, train
from experiments.settings import Settings, option, parse
from mambakit import MambaConfig, MambaForCausalLM
from mambakit.training.optimizer import make_optimizer

_WARMUP = 100  # steps from a rate of 0
_TRAINING = 0.75  # of a run's time, at most; the rest is for evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionHeads(Settings):
    length: int = option(256, "positions of a training row")
    vocabulary: int = option(16, "ordinary tokens; the trigger is one more")
    hidden_size: int = option(64, "width")
    layers: int = option(2, "Mamba layers")
    time_step_min: float = option(1e-9, "smallest initial Delta (the paper's default is 1e-3)")
    time_step_max: float = option(1e-7, "largest initial Delta (the paper's default is 0.1)")
    batch_size: int = option(32, "rows in a batch")
    learning_rate: float = option(3e-3, "after 100 steps of warm-up; falls linearly to 0 at the last length")
    steps: int = option(300, "at the last length")
    stage_steps: int = option(2000, "at each shorter length, at most")
    first_length: int = option(16, "row length of the first stage; it doubles from stage to stage, up to the length")
    advance_at: float = option(0.98, "accuracy of a shorter stage's batches at which the next stage starts")
    check_every: int = option(100, "steps between looks at the accuracy")
    first_power: int = option(6, "evaluate from 2 to this power")
    last_power: int = option(20, "evaluate up to 2 to this power")
    evaluation_rows: int = option(512, "rows of an evaluation, at most")
    evaluation_tokens: int = option(2**25, "tokens of an evaluation, at most; there are fewer rows where they are long")
    chunk_tokens: int = option(2**19, "tokens read at once in an evaluation, over all its rows")

    def __post_init__(self) -> None:
        if not 3 <= self.first_length <= self.length:
            raise ValueError(f"first_length {self.first_length} must be from 3 to the length, {self.length}")

    def lengths(self) -> list[int]:
        """Row lengths of the stages."""
        lengths = [self.first_length]
        while lengths[-1] < self.length:
            lengths.append(min(2 * lengths[-1], self.length))
        return lengths


def draw_rows(rows: int, length: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (rows, length) and answers (rows,); the trigger is token ``vocabulary``."""
    tokens = torch.randint(0, vocabulary, (rows, length), device=device)
    place = torch.randint(0, length - 2, (rows, 1), device=device)
    tokens.scatter_(1, place, vocabulary)
    tokens[:, -1] = vocabulary
    return tokens, tokens.gather(1, place + 1).squeeze(1)


@torch.no_grad()
def accuracy_at(model: MambaForCausalLM, length: int, settings: InductionHeads, seed: int) -> tuple[float, int]:
    """Accuracy at ``length`` and the number of rows it was measured on, read in chunks from a carried state."""
    device = next(model.parameters()).device
    torch.manual_seed(1_000_003 + 1009 * seed + length)
    rows = max(1, min(settings.evaluation_rows, settings.evaluation_tokens // length))
    right = 0
    group = max(1, min(rows, settings.evaluation_tokens // (4 * length)))  # bounds the memory of the tokens themselves
    for start in range(0, rows, group):
        tokens, answers = draw_rows(min(group, rows - start), length, settings.vocabulary, device)
        cache = model.backbone.new_cache(tokens.shape[0])
        for chunk in tokens.split(max(1, settings.chunk_tokens // tokens.shape[0]), dim=1):
            logits = model(chunk, cache_params=cache, logits_to_keep=1).logits
        right += int((logits[:, -1].argmax(-1) == answers).sum())
    return right / rows, rows


def train_stage(
    model: MambaForCausalLM, optimizer: torch.optim.Optimizer, length: int, before: int, settings: InductionHeads,
    budget: Budget, curve: list[dict],
) -> dict:  # fmt: skip
    """Train at one length, after ``before`` steps at shorter ones; what was seen is appended to ``curve``.

    A shorter stage ends at the accuracy that earns the next, or after its steps; any ends when the training's time is
    over.
    """
    last = length == settings.length
    steps = settings.steps if last else settings.stage_steps
    device = next(model.parameters()).device

    def draw() -> tuple[Tensor, ...]:
        tokens, answers = draw_rows(settings.batch_size, length, settings.vocabulary, device)
        logits = model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        return F.cross_entropy(logits, answers), (logits.argmax(-1) == answers).float().mean()

    def check(taken: int, means: list[float]) -> bool:
        curve.append({"step": before + taken, "length": length, "loss": means[0], "accuracy": means[1]})
        return not last and means[1] >= settings.advance_at

    def rate(progress: float) -> float:
        warm = min(1.0, (before + progress * steps + 1) / _WARMUP)
        return settings.learning_rate * warm * (1.0 - progress if last else 1.0)

    taken, ended = train(
        Step(model, optimizer, draw, capture=not settings.eager), steps, rate, settings.check_every, check,
        lambda: budget.elapsed() > _TRAINING * budget.seconds,
    )  # fmt: skip
    return {"length": length, "steps": taken, "ended": ended, "accuracy": curve[-1]["accuracy"]}


def new_model(settings: InductionHeads) -> MambaForCausalLM:
    config = MambaConfig(
        vocab_size=settings.vocabulary + 1, hidden_size=settings.hidden_size, num_hidden_layers=settings.layers,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0, time_step_init_scheme="constant",
        time_step_min=settings.time_step_min, time_step_max=settings.time_step_max,
        time_step_floor=settings.time_step_min,
    )  # fmt: skip
    return MambaForCausalLM(config).train().to(device_of(settings))


def compile_kernels(settings: InductionHeads) -> None:
    """Take a step at each length and evaluate one row, with a model thrown away: no run's time goes into
    compilation."""
    model = new_model(settings)
    optimizer = make_optimizer(model, settings.learning_rate, (0.9, 0.999), 0.0)
    once = dataclasses.replace(settings, steps=1, stage_steps=1, evaluation_rows=1, eager=True)
    for length in settings.lengths():
        train_stage(model, optimizer, length, 0, once, Budget(0.0), [])
    accuracy_at(model.eval(), 2**settings.first_power, once, 0)


def run_one(seed: int, settings: InductionHeads, seconds: float) -> dict:
    """Train in float32 and evaluate; training that takes more than 3/4 of the time is cut there, as evaluation at its
    end."""
    torch.manual_seed(seed)
    model = new_model(settings)
    optimizer = make_optimizer(model, settings.learning_rate, (0.9, 0.999), 0.0)
    budget = Budget(seconds)
    curve: list[dict] = []
    stages: list[dict] = []
    taken = 0
    for length in settings.lengths():
        stages.append(train_stage(model, optimizer, length, taken, settings, budget, curve))
        taken += stages[-1]["steps"]
        say(f"  seed {seed}: {stages[-1]}, {budget.elapsed():.0f} s")
        if stages[-1]["ended"] == "budget":
            break
    trained = budget.elapsed()
    model.eval()
    accuracies = []
    cut = stages[-1]["ended"] == "budget"
    for power in range(settings.first_power, settings.last_power + 1):
        if budget.left() < 0:
            cut = True
            break
        accuracy, rows = accuracy_at(model, 2**power, settings, seed)
        accuracies.append({"power": power, "length": 2**power, "accuracy": accuracy, "rows": rows})
        say(f"  seed {seed}: 2^{power}: {accuracy:.4f} of {rows} rows, {budget.elapsed():.0f} s")
    return {
        "model": "mamba", "seed": seed, "parameters": parameter_count(model), "steps": taken, "seconds": trained,
        "ended": stages[-1]["ended"], "cut_short": cut, "trained_at": settings.length, "stages": stages,
        "accuracies": accuracies, "curve": curve,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> Results:
    settings = parse(InductionHeads, arguments, __doc__ or "")
    results = Results("induction_heads", settings)
    compile_kernels(settings)
    say(f"induction heads: ready after {results.budget.elapsed():.0f} s")
    for seed, seconds in results.shares((seed,) for seed in settings.seeds):
        run = run_one(seed, settings, seconds)
        results.add(run, run["cut_short"])
    return results.finish()


if __name__ == "__main__":
    main()
