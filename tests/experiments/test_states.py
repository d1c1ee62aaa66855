"""The experiments of states, tiny, on the CPU: they run whole, and their parts are what they say."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest
import torch

from experiments import cartpole, recurrent, state_tuning
from tests.models.tiny import TEXT, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_poles_are_gymnasiums():
    gymnasium = pytest.importorskip("gymnasium")
    env = gymnasium.make("CartPole-v1").unwrapped
    draws = torch.Generator().manual_seed(0)
    for seed in range(5):
        env.reset(seed=seed)
        state, fell = torch.tensor(env.state, dtype=torch.float64), False
        while not fell:
            action = int(torch.randint(0, 2, (1,), generator=draws))
            _, _, fell, _, _ = env.step(action)
            state = cartpole.dynamics(state[None], torch.tensor([action]))[0]
            torch.testing.assert_close(state, torch.tensor(env.state, dtype=torch.float64), rtol=1e-6, atol=1e-7)
            far, steep = abs(float(state[0])) > cartpole._FARTHEST, abs(float(state[2])) > cartpole._STEEPEST
            assert fell == (far or steep)


def test_poles_begin_anew_and_are_cut():
    poles = cartpole.CartPoles(3, torch.device("cpu"), torch.Generator().manual_seed(0))
    ended = torch.zeros(3, dtype=torch.int64)
    for _ in range(120):
        fell, over = poles.step(torch.zeros(3, dtype=torch.int64))
        assert torch.equal(fell, over)
        assert torch.equal(poles.steps[over], torch.zeros(int(over.sum()), dtype=torch.int64))
        ended += over
    lengths = poles.take_lengths()
    assert len(lengths) == int(ended.sum()) > 20
    assert sum(lengths) <= 3 * 120
    poles.steps[:] = cartpole.LONGEST - 1
    poles.state[:] = 0
    fell, over = poles.step(torch.zeros(3, dtype=torch.int64))
    assert over.all()
    assert not fell.any()


def test_advantages_are_the_sums_they_abbreviate():
    torch.manual_seed(0)
    batch = {"reward": torch.rand(2, 6), "value": torch.rand(2, 6), "ended": torch.rand(2, 6) < 0.3}
    after = torch.rand(2)
    found = recurrent.advantages(batch, after)
    values = torch.cat([batch["value"], after[:, None]], 1)
    for row in range(2):
        for t in range(6):
            total, weight = 0.0, 1.0
            for k in range(t, 6):
                going = 0.0 if batch["ended"][row, k] else 1.0
                total += weight * float(batch["reward"][row, k] + 0.99 * going * values[row, k + 1] - values[row, k])
                weight *= 0.99 * 0.95 * going
            assert float(found[row, t]) == pytest.approx(total, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", [recurrent.MAMBA, recurrent.LSTM])
def test_both_nets_are_reset_where_episodes_begin(kind):
    torch.manual_seed(0)
    net = recurrent.Net(kind, 2, 8, 1, (3,))
    x, starts = torch.randn(2, 9, 2), torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 4] = starts[1, 7] = starts[1, 0] = True
    (y,), _ = net(x, None, starts)
    for row, cut in ((0, 4), (1, 7)):
        for part in (slice(0, cut), slice(cut, 9)):
            (alone,), _ = net(x[row : row + 1, part])
            torch.testing.assert_close(y[row, part], alone[0], rtol=1e-4, atol=1e-5)


def test_recurrent(tmp_path):
    file = tmp_path / "record.json"
    series = ["--steps", "4", "--batch", "2", "--length", "40"]
    poles = ["--updates", "2", "--poles", "4", "--horizon", "8", "--epochs", "1"]
    common = ["--seeds", "0", "--rates", "3e-3", "--width", "8", "--layers", "1", "--points", "2", "--json", str(file)]
    recurrent.main([*common, *series, *poles])
    results = json.loads(file.read_text())["results"]
    assert [row["task"] for row in results["summary"]] == ["series", "series", "cartpole", "cartpole"]
    for a, b in (results["summary"][:2], results["summary"][2:]):
        assert a["parameters"] == pytest.approx(b["parameters"], rel=0.1)
    assert {row["model"] for row in results["series"]} == {recurrent.MAMBA, recurrent.LSTM}
    recurrent.main(["--plot", str(tmp_path / "curves.png"), "--json", str(file)])
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_open_frames_are_frames():
    torch.manual_seed(0)
    genome = torch.randint(0, 4, (30_000,))
    found = state_tuning.open_frames(genome, 90, 90)
    assert len(found) > 20
    codons = found.view(len(found), -1, 3) @ torch.tensor([16, 4, 1])
    assert (codons[:, 0] == 14).all()  # ATG
    assert not torch.isin(codons, torch.tensor([48, 50, 56])).any()  # TAA, TAG, TGA
    with pytest.raises(ValueError, match="--shortest"):
        state_tuning.open_frames(genome[:300], 90, 3000)


def test_state_tuning(tmp_path):
    save_tiny(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    (tmp_path / "dna").mkdir()
    torch.manual_seed(0)
    for name, opener in (("klebsiella_mgh78578.fna.xz", lzma.open), ("ecoli_536.fna.gz", gzip.open)):
        letters = "".join("ACGT"[i] for i in torch.randint(0, 4, (8000,)).tolist())
        with opener(tmp_path / "dna" / name, "wt", encoding="ascii") as genome:
            genome.write(f">record\n{letters}\n")
    file = tmp_path / "record.json"
    common = ["--seeds", "0", "--steps", "6", "--batch", "4", "--points", "2", "--checked", "4", "--json", str(file)]
    common += ["--state-rates", "1e-1", "1e-2", "--lora-rates", "1e-2", "--prompts", "16", "--data", str(tmp_path)]
    text = ["--model", str(tmp_path / "base"), "--text", "text.txt", "--length", "32"]
    dna = ["--dna-length", "12", "--shortest", "12", "--dna-width", "16", "--dna-layers", "1", "--base-steps", "2"]
    state_tuning.main([*common, *text, *dna, "--base-rows", "2"])
    results = json.loads(file.read_text())["results"]
    assert [(row["task"], row["model"]) for row in results["summary"]] == [
        (task, model) for task in ("text", "dna") for model in ("base", "prompt", "state", "lora")
    ]
    text = {row["model"]: row for row in results["summary"][:4]}
    assert text["state"]["bits"] < text["base"]["bits"]
    assert text["state"]["learned"] == pytest.approx(text["lora"]["learned"], rel=0.5)
    assert {trial["model"] for trial in results["tuning"]} == {"state"}
    state_tuning.main(["--plot", str(tmp_path / "curves.png"), "--json", str(file)])
    assert (tmp_path / "curves.png").stat().st_size > 1000
