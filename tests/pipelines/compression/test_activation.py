"""Thresholds found and judged layer by layer, against the whole model with plain hooks."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prunery.errors import InputError, ModelError
from prunery.pipelines.compression.activation import (
    ThresholdSearch,
    evaluate,
    find_thresholds,
    thresholds_of,
)
from prunery.pipelines.compression.journal import LayerJournal
from prunery.pipelines.compression.tables import CALIBRATION
from prunery.pipelines.compression.walk import batches_of
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.pruners.models import streamed_model
from prunery.pruners.models.sparse_activation import (
    FILE,
    Site,
    apply_thresholds,
    load_thresholds,
)
from prunery.pruners.models.streamed_model import StreamedModel
from prunery.storage import Store

from ...tiny_causal import saved_model
from ..sft_rows import write


def rows(count=7, longest=20, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, rng.integers(4, longest)) for _ in range(count)]


def whole(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def seen(model, given, paths):
    """What modules take and give for each row, one row at a time: path -> [(in, out)]."""
    found = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda m, args, out, path=path: found[path].append(
                (args[0].reshape(-1, args[0].shape[-1]), out.reshape(-1, out.shape[-1]))
            )
        )
        for path in paths
    ]
    with torch.no_grad():
        for row in given:
            model(input_ids=torch.from_numpy(row)[None])
    for handle in handles:
        handle.remove()
    return found


def kth(values, share):
    inorder = np.sort(np.abs(np.concatenate([np.ravel(v) for v in values])))
    count = math.floor(round(share * len(inorder), 9))
    return inorder[count - 1] if count else 0.0


def search(tmp_path, name, **options):
    folder = saved_model(tmp_path, name)
    model, given = StreamedModel(folder), rows()
    journal = LayerJournal(tmp_path / "work")
    find_thresholds(model, batches_of(given, tokens=40), journal, ThresholdSearch(**options))
    return folder, model, given, journal


def silu(values):
    values = values.double().numpy()
    return values / (1 + np.exp(-values))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_cats_is_the_quantile_of_the_activation(tmp_path, name):
    folder, _, given, journal = search(tmp_path, name, method="cats", sparsity=0.7)
    made = thresholds_of(journal, 3)
    assert [key[0] for key in made] == [0, 1, 2]
    paths = [f"model.layers.{layer}.mlp.gate_proj" for layer in range(3)]
    taken = seen(whole(folder), given, paths)
    for layer, path in enumerate(paths):
        expected = kth([silu(out) for _, out in taken[path]], 0.7)
        found = made[layer, Site("mlp.gate_proj", "gate")]
        assert float(found) == pytest.approx(expected, rel=1e-4)


def test_chess_by_its_definition(tmp_path):
    folder, _, given, journal = search(tmp_path, "llama", method="chess", sparsity=0.6)
    made = thresholds_of(journal, 3)
    for layer in range(3):
        at = f"model.layers.{layer}."
        paths = [
            at + p for p in ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.o_proj")
        ]
        taken = seen(whole(folder), given, paths)
        up = np.concatenate([out.double().abs().numpy() for _, out in taken[paths[1]]])
        mean = up.mean(0)
        levels = [kth([silu(out) * mean], 0.6) for _, out in taken[paths[0]]]
        expected = np.mean(levels) / mean
        found = made[layer, Site("mlp.gate_proj", "gate")]
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        for path in paths[2:]:
            value = made[layer, Site(path.removeprefix(at), "alone")]
            expected = kth([given_.numpy() for given_, _ in taken[path]], 0.6)
            assert float(value) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_teal_leaves_the_share_asked_for_at_every_place(tmp_path, name):
    folder, model, given, journal = search(tmp_path, name, method="teal", sparsity=0.5)
    made = thresholds_of(journal, 3)
    assert len(made) == 4 * 3
    dense = whole(folder)
    for (layer, site), value in made.items():
        path = f"{model.layout.blocks}.{layer}.{site.module}"
        values = [one.numpy() for one, _ in seen(dense, given, [path])[path]]
        assert float(value) == pytest.approx(kth(values, 0.5), rel=1e-4)
        assert site.kind == "input"


def block_error(model, given, thresholds):
    """Mean over layers of the squared change of a block's output for its dense inputs."""
    from prunery.pruners.models.sparse_activation import apply_to_block

    total = 0.0
    for row in given:
        prepared = model.prepare(torch.from_numpy(row)[None])
        hidden = prepared.hidden
        for layer in range(model.layers):
            block = model.block(layer)
            with torch.no_grad():
                out = model.run(block, hidden, prepared.calls[layer])
                mine = {site: v for (at, site), v in thresholds.items() if at == layer}
                with apply_to_block(block, model.layout, mine, layer=layer):
                    cut = model.run(block, hidden, prepared.calls[layer])
            total += float((out - cut).square().sum())
            hidden = out
    return total


