"""Plans for every architecture: exact budgets, legal rows, and what is refused."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from prunery.errors import BudgetError, InputError, RecipeError
from prunery.pipelines.compression.global_scores import count_best_weights
from prunery.pipelines.compression.parts import model_parts
from prunery.pipelines.compression.plan import Sources, make_plan, plan_totals
from prunery.pipelines.compression.plan_options import PlanOptions
from prunery.pipelines.compression.tables import PLAN
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps.plan_compression import SPEC, TOTALS
from prunery.pruners.models.block_layouts import weight_of
from prunery.pruners.models.streamed_model import StreamedModel
from prunery.pruners.weight.magnitude import Magnitude
from prunery.storage import Store

from ...tiny_causal import ARCHITECTURES, saved_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from an architecture (and changes) to its streamed model, each made once."""
    made = {}
    folder = tmp_path_factory.mktemp("models")

    def model(name, **changes):
        key = (name, json.dumps(changes))
        if key not in made:
            made[key] = StreamedModel(saved_model(folder / str(len(made)), name, **changes))
        return made[key]

    return model


class Blocks:
    """Statistics of blocks as a table of them gives: sums over 10 tokens."""

    def __init__(self, **sums):
        self.sums = sums

    def layer(self, number):
        found = {("", "count"): torch.tensor(10)}
        for name, values in self.sums.items():
            found["", name] = torch.tensor(values[number], dtype=torch.float64)
        return found


def plan(model, *, statistics=None, budgets=None, **options):
    return make_plan(Sources(model, statistics, budgets), PlanOptions(**options))


