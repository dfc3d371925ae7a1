"""farthest_first: against whole-number arithmetic, whatever its blocks are."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
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


def test_worked_by_hand():
    """Angles 0, 10, 90, 180 and again 10 from a start at 10: the furthest is 180, then 90."""
    radians = np.deg2rad([0, 10, 90, 180, 10])
    vectors = np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)
    chosen, distance, nearest = farthest_first(vectors, 3, start=1)
    assert chosen.tolist() == [1, 3, 2]
    expected = [1 - np.cos(np.deg2rad(angle)) for angle in (10, 80, 170)]
    np.testing.assert_allclose(distance, [expected[0], 3, *expected[1:], 0], atol=3e-7)
    # A row of 90 degrees was 80 from the first when it was chosen.
    assert nearest.tolist() == [1, 1, 1, 1, 1]
    assert distance[4] == 0.0


def test_a_row_goes_to_the_first_of_equally_near_centres():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 2, axis=0)
    chosen, distance, nearest = farthest_first(vectors, 5, start=1)
    assert chosen.tolist() == [1, 2, 4, 0, 3]
    assert distance.tolist() == [0.0, 3.0, 1.0, 0.0, 1.0, 0.0]
    assert nearest.tolist() == [1, 1, 1, 2, 1, 4]


@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_none_and_all(n):
    vectors = cloud("spread", n, 4)
    chosen, distance, nearest = farthest_first(vectors, 0)
    assert len(chosen) == 0 and (distance == 3.0).all() and (nearest == -1).all()
    chosen, distance, nearest = farthest_first(vectors, n)
    assert sorted(chosen.tolist()) == list(range(n))
    assert (distance == 3.0).sum() == min(n, 1)
    assert len(distance) == len(nearest) == n


def test_all_rows_alike():
    vectors = np.repeat(cloud("spread", 1, 384), 50, axis=0)
    chosen, distance, nearest = farthest_first(vectors, 20, start=30)
    assert chosen.tolist() == [30, *range(19)]
    assert (np.delete(distance, 30) == 0.0).all() and (nearest == 30).all()


def test_many_copies_are_chosen_at_once():
    """One distinct row in a thousand: a step for each copy would take minutes."""
    vectors = np.tile(cloud("spread", 20, 16, 3), (2000, 1))
    chosen, distance, _ = farthest_first(vectors, 20_000, start=0)
    assert sorted(chosen[:20]) == list(range(20))
    assert chosen[20:].tolist() == list(range(20, 20_000))
    assert (distance > 0.0).sum() == 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rows_decides_nothing_but_ties(kind):
    vectors = cloud(kind, 400, 30, 5)
    chosen, distance, _ = farthest_first(vectors, 40)
    shift = np.random.default_rng(1).permutation(400)
    again = farthest_first(vectors[shift], 40)
    if kind in ("spread", "clustered", "narrow"):
        assert np.array_equal(shift[again[0]], chosen)
    assert np.array_equal(np.sort(again[1]), np.sort(distance))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_sees_no_other_distances(kind):
    vectors = cloud(kind, 500, 384, 2)
    chosen, distance, nearest = farthest_first(vectors, 60)
    left = np.setdiff1d(np.arange(500), chosen)
    wide = vectors.astype(np.float64)
    truth = 1 - wide[left] @ wide[chosen].T
    np.testing.assert_allclose(distance[left], truth.min(axis=1), rtol=0, atol=1.1e-6)
    np.testing.assert_allclose(
        distance[left], 1 - (wide[left] * wide[nearest[left]]).sum(axis=1), rtol=0, atol=1.1e-6
    )


@pytest.mark.parametrize("kind", ["spread", "clustered", "copies", "zeros", "narrower"])
def test_start_is_nearest_to_the_mean(kind):
    vectors = cloud(kind, 1500, 200, 4)
    if kind == "narrower":  # cosines that differ by less than a float32 product's error
        vectors = unit(1.0 + 2e-3 * vectors)
    wide = np.rint(vectors.astype(np.float64) * 2**26)
    mean = wide.sum(axis=0) / np.linalg.norm(wide.sum(axis=0))
    cosine = wide @ np.rint(mean * 2**26)
    assert nearest_to_mean(vectors) == cosine.argmax()
    assert farthest_first(vectors, 1)[0].tolist() == [cosine.argmax()]
    assert farthest_first(vectors, 1, start=8)[0].tolist() == [8]


def test_start_without_a_mean_is_the_first_row():
    vectors = cloud("spread", 3, 5)
    assert nearest_to_mean(np.concatenate([vectors, -vectors])) == 0
    # The mean sums thousands of rows without rounding: opposite ones leave the odd one out.
    many = np.concatenate([np.repeat(vectors, 3000, axis=0), np.repeat(-vectors, 3000, axis=0)])
    assert nearest_to_mean(np.concatenate([many, vectors[2:]])) == 6000


def test_the_loop_of_a_device_gives_the_same():
    """On a CPU here; tests/kernels/test_gpu.py has it on a GPU."""
    vectors = cloud("clustered", 300, 20, 6)
    want = farthest_first(vectors, 50, start=3)
    made = farthest._plain_loop(vectors, 50, 3, "cpu")
    assert np.array_equal(made[0], want[0]) and np.array_equal(made[2], want[2])
    np.testing.assert_allclose(made[1], want[1], atol=5e-7)
    assert [one.dtype for one in made] == [one.dtype for one in want]


def test_few_pairs_are_compared_before_the_last_pass(monkeypatch):
    """The bounds must spare most of the work on clustered rows."""
    pairs = []
    compare = farthest._Cover._compare

    def counting(self, rows, vectors, first):
        pairs.append(len(rows) * (self.made - first))
        compare(self, rows, vectors, first)

    monkeypatch.setattr(farthest._Cover, "_compare", counting)
    monkeypatch.setattr(farthest, "POOL", (64, 8, 64))
    vectors = cloud("clustered", 20_000, 16, 7)
    farthest_first(vectors, 200, distances=False)
    assert sum(pairs) < 0.4 * 20_000 * 200
    pairs.clear()
    farthest_first(vectors, 200)
    assert sum(pairs) < 1.1 * 20_000 * 200


def test_k_center_takes_ids_in_any_order():
    vectors = cloud("few", 300, 3, 8)
    ids = np.random.default_rng(2).permutation(300)
    sorted_rows = KCenter(keep=0.2)(Signals({"id": np.arange(300), "embedding": vectors}), seed=0)
    mixed = KCenter(keep=0.2)(Signals({"id": ids, "embedding": vectors[ids]}), seed=0)
    assert np.array_equal(mixed.keep, sorted_rows.keep[ids])
    assert np.array_equal(mixed.score, sorted_rows.score[ids])
    dropped = ~mixed.keep
    assert np.array_equal(ids[mixed.rival[dropped]], sorted_rows.rival[ids][dropped])


ROWS = cloud("spread", 6, 3)


@pytest.mark.parametrize(
    ("vectors", "count", "options", "words"),
    [
        (ROWS.astype(np.float64), 1, {}, "float32 matrix .* of float64"),
        (ROWS[0], 1, {}, r"found shape \(3,\)"),
        (ROWS, 7, {}, "between 0 and the 6 rows; found 7"),
        (ROWS, -1, {}, "found -1"),
        (ROWS, 1, {"start": 6}, "one of the 6 rows; found 6"),
        (ROWS, 1, {"start": -1}, "found -1"),
        (np.where(np.arange(6)[:, None] == 4, 2 * ROWS, ROWS), 1, {}, "row 4"),
        (np.where(np.arange(6)[:, None] == 2, np.float32(np.nan), ROWS), 1, {}, "row 2"),
    ],
)
def test_refusals_say_what_was_found(vectors, count, options, words):
    with pytest.raises(InputError, match=words):
        farthest_first(vectors, count, **options)


SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from prunery.pruners.sample.farthest import farthest_first

def resident(line):
    found = Path("/proc/self/status").read_text().split(f"{line}:")[1]
    return int(found.split()[0]) * 1024

rows = np.random.default_rng(0).standard_normal((int(sys.argv[1]), 24)).astype(np.float32)
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
farthest_first(rows[:5000], 300)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
farthest_first(rows, 300)
print(json.dumps(resident("VmHWM") - before))
"""


def test_memory_is_of_the_rows_alone():
    """100,000 rows and 300 choices: all distances would be 120 MB, a copy of the rows 10 MB."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("a process's peak memory is read from /proc, which is not here")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "100000"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < 30e6