def test_greedy_levels_lose_less_than_uniform_ones_for_the_same_weights(tmp_path):
    _, model, given, journal = search(
        tmp_path, "llama", method="teal", sparsity=0.5, levels="greedy", step=0.1
    )
    greedy = thresholds_of(journal, 3)
    parameters = {
        "self_attn.q_proj": 2 * 32 * 32,
        "self_attn.o_proj": 32 * 32,
        "mlp.gate_proj": 2 * 64 * 32,
        "mlp.down_proj": 64 * 32,
    }
    for layer in range(3):
        share = {row["module"]: row["share"] for row in journal.rows(layer)}
        unread = sum(share[name] * count for name, count in parameters.items())
        assert unread / sum(parameters.values()) >= 0.5 - 1e-6
    plain = LayerJournal(tmp_path / "plain")
    find_thresholds(
        model, batches_of(given, tokens=40), plain, ThresholdSearch(method="teal", sparsity=0.5)
    )
    uniform = thresholds_of(plain, 3)
    assert block_error(model, given, greedy) < block_error(model, given, uniform)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_cett_of_what_was_chosen_is_under_the_limit(tmp_path, name):
    folder, model, given, journal = search(tmp_path, name, method="ppl_p", grid=16)
    made = thresholds_of(journal, 3, cett=0.3)
    dense = whole(folder)
    for (layer, site), value in made.items():
        path = f"{model.layout.blocks}.{layer}.{site.module}"
        down = dense.get_submodule(path).weight.detach().double()
        ratios, dead = [], 0
        for hidden, _ in seen(dense, given, [path])[path]:
            wide = hidden.double()
            # the same thresholds, in the definition's words: |a_j| ||W_:,j|| against one t
            lost = torch.where(wide.abs() <= value.double(), wide, 0.0)
            dead += int((lost != 0).sum())
            ratios += ((lost @ down.T).norm(dim=1) / (wide @ down.T).norm(dim=1)).tolist()
        assert np.nanmean(ratios) <= 0.3 + 1e-4
        assert dead > 0
        scaled = value.double() * down.norm(dim=0)
        torch.testing.assert_close(scaled, scaled[:1].expand_as(scaled), rtol=1e-5, atol=1e-6)


def test_cett_goes_up_to_the_ends(tmp_path):
    _, _, _, journal = search(tmp_path, "llama", method="ppl_p", grid=8)
    assert all((v == 0).all() for v in thresholds_of(journal, 3, cett=0.0).values())
    for layer in range(3):
        found = journal.tensors(layer)
        assert found["cett"][0] == 0 and float(found["cett"][-1]) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("method", ["cats", "teal", "chess"])
def test_the_judged_loss_is_that_of_the_whole_model_under_thresholds(tmp_path, method):
    folder, model, given, journal = search(tmp_path, "llama", method=method, sparsity=0.4)
    thresholds = thresholds_of(journal, 3)
    labels = [[-100, *row[1:].tolist()] if n % 2 else row.tolist() for n, row in enumerate(given)]
    labels[0][2] = -100
    batches = batches_of(given, tokens=40)
    for mine in ({}, thresholds):
        found = evaluate(model, batches, labels, tmp_path / "judge", mine)
        assert not (tmp_path / "judge").exists()
        loaded = whole(folder)
        total, count = 0.0, 0
        with apply_thresholds(loaded, mine, kernel=False), torch.no_grad():
            for row, target in zip(given, labels, strict=True):
                logits = loaded(input_ids=torch.from_numpy(row)[None]).logits[0].double()
                logs = logits.log_softmax(-1)
                for place in range(1, len(row)):
                    if target[place] != -100:
                        total -= float(logs[place - 1, target[place]])
                        count += 1
        assert found.tokens == count
        assert found.loss == pytest.approx(total / count, rel=1e-4)
    shares = [alive / size for alive, size in found.live.values()]
    # The first layer's inputs are dense, so the share is exact up to the last number.
    assert shares[0] == pytest.approx(0.6, abs=0.02)
    sizes = sum(len(row) for row in given)
    assert all(size % sizes == 0 for _, size in found.live.values())


def test_rows_without_a_target_are_refused(tmp_path):
    model, given = StreamedModel(saved_model(tmp_path, "llama")), rows(2)
    labels = [[-100] * len(row) for row in given]
    with pytest.raises(InputError, match="targets"):
        evaluate(model, batches_of(given, tokens=40), labels, tmp_path / "judge", {})


