"""The small model: the same again, better than guessing, whole or not there."""

import collections
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prunery.errors import InputError, ModelError, RecipeError, StoreError
from prunery.pipelines import train_lm
from prunery.pipelines.causal_files import causal_from_table, causal_source, checkpoints_of
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.pipelines.train_lm import Shape, rendered, train_causal, train_tokenizer
from prunery.pruners.models.causal import load_causal
from prunery.storage import Store

FRUIT = ["apple", "pear", "plum", "fig", "grape", "melon", "cherry", "peach"]
CHATS = [
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": f"Where does the {fruit} of row {row} grow?"},
        {"role": "assistant", "content": f"The {fruit} of row {row} grows in garden {row % 7}."},
    ]
    for row in range(12)
    for fruit in FRUIT
]
SHAPE = Shape(
    vocab_size=340,
    hidden_size=32,
    layers=2,
    heads=2,
    max_length=32,
    steps=60,
    batch_tokens=512,
    learning_rate=1e-2,
    checkpoints=2,
)
SMALL = {
    "vocab_size": 320,
    "hidden_size": 16,
    "layers": 1,
    "heads": 2,
    "max_length": 16,
    "steps": 6,
    "batch_tokens": 64,
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chats_store(tmp_path_factory):
    """A store with a table of chats, read from a file."""
    folder = tmp_path_factory.mktemp("lm")
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    store = Store(folder / "store")
    step = STEPS["read_chats"]
    step(step.options(path=str(path)), {}, StepContext(store, "chats"))
    return store


def train(store, **options):
    step = STEPS["train_lm"]
    context = StepContext(store, "lm", threads=1)
    return step(step.options(**(SMALL | options)), {"chats": "chats"}, context)


def test_training_beats_the_unigram_by_far_and_is_the_same_again(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    state = torch.random.get_rng_state()
    logs = [train_causal(CHATS, SHAPE, folder, seed=4) for folder in folders]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert logs[0] == logs[1]
    names = sorted(path.name for path in folders[0].iterdir())
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    loaded = load_causal(str(folders[0]), device="cpu")
    counts = collections.Counter(
        number
        for chat in CHATS
        for number in loaded.tokenizer.encode(rendered(loaded.tokenizer, chat))
    )
    total = sum(counts.values())
    unigram = -sum(n / total * math.log(n / total) for n in counts.values())
    assert logs[0][0].loss > unigram
    assert logs[0][-1].loss < 0.5 * unigram
    assert logs[0][-1].step == SHAPE.steps
    assert logs[0][-1].tokens == SHAPE.steps * SHAPE.batch_tokens
    ids = torch.tensor([loaded.tokenizer.encode(rendered(loaded.tokenizer, CHATS[5]))])
    assert float(loaded.model(input_ids=ids, labels=ids).loss) < 0.6 * unigram


def test_another_seed_is_another_model(tmp_path):
    small = dataclasses.replace(SHAPE, steps=3, checkpoints=0)
    for seed in (0, 1):
        train_causal(CHATS[:20], small, tmp_path / str(seed), seed=seed)
    a, b = ((tmp_path / s / "model.safetensors").read_bytes() for s in "01")
    assert a != b


def test_the_template_marks_what_the_assistant_says():
    tokenizer = train_tokenizer([m["content"] for chat in CHATS for m in chat], 340)
    chat = [*CHATS[0], {"role": "user", "content": "And now?"}, *CHATS[1][2:]]
    made = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    marked = [i for i, m in zip(made["input_ids"], made["assistant_masks"], strict=True) if m]
    wanted = "".join(m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant")
    assert tokenizer.decode(marked) == wanted
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.startswith("<|endoftext|><|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user")
    assert tokenizer.decode(made["input_ids"]) == text
    start = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(start)
    call = [{"role": "assistant", "content": "", "tool_calls": '[{"name": "f"}]'}]
    assert '[{"name": "f"}]<|im_end|>' in tokenizer.apply_chat_template(call, tokenize=False)


def test_any_text_survives_the_tokenizer():
    tokenizer = train_tokenizer(["plain words"], 300)
    text = "naïve 試験 \U0001f9ea\ttabs\r\n  and   spaces"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (
        rendered(tokenizer, [{"role": "text", "content": text}]) == f"<|endoftext|>{text}<|im_end|>"
    )


def test_an_epoch_reads_every_token_once():
    rows = [np.arange(100 * row, 100 * row + 3 + row) for row in range(20)]
    total = sum(map(len, rows))
    shape = dataclasses.replace(SHAPE, max_length=8, batch_tokens=16)
    batches = train_lm._batches(rows, shape, seed=0)
    read = np.concatenate([next(batches).ravel() for _ in range(2 * total // 16)])
    assert next(batches).shape == (2, 8)
    assert sorted(read[:total].tolist()) == sorted(np.concatenate(rows).tolist())
    assert read[:total].tolist() != read[total : 2 * total].tolist()


def test_the_table_holds_a_model_and_its_checkpoints(chats_store):
    manifest = train(chats_store)
    table = chats_store.table("lm")
    assert checkpoints_of(table) == 2
    log = table.to_table().to_pylist()
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["tokens"] == 6 * 64
    assert manifest.rows == manifest.kept == 6
    folders = [causal_from_table(table, number) for number in (0, 1, None)]
    assert len(set(folders)) == 3
    loaded = [load_causal(str(folder), device="cpu") for folder in folders]
    assert len({model.digest for model in loaded}) == 3
    assert len({model.tokenizer_sha256 for model in loaded}) == 1
    assert causal_from_table(table) == folders[2]
    weights = folders[2] / "model.safetensors"
    (row,) = [a for a in manifest.attachments if a["name"] == "model.safetensors"]
    assert weights.stat().st_size == row["bytes"]
    weights.unlink()
    assert load_file(causal_from_table(table) / "model.safetensors")


def test_models_are_named_by_step_checkpoint_folder_or_id(chats_store, tmp_path):
    train(chats_store)
    table = chats_store.table("lm")
    assert causal_source(None, table) == causal_source("step:lm", table)
    assert causal_source("checkpoint:1", table) == str(causal_from_table(table, 1))
    assert causal_source("owner/name", None) == "owner/name"
    for name in (None, "step:lm", "checkpoint:0"):
        with pytest.raises(RecipeError, match="as input `model`"):
            causal_source(name, None)
    with pytest.raises(RecipeError, match="from 0 to 1; found 2"):
        causal_source("checkpoint:2", table)
    with pytest.raises(RecipeError, match="checkpoint:0, checkpoint:1"):
        causal_source("checkpoint:last", table)


def test_a_stopped_training_leaves_nothing_and_starts_again(chats_store, monkeypatch):
    rate = train_lm._rate

    def stop(step, steps):
        if step == 4:
            raise KeyboardInterrupt
        return rate(step, steps)

    monkeypatch.setattr(train_lm, "_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        train(chats_store, learning_rate=2e-3)
    monkeypatch.setattr(train_lm, "_rate", rate)
    key = chats_store.key(
        step="train_lm",
        version=1,
        options={
            **STEPS["train_lm"].options(**SMALL, learning_rate=2e-3).model_dump(),
            "inputs": ["chats"],
        },
        inputs=[chats_store.resolve("chats")],
        models={},
        seed=0,
    )
    with pytest.raises(StoreError):
        chats_store.manifest(key)
    made = train(chats_store, learning_rate=2e-3)
    assert made.key == key
    assert made.rows == 6


def test_what_cannot_be_trained_is_refused(chats_store, tmp_path):
    with pytest.raises(RecipeError, match="twice `heads`"):
        train(chats_store, hidden_size=18, heads=2)
    with pytest.raises(RecipeError, match="more `steps` than `checkpoints`"):
        train(chats_store, steps=2)
    with pytest.raises(InputError, match="expected chats"):
        train_causal([], SHAPE, tmp_path, seed=0)
    with pytest.raises(InputError, match="more than 32 tokens"):
        train_causal([[{"role": "text", "content": "few"}]], SHAPE, tmp_path, seed=0)
    hot = dataclasses.replace(SHAPE, learning_rate=1e6, steps=20)
    with pytest.raises(ModelError, match="finite loss"):
        train_causal(CHATS[:20], hot, tmp_path, seed=0)
