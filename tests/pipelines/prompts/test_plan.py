"""The plan against what really goes to a black box, for every search, with and without halving."""

import json

import numpy as np
import pytest
import yaml

from prunery.errors import BudgetError, RecipeError
from prunery.pipelines.prompts import boxes
from prunery.pipelines.prompts.plan import plan_recipe
from prunery.pipelines.prompts.plan_bounds import Asks, Bound
from prunery.pipelines.recipe import apply_overrides, parse_recipe
from prunery.pipelines.run import run_recipe
from prunery.storage import Store

WORDS = [
    *("ship", "harbour", "sailor", "wave", "anchor", "tide", "fish", "net", "storm", "captain"),
    *("farm", "field", "plough", "horse", "barn", "wheat", "fence", "gate", "road", "cart"),
    *("cloud", "star", "kite", "moon"),
]
RECIPE = """
name: prompt
steps:
  data: {{step: read_dataset, path: {rows}, holdout: 0.4}}
  task:
    step: prompt_task
    inputs: {{data: data}}
    model: {model}
    manual: a text about
    shots: 6
    validation_shots: 5
  vocabulary: {{step: prompt_vocabulary, inputs: {{task: task}}, source: file, path: {words}}}
  influence: {{step: prompt_influence, inputs: {{task: task, words: vocabulary}}}}
  prune: {{step: prune_prompts, inputs: {{influence: influence}}, keep: 0.4}}
  search:
    step: search_prompts
    inputs: {{task: task, words: prune}}
    length: 2
    prompts: 40
  test: {{step: test_prompts, inputs: {{task: task, search: search}}}}
"""
N, V, KEPT = 12, 24, 10
SMALL = {
    "greedy": [],
    "genetic": ["search.population=12", "search.mutants=6", "search.crossovers=6"],
    "particle_swarm": ["search.population=9", "search.epochs=3"],
    "random": [],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("plan")
    rng = np.random.default_rng(0)
    rows = [
        {"text": " ".join(rng.choice(some, 5)) + f" {i}", "label": name}
        for i in range(40)
        for name, some in (("sea", WORDS[:10]), ("land", WORDS[10:]))
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "words.txt").write_text("\n".join(WORDS))
    text = RECIPE.format(rows=folder / "rows.jsonl", model=models[0], words=folder / "words.txt")
    return lambda *overrides, more="": apply_overrides(parse_recipe(text + more), overrides)


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """What each step charges and sends, in a log of its own; `sent` is counted at the box."""
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    made, real = {}, boxes.open_asker

    def counting(task, texts, how):
        asker = real(task, texts, how)
        name = type(how).__name__.removesuffix("Options").removesuffix("Prompts").lower()
        one = made[name] = {"asker": asker, "sent": 0}
        inner = asker.box.label_logprobs

        def ask(prompts, some):
            one["sent"] += len(prompts) * len(some)
            return inner(prompts, some)

        asker.box.label_logprobs = ask
        return asker

    monkeypatch.setattr(boxes, "open_asker", counting)
    return made


def asks(plan):
    return {step.name: step.asks for step in plan.steps if step.asks is not None}


def check(plan, counted, *, sent_exact=True):
    """Each step's charge, what it sent, and that its tokens are within the bound."""
    assert set(asks(plan)) == set(counted)
    for name, planned in asks(plan).items():
        spent, sent = counted[name]["asker"].spent, counted[name]["sent"]
        assert planned.exact, name
        assert planned.queries == spent.queries, name
        assert spent.tokens <= planned.tokens, name
        if sent_exact:
            assert planned.sent_exact, name
            assert planned.sent == sent, name
        else:
            assert planned.sent >= sent, name


@pytest.mark.parametrize("halving", [False, True])
@pytest.mark.parametrize("method", list(SMALL))
def test_what_is_planned_is_what_is_asked(recipe, counted, tmp_path, method, halving):
    rounds = ["influence.halving=2", "influence.least=0.4"] if halving else []
    made = recipe(f"search.method={method}", *SMALL[method], *rounds)
    store = Store(tmp_path / "store")
    plan = plan_recipe(made, store, threads=1)
    assert not counted, "nothing was asked"
    assert [s.state for s in plan.steps] == ["made now"] * 3 + ["to do"] * 4
    influence = asks(plan)["influence"]
    assert influence.prompts == 1 + V
    # 24 words on 2 x 2 rows, 12 on 4 more, 10 on the last 4, or all on all 12.
    assert influence.queries == N + (24 * 4 + 12 * 4 + 10 * 4 if halving else V * N)
    search = asks(plan)["search"]
    assert search.prompts == {"greedy": 2 * KEPT, "particle_swarm": 36}.get(method, 40)
    assert search.queries == search.prompts * N
    assert search.queries - search.sent == (KEPT * N if method == "greedy" else 0)
    run_recipe(made, store, threads=1)
    check(plan, counted)
    again = plan_recipe(made, store, threads=1)
    assert [step.state for step in again.steps] == ["done"] * 7
    assert again.total is None


@pytest.mark.parametrize(
    "settings",
    [
        ["search.reward=kl"],
        ["search.reward=kl", "search.method=greedy", "search.prompts=7"],
        ["search.length=1"],
        ["search.length=1", "search.method=random", "search.prompts=4"],
        ["search.max_queries=100"],
        ["search.reward=kl", "search.max_queries=100"],
        ["search.prompts=5000"],  # more than there are
        ["test.finalists=3"],
        ["task.manual=''"],
        ["prune.keep=0.1", "search.method=greedy"],
        ["influence.remember=false", "search.method=greedy"],
        ["search.remember=false", "search.method=greedy"],
        ["test.remember=false", "test.finalists=3"],
        ["search.inputs.words=vocabulary", "search.method=greedy", "search.prompts=60"],
        ["search.inputs.words=vocabulary", "search.method=greedy", "search.prompts=5"],
        ["search.inputs.words=vocabulary", "search.length=1", "search.prompts=5"],
        [
            "influence.halving=2",
            "influence.least=0.4",
            "search.inputs.words=vocabulary",
            "search.method=greedy",
        ],
    ],
)
def test_every_option_that_changes_what_is_asked(recipe, counted, tmp_path, settings):
    made = recipe(*settings)
    store = Store(tmp_path / "store")
    plan = plan_recipe(made, store)
    run_recipe(made, store, threads=1)
    check(plan, counted)


@pytest.mark.parametrize(
    "settings",
    [
        ["search.published=true", "search.population=6", "search.epochs=4", "search.prompts=30"],
        ["task.manual=ship harbour"],
        [
            "influence.halving=2",
            "influence.least=0.4",
            "search.inputs.words=vocabulary",
            "search.method=greedy",
            "search.prompts=5",
        ],
    ],
)
def test_what_may_be_less_is_said_to_be_at_most(recipe, counted, tmp_path, settings):
    made = recipe(*settings)
    store = Store(tmp_path / "store")
    plan = plan_recipe(made, store)
    assert not all(a.sent_exact for a in asks(plan).values())
    assert "at most" in "\n".join(plan.lines())
    run_recipe(made, store, threads=1)
    check(plan, counted, sent_exact=False)


CONTROL = """
  control_words:
    step: prune_prompts
    inputs: {influence: influence}
    method: random_prompts
    keep: 0.4
  control:
    step: search_prompts
    inputs: {task: task, words: control_words}
    method: greedy
    length: 2
"""


def test_a_control_may_ask_what_the_search_has_asked(recipe, counted, tmp_path):
    made = recipe("search.method=greedy", "test.inputs.control=control", more=CONTROL)
    store = Store(tmp_path / "store")
    plan = plan_recipe(made, store)
    planned = asks(plan)
    assert planned["search"].sent_exact and not planned["control"].sent_exact
    assert not planned["test"].sent_exact
    assert planned["control"].sent == KEPT * N
    rows = len(counted)
    assert rows == 0
    run_recipe(made, store, threads=1)
    # Both searches are counted under one name; the control came last.
    assert planned["control"].queries == counted["search"]["asker"].spent.queries
    assert planned["test"].queries == counted["test"]["asker"].spent.queries
    assert planned["control"].sent >= counted["search"]["sent"]


def test_a_step_that_was_stopped_has_only_the_rest_to_send(recipe, counted, tmp_path):
    store = Store(tmp_path / "store")
    with pytest.raises(BudgetError):
        run_recipe(recipe("influence.max_queries=100", "influence.batch_tokens=16"), store)
    done = counted.pop("influence")["sent"]
    assert done == 96
    plan = plan_recipe(recipe(), store)
    assert asks(plan)["influence"].queries == (1 + V) * N
    assert asks(plan)["influence"].sent == (1 + V) * N - done
    run_recipe(recipe(), store, threads=1)
    check(plan, counted)


def test_a_search_that_was_stopped_goes_on_where_it_was(recipe, counted, tmp_path, monkeypatch):
    made = recipe(*SMALL["genetic"])
    store = Store(tmp_path / "store")
    stopped, real = [], boxes.open_asker

    def failing(task, texts, how):
        asker = real(task, texts, how)
        if "Search" in type(how).__name__:
            inner, asker.batch = asker.box.label_logprobs, 36

            def ask(prompts, some):
                if len(stopped) == 5:
                    raise KeyboardInterrupt
                stopped.append(len(prompts) * len(some))
                return inner(prompts, some)

            asker.box.label_logprobs = ask
        return asker

    with monkeypatch.context() as patch:
        patch.setattr(boxes, "open_asker", failing)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(made, store, threads=1)
    # Five batches of three prompts: the first generation of twelve and half of the next.
    assert sum(stopped) == 15 * N
    counted.clear()
    plan = plan_recipe(made, store)
    assert [s.state for s in plan.steps] == ["done"] * 5 + ["to do"] * 2
    assert asks(plan)["search"].sent == 25 * N
    run_recipe(made, store, threads=1)
    check(plan, counted)


def test_a_budget_that_does_not_reach_is_said(recipe, counted, tmp_path):
    store = Store(tmp_path / "store")
    plan = plan_recipe(
        recipe("influence.max_queries=9", "search.max_queries=5", "test.max_tokens=10"), store
    )
    said = "\n".join(plan.lines())
    assert "influence: `max_queries` of 9 does not reach: it fails" in said
    assert "search: `max_queries` does not reach for one prompt: it fails" in said
    assert "test: `max_tokens` may end it earlier" in said
    assert asks(plan)["test"].tokens == 10
    with pytest.raises(BudgetError):
        run_recipe(recipe("influence.max_queries=9"), store)
    ended = plan_recipe(recipe("search.max_queries=100"), store)
    assert "search: `max_queries` ends it after 8 prompts" in "\n".join(ended.lines())


def test_the_published_rule_may_keep_any_number(recipe, counted, tmp_path):
    plan = plan_recipe(recipe("prune.rule=percentile"), Store(tmp_path / "store"))
    assert not asks(plan)["search"].exact
    assert "at most 40" in "\n".join(plan.lines())


def test_an_endpoint_is_priced_without_a_word_to_it(recipe, counted, tmp_path):
    made = recipe(
        "task.black_box=endpoint",
        "task.base_url=http://127.0.0.1:1/v1",
        "task.model=some",
        "influence.input_price=1.0",
        "influence.output_price=10.0",
        "search.input_price=1.0",
        "search.output_price=10.0",
        "search.max_cost=0.001",
        "test.input_price=1.0",
    )
    store = Store(tmp_path / "store")
    plan = plan_recipe(made, store)
    influence = asks(plan)["influence"]
    texts = [
        row["text"] for row in store.table("task").to_table().to_pylist() if row["part"] == "train"
    ]
    words = ["", *WORDS]
    bytes_ = sum(len(f"{text} {word}".strip().encode()) + 8 for text in texts for word in words)
    read = influence.tokens - influence.queries
    assert bytes_ <= read <= bytes_ + 2 * influence.queries
    assert influence.money == pytest.approx((read + 10 * influence.queries) / 1e6)
    assert asks(plan)["search"].money == 0.001
    assert not asks(plan)["search"].exact
    total = plan.total
    assert total.money == pytest.approx(sum(a.money for a in asks(plan).values()))
    assert "money, at most" in "\n".join(plan.lines())
    json.dumps(plan.as_json())


def test_a_recipe_that_asks_nothing_shows_its_state(recipe, tmp_path):
    text = f"name: r\nsteps:\n  data: {{step: read_dataset, path: {tmp_path}/r.jsonl}}\n"
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(8)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = parse_recipe(text)
    store = Store(tmp_path / "store")
    plan = plan_recipe(made, store)
    assert plan.lines() == ["data  read_dataset  to do"]
    assert store.tables() == [], "nothing had to be made to know that"
    run_recipe(made, store)
    assert plan_recipe(made, store).lines() == ["data  read_dataset  done"]


def test_the_command_prints_the_plan(recipe, counted, tmp_path, capsys):
    from prunery.cli import main

    path = tmp_path / "prompt.yaml"
    path.write_text(yaml.safe_dump(recipe().raw))
    store = ["--store", str(tmp_path / "store")]

    def run(*more):
        with pytest.raises(SystemExit) as stop:
            main(["plan", str(path), *store, *more])
        return stop.value.code, capsys.readouterr().out

    code, said = run()
    assert code == 0
    assert "influence   prompt_influence   to do" in said
    assert "300" in said
    code, said = run("--json", "--set", "search.method=greedy")
    assert code == 0
    made = json.loads(said)
    assert made["total"]["queries"] == 300 + 240 + made["steps"][-1]["asks"]["queries"]
    assert made["steps"][0] == {
        "name": "data",
        "step": "read_dataset",
        "state": "done",
        "asks": None,
    }
    assert run("--set", "search.method=other")[0] == 2
    assert not counted


def test_what_cannot_run_cannot_be_planned(recipe, tmp_path):
    with pytest.raises(RecipeError, match="the task has 6"):
        plan_recipe(recipe("influence.halving=9"), Store(tmp_path / "store"))


def test_a_model_that_is_not_opened_has_no_bound():
    bound = Bound(None, None)
    assert bound.tokens(["a"], ["b"]) is None
    assert bound.longest(["a"], 3) is None
    assert bound.longest([], 3) is None


def test_the_sum_is_exact_only_where_its_parts_are():
    from prunery.pipelines.prompts.plan import RecipePlan, StepPlan

    steps = [
        StepPlan("a", "x", "to do", Asks(1, 2, 3, 4, None)),
        StepPlan("b", "x", "done"),
        StepPlan("c", "x", "to do", Asks(10, 20, 30, None, None, exact=False)),
    ]
    assert RecipePlan("r", steps).total == Asks(11, 22, 33, None, None, exact=False)
