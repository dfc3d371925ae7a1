"""Scores of a window turned into a decision."""

from types import SimpleNamespace

import numpy as np
import pytest

from prunery.errors import InputError, ModelError
from prunery.pipelines import online_selection as online
from prunery.pipelines.online_selection import OnlineSelection
from prunery.pipelines.sft_signals import SftRows
from prunery.pruners.catalogue import METHODS

from .tiny_training import Chosen


def rows(counts, **tokens):
    total = sum(counts)
    offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    place = np.arange(total) - np.repeat(offset[:-1], counts)
    given = {
        "token_position": place + 1,
        "turn": np.zeros(total, np.int64),
        "protected": np.zeros(total, bool),
        "loss": np.linspace(1, 2, total, dtype=np.float32),
    }
    ids = np.arange(len(counts), dtype=np.int64) * 10
    return SftRows(ids, [""] * len(counts), offset, given | tokens)


def test_tokens_by_hand():
    method = Chosen(rule=lambda sample, position: (sample == 20) | (position == 1))
    found = online.decide(method, rows([2, 0, 3]), [np.arange(3)], seed=1)
    assert found.keep.tolist() == [True, False, True, True, True]
    assert found.weight.tolist() == [1.0] * 5
    assert found.reasons == [{"chosen": 1, "not_chosen": 1}, {}, {"chosen": 3}]
    assert found.plane == {}
    signals, seed = method.asked[0]
    assert signals["sample"].tolist() == [0, 0, 20, 20, 20]
    assert seed == 1


def test_samples_by_hand_in_two_pools():
    method = METHODS["random"](keep=0.5)
    held = rows([2, 1, 3, 2, 0])
    pools = [np.array([0, 2, 4]), np.array([1, 3])]
    found = online.decide(method, held, pools, seed=5)
    by_sample = [found.keep[held.owner == one] for one in range(4)]
    assert all(part.all() or not part.any() for part in by_sample)
    assert by_sample[0].all() != by_sample[2].all(), "one of two in each pool"
    assert by_sample[1].all() != by_sample[3].all()
    assert sum(found.reasons[one].get("drawn", 0) for one in range(4)) in (0, 2)
    assert all(len(found.reasons[one]) == 1 for one in range(4))
    assert found.reasons[4] == {}


def test_plane_is_the_mean_over_pools_where_it_is_defined():
    entropy = np.linspace(2, 1, 8, dtype=np.float32)
    held = rows([2, 2, 2, 2], entropy=entropy)
    method = METHODS["qtuning"](samples=0.5)
    one_pool = online.decide(method, held, [np.arange(4)], seed=0)
    assert one_pool.plane["correlation"] == pytest.approx(-1.0)
    pools = [np.array([0]), np.array([1, 2, 3])]  # no correlation of a single sample
    assert online.decide(method, held, pools, seed=0).plane["correlation"] == pytest.approx(-1.0)
    alone = online.decide(method, held, pools[:1], seed=0)
    assert "correlation" not in alone.plane
    assert online.decide(method, held, pools, seed=0, plane=False).plane == {}


def test_seed_of_a_step():
    assert online.step_seed(3, 7) == online.step_seed(3, 7)
    found = {online.step_seed(seed, step) for seed in range(20) for step in range(50)}
    assert len(found) == 1000


def test_ids():
    tokens = np.array([1, 2, 3], np.int64)
    assert online.sample_id(12, tokens) == 12
    assert online.sample_id("a", tokens) == online.sample_id("a", tokens[:1])
    assert online.sample_id(None, tokens) == online.sample_id(None, tokens.astype(np.int32))
    assert online.sample_id(None, tokens) != online.sample_id(None, tokens[:2])
    assert online.sample_id(-4, tokens) >= 0
    with pytest.raises(InputError, match="1.5"):
        online.sample_id(1.5, tokens)
    found = online.unique_ids([5, 9, 5, 5]).tolist()
    assert found[:2] == [5, 9]
    assert len(set(found)) == 4
    assert found == online.unique_ids([5, 9, 5, 5]).tolist()


