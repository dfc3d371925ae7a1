import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from prunery.errors import InputError, ModelError
from prunery.pipelines.compression.teacher import (
    TeacherTable,
    ask_teacher,
    target_divergence,
    teacher_targets,
)
from prunery.pipelines.compression.teacher_tables import teacher_schema
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

from ...tiny_causal import saved_model, tiny_model
from ..reused_rows import same_rows
from .recovery_models import pattern_rows, rows_table


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))


def pair(n=6, v=40, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, v)) * scale, rng.normal(size=(n, v)) * scale


def softmax(logits, temperature=1.0):
    wide = logits / temperature
    wide = np.exp(wide - wide.max(1, keepdims=True))
    return wide / wide.sum(1, keepdims=True)


def full_kl(teacher, student, temperature=1.0):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return (p * (np.log(p) - np.log(q))).sum(1)


def coarse_kl(teacher, student, k):
    p, q = softmax(teacher), softmax(student)
    made = []
    for a, b in zip(p, q, strict=True):
        top = np.argsort(-a)[:k]
        a, b = (np.append(x[top], 1 - x[top].sum()) for x in (a, b))
        made.append((a * np.log(a / b)).sum())
    return np.array(made)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_all_tokens_kept_it_is_the_full_divergence(temperature):
    teacher, student = pair()
    targets = teacher_targets(torch.from_numpy(teacher), 99)
    found = target_divergence(torch.from_numpy(student).float(), targets, temperature)
    np.testing.assert_allclose(found, full_kl(teacher, student, temperature), rtol=1e-4)


def test_fewer_tokens_give_a_lower_bound_that_rises_to_the_full_divergence():
    teacher, student = pair(n=50)
    full, before = full_kl(teacher, student), np.zeros(50)
    for k in (1, 2, 5, 20, 39, 40):
        targets = teacher_targets(torch.from_numpy(teacher), k)
        found = target_divergence(torch.from_numpy(student).float(), targets).numpy()
        if k < 40:
            np.testing.assert_allclose(found, coarse_kl(teacher, student, k), rtol=1e-3, atol=1e-5)
        assert (found <= full + 1e-4).all() and (found >= before - 1e-4).all()
        before = found
    np.testing.assert_allclose(before, full, rtol=1e-4)


def test_what_is_kept_is_the_most_likely_with_ties_to_the_smaller_id():
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, -5.0]])
    made = teacher_targets(logits, 3)
    assert made.indices.tolist() == [[1, 2, 3]]
    p = softmax(logits.numpy().astype(np.float64))[0]
    np.testing.assert_allclose(made.values[0].numpy(), np.log(p[[1, 2, 3]]), rtol=1e-5)
    np.testing.assert_allclose(made.tail[0], np.log(p[0] + p[4] + p[5]), rtol=1e-5)
    np.testing.assert_allclose(made.logsumexp[0], np.log(np.exp(logits[0].numpy()).sum()), 1e-5)
    assert teacher_targets(logits, 6).tail.tolist() == [-np.inf]


def test_a_student_that_agrees_has_no_divergence_and_its_gradient_is_finite():
    teacher, student = pair()
    targets = teacher_targets(torch.from_numpy(teacher), 5)
    assert float(target_divergence(torch.from_numpy(teacher).float(), targets).abs().max()) < 1e-5
    sure = torch.from_numpy(teacher).clone()
    sure[:, 0] += 800.0  # no mass is left for the tail
    for given in (targets, teacher_targets(sure, 5)):
        logits = torch.from_numpy(student).float().requires_grad_(True)
        target_divergence(logits, given, 2.0).sum().backward()
        assert bool(torch.isfinite(logits.grad).all())


def teacher(store, rows, folder, *, reuse=True, **options):
    step = STEPS["teacher_logits"]
    context = StepContext(store, "teacher", threads=1, reuse=reuse)
    return step(step.options(model=str(folder), **options), {"rows": rows}, context)