def calibrated(store, name, given, **more):
    made = [
        {
            "id": 100 + number,
            "domain": "a",
            "input_ids": row.tolist(),
            "labels": row.tolist(),
            "sources": [number],
            "score": None,
        }
        for number, row in enumerate(given)
    ]
    return write(store, name, "calibration_rows", CALIBRATION, [made])


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    made = Store(tmp_path / "store")
    calibrated(made, "rows", rows())
    calibrated(made, "held_out", rows(seed=1))
    return made


def run(store, model, inputs=None, **options):
    spec = STEPS["activation_thresholds"]
    given = {"rows": "rows", **(inputs or {})}
    return spec(
        spec.options(model=str(model), tokens_a_batch=40, **options),
        given,
        StepContext(store, "thresholds", threads=1),
    )


@pytest.mark.parametrize("method", ["cats", "chess", "teal", "ppl_p"])
def test_the_step_writes_what_a_loaded_model_can_use(store, tmp_path, method):
    folder = saved_model(tmp_path, "llama")
    options = {"p": 5.0, "grid": 16, "rounds": 4} if method == "ppl_p" else {"sparsity": 0.4}
    manifest = run(store, folder, {"evaluation": "held_out"}, method=method, **options)
    table = store.table("thresholds")
    made = table.to_table().to_pylist()
    places = {(row["layer"], row["module"], row["kind"]): row for row in made}
    model = places.pop((-1, "", "model"))
    assert len(places) == 3 * {"cats": 1, "chess": 3, "teal": 4, "ppl_p": 1}[method]
    thresholds = load_thresholds(table.attachment(FILE))
    assert {(layer, *site) for layer, site in thresholds} == set(places)
    for (layer, site), value in thresholds.items():
        assert value.reshape(-1).tolist() == places[layer, site.module, site.kind]["thresholds"]
    with apply_thresholds(whole(folder), thresholds):
        pass
    assert all(0 <= row["live"] <= 1 for row in made)
    if method == "ppl_p":
        assert model["sparse_loss"] <= model["dense_loss"] + math.log(1.05) + 1e-6
        assert model["live"] < 1 and model["cett"] is not None
    else:
        assert all(row["sparsity"] == pytest.approx(0.4) for row in made)
        assert model["sparse_loss"] != model["dense_loss"]
    assert not list((tmp_path / "cache").glob("compression/*"))
    assert run(store, folder, {"evaluation": "held_out"}, method=method, **options) == manifest


def test_the_device_is_picked_as_in_the_other_steps(store, tmp_path, monkeypatch):
    """No name means what `pick_device` says; a name is handed on."""
    folder, asked = saved_model(tmp_path, "llama"), []
    real = streamed_model.StreamedModel

    def watched(source, *, device, dtype):
        asked.append(device)
        return real(source, device="cpu", dtype=dtype)

    monkeypatch.setattr(streamed_model, "StreamedModel", watched)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run(store, folder, method="cats")
    run(store, folder, method="cats", sparsity=0.3, device="cpu")
    assert asked == ["cuda", "cpu"]


def test_a_killed_search_goes_on(store, tmp_path, monkeypatch):
    from prunery.pipelines.compression import activation

    folder = saved_model(tmp_path, "llama")
    calibrated(store, "same", rows())
    real, visited = activation._cats, []

    def killed(visit, search):
        visited.append(visit.layer)
        if visit.layer == 1 and visited.count(1) == 1:
            raise KeyboardInterrupt
        return real(visit, search)

    monkeypatch.setattr(activation, "_cats", killed)
    with pytest.raises(KeyboardInterrupt):
        run(store, folder, method="cats")
    run(store, folder, method="cats")
    cut = store.table("thresholds").to_table()
    assert visited == [0, 1, 1, 2]
    monkeypatch.undo()
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    run(Store(tmp_path / "store"), folder, {"rows": "same", "evaluation": "rows"}, method="cats")
    again = store.table("thresholds").to_table()
    assert store.manifest("thresholds").rows == 4
    assert cut.equals(again)


def test_bad_models_and_rows_are_refused(store, tmp_path):
    with pytest.raises(ModelError, match="causal"):
        run(store, saved_model(tmp_path, "bert"), method="teal")
    with pytest.raises(ModelError, match="gated"):
        run(store, saved_model(tmp_path, "gpt2"), method="cats")
    with pytest.raises(ModelError, match="experts"):
        run(store, saved_model(tmp_path, "mixtral"), method="teal")
    folder = saved_model(tmp_path, "llama")
    calibrated(store, "short", [np.array([5])])
    with pytest.raises(InputError, match="row 100: expected at least 2"):
        run(store, folder, {"rows": "short"})
    calibrated(store, "foreign", [np.array([5, 300])])
    with pytest.raises(InputError, match="row 100: expected token ids below 300; found 300"):
        run(store, folder, {"rows": "foreign"})
    calibrated(store, "none", [])
    with pytest.raises(InputError, match="no rows"):
        run(store, folder, {"rows": "none"})
