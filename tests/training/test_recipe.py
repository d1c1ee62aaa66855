"""The recipe: accumulation, carried state, length warm-up, masked targets, checkpointing, skipped updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rich.console import Console

from mambakit.training.config import TrainConfig
from mambakit.training.data.rows import cut_rows
from mambakit.training.guard import UpdateGuard
from mambakit.training.optimizer import make_optimizer
from mambakit.training.step import TrainingStep
from mambakit.training.tokenizer import make_vocabulary
from tests.models.configurations import pair, worst

pytestmark = pytest.mark.filterwarnings("ignore")


def seeded():
    torch.manual_seed(0)
    return pair("plain")[0].train()


def make_step(model, **options) -> TrainingStep:
    respect = options.pop("respect_documents", False)
    return TrainingStep(model, make_optimizer(model, 1e-2, (0.9, 0.95), 0.1), 1.0, "float32", respect, **options)


def batch(rows=4, length=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 61, (rows, length), generator=generator)
    begins = torch.zeros(rows, length, dtype=torch.bool)
    begins[0, 5] = begins[1, 9] = begins[-1, 0] = True
    return tokens, begins


def parameters_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("respect", [False, True])
def test_accumulated_parts_are_the_whole_batch(respect):
    """With different numbers of targets in each part: the mean is the whole batch's, not the mean of means."""
    results = []
    for parts in (1, 4):
        model = seeded()
        step = make_step(model, accumulate=parts, respect_documents=respect, ignored_token=7)
        for seed in range(3):
            tokens, begins = batch(seed=seed)
            tokens[0, 3:8] = 7
            loss, norm = step.run(tokens, begins)
        results.append((loss, norm, parameters_of(model)))
    (loss, norm, whole), (other_loss, other_norm, parts) = results
    # Sums in another order: float32 rounding, enlarged where Adam divides a small gradient by its own size.
    assert worst(other_loss, loss) < 1e-5
    assert worst(other_norm, norm) < 1e-4
    assert all((parts[name] - whole[name]).abs().max() < 1e-3 for name in whole)


def test_an_ignored_token_is_read_but_not_predicted():
    model = pair("plain")[0]
    step = make_step(model, ignored_token=7)
    tokens, begins = batch()
    tokens[tokens == 7] = 8
    tokens[2, 4] = 7
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.log_softmax(-1)
    log_probs = logits.gather(-1, tokens[:, 1:, None])[..., 0]
    log_probs[2, 3] = 0
    assert worst(step.loss(tokens, begins), -log_probs.sum() / (log_probs.numel() - 1)) < 1e-5
    every = torch.full_like(tokens, 7)
    assert float(step.loss(every, torch.zeros_like(begins)).detach()) == 0.0, (
        "no target at all: nothing to learn, no NaN"
    )


@pytest.mark.parametrize("respect", [False, True])
def test_carried_state_is_the_long_document(respect):
    """Rows in a row: their losses are those of one long row, and the gradient stops at each row's start."""
    model = pair("plain")[0].train()
    length, count = 6, 4
    tokens, _ = batch(3, length * count + 1)
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[0, 8] = begins[1, 6] = begins[2, 0] = begins[2, 17] = True  # inside, at a row's start, at the very start
    options = {"respect_documents": respect}
    step = make_step(model, carry_rows=3, accumulate=3, **options)
    step.optimizer.param_groups[0]["lr"] = step.optimizer.param_groups[1]["lr"] = 0.0
    for group in step.optimizer.param_groups:
        group["weight_decay"] = 0.0
    losses = []
    for part in range(count):
        cut = slice(part * length, (part + 1) * length + 1)
        rows, flags = tokens[:, cut], begins[:, cut]
        count_of = (step.targets(rows, flags) != -100).sum()
        losses.append(step.run(rows, flags)[0] * count_of)
    whole = make_step(model, **options)
    total = whole.loss(tokens, begins)
    targets = (whole.targets(tokens, begins) != -100).sum()
    assert worst(sum(losses), total * targets) < 1e-5
    kept = [cache.ssm_states.clone() for cache in step.carried]
    step.forget(np.array([False, True, False]))
    for row, (before, cache) in enumerate(zip(kept, step.carried, strict=True)):
        assert before.abs().max() > 0
        assert torch.equal(cache.ssm_states, torch.zeros_like(before) if row == 1 else before)
    step.forget(np.ones(3, bool))
    fresh = step.run(tokens[:, : length + 1], begins[:, : length + 1])[0]
    assert worst(fresh, whole.loss(tokens[:, : length + 1], begins[:, : length + 1])) < 1e-5


