"""What each trainer trains on is what the export says, counted in the batches it makes.

TRL, transformers and datasets are the real libraries. axolotl, LLaMA-Factory and open-instruct
do not install here: for them the checks that their documentation states are repeated on the
files (columns, types, the collator they use), which is no run of theirs.
"""

import warnings
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from prunery.pipelines.sft_export import load_export, write_export
from prunery.storage import Store

from ..chat_models import CHATML, chat_tokenizer
from .test_sft_export import decide, run, write_rows

IGNORED = -100


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that gives the folder of an export in some format."""
    folder = tmp_path_factory.mktemp("trainers")
    chat_tokenizer(CHATML).save_pretrained(folder / "tokenizer")
    store = Store(folder / "store")
    run(store, "read_chats", "chats", path=str(write_rows(folder, 14)))
    run(store, "tokenize_chats", "tokens", {"chats": "chats"}, tokenizer=str(folder / "tokenizer"))
    decide(store, "tokens")
    run(store, "export_sft", "export", {"tokens": "tokens", "decision": "decision"})

    def get(format, **options):
        target = folder / f"{format}{len(options)}"
        if not target.exists():
            write_export(store, "export", target, format=format, **options)
        return target

    return get


def wanted(folder):
    """Sorted (input ids, labels) of the export, each as a tuple, and the number trained."""
    found = load_export(folder)
    rows = found.rows.to_pylist()
    pairs = sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)
    return pairs, found.manifest["trained_tokens"]


def loaded(folder, data="train.parquet"):
    kind = "json" if data.endswith("jsonl") else "parquet"
    cache = str(folder.parent / "cache")
    return datasets.load_dataset(
        kind, data_files=str(folder / data), split="train", cache_dir=cache
    )


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def rows_of(batch):
    """(input ids, labels) of each row of a padded batch, without the padding."""
    for ids, labels, mask in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        yield tuple(ids[mask == 1].tolist()), tuple(labels[mask == 1].tolist())


def mean_loss(model, pairs):
    """Mean over all trained tokens of -log p, one sample at a time."""
    total = count = 0
    with torch.no_grad():
        for ids, labels in pairs:
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
            for place in range(1, len(ids)):
                if labels[place] != IGNORED:
                    total -= torch.log_softmax(logits[place - 1], -1)[labels[place]].item()
                    count += 1
    return total / count


def sft_trainer(folder, out, dataset=None, **options):
    trl = pytest.importorskip("trl")
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": 16,
        "num_train_epochs": 1,
        "max_length": None,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl.SFTTrainer(
            model=tiny_model(),
            args=trl.SFTConfig(**settings),
            train_dataset=loaded(folder) if dataset is None else dataset,
            processing_class=chat_tokenizer(CHATML),
        )


@pytest.mark.parametrize("max_length", [None, 4096])
def test_trl_without_packing(exported, tmp_path, max_length):
    folder = exported("trl")
    pairs, trained = wanted(folder)
    trainer = sft_trainer(folder, tmp_path, max_length=max_length)
    found = []
    for batch in trainer.get_train_dataloader():
        mask = batch["attention_mask"]
        assert int((batch["labels"][mask == 0] != IGNORED).sum()) == 0
        found += rows_of(batch)
    assert sorted(found) == pairs
    assert sum(label != IGNORED for _, labels in found for label in labels) == trained


def test_trl_takes_the_loss_over_the_trained_tokens(exported, tmp_path):
    folder = exported("trl")
    pairs, _ = wanted(folder)
    trainer = sft_trainer(folder, tmp_path)
    before = mean_loss(tiny_model(), pairs)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(before, abs=2e-4)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_trl_with_packing(exported, tmp_path, strategy):
    folder = exported("trl")
    pairs, trained = wanted(folder)
    longest = max(len(ids) for ids, _ in pairs)
    trainer = sft_trainer(
        folder, tmp_path, packing=True, packing_strategy=strategy, max_length=longest + 20
    )
    dataset = trainer.train_dataset
    assert len(dataset) < len(pairs)
    assert sum(label != IGNORED for row in dataset["labels"] for label in row) == trained
    found = sorted(
        (token, label)
        for row in dataset
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )
    assert found == sorted(
        (token, label) for ids, labels in pairs for token, label in zip(ids, labels, strict=True)
    )
    if strategy == "bfd":  # whole samples, so each is found again between its borders
        samples = []
        for row in dataset:
            borders = np.cumsum([0, *row["seq_lengths"]])
            samples += [
                (tuple(row["input_ids"][a:b]), tuple(row["labels"][a:b]))
                for a, b in pairwise(borders)
            ]
        assert sorted(samples) == pairs
        counts = [
            int((batch["labels"] != IGNORED).sum()) for batch in trainer.get_train_dataloader()
        ]
        assert sum(counts) == trained


def test_trl_padding_free(exported, tmp_path):
    """One flat row a batch: the first token of a sample is never a target, so nothing is lost."""
    folder = exported("trl")
    _, trained = wanted(folder)
    try:
        trainer = sft_trainer(folder, tmp_path, padding_free=True)
    except (ValueError, ImportError, RuntimeError) as error:
        pytest.skip(f"padding-free needs a flash attention that is not here: {error}")
    batches = list(trainer.get_train_dataloader())
    assert sum(int((batch["labels"] != IGNORED).sum()) for batch in batches) == trained
    for batch in batches:
        starts = batch["position_ids"][0] == 0
        assert (batch["labels"][0][starts] == IGNORED).all()


def test_the_mask_column_alone_gives_the_same_labels(exported, tmp_path):
    """What TRL before 1.7 is left with when it packs: input ids and the mask."""
    folder = exported("trl")
    pairs, _ = wanted(folder)
    dataset = loaded(folder).remove_columns("labels")
    trainer = sft_trainer(folder, tmp_path, dataset=dataset)
    found = [pair for batch in trainer.get_train_dataloader() for pair in rows_of(batch)]
    assert sorted(found) == pairs


@pytest.mark.parametrize("jsonl", [False, True])
def test_transformers_trainer(exported, tmp_path, jsonl):
    folder = exported("trainer", **({"jsonl": True} if jsonl else {}))
    pairs, trained = wanted(folder)
    tokenizer = chat_tokenizer(CHATML)
    trainer = Trainer(
        model=tiny_model(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=3,
            gradient_accumulation_steps=3,
            num_train_epochs=1,
            report_to=[],
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=loaded(folder, "train.jsonl" if jsonl else "train.parquet"),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    found = [pair for batch in trainer.get_train_dataloader() for pair in rows_of(batch)]
    assert sorted(found) == pairs
    assert sum(label != IGNORED for _, labels in found for label in labels) == trained
    if not jsonl:
        before = mean_loss(tiny_model(), pairs)
        assert len(pairs) <= 9  # one step sees all of them
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(before, abs=2e-4)


def test_llama_factory_emulated(exported):
    """`tokenized_path` is read with load_from_disk; no column beyond the three may be there."""
    folder = exported("llama-factory")
    pairs, trained = wanted(folder)
    found = datasets.load_from_disk(str(folder))
    assert list(found) == ["train"]
    assert found["train"].column_names == ["input_ids", "attention_mask", "labels"]
    collator = DataCollatorForSeq2Seq(chat_tokenizer(CHATML), pad_to_multiple_of=8)
    batch = collator([found["train"][i] for i in range(len(found["train"]))])
    assert batch["input_ids"].shape[1] % 8 == 0
    assert sorted(rows_of(batch)) == pairs
    assert int((batch["labels"] != IGNORED).sum()) == trained


@pytest.mark.parametrize("format", ["axolotl", "open-instruct"])
@pytest.mark.parametrize("jsonl", [False, True])
def test_axolotl_and_open_instruct_emulated(exported, format, jsonl):
    """Exactly three columns of integer lists of one length, of which the mask is all ones."""
    folder = exported(format, **({"jsonl": True} if jsonl else {}))
    pairs, trained = wanted(folder)
    found = loaded(folder, "train.jsonl" if jsonl else "train.parquet")
    assert set(found.features) == {"input_ids", "attention_mask", "labels"}
    found.set_format("pt")  # open-instruct's finetune.py
    rows = []
    for row in found:
        assert all(not value.is_floating_point() for value in row.values())
        assert len({len(value) for value in row.values()}) == 1
        assert bool((row["attention_mask"] == 1).all())
        assert row["labels"][0] == IGNORED
        rows.append((tuple(row["input_ids"].tolist()), tuple(row["labels"].tolist())))
    assert sorted(rows) == pairs
    found.reset_format()
    batch = DataCollatorForSeq2Seq(chat_tokenizer(CHATML), padding="longest")(list(found))
    assert int((batch["labels"] != IGNORED).sum()) == trained
