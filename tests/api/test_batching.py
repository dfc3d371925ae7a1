"""Threads that run blocks of many requests: whose result is whose, and whose error."""

import threading
import time

import numpy as np
import pytest

from prunery.api.batching import Batcher
from prunery.api.errors import Busy, Stopping
from prunery.api.fair_queue import Work
from prunery.errors import ModelError
from prunery.pruners.context import ContextPruner
from prunery.pruners.signals.context import Batching

from ..pruners.context.scripted import scripted
from ..pruners.context.standin import small_provence


class Held:
    """A forward pass that waits until it is let go, and notes the ids that it saw."""

    def __init__(self, forward=None):
        self.go, self.running, self.rows = threading.Event(), threading.Event(), []
        self.forward = forward or scripted({"harbour": 0.9}, rank={"harbour": 1.0})[1]

    def __call__(self, ids, mask, types):
        self.running.set()
        assert self.go.wait(20)
        self.rows.append(len(ids))
        return self.forward(ids, mask, types)


@pytest.fixture
def pruner():
    loaded, forward = scripted({"harbour": 0.9}, rank={"harbour": 1.0})
    return ContextPruner(loaded, forward=forward)


@pytest.fixture
def batcher_of():
    made = []

    def make(forward, **options):
        made.append(Batcher(forward, Batching(1024, 0.08), **options))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close(join_seconds=1.0)


def submit(batcher, pruner, passages, seconds=30.0):
    prepared = pruner.prepare(["where is it"], [passages])
    ended = threading.Event()
    work = Work(prepared.scores, time.monotonic() + seconds, ended.set)
    batcher.submit(work)
    return prepared, work, ended


def test_many_requests_from_many_threads_get_what_they_get_alone(batcher_of):
    pruner = ContextPruner(small_provence())
    batcher = batcher_of(pruner.scorer.forward, workers=2, torch_threads=1)
    batcher.tolerate(32)
    rng = np.random.default_rng(0)
    words = np.array(["harbour", "boat", "rain", "cold", "inn", "paint", "of", "the", "a", "by"])

    def text():
        return " ".join(rng.choice(words, int(rng.integers(1, 60)))) + "."

    asked = [[text() for _ in range(int(rng.integers(1, 9)))] for _ in range(24)]
    results = {}

    def client(number):
        prepared, work, ended = submit(batcher, pruner, asked[number])
        assert ended.wait(30) and work.error is None
        results[number] = prepared.passages()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, passages in enumerate(asked):
        alone = pruner.score(["where is it"], [passages])
        for ours, theirs in zip(results[number], alone, strict=True):
            assert ours.relevance_logit == pytest.approx(theirs.relevance_logit, abs=1e-4)
            np.testing.assert_allclose(
                ours.token_keep_probability, theirs.token_keep_probability, atol=1e-4
            )
    assert batcher.waiting == (0, 0)


def test_waiting_blocks_of_several_requests_run_together(batcher_of, pruner):
    held = Held()
    batcher = batcher_of(held)
    submit(batcher, pruner, ["a harbour at sea."])
    assert held.running.wait(10)
    ends = [submit(batcher, pruner, [f"{word} harbour at sea."])[2] for word in ("a", "the", "my")]
    held.go.set()
    assert all(end.wait(10) for end in ends)
    assert held.rows == [1, 3]


def test_an_error_reaches_only_the_request_whose_fault_it_is(batcher_of, pruner):
    inner = scripted({"harbour": 0.9}, rank={"harbour": 1.0})[1]
    bad = int(pruner.scorer.source.encode(["poison"])[0][0])

    def forward(ids, mask, types):
        if (ids == bad).any():
            raise RuntimeError("no such kernel")
        return inner(ids, mask, types)

    held = Held(forward)
    batcher = batcher_of(held)
    submit(batcher, pruner, ["a harbour at sea."])
    assert held.running.wait(10)
    _, good, good_end = submit(batcher, pruner, ["the harbour at sea."])
    _, wrong, wrong_end = submit(batcher, pruner, ["the poison at sea."])
    held.go.set()
    assert good_end.wait(10) and wrong_end.wait(10)
    assert good.error is None
    assert isinstance(wrong.error, ModelError) and "no such kernel" in str(wrong.error)
    _, later, later_end = submit(batcher, pruner, ["the harbour again."])
    assert later_end.wait(10) and later.error is None and batcher.alive


