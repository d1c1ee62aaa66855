"""Sound as tokens: PCM WAV files to 8 bit mu-law codes, a byte for every sample."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mambakit.opening import open_binary
from mambakit.training.data.files import Piece
from mambakit.writing import replacing

_FRAMES = 1 << 18
_MU = 255.0


def mu_law_encode(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] to codes 0 to 255, uint8: the continuous formula of G.711's mu-law, rounded."""
    x = np.clip(np.asarray(samples, dtype=np.float64), -1.0, 1.0)
    y = np.sign(x) * np.log1p(_MU * np.abs(x)) / np.log1p(_MU)
    return np.rint((y + 1) / 2 * 255).astype(np.uint8)


def mu_law_decode(codes: np.ndarray) -> np.ndarray:
    """Codes 0 to 255 to samples in [-1, 1], float64."""
    y = np.asarray(codes, dtype=np.float64) / 255 * 2 - 1
    return np.sign(y) * np.expm1(np.abs(y) * np.log1p(_MU)) / _MU


def read_wav(path: Path, sample_rate: int) -> Iterator[Piece]:
    """The file as one document of mu-law codes; channels are averaged.

    Args:
        sample_rate: Hz that the file must have; 0: any.

    Raises:
        ValueError: not PCM, or of another rate.
    """
    with open_binary(path) as raw, _open(path, raw) as sound:
        rate, left = sound.getframerate(), sound.getnframes()
        if sample_rate and rate != sample_rate:
            raise ValueError(
                f"{path} has {rate} samples a second, expected {sample_rate}: a model is trained on one rate; convert "
                "it "
                f"(ffmpeg -i {path.name} -ar {sample_rate} out.wav) or set sample_rate"
            )
        while left > 0:
            frames = sound.readframes(min(left, _FRAMES))
            if not frames:
                raise ValueError(f"{path} ends {left:,} frames before the end that its header says; copy it again")
            samples = _samples(frames, sound.getsampwidth()).reshape(-1, sound.getnchannels()).mean(1)
            left -= len(samples)
            yield Piece(mu_law_encode(samples).tobytes(), left <= 0)


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    """Samples in [-1, 1] as a WAV file of one channel, 16 bits a sample."""
    pcm = np.rint(np.clip(samples, -1.0, 1.0) * 32767).astype("<i2")
    with replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm.tobytes())


def wav_rate(path: Path) -> int:
    """Samples a second of a WAV file, in Hz."""
    with open_binary(path) as raw, _open(path, raw) as sound:
        return sound.getframerate()


def _open(path: Path, raw) -> wave.Wave_read:
    try:
        return wave.open(raw, "rb")
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"{path} is not a PCM WAV file ({error}); convert it: ffmpeg -i {path.name} -c:a pcm_s16le out.wav"
        ) from error


def _samples(frames: bytes, width: int) -> np.ndarray:
    """Little-endian PCM of 1 (unsigned), 2, 3 or 4 bytes to float64 in [-1, 1)."""
    if width == 1:
        return (np.frombuffer(frames, dtype=np.uint8).astype(np.float64) - 128) / 128
    if width == 3:  # into the upper three bytes of 32 bit integers
        wide = np.zeros((len(frames) // 3, 4), dtype=np.uint8)
        wide[:, 1:] = np.frombuffer(frames, dtype=np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(frames, dtype=f"<i{width}") / 2.0 ** (8 * width - 1)
