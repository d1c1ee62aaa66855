"""Each experiment, whole but tiny, on the CPU: it learns, says how far it got, and is the same for the same seed."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch

from experiments import audio, genomics, harness, induction_heads, language, plot, runner, selective_copying
from experiments.contenders import make_mamba
from mambakit.training.optimizer import set_learning_rate


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: several threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved(results) -> dict:
    return json.loads(results.path.read_text(encoding="utf-8"))


def plotted(folder) -> str:
    """The tables made of a folder's results; the picture is there too."""
    plot.main([str(folder), "--out", str(folder / "docs")])
    assert [path.stat().st_size > 1000 for path in (folder / "docs").glob("*.png")] == [True]
    return (folder / "docs" / "results.md").read_text(encoding="utf-8")


COPYING = [
    "--lengths", "8", "12", "--shares", "0.8", "0.2", "--memorize", "2", "--vocabulary", "6", "--hidden-size", "32",
    "--batch-size", "16", "--batch-tokens", "1", "--learning-rate", "1e-2", "--evaluation-rows", "128", "--check-every",
    "25",
]  # fmt: skip


def test_selective_copying_is_learned_and_needs_selection(common, tmp_path):
    results = selective_copying.main([*common, *COPYING, "--steps", "250", "--cooldown", "50", "--seeds", "0"])
    record = saved(results)
    selective, invariant = record["runs"]
    assert selective["model"] == "selective"
    assert selective["accuracy"] > 0.95, selective["stages"]
    assert invariant["accuracy"] < selective["accuracy"]
    assert [stage["length"] for stage in selective["stages"]] == [8, 12, 12]
    assert record["complete"]
    text = plotted(tmp_path)
    assert f"{100 * selective['accuracy']:.2f}" in text
    assert "cut it short" not in text


def test_selective_copying_is_the_same_for_the_same_seed(common):
    short = [*common, *COPYING, "--steps", "20", "--cooldown", "5", "--seeds", "3", "--models", "selective"]
    first, second = (saved(selective_copying.main(short))["runs"][0] for _ in range(2))
    assert first["curve"] == second["curve"]
    assert first["accuracy"] == second["accuracy"]


def test_selective_copying_rows():
    tokens, answers = selective_copying.draw_rows(5, 30, 4, 16, torch.device("cpu"))
    assert tokens.shape == (5, 34)
    assert (tokens[:, 30:] == 15).all()
    for row, answer in zip(tokens[:, :30], answers, strict=True):
        assert row[row != 0].tolist() == answer.tolist()
        assert set(answer.tolist()) <= set(range(1, 15))


def test_a_budget_stops_a_run_and_says_so(common):
    results = selective_copying.main([*common, *COPYING, "--steps", "1000000", "--budget-seconds", "4"])
    record = saved(results)
    assert not record["complete"]
    assert record["seconds"] < 20
    assert any(stage["ended"] == "budget" for run in record["runs"] for stage in run["stages"])


INDUCTION = [
    "--first-length", "6", "--length", "16", "--vocabulary", "4", "--hidden-size", "32", "--learning-rate", "1e-2",
    "--check-every", "50", "--advance-at", "0.9", "--first-power", "4", "--last-power", "7", "--evaluation-rows", "64",
    "--chunk-tokens", "700",
]  # fmt: skip


def test_induction_heads(common, tmp_path, monkeypatch):
    rates = []

    def set_rate(optimizer, value):
        rates.append(value)
        set_learning_rate(optimizer, value)

    monkeypatch.setattr(harness, "set_learning_rate", set_rate)
    record = saved(
        induction_heads.main([*common, *INDUCTION, "--steps", "150", "--stage-steps", "200", "--seeds", "1"])
    )
    run = record["runs"][0]
    assert run["curve"][-1]["accuracy"] > 0.9
    assert [stage["length"] for stage in run["stages"]] == [6, 12, 16]
    assert [stage["ended"] for stage in run["stages"]] == ["check", "check", "steps"]
    assert sum(stage["steps"] for stage in run["stages"]) == run["steps"] == run["curve"][-1]["step"]
    assert run["stages"][-1]["steps"] == 150
    assert [p["length"] for p in run["accuracies"]] == [16, 32, 64, 128]
    assert run["accuracies"][0]["accuracy"] > 0.9
    assert record["complete"]
    assert re.search(r"2\^4 \(\d+ rows\) to 2\^7 \(\d+\)", plotted(tmp_path))
    # The rate warms up, is constant, and falls to 0 at the last length.
    rates = rates[-run["steps"] :]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[-151] == rates[-150] == pytest.approx(1e-2)
    assert rates[-75] == pytest.approx(5e-3)
    assert rates[-1] == pytest.approx(1e-2 / 150)


def test_induction_heads_go_on_after_a_length_that_was_not_learned(common):
    line = ["--steps", "3", "--stage-steps", "2", "--last-power", "4", "--seeds", "0"]
    record = saved(induction_heads.main([*common, *INDUCTION, *line]))
    assert [(s["steps"], s["ended"]) for s in record["runs"][0]["stages"]] == [(2, "steps"), (2, "steps"), (3, "steps")]
    assert record["complete"]


