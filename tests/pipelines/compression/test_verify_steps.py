import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prunery.errors import InputError, ModelError, RecipeError
from prunery.pipelines.compression import measure_process
from prunery.pipelines.compression import verify as verifying
from prunery.pipelines.compression.measure_process import Speed, measure
from prunery.pipelines.compression.model_tables import model_folder
from prunery.pipelines.compression.packing import pack_model
from prunery.pipelines.compression.verify_tables import VERIFY
from prunery.pipelines.engine import StepContext
from prunery.pipelines.run_totals import model_lines, model_totals
from prunery.pipelines.steps.export_model import SPEC as EXPORT
from prunery.pipelines.steps.export_model import ExportModelOptions
from prunery.pipelines.steps.verify_compression import SPEC as VERIFY_STEP
from prunery.pipelines.steps.verify_compression import VerifyCompressionOptions
from prunery.storage import Store

from ...tiny_causal import saved_model, tiny_model
from .model_rows import compressed_rows, compressed_table, pruned, quantise, rows_table


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    return Store(tmp_path / "store")


@pytest.fixture
def dense(tmp_path):
    return saved_model(tmp_path, "llama")


def tables(store, dense, tmp_path, keep=0.9):
    """Keys of a model pruned by magnitude and of a random one, both with the same share."""
    made = {"rows": rows_table(store)}
    for role, seed in (("model", None), ("control", 1)):
        folder = pruned(dense, tmp_path / role, keep, seed=seed)
        made[role] = compressed_table(store, folder, compressed_rows(3, keep), name=role)
    return made


def verify(store, inputs, dense, **options):
    given = {"dense": str(dense), "speed": False, "resamples": 50, **options}
    context = StepContext(store=store, name="verify", seed=7)
    made = VERIFY_STEP(VerifyCompressionOptions(**given), inputs, context)
    return store.table(made.key)


def by_role(table):
    return {row["role"]: row for row in table.to_table().to_pylist()}


