"""The order in which blocks of many requests are run."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from prunery.api import fair_queue
from prunery.api.fair_queue import FairQueue, Work


def work(lengths, seconds=60.0):
    scores = SimpleNamespace(lengths=np.array(lengths, np.int64))
    return Work(scores, time.monotonic() + seconds, lambda: None)


def drain(queue, cells):
    while (first := queue.first()) is not None:
        yield queue.draw(first, cells)


def test_a_small_request_overtakes_a_large_one():
    queue = FairQueue(0.08)
    large, small = work([100] * 1000), work([100] * 3)
    queue.put(large)
    for _ in range(5):
        queue.draw(queue.first(), 400)
    queue.put(small)
    order = [entry.work for batch in drain(queue, 400) for entry in batch]
    last_of_small = max(place for place, of in enumerate(order) if of is small)
    assert last_of_small < 12
    assert len(order) == 1000 - 20 + 3


def test_two_large_requests_share_evenly():
    queue = FairQueue(0.08)
    early, late = work([64] * 200), work([64] * 200)
    queue.put(early)
    queue.draw(queue.first(), 640)
    queue.put(late)
    seen = [entry.work for batch in drain(queue, 640) for entry in batch][:100]
    assert 40 <= sum(one is late for one in seen) <= 60


def test_a_request_with_nothing_to_do_gains_no_credit():
    queue = FairQueue(0.08)
    first = work([100] * 50)
    queue.put(first)
    for _ in range(40):
        queue.draw(queue.first(), 100)
    late = work([100] * 50)
    queue.put(late)
    seen = [batch[0].work for batch in drain(queue, 100)][:10]
    assert sum(one is first for one in seen) in (4, 5, 6)


@pytest.mark.parametrize("tolerance", [0, 64])
def test_every_block_comes_once_and_padding_stays_within_bounds(tolerance):
    rng = np.random.default_rng(3)
    queue = FairQueue(0.08, tolerance)
    given = {}
    for _ in range(20):
        one = work(rng.integers(4, 512, 30).tolist())
        queue.put(one)
        given[id(one)] = one
    seen = set()
    for batch in drain(queue, 1024):
        lengths = [entry.length for entry in batch]
        assert len(batch) * max(lengths) <= 1024 or len(batch) == 1
        # A bucket is as wide as the slack, and a bit where two meet.
        assert max(lengths) - min(lengths) <= max(tolerance, 0.09 * max(lengths) + 1)
        for entry in batch:
            assert (id(entry.work), entry.block) not in seen
            seen.add((id(entry.work), entry.block))
            assert entry.length == given[id(entry.work)].scores.lengths[entry.block]
    assert len(seen) == 600 and queue.tokens == 0


def test_unlike_lengths_join_only_within_the_tolerance():
    apart, joined = FairQueue(0.08), FairQueue(0.08, 64)
    for queue in (apart, joined):
        queue.put(work([60, 90, 120, 400]))
    assert [[e.length for e in batch] for batch in drain(apart, 2000)] == [[400], [120], [90], [60]]
    sizes = [sorted(e.length for e in batch) for batch in drain(joined, 2000)]
    assert sizes == [[400], [60, 90, 120]]


def test_a_dropped_request_is_never_drawn_and_leaves_no_tokens():
    queue = FairQueue(0.08)
    gone, stays = work([50] * 10), work([50] * 2)
    queue.put(gone)
    queue.put(stays)
    queue.draw(queue.first(), 100)
    queue.forget(gone)
    queue.forget(gone)
    assert queue.requests == 1
    assert {entry.work for batch in drain(queue, 1000) for entry in batch} <= {stays}
    assert queue.tokens == 0


def test_a_block_past_its_deadline_is_never_drawn():
    queue = FairQueue(0.08)
    queue.put(work([10] * 5, seconds=-1.0))
    assert queue.first() is None
    assert (queue.requests, queue.tokens) == (0, 0)


def test_dropped_requests_are_swept_out_of_a_queue_that_never_empties(monkeypatch):
    monkeypatch.setattr(fair_queue, "SPARE_ENTRIES", 10)
    queue = FairQueue(0.08)
    queue.put(work([500] * 3))
    for _ in range(100):
        one = work([20] * 50)
        queue.put(one)
        queue.forget(one)
    assert sum(map(len, queue._heaps.values())) <= 2 * 3 + 10 + 50
    assert queue.tokens == 1500


def test_clear_gives_back_what_was_in_it():
    queue = FairQueue(0.08)
    one = work([5, 6])
    queue.put(one)
    assert queue.clear() == [one] and one.gone
    assert queue.first() is None and queue.tokens == 0