def test_compilation_takes_no_time_from_induction_heads_and_a_cut_is_recorded(common, monkeypatch):
    compiled = induction_heads.compile_kernels

    def slowly(settings):
        compiled(settings)
        time.sleep(4)

    monkeypatch.setattr(induction_heads, "compile_kernels", slowly)
    line = ["--steps", "1", "--stage-steps", "1000000", "--advance-at", "1.1", "--seeds", "0", "--budget-seconds", "8"]
    record = saved(induction_heads.main([*common, *INDUCTION, *line]))
    run = record["runs"][0]
    assert [(stage["length"], stage["ended"]) for stage in run["stages"]] == [(6, "budget")]  # the rest is left out
    assert run["stages"][0]["steps"] > 10
    assert run["cut_short"]
    assert not record["complete"]
    assert record["seconds"] < 20


def test_induction_heads_refuses_a_first_length_beyond_the_last(common):
    with pytest.raises(ValueError, match="first_length 32"):
        induction_heads.main([*common, "--first-length", "32", "--length", "16"])


def test_induction_rows_and_chunks_equal_the_whole(common):
    tokens, answers = induction_heads.draw_rows(200, 20, 7, torch.device("cpu"))
    places = (tokens == 7).nonzero()
    first = places[places[:, 1] < 19]
    assert first.shape[0] == 200  # one trigger, besides the last
    assert set(first[:, 1].tolist()) == set(range(18))
    assert (tokens[:, -1] == 7).all()
    assert (tokens.gather(1, first[:, 1:] + 1).squeeze(1) == answers).all()
    # In chunks of any size the accuracy is that of whole rows.
    torch.manual_seed(0)
    model = make_mamba(8, 16, 2).eval()
    counts = []
    for chunk in ("64", "1300"):
        settings = induction_heads.parse(
            induction_heads.InductionHeads,
            ["--vocabulary", "7", "--evaluation-rows", "50", "--chunk-tokens", chunk],
            "",
        )
        counts.append(induction_heads.accuracy_at(model, 100, settings, 0))
    assert counts[0] == counts[1]


LANGUAGE = [
    "--hidden-size", "32", "--mamba-layers", "2", "--head-size", "16", "--length", "32", "--batch-size", "4",
    "--validation-tokens", "300", "--evaluations", "3",
]  # fmt: skip


def test_language(common, tmp_path):
    cache = ["--tokens-cache", str(tmp_path / "tokens.npz")]
    line = [*common, *cache, *LANGUAGE, "--steps", "30", "--learning-rates", "3e-3", "1e-2", "--seeds", "0", "1"]
    record = saved(language.main(line))
    assert [(run["model"], run["seed"]) for run in record["runs"]] == [
        ("mamba", 0), ("transformer++", 0), ("mamba", 1), ("transformer++", 1),
    ]  # fmt: skip
    assert len(record["tuning"]) == 4
    for run in record["runs"]:
        bits = [point["heldout_bits_per_character"] for point in run["curve"]]
        assert len(bits) == 3
        assert bits[-1] < bits[0]
        assert run["curve"][-1]["tokens"] == 30 * 4 * 32
    assert record["complete"]
    assert "held-out bits per character" in plotted(tmp_path)


def test_language_scores_every_token_once(common, tmp_path):
    settings = language.parse(
        language.Language, [*common, *LANGUAGE, "--tokens-cache", str(tmp_path / "t.npz"), "--steps", "1"], ""
    )
    text = language.load_text(settings, torch.device("cpu"))
    run = language.Run("mamba", 0, 1e-3, text, settings)
    tokens = text.heldout[:150]
    nats = language.total_nats(run.model, tokens, 32, 2)
    expected = 0.0
    for start in range(0, 149, 32):
        row = tokens[start : min(start + 33, 150)].long()[None]
        logits = run.model(row[:, :-1], use_cache=False).logits[0]
        expected += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    assert nats == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="no budget"):
        language.parse(language.Language, [], "")


GENOMICS = [
    "--hidden-size", "32", "--mamba-layers", "2", "--head-size", "16", "--lengths", "32", "64", "128",
    "--shares", "0.5", "0.25", "0.25", "--transformer-length", "64", "--batch-tokens", "256", "--contexts", "32", "64",
    "256",
    "--evaluation-tokens", "2048", "--validation-tokens", "300", "--markov-order", "4",
    "--learning-rates", "3e-3", "1e-2",
]  # fmt: skip


