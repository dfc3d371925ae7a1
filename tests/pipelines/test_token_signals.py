"""Stored token signals against one sample at a time through the plain model."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prunery.errors import InputError, RecipeError
from prunery.pipelines import models, token_scoring
from prunery.pipelines.causal_files import causal_from_table
from prunery.pipelines.engine import StepContext
from prunery.pipelines.sft_tables import TOKENS
from prunery.pipelines.steps import STEPS
from prunery.pipelines.token_scoring import batches
from prunery.pruners.models.causal import resolve_causal
from prunery.storage import Store

from .reused_rows import same_rows

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ALL = ["loss", "rank", "reference", "history", "attention", "alone", "trajectory"]


def chat(number):
    """A chat of one or two answers whose lengths differ from row to row."""
    turns = []
    for turn in range(1 + number % 2):
        count = 1 + (number * 7 + turn * 3) % 9
        turns += [
            {"role": "user", "content": f"Count to {WORDS[count]} for row {number}."},
            {"role": "assistant", "content": " ".join(WORDS[: count + 1])},
        ]
    return turns


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with chats, a small model of them, and their tokens."""
    folder = tmp_path_factory.mktemp("signals")
    patch = pytest.MonkeyPatch()
    patch.setenv("PRUNERY_CACHE", str(folder / "cache"))
    path = folder / "chats.jsonl"
    rows = [{"messages": chat(n), "topic": f"t{n % 3}"} for n in range(22)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Store(folder / "store")
    run(made, "read_chats", "chats", {}, path=str(path), domain_field="topic")
    run(
        made,
        "train_lm",
        "lm",
        {"chats": "chats"},
        vocab_size=320,
        hidden_size=16,
        layers=2,
        heads=2,
        max_length=32,
        steps=9,
        batch_tokens=64,
        learning_rate=0.02,
    )
    run(made, "tokenize_chats", "tokens", {"chats": "chats", "model": "lm"})
    yield made
    patch.undo()


def run(store, step, name, inputs, *, workers=1, bad_rows=0.0, **options):
    spec = STEPS[step]
    context = StepContext(store, name, threads=1, workers=workers, bad_rows=bad_rows)
    return spec(spec.options(**options), inputs, context)


def signals(store, name="signals", tokens="tokens", **options):
    options = {"rows_a_shard": 8, "tokens_a_batch": 160, **options}
    return run(store, "token_signals", name, {"tokens": tokens, "model": "lm"}, **options)


@pytest.fixture(scope="module")
def made(store):
    """Manifest and rows of a run that asks for everything."""
    manifest = signals(
        store, signals=ALL, history="checkpoint:0", reference="checkpoint:1", layer=0
    )
    return manifest, store.table("signals").to_table()


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, :-1].double()


def losses(model, ids):
    """(L - 1,) loss of each token but the first."""
    return -logits_of(model, ids).log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]


def test_every_column_is_what_the_plain_model_says(store, made):
    _, table = made
    tokens = {row["id"]: row for row in store.table("tokens").to_table().to_pylist()}
    assert table.column("id").to_pylist() == list(tokens)
    lm = store.table("lm")
    final, first, second = (plain(causal_from_table(lm, n)) for n in (None, 0, 1))
    start = AutoTokenizer.from_pretrained(causal_from_table(lm)).bos_token_id
    for row in table.to_pylist():
        mine = tokens[row["id"]]
        ids, places = mine["input_ids"], np.flatnonzero(mine["trainable"])
        assert row["domain"] == mine["domain"]
        assert row["token_position"] == places.tolist()
        assert row["turn"] == [mine["turn"][p] for p in places]
        assert row["protected"] == [mine["protected"][p] for p in places]
        assert sum(row["protected"]) == len(set(row["turn"]))
        logits = logits_of(final, ids)[places - 1]
        log = logits.log_softmax(-1)
        target = torch.tensor(ids)[places][:, None]
        close(row["loss"], -log.gather(1, target)[:, 0])
        close(row["entropy"], -(log.exp() * log).sum(1))
        close(row["log_sum_exp"], logits.logsumexp(1))
        assert row["target_rank"] == (logits > logits.gather(1, target)).sum(1).tolist()
        by_model = [losses(model, ids)[places - 1] for model in (first, second, final)]
        close(row["history_loss"], by_model[0])
        close(row["reference_loss"], by_model[1])
        close(row["loss_trajectory"], [found.mean() for found in by_model])
        close(row["prompt_attention"], attention(final, ids, mine["trainable"])[places])
        alone = [
            losses(final, [start, *(ids[p] for p in places if mine["turn"][p] == turn)])
            for turn in sorted(set(row["turn"]))
        ]
        close(row["answer_loss_alone"], torch.cat(alone).mean())


