"""farthest_first: against whole-number arithmetic, whatever its blocks are."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pruners.contract import Signals
from prunery.pruners.sample import farthest
from prunery.pruners.sample.farthest import farthest_first, nearest_to_mean
from prunery.pruners.sample.k_center import KCenter

KINDS = ("spread", "clustered", "few", "narrow", "copies", "zeros")


def unit(rows):
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(length == 0.0, 1.0, length)).astype(np.float32)


def cloud(kind, n, size, seed=0):
    """Unit rows (n, size): spread, in clusters, few distinct, or so near that float32 errs."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, size))
    if kind == "clustered":
        rows = rng.standard_normal((5, size))[rng.integers(5, size=n)] + 0.1 * rows
    if kind == "few":
        rows = rng.integers(-1, 2, (n, size)).astype(float)
    if kind == "narrow":
        rows = np.ones(size) + 0.004 * rows
    if kind == "copies":
        rows = rows[rng.integers(max(1, n // 5), size=n)]
    if kind == "zeros":
        rows[rng.random(n) < 0.3] = 0.0
    return unit(rows)


def away(vectors, row):
    """Distances to one row, float32 of an exact sum: whole numbers, in any order."""
    whole = np.rint(vectors.astype(np.float64) * 2**26).astype(np.int64)
    products = whole @ whole[row]
    made = ((2**52 - products) / 2**52).astype(np.float32)
    made[made < np.float32(1e-6)] = 0.0
    return made


def plain(vectors, count, start):
    """The words of the docstring, one row after the other."""
    n = len(vectors)
    distance, nearest = np.full(n, 3.0, np.float32), np.full(n, -1)
    chosen, row = [], start
    for step in range(count):
        if step:
            row = max(set(range(n)) - set(chosen), key=lambda one: (distance[one], -one))
        else:
            nearest[row] = row
        chosen.append(row)
        made = away(vectors, row)
        closer = made < distance
        closer[chosen] = False
        distance[closer], nearest[closer] = made[closer], row
    return np.array(chosen, np.int64), distance, nearest


def same(made, want):
    for one, other in zip(made, want, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [one.dtype for one in made] == [np.int64, np.float32, np.int64]


def blocks(patch, rows, centres, pool, active):
    patch.setattr(farthest, "ROWS", rows)
    patch.setattr(farthest, "CENTRES", centres)
    patch.setattr(farthest, "POOL", pool)
    patch.setattr(farthest, "ACTIVE", active)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 70),
    size=st.integers(1, 40),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 20),
    centres=st.integers(1, 20),
    pool=st.integers(1, 30),
    active=st.integers(1, 12),
)
def test_plain_arithmetic_in_any_blocks(kind, n, size, share, seed, rows, centres, pool, active):
    vectors = cloud(kind, n, size, seed)
    count = round(share * n)
    start = seed % n
    with pytest.MonkeyPatch.context() as patch:
        blocks(patch, rows, centres, (pool, 2, 4), active)
        made = farthest_first(vectors, count, start=start)
        bounds = farthest_first(vectors, count, start=start, distances=False)
    same(made, plain(vectors, count, start))
    assert np.array_equal(bounds[0], made[0])
    assert (bounds[1] >= made[1]).all()
    assert np.array_equal(bounds[1][made[0]], made[1][made[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_blocks(kind):
    """Several pools, cuts of the active rows, and centres met in more than one product."""
    vectors = cloud(kind, 3000, 24, 1)
    whole = plain(vectors, 400, 7)
    same(farthest_first(vectors, 400, start=7), whole)
    with pytest.MonkeyPatch.context() as patch:
        blocks(patch, 64, 100, (16, 8, 64), 50)
        same(farthest_first(vectors, 400, start=7), whole)