def test_genomics(common):
    record = saved(genomics.main([*common, *GENOMICS, "--steps", "60", "80", "--seeds", "0"]))
    mamba, transformer = record["runs"]
    assert [p["context"] for p in mamba["perplexities"]] == [32, 64, 256]
    assert [p["context"] for p in transformer["perplexities"]] == [32, 64]
    assert mamba["perplexities"][-1]["perplexity"] < 3.9  # uniform is 4
    assert record["markov"]["perplexity"] < record["markov"]["perplexity_of_order"][0] < 4.1
    trials = {(t["learning_rate"], t["steps"]): t["validation_loss"] for t in record["tuning"] if t["model"] == "mamba"}
    rate = min((3e-3, 1e-2), key=lambda rate: trials[rate, 60])
    assert trials.keys() == {(3e-3, 60), (1e-2, 60), (rate, 80)}
    assert (mamba["learning_rate"], mamba["steps"]) == (rate, min((60, 80), key=lambda steps: trials[rate, steps]))
    assert mamba["tokens"] == mamba["steps"] * 256
    assert mamba["by_position"][-1]["to"] == 256


def test_genomics_reads_both_strands_and_refuses_other_letters(data, tmp_path):
    genome = torch.tensor([0, 1, 2, 3, 3, 0, 2])  # ACGTTAG
    torch.manual_seed(0)
    inputs, targets = genomics.draw_rows(genome, 200, 7)
    seen = {tuple(row) for row in targets.tolist()}
    assert seen == {(0, 1, 2, 3, 3, 0, 2), (1, 3, 0, 0, 1, 2, 3)}  # and CTAACGT
    assert (inputs[:, 0] == genomics.START).all()
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    (tmp_path / "x.fna").write_text(">a\nACGTN\n", encoding="ascii")
    with pytest.raises(ValueError, match="'N'"):
        genomics.read_fasta(tmp_path / "x.fna")
    with pytest.raises(ValueError, match="--data"):
        genomics.read_fasta(tmp_path / "missing.fna")


AUDIO = [
    "--hidden-size", "32", "--layers", "2", "--length", "64", "--batch-size", "8", "--classifier-layers", "2",
    "--classifier-length", "256", "--classifier-batch-size", "32", "--frame", "8", "--samples", "2", "--sample-length",
    "20",
    "--learning-rate", "1e-2", "--seeds", "0",
]  # fmt: skip


def test_audio(common):
    record = saved(audio.main([*common, *AUDIO, "--steps", "60"]))
    classification, generation = record["runs"]
    assert classification["curve"][-1]["loss"] < 2.15  # the first is ln 10 = 2.30
    assert classification["accuracy"] >= 0.2  # chance is 0.1; there are 30 recordings to learn from
    assert classification["test_recordings"] == 50
    assert generation["bits_per_sample"] < 7.5  # uniform is 8
    assert len(generation["generated"]) == 2
    assert record["complete"]


def test_audio_codes_and_rows(data, common):
    codes = torch.arange(256)
    torch.testing.assert_close(audio.encode_mu_law(audio.decode_mu_law(codes)), codes)
    settings = audio.parse(audio.Audio, [*common, "--steps", "1"], "")
    train, test = audio.load_recordings(settings, torch.device("cpu"))
    assert (train.count, test.count) == (30, 50)
    rows = test.rows(torch.tensor([0, 49]), 300)
    assert (rows[0, : test.lengths[0]] == test.codes[: test.lengths[0]]).all()
    assert (rows[1, test.lengths[1].item() + 60 :] == audio.START).all()
    # The joined stream: a START before each recording, the recordings in order.
    stream = audio.Generation(train, audio.parse(audio.Audio, [*common, *AUDIO, "--steps", "1"], "")).stream
    assert (stream == audio.START).sum() == train.count + 1
    assert (stream[stream != audio.START] == train.codes).all()
    assert stream[1 : 1 + train.lengths[0]].tolist() == train.codes[: train.lengths[0]].tolist()


def test_run_all_in_turn_and_plots(common, data, tmp_path, monkeypatch):
    out = tmp_path / "all"

    def tiny(name, options, seconds, eager):
        flags = {"genomics": [*GENOMICS, "--steps", "8"], "audio": [*AUDIO, "--steps", "8"]}
        return [*common[:2], "--out", str(out), *common[4:], "--seeds", "0", *flags[name]]

    monkeypatch.setattr(runner, "arguments_of", tiny)
    line = ["--seconds", "200", "--out", str(out), "--device", "cpu", "audio", "genomics"]
    assert runner.main(line, method="forkserver") == 0
    assert sorted(path.name for path in out.iterdir()) == ["audio.json", "genomics.json"]
    docs = tmp_path / "docs"
    plot.main([str(out), "--out", str(docs)])
    assert sorted(path.name for path in docs.iterdir()) == ["audio.png", "audio.wav", "genomics.png", "results.md"]
    text = (docs / "results.md").read_text(encoding="utf-8")
    assert "Markov" in text
    assert "bits per sample" in text


def test_a_failing_experiment_is_reported(tmp_path, capfd):
    line = ["--seconds", "60", "--out", str(tmp_path), "--data", str(tmp_path), "--device", "cpu", "audio"]
    assert runner.main(line) == 1
    assert "speech_digits.npz" in capfd.readouterr().err


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit):
        runner.main(["--seconds", "60", "vision"])
    assert "vision" in capsys.readouterr().err
