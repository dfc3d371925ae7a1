"""The search over a real small model: what a genome is worth, and the step around it."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from prunery.errors import BudgetError, InputError
from prunery.pipelines.compression import searching
from prunery.pipelines.compression.parts import model_parts
from prunery.pipelines.compression.plan import Sources, make_plan, row_of
from prunery.pipelines.compression.plan_options import PlanOptions
from prunery.pipelines.compression.search_options import SearchBudgetsOptions
from prunery.pipelines.compression.supernet import LevelStore, Supernet, segments
from prunery.pipelines.compression.tables import CALIBRATION, PLAN
from prunery.pipelines.compression.work import work_folder
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps.search_budgets import FOUND, SPEC
from prunery.pruners.models.streamed_model import StreamedModel
from prunery.storage import Store

from ...tiny_causal import VOCABULARY, saved_model

SMALL = dict(  # noqa: C408
    rounds=2, generations=3, offspring=5, swaps=2, survivors=[3, 2], tokens=[30, 90]
)


def rows(count=8, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, rng.integers(6, 20)) for _ in range(count)]


def supernet(folder, work, options, given, tokens=(1000,), top=VOCABULARY):
    model = StreamedModel(folder)
    parts = model_parts(model, options.unit, options.parts)
    store = LevelStore(
        work, model, parts, [row_of(part, part.total) for part in parts],
        searching._maker(model, options, 0), None,
    )  # fmt: skip
    net = Supernet(model, given, store, parts, tokens=tokens, top=top, tokens_a_batch=40)
    return net, parts


def divergence(dense, other, given):
    """KL(dense || other) a token by the definition, in float64."""
    total, count = 0.0, 0
    for row in given:
        ids = torch.from_numpy(row)[None]
        with torch.no_grad():
            p = torch.log_softmax(dense(ids).logits[0].double(), -1)
            q = torch.log_softmax(other(ids).logits[0].double(), -1)
        total += float((p.exp() * (p - q)).sum())
        count += len(row)
    return total / count


def test_fitness_is_the_divergence_of_the_masked_model(tmp_path):
    folder, given = saved_model(tmp_path, "llama"), rows()
    options = SearchBudgetsOptions(method="magnitude")
    net, parts = supernet(folder, tmp_path / "levels", options, given)
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    genomes = [
        tuple(part.total for part in parts),
        tuple(part.total // 2 for part in parts),
        tuple(part.total // (2 + place % 3) for place, part in enumerate(parts)),
        tuple(part.total // 2 for part in parts),
    ]
    values = net(genomes, 0)
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[1] == values[3]
    for genome, value in zip(genomes[1:3], values[1:3], strict=True):
        other = AutoModelForCausalLM.from_pretrained(folder).eval()
        for part, keep in zip(parts, genome, strict=True):
            weight = other.get_submodule(f"model.layers.{part.layer}.{part.module}").weight.data
            order = np.argsort(-weight.abs().numpy().ravel(), kind="stable")
            weight.view(-1)[torch.from_numpy(order[keep:].copy())] = 0
        assert value == pytest.approx(divergence(dense, other, given), rel=1e-3)
    # Back to dense after other genomes: nothing is left behind.
    net._known.clear()
    assert net([genomes[0]], 0)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "mixtral", "qwen2_moe"])
def test_groups_of_every_kind_of_block_can_be_set(tmp_path, name):
    folder = saved_model(tmp_path, name)
    options = SearchBudgetsOptions(method="magnitude_groups")
    net, parts = supernet(folder, tmp_path / "levels", options, rows(4))
    whole = tuple(part.total for part in parts)
    fewer = tuple(max(1, part.total // 2) for part in parts)
    dense, half = net([whole, fewer], 0)
    assert dense == pytest.approx(0, abs=1e-6)
    assert half > 0.01


def test_later_stages_look_at_more_rows_and_the_first_at_one_at_least():
    given = [np.arange(10), np.arange(4), np.arange(4), np.arange(9)]
    made = segments(given, [5, 18, 100])
    assert [[len(row) for row in segment] for segment in made] == [[10], [4, 4], [9]]
    assert [len(s) for s in segments(given[:1], [5, 18])] == [1, 0]
    with pytest.raises(InputError, match="at least one row"):
        segments([], [5])
    with pytest.raises(InputError, match="tokens in row 1"):
        segments([np.arange(3), np.arange(0)], [50])


def calibration(store, given):
    table = pa.Table.from_pylist(
        [
            {
                "id": number,
                "domain": "",
                "input_ids": row.tolist(),
                "labels": row.tolist(),
                "sources": [number],
                "score": None,
            }
            for number, row in enumerate(given)
        ],
        CALIBRATION,
    )
    with store.write(
        name="rows", schema=CALIBRATION, step="calibration_rows", version=1, options={},
        inputs=[], models={}, seed=0,
    ) as writer:  # fmt: skip
        with writer.shard(0) as out:
            out.write(table)
        writer.pending(1)
        return writer.commit().key


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    store = Store(tmp_path / "store")
    return store, calibration(store, rows()), str(saved_model(tmp_path, "llama"))


def test_the_step_finds_a_budget_no_worse_than_uniform_that_a_plan_takes(place):
    store, key, folder = place
    options = SearchBudgetsOptions(method="magnitude", sparsity=0.6, model=folder, **SMALL)
    made = SPEC(options, {"rows": key}, StepContext(store, name="found"))
    table = store.table(made.key)
    found = table.to_table().to_pylist()
    assert table.to_table().schema.equals(PLAN)
    summary = json.loads(table.attachment(FOUND).read_text())
    assert summary["best"] <= summary["start"]
    assert summary["evaluations"] <= summary["limit"] == made.notes["evaluations_at_most"]
    uniform = make_plan(
        Sources(StreamedModel(folder)), PlanOptions(method="magnitude", sparsity=0.6)
    )
    assert sum(row["keep"] for row in found) == sum(row["keep"] for row in uniform)
    assert [row["keep"] for row in found] != [row["keep"] for row in uniform]
    rows_ = make_plan(
        Sources(StreamedModel(folder), budgets=found),
        PlanOptions(method="magnitude", sparsity=0.6, allocation="search"),
    )
    assert [row["keep"] for row in rows_] == [row["keep"] for row in found]
    assert not work_folder(made.key).exists()
    assert SPEC(options, {"rows": key}, StepContext(store)).key == made.key


def test_a_search_from_erk_keeps_what_erk_gives_each_kind(place):
    store, key, folder = place
    options = SearchBudgetsOptions(method="magnitude", start="erk", model=folder, **SMALL)
    made = SPEC(options, {"rows": key}, StepContext(store, name="found"))
    found = store.table(made.key).to_table().to_pylist()
    erk = make_plan(
        Sources(StreamedModel(folder)), PlanOptions(method="magnitude", allocation="erk")
    )
    kinds = {row["module"] for row in erk}
    for kind in kinds:
        assert sum(row["keep"] for row in found if row["module"] == kind) == sum(
            row["keep"] for row in erk if row["module"] == kind
        )
    assert [row["keep"] for row in found] != [row["keep"] for row in erk]


def test_a_killed_search_asks_nothing_again_and_ends_the_same(place, monkeypatch, tmp_path):
    store, key, folder = place
    options = SearchBudgetsOptions(method="magnitude_groups", model=folder, **SMALL)
    whole = (
        SPEC(options, {"rows": key}, StepContext(Store(tmp_path / "other"), name="x"))
        if (calibration(Store(tmp_path / "other"), rows()) == key)
        else None
    )
    assert whole is not None
    real, count = Supernet._fitness, 0

    def dying(self, genome, stage):
        nonlocal count
        if count == 12:
            raise KeyboardInterrupt
        count += 1
        return real(self, genome, stage)

    monkeypatch.setattr(Supernet, "_fitness", dying)
    with pytest.raises(KeyboardInterrupt):
        SPEC(options, {"rows": key}, StepContext(store))
    asked = []

    def watching(self, genome, stage):
        asked.append((genome, stage))
        return real(self, genome, stage)

    monkeypatch.setattr(Supernet, "_fitness", watching)
    again = SPEC(options, {"rows": key}, StepContext(store))
    assert again.logical_digest == whole.logical_digest
    summary = json.loads(store.table(again.key).attachment(FOUND).read_text())
    assert len(asked) == summary["evaluations"] - 12


def test_statistics_that_a_method_needs_are_asked_for(place):
    store, key, folder = place
    options = SearchBudgetsOptions(method="wanda", model=folder, **SMALL)
    with pytest.raises(InputError, match="needs the statistics count, sum_squares"):
        SPEC(options, {"rows": key}, StepContext(store))
    options = SearchBudgetsOptions(
        method="magnitude_groups", sparsity=0.3, min_keep=1.0, model=folder, **SMALL
    )
    with pytest.raises(BudgetError, match="smallest whole groups"):
        SPEC(options, {"rows": key}, StepContext(store))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "reap"}, "whole experts, of which"),
        ({"method": "block_influence"}, "whole layers, of which"),
        ({"method": "none"}, "unknown method"),
        ({"method": "flap", "start": "erk"}, "erk is for methods over weights"),
        ({"method": "wanda", "tokens": [5]}, "one number for each"),
        ({"method": "wanda", "tokens": [50, 5, 6]}, "rise from stage"),
        ({"method": "wanda", "survivors": [1, 2, 3]}, "fewer from stage"),
        ({"method": "wanda", "pattern": "2:4"}, "unknown option `pattern`"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, says):
    with pytest.raises(ValidationError, match=says):
        SearchBudgetsOptions(**options)
