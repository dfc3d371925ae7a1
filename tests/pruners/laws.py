"""Signals that fit a method's `needs`, made from the table of signal names."""

import numpy as np

from prunery.pruners.contract import SIGNALS, Signals
from prunery.pruners.ragged import token_ids


def make_signals(method, n, *, seed=0, ties=False):
    """N rows in which every signal that the method needs or may use is legal.

    Groups hold 1 to 9 rows; with `ties`, scores take only two values.
    """
    rng = np.random.default_rng(seed)
    ids = rng.choice(2**62, size=n, replace=False).astype(np.int64)
    arrays = {"id": ids}
    group_ids = rng.choice(2**62, size=max(n, 1), replace=False).astype(np.int64)
    groups = np.repeat(group_ids, rng.integers(1, 10, size=max(n, 1)))[:n]
    wanted = method.needs | method.optional
    if "sample" in wanted:
        arrays |= _places(groups, n, rng)
    for name in sorted(wanted - {"id"}):
        spec = SIGNALS[name]
        if name in arrays:
            continue
        if name in ("passage", "question"):
            arrays[name] = groups if name == method.group else groups // 3
        elif name == "position":
            starts = np.flatnonzero(np.diff(groups, prepend=-1)) if n else np.zeros(0, int)
            sizes = np.diff(np.append(starts, n))
            arrays[name] = np.arange(n) - np.repeat(starts, sizes)
        elif name == "part":
            arrays[name] = groups
        elif name == "cost":
            arrays[name] = rng.integers(1, 50, size=n)
        elif spec.shape == "N,d" and name != "embedding":
            arrays[name] = _matrix(name, spec, ids, rng, ties)
        elif spec.shape == "N,d":
            vectors = rng.standard_normal((n, 8)).astype(np.float32)
            if ties:
                vectors = np.sign(vectors[:, :1]) * np.eye(8, dtype=np.float32)[:1]
            arrays[name] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        elif spec.shape == "N+1":
            arrays[name] = np.concatenate([[0], np.cumsum(rng.integers(0, 6, size=n))])
        elif spec.shape == "N":
            arrays[name] = _scalar(spec, n, rng, ties)
            if name in ("quality", "complexity"):
                arrays[name] = np.abs(arrays[name])
    for name in sorted(wanted):
        spec = SIGNALS[name]
        if spec.shape == "nnz":
            borders = arrays[spec.ragged_by]
            arrays[name] = _ragged(spec, borders, rng, ties)
    return Signals(arrays)


EPOCHS = 12


def _matrix(name, spec, ids, rng, ties):
    """A trajectory of 12 epochs, or 4 neighbours of each row."""
    n = len(ids)
    if name == "neighbour":
        steps = np.arange(1, 5)
        return np.where(steps < n, ids[(np.arange(n)[:, None] + steps) % max(n, 1)], -1)
    if name == "neighbour_distance":
        return np.where(ties, 0.5, rng.uniform(0.1, 2.0, (n, 4))).astype(np.float32)
    if spec.dtype == "bool":
        return rng.random((n, EPOCHS)) < 0.6
    low, high = max(spec.low, -4.0), min(spec.high, 4.0)
    values = rng.uniform(low, high, (n, EPOCHS))
    if ties:
        values = np.where(rng.random((n, 1)) < 0.5, 0.25, 0.75) * np.ones(EPOCHS)
    return values.astype(np.float32)


def _places(groups, n, rng):
    """Tokens in their samples: positions with a hole here and there, turns of some tokens."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1)) if n else np.zeros(0, int)
    sizes = np.diff(np.append(starts, n))
    steps = np.where(rng.random(n) < 0.8, 1, 3)
    position = 5 + np.cumsum(steps) - np.repeat(np.cumsum(steps)[starts], sizes)
    return {
        "id": token_ids(groups, position),
        "sample": groups,
        "token_position": position,
        "turn": position // 6,
    }


def _scalar(spec, n, rng, ties):
    if spec.dtype == "bool":
        return rng.random(n) < 0.15
    if spec.dtype == "int64":
        return rng.integers(0, 50, size=n)
    low, high = max(spec.low, -4.0), min(spec.high, 4.0)
    if ties:
        return np.where(rng.random(n) < 0.5, 0.25, 0.75).astype(np.float32)
    return rng.uniform(low, high, size=n).astype(np.float32)


def _ragged(spec, borders, rng, ties):
    parts = []
    for size in np.diff(borders):
        if spec.dtype == "int64":
            values = np.arange(size) if ties else np.sort(rng.choice(30, size, replace=False))
        elif ties:
            values = np.ones(size)
        else:
            values = np.clip(rng.uniform(0.1, 2.0, size), spec.low, spec.high)
        parts.append(values)
    joined = np.concatenate(parts) if parts else np.zeros(0)
    return joined.astype(spec.dtype)
