"""Deployments say when and on what a recipe runs, and refuse what could not run."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from prunery.errors import InputError, PruneryError, RecipeError
from prunery.flows.deployments import Schedule, deployment, register, serve_recipe
from prunery.pipelines.workers import Workers
from prunery.storage import Store


def test_deployment_holds_absolute_places_and_the_schedule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = deployment(
        "rag", "./store", cron="0 4 * * *", overrides=["chunks.path=docs", "seed=2"], workers=2
    )
    assert made.name == "rag"
    assert made.entrypoint == "prunery.flows.recipe_flow.recipe_flow"
    assert [str(item.schedule.cron) for item in made.schedules] == ["0 4 * * *"]
    assert made.parameters["recipe"] == "rag"
    assert made.parameters["store"] == str(tmp_path / "store")
    assert made.parameters["overrides"] == [f'chunks.path="{tmp_path}/docs"', "seed=2"]
    assert made.parameters["workers"] == 2
    assert made.concurrency_limit == 1


def test_a_wrong_recipe_or_schedule_is_said_at_once(tmp_path):
    with pytest.raises(RecipeError, match="no recipe `nope`"):
        deployment("nope", str(tmp_path))
    with pytest.raises(RecipeError, match="unknown option"):
        deployment("rag", str(tmp_path), overrides=["prune.thresold=1"])
    with pytest.raises(InputError, match="no schedule Prefect can read"):
        deployment("rag", str(tmp_path), cron="every tuesday")


def test_serving_hands_the_deployment_to_prefect(tmp_path, monkeypatch):
    import prefect

    seen = {}
    monkeypatch.setattr(prefect, "serve", lambda *made, **more: seen.update(made=made, **more))
    serve_recipe("rag", str(tmp_path), cron="0 4 * * *")
    (made,) = seen["made"]
    assert made.parameters["store"] == str(tmp_path)
    assert seen["pause_on_shutdown"] is False


def test_the_deployed_flow_runs_a_recipe_by_path(server, tmp_path):
    from prunery.flows.recipe_flow import recipe_flow

    (tmp_path / "a.txt").write_text("One sentence. And one more.")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nsteps:\n  chunks: {step: chunk, path: a.txt}\n")
    keys = recipe_flow(recipe=str(recipe), store=str(tmp_path / "store"), overrides=["seed=4"])
    store = Store(tmp_path / "store")
    assert store.names() == keys
    assert store.manifest("chunks").seed == 4


def test_an_interval_a_limit_and_a_queue(tmp_path):
    made = deployment(
        "rag",
        str(tmp_path),
        schedule=Schedule(interval=90, limit=2, overlap="enqueue"),
        workers=Workers("ray", 3, ray_address="auto"),
        reuse=False,
    )
    assert [item.schedule.interval.total_seconds() for item in made.schedules] == [90]
    assert made.concurrency_limit == 2
    assert made.concurrency_options.collision_strategy.value == "ENQUEUE"
    assert (made.parameters["engine"], made.parameters["ray_address"]) == ("ray", "auto")
    assert (made.parameters["workers"], made.parameters["reuse"]) == (3, False)
    assert "prunery" in made.tags


def test_a_schedule_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="--cron or --interval"):
        Schedule(cron="0 4 * * *", interval=5)
    with pytest.raises(InputError, match="above 0 s"):
        Schedule(interval=0)
    with pytest.raises(InputError, match="no schedule Prefect can read"):
        Schedule(cron="0 4 * * *", timezone="Mars/Olympus").prefect()


RECIPE = "name: mine\nsteps:\n  chunks: {step: chunk, path: a.txt}\n"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "a.txt").write_text("One sentence. And one more.")
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def test_a_worker_of_a_work_pool_runs_what_was_deployed(server, recipe, tmp_path):
    from prefect import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.settings import PREFECT_API_URL

    store = tmp_path / "store"
    made = deployment(str(recipe), str(store), schedule=Schedule(interval=3600))
    with pytest.raises(PruneryError, match=r"work pool `nobody`.*work-pool create nobody"):
        register(made, "nobody")
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="ours", type="process"))
        identity = register(made, "ours")
        found = client.read_deployment(identity)
        assert found.work_pool_name == "ours"
        assert found.schedules[0].active
        run = client.create_flow_run_from_deployment(identity)
        env = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
        done = subprocess.run(
            [sys.executable, *["-m", "prefect", "worker", "start", "--pool", "ours", "--run-once"]],
            env=env, cwd=tmp_path, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        state = client.read_flow_run(run.id).state
        assert state.is_completed(), (state, done.stdout, done.stderr)
    assert set(Store(store).names()) == {"chunks"}


def test_a_served_recipe_runs_when_asked(server, recipe, tmp_path):
    from prefect import get_client
    from prefect.settings import PREFECT_API_URL

    store = tmp_path / "store"
    env = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    command = [sys.executable, "-m", "prunery.cli", "deploy", recipe, "--name", "served"]
    command += ["--store", store]
    log = tmp_path / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=env, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True
        )
    try:
        with get_client(sync_client=True) as client:
            found = _eventually(lambda: client.read_deployment_by_name("prunery-recipe/served"))
            run = client.create_flow_run_from_deployment(found.id)
            _eventually(lambda: client.read_flow_run(run.id).state.is_completed() or None)
    finally:
        _ended(process)
    assert set(Store(store).names()) == {"chunks"}, log.read_text()


def _ended(process):
    """Stop what serves and what it started, by force if need be."""
    # Not SIGINT: where tests run as a background job of a shell, children ignore that.
    for kind in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
            return


def _eventually(ask, seconds=200):
    """What `ask` gives once it gives something."""
    from prefect.exceptions import ObjectNotFound

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(ObjectNotFound):
            found = ask()
            if found is not None:
                return found
        time.sleep(0.5)
    pytest.fail(f"nothing came within {seconds} s")
