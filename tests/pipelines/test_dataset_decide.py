"""One method over training rows: at its own budget, at others, inside classes, under limits."""

import numpy as np
import pytest
from pydantic import ValidationError

from prunery.errors import RecipeError
from prunery.pipelines.dataset_decide import (
    DecideOptions,
    Decider,
    decision_rows,
    empty_classes,
)
from prunery.pipelines.dataset_signals import Rows
from prunery.pipelines.decisions import BEFORE
from prunery.pruners.contract import Signals

LABEL = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2, 2])
HARD = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], np.float32)


def decider(candidates=None, **options):
    """Ten rows of three classes, the hardest first; el2n over one epoch."""
    rows = Rows(np.arange(10) + 100, LABEL, np.full(10, -1), LABEL % 2, ["a", "b", "c"])
    at = np.arange(10) if candidates is None else np.array(candidates)
    signals = Signals({"id": rows.ids[at], "el2n": HARD[at, None] / 9, "label": LABEL[at]})
    made = DecideOptions.model_validate({"method": "el2n", "keep": 0.5, **options})
    return Decider(made, rows, at, signals, 1)


def kept(selection):
    return np.flatnonzero(selection.keep).tolist()


def test_the_hardest_half_empties_classes_that_are_named():
    selection = decider().select(seed=0)
    assert kept(selection) == [0, 1, 2, 3, 4]
    assert empty_classes(decider().rows, selection) == ["b", "c"]


def test_a_floor_keeps_every_class_and_a_stratum_its_share():
    floored = decider(floor=0.5).select(seed=0)
    assert kept(floored) == [0, 1, 2, 6, 8]
    assert empty_classes(decider().rows, floored) == []
    assert kept(decider(by="class").select(seed=0)) == [0, 1, 2, 6, 8]
    # The groups hold rows 0 to 5, 8, 9 and rows 6, 7.
    assert kept(decider(by="group").select(seed=0)) == [0, 1, 2, 3, 6]
    assert kept(decider(floor=1.0, balance="group").select(seed=0)) == [0, 1, 2, 3, 6]


def test_another_share_replaces_the_methods_own():
    assert kept(decider().select(seed=0, keep=0.2)) == [0, 1]
    assert kept(decider(order="easy").select(seed=0, keep=0.2)) == [8, 9]


def test_random_rows_stand_under_the_same_limits():
    plain = decider(floor=1.0, cap=1.0).random(seed=0, keep=0.5)
    assert np.bincount(LABEL[plain.keep], minlength=3).tolist() == [3, 1, 1]
    draws = {tuple(kept(decider().random(seed=seed, keep=0.5))) for seed in range(6)}
    assert len(draws) > 1


def test_only_candidates_are_decided_and_the_others_say_so():
    selection = decider(candidates=[1, 3, 6, 8]).select(seed=0)
    assert kept(selection) == [1, 3]
    names = selection.reason_names()
    assert [names[i] for i in (0, 2, 4, 5, 7, 9)] == [BEFORE] * 6
    assert BEFORE not in (names[6], names[8])
    assert selection.weight.tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 0, 0]
    table = decision_rows(decider().rows, selection)
    assert table.column("id").to_pylist() == list(range(100, 110))
    assert table.column("threshold").to_pylist()[0] is None


def test_a_threshold_has_no_curve_and_no_floor():
    options = {"method": "near_duplicate", "distance": 0.1}
    with pytest.raises(ValidationError, match="budget is a share of the rows"):
        DecideOptions.model_validate({**options, "floor": 0.5})
    made = DecideOptions.model_validate(options)
    rows = decider().rows
    ones = np.tile(np.array([[1.0, 0.0]], np.float32), (10, 1))
    room = Decider(made, rows, np.arange(10), Signals({"id": rows.ids, "embedding": ones}), 1)
    assert kept(room.select(seed=0)) == [0]
    with pytest.raises(RecipeError, match="budget is a share"):
        room.select(seed=0, keep=0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"difficulty": "hard"}, "unknown difficulty `hard`; known: el2n"),
        ({"floor": 2.0}, "`floor` must lie in"),
        ({"cap": 0.5}, "`cap` must be"),
        ({"method": "provence"}, "unknown method `provence`"),
        ({"keep": 1.5}, "`keep` must lie in"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        DecideOptions.model_validate({"method": "el2n", **options})