def test_what_is_carried_is_the_state_and_no_gradient():
    model = seeded()
    tokens, begins = batch(2, 11)
    step = make_step(model, carry_rows=2)
    with torch.no_grad():
        expected = model(tokens[:, :-1], use_cache=True).cache_params
    step.run(tokens, begins)
    kept = step.carried[0]
    assert not kept.ssm_states.requires_grad
    assert not kept.conv_states.requires_grad
    assert worst(kept.ssm_states, expected.ssm_states) < 1e-5
    assert worst(kept.conv_states, expected.conv_states) < 1e-5
    assert kept.get_seq_length() == 10


def test_checkpointed_activations_train_the_same(monkeypatch):
    from mambakit.training import model as module

    results, recomputed = [], []
    original = module.checkpoint
    monkeypatch.setattr(
        module, "checkpoint", lambda *args, **kwargs: (recomputed.append(1), original(*args, **kwargs))[1]
    )
    for checkpointed in (False, True):
        torch.manual_seed(0)
        config = TrainConfig(hidden_size=16, num_hidden_layers=2, activation_checkpointing=checkpointed)
        model = module.make_model(config, make_vocabulary("bytes"), Console(quiet=True))
        step = make_step(model, accumulate=2, ignored_token=3)
        losses = [step.run(*batch(seed=s))[0] for s in range(3)]
        results.append((torch.stack(losses), parameters_of(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[1][1][n], p) for n, p in results[0][1].items())
    assert len(recomputed) == 2 * 2 * 3, "every layer of every part of every step"


def test_gradients_are_clipped_as_pytorch_clips_them():
    def trained(clip: float, by_hand: bool) -> dict:
        model = seeded()
        step = make_step(model)
        step.clip = clip
        for seed in range(4):
            rows, begins = batch(seed=seed)
            if by_hand:
                logits = model(rows[:, :-1], use_cache=False).logits
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                torch.optim.AdamW.step(step.optimizer)
                step.optimizer.zero_grad()
            else:
                step.run(rows, begins)
        return parameters_of(model)

    free = trained(1e9, False)
    clipped, expected = trained(0.3, False), trained(0.3, True)
    # Adam divides a small gradient by its own size, rounding included.
    assert max(worst(clipped[name], expected[name]) for name in expected) < 1e-3
    assert max(worst(free[name], expected[name]) for name in expected) > 1e-2


def test_recomputed_selections_train_the_same():
    from mambakit.training import model as module

    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        config = TrainConfig(hidden_size=16, num_hidden_layers=2, recompute_selection=recompute)
        model = module.make_model(config, make_vocabulary("bytes"), Console(quiet=True))
        assert {layer.mixer.recompute_selection for layer in model.backbone.layers} == {recompute}
        step = make_step(model)
        results.append((torch.stack([step.run(*batch(seed=s))[0] for s in range(3)]), parameters_of(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[1][1][n], p) for n, p in results[0][1].items())
    falcon = pair("falcon_odd")[0]
    module.recompute_selection(falcon)
    assert all(layer.mixer.recompute_selection for layer in falcon.backbone.layers)
    with pytest.raises(ValueError, match="this mamba model has others"):
        module.recompute_selection(pair("gelu")[0])


def test_length_warm_up():
    config = TrainConfig(sequence_length=64, initial_length=8, length_warmup=0.3)
    lengths = [config.row_length(p) for p in (0.0, 0.09, 0.11, 0.19, 0.21, 0.29, 0.3, 1.0)]
    assert lengths == [8, 8, 16, 16, 32, 32, 64, 64]
    assert TrainConfig(sequence_length=64).row_length(0.0) == 64
    tokens, begins = batch(4, 65)
    short, _ = cut_rows(tokens, begins, config.row_length(0.0))
    assert short.shape == (32, 9)


# -- updates that are not made -----------------------------------------------------------------------------------------


def test_an_update_that_is_not_finite_changes_nothing():
    model = pair("plain")[0].train()
    step = make_step(model)
    step.run(*batch())
    before = parameters_of(model)
    moments = [{k: v.clone() for k, v in s.items()} for s in step.optimizer.state.values()]
    with torch.no_grad():
        kept = model.backbone.norm_f.weight.clone()
        model.backbone.norm_f.weight.fill_(float("inf"))
    loss, norm = step.run(*batch(seed=1))
    assert not torch.isfinite(loss)
    assert not torch.isfinite(norm)
    with torch.no_grad():
        model.backbone.norm_f.weight.copy_(kept)
    after = parameters_of(model)
    assert all(torch.equal(after[n], before[n]) for n in before)
    for state, old in zip(step.optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[k], old[k]) for k in old), "step count and moments stay too"
    assert (int(step.guard.skipped), int(step.guard.in_a_row), float(step.guard.worst)) == (1, 1, float("inf"))
    step.run(*batch(seed=2))
    assert (int(step.guard.skipped), int(step.guard.in_a_row)) == (1, 0)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_warm_up_step_changes_nothing():
    model = seeded()
    step = make_step(model, carry_rows=4)
    step.run(*batch())
    before = parameters_of(model), [c.clone() for c in step.carried], step.guard.state_dict()
    guard = {name: value.clone() for name, value in before[2].items()}
    step.warm_up(*batch(seed=1))
    assert all(torch.equal(p, before[0][n]) for n, p in model.named_parameters())
    assert all(torch.equal(c.ssm_states, old.ssm_states) for c, old in zip(step.carried, before[1], strict=True))
    assert step.carried[0].get_seq_length() == before[1][0].get_seq_length()
    assert all(torch.equal(value, guard[name]) for name, value in step.guard.state_dict().items())
    other = seeded()
    cold = make_step(other, carry_rows=4)
    cold.run(*batch())
    assert torch.equal(step.run(*batch(seed=2))[0], cold.run(*batch(seed=2))[0])


def test_a_spike_is_skipped():
    guard = UpdateGuard(torch.device("cpu"), spike_factor=4.0)
    for _ in range(60):
        guard.check(torch.tensor(2.0))
        assert float(guard.skip) == 0
    assert float(guard.mean) == pytest.approx(2.0)
    guard.check(torch.tensor(8.1))
    assert float(guard.skip) == 1
    assert (float(guard.mean), float(guard.worst)) == (pytest.approx(2.0), pytest.approx(8.1))
    guard.check(torch.tensor(7.9))
    assert float(guard.skip) == 0
    assert float(guard.mean) > 2.0
    other = UpdateGuard(torch.device("cpu"), 4.0)
    other.load_state_dict(guard.state_dict())
    assert all(torch.equal(v, guard.state_dict()[k]) for k, v in other.state_dict().items())
    early = UpdateGuard(torch.device("cpu"), 4.0)
    for norm in (1.0, 100.0, 3.0):
        early.check(torch.tensor(norm))
    assert int(early.skipped) == 0, "a mean of a few means nothing yet"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 6, "accumulate": 4}, "cannot be cut into accumulate=4"),
        ({"sequence_length": 48, "initial_length": 32}, "does not double to sequence_length 48"),
        ({"initial_length": 32, "length_warmup": 0.0}, "length_warmup is 0.0"),
        ({"initial_length": 32, "stateful": True}, "which stateful must not"),
        ({"stateful": True, "activation_checkpointing": True}, "exclude each other"),
        ({"lora_rank": 4}, "init_from is empty"),
        ({"fresh_rows": 0.1}, "is for stateful rows"),
        ({"fresh_rows": 1.5, "stateful": True}, "a fraction of the rows"),
        ({"recompute_selection": True, "activation_checkpointing": True}, "no effect with activation_checkpointing"),
        ({"recompute_selection": True, "parallel": "ddp", "context_parallel": 2}, "no effect with context_parallel"),
        ({"validation_fraction": 0.1, "heldout_files": ["a"]}, "drop it, or heldout_files"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"spike_factor": 0.5}, "must be above 1"),
        ({"export_only": True}, "add resume=true"),
        ({"format": "csv"}, "choose one of auto, text, jsonl"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)