def close(got, wanted):
    np.testing.assert_allclose(got, np.asarray(wanted), atol=3e-5)


def attention(model, ids, trainable):
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions[0][0]
    return found.mean(0)[:, ~np.array(trainable)].sum(1)


def test_schema_models_and_notes(store, made):
    manifest, table = made
    lm = store.table("lm")
    found = resolve_causal(str(causal_from_table(lm)))
    assert manifest.models["model"] == found.sha256 == manifest.models["trajectory_2"]
    assert manifest.models["history"] == manifest.models["trajectory_0"]
    assert manifest.models["reference"] == manifest.models["trajectory_1"]
    assert manifest.models["tokenizer"] == found.tokenizer_sha256
    assert manifest.models["chat_template"] == found.template_sha256
    assert manifest.kept == manifest.rows == 22
    assert len(manifest.parts) == 3
    assert table.schema.field("target_rank").type == pa.list_(pa.int32())
    assert table.schema.field("loss").type == pa.list_(pa.float32())
    only = signals(store, "only", signals=["rank"])
    assert store.table("only").schema.names == [
        "id",
        "domain",
        "token_position",
        "turn",
        "protected",
        "loss",
        "entropy",
        "log_sum_exp",
        "target_rank",
    ]
    assert set(only.models) == {"model", "tokenizer", "chat_template"}


def test_shapes_change_last_bits_at_most_and_enter_the_key(store, made):
    manifest, table = made
    options = {"signals": ALL, "history": "checkpoint:0", "reference": "checkpoint:1", "layer": 0}
    other = signals(store, "other", **options, rows_a_shard=22, tokens_a_batch=1)
    assert other.key != manifest.key
    found = store.table("other").to_table()
    for name in table.schema.names:
        a, b = (flat(t.column(name)) for t in (table, found))
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, atol=2e-5)
        else:
            assert a.tolist() == b.tolist()


def flat(column):
    array = column.combine_chunks()
    while pa.types.is_list(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False)


def test_two_workers_and_a_second_run_give_the_same_bits(store, tmp_path):
    keys, digests = set(), set()
    for folder, workers in (("a", 1), ("b", 2)):
        copy = Store(tmp_path / folder)
        tokens = store.table("tokens")
        path = str(causal_from_table(store.table("lm")))
        with copy.write(
            name="tokens",
            step="tokenize_chats",
            version=1,
            options={},
            inputs=[],
            models=tokens.manifest.models,
            seed=0,
            schema=TOKENS,
        ) as writer:
            for number in writer.pending(1):
                with writer.shard(number) as out:
                    out.write(tokens.to_table())
                    out.count(kept=22, dropped={})
            writer.commit()
        manifest = run(
            copy,
            "token_signals",
            "signals",
            {"tokens": "tokens"},
            workers=workers,
            model=path,
            signals=["attention"],
            rows_a_shard=8,
        )
        keys.add(manifest.key)
        digests.add(manifest.logical_digest)
    assert len(keys) == len(digests) == 1


def tokens_table(store, name, rows, **models_changed):
    """A table of tokens with rows as given; all arrays of a row have its ids' length."""
    models_of = {**store.table("tokens").manifest.models, **models_changed}
    with store.write(
        name=name,
        step="tokenize_chats",
        version=1,
        options={"made": name},
        inputs=[],
        models=models_of,
        seed=0,
        schema=TOKENS,
    ) as writer:
        for number in writer.pending(1):
            with writer.shard(number) as out:
                out.write(pa.Table.from_pylist([row_of(*row) for row in rows], TOKENS))
                out.count(kept=len(rows), dropped={})
        writer.commit()


def row_of(number, ids, trainable):
    return {
        "id": number,
        "domain": "",
        "input_ids": ids,
        "trainable": trainable,
        "turn": [0] * len(ids),
        "protected": [False] * len(ids),
        "truncated": False,
    }


