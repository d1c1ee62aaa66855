"""`mambakit generate --output x.wav`: from recordings to a model to a sound."""

from __future__ import annotations

import json
import wave

import numpy as np
import pytest
from rich.console import Console

from mambakit import cli
from mambakit.training.config import TrainConfig
from mambakit.training.data.audio import mu_law_decode, read_wav, write_wav
from mambakit.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore")
RATE = 4000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Trained until it continues a sawtooth of period 8."""
    folder = tmp_path_factory.mktemp("sound")
    saw = np.tile(np.linspace(-0.8, 0.8, 8), 400)
    write_wav(folder / "saw.wav", saw, RATE)
    config = TrainConfig(
        train_files=[str(folder / "saw.wav")], out=str(folder / "run"), sequence_length=64, batch_size=8, steps=60,
        hidden_size=16, num_hidden_layers=1, learning_rate=1e-2, autocast="float32", checkpoint_every=0, log_every=60,
        stateful=True, respect_documents=True,
    )  # fmt: skip
    train(config, Console(quiet=True))
    return folder


def heard(path):
    with wave.open(str(path)) as file:
        shape = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767, shape


def test_a_sound_goes_on(model, tmp_path):
    start = tmp_path / "start.wav"
    write_wav(start, np.tile(np.linspace(-0.8, 0.8, 8), 12), RATE)
    out = tmp_path / "out.wav"
    command = ["generate", "--model", str(model / "run"), "--greedy", "--file", str(start), "--output", str(out)]
    assert cli.main([*command, "--max-new-tokens", "64"]) == 0
    samples, shape = heard(out)
    assert shape == (RATE, 1, 2)
    assert len(samples) == 96 + 64
    np.testing.assert_allclose(samples, np.tile(np.linspace(-0.8, 0.8, 8), 20), atol=0.03)  # mu-law's step at 0.8


def test_from_nothing_two_seconds_at_the_rate_of_the_recordings(model, tmp_path, capsys):
    assert json.loads((model / "run" / "preprocessor_config.json").read_text())["sampling_rate"] == RATE
    out = tmp_path / "out.wav"
    assert cli.main(["generate", "--model", str(model / "run"), "--output", str(out), "--seed", "1"]) == 0
    samples, _ = heard(out)
    assert 0 < len(samples) <= 2 * RATE
    assert f"s of sound at {RATE} Hz" in capsys.readouterr().err


def test_written_and_read_again(tmp_path):
    codes = np.arange(256, dtype=np.uint8)
    write_wav(tmp_path / "a.wav", mu_law_decode(codes), RATE)
    again = b"".join(piece.data for piece in read_wav(tmp_path / "a.wav", RATE))
    # The steps near zero are finer than 16 bits.
    assert np.abs(np.frombuffer(again, np.uint8).astype(int) - codes).max() <= 1


@pytest.mark.parametrize(("extra", "said"), [
    (["--output", "x.mp3"], "a name that ends with .wav"),
    (["--output", "x.wav", "hello"], "--file start.wav, in place of text"),
    (["--output", "x.wav", "--json"], "--json is for text"),
    (["--output", "x.wav", "--regex", "a"], "--regex is for text"),
    (["--output", "x.wav", "--draft-tokens", "3"], "--draft-tokens is for text"),
    (["--output", "x.wav", "--num-return-sequences", "2"], "one sound"),
    (["--output", "x.wav", "--file", "none.wav"], "there is no WAV file none.wav"),
    (["--sample-rate", "8000", "x"], "--sample-rate has no effect without --output"),
    (["--output", "x.wav"], "this model's tokens are not the bytes"),
])  # fmt: skip
def test_refused(extra, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", *extra]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x.wav").exists()


def test_a_rate_that_nobody_noted(model, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(model / "run", copy)
    (copy / "preprocessor_config.json").unlink()
    out = tmp_path / "o.wav"
    command = ["generate", "--model", str(copy), "--output", str(out), "--max-new-tokens", "9"]
    assert cli.main(command) == 2
    assert "give --sample-rate" in capsys.readouterr().err
    assert cli.main([*command, "--sample-rate", "8000"]) == 0
    assert heard(out)[1][0] == 8000


def test_conversion_keeps_the_rate(model, tmp_path):
    target = tmp_path / "converted"
    assert cli.main(["convert", str(model / "run"), str(target), "--to", "original"]) == 0
    assert (target / "preprocessor_config.json").is_file()
