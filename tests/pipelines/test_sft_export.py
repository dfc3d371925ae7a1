"""An export is what the decision says, in the columns of each trainer, and the trainers agree."""

import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prunery.errors import InputError, ModelError, StoreError
from prunery.pipelines.engine import StepContext
from prunery.pipelines.sft_export import COLUMNS, load_export, write_export
from prunery.pipelines.sft_tables import DECISION, EXPORT
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

from .. import test_cli
from ..chat_models import CHATML, CHATML_MARKED, chat_tokenizer

TRAINERS = sorted(set(COLUMNS) - {"olmo-core"})
REASONS = {0: "harmful noise", 1: "", 2: ""}


def run(store, step, name, inputs=None, **options):
    spec = STEPS[step]
    return spec(spec.options(**options), inputs or {}, StepContext(store, name=name))


def write_rows(folder, count=12):
    lines = []
    for i in range(count):
        turns = [
            {"role": "user", "content": f"What is {i} and {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}, the sum of two numbers."},
        ]
        if i % 3 == 2:
            turns += [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "Hello" + "!" * i},
            ]
        lines.append(
            json.dumps({"messages": turns, "note": f"row {i}: \u00e9\u2028"}, ensure_ascii=False)
        )
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def decide(store, tokens, *, skip=0):
    """A decision made by hand: every third sample dropped, two of three tokens kept elsewhere.

    The first `skip` samples are not decided about, as if their signals had been rejected; the
    last is kept with no token left.
    """
    rows = store.table(tokens).to_table().to_pylist()
    made = []
    for i, row in enumerate(rows):
        count = sum(row["trainable"])
        kept = [i % 3 > 0 and j % 3 < 2 for j in range(count)]
        if i == len(rows) - 1:
            kept = [False] * count
        value = dict.fromkeys(DECISION.names) | {
            "id": row["id"],
            "keep": i % 3 > 0,
            "score": 0.5,
            "reason": REASONS[i % 3],
            "weight": 1.5 if i == 1 else 1.0,
            "tokens": count,
            "kept_tokens": sum(kept),
            "token_keep": kept,
            "token_score": [],
            "token_reason": [],
        }
        made.append(value)
    return store.commit_once(
        lambda out: out.write(pa.Table.from_pylist(made[skip:], DECISION)),
        name="decision",
        step="prune_sft",
        options={"method": "qtuning", "options": {"keep": 0.5}, "by_domain": False},
        inputs=[store.resolve(tokens)],
        seed=7,
        schema=DECISION,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(store, tokenizer folder, rows file) with the tables chats, tokens, decision, export."""
    folder = tmp_path_factory.mktemp("export")
    chat_tokenizer(CHATML_MARKED).save_pretrained(folder / "tokenizer")
    store = Store(folder / "store")
    rows = write_rows(folder)
    run(store, "read_chats", "chats", path=str(rows))
    run(store, "tokenize_chats", "tokens", {"chats": "chats"}, tokenizer=str(folder / "tokenizer"))
    decide(store, "tokens")
    run(store, "export_sft", "export", {"tokens": "tokens", "decision": "decision"})
    return store, folder / "tokenizer", rows


@pytest.fixture(scope="module")
def wanted(made):
    """(input ids, labels) of each exported sample, put together without the code under test."""
    store, _, _ = made
    keep = {row["id"]: row for row in store.table("decision").to_table().to_pylist()}
    found = []
    for row in store.table("tokens").to_table().to_pylist():
        decided = keep[row["id"]]
        if decided["keep"] and sum(decided["token_keep"]):
            left = iter(decided["token_keep"])
            labels = [
                token if trainable and next(left) else -100
                for token, trainable in zip(row["input_ids"], row["trainable"], strict=True)
            ]
            found.append((row["input_ids"], labels))
    return found


def trained(labels):
    return sum(label != -100 for label in labels)


def test_labels_are_the_kept_targets_and_nothing_else(made, wanted):
    store, _, _ = made
    table = store.table("export").to_table()
    assert table.schema.equals(EXPORT)
    rows = table.to_pylist()
    assert [(row["input_ids"], row["labels"]) for row in rows] == wanted
    for row in rows:
        mask = [int(label != -100) for label in row["labels"]]
        assert row["completion_mask"] == row["assistant_masks"] == mask
        assert row["attention_mask"] == [1] * len(row["input_ids"])
        assert row["length"] == len(row["input_ids"])
        assert 0 < sum(mask) < len(mask)
    assert [row["weight"] for row in rows][:2] == [1.5, 1.0]


def test_every_sample_is_kept_or_counted_with_its_reason(made):
    store, _, _ = made
    manifest = store.manifest("export")
    assert manifest.kept == manifest.rows == 7
    assert manifest.dropped == {"harmful noise": 4, "no token left to train": 1}
    notes, tokens = manifest.notes, store.manifest("tokens")
    assert notes["decisions"] == [
        {
            "method": "qtuning",
            "options": {"keep": 0.5},
            "by_domain": False,
            "seed": 7,
            "table": store.resolve("decision"),
        }
    ]
    assert notes["samples"] == 12 and notes["kept_samples"] == 8
    assert notes["truncated_samples"] == 0
    assert notes["sample_ratio"] == round(8 / 12, 6)
    assert notes["kept_tokens"] < notes["trainable_tokens"]
    assert notes["token_ratio"] == round(notes["kept_tokens"] / notes["trainable_tokens"], 6)
    assert notes["tokenizer"] == tokens.models["tokenizer"] == manifest.models["tokenizer"]
    assert notes["chat_template"] == tokens.models["chat_template"]


def test_a_sample_that_nobody_decided_about_is_counted(made, tmp_path):
    _, tokenizer, rows = made
    other = Store(tmp_path / "store")
    run(other, "read_chats", "chats", path=str(rows))
    run(other, "tokenize_chats", "tokens", {"chats": "chats"}, tokenizer=str(tokenizer))
    decide(other, "tokens", skip=2)
    manifest = run(other, "export_sft", "export", {"tokens": "tokens", "decision": "decision"})
    assert manifest.dropped == {
        "harmful noise": 3,
        "no token left to train": 1,
        "not decided": 2,
    }


def test_a_decision_about_other_tokens_is_refused_with_the_sample(made, tmp_path):
    _, tokenizer, rows = made
    other = Store(tmp_path / "store")
    run(other, "read_chats", "chats", path=str(rows))
    for name, on in (("tokens", "assistant"), ("fewer", "last")):
        run(
            other,
            "tokenize_chats",
            name,
            {"chats": "chats"},
            tokenizer=str(tokenizer),
            train_on=on,
        )
    decide(other, "fewer")
    with pytest.raises(StoreError, match=r"sample \d+: expected a decision about its \d+"):
        run(other, "export_sft", "export", {"tokens": "tokens", "decision": "decision"})


@pytest.mark.parametrize("format", TRAINERS)
@pytest.mark.parametrize("jsonl", [False, True])
def test_each_format_has_exactly_its_columns_and_comes_back(made, wanted, tmp_path, format, jsonl):
    store, _, _ = made
    if jsonl and format == "llama-factory":
        with pytest.raises(InputError, match="JSON lines"):
            write_export(store, "export", tmp_path / "out", format=format, jsonl=True)
        return
    tokenizer = chat_tokenizer(CHATML_MARKED)
    made_ = write_export(
        store, "export", tmp_path / "out", format=format, tokenizer=tokenizer, jsonl=jsonl
    )
    assert made_.manifest["trained_tokens"] == sum(trained(labels) for _, labels in wanted)
    assert made_.manifest["tokens"] == sum(len(ids) for ids, _ in wanted)
    assert made_.manifest["rows"] == len(wanted)
    back = load_export(tmp_path / "out", tokenizer)
    assert back.manifest == made_.manifest
    assert tuple(back.rows.column_names) == COLUMNS[format]
    for name in back.rows.column_names:
        assert back.rows.schema.field(name).type == EXPORT.field(name).type
    rows = back.rows.to_pylist()
    assert [(row["input_ids"], row["labels"]) for row in rows] == wanted
    saved = load_export(
        tmp_path / "out", type(tokenizer).from_pretrained(tmp_path / "out/tokenizer")
    )
    assert saved.manifest == back.manifest
    side = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    assert [row["trained_tokens"] for row in side] == [trained(labels) for _, labels in wanted]
    assert not list((tmp_path / "out").rglob("*.cache*"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_arrays_for_olmo_core(made, wanted, tmp_path):
    store, _, _ = made
    with pytest.raises(InputError, match="give `tokenizer`"):
        write_export(store, "export", tmp_path / "out", format="olmo-core")
    tokenizer = chat_tokenizer(CHATML_MARKED)
    write_export(store, "export", tmp_path / "out", format="olmo-core", tokenizer=tokenizer)
    ids = np.memmap(tmp_path / "out" / "token_ids_part_0000.npy", np.uint16, "r")
    mask = np.memmap(tmp_path / "out" / "labels_mask_part_0000.npy", np.bool_, "r")
    with gzip.open(tmp_path / "out" / "token_ids_part_0000.csv.gz", "rt") as file:
        borders = [tuple(map(int, line.split(","))) for line in file]
    assert len(borders) == len(wanted) and borders[-1][1] == len(ids) == len(mask)
    for (start, end), (tokens, labels) in zip(borders, wanted, strict=True):
        assert ids[start:end].tolist() == tokens
        assert mask[start:end].tolist() == [label != -100 for label in labels]
    back = load_export(tmp_path / "out").rows
    assert back.column("input_ids").to_pylist() == [tokens for tokens, _ in wanted]
    assert back.column("completion_mask").to_pylist() == [
        [int(label != -100) for label in labels] for _, labels in wanted
    ]


def test_rows_are_the_lines_that_were_read(made, tmp_path):
    store, _, rows = made
    ids = [row["id"] for row in store.table("export").to_table(["id"]).to_pylist()]
    sources = {row["id"]: row["source"] for row in store.table("chats").to_table().to_pylist()}
    numbers = [int(sources[i].partition("#")[2]) for i in ids]
    write_export(store, "export", tmp_path / "out", format="rows")
    lines = rows.read_bytes().split(b"\n")
    wanted = b"".join(lines[number - 1] + b"\n" for number in numbers)
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == wanted
    back = load_export(tmp_path / "out")
    assert back.rows.column("raw").to_pylist() == [lines[n - 1].decode() for n in numbers]


def test_a_full_folder_is_refused_and_forced(made, tmp_path):
    store, _, _ = made
    target = tmp_path / "out"
    target.mkdir()
    write_export(store, "export", target, format="trl")  # an empty folder is fine
    with pytest.raises(InputError, match="not empty"):
        write_export(store, "export", target, format="trainer")
    assert load_export(target).manifest["format"] == "trl"
    write_export(store, "export", target, format="trainer", force=True)
    assert load_export(target).manifest["format"] == "trainer"


def test_a_failed_export_leaves_nothing(made, tmp_path, monkeypatch):
    store, _, _ = made
    monkeypatch.setattr(pq.ParquetWriter, "write_batch", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_export(store, "export", tmp_path / "out", format="trl")
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_or_template_is_named(made, tmp_path):
    store, _, _ = made
    other = chat_tokenizer(CHATML_MARKED)
    other.add_tokens(["<new>"])
    with pytest.raises(ModelError, match="expected the tokenizer with digest"):
        write_export(store, "export", tmp_path / "a", format="trl", tokenizer=other)
    with pytest.raises(ModelError, match="expected the chat template with digest"):
        write_export(
            store, "export", tmp_path / "a", format="trl", tokenizer=chat_tokenizer(CHATML)
        )
    assert not (tmp_path / "a").exists()
    write_export(store, "export", tmp_path / "a", format="trl")
    with pytest.raises(ModelError, match="expected the tokenizer with digest"):
        load_export(tmp_path / "a", other)
    own = chat_tokenizer(CHATML)
    own.pad_token = own.eos_token  # what trainers do; the ids of a text stay the same
    own.padding_side = "left"
    own(["a", "b c d"], padding=True, truncation=True, max_length=4)
    load_export(tmp_path / "a", own)


@pytest.mark.parametrize("harm", ["changed", "lost", "added"])
def test_a_changed_export_is_refused(made, tmp_path, harm):
    store, _, _ = made
    target = tmp_path / "out"
    write_export(store, "export", target, format="axolotl")
    file = target / "train.parquet"
    if harm == "changed":
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    elif harm == "lost":
        file.unlink()
    else:
        shutil.copy(file, target / "more.parquet")
    with pytest.raises(StoreError, match="parquet"):
        load_export(target)


def test_what_is_no_export_is_refused(made, tmp_path):
    store, _, _ = made
    with pytest.raises(InputError, match="expected one of `export_sft`"):
        write_export(store, "tokens", tmp_path / "a", format="trl")
    with pytest.raises(InputError, match="known: trl, trainer"):
        write_export(store, "export", tmp_path / "a", format="excel")
    with pytest.raises(StoreError, match=r"manifest\.json"):
        load_export(tmp_path)


def test_command(made, tmp_path, capsys):
    store, tokenizer, _ = made
    arguments = ["export", "export", "--out", str(tmp_path / "out"), "--store", str(store.uri)]
    code, out, err = test_cli.run(
        capsys, *arguments, "--format", "trainer", "--tokenizer", str(tokenizer)
    )
    assert code == 0, err
    assert "7 samples" in out
    assert load_export(tmp_path / "out").manifest["format"] == "trainer"
    code, _, err = test_cli.run(capsys, *arguments, "--format", "trainer")
    assert code == 2 and "--force" in err
    code, out, _ = test_cli.run(capsys, *arguments, "--format", "rows", "--force", "--json")
    assert code == 0 and json.loads(out)["data"] == "rows.jsonl"


def test_an_empty_selection_is_refused_with_its_reasons(made, tmp_path):
    _, tokenizer, rows = made
    other = Store(tmp_path / "store")
    run(other, "read_chats", "chats", path=str(rows))
    run(other, "tokenize_chats", "tokens", {"chats": "chats"}, tokenizer=str(tokenizer))
    decide(other, "tokens", skip=12)
    run(other, "export_sft", "export", {"tokens": "tokens", "decision": "decision"})
    with pytest.raises(InputError, match="nothing to train on; dropped: .'not decided': 12"):
        write_export(other, "export", tmp_path / "out", format="trl")


def test_two_processes_give_the_same_rows(made, tmp_path):
    store, tokenizer, rows = made
    other = Store(tmp_path / "store")
    chats = run(other, "read_chats", "chats", path=str(rows), shard_bytes=400)
    assert chats.logical_digest == store.manifest("chats").logical_digest
    assert len(chats.parts) > 3
    spec = STEPS["tokenize_chats"]
    tokens = spec(
        spec.options(tokenizer=str(tokenizer), rows_a_shard=2),
        {"chats": "chats"},
        StepContext(other, name="tokens", workers=2),
    )
    assert tokens.logical_digest == store.manifest("tokens").logical_digest
    decide(other, "tokens")
    export = run(other, "export_sft", "export", {"tokens": "tokens", "decision": "decision"})
    assert export.logical_digest == store.manifest("export").logical_digest
    assert np.sum([part["rows"] for part in export.parts]) == 7