def test_the_step_keeps_what_the_model_says(tmp_path):
    folder, store = saved_model(tmp_path, "llama"), Store(tmp_path / "store")
    rows = pattern_rows(7)
    rows.labels[2][:] = -100
    rows.labels[3][:4] = -100
    given = rows_table(store, rows)
    made = teacher(store, given, folder, k=6, values="float32", rows_a_shard=3, tokens_a_batch=40)
    assert made.rows == 6 and made.dropped == {"no_target": 1}
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    asked = TeacherTable(store.table("teacher"))
    for row in (0, 3, 6):
        wanted = np.flatnonzero(rows.labels[row][1:] != -100) + 1
        targets = asked.targets([int(rows.ids[row])], [wanted])
        with torch.no_grad():
            logits = model(torch.from_numpy(rows.input_ids[row])[None]).logits[0].double()
        log_p = torch.log_softmax(logits, 1)[wanted - 1]
        best = log_p.topk(6, dim=1)
        assert torch.equal(targets.indices, best.indices.sort(1).values)
        torch.testing.assert_close(
            targets.values.double(), log_p.gather(1, targets.indices), rtol=1e-4, atol=1e-4
        )
        other = 1 - best.values.exp().sum(1)
        torch.testing.assert_close(targets.tail.double().exp(), other, rtol=1e-4, atol=1e-4)


def test_rows_do_not_hang_on_shards_and_float16_is_close(tmp_path):
    folder, store = saved_model(tmp_path, "llama"), Store(tmp_path / "store")
    rows = rows_table(store, pattern_rows(6))
    tables = []
    for options in ({"rows_a_shard": 2}, {"values": "float32"}):
        made = teacher(store, rows, folder, k=8, **options)
        tables.append(store.table(made.key).to_table().to_pylist())
    for half, full in zip(*tables, strict=True):
        assert half["id"] == full["id"] and half["indices"] == full["indices"]
        np.testing.assert_allclose(half["values"], full["values"], rtol=1e-3, atol=1e-3)


def test_over_grown_rows_only_new_ones_are_asked(tmp_path):
    folder = saved_model(tmp_path, "llama")
    store, other = Store(tmp_path / "store"), Store(tmp_path / "other")
    options = {"k": 8, "values": "float32", "rows_a_shard": 4}
    first = teacher(store, rows_table(store, pattern_rows(6)), folder, **options)
    tables = []
    for place, reuse in ((store, True), (other, False)):
        rows = rows_table(place, pattern_rows(9), name="grown")
        made = teacher(place, rows, folder, reuse=reuse, **options)
        assert made.notes.get("reused") == ({first.key: 6} if reuse else None)
        tables.append(place.table(made.key).to_table())
    assert tables[0].num_rows == 9
    same_rows(*tables, atol=1e-4)


def test_a_row_or_position_that_was_not_asked_is_named(tmp_path):
    folder, store = saved_model(tmp_path, "llama"), Store(tmp_path / "store")
    rows = pattern_rows(4)
    rows.labels[0][:3] = -100
    teacher(store, rows_table(store, rows), folder)
    asked = TeacherTable(store.table("teacher"))
    with pytest.raises(InputError, match="about row 99; found none"):
        asked.targets([99], [np.array([1])])
    with pytest.raises(InputError, match="row 3: .*about position 2; found others"):
        asked.targets([3], [np.array([2, 3])])
    with pytest.raises(InputError, match="expected the columns of a teacher_logits table"):
        TeacherTable(store.table("rows"))


def test_ids_beyond_the_vocabulary_and_masked_models_are_refused(tmp_path):
    store = Store(tmp_path / "store")
    rows = pattern_rows(3)
    rows.input_ids[1][2] = 300
    given = rows_table(store, rows)
    with pytest.raises(InputError, match="row 10: expected token ids below 300"):
        teacher(store, given, saved_model(tmp_path, "llama"))
    with pytest.raises(InputError, match=r"expected a causal model .* masked one \(bert\)"):
        teacher(store, given, saved_model(tmp_path, "bert"))
    other = rows_table(store, pattern_rows(3), name="other", models={"tokenizer": "f" * 64})
    with pytest.raises(InputError, match="made with the tokenizer ffff"):
        teacher(store, other, saved_model(tmp_path, "gpt2"))


def test_logits_that_are_no_numbers_name_the_row():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    rows = [(5, np.array([4, 5, 6]), np.array([1, 2]))]
    with pytest.raises(ModelError, match="row 5: expected finite logits"):
        ask_teacher(model, rows, k=4, tokens=64, schema=teacher_schema(pa.float32()))


def test_the_notes_are_plain(tmp_path):
    store = Store(tmp_path / "store")
    made = teacher(store, rows_table(store, pattern_rows(3)), saved_model(tmp_path, "llama"), k=4)
    assert json.loads(json.dumps(made.notes))["k"] == 4