def perplexity(folder, rows):
    """Token-weighted, each row by itself through transformers' own loss."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total = count = 0
    for row in rows.to_table().to_pylist():
        ids = torch.tensor(row["input_ids"])[None]
        with torch.no_grad():
            loss = model(ids, labels=torch.tensor(row["labels"])[None]).loss
        scored = sum(label != -100 for label in row["labels"][1:])
        total, count = total + float(loss) * scored, count + scored
    return np.exp(total / count), count


def test_dense_compressed_and_control_side_by_side(store, dense, tmp_path):
    inputs = tables(store, dense, tmp_path)
    table = verify(store, inputs, dense, tolerance=10.0)
    assert table.to_table().schema.equals(VERIFY)
    found = by_role(table)
    assert list(found) == ["dense", "compressed", "control"]
    for role, folder in (("dense", dense), ("compressed", tmp_path / "model")):
        want, count = perplexity(folder, store.table(inputs["rows"]))
        assert found[role]["perplexity"] == pytest.approx(want, rel=1e-4)
        assert found[role]["tokens"] == count
    assert found["dense"]["ratio"] == 1 and found["dense"]["kl"] == 0
    assert 0 < found["compressed"]["kl"] < found["control"]["kl"]
    assert found["compressed"]["agreement"] > found["control"]["agreement"]
    assert found["compressed"]["zero_share"] == pytest.approx(0.1, abs=0.001)
    assert found["dense"]["zero_share"] == 0
    assert found["compressed"]["verdict"] == "accepted"
    assert found["dense"]["verdict"] == found["control"]["verdict"] == ""
    assert "the control's" in found["compressed"]["reasons"][-1]
    assert sum(found["compressed"]["row_nll"]) == pytest.approx(
        found["compressed"]["nll"] * found["compressed"]["tokens"]
    )
    assert len(found["compressed"]["row_ids"]) == 12
    report = json.loads(table.attachment("sizes.json").read_text())
    assert report["after"]["file_bytes"] == found["compressed"]["file_bytes"]
    assert not list((tmp_path / "cache" / "compression").glob("*"))


def test_the_same_again_gives_the_same_rows_at_another_speed(store, dense, tmp_path, monkeypatch):
    speeds = iter(range(100, 200))
    monkeypatch.setattr(verifying, "measure", lambda *_, **__: Speed(next(speeds), 1.0, 2, 1))
    first = verify(store, tables(store, dense, tmp_path), dense, speed=True)
    other = Store(tmp_path / "again")
    again = verify(other, tables(other, dense, tmp_path / "again"), dense, speed=True)
    assert first.manifest.logical_digest == again.manifest.logical_digest
    found = [json.loads(table.attachment("speed.json").read_text()) for table in (first, again)]
    assert found[0]["control"]["prefill"] == 102 and found[1]["control"]["prefill"] == 105


def test_labels_say_what_is_scored(store, dense, tmp_path):
    inputs = tables(store, dense, tmp_path)
    inputs["rows"] = rows_table(store, name="answers", ignored=3)
    some = by_role(verify(store, inputs, dense))["compressed"]["tokens"]
    every = by_role(verify(store, inputs, dense, targets="all"))["compressed"]["tokens"]
    assert every - some == 2 * 12  # places 1 and 2; place 0 is never a target


def test_an_encoder_is_verified_with_a_mask(store, tmp_path):
    dense = saved_model(tmp_path, "bert")
    inputs = {"rows": rows_table(store)}
    folder = pruned(dense, tmp_path / "model", 0.9, seed=None)
    inputs["model"] = compressed_table(store, folder, compressed_rows(3, 0.9))
    with pytest.raises(InputError, match="a tokenizer with a mask token"):
        verify(store, inputs, dense, control="none")
    found = by_role(verify(store, inputs, dense, control="none", mask_token=2))
    assert found["compressed"]["kl"] > 0
    rows = store.table(inputs["rows"]).to_table().column("input_ids").to_pylist()
    assert found["compressed"]["tokens"] == sum(max(1, round(0.15 * len(ids))) for ids in rows)
    assert found["compressed"]["reasons"][-1] == "no control at the same budget was asked for"


def test_speed_and_memory_come_from_a_fresh_process(tmp_path):
    folder = quantise(saved_model(tmp_path, "llama"), 4, 16)
    pack_model(folder, tmp_path / "packed")
    found = measure(tmp_path / "packed", prompt=16, new=4, repeats=1, threads=1)
    assert found.prefill > 0 and found.decode > 0
    assert found.peak_memory > found.base_memory > 100e6


@pytest.mark.parametrize(("name", "writes"), [("bert", False), ("gpt2", True), ("opt", True)])
def test_prompts_are_as_long_as_the_model_takes(name, writes):
    prefill, decode = measure_process._times(tiny_model(name), 500, 500, 1)  # 128 positions
    assert prefill > 0 and (decode is not None) is writes


def test_a_process_that_dies_says_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ModelError, match=r"it ended with exit code 1"):
        measure(tmp_path)


def test_both_models_are_measured_as_they_are_stored(store, dense, tmp_path, monkeypatch):
    asked = []

    def stand_in(folder, **options):
        asked.append((folder, sum(path.stat().st_size for path in folder.iterdir()), options))
        return Speed(100.0, None, 2000, 1000)

    monkeypatch.setattr(verifying, "measure", stand_in)
    inputs = {"rows": rows_table(store)}
    folder = quantise(saved_model(tmp_path / "made", "llama"), 4, 16)
    inputs["model"] = compressed_table(store, folder, compressed_rows(3, 1.0, bits=4))
    table = verify(store, inputs, dense, control="none", speed=True, prompt=16, new=4)
    found = by_role(table)
    assert asked[0][0] == dense and asked[1][1] == found["compressed"]["file_bytes"]
    assert asked[1][2]["prompt"] == 16 and asked[1][2]["new"] == 4
    speeds = json.loads(table.attachment("speed.json").read_text())
    assert speeds == {
        role: {"prefill": 100, "decode": None, "peak_memory": 2000, "base_memory": 1000}
        for role in ("dense", "compressed")
    }
    (told,) = (row for row in model_totals(table) if row["role"] == "compressed")
    assert told["prefill"] == 100 and told["decode"] is None and told["peak_memory"] == 2000
    assert not any("decodes" in line for line in model_lines(model_totals(table)))
    assert found["compressed"]["file_bytes"] < 0.75 * found["dense"]["file_bytes"]
    assert found["compressed"]["parameters"] == found["dense"]["parameters"]


def test_a_control_or_the_word_that_there_is_none(store, dense, tmp_path):
    inputs = tables(store, dense, tmp_path)
    without = {role: inputs[role] for role in ("model", "rows")}
    with pytest.raises(RecipeError, match=r"or say `control: none`"):
        verify(store, without, dense)
    with pytest.raises(RecipeError, match="found both"):
        verify(store, inputs, dense, control="none")


def test_a_control_at_another_budget_is_refused(store, dense, tmp_path):
    inputs = tables(store, dense, tmp_path)
    folder = pruned(dense, tmp_path / "less", 0.5)
    inputs["control"] = compressed_table(store, folder, compressed_rows(3, 0.5), name="less")
    with pytest.raises(InputError, match=r"weights kept 0\.9000 in the model and 0\.5000"):
        verify(store, inputs, dense)


def test_rows_that_were_calibrated_on_are_refused(store, dense, tmp_path):
    inputs = tables(store, dense, tmp_path)
    inputs["calibration"] = rows_table(store, count=3, name="calibration", seed=3)
    with pytest.raises(InputError, match=r"found 3 of 12 sources in both \(such as 0\)"):
        verify(store, inputs, dense)


# -- export ----------------------------------------------------------------------------------------


def export(store, inputs, **options):
    context = StepContext(store=store, name="export")
    return store.table(EXPORT(ExportModelOptions(**options), inputs, context).key)


def test_an_export_loads_from_the_store_and_from_its_folder(store, dense, tmp_path):
    inputs = tables(store, dense, tmp_path)
    verdict = verify(store, inputs, dense, tolerance=10.0)
    target = tmp_path / "exported"
    table = export(
        store, {"model": inputs["model"], "verify": verdict.manifest.key}, path=str(target)
    )
    for folder in (target, model_folder(table)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        kept = load_file(tmp_path / "model" / "model.safetensors")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, kept[name])
        made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
        assert made.shape == (1, 6)
    rows = {row["part"]: row for row in table.to_table().to_pylist()}
    assert rows["files"]["bytes_after"] == sum(f.stat().st_size for f in target.iterdir())
    assert rows["attention"]["parameters_before"] == rows["attention"]["parameters_after"]
    assert rows["attention"]["zeros"] > 0
    # another run finds the table and leaves the folder as it is
    export(store, {"model": inputs["model"], "verify": verdict.manifest.key}, path=str(target))


def test_sizes_before_are_those_of_the_dense_model_where_it_is_given(store, dense, tmp_path):
    inputs = tables(store, dense, tmp_path)
    wide = saved_model(tmp_path / "wide", "llama", intermediate_size=128)
    for before, options in ((dense, {}), (wide, {"dense": str(wide)})):
        table = export(store, {"model": inputs["model"]}, **options)
        rows = {row["part"]: row for row in table.to_table().to_pylist()}
        tensors = load_file(before / "model.safetensors")
        count = sum(tensor.numel() for tensor in tensors.values())
        assert rows["files"]["parameters_before"] == count
    assert rows["feed-forward"]["bytes_after"] * 2 == rows["feed-forward"]["bytes_before"]


def test_a_refused_model_is_exported_only_anyway(store, dense, tmp_path):
    inputs = tables(store, dense, tmp_path, keep=0.3)
    model = AutoModelForCausalLM.from_pretrained(dense)
    said = [
        model.generate(torch.tensor([[5, 6 + n]]), max_new_tokens=12, do_sample=False)[0].numpy()
        for n in range(6)
    ]
    inputs["rows"] = rows_table(store, name="own_words", tokens=said)
    verdict = verify(store, inputs, dense, tolerance=0.0)
    row = by_role(verdict)["compressed"]
    assert row["verdict"] == "refused" and row["ratio"] > 1 + row["noise"]
    given = {"model": inputs["model"], "verify": verdict.manifest.key}
    target = tmp_path / "exported"
    with pytest.raises(InputError, match=r"`model` is refused: refused: perplexity \+"):
        export(store, given, path=str(target))
    assert not target.exists()
    export(store, given, path=str(target), anyway=True)
    assert (target / "config.json").is_file()


def test_a_verdict_about_another_model_or_dtype_is_refused(store, dense, tmp_path):
    inputs = tables(store, dense, tmp_path)
    verdict = verify(store, inputs, dense, tolerance=10.0).manifest.key
    folder = pruned(dense, tmp_path / "other", 0.8)
    other = compressed_table(store, folder, compressed_rows(3, 0.8), name="other")
    with pytest.raises(InputError, match="expected a verdict about `other`"):
        export(store, {"model": other, "verify": verdict})
    with pytest.raises(InputError, match=r"the dtype that was judged \(source\), found float16"):
        export(store, {"model": inputs["model"], "verify": verdict}, dtype="float16")


def test_an_export_folder_that_exists_is_left_alone(store, dense, tmp_path):
    inputs = tables(store, dense, tmp_path)
    target = tmp_path / "exported"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exported: expected a folder that does not exist yet"):
        export(store, {"model": inputs["model"]}, path=str(target))
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    assert store.table(inputs["model"]).num_rows == 6
