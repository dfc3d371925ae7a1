"""A running step publishes how far it is, and nothing of that can break it."""

import threading
import time

import pytest

from prunery.flows import progress
from prunery.flows.progress import Published, published
from prunery.pipelines.progress import Silent


class Heard(Silent):
    def __init__(self):
        self.words = []

    def start(self, name, total):
        self.words.append((name, total))

    def advance(self, n=1):
        self.words.append(n)

    def finish(self):
        self.words.append("end")


def test_percent_of_shards_and_who_else_hears_it():
    heard = Heard()
    step = Published("key", heard)
    assert step.percent == 0
    step.start("chunks", 8)
    step.advance(2)
    assert step.percent == 25
    step.advance()
    assert step.percent == 37.5
    step.finish()
    assert step.percent == 100
    assert heard.words == [("chunks", 8), 2, 1, "end"]


def test_a_running_task_publishes_its_percent(server, monkeypatch):
    from prefect import flow, get_client, task
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
    from prefect.runtime import flow_run, task_run

    monkeypatch.setattr(progress, "EVERY", 0.05)
    seen = {}

    def artifacts(run):
        with get_client(sync_client=True) as client:
            asked = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
            return client.read_artifacts(artifact_filter=asked)

    @task(persist_result=False)
    def slow():
        with published("mine-chunks", None) as step:
            step.start("chunks", 4)
            step.advance()
            end = time.monotonic() + 60
            while not (found := artifacts(flow_run.id)) and time.monotonic() < end:
                time.sleep(0.05)
            seen.update(run=flow_run.id, task=task_run.id, on_the_way=found[0].data)
            step.advance(3)
            step.finish()

    @flow(persist_result=False)
    def of_one_step():
        slow()

    of_one_step()
    (made,) = artifacts(seen["run"])
    assert (made.type, made.key, str(made.task_run_id)) == ("progress", "mine-chunks", seen["task"])
    assert seen["on_the_way"] == 25 and made.data == 100


@pytest.mark.parametrize("fails", ["create", "update"])
def test_a_server_that_is_gone_does_not_break_the_step(monkeypatch, fails):
    tried = threading.Event()

    def gone(*given):
        tried.set()
        raise RuntimeError("Failed to reach API")

    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setattr(progress, "create_progress_artifact", lambda *given: "id")
    monkeypatch.setattr(progress, f"{fails}_progress_artifact", gone)
    with published("key", None) as step:
        step.start("chunks", 2)
        end = time.monotonic() + 30
        while not tried.is_set() and time.monotonic() < end:
            step.advance()
            time.sleep(0.02)
        step.finish()
    assert tried.is_set()


def test_a_short_step_publishes_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(progress, "create_progress_artifact", lambda *given: asked.append(given))
    with published("key", None) as step:
        step.start("chunks", 1)
        step.finish()
    assert not asked


def test_a_server_that_hangs_holds_the_step_up_for_a_bounded_time(monkeypatch):
    asked, free = threading.Event(), threading.Event()

    def hangs(*given):
        asked.set()
        free.wait(60)

    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setattr(progress, "GOODBYE", 0.1)
    monkeypatch.setattr(progress, "create_progress_artifact", hangs)
    with published("key", None) as step:
        step.start("chunks", 1)
        assert asked.wait(30)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    free.set()