def test_turns_break_at_gaps_and_at_samples():
    owner = np.array([0, 0, 0, 1, 1])
    position = np.array([2, 3, 5, 6, 7])
    assert online.turns(owner, position).tolist() == [0, 0, 1, 2, 2]
    assert online.turns(owner[:0], position[:0]).tolist() == []


def test_scores_that_are_not_finite_name_their_row():
    loss = np.array([1, 2, 3, np.inf, 5], np.float32)
    with pytest.raises(ModelError, match="step 8: `loss` of sample second is inf at token 2"):
        online.check_finite(rows([2, 3], loss=loss), ["first", "second"], 8)
    online.check_finite(rows([2, 3]), ["first", "second"], 8)


def test_when_everything_is_kept():
    plain = OnlineSelection(method=Chosen(), warmup_samples=100, full_last=0.25)
    assert plain.keeps_all(99, 0.0) and not plain.keeps_all(100, 0.0)
    assert plain.keeps_all(100, 0.75) and not plain.keeps_all(100, 0.74)
    ss = OnlineSelection(method=METHODS["sstoken"](gamma=0.5), warmup_samples=100)
    assert not ss.keeps_all(0, 0.0)
    assert ss.method_now(99).gamma == 0.0
    assert ss.method_now(100).gamma == 0.5
    assert ss.method_now(99).tokens == ss.method.tokens
    assert not OnlineSelection(method=Chosen()).keeps_all(0, 0.999)


def test_infobatch_ends_on_all_data():
    selection = OnlineSelection(method=METHODS["infobatch"]())
    assert selection.keeps_all(0, 0.875) and not selection.keeps_all(0, 0.874)


def test_columns_that_are_read():
    read = OnlineSelection(method=METHODS["sstoken"]()).column_names
    assert read(["id", "text"]) == ()
    assert read(["id", "history_loss"]) == ("history_loss",)
    given = OnlineSelection(method=METHODS["sstoken"](), history="base").column_names
    assert given(["history_loss"]) == ()
    with pytest.raises(InputError, match="`reference_loss`.*as `reference`"):
        OnlineSelection(method=METHODS["excess_loss"]()).column_names(["id"])
    near = OnlineSelection(method=METHODS["near_duplicate"]())
    assert near.column_names(["embedding"]) == ("embedding",)
    with pytest.raises(InputError, match="Add a column `embedding`"):
        near.column_names(["id"])


def test_given_columns():
    values = {"history_loss": [[1.0, 2.0], [], [3.0]], "quality": [5, 6, 7]}
    tokens, samples = online.given_columns(values, np.array([2, 0, 1]), ["a", "b", "c"])
    assert tokens["history_loss"].tolist() == [1.0, 2.0, 3.0]
    assert samples["quality"].tolist() == [5.0, 6.0, 7.0]
    with pytest.raises(InputError, match="sample c holds 1 values; 2"):
        online.given_columns(values, np.array([2, 0, 2]), ["a", "b", "c"])


def test_records():
    held = rows([2, 0, 3])
    decision = SimpleNamespace(
        keep=np.array([True, False, False, False, False]),
        weight=np.array([2.0, 1.0, 1.0, 1.0, 1.0], np.float32),
        reasons=[{"x": 2}, {}, {"y": 3}],
    )
    assert online.records(4, ["a", "b", "c"], held, decision) == [
        {"step": 4, "id": "a", "tokens": 2, "kept_tokens": 1, "weight": 2.0, "reasons": {"x": 2}},
        {"step": 4, "id": "b", "tokens": 0, "kept_tokens": 0, "weight": 0.0, "reasons": {}},
        {"step": 4, "id": "c", "tokens": 3, "kept_tokens": 0, "weight": 0.0, "reasons": {"y": 3}},
    ]
