"""Selection inside TRL's SFTTrainer, with adapters, and over packed documents."""

from itertools import pairwise

import numpy as np
import pytest

from prunery import OnlineSelection
from prunery.errors import InputError, ModelError
from prunery.pruners.catalogue import METHODS

from .tiny_training import (
    IGNORE,
    VOCABULARY,
    Chosen,
    WatchedMixin,
    Weighing,
    chats,
    llama,
    losses_of,
    same_weights,
    trainable,
    trained_rows,
    weighed_loss,
    weights,
)

trl = pytest.importorskip("trl", reason="trl is not installed (pip install prunery[train])")
peft = pytest.importorskip("peft", reason="peft is not installed (pip install prunery[train])")
datasets = pytest.importorskip("datasets")


class WatchedSft(WatchedMixin, trl.SFTTrainer):
    pass


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def sft(folder, rows, selection, *, model=None, peft_config=None, **options):
    given = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
        "max_length": None,
    }
    return WatchedSft(
        model=model or llama(),
        args=trl.SFTConfig(**(given | options)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=peft_config,
        selection=selection,
    )


def some(sample, position):
    return ((sample // 7) % 3 != 0) & (position % 2 == 0)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_keeping_everything_is_plain_training(tmp_path, accumulation):
    rows = chats(22)
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 5}
    plain = sft(tmp_path / "a", rows, None, **options)
    plain.train()
    ours = sft(tmp_path / "b", rows, OnlineSelection(method=Chosen()), **options)
    ours.train()
    assert same_weights(weights(plain.model), weights(ours.model))
    assert not same_weights(weights(plain.model), weights(llama()))


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_loss_is_that_of_the_trained_tokens_over_their_number(tmp_path, accumulation, padding_free):
    rows = chats(22)
    model = llama()
    truth = losses_of(model, rows)
    method = Chosen(rule=some)
    learner = sft(
        tmp_path,
        rows,
        OnlineSelection(method=method),
        model=model,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.0,
        max_steps=-1,
        num_train_epochs=1,
        padding_free=padding_free,
    )
    learner.train()
    documents = _documents if padding_free else trained_rows
    by_tokens = {tuple(row["input_ids"]): row for row in rows}
    trained = 0
    for window, count, loss in zip(learner.windows, learner.counts, learner.losses, strict=True):
        total, tokens = 0.0, 0
        for ids, kept in documents(window):
            row = by_tokens[ids]
            wanted = some(np.full(len(trainable(row)), row["id"]), trainable(row))
            assert kept.tolist() == trainable(row)[wanted].tolist()
            total += truth[row["id"]][kept].sum()
            tokens += len(kept)
        assert count == tokens
        assert loss == pytest.approx(total / tokens, rel=1e-5)
        trained += tokens
    assert trained == sum(
        some(np.full(len(trainable(row)), row["id"]), trainable(row)).sum() for row in rows
    )
    by_id = {row["id"]: row for row in rows}
    for signals, _ in method.asked:
        for one in np.unique(signals["sample"]):
            mine = signals["sample"] == one
            assert signals["token_position"][mine].tolist() == trainable(by_id[one]).tolist()
            np.testing.assert_allclose(
                signals["loss"][mine], truth[one][trainable(by_id[one])], atol=2e-5
            )


def test_weights_multiply_the_loss_of_their_sample(tmp_path):
    rows, model = chats(16), llama()
    options = {"learning_rate": 0.0, "gradient_accumulation_steps": 2, "max_steps": 2}
    learner = sft(tmp_path, rows, OnlineSelection(method=Weighing()), model=model, **options)
    learner.train()
    for window, loss in zip(learner.windows, learner.losses, strict=True):
        assert loss == pytest.approx(weighed_loss(model, rows, window), rel=1e-5)


def _documents(window):
    """(tokens, places trained) of each document of packed rows, by the borders they come with."""
    found = []
    for batch in window:
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        borders = batch["cu_seq_lens_q"].tolist()
        assert borders[0] == 0 and borders[-1] == len(ids)
        assert batch["cu_seq_lens_k"].tolist() == borders
        assert batch["max_length_q"] == batch["max_length_k"] == max(np.diff(borders))
        for number, (start, stop) in enumerate(pairwise(borders)):
            assert batch["position_ids"][0, start:stop].tolist() == list(range(stop - start))
            assert (batch["seq_idx"][0, start:stop] == number).all()
            kept = np.flatnonzero(labels[start:stop].numpy() != IGNORE)
            if len(kept):
                found.append((tuple(ids[start:stop].tolist()), kept))
    return found


def test_packing_selects_documents(tmp_path):
    rows = chats(24)
    for row in rows:
        row["labels"] = list(row["input_ids"])  # every token but the first of a document
    method = METHODS["random"](keep=0.25)
    learner = sft(
        tmp_path,
        rows,
        OnlineSelection(method=method),
        packing=True,
        packing_strategy="bfd",
        max_length=48,
        max_steps=2,
        per_device_train_batch_size=2,
    )
    learner.train()
    known = {tuple(row["input_ids"]) for row in rows}
    for window in learner.windows:
        for ids, kept in _documents(window):
            assert ids in known
            assert kept.tolist() == list(range(1, len(ids)))
    logs = [one for one in learner.state.log_history if "selection/samples" in one]
    assert logs[0]["selection/samples"] > 4, "documents, not rows"
    assert logs[0]["selection/kept_samples"] == np.ceil(logs[0]["selection/samples"] / 4)


def test_packing_drops_columns_and_that_is_said(tmp_path):
    rows = [{**row, "reference_loss": [0.0] * len(trainable(row))} for row in chats(24)]
    selection = OnlineSelection(method=METHODS["excess_loss"]())
    sft(tmp_path, rows, selection, max_steps=1).train()
    with pytest.raises(InputError, match="needs the signal `reference_loss`"):
        sft(tmp_path, rows, selection, packing=True, max_length=48)


class _Historic(Chosen):
    needs = Chosen.needs | {"history_loss"}


@pytest.mark.parametrize("history", ["base", "ema"])
def test_history_of_adapters(tmp_path, history):
    rows = chats()
    by_id = {row["id"]: row for row in rows}
    base = losses_of(llama(), rows)
    method = _Historic(rule=lambda sample, position: position % 2 == 0)
    learner = sft(
        tmp_path,
        rows,
        OnlineSelection(method=method, history=history, ema=0.5),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
        learning_rate=0.3,
        max_steps=5,
    )
    copied = learner._history._weights
    assert bool(copied) == (history == "ema")
    assert all("lora" in name for name in copied)
    learner.train()
    gaps, moved = [], []
    for signals, _ in method.asked:
        one = signals["sample"][0]
        mine = signals["sample"] == one
        gaps.append(np.abs(signals["history_loss"][mine] - base[one][trainable(by_id[one])]).max())
        moved.append(np.abs(signals["loss"] - signals["history_loss"]).max())
    assert moved[0] < 1e-5 < 1e-2 < moved[-1]
    assert gaps[0] < 2e-5
    assert (max(gaps) < 2e-5) if history == "base" else (min(gaps[1:]) > 1e-3)
    assert learner.model.active_adapters == ["default"]


def test_resumed_adapters_end_as_the_unbroken_ones(tmp_path):
    rows = chats(32)
    ends = []
    for name, steps in (("whole", None), ("cut", 2)):
        options = {
            "learning_rate": 0.1,
            "save_strategy": "steps" if steps else "no",
            "save_steps": 2,
            "peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        }
        learner = sft(tmp_path / name, rows, _ema_selection(), **options)
        learner.train()
        if steps:
            learner = sft(tmp_path / name, rows, _ema_selection(), **options)
            learner.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        ends.append(weights(learner.model))
    assert same_weights(*ends)


def _ema_selection():
    return OnlineSelection(method=METHODS["sstoken"](tokens=0.5), history="ema", ema=0.5)


def test_prompt_learning_is_refused(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelError, match="prompt learning"):
        sft(tmp_path, chats(), OnlineSelection(method=Chosen()), peft_config=config)