def test_dropped_work_never_runs_and_its_place_is_free(batcher_of, pruner):
    held = Held()
    batcher = batcher_of(held, queued_tokens=60)
    submit(batcher, pruner, ["a harbour at sea."])
    assert held.running.wait(10)
    _, waiting, ended = submit(batcher, pruner, ["word " * 40])
    with pytest.raises(Busy) as refused:
        submit(batcher, pruner, ["word " * 40])
    assert int(refused.value.headers["Retry-After"]) >= 1
    batcher.drop(waiting)
    assert batcher.waiting[1] == 0
    _, _, other = submit(batcher, pruner, ["the sea."])
    held.go.set()
    assert other.wait(10)
    assert held.rows == [1, 1] and not ended.is_set()


def test_a_request_past_its_deadline_never_runs(batcher_of, pruner):
    held = Held()
    batcher = batcher_of(held)
    submit(batcher, pruner, ["a harbour at sea."])
    assert held.running.wait(10)
    submit(batcher, pruner, ["late."], seconds=0.0)
    time.sleep(0.01)
    held.go.set()
    submit(batcher, pruner, ["the sea."])[2].wait(10)
    assert sum(held.rows) == 2


def test_closing_fails_what_waits(batcher_of, pruner):
    held = Held()
    batcher = batcher_of(held)
    submit(batcher, pruner, ["a harbour at sea."])
    assert held.running.wait(10)
    _, waiting, ended = submit(batcher, pruner, ["the sea."])
    batcher.close(join_seconds=0.0)
    held.go.set()
    assert ended.wait(10) and isinstance(waiting.error, Stopping)
    with pytest.raises(Stopping):
        submit(batcher, pruner, ["the sea."])


def test_a_request_without_a_token_ends_at_once(batcher_of, pruner):
    batcher = batcher_of(Held())
    _, work, ended = submit(batcher, pruner, ["", "  "])
    assert ended.is_set() and work.error is None


def test_a_batch_that_is_not_full_waits_for_more(batcher_of, pruner):
    held = Held()
    held.go.set()
    batcher = batcher_of(held, wait_seconds=0.5)
    ends = [submit(batcher, pruner, [f"{word} harbour."])[2] for word in ("a", "the", "my")]
    assert all(end.wait(10) for end in ends)
    assert held.rows == [3]


def test_a_dead_worker_shows(batcher_of, pruner):
    class Dies(BaseException):
        pass

    def forward(ids, mask, types):
        raise Dies

    batcher = batcher_of(forward)
    threading.excepthook, hook = (lambda _: None), threading.excepthook
    try:
        submit(batcher, pruner, ["a harbour."])
        batcher._threads[0].join(10)
    finally:
        threading.excepthook = hook
    assert not batcher.alive


class Widths:
    """A scripted network that notes how wide its batches were."""

    def __init__(self, forward):
        self.forward, self.seen = forward, []

    def __call__(self, ids, mask, types):
        self.seen.append((ids.shape[1], int(mask.sum(1).max())))
        return self.forward(ids, mask, types)


@pytest.mark.parametrize(("step", "most"), [(1, 512), (16, 512), (16, 40)])
def test_batches_are_as_wide_as_a_step_and_no_wider_than_the_network(batcher_of, step, most):
    loaded, forward = scripted({"harbour": 0.9}, rank={"harbour": 1.0}, max_length=most)
    pruner = ContextPruner(loaded, forward=forward)
    widths = Widths(forward)
    batcher = batcher_of(widths, width_step=step)
    passages = [" ".join(["harbour"] * count) for count in (3, 11, 29, 70)]
    prepared, _, ended = submit(batcher, pruner, passages)
    assert ended.wait(20)
    alone = pruner.score(["where is it"], [passages])
    for one, other in zip(prepared.passages(), alone, strict=True):
        assert one.relevance_logit == pytest.approx(other.relevance_logit)
        np.testing.assert_allclose(one.token_keep_probability, other.token_keep_probability)
    assert any(wide > longest for wide, longest in widths.seen) == (step > 1)
    for wide, longest in widths.seen:
        assert longest <= wide <= most
        assert wide % step == 0 or wide == most
        assert wide < longest + step