def test_bad_rows_go_aside_with_their_reason_and_the_rest_is_the_same(store):
    good = (5, [0, 9, 10, 11], [False, False, True, True])
    bad = [
        (6, [0, 9], [False, False]),
        (7, [0, 9, 5000], [False, True, True]),
        (8, [9, 10], [True, True]),
        (9, [0, -1, 9], [False, False, True]),
    ]
    tokens_table(store, "one", [good])
    tokens_table(store, "mixed", [bad[0], bad[1], good, bad[2], bad[3]])
    with pytest.raises(InputError, match="sample 6 of `mixed`: no token of it is trainable"):
        signals(store, "stopped", tokens="mixed")
    wanted = signals(store, "clean", tokens="one", signals=["alone", "attention"])
    manifest = signals(store, "aside", tokens="mixed", signals=["alone", "attention"], bad_rows=0.9)
    assert (manifest.rows, manifest.rejected) == (1, 4)
    assert manifest.logical_digest == wanted.logical_digest
    reasons = [
        json.loads(json.dumps(row))["reason"] for row in store.table("aside").rejects().to_pylist()
    ]
    for number, said in (
        (6, "no token"),
        (7, "token 5000 at position 2"),
        (8, "first token"),
        (9, "token -1 at position 1"),
    ):
        assert sum(f"sample {number}" in r and said in r for r in reasons) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_with_broken_weights_rejects_every_row(store, tmp_path, value):
    folder = causal_from_table(store.table("lm"))
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"sample \d+ of `tokens`: expected a finite"):
        signals(store, "broken", model=str(tmp_path))
    with pytest.raises(InputError, match="expected a finite loss .* under"):
        signals(store, "broken", signals=["history"], history=str(tmp_path))


def test_another_tokenizer_stops_the_run_naming_both(store, tmp_path):
    tokens_table(store, "foreign", [(1, [0, 9, 9], [False, True, True])], tokenizer="ab" * 32)
    own = store.table("tokens").manifest.models["tokenizer"][:16]
    with pytest.raises(InputError, match=rf"`foreign`.*abababababababab.*has {own}"):
        signals(store, "never", tokens="foreign")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"signals": ["history"]}, "option `history`"),
        ({"reference": "step:lm"}, "option `reference`"),
        ({"trajectory": ["step:lm"]}, "not among `signals`"),
        ({"signals": ["trajectory"], "trajectory": ["step:lm"]}, "at least two models"),
        ({"history": "checkpoint:7", "signals": ["history"]}, "from 0 to 1; found 7"),
    ],
)
def test_options_that_do_not_go_together(store, options, said):
    with pytest.raises(RecipeError, match=said):
        signals(store, "never", **options)


def test_a_model_with_two_roles_runs_once(store, monkeypatch):
    seen = []
    real = token_scoring.score_tokens

    def counting(model, ids, *rest, **given):
        seen.append(ids.numel())
        return real(model, ids, *rest, **given)

    monkeypatch.setattr(token_scoring, "score_tokens", counting)
    signals(
        store,
        "twice",
        rows_a_shard=22,
        tokens_a_batch=10_000,
        signals=["reference"],
        reference="step:lm",
    )
    assert len(seen) == 1
    row = store.table("twice").to_table().to_pylist()[3]
    assert row["loss"] == row["reference_loss"]


def test_the_key_follows_layer_sink_and_dtype(store):
    made = [
        signals(store, f"k{n}", signals=["attention"], **options).key
        for n, options in enumerate(
            ({}, {"layer": 0}, {"exclude_sink": 1}, {"dtype": "bfloat16"}, {"device": "cpu"})
        )
    ]
    assert len(set(made)) == 4
    assert made[0] == made[4]


def test_batches_hold_like_lengths_within_the_budget():
    lengths = [5, 100, 7, 6, 300, 5, 99]
    made = batches(lengths, 210)
    assert sorted(n for batch in made for n in batch) == list(range(7))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[n] for n in batch) <= 210
    assert made == [[0, 5, 3, 2], [6, 1], [4]]
    assert batches([], 10) == []


def test_models_are_read_once(store, monkeypatch):
    folder = str(causal_from_table(store.table("lm")))
    models.causal.cache_clear()
    assert models.causal(folder) is models.causal(folder)
    assert models.resolved_causal(folder).sha256 == models.causal(folder).digest
    assert isinstance(models.causal(folder).model, LlamaForCausalLM)
    assert isinstance(models.causal(folder).model.config, LlamaConfig)


def test_over_grown_chats_only_new_samples_are_scored(store, tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": chat(n), "topic": f"t{n % 3}"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = signals(store, "before", signals=["loss", "rank"])
    run(store, "read_chats", "more_chats", {}, path=str(path), domain_field="topic")
    run(store, "tokenize_chats", "more", {"chats": "more_chats", "model": "lm"})
    shutil.copytree(store.uri, tmp_path / "other")
    made = signals(store, "after", "more", signals=["loss", "rank"])
    assert made.notes["reused"] == {first.key: 22}
    other = Store(tmp_path / "other")
    spec = STEPS["token_signals"]
    options = spec.options(signals=["loss", "rank"], rows_a_shard=8, tokens_a_batch=160)
    context = StepContext(other, "after", threads=1, reuse=False)
    whole = spec(options, {"tokens": "more", "model": "lm"}, context)
    assert whole.key == made.key and "reused" not in whole.notes
    same_rows(store.table("after").to_table(), other.table("after").to_table())