def all_weights(model, layer):
    block = model.block(layer)
    return {
        m.name: weight_of(block.get_submodule(m.name), model.layout)
        for m in model.layout.matrices(block)
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gets_a_row_for_every_matrix_and_exactly_half(models, name):
    model = models(name)
    for allocation in ("uniform", "erk", "global"):
        rows = plan(model, method="magnitude", allocation=allocation)
        named = [(row["layer"], row["module"]) for row in rows]
        expected = [(layer, m) for layer in range(model.layers) for m in all_weights(model, layer)]
        assert named == expected
        total = sum(
            w.numel() for layer in range(model.layers) for w in all_weights(model, layer).values()
        )
        assert sum(row["keep"] for row in rows) == -(-total // 2)
        assert all(row["total"] == row["parameters"] for row in rows)
        assert all(1 <= row["keep"] <= row["total"] for row in rows)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe"])
def test_global_counts_are_those_of_one_sort_of_all_weights(models, name):
    model = models(name)
    rows = plan(model, method="magnitude", allocation="global", sparsity=0.6)
    flat = [
        w.abs().reshape(-1)
        for layer in range(model.layers)
        for w in all_weights(model, layer).values()
    ]
    sizes = [len(one) for one in flat]
    order = torch.sort(torch.cat(flat), descending=True, stable=True).indices
    target = sum(row["keep"] for row in rows)
    where = np.repeat(np.arange(len(sizes)), sizes)[order[:target].numpy()]
    assert [row["keep"] for row in rows] == np.bincount(where, minlength=len(sizes)).tolist()


def test_global_ties_go_to_the_earlier_layer_and_matrix(models):
    model = models("llama")

    class Same:
        layers, layout, config = model.layers, model.layout, model.config

        def block(self, layer):
            block = model.block(layer)
            for m in model.layout.matrices(block):
                block.get_submodule(m.name).weight.data.fill_(0.5)
            return block

    parts = model_parts(model, "weight", ["attention", "mlp"])
    sizes = [part.total for part in parts]
    for target in (0, 1, sizes[0], sizes[0] + 1, sum(sizes) - 1, sum(sizes)):
        counts = count_best_weights(Sources(Same()), Magnitude(), parts, target)
        left, expected = target, []
        for size in sizes:
            expected.append(min(size, left))
            left -= expected[-1]
        assert counts.tolist() == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_group_plans_count_heads_and_neurons_with_what_they_cost(models, name):
    model = models(name)
    rows = plan(model, method="random_groups", sparsity=0.5, tolerance=0.05)
    heads, kv, size = model.layout.sizes(model.config)
    for row in rows:
        sizes = {m: w.shape for m, w in all_weights(model, row["layer"]).items()}
        if row["unit"] == "head":
            assert row["module"] == "attention"
            assert row["total"] == kv
            per = (2 * heads // kv + 2) * size * model.config.hidden_size
            assert row["parameters"] == per * kv
        else:
            assert (row["module"], row["unit"]) == ("mlp", "neuron")
            assert row["total"] == sizes[model.layout.down][1]
            matrices = 2 if model.layout.gate is None else 3
            assert row["parameters"] == matrices * row["total"] * model.config.hidden_size
    assert {row["unit"] for row in rows} == (
        {"head"} if name in ("mixtral", "qwen3_moe") else {"head", "neuron"}
    )
    assert plan_totals(rows)["all"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    by_unit = {(row["unit"], row["keep"]) for row in rows}
    assert len(by_unit) == len({unit for unit, _ in by_unit})  # uniform widths


def test_experts_and_layers(models):
    rows = plan(models("mixtral"), method="reap", sparsity=0.5)
    assert [(r["module"], r["unit"], r["total"], r["keep"]) for r in rows] == [
        ("experts", "expert", 4, 2)
    ] * 3
    assert all(row["parameters"] == 4 * 3 * 32 * 64 for row in rows)
    dense = plan(models("qwen2_moe"), method="reap", sparsity=0.25)
    assert [(r["layer"], r["keep"]) for r in dense] == [(0, 3), (2, 3)]
    with pytest.raises(RecipeError, match="prunes experts.*none in a llama model"):
        plan(models("llama"), method="reap")
    with pytest.raises(BudgetError, match=r"nearest is 0\.2500.*layer 0 experts has 4"):
        plan(models("mixtral"), method="reap", sparsity=0.3)


def test_importance_gives_more_to_layers_that_change_more(models):
    model = models("llama")
    blocks = Blocks(angle=[1.0, 3.0, 2.0], cosine=[9.0, 5.0, 7.0])
    for importance, measured in (("cfsp", [0.1, 0.3, 0.2]), ("adapt", [-0.9, -0.5, -0.7])):
        rows = plan(
            model,
            method="magnitude",
            allocation="importance",
            importance=importance,
            statistics=blocks,
            steepness=5.0,
        )
        share = [
            np.mean([r["keep"] / r["total"] for r in rows if r["layer"] == i]) for i in range(3)
        ]
        assert share[0] < share[2] < share[1]
        assert sum(r["keep"] for r in rows) == sum(r["total"] for r in rows) // 2
        assert [r["importance"] for r in rows[::7]] == pytest.approx(measured)
    with pytest.raises(InputError, match="statistic `angle` of every block.*layer 0"):
        plan(model, method="magnitude", allocation="importance", statistics=Blocks())
    bad = Blocks(angle=[1.0, 2.0, float("nan")])
    with pytest.raises(InputError, match="finite importance.*layer 2"):
        plan(model, method="magnitude", allocation="importance", statistics=bad)


def test_skipped_layers_keep_everything_and_do_not_count(models):
    rows = plan(
        models("llama"), method="magnitude", skip_first=1, skip_last=1, bits=4, group_size=16
    )
    for row in rows:
        skipped = row["layer"] != 1
        assert (row["keep"] == row["total"]) == skipped
        assert (row["bits"] is None) == skipped
    middle = [row for row in rows if row["layer"] == 1]
    assert sum(r["keep"] for r in middle) == sum(r["total"] for r in middle) // 2
    with pytest.raises(RecipeError, match="leave no part of 3 layers"):
        plan(models("llama"), method="magnitude", skip_first=2, skip_last=1)


def test_parts_and_alignment(models):
    rows = plan(models("llama"), method="random_groups", parts=["mlp"], align=16, sparsity=0.25)
    assert [(r["module"], r["keep"]) for r in rows] == [("mlp", 48)] * 3
    with pytest.raises(
        BudgetError, match=r"within 0\.02; the nearest is 0\.3750.*layer 0 mlp has 64"
    ):
        plan(models("llama"), method="random_groups", parts=["mlp"], align=8, sparsity=0.32)
    assert {r["module"] for r in plan(models("opt"), method="wanda", parts=["attention"])} == {
        f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    wide = models("llama", intermediate_size=1024, num_hidden_layers=1)
    rows = plan(wide, method="random_groups", parts=["mlp"], sparsity=0.5)
    assert [r["keep"] for r in rows] == [512]
    with pytest.raises(BudgetError, match="taken 128 at a time"):
        plan(wide, method="random_groups", parts=["mlp"], sparsity=0.45)


def test_a_sparsity_that_no_head_can_meet_names_the_nearest(models):
    with pytest.raises(BudgetError, match=r"nearest is 0\.0000, and the next 0\.5000"):
        plan(models("llama"), method="random_groups", parts=["attention"], sparsity=0.2)
    with pytest.raises(BudgetError, match=r"nearest sparsity is 0\.3996"):
        plan(models("llama"), method="magnitude", min_keep=0.6)
    # Allowed where the user says so.
    rows = plan(
        models("llama"), method="random_groups", parts=["attention"], sparsity=0.4, tolerance=0.2
    )
    assert [row["keep"] for row in rows] == [1, 1, 1]


def test_patterns_fix_the_counts_and_must_divide_the_inputs(models):
    rows = plan(models("mistral"), method="wanda", pattern="1:4")
    assert all(row["keep"] * 4 == row["total"] for row in rows)
    assert {(row["n"], row["m"]) for row in rows} == {(1, 4)}
    with pytest.raises(BudgetError, match=r"layer 0 mlp.down_proj.*groups of 4.*found 66"):
        plan(models("llama", intermediate_size=66), method="wanda", pattern="2:4")


def test_quantisation_alone_keeps_every_weight_and_groups_must_divide(models):
    rows = plan(models("qwen3"), method="none", bits=3, group_size=0)
    assert all(row["keep"] == row["total"] and row["bits"] == 3 for row in rows)
    assert {row["group_size"] for row in rows} == {0}
    with pytest.raises(RecipeError, match=r"layer 0 self_attn.q_proj.*groups of 128.*Use 32, or 0"):
        plan(models("llama"), method="none", bits=4)


def test_search_takes_its_rows_and_refuses_those_of_another_model(models):
    model = models("llama")
    found = plan(model, method="random_groups", sparsity=0.5, widths="padded")
    found[1]["keep"], found[3]["keep"] = found[1]["keep"] + 4, found[3]["keep"] - 4
    found[1]["kept"] = list(range(found[1]["keep"]))
    rows = plan(model, method="random_groups", allocation="search", budgets=found)
    assert [row["keep"] for row in rows] == [row["keep"] for row in found]
    assert rows[1]["kept"] == found[1]["kept"]
    with pytest.raises(InputError, match="layer 0 mlp: expected a budget of 64.*found none"):
        plan(model, method="random_groups", allocation="search", budgets=found[:1])
    with pytest.raises(RecipeError, match=r"`budgets` remove 0\.5000.*asks for 0\.6"):
        plan(model, method="random_groups", allocation="search", budgets=found, sparsity=0.6)
    with pytest.raises(InputError, match="needs budgets"):
        plan(model, method="random_groups", allocation="search")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "no_such"}, "unknown method `no_such`; known here: magnitude"),
        ({"method": "ifd"}, "unknown method `ifd`"),
        ({"method": "wanda", "keep": 0.3}, "unknown option `keep`.*the budget is `sparsity`"),
        ({"method": "none"}, "only quantises: give `bits`"),
        ({"method": "none", "bits": 4, "sparsity": 0.5}, "leave `sparsity` out"),
        ({"method": "wanda", "pattern": "4:2"}, "n < m"),
        ({"method": "wanda", "pattern": "two of four"}, "pattern"),
        ({"method": "wanda", "pattern": "2:4", "sparsity": 0.6}, "leave `sparsity` out"),
        ({"method": "wanda", "pattern": "2:4", "allocation": "erk"}, "allocation is uniform"),
        ({"method": "random_groups", "pattern": "2:4"}, "for methods that prune weights"),
        ({"method": "random_groups", "bits": 4}, "quantise its model in a second plan"),
        ({"method": "random_groups", "allocation": "erk"}, "erk is for methods that prune weights"),
        (
            {"method": "random_groups", "allocation": "global", "widths": "uniform"},
            "widths: padded",
        ),
        ({"method": "random_groups", "skip_first": 1, "widths": "uniform"}, "widths: padded"),
        ({"method": "reap", "allocation": "importance"}, "as many experts"),
        ({"method": "block_influence", "allocation": "importance"}, "has none"),
        ({"method": "wanda", "bits": 5}, "bits"),
        ({"method": "wanda", "sparsity": 1.0}, "sparsity"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_runs(options, says):
    with pytest.raises(ValidationError, match=says):
        PlanOptions(**options)


def test_global_needs_a_score_of_single_weights_and_its_statistics(models):
    with pytest.raises(RecipeError, match="`SparseGpt` has none"):
        plan(models("llama"), method="sparsegpt", allocation="global")
    with pytest.raises(InputError, match=r"layer 0 self_attn.q_proj.*`sum_squares`"):
        plan(models("llama"), method="wanda", allocation="global")


@pytest.mark.parametrize(("name", "count"), [("llama", 21), ("bert", 18)])
def test_the_step_writes_its_rows_and_totals_and_runs_once(tmp_path, monkeypatch, name, count):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    folder, store = saved_model(tmp_path, name), Store(tmp_path / "store")
    options = PlanOptions(method="magnitude", allocation="global", model=str(folder))
    made = SPEC(options, {}, StepContext(store, name="plan"))
    table = store.table(made.key)
    assert table.to_table().schema.equals(PLAN)
    assert table.num_rows == count
    totals = json.loads(table.attachment(TOTALS).read_text())
    assert totals["all"]["after"] == sum(r["keep"] for r in table.to_table().to_pylist())
    assert made.options["method"] == "magnitude"
    assert made.options["widths"] == "padded"
    assert "model" not in made.options
    assert set(made.models) == {"model"}
    again = SPEC(options, {}, StepContext(store, name="plan"))
    assert again.logical_digest == made.logical_digest


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "1:32"])
def test_a_pattern_that_yaml_read_as_a_number_is_read_back(pattern):
    import yaml

    value = yaml.safe_load(f"pattern: {pattern}")["pattern"]
    assert PlanOptions(method="wanda", pattern=value).pattern == pattern


def test_a_number_that_is_no_pattern_is_refused():
    with pytest.raises(ValidationError, match="pattern"):
        PlanOptions(method="wanda", pattern=7)
