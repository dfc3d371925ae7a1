"""Signals of tokens from lists written sample by sample."""

import numpy as np

from prunery.pruners.contract import Signals
from prunery.pruners.ragged import token_ids


def tokens(samples, *, start=10):
    """{sample id: {signal: list}}; positions run from `start`, turn is 0 unless given."""
    rows = {}
    for sample, given in samples.items():
        size = len(next(iter(given.values())))
        whole = {
            "sample": [sample] * size,
            "token_position": list(range(start, start + size)),
            "turn": [0] * size,
            **given,
        }
        for name, values in whole.items():
            rows.setdefault(name, []).extend(values)
    ids = token_ids(np.array(rows["sample"]), np.array(rows["token_position"]))
    return Signals({"id": ids, **rows})


def random_tokens_of(rng, samples, *, longest=12, correlated=0.0):
    """Samples of 1 to `longest` tokens whose mean loss and entropy may correlate."""
    made = {}
    for sample in rng.choice(2**60, samples, replace=False):
        size = int(rng.integers(1, longest + 1))
        common, own = rng.exponential(size=2)
        entropy = correlated * common + (1 - correlated) * own
        made[int(sample)] = {
            "loss": np.abs(common + 0.3 * rng.standard_normal(size)),
            "entropy": np.abs(entropy + 0.3 * rng.standard_normal(size)),
        }
    return tokens(made)


def of_sample(signals, selection, sample):
    """The verdicts about one sample, in the order of its positions."""
    rows = np.flatnonzero(signals["sample"] == sample)
    rows = rows[np.argsort(signals["token_position"][rows])]
    return selection.keep[rows].tolist()
