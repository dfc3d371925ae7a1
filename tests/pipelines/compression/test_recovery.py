import gzip
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from prunery.errors import InputError, ModelError
from prunery.pipelines.compression import recovery
from prunery.pipelines.compression.model_tables import INDEX
from prunery.pipelines.compression.recovery import evaluate, prepare, recover
from prunery.pipelines.compression.recovery_rows import (
    Rows,
    fixed_batches,
    hidden_places,
    split_rows,
    training_batches,
)
from prunery.pipelines.compression.recovery_settings import Settings, rate
from prunery.pipelines.compression.whole_model import WholeModel
from prunery.pruners.models.block_layouts import layout_of
from prunery.pruners.models.streamed_model import StreamedModel

from ...pruners.signals.stories260k import fast_tokenizer, load_stories
from ...tiny_causal import saved_model
from .recovery_models import pattern_rows, pruned_model

KINDS = ["llama_tied", "gpt2", "opt", "mixtral", "qwen2_moe"]
FAST = {"steps": 6, "batch_tokens": 64, "learning_rate": 3e-3, "rank": 4, "evaluations": 2}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(folder, tmp_path, *, seed=0, rows=None, frozen=(), dense=None, mask=None, **options):
    settings = Settings(**({"method": "mask_lora"} | FAST | options))
    model = WholeModel(folder)
    made = recover(
        model,
        pattern_rows() if rows is None else rows,
        settings,
        seed=seed,
        work=tmp_path / "hidden",
        frozen=frozenset(frozen),
        dense=dense,
        mask=mask,
    )
    return model, made


