"""Signals are refused by name, selections are aligned, and the catalogue is consistent."""

import dataclasses
from typing import get_args

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pruners.catalogue import METHODS
from prunery.pruners.contract import SIGNALS, Scope, Selection, Signals, Unit, empty_selection


def test_id_is_needed():
    with pytest.raises(InputError, match="`id`"):
        Signals({"passage": [1]})


def test_repeated_id_names_both_rows():
    with pytest.raises(InputError, match="rows 1 and 3 both have id 7"):
        Signals({"id": [1, 7, 2, 7]})


def test_misaligned_signal_is_named():
    with pytest.raises(InputError, match="`keep_probability` has 2 entries; 3"):
        Signals({"id": [1, 2, 3], "keep_probability": [0.1, 0.2]})


def test_wrong_dtype_is_named():
    with pytest.raises(InputError, match="`keep_probability` must be float32"):
        Signals({"id": [1], "keep_probability": ["high"]})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.5])
def test_values_out_of_range_name_the_row(value):
    signals = Signals({"id": [1, 2], "keep_probability": [0.5, value]})
    with pytest.raises(InputError, match="`keep_probability`.*row 1"):
        signals.require({"keep_probability"})


def test_take_gathers_ragged_signals():
    signals = Signals(
        {
            "id": [10, 11, 12],
            "term_offset": [0, 2, 2, 5],
            "term": [1, 2, 3, 4, 5],
            "term_weight": [0.1, 0.2, 0.3, 0.4, 0.5],
        }
    )
    taken = signals.take([2, 0])
    assert taken["id"].tolist() == [12, 10]
    assert taken["term_offset"].tolist() == [0, 3, 5]
    assert taken["term"].tolist() == [3, 4, 5, 1, 2]
    assert taken["term_weight"].tolist() == pytest.approx([0.3, 0.4, 0.5, 0.1, 0.2])


def test_ragged_borders_must_rise():
    with pytest.raises(InputError, match="never decrease"):
        Signals({"id": [1, 2], "term_offset": [0, 3, 2], "term": [1, 2]})


def test_selection_refuses_misaligned_fields():
    with pytest.raises(InputError, match="`score`"):
        Selection(np.zeros(2, bool), np.zeros(3, np.float32), np.zeros(2, np.uint8), ("a",))


def test_selection_counts_reasons_of_dropped_rows_only():
    selection = Selection(
        np.array([True, False, False]),
        np.zeros(3, np.float32),
        np.array([0, 1, 1], np.uint8),
        ("kept", "low"),
    )
    assert selection.dropped() == {"low": 2}
    assert selection.kept == 1
    assert empty_selection(("kept",)).dropped() == {}


@pytest.mark.parametrize("name", METHODS)
def test_method_declares_itself(name):
    method = METHODS[name]
    assert method.unit in get_args(Unit)
    assert method.scope in get_args(Scope)
    assert method.group in (method.needs if method.scope == "group" else {None, *method.needs})
    assert "id" in method.needs
    assert (method.needs | method.optional) <= set(SIGNALS)
    assert method.budget.field in {field.name for field in dataclasses.fields(method)}
    assert method.__dataclass_params__.frozen
    assert method.__doc__ and "score" in method.__doc__
    with pytest.raises(TypeError):
        method(0.5)  # options are keyword-only


def test_a_number_that_is_not_finite_is_found_beyond_the_first_block(monkeypatch):
    monkeypatch.setattr("prunery.pruners.contract._CHECKED_AT_ONCE", 6)
    vectors = np.eye(3, dtype=np.float32)[np.arange(7) % 3]
    signals = {"id": np.arange(7), "embedding": vectors, "loss": np.ones(7, np.float32)}
    Signals(signals).require({"embedding", "loss"})
    for row in range(7):
        bad = vectors.copy()
        bad[row, 1] = np.inf
        with pytest.raises(InputError, match=f"`embedding` must be finite; row {row} holds inf"):
            Signals({**signals, "embedding": bad}).require({"embedding"})
