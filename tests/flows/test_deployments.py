"""Deployments say when and on what a recipe runs, and refuse what could not run."""

import pytest

from prunery.errors import InputError, RecipeError
from prunery.flows.deployments import deployment, serve_recipe


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
    from prunery.storage import Store

    (tmp_path / "a.txt").write_text("One sentence. And one more.")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nsteps:\n  chunks: {step: chunk, path: a.txt}\n")
    keys = recipe_flow(recipe=str(recipe), store=str(tmp_path / "store"), overrides=["seed=4"])
    store = Store(tmp_path / "store")
    assert store.names() == keys
    assert store.manifest("chunks").seed == 4
