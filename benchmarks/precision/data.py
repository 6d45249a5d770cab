"""Synthetic tasks that mean something: pictures, a language with hidden states, noisy oscillations.

Each has right answers, takes learning, and leaves samples near the border between answers, where
reduced precision shows first. All are drawn from a seed, so held-out data are simply other seeds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

SHAPES = ("disk", "ring", "square", "frame", "triangle", "cross", "star", "stripes", "checker", "moon")
GRID = 6


def _edges(distance: Array, sharpness: float) -> Array:
    """1 inside (distance below 0), 0 outside, soft in between."""
    return 1 / (1 + np.exp(np.clip(distance * sharpness, -30, 30)))


def _shape(kind: Array, x: Array, y: Array) -> Array:
    """The signed distance of each sample's own shape: below 0 inside. `kind` indexes `SHAPES`."""
    distance = np.empty(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for index in np.unique(kind):
        rows = kind == index
        distance[rows] = _DISTANCES[index](x[rows], y[rows])
    return distance


def _radius(x: Array, y: Array) -> Array:
    return np.hypot(x, y)


def _box(x: Array, y: Array) -> Array:
    return np.maximum(abs(x), abs(y))


def _triangle(x: Array, y: Array) -> Array:
    sides = np.pi / 6 + np.arange(3) * 2 * np.pi / 3
    return np.maximum.reduce([np.cos(t) * x + np.sin(t) * y for t in sides]) - 0.5


def _cross(x: Array, y: Array) -> Array:
    bars = np.maximum(abs(x) - 0.3, abs(y) - 1), np.maximum(abs(y) - 0.3, abs(x) - 1)
    return np.minimum(*bars)


_DISTANCES = (
    lambda x, y: _radius(x, y) - 0.9,
    lambda x, y: abs(_radius(x, y) - 0.75) - 0.18,
    lambda x, y: _box(x, y) - 0.8,
    lambda x, y: abs(_box(x, y) - 0.7) - 0.17,
    _triangle,
    _cross,
    lambda x, y: _radius(x, y) - 0.65 - 0.35 * np.cos(5 * np.arctan2(y, x)),
    lambda x, y: np.maximum(np.sin(7 * x) * 0.2, _radius(x, y) - 0.95),
    lambda x, y: np.maximum(np.sin(6 * x) * np.sin(6 * y) * 0.3, _box(x, y) - 0.9),
    lambda x, y: np.maximum(_radius(x, y) - 0.9, 0.75 - np.hypot(x - 0.45, y)),
)


def pictures(count: int, seed: int, pixels: int = 24) -> tuple[Array, Array]:
    """Coloured shapes, turned, moved, scaled, in noise: [count, 3, 24, 24] and their classes."""
    random = np.random.default_rng([seed, 1])
    kind = random.integers(0, len(SHAPES), count)
    axis = np.linspace(-1, 1, pixels, dtype=np.float32)
    turn, scale = random.uniform(0, 2 * np.pi, count), random.uniform(0.5, 0.85, count)
    move = random.uniform(-0.2, 0.2, (2, count))
    x0, y0 = (axis[None, None, :] - move[0][:, None, None]), (axis[None, :, None] - move[1][:, None, None])
    cos, sin = (f(turn)[:, None, None] / scale[:, None, None] for f in (np.cos, np.sin))
    inside = _edges(_shape(kind, cos * x0 + sin * y0, cos * y0 - sin * x0), 12.0)
    back, front = random.uniform(0, 1, (2, count, 3, 1, 1))
    # Colours that differ, though sometimes by little.
    front = back + np.sign(front - back) * np.maximum(abs(front - back), 0.35)
    picture = back + (front - back) * inside[:, None]
    picture += random.normal(0, 1, picture.shape) * random.uniform(0.02, 0.15, (count, 1, 1, 1))
    return (2 * picture - 1).astype(np.float32), kind


def crowds(count: int, seed: int, pixels: int = 48) -> tuple[Array, Array]:
    """Rings among disks, squares and triangles: [count, 1, 48, 48].

    Labels [count, 36] say in which cells of a 6 × 6 grid the middle of a ring lies.
    """
    random = np.random.default_rng([seed, 2])
    axis = np.linspace(0, GRID, pixels, dtype=np.float32)
    picture = random.uniform(-0.3, 0.3, (count, 1, 1)) + np.zeros((count, pixels, pixels))
    labels = np.zeros((count, GRID, GRID), np.int64)
    for _ in range(5):
        kind = np.array([1, 1, 0, 2, 4])[random.integers(0, 5, count)]
        middle = random.uniform(0.4, GRID - 0.4, (2, count))
        turn, size = random.uniform(0, 2 * np.pi, count), random.uniform(0.5, 0.8, count)
        x0, y0 = (
            axis[None, None, :] - middle[0][:, None, None],
            axis[None, :, None] - middle[1][:, None, None],
        )
        cos, sin = (f(turn)[:, None, None] / size[:, None, None] for f in (np.cos, np.sin))
        inside = _edges(_shape(kind, cos * x0 + sin * y0, cos * y0 - sin * x0), 8.0)
        shade = random.choice([-1.0, 1.0], count) * random.uniform(0.4, 1.0, count)
        there = random.random(count) < 0.8
        picture += inside * (shade * there)[:, None, None]
        rings = there & (kind == 1)
        labels[np.flatnonzero(rings), middle[1][rings].astype(int), middle[0][rings].astype(int)] = 1
    picture += random.normal(0, 0.15, picture.shape)
    return picture[:, None].astype(np.float32), labels.reshape(count, -1)


TOKENS, STATES, LENGTH = 40, 8, 32


def sentences(count: int, seed: int) -> tuple[Array, Array]:
    """Tokens [count, 32] of a hidden Markov chain whose dialect differs from sentence to sentence.

    Labels [count, 32] are the hidden states. What a token means depends on the dialect, which only the
    whole sentence gives away, so a tagger has to attend to all of it.
    """
    language = np.random.default_rng(7)
    step = language.dirichlet(np.full(STATES, 0.3), STATES) * 0.6 + np.eye(STATES) * 0.4
    says = language.dirichlet(np.full(TOKENS, 0.08), (2, STATES))
    random = np.random.default_rng([seed, 3])
    dialect = random.integers(0, 2, count)
    states = np.empty((count, LENGTH), np.int64)
    states[:, 0] = random.integers(0, STATES, count)
    for t in range(1, LENGTH):
        states[:, t] = (random.random((count, 1)) > step[states[:, t - 1]].cumsum(axis=1)[:, :-1]).sum(axis=1)
    spoken = says[dialect[:, None], states].cumsum(axis=2)
    tokens = (random.random((count, LENGTH, 1)) > spoken[:, :, :-1]).sum(axis=2)
    return tokens.astype(np.int64), states


STEPS = 48


def oscillations(count: int, seed: int) -> tuple[Array, Array]:
    """Two damped oscillations in noise: [count, 48, 1]; the label is the value two steps ahead."""
    random = np.random.default_rng([seed, 4])
    time = np.arange(STEPS + 2)[None, :]
    clean = np.zeros((count, STEPS + 2))
    for _ in range(2):
        period, phase = random.uniform(5, 30, (count, 1)), random.uniform(0, 2 * np.pi, (count, 1))
        decay, height = random.uniform(0, 0.03, (count, 1)), random.uniform(0.3, 1.0, (count, 1))
        clean += height * np.exp(-decay * time) * np.sin(2 * np.pi * time / period + phase)
    seen = clean[:, :STEPS] + random.normal(0, 0.08, (count, STEPS))
    return seen[:, :, None].astype(np.float32), clean[:, -1:].astype(np.float32)
