"""The whole of it over a store: rows to verdict, with a small random encoder as the black box."""

import json

import numpy as np
import pytest

from prunery.errors import BudgetError, InputError, RecipeError
from prunery.pipelines.recipe import apply_overrides, parse_recipe
from prunery.pipelines.run import run_recipe
from prunery.storage import Store

WORDS = {
    "sea": [
        "ship",
        "harbour",
        "sailor",
        "wave",
        "anchor",
        "tide",
        "fish",
        "net",
        "storm",
        "captain",
        "deck",
        "rope",
    ],
    "land": [
        "farm",
        "field",
        "plough",
        "horse",
        "barn",
        "wheat",
        "fence",
        "gate",
        "road",
        "cart",
        "hill",
        "stone",
    ],
}
RECIPE = """
name: prompt
steps:
  data: {{step: read_dataset, path: {rows}, holdout: 0.4}}
  task:
    step: prompt_task
    inputs: {{data: data}}
    model: {model}
    manual: about
    shots: 6
    validation_shots: 6
  vocabulary: {{step: prompt_vocabulary, inputs: {{task: task}}, source: file, path: {words}}}
  influence: {{step: prompt_influence, inputs: {{task: task, words: vocabulary}}}}
  prune: {{step: prune_prompts, inputs: {{influence: influence}}, keep: 0.4}}
  control_words:
    step: prune_prompts
    inputs: {{influence: influence}}
    method: random_prompts
    keep: 0.4
  search:
    step: search_prompts
    inputs: {{task: task, words: prune}}
    length: 2
    prompts: 40
    population: 12
    mutants: 6
    crossovers: 6
  control:
    step: search_prompts
    inputs: {{task: task, words: control_words}}
    method: random
    length: 2
    prompts: 40
  test: {{step: test_prompts, inputs: {{task: task, search: search, control: control}}}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("prompt")
    rng = np.random.default_rng(0)
    rows = [
        {"text": " ".join(rng.choice(WORDS[name], 5)) + f" {i}", "label": name}
        for i in range(40)
        for name in WORDS
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "words.txt").write_text("\n".join(WORDS["sea"] + WORDS["land"]))
    text = RECIPE.format(rows=folder / "rows.jsonl", model=models[0], words=folder / "words.txt")
    loaded = parse_recipe(text)
    return lambda *overrides: apply_overrides(loaded, overrides)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    return run_recipe(recipe(), Store(tmp_path_factory.mktemp("store")), threads=1)


def rows(result, name):
    return result.store.table(result.manifests[name].key).to_table().to_pylist()


def test_parts_do_not_share_a_text(finished):
    parts = {}
    for row in rows(finished, "task"):
        parts.setdefault(row["part"], set()).add(row["text"])
    assert {name: len(texts) for name, texts in parts.items()}["train"] == 12
    assert not parts["train"] & parts["validation"]
    assert not (parts["train"] | parts["validation"]) & parts["test"]


def test_the_search_moves_among_kept_words_alone(finished):
    kept = {row["id"] for row in rows(finished, "prune") if row["keep"]}
    assert len(kept) == 10
    asked = rows(finished, "search")
    assert {word for row in asked for word in row["words"]} <= kept
    assert len(asked) == 40
    assert [row["stop"] for row in asked] == [""] * 39 + ["prompts"]


def test_the_verdict_names_one_prompt_on_both_parts(finished):
    made = rows(finished, "test")
    assert [(r["contender"], r["part"]) for r in made] == [
        (name, part)
        for part in ("validation", "test")
        for name in ("found", "empty", "manual", "control")
    ]
    chosen = {row["contender"] for row in made if row["chosen"]}
    assert len(chosen) == 1
    assert chosen <= {"found", "empty", "manual"}
    best = max(rows(finished, "search"), key=lambda row: (row["reward"], row["accuracy"]))
    assert made[0]["prompt"] == best["prompt"]


def test_the_same_rows_again_without_the_log(recipe, finished, tmp_path):
    again = run_recipe(
        recipe("influence.remember=false", "search.remember=false", "test.remember=false"),
        Store(tmp_path),
        threads=1,
    )
    for name, manifest in finished.manifests.items():
        assert again.manifests[name].key == manifest.key
        assert again.manifests[name].logical_digest == manifest.logical_digest, name


def test_how_it_is_asked_does_not_enter_the_key(recipe, finished):
    again = run_recipe(
        recipe(
            "influence.batch_tokens=99", "influence.max_queries=100000", "test.max_tokens=999999"
        ),
        finished.store,
    )
    assert again.manifests["test"].key == finished.manifests["test"].key


def test_halving_keeps_as_many_words(recipe, finished):
    again = run_recipe(recipe("influence.halving=2", "influence.least=0.4"), finished.store)
    assert sum(row["keep"] for row in rows(again, "prune")) == 10
    assert sum(row["finalist"] for row in rows(again, "influence")) == 1 + 10
    with pytest.raises(BudgetError, match="`least`"):
        run_recipe(recipe("influence.halving=2", "influence.least=0.1"), finished.store)


def test_a_budget_that_does_not_reach_is_taken_up_again(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    store = Store(tmp_path / "store")
    with pytest.raises(BudgetError, match=r"max_queries.*prunery plan"):
        run_recipe(recipe("influence.max_queries=100", "influence.batch_tokens=16"), store)
    asked = count_asked(monkeypatch)
    run_recipe(recipe("influence.batch_tokens=16"), store)
    influence = (1 + 24) * 12
    assert asked["influence"] == influence - 96  # whole prompts alone: 8 of 12 rows


def count_asked(monkeypatch):
    """Queries that really went to the black box, by the step that sent them."""
    from prunery.pipelines.prompts import boxes

    made, real = {}, boxes.open_asker

    def counting(task, texts, how):
        asker = real(task, texts, how)
        name = type(how).__name__.removesuffix("Options").lower()
        inner = asker.box.label_logprobs

        def ask(prompts, some):
            made[name] = made.get(name, 0) + len(prompts) * len(some)
            return inner(prompts, some)

        asker.box.label_logprobs = ask
        return asker

    monkeypatch.setattr(boxes, "open_asker", counting)
    return made


@pytest.mark.parametrize(
    ("setting", "said", "error"),
    [
        ("influence.halving=9", "the task has 6", RecipeError),
        ("task.shots=100", "100", InputError),
        ("search.max_queries=3", "one prompt", BudgetError),
    ],
)
def test_what_cannot_be_done_says_so(recipe, tmp_path, setting, said, error):
    with pytest.raises(error, match=said):
        run_recipe(recipe(setting), Store(tmp_path))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("search.method=annealing", "unknown search"),
        ("search.method=[1]", "valid string"),
        ("search.reward=loss", "reward"),
        ("search.populaton=3", "population"),
        ("search.max_cost=1", "input_price"),
        ("influence.halving_by=loss", "halving_by"),
        ("test.judge=loss", "judge"),
        ("task.template='{txt}'", "unknown slot"),
        ("task.black_box=causal", None),
        ("task.base_url=http://127.0.0.1:1/v1", "base_url"),
        ("task.top_logprobs=5", "belongs to endpoint"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(recipe, setting, said):
    if said is None:
        assert recipe(setting).step("task").options.templates()[0].source == "{text} {prompt}"
        return
    with pytest.raises(RecipeError, match=said):
        recipe(setting)


def test_of_count_and_keep_the_one_set_last_stands(recipe):
    assert recipe("prune.count=3").step("prune").options.kept_of(24) == 3
    assert recipe("prune.count=3", "prune.keep=0.5").step("prune").options.kept_of(24) == 12


def test_another_search_leaves_the_options_of_the_last_behind(recipe):
    options = recipe("search.method=greedy").step("search").options
    assert options.options == {}
    assert options.length == 2
