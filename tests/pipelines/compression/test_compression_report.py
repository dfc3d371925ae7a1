import re

import pyarrow as pa
import pytest

from prunery.pipelines.compression import report as page
from prunery.pipelines.compression.tables import PLAN
from prunery.pipelines.engine import StepContext
from prunery.pipelines.sft_tables import CHATS
from prunery.pipelines.steps.report_compression import SPEC as REPORT
from prunery.pipelines.steps.report_compression import ReportCompressionOptions
from prunery.pipelines.steps.verify_compression import SPEC as VERIFY_STEP
from prunery.pipelines.steps.verify_compression import VerifyCompressionOptions
from prunery.storage import Store

from ...tiny_causal import saved_model
from .model_rows import compressed_rows, compressed_table, pruned, rows_table

DECISION = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("keep", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)


def table(store, name, step, schema, rows, inputs=(), **options):
    with store.write(name=name, step=step, schema=schema, options=options, inputs=inputs) as writer:
        for number in writer.pending(1):
            with writer.shard(number) as out:
                out.write(pa.Table.from_pylist(rows, schema))
        return writer.commit().key


def plan_row(layer, module, keep, **more):
    row = {"id": 10 * layer + len(module), "layer": layer, "module": module, "unit": "weight"}
    row |= {"total": 1000, "keep": keep, "parameters": 1000, "n": None, "m": None, "bits": None}
    return {**row, "group_size": None, "importance": None, "kept": None, **more}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A store with a judged model, its plan, its calibration rows and a decision before them."""
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    store, dense = Store(tmp_path / "store"), saved_model(tmp_path, "llama")
    message = {"role": "user", "content": "<script>drop me</script>", "tool_calls": ""}
    chats = [
        {"id": n, "source": f"rows.jsonl#{n + 1}", "domain": "a", "format": "messages",
         "messages": [{**message, "train": False}], "tools": "", "raw": "{}"}
        for n in range(6)
    ]  # fmt: skip
    keys = {"chats": table(store, "chats", "read_chats", CHATS, chats)}
    decision = [
        {"id": n, "keep": n < 3, "reason": "kept" if n < 3 else "redundant", "score": n / 8}
        for n in range(6)
    ]
    keys["decision"] = table(
        store, "chosen", "prune_sft", DECISION, decision, [keys["chats"]], method="qtuning"
    )
    keys["calibration"] = rows_table(store, count=3, name="calibration", seed=1)
    rows = [
        plan_row(n, name, 900) for n in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")
    ]
    rows.append(plan_row(2, "mlp.down_proj", 1000, n=2, m=4, bits=4, group_size=16))
    keys["plan"] = table(
        store, "plan", "plan_compression", PLAN, rows, method="wanda",
        options={"alpha": 0.25}, sparsity=0.1, bits=None,
    )  # fmt: skip
    for role, seed in (("model", None), ("control", 1)):
        folder = pruned(dense, tmp_path / role, 0.9, seed=seed)
        inputs = [keys["plan"], keys["calibration"]] if role == "model" else []
        keys[role] = compressed_table(
            store, folder, compressed_rows(3, 0.9), name=role, inputs=inputs
        )
    judged = {"model": keys["model"], "control": keys["control"], "rows": rows_table(store)}
    options = {"dense": str(dense), "speed": False, "resamples": 50, "tolerance": 10.0}
    keys["verify"] = VERIFY_STEP(
        VerifyCompressionOptions(**options), judged, StepContext(store=store, name="verify")
    ).key
    return store, keys


def shown(store, inputs, **options):
    context = StepContext(store=store, name="report")
    table = store.table(REPORT(ReportCompressionOptions(**options), inputs, context).key)
    return table.attachment("report.html").read_text()


def test_the_page_leads_from_a_dropped_row_to_the_perplexity(made):
    store, keys = made
    text = shown(store, {k: v for k, v in keys.items() if k != "control"}, title="A <b>title</b>")
    verdict = {row["role"]: row for row in store.table(keys["verify"]).to_table().to_pylist()}
    assert "<script>" not in text and "<b>title</b>" not in text
    assert "&lt;script&gt;drop me" in text
    for role in ("dense", "compressed", "control"):
        assert f"{verdict[role]['perplexity']:.4f}" in text
    assert "Random, same budget" in text
    assert re.search(r'The verdict: <span class="kept">accepted', text)
    assert "perplexity +" in text or "perplexity -" in text
    assert "Method <code>wanda</code> with <code>sparsity=0.1, alpha=0.25</code>" in text
    assert "3 of 6 rows stayed, 3 went; the calibration rows use 3 of them." in text
    assert "of those were dropped" not in text
    assert "<td>redundant</td>" in text and "under seed 1" in text
    for title in ("What each layer kept", "Error of each layer", "Each evaluation row"):
        assert title in text
    for name in ("chats", "chosen", "calibration", "plan", "model", "control", "verify"):
        assert f"<td>{name}</td>" in text, name
    assert "2:4" in text and "<td>feed-forward</td>" in text
    assert "The size on disk did not fall." in text
    assert len(text) < 100_000


def test_a_calibration_that_read_dropped_rows_is_told(made):
    store, keys = made
    decision = [
        {"id": n, "keep": n > 0, "reason": "kept" if n else "near_duplicate", "score": 0.5}
        for n in range(6)
    ]
    keys["duplicates"] = table(store, "unique", "prune_passages", DECISION, decision)
    text = shown(store, {k: keys[k] for k in ("model", "verify", "calibration", "duplicates")})
    assert "5 of 6 rows stayed, 1 went" in text
    assert "1 of those were dropped: the calibration did not read this decision." in text
    assert "<del>" not in text  # no table of texts was given


def test_the_page_of_a_model_and_its_verdict_alone(made):
    store, keys = made
    text = shown(store, {"model": keys["model"], "verify": keys["verify"]})
    assert "The plan" not in text and "What it was calibrated on" not in text
    assert "accepted" in text


def test_sizes_and_parts_in_words():
    assert page.size(900) == "900 B"
    assert page.size(1536) == "1.5 KiB"
    assert page.size(3 * 2**30) == "3.00 GiB"
    assert page.part_of("attention.output.dense", "weight") == "attention"
    assert page.part_of("output.dense", "weight") == "feed-forward"
    assert page.part_of("mlp.experts.3.up_proj", "weight") == "experts"
    assert page.part_of("", "layer") == "layer"
    assert page.part_of("mlp", "neuron") == "feed-forward"


def test_examples_take_every_reason_in_turn():
    reasons = ["kept", "a", "a", "a", "b", "b"]
    decision = pa.table(
        {"id": [9, 8, 7, 6, 5, 4], "keep": [r == "kept" for r in reasons], "reason": reasons}
    )
    assert page.dropped_ids(decision, 4) == [6, 4, 7, 5]
    assert page.dropped_ids(decision, 0) == []
