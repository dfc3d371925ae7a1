"""Selection inside training, on Llamas of a few thousand weights."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from prunery import OnlineSelection
from prunery.errors import InputError, ModelError
from prunery.pruners.catalogue import METHODS

from .ddp_driver import lopsided
from .tiny_training import (
    IGNORE,
    Chosen,
    Weighing,
    chats,
    llama,
    losses_of,
    same_weights,
    trainable,
    trained_rows,
    trainer,
    weighed_loss,
    weights,
)


def even_positions(sample, position):
    return position % 2 == 0


def every_third_sample(sample, position):
    return (sample // 7) % 3 == 0


def both(sample, position):
    return every_third_sample(sample, position) & even_positions(sample, position)


@pytest.mark.parametrize(
    ("rule", "accumulation", "left"),
    [
        (even_positions, 1, False),
        (even_positions, 4, True),
        (every_third_sample, 1, True),
        (every_third_sample, 4, False),
        (both, 1, False),
        (both, 4, False),
        (both, 4, True),
    ],
)
def test_loss_is_that_of_the_trained_tokens_over_their_number(tmp_path, rule, accumulation, left):
    rows = chats(22)  # the last window of an epoch is uneven: 22 = 16 + 6, batches of 4 and 2
    model = llama()
    learner = trainer(
        tmp_path,
        rows,
        OnlineSelection(method=Chosen(rule=rule)),
        model=model,
        left=left,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.0,
        max_steps=-1,
        num_train_epochs=1,
    )
    learner.train()
    truth = losses_of(model, rows)
    by_tokens = {tuple(row["input_ids"]): row for row in rows}
    trained = 0
    for window, count, loss in zip(learner.windows, learner.counts, learner.losses, strict=True):
        total, tokens = 0.0, 0
        for ids, kept in trained_rows(window):
            row = by_tokens[ids]
            wanted = rule(np.full(len(trainable(row)), row["id"]), trainable(row))
            assert kept.tolist() == trainable(row)[wanted].tolist()
            total += truth[row["id"]][kept].sum()
            tokens += len(kept)
        assert count == max(tokens, 1)
        assert loss == pytest.approx(total / max(tokens, 1), rel=1e-5, abs=1e-7)
        trained += tokens
    assert trained == sum(
        rule(np.full(len(trainable(row)), row["id"]), trainable(row)).sum() for row in rows
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_keeping_everything_is_plain_training(tmp_path, accumulation):
    rows = chats(22)
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 5}
    plain = trainer(tmp_path / "a", rows, None, **options)
    plain.train()
    ours = trainer(tmp_path / "b", rows, OnlineSelection(method=Chosen()), **options)
    ours.train()
    assert same_weights(weights(plain.model), weights(ours.model))
    assert not same_weights(weights(plain.model), weights(llama()))


def test_dropped_samples_cost_no_training_forward(tmp_path):
    rows = chats(32)
    tokens_in = []
    model = llama()

    def count(module, args, kwargs):
        if torch.is_grad_enabled():
            tokens_in.append(kwargs["input_ids"].numel())

    model.register_forward_pre_hook(count, with_kwargs=True)
    options = {
        "gradient_accumulation_steps": 4,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
    }
    quarter = Chosen(rule=lambda sample, position: (sample // 7) % 4 == 0)
    learner = trainer(tmp_path, rows, OnlineSelection(method=quarter), model=model, **options)
    learner.train()
    kept = [row for row in rows if (row["id"] // 7) % 4 == 0]
    assert len(tokens_in) == 8, "as many micro-batches as ever"
    # Ordered by length, each micro-batch pads its few samples to their own longest.
    assert sum(tokens_in) <= 1.4 * sum(len(row["input_ids"]) for row in kept)
    assert max(batch["input_ids"].shape[0] for window in learner.windows for batch in window) <= 3


def test_a_window_that_loses_everything_trains_nothing(tmp_path):
    none = Chosen(rule=lambda sample, position: np.zeros(len(sample), bool))
    options = {"weight_decay": 0.0, "gradient_accumulation_steps": 2, "max_steps": 2}
    learner = trainer(tmp_path, chats(), OnlineSelection(method=none), **options)
    learner.train()
    assert same_weights(weights(learner.model), weights(llama()))
    assert learner.losses == [0.0, 0.0]
    for window in learner.windows:
        assert [tuple(batch["input_ids"].shape) for batch in window] == [(1, 2), (1, 2)]


def test_more_micro_batches_than_samples(tmp_path):
    """One sample of a window stays: the other micro-batches add exactly nothing."""
    rows = chats(4)
    one = Chosen(rule=lambda sample, position: sample == 14)
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_steps": 1}
    learner = trainer(tmp_path / "a", rows, OnlineSelection(method=one), **options)
    learner.train()
    alone = trainer(tmp_path / "b", [rows[2]], None, per_device_train_batch_size=1, max_steps=1)
    alone.train()
    for name, value in weights(learner.model).items():
        assert torch.allclose(value, weights(alone.model)[name], atol=1e-6), name


def test_resumed_run_decides_and_ends_as_the_unbroken_one(tmp_path):
    rows = chats(40)

    def selection(folder):
        return OnlineSelection(
            method=METHODS["sstoken"](tokens=0.5),
            history="ema",
            ema=0.7,
            warmup_samples=16,
            decisions=folder / "decisions.jsonl",
        )

    options = {"max_steps": 6, "gradient_accumulation_steps": 2}
    whole = trainer(tmp_path / "whole", rows, selection(tmp_path / "whole"), **options)
    whole.train()
    first = trainer(
        tmp_path / "cut",
        rows,
        selection(tmp_path / "cut"),
        save_strategy="steps",
        save_steps=3,
        **options,
    )
    first.train()
    # Steps 4 to 6 stand in the file as if the run had been killed after them; they are taken again.
    second = trainer(tmp_path / "cut", rows, selection(tmp_path / "cut"), **options)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert same_weights(weights(whole.model), weights(second.model))
    one, two = ((tmp_path / folder / "decisions.jsonl").read_text() for folder in ("whole", "cut"))
    assert one == two
    lines = [json.loads(line) for line in one.splitlines()]
    assert {line["step"] for line in lines} == set(range(6))
    assert any(line["kept_tokens"] < line["tokens"] for line in lines)
    assert all(line["kept_tokens"] == math.ceil(line["tokens"] / 2) for line in lines)


def test_checkpoint_of_another_selection_is_refused(tmp_path):
    rows = chats()
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    method = METHODS["sstoken"](tokens=0.5)
    trainer(tmp_path, rows, OnlineSelection(method=method), **options).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    other = OnlineSelection(method=METHODS["sstoken"](tokens=0.6))
    with pytest.raises(ModelError, match="method"):
        trainer(tmp_path, rows, other, max_steps=2).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ModelError, match="began with other weights"):
        trainer(tmp_path, rows, OnlineSelection(method=method), model=llama(5), max_steps=2).train(
            resume_from_checkpoint=checkpoint
        )
    trainer(tmp_path, rows, None, **options).train()
    with pytest.raises(ModelError, match="written without selection"):
        trainer(tmp_path, rows, OnlineSelection(method=method), max_steps=2).train(
            resume_from_checkpoint=_without_state(tmp_path / "checkpoint-1")
        )


def _without_state(folder):
    (folder / "prunery_selection.json").unlink()
    return str(folder)


def asked_losses(method, window: int) -> dict[int, np.ndarray]:
    """Loss by sample id, as the method was told in that window."""
    signals, _ = method.asked[window]
    return {
        int(one): signals["loss"][signals["sample"] == one] for one in np.unique(signals["sample"])
    }


@pytest.mark.parametrize("left", [False, True])
def test_method_sees_the_model_as_it_is_now(tmp_path, left):
    rows = chats()
    method = Chosen(rule=even_positions)
    model = llama()
    learner = trainer(tmp_path, rows, OnlineSelection(method=method), model=model, left=left)
    before = losses_of(model, rows)
    learner.train()
    told = asked_losses(method, 0)
    by_id = {row["id"]: row for row in rows}
    for one, values in told.items():
        np.testing.assert_allclose(values, before[one][trainable(by_id[one])], atol=2e-5)
    # The model has moved three times before the last window.
    last = asked_losses(method, 3)
    assert max(np.abs(v - before[k][trainable(by_id[k])]).max() for k, v in last.items()) > 0.01
    signals, _ = method.asked[0]
    ends = [row["input_ids"][place] == 2 for row in rows for place in trainable(row)]
    assert signals["protected"].sum() == len(told), "one end of sequence a sample"
    assert sum(ends) == len(rows)


def test_each_step_has_its_own_seed_and_each_run_the_same(tmp_path):
    seeds = []
    for run in range(2):
        method = Chosen()
        trainer(tmp_path / str(run), chats(), OnlineSelection(method=method)).train()
        seeds.append([seed for _, seed in method.asked])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 4


def test_pool_of_a_batch_or_of_a_window(tmp_path):
    sizes = {}
    for pool in ("window", "batch"):
        method = Chosen()
        options = {"gradient_accumulation_steps": 3, "max_steps": 1}
        trainer(
            tmp_path / pool, chats(), OnlineSelection(method=method, pool=pool), **options
        ).train()
        sizes[pool] = [len(np.unique(signals["sample"])) for signals, _ in method.asked]
    assert sizes == {"window": [12], "batch": [4, 4, 4]}


def test_random_samples_and_tokens_through_the_catalogue(tmp_path):
    rows = chats(32)
    for name, options in (("random", {"keep": 0.25}), ("qtuning", {"samples": 0.25})):
        learner = trainer(
            tmp_path / name,
            rows,
            OnlineSelection(method=METHODS[name](**options)),
            gradient_accumulation_steps=2,
        )
        learner.train()
        for window in learner.windows:
            assert len(trained_rows(window)) == 2, "a quarter of two batches of four"
    logs = [one for one in learner.state.log_history if "selection/kept_samples" in one]
    assert len(logs) == 4
    assert all(one["selection/samples"] == 8 for one in logs)
    assert all(one["selection/kept_samples"] == 2 for one in logs)
    assert all(0 < one["selection/kept_tokens"] < one["selection/tokens"] for one in logs)
    assert all(-1 <= one["selection/correlation"] <= 1 for one in logs)
    assert all(0 <= one["selection/topped_up"] <= 1 for one in logs)
    assert all(one["selection/seconds"] > 0 for one in logs)


def test_logging_can_be_switched_off(tmp_path):
    method = METHODS["random_tokens"](tokens=0.5)
    learner = trainer(tmp_path, chats(), OnlineSelection(method=method, log=False))
    learner.train()
    assert not any("selection" in key for one in learner.state.log_history for key in one)


def test_nan_in_scoring_stops_naming_the_row(tmp_path):
    rows = chats(8)
    rows[5] = rows[5] | {"input_ids": [1, 90, 91, 92, 2], "labels": [IGNORE] * 3 + [92, 2]}
    rows[5]["attention_mask"] = [1] * 5
    for row in rows:
        if row is not rows[5]:
            row["input_ids"] = [min(one, 80) for one in row["input_ids"]]
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[91] = math.nan
    start = weights(model)
    learner = trainer(
        tmp_path,
        rows,
        OnlineSelection(method=Chosen()),
        model=model,
        gradient_accumulation_steps=2,
    )
    with pytest.raises(ModelError, match=r"step 0: `loss` of sample 35 is nan at token 3"):
        learner.train()
    moved = weights(model)
    assert all(torch.equal(moved[name].nan_to_num(), start[name].nan_to_num()) for name in start)


def test_bfloat16_autocast(tmp_path):
    rows = chats()
    method = Chosen(rule=even_positions)
    model = llama()
    before = losses_of(model, rows)
    learner = trainer(tmp_path, rows, OnlineSelection(method=method), model=model, bf16=True)
    learner.train()
    by_id = {row["id"]: row for row in rows}
    told = asked_losses(method, 0)
    gaps = [np.abs(v - before[k][trainable(by_id[k])]).max() for k, v in told.items()]
    assert 1e-4 < max(gaps) < 0.3, "scored in the precision of training"
    assert all(np.isfinite(learner.losses))


def test_history_is_the_model_that_training_began_with(tmp_path):
    rows = chats()
    by_id = {row["id"]: row for row in rows}
    for kind in ("base", "ema", "refresh", "model"):
        method = _Historic(rule=even_positions)
        model = llama()
        base = losses_of(model, rows)
        option = {
            "base": {"history": "base"},
            "ema": {"history": "ema", "ema": 0.5},
            "refresh": {"refresh": 2},
            "model": {"history": llama(9)},
        }[kind]
        trainer(tmp_path, rows, OnlineSelection(method=method, **option), model=model).train()
        if kind == "model":
            base = losses_of(llama(9), rows)
        gaps = []
        for signals, _ in method.asked:
            gap = 0.0
            for one in np.unique(signals["sample"]):
                found = signals["history_loss"][signals["sample"] == one]
                gap = max(gap, np.abs(found - base[one][trainable(by_id[one])]).max())
            gaps.append(gap)
            if kind == "ema" and len(gaps) > 1:
                assert not np.allclose(signals["history_loss"], signals["loss"], atol=1e-3)
        assert gaps[0] < 2e-5
        if kind in ("base", "model"):
            assert max(gaps) < 2e-5
        elif kind == "ema":
            assert min(gaps[1:]) > 1e-3
        else:
            assert gaps[1] < 2e-5 < 1e-3 < gaps[2]
            signals, _ = method.asked[2]
            np.testing.assert_allclose(signals["history_loss"], signals["loss"], atol=1e-6)


class _Historic(Chosen):
    needs = Chosen.needs | {"history_loss"}


class _Referred(Chosen):
    needs = Chosen.needs | {"reference_loss"}


def test_columns_of_losses_reach_the_method(tmp_path):
    rows = chats(24)
    for number, row in enumerate(rows):
        count = len(trainable(row))
        row["history_loss"] = (np.arange(count) + 100.0 * number).tolist()
    method = _Historic(rule=even_positions)
    learner = trainer(tmp_path, rows, OnlineSelection(method=method), max_steps=6)
    learner.train()
    for signals, _ in method.asked:
        for one in np.unique(signals["sample"]):
            found = signals["history_loss"][signals["sample"] == one]
            assert found.tolist() == (np.arange(len(found)) + 100.0 * (one // 7)).tolist()
    rows[3]["history_loss"] = rows[3]["history_loss"][:-1]
    with pytest.raises(InputError, match="`history_loss` of sample 21 holds"):
        trainer(tmp_path, rows, OnlineSelection(method=_Historic()), max_steps=6).train()


def test_reference_model_or_column_or_refusal(tmp_path):
    rows = chats()
    with pytest.raises(InputError, match="needs the signal `reference_loss`"):
        trainer(tmp_path, rows, OnlineSelection(method=_Referred()))
    method = _Referred(rule=even_positions)
    teacher = llama(4)
    trainer(tmp_path, rows, OnlineSelection(method=method, reference=teacher)).train()
    truth = losses_of(teacher, rows)
    by_id = {row["id"]: row for row in rows}
    signals, _ = method.asked[3]
    for one in np.unique(signals["sample"]):
        found = signals["reference_loss"][signals["sample"] == one]
        np.testing.assert_allclose(found, truth[one][trainable(by_id[one])], atol=2e-5)


def test_warm_up_and_the_unpruned_end(tmp_path):
    method = Chosen(rule=even_positions)
    selection = OnlineSelection(method=method, warmup_samples=8, full_last=0.25)
    learner = trainer(tmp_path, chats(40), selection, max_steps=8)
    learner.train()
    # Steps 0 and 1 (samples 0 to 8) warm up; of 8 steps the last quarter is 6 and 7.
    full = [
        all(np.array_equal(kept, range(3, len(ids))) for ids, kept in trained_rows(window))
        for window in learner.windows
    ]
    assert full == [True, True, False, False, False, False, True, True]
    assert len(method.asked) == 4


def test_warm_up_of_sstoken_is_attention_alone(tmp_path):
    rows = chats(40)
    kept = {}
    for name, gamma, warmup in (("warm", 0.5, 16), ("attention", 0.0, 0), ("both", 0.5, 0)):
        selection = OnlineSelection(
            method=METHODS["sstoken"](tokens=0.5, gamma=gamma),
            history=llama(8),
            warmup_samples=warmup,
        )
        learner = trainer(
            tmp_path, rows, selection, max_steps=6, learning_rate=0.0, gradient_accumulation_steps=1
        )
        learner.train()
        kept[name] = [
            {ids: places.tolist() for ids, places in trained_rows(window)}
            for window in learner.windows
        ]
    # 16 samples are four windows of four.
    assert kept["warm"] == kept["attention"][:4] + kept["both"][4:]
    assert kept["attention"][0] != kept["both"][0]


def test_weights_multiply_the_loss_of_their_sample(tmp_path):
    rows = chats(16)
    model = llama()
    selection = OnlineSelection(method=Weighing(), decisions=tmp_path / "decisions.jsonl")
    learner = trainer(
        tmp_path,
        rows,
        selection,
        model=model,
        learning_rate=0.0,
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    learner.train()
    for window, loss in zip(learner.windows, learner.losses, strict=True):
        assert loss == pytest.approx(weighed_loss(model, rows, window), rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    for line in lines:
        number = int(line["id"]) // 7
        gone = number % 5 == 0
        assert line["weight"] == (0.0 if gone else 3.0 if number % 2 == 0 else 1.0)
        assert line["reasons"] == {"goes" if gone else "stays": 1}
        assert line["kept_tokens"] == (0 if gone else line["tokens"])


def test_infobatch_thins_the_easy_half_until_the_end(tmp_path):
    rows = chats(48)
    selection = OnlineSelection(
        method=METHODS["infobatch"](), decisions=tmp_path / "decisions.jsonl"
    )
    learner = trainer(tmp_path, rows, selection, max_steps=8, gradient_accumulation_steps=3)
    learner.train()
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == set(range(7)), "the last eighth is not pruned"
    assert len(trained_rows(learner.windows[7])) == 12
    weights_seen = {line["weight"] for line in lines}
    assert weights_seen == {0.0, 1.0, 2.0}
    for step in range(7):
        mine = [line["weight"] for line in lines if line["step"] == step]
        assert len(trained_rows(learner.windows[step])) == sum(one > 0 for one in mine) < 12


def test_weights_and_label_smoothing_exclude_each_other(tmp_path):
    learner = trainer(
        tmp_path,
        chats(),
        OnlineSelection(method=Weighing()),
        label_smoothing_factor=0.1,
    )
    with pytest.raises(InputError, match="label smoothing"):
        learner.train()


def test_ids_come_from_tokens_where_there_is_no_column(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "id"} for row in chats(7)]
    rows.append(dict(rows[0]))  # an exact copy is another sample of the window
    seen = []
    for run in range(2):
        method = Chosen(rule=even_positions)
        options = {"gradient_accumulation_steps": 2, "max_steps": 1, "learning_rate": 0.0}
        trainer(tmp_path / str(run), rows, OnlineSelection(method=method), **options).train()
        seen.append(sorted(np.unique(method.asked[0][0]["sample"]).tolist()))
    assert seen[0] == seen[1]
    assert len(seen[0]) == 8


def test_evaluation_is_untouched(tmp_path):
    rows = chats()
    method = METHODS["random"](keep=0.25)
    learner = trainer(tmp_path, rows, OnlineSelection(method=method), max_steps=2)
    learner.eval_dataset = rows
    learner.train()
    truth = losses_of(learner.model, rows)
    found = learner.evaluate()["eval_loss"]
    by_batch = [
        np.concatenate([truth[row["id"]][trainable(row)] for row in rows[start : start + 8]]).mean()
        for start in range(0, 24, 8)
    ]
    assert found == pytest.approx(np.mean(by_batch), rel=1e-4)


def test_what_cannot_be_scored_is_refused(tmp_path):
    class Strange:
        def __call__(self, rows):
            made = {name: torch.ones((len(rows), 4), dtype=torch.long) for name in ("labels",)}
            made |= {"input_ids": made["labels"], "pixel_values": torch.zeros(len(rows), 3, 2, 2)}
            return made

    learner = trainer(tmp_path, chats(), OnlineSelection(method=Chosen()))
    learner.data_collator = Strange()
    with pytest.raises(InputError, match="pixel_values"):
        learner.train()
    with pytest.raises(InputError, match="over sentences"):
        OnlineSelection(method=METHODS["first_k"]())
    for options in (
        {"pool": "epoch"},
        {"history": "last"},
        {"ema": 1.0},
        {"warmup_samples": -1},
        {"refresh": 0},
        {"refresh": 2, "history": "ema"},
        {"full_last": 1.5},
    ):
        with pytest.raises(InputError, match=next(iter(options))):
            OnlineSelection(method=Chosen(), **options)
    model = llama()
    model.accepts_loss_kwargs = False
    with pytest.raises(ModelError, match="num_items_in_batch"):
        trainer(tmp_path, chats(), OnlineSelection(method=Chosen()), model=model)


def test_two_processes_stay_in_step_and_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        setting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.pipelines.ddp_driver", str(tmp_path)]
        processes.append(
            subprocess.Popen(
                command,
                env=environment | {name: str(value) for name, value in setting.items()},
                cwd=Path(__file__).parents[2],
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        )
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert [one["world"] for one in seen] == [2, 2]
    assert seen[0]["counts"] == seen[1]["counts"], "one divisor for all"
    assert seen[0]["weights"] == seen[1]["weights"]
    assert seen[1]["windows"] == [[[1, 2]], [[1, 2]]], "nothing stays here, and it runs along"
    assert (tmp_path / "decisions-0.jsonl").is_file() and (tmp_path / "decisions-1.jsonl").is_file()

    selection = OnlineSelection(method=Chosen(rule=lopsided))
    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "optim": "sgd"}
    options["train_sampling_strategy"] = "sequential"
    alone = trainer(tmp_path, chats(16), selection, **options)
    alone.train()
    assert alone.counts == seen[0]["counts"]
    for name, value in weights(alone.model).items():
        found = torch.tensor(seen[0]["weights"][name])
        assert torch.allclose(found, value.flatten(), atol=1e-6), name
    assert not same_weights(weights(alone.model), weights(llama()))


def test_training_again_begins_again(tmp_path):
    method = _Historic(rule=even_positions)
    selection = OnlineSelection(method=method, history="ema", ema=0.9, warmup_samples=8)
    learner = trainer(tmp_path, chats(40), selection)
    learner.train()
    assert len(method.asked) == 2
    learner.train()
    assert len(method.asked) == 4
    # Two steps after the second beginning the average is near, and the first model far.
    signals, _ = method.asked[2]
    assert np.abs(signals["loss"] - signals["history_loss"]).mean() > 0
    base = losses_of(llama(), chats(40))
    one = signals["sample"][0]
    found = signals["history_loss"][signals["sample"] == one]
    assert np.abs(found - base[one][3 : 3 + len(found)]).max() > 0.05


def test_methods_that_look_at_nothing_cost_no_pass(tmp_path):
    model = llama()
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    learner = trainer(
        tmp_path, chats(), OnlineSelection(method=METHODS["random_tokens"]()), model=model
    )
    passes.clear()
    learner.train()
    assert passes == [True] * 4


def test_rows_without_a_target_are_no_samples(tmp_path):
    rows = [row | {"labels": [IGNORE] * len(row["labels"])} for row in chats(4)]
    rows += chats(8)[4:]
    method = Chosen()
    selection = OnlineSelection(method=method, decisions=tmp_path / "decisions.jsonl")
    learner = trainer(tmp_path, rows, selection, max_steps=2, train_sampling_strategy="sequential")
    learner.train()
    assert learner.losses[0] == 0.0
    assert learner.losses[1] > 0
    assert len(method.asked) == 1, "there was nothing to ask about the first window"
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [line["tokens"] > 0 for line in lines] == [False] * 4 + [True] * 4
