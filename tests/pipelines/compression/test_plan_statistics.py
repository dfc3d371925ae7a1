"""Plans from measured statistics: one threshold for all layers, and importance by layer."""

import numpy as np
import pyarrow as pa
import pytest

from prunery.errors import InputError, RecipeError
from prunery.pipelines.compression.group_scores import group_scores
from prunery.pipelines.compression.plan import Sources, make_plan
from prunery.pipelines.compression.plan_options import PlanOptions
from prunery.pipelines.compression.statistics import StatisticsTable
from prunery.pipelines.compression.tables import CALIBRATION
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps.plan_compression import SPEC
from prunery.pipelines.steps.weight_statistics import SPEC as STATISTICS
from prunery.pipelines.steps.weight_statistics import WeightStatisticsOptions
from prunery.pruners.models.block_layouts import weight_of
from prunery.pruners.models.streamed_model import StreamedModel
from prunery.storage import Store

from ...tiny_causal import VOCABULARY, saved_model


class Measured:
    """A model, and its statistics over a few random rows."""

    def __init__(self, folder, name):
        self.folder, self.store = str(saved_model(folder, name)), Store(folder / f"{name}-store")
        rng = np.random.default_rng(0)
        rows = [rng.integers(3, VOCABULARY, 12).tolist() for _ in range(6)]
        names = {"domain": "", "sources": [0], "score": None}
        table = pa.Table.from_pylist(
            [{"id": i, "input_ids": r, "labels": r, **names} for i, r in enumerate(rows)],
            CALIBRATION,
        )
        about = {"step": "calibration_rows", "version": 1, "options": {}, "inputs": []}
        with self.store.write(
            name="rows", schema=CALIBRATION, models={}, seed=0, **about
        ) as writer:
            for number in writer.pending(1):
                with writer.shard(number) as out:
                    out.write(table)
            self.rows = writer.commit().key
        wanted = WeightStatisticsOptions(model=self.folder, device="cpu")
        context = StepContext(self.store, name="statistics")
        self.key = STATISTICS(wanted, {"rows": self.rows}, context).key
        self.statistics = StatisticsTable(self.store.table(self.key))
        self.model = StreamedModel(self.folder)

    def plan(self, **options):
        return make_plan(Sources(self.model, self.statistics), PlanOptions(**options))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        made = tmp_path_factory.mktemp("measured")
        patch.setenv("PRUNERY_CACHE", str(made / "cache"))
        yield {name: Measured(made, name) for name in ("llama", "gpt2")}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_global_wanda_counts_are_those_of_one_sort(measured, name):
    here = measured[name]
    rows = here.plan(method="wanda", allocation="global", sparsity=0.4)
    scores = []
    for layer in range(here.model.layers):
        block, layout = here.model.block(layer), here.model.layout
        for matrix in layout.matrices(block):
            squares = here.statistics.layer(layer)[layout.input_of(matrix), "sum_squares"]
            weight = weight_of(block.get_submodule(matrix.name), layout)
            scores.append((weight.abs() * squares.sqrt().float()).numpy().ravel())
    target = sum(row["keep"] for row in rows)
    assert target == -(-sum(len(one) for one in scores) * 6 // 10)
    border = np.sort(np.concatenate(scores))[-target]
    for row, one in zip(rows, scores, strict=True):
        assert (one > border).sum() <= row["keep"] <= (one >= border).sum()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_global_flap_keeps_the_best_groups_of_all_layers(measured, name):
    here = measured[name]
    options = PlanOptions(method="flap", allocation="global", sparsity=0.4)
    rows = make_plan(Sources(here.model, here.statistics), options)
    model = here.model
    ranked = []
    for layer in range(model.layers):
        found = group_scores(
            options.pruner(), model.block(layer), model.layout, model.config,
            here.statistics.layer(layer), layer,
        )  # fmt: skip
        for unit, module in (("head", "attention"), ("neuron", "mlp")):
            score, cost = found[unit]
            ranked += [(-s, layer, module, at, c) for at, (s, c) in enumerate(zip(score, cost))]  # noqa: B905
    ranked.sort(key=lambda one: one[0])  # stable: layer, module, place
    target = 0.6 * sum(row["parameters"] for row in rows)
    expected = {(row["layer"], row["module"]): [] for row in rows}
    spent = 0
    for _, layer, module, at, cost in ranked:
        if spent >= target:
            break
        expected[layer, module].append(at)
        spent += cost
    assert all(expected.values())  # no floor was in the way
    for row in rows:
        assert row["kept"] == sorted(expected[row["layer"], row["module"]])
        assert row["keep"] == len(row["kept"])


def test_importance_comes_from_the_table(measured):
    here = measured["llama"]
    rows = here.plan(method="magnitude", allocation="importance", sparsity=0.5, steepness=20.0)
    angle = []
    for layer in range(3):
        found = here.statistics.layer(layer)
        angle.append(float(found["", "angle"]) / int(found["", "count"]))
    assert [row["importance"] for row in rows[::7]] == pytest.approx(angle)
    share = [sum(r["keep"] for r in rows if r["layer"] == layer) for layer in range(3)]
    assert np.argsort(share).tolist() == np.argsort(angle).tolist()


def test_layers_go_by_their_influence(measured):
    here = measured["llama"]
    rows = here.plan(method="block_influence", sparsity=1 / 3)
    cosine = [float(here.statistics.layer(layer)["", "cosine"]) for layer in range(3)]
    assert [row["keep"] for row in rows] == [int(at != np.argmax(cosine)) for at in range(3)]
    assert {(row["module"], row["unit"], row["total"]) for row in rows} == {("", "layer", 1)}


def test_a_half_that_the_method_does_not_score_and_missing_statistics_are_refused(measured):
    with pytest.raises(RecipeError, match="layer 0 attention: `cfsp` scores no heads"):
        measured["llama"].plan(method="cfsp", allocation="global")
    with pytest.raises(InputError, match="layer 0.*statistic `m2`"):
        make_plan(Sources(measured["llama"].model), PlanOptions(method="flap", allocation="global"))


def test_the_step_reads_the_statistics_it_is_given(measured):
    here = measured["llama"]
    options = PlanOptions(method="flap", allocation="global", sparsity=0.4, model=here.folder)
    made = SPEC(options, {"statistics": here.key}, StepContext(here.store, name="plan"))
    found = here.store.table(made.key).to_table().to_pylist()
    assert [row["kept"] for row in found] == [
        row["kept"] for row in here.plan(method="flap", allocation="global", sparsity=0.4)
    ]
