"""Rooms, noises and pauses around a clean utterance, so that the spotter meets them in training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from examples.speech.features import LONGEST_S, SAMPLE_RATE_HZ, Floats, resample

CLEAN_SHARE = 0.25  # of the clips get next to no noise
NOISIEST_DB, QUIETEST_DB = 5.0, 30.0  # signal-to-noise ratio of the others, uniform in decibels
_ROOM_SHARE = 0.35
_THROATS_HZ = (14_000, 15_000, 16_000, 17_000, 18_000)


def trim(samples: Floats) -> Floats:
    """Cut the silence that the synthesizer leaves around a word (40 dB below its peak)."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


def other_throat(samples: Floats, rng: np.random.Generator) -> Floats:
    """The word as a larger or smaller person says it: pitch, formants and speed move together by up to 12 %.

    It multiplies the speakers of the training set; the test set has only real ones.
    """
    return resample(samples, _THROATS_HZ[rng.integers(len(_THROATS_HZ))])


def augment(
    word: Floats, babble: Sequence[Floats], rng: np.random.Generator, pause_s: float = 0.35
) -> Floats:
    """One noisy recording of a word, with up to `pause_s` of room sound on either side.

    `babble` are other utterances, murmured in the background of some clips.
    """
    speech = _room(word, rng) if rng.random() < _ROOM_SHARE else word
    before, after = (rng.uniform(0.02, pause_s, 2) * SAMPLE_RATE_HZ).astype(int)
    speech = np.pad(speech, (before, after))[: int(LONGEST_S * SAMPLE_RATE_HZ)]
    ratio_db = 45.0 if rng.random() < CLEAN_SHARE else rng.uniform(NOISIEST_DB, QUIETEST_DB)
    noise = background(len(speech), babble, rng)
    gain = _rms(word) / (_rms(noise) * 10.0 ** (ratio_db / 20.0))
    return (speech + gain * noise).astype(np.float32)


def background(length: int, babble: Sequence[Floats], rng: np.random.Generator) -> Floats:
    """Noise of one kind: coloured, mains hum, or other voices."""
    kind = rng.random()
    if kind < 0.15 and babble:
        return _murmur(length, babble, rng)
    if kind < 0.25:
        return _hum(length, rng)
    # Power falling as f^-colour: 0 is white, 1 pink, 2 brown.
    return _coloured(length, rng.uniform(0.0, 2.0), rng)


def _coloured(length: int, colour: float, rng: np.random.Generator) -> Floats:
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequency = np.fft.rfftfreq(length, 1.0 / SAMPLE_RATE_HZ)
    shape = np.maximum(frequency, 30.0) ** (-colour / 2)
    return np.fft.irfft(spectrum * shape, length).astype(np.float32)


def _hum(length: int, rng: np.random.Generator) -> Floats:
    time = np.arange(length) / SAMPLE_RATE_HZ
    base = float(rng.choice([50.0, 60.0])) * rng.uniform(0.98, 1.02)
    tones = [
        np.sin(2 * np.pi * (base * harmonic * time + rng.random())) / harmonic for harmonic in range(1, 9)
    ]
    noise = _coloured(length, 1.0, rng)
    return (np.sum(tones, axis=0) + noise / _rms(noise) * 0.2).astype(np.float32)


def _murmur(length: int, babble: Sequence[Floats], rng: np.random.Generator) -> Floats:
    mixed = np.zeros(length, np.float32)
    for _ in range(6):
        voice = np.resize(babble[rng.integers(len(babble))], length)
        mixed += np.roll(voice / (_rms(voice) + 1e-6), int(rng.integers(length)))
    return mixed


def _room(samples: Floats, rng: np.random.Generator) -> Floats:
    """Reverberation: an impulse and an exponentially fading tail of noise (RT60 of 0.1 to 0.4 s)."""
    fade_s = rng.uniform(0.1, 0.4)
    time = np.arange(int(fade_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    tail = rng.standard_normal(len(time)) * 10.0 ** (-3.0 * time / fade_s)
    tail *= 10.0 ** (-rng.uniform(6.0, 18.0) / 20.0) / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    size = len(samples) + len(tail)
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(tail, size), size)
    return wet.astype(np.float32)


def _rms(samples: Floats) -> float:
    return float(np.sqrt(np.mean(samples.astype(np.float64) ** 2))) + 1e-9