def stored(folder):
    return {
        name: tensor
        for path in sorted(folder.glob("model*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def matrices(folder):
    model = StreamedModel(folder)
    return {
        model.block_names(layer)[f"{matrix.name}.weight"]
        for layer in range(model.layers)
        for matrix in layout_of(model.config).matrices(model.block(layer))
    }


# -- what changes --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_mask_lora_lowers_the_loss_leaves_zeros_and_writes_a_model_that_loads(kind, tmp_path):
    folder = pruned_model(tmp_path, kind)
    model, made = run(folder, tmp_path)
    before = made.figures["held_out_before"]["nll"]
    assert made.figures["held_out_after"]["nll"] < before and not made.figures["given_back"]
    out = tmp_path / "out"
    out.mkdir()
    model.write(out, made.changed)
    old, new = stored(folder), stored(out)
    assert old.keys() == new.keys() and (out / INDEX).is_file()
    assert all(old[name].dtype == new[name].dtype for name in old)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    vectors = {name for name in old if old[name].dim() == 1}
    # Zero biases of unused experts and the like may stay; nothing else but these may change.
    assert matrices(folder) & changed and changed <= matrices(folder) | vectors
    for name in matrices(folder):
        zero = old[name] == 0
        assert zero.any() and bool((new[name][zero] == 0).all())
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    batch = fixed_batches(pattern_rows(4), tokens=64, pad=0, seed=0, mask=None)[0]
    with torch.no_grad():
        ours = model.logits(batch.input_ids, batch.valid)[batch.valid]
        theirs = loaded(batch.input_ids, attention_mask=batch.valid.long()).logits[batch.valid]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
def test_bias_norm_touches_biases_and_norms_alone(kind, tmp_path):
    folder = pruned_model(tmp_path, kind)
    _, made = run(folder, tmp_path, method="bias_norm", learning_rate=1e-2)
    old = stored(folder)
    assert made.changed and all(old[name].dim() == 1 for name in made.changed)
    assert set(made.changed) == {name for name in old if old[name].dim() == 1}
    wanted = sum(old[name].numel() for name in made.changed)
    assert made.figures["trained_parameters"] == wanted
    assert made.figures["share_trained"] == wanted / made.figures["parameters"]


def test_lora_fills_zeros_only_where_it_may(tmp_path):
    folder = pruned_model(tmp_path, "llama")
    old = stored(folder)
    for keep in (True, False):
        _, made = run(folder, tmp_path, method="lora", keep_zeros=keep)
        filled = {
            name
            for name in matrices(folder)
            if bool((made.changed[name][old[name] == 0] != 0).any())
        }
        assert filled == (set() if keep else matrices(folder))


def test_quantised_matrices_stay_and_norms_may(tmp_path):
    folder = pruned_model(tmp_path, "llama")
    frozen = {name for name in matrices(folder) if "up_proj" in name}
    _, made = run(folder, tmp_path, frozen=frozen, norms=False)
    assert set(made.changed) == matrices(folder) - frozen
    _, made = run(folder, tmp_path, frozen=matrices(folder))
    assert made.changed and not set(made.changed) & matrices(folder)
    with pytest.raises(ModelError, match="every matrix is quantised and `norms` is false"):
        run(folder, tmp_path, frozen=matrices(folder), norms=False)


def test_the_factors_logits_are_the_folded_models(tmp_path):
    model = WholeModel(pruned_model(tmp_path, "gpt2"))
    settings = Settings(method="mask_lora", rank=4)
    trained = prepare(model, settings, 0, frozenset())
    with torch.no_grad():
        for name, parameter in trained.all().items():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    batch = fixed_batches(pattern_rows(4), tokens=999, pad=0, seed=0, mask=None)[0]
    with torch.no_grad():
        before = model.logits(batch.input_ids, batch.valid)
        recovery._folded(model, trained)
        after = model.logits(batch.input_ids, batch.valid)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_weights_keep_the_dtype_of_the_files_and_are_judged_in_it(tmp_path):
    folder = pruned_model(tmp_path, "llama", dtype=torch.bfloat16)
    model, made = run(folder, tmp_path)
    assert {tensor.dtype for tensor in made.changed.values()} == {torch.bfloat16}
    out = tmp_path / "out"
    out.mkdir()
    model.write(out, made.changed)
    judge = fixed_batches(
        split_rows(pattern_rows(), 0.1, 0)[1], tokens=64, pad=0, seed=0, mask=None
    )
    again = evaluate(WholeModel(out), judge, Settings(method="lora"))
    assert again.nll == pytest.approx(made.figures["held_out_after"]["nll"], rel=1e-6)


# -- how it is trained ---------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    folder = pruned_model(tmp_path, "llama")
    first, again, other = (run(folder, tmp_path, seed=seed)[1] for seed in (1, 1, 2))
    assert first.figures == again.figures
    assert all(torch.equal(first.changed[name], again.changed[name]) for name in first.changed)
    assert any(not torch.equal(first.changed[name], other.changed[name]) for name in first.changed)


def test_no_better_state_gives_the_input_back(tmp_path):
    folder = pruned_model(tmp_path, "llama")
    rows = pattern_rows()
    held = set(split_rows(rows, 0.1, 0)[1].ids.tolist())
    rng = np.random.default_rng(0)
    for row, id_ in enumerate(rows.ids):
        if int(id_) not in held:  # what is learnt has nothing to do with what is asked
            rows.input_ids[row][:] = rng.integers(200, 290, len(rows.input_ids[row]))
            rows.labels[row][:] = rows.input_ids[row]
    _, made = run(folder, tmp_path, rows=rows, learning_rate=0.5, evaluations=1)
    assert made.changed == {} and made.figures["given_back"]
    assert made.figures["held_out_after"] == made.figures["held_out_before"]


def test_the_best_state_is_kept_and_not_the_last(tmp_path, monkeypatch):
    folder = pruned_model(tmp_path, "llama")
    told, states = iter([5.0, 4.0, 2.0, 3.0, 1.0]), []

    def asked(model, batches, settings, teacher=None):
        states.append({n: p.detach().clone() for n, p in model.model.named_parameters()})
        value = next(told)
        return recovery.Loss(value, None, value)

    monkeypatch.setattr(recovery, "evaluate", asked)
    _, made = run(folder, tmp_path, method="bias_norm", evaluations=3)
    assert made.figures["best_step"] == 4
    best, last = states[2], states[3]
    for name, tensor in made.changed.items():
        assert torch.equal(tensor, best[name])
    assert any(not torch.equal(best[name], last[name]) for name in made.changed)


def test_a_loss_that_is_no_number_is_refused(tmp_path, monkeypatch):
    folder = pruned_model(tmp_path, "llama")
    real = recovery._parts

    def broken(model, batch, settings, teacher):
        nll, divergence = real(model, batch, settings, teacher)
        return (nll * math.nan if torch.is_grad_enabled() else nll), divergence

    monkeypatch.setattr(recovery, "_parts", broken)
    with pytest.raises(ModelError, match="expected a finite loss, found nan at step 1"):
        run(folder, tmp_path)


def test_the_loss_is_the_mean_over_targets(tmp_path):
    folder = saved_model(tmp_path, "llama")
    rows = pattern_rows(11)
    rows.labels[4][:5] = -100
    batches = fixed_batches(rows, tokens=50, pad=0, seed=0, mask=None)
    found = evaluate(WholeModel(folder), batches, Settings(method="lora")).nll
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    told, count = 0.0, 0
    for tokens, labels in zip(rows.input_ids, rows.labels, strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None]).logits[0].double().numpy()
        for at in range(1, len(tokens)):
            if labels[at] != -100:
                row = logits[at - 1] - logits[at - 1].max()
                told -= row[labels[at]] - np.log(np.exp(row).sum())
                count += 1
    assert found == pytest.approx(told / count, rel=1e-5)


def test_the_divergence_counts_by_the_square_of_the_temperature():
    settings = Settings(method="distil", temperature=3.0, distil_weight=0.25)
    assert recovery._mix(2.0, 1.5, settings) == 0.75 * 2.0 + 0.25 * 9 * 1.5
    assert recovery._mix(2.0, None, settings) == 2.0


def test_the_rate_rises_and_falls_to_zero():
    assert rate(1, 100) == pytest.approx(0.2) and rate(5, 100) == 1.0
    assert rate(100, 100) == pytest.approx(0.0)
    made = [rate(step, 40) for step in range(3, 41)]
    assert made == sorted(made, reverse=True)
    assert rate(1, 1) == 1.0


# -- rows ----------------------------------------------------------------------------------------


def test_rows_are_split_by_seed_and_id_alone():
    rows = pattern_rows(40)
    trained, held = split_rows(rows, 0.1, 3)
    assert len(held.ids) == 4 and set(trained.ids) | set(held.ids) == set(rows.ids)
    assert not set(trained.ids) & set(held.ids)
    turned = split_rows(rows.take(np.arange(40)[::-1].copy()), 0.1, 3)[1]
    assert set(turned.ids) == set(held.ids)
    assert set(split_rows(rows, 0.1, 4)[1].ids) != set(held.ids)


def test_every_epoch_has_every_row_once_in_a_new_order():
    rows = pattern_rows(9)
    batches = training_batches(rows, tokens=40, pad=7, seed=0, mask=None)
    epochs, seen = [], []
    for batch in batches:
        assert batch.input_ids.numel() <= 40 or len(batch.ids) == 1
        for place, id_ in enumerate(batch.ids):
            tokens = rows.input_ids[rows.ids.tolist().index(id_)]
            assert batch.input_ids[place][batch.valid[place]].tolist() == tokens.tolist()
        assert bool((batch.input_ids[~batch.valid] == 7).all())
        assert bool((batch.labels[~batch.valid] == -100).all())
        seen += batch.ids.tolist()
        if len(seen) == 9:
            epochs.append(seen)
            seen = []
        if len(epochs) == 2:
            break
    assert sorted(epochs[0]) == sorted(epochs[1]) == rows.ids.tolist() and epochs[0] != epochs[1]


def test_hidden_places_are_a_share_of_the_trained_ones():
    labels = np.full(100, -100)
    labels[20:60] = 5
    found = hidden_places(11, labels, 1)
    assert len(found) == 6 and found.min() >= 20 and found.max() < 60
    assert (found == hidden_places(11, labels, 1)).all()
    assert set(found) != set(hidden_places(12, labels, 1))
    assert len(hidden_places(1, np.array([-100, 4]), 0)) == 1


# -- other methods -------------------------------------------------------------------------------


def test_a_masked_model_is_recovered_on_hidden_words(tmp_path):
    folder = pruned_model(tmp_path, "bert")
    model, made = run(folder, tmp_path, mask=4, steps=20, batch_tokens=256)
    assert made.figures["held_out_after"]["nll"] < made.figures["held_out_before"]["nll"]
    out = tmp_path / "out"
    out.mkdir()
    model.write(out, made.changed)
    loaded = AutoModelForMaskedLM.from_pretrained(out).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        ours = model.logits(ids, torch.ones_like(ids, dtype=torch.bool))
        torch.testing.assert_close(ours, loaded(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_layerwise_brings_every_block_nearer_to_the_dense_one(kind, tmp_path):
    dense = saved_model(tmp_path / "dense", kind)
    folder = pruned_model(tmp_path, kind)
    _, made = run(
        folder,
        tmp_path,
        method="layerwise",
        dense=StreamedModel(dense),
        steps=8,
        mask=4 if kind == "bert" else None,
    )
    layers = made.figures["layers"]
    assert len(layers) == 3
    for figures in layers:
        assert 0 < figures["error_after"] < 0.98 * figures["error_before"]
    old = stored(folder)
    for name, tensor in made.changed.items():
        assert old[name].dim() == 1 or bool((tensor[old[name] == 0] == 0).all())


def test_a_block_is_trained_on_what_the_recovered_blocks_before_it_give(tmp_path, monkeypatch):
    told = iter([2.0, 1.0])  # so that a random model, which tells nothing, is not given back
    monkeypatch.setattr(recovery, "evaluate", lambda *_: recovery.Loss(9.0, None, next(told)))
    dense = StreamedModel(saved_model(tmp_path / "dense", "llama"))
    model, made = run(
        pruned_model(tmp_path, "llama"), tmp_path, method="layerwise", dense=dense, steps=8
    )
    out = tmp_path / "out"
    out.mkdir()
    model.write(out, made.changed)
    small = StreamedModel(out)
    apart, size = np.zeros(3), np.zeros(3)
    for tokens in split_rows(pattern_rows(), 0.1, 0)[1].input_ids:
        prepared = small.prepare(torch.from_numpy(tokens)[None])
        hidden = prepared.hidden
        for layer in range(3):
            with torch.no_grad():
                wanted = dense.run(dense.block(layer), hidden, prepared.calls[layer]).double()
                hidden = small.run(small.block(layer), hidden, prepared.calls[layer])
            apart[layer] += float(((hidden.double() - wanted) ** 2).sum())
            size[layer] += float((wanted**2).sum())
    found = [figures["error_after"] for figures in made.figures["layers"]]
    np.testing.assert_allclose(found, apart / size, rtol=1e-3)


def test_layerwise_has_no_error_where_nothing_was_pruned(tmp_path):
    folder = saved_model(tmp_path, "llama")
    _, made = run(folder, tmp_path, method="layerwise", dense=StreamedModel(folder), steps=1)
    assert made.figures["layers"] == [{"error_before": 0.0, "error_after": 0.0}] * 3
    assert made.figures["given_back"]


def test_layerwise_refuses_a_dense_model_of_other_layers_or_embeddings(tmp_path):
    folder = pruned_model(tmp_path, "llama")
    short = saved_model(tmp_path / "short", "llama", num_hidden_layers=2)
    with pytest.raises(ModelError, match="num_hidden_layers 2; found 3"):
        run(folder, tmp_path, method="layerwise", dense=StreamedModel(short))
    other = saved_model(tmp_path / "other", "llama", seed=1)
    with pytest.raises(ModelError, match="may be rotated"):
        run(folder, tmp_path, method="layerwise", dense=StreamedModel(other))


def test_a_pruned_stories260k_gets_better_in_a_few_steps(shared_data, tmp_path):
    checkpoint = shared_data / "ckpt_stories260K"
    texts = shared_data / "lm_tinystories" / "tinystories_sample.first80pct.txt.gz"
    if not checkpoint.is_dir() or not texts.is_file():
        pytest.skip("stories260K or its texts are not in the shared data")
    model = load_stories(checkpoint / "stories260K.bin")
    tokenizer = fast_tokenizer(checkpoint / "tok512.bin", 512)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in layer.parameters():
                if weight.dim() == 2:
                    border = weight.abs().flatten().kthvalue(weight.numel() // 2).values
                    weight[weight.abs() <= border] = 0
    folder = tmp_path / "half"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with gzip.open(texts, "rt", encoding="utf-8") as file:
        found = [text.strip() for text in file.read(60_000).split("<|endoftext|>")][:40]
    ids = [np.array(tokenizer(text)["input_ids"][:128], np.int64) for text in found]
    rows = Rows(np.arange(40), ids, [row.copy() for row in ids], "stories")
    _, made = run(folder, tmp_path, rows=rows, steps=12, batch_tokens=1024, rank=16)
    before, after = (made.figures[f"held_out_{when}"]["perplexity"] for when in ("before", "after"))
    assert before > 25 and after < 0.5 * before
    for name, tensor in made.changed.items():
        if tensor.dim() == 2:
            assert int((tensor == 0).sum()) == tensor.numel() // 2, name


def test_a_row_is_refused_by_name(tmp_path):
    from prunery.pipelines.compression.recovery_rows import read_rows
    from prunery.storage import Store

    from .recovery_models import rows_table

    store = Store(tmp_path / "store")

    def read(rows, name, longest=None):
        return read_rows(store.table(rows_table(store, rows, name=name)), 300, longest)

    with pytest.raises(InputError, match="at least 10 rows with a target .* found 9"):
        read(pattern_rows(9), "few")
    rows = pattern_rows(12)
    rows.labels[0][:] = -100
    assert len(read(rows, "unlabelled").ids) == 11
    rows.input_ids[5][1] = 300
    with pytest.raises(InputError, match="row 38: expected token ids below 300; found 300 at po"):
        read(rows, "strange")
    with pytest.raises(InputError, match="at most 8 tokens, which is as far"):
        read(pattern_rows(12, length=30), "long", 8)
