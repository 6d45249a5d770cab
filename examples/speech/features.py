"""From a WAV file to the log-mel features that the keyword spotter reads.

Training and the front end share this one file, so that what the model hears in production is
what it was trained on. NumPy and the standard library only.
"""

from __future__ import annotations

import wave
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

SAMPLE_RATE_HZ = 16_000
HOP = 160  # samples: 10 ms
WINDOW = 400  # samples: 25 ms
FFT = 512
BANDS = 40
LOWEST_HZ, HIGHEST_HZ = 60.0, 7_600.0
FLOOR_DB = 80.0  # quieter than this below the loudest point of the clip counts as silence
LONGEST_S = 2.0  # one word and some silence; what the model was trained on
_GRID = 256.0
_SINC_ZEROS = 16


class UnreadableAudio(ValueError):
    """The file is not audio that can be read here; the message says what to do."""


def features_of(source: str | Path | BinaryIO) -> Floats:
    """Read a WAV file into features [frames, 40]; raises UnreadableAudio."""
    samples, rate = read_wav(source)
    return log_mel(loudest_span(resample(samples, rate)))


def read_wav(source: str | Path | BinaryIO) -> tuple[Floats, int]:
    """Read PCM of 8, 16, 24 or 32 bits as mono samples in [-1, 1] and their rate in Hz.

    Channels are averaged. Raises UnreadableAudio for anything else than a PCM WAV file with sound in it.
    """
    name = str(source) if isinstance(source, str | Path) else "the audio"
    try:
        with wave.open(str(source) if isinstance(source, Path) else source, "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except OSError as error:
        raise UnreadableAudio(
            f"{name} cannot be read ({error.strerror or error}); check the path."
        ) from error
    except (wave.Error, EOFError) as error:
        reason = str(error) or "it ends too early"
        raise UnreadableAudio(
            f"{name} is not a PCM WAV file ({reason}); convert it with "
            "`ffmpeg -i INPUT -ac 1 -ar 16000 -c:a pcm_s16le OUTPUT.wav`."
        ) from error
    if rate < 1_000 or width > 4:
        raise UnreadableAudio(
            f"{name} has {rate} samples a second of {8 * width} bits; record at 8 kHz or more."
        )
    whole = len(data) - len(data) % (channels * width)  # a truncated file may end inside a sample
    if whole == 0:
        raise UnreadableAudio(f"{name} has no sound in it; record it again.")
    return _pcm(data[:whole], width).reshape(-1, channels).mean(axis=1, dtype=np.float32), rate


def _pcm(data: bytes, width: int) -> Floats:
    """Interleaved little-endian PCM as floats in [-1, 1]; WAV's 8-bit samples alone are unsigned."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128.0) / 128.0
    if width == 3:
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return (padded.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    return (np.frombuffer(data, f"<i{width}") / 2.0 ** (8 * width - 1)).astype(np.float32)


def resample(samples: Floats, rate: int, to: int = SAMPLE_RATE_HZ) -> Floats:
    """Band-limited resampling by a Hann-windowed sinc, one filter per phase of the rational ratio."""
    if rate == to or len(samples) == 0:
        return samples
    up, down = to // gcd(rate, to), rate // gcd(rate, to)
    filters = _phase_filters(up, down)
    half = filters.shape[1] // 2
    positions = np.arange(-(-len(samples) * up // down)) * down
    padded = np.pad(samples, (half, half))
    windows = np.lib.stride_tricks.sliding_window_view(padded, filters.shape[1])
    centre, phase = np.divmod(positions, up)
    result: Floats = np.einsum("ij,ij->i", windows[centre], filters[phase])
    return result


@lru_cache(maxsize=8)
def _phase_filters(up: int, down: int) -> Floats:
    """Filters [up, taps]: row p interpolates at p/up of a sample after the centre tap."""
    cutoff = min(1.0, up / down)
    half = int(np.ceil(_SINC_ZEROS / cutoff))
    # The last window of the padded signal starts half + 1 taps before its end, hence an odd count.
    taps = np.arange(-half, half + 1)[None, :] - (np.arange(up) / up)[:, None]
    window = np.cos(np.clip(taps / (half + 1), -1, 1) * np.pi / 2) ** 2
    filters = cutoff * np.sinc(cutoff * taps) * window
    return (filters / filters.sum(axis=1, keepdims=True)).astype(np.float32)


def loudest_span(samples: Floats, seconds: float = LONGEST_S) -> Floats:
    """The loudest stretch of at most `seconds` of a longer 16 kHz recording."""
    length = int(seconds * SAMPLE_RATE_HZ)
    if len(samples) <= length:
        return samples
    energy = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    start = int(np.argmax(energy[length:] - energy[:-length]))
    # Centre the sound: the stretches that hold all of it are equally loud, and argmax takes the first.
    loud = np.flatnonzero(samples[start : start + length] ** 2 > 1e-3 * np.max(samples**2))
    if len(loud):
        start += int(loud[0] + loud[-1]) // 2 - length // 2
    start = min(max(start, 0), len(samples) - length)
    return samples[start : start + length]


def log_mel(samples: Floats) -> Floats:
    """Log-mel energies [frames, 40] of 16 kHz samples, one frame each 10 ms; loudness does not matter.

    Decibels below the loudest point of the clip, cut at FLOOR_DB and scaled to [-2, 2]. Values lie on a grid
    of 1/256 (0.08 dB), which nothing hears and which makes stored sets a third smaller.
    """
    samples = samples - samples.mean()
    if len(samples) < WINDOW:
        samples = np.pad(samples, (0, WINDOW - len(samples)))
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]
    spectrum = np.fft.rfft(frames * np.hanning(WINDOW).astype(np.float32), FFT)
    power = spectrum.real**2 + spectrum.imag**2
    # Not `@`: for so small a product the threads of BLAS cost ten times what they save.
    energy = np.einsum("tf,bf->tb", power.astype(np.float64), mel_filters())
    decibels = 10.0 * np.log10(np.maximum(energy, 1e-10))
    relative = np.maximum(decibels - max(decibels.max(), -60.0), -FLOOR_DB)  # digital silence stays silent
    scaled = relative / (FLOOR_DB / 4) + 2.0
    return (np.round(scaled * _GRID) / _GRID).astype(np.float32)


@lru_cache(maxsize=1)
def mel_filters() -> npt.NDArray[np.float64]:
    """Triangular filters [40, 257], evenly spaced in mel (2595 log10(1 + f/700), O'Shaughnessy 1987)."""
    lowest, highest = (2595.0 * np.log10(1.0 + hz / 700.0) for hz in (LOWEST_HZ, HIGHEST_HZ))
    edges = 700.0 * (10.0 ** (np.linspace(lowest, highest, BANDS + 2) / 2595.0) - 1.0)
    bins = np.fft.rfftfreq(FFT, 1.0 / SAMPLE_RATE_HZ)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(np.minimum(rising, falling), 0.0)
