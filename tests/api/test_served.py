"""One served model: time limits, cancellation, and memory over many requests."""

import asyncio
import threading
import time
from pathlib import Path

import pytest

from prunery.api.errors import TimedOut
from prunery.api.metrics import Metrics
from prunery.api.served import MOST_TOLERANCE, ServedModel, fit_threads, tolerance
from prunery.api.settings import Limits, Settings
from prunery.pruners.context import ContextPruner

from ..pruners.context.scripted import scripted
from ..pruners.context.standin import small_provence


@pytest.fixture
def serve():
    made = []

    def make(pruner, **options):
        metrics = Metrics()
        settings = Settings(workers=1, **options)
        made.append(ServedModel("m", pruner, settings, metrics.of_model("m")))
        return made[-1], metrics

    yield make
    for served in made:
        served.close()


def blocked():
    loaded, forward = scripted({"harbour": 0.9}, rank={"harbour": 1.0})
    go, calls = threading.Event(), []

    def waiting(ids, mask, types):
        calls.append(len(ids))
        go.wait(10)
        return forward(ids, mask, types)

    return ContextPruner(loaded, forward=waiting), go, calls


def test_a_request_past_its_time_is_told_and_counted(serve):
    pruner, go, _ = blocked()
    served, metrics = serve(pruner, limits=Limits(seconds=0.2))
    with pytest.raises(TimedOut, match=r"0\.2 seconds"):
        asyncio.run(served.score("where", ["a harbour."]))
    go.set()
    assert b'prunery_requests_timed_out_total{model="m"} 1.0' in metrics.text()
    assert served.batcher.waiting == (0, 0)


def test_cancelling_drops_what_has_not_run(serve):
    pruner, go, calls = blocked()
    served, _ = serve(pruner)

    async def work():
        first = asyncio.create_task(served.score("where", ["a harbour."]))
        while not calls:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(served.score("where", ["another harbour."]))
        while served.batcher.waiting[0] < 2:
            await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert served.batcher.waiting[0] == 1
        go.set()
        assert len((await first).passages) == 1

    asyncio.run(work())
    assert calls == [1]


def test_times_and_sizes_are_of_the_request(serve):
    served, _ = serve(ContextPruner(small_provence()))
    scores = asyncio.run(served.score("where", ["A harbour.", "", "A harbour."]))
    assert len(scores.passages) == 3 and scores.blocks == 1
    assert scores.tokens > 0 and scores.inference_seconds > 0 and scores.tokenise_seconds > 0


def test_tolerance_is_what_a_pass_costs_in_tokens():
    def forward(overhead, a_token):
        def run(ids, mask, types):
            time.sleep(overhead + a_token * ids.size)

        return run

    assert tolerance(forward(0.01, 0.0002), 64) == pytest.approx(50, abs=12)
    assert tolerance(forward(0.0, 0.0002), 64) < 10
    assert tolerance(forward(0.01, 0.0), 64) >= MOST_TOLERANCE // 2


def test_workers_take_one_thread_each_unless_told():
    import torch

    cores = torch.get_num_threads()
    workers, threads = fit_threads(None)
    assert workers * threads <= cores and workers >= 1
    assert fit_threads(1) == (1, cores)


def resident():
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_stays_flat_over_two_thousand_requests(serve):
    served, _ = serve(ContextPruner(small_provence()))

    async def many(count):
        for start in range(0, count, 8):
            asked = (
                served.score(f"where {start + n}", [f"A harbour {start + n}.", "Cold rain."])
                for n in range(8)
            )
            await asyncio.gather(*asked)

    asyncio.run(many(600))
    before = resident()
    asyncio.run(many(2000))
    assert resident() - before < 12 * 2**20
