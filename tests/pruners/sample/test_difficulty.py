"""Scores of difficulty: each by hand, their direction, and what all their methods share."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from prunery.errors import InputError
from prunery.pruners.catalogue import METHODS
from prunery.pruners.contract import SIGNALS, Signals
from prunery.pruners.sample.difficulty import (
    DIFFICULTY,
    difficulty_needs,
    difficulty_of,
    forgotten,
    hardest,
    keep_by_order,
    keep_uncut_first,
)

every_difficulty = pytest.mark.parametrize("name", DIFFICULTY)


def rows(**columns):
    size = len(next(iter(columns.values())))
    return Signals({"id": np.arange(size), **columns})


# Two runs of two epochs: means over all four.
@pytest.mark.parametrize(
    ("name", "signal", "values", "expected"),
    [
        ("el2n", "el2n", [[0.2, 0.4, 0.6, 0.8], [1.0, 1.0, 0.0, 0.0]], [0.5, 0.5]),
        ("grand", "gradient_norm", [[1, 2, 3, 6], [0, 0, 0, 2]], [3.0, 0.5]),
        ("aum", "margin", [[4, 0, -2, 0], [-9, 1, 1, 1]], [-0.5, 1.5]),
        ("loss", "loss_trajectory", [[1, 0, 0, 0], [2, 2, 2, 4]], [0.25, 2.5]),
        # A run never right counts as its 2 epochs; one that was right and then wrong as 1.
        ("forgetting", "correct", [[True, False, False, False], [False, True] * 2], [1.5, 0.0]),
        # Deviations 0.1 and 0.3 of two runs.
        ("dyn_unc", "true_probability", [[0.2, 0.4, 0.1, 0.7], [0.5] * 4], [0.2, 0.0]),
        ("variability", "true_probability", [[0.2, 0.4, 0.1, 0.7], [0.5] * 4], [0.2, 0.0]),
    ],
)
def test_golden(name, signal, values, expected):
    assert difficulty_needs(name) == {"id", signal}
    score = difficulty_of(name, rows(**{signal: values}), runs=2)
    assert score.dtype == np.float32
    np.testing.assert_allclose(score, expected, atol=1e-7)


def test_memorisation_is_as_given_whatever_the_runs():
    given = [0.25, -0.5, 1.0]
    assert difficulty_of("memorisation", rows(memorisation=given), runs=5).tolist() == given


def test_variability_is_over_the_run_and_dyn_unc_over_windows():
    line = np.linspace(0.0, 1.0, 40, dtype=np.float32)[None]
    whole = difficulty_of("variability", rows(true_probability=line))
    windowed = difficulty_of("dyn_unc", rows(true_probability=line))
    np.testing.assert_allclose(whole, line.std(), rtol=1e-6)
    np.testing.assert_allclose(windowed, line[0, :10].std(), rtol=1e-5)


def test_never_learned_ranks_hardest():
    correct = np.array(
        [
            [1, 0, 1, 0, 1, 0],  # forgotten 3 times
            [0, 0, 0, 0, 0, 0],  # never learned: 0 transitions
            [0, 0, 0, 0, 0, 1],  # learned last
            [1, 1, 1, 1, 1, 0],  # forgotten at the very end
        ],
        bool,
    )
    assert forgotten(correct[:, None, :])[:, 0].tolist() == [3.0, 6.0, 0.0, 1.0]
    # Never right in either of two runs beats any other row, forgotten as often as can be.
    always_lost = np.tile([1, 0], 6)
    half_lost = np.concatenate([np.zeros(6), np.tile([1, 0], 3)])
    two_runs = np.array([np.zeros(12), always_lost, half_lost], bool)
    score = difficulty_of("forgetting", rows(correct=two_runs), runs=2)
    assert score.tolist() == [6.0, 3.0, 4.5]


def test_unknown_name():
    for call in (difficulty_needs, lambda name: difficulty_of(name, rows(el2n=[[0.1]]))):
        with pytest.raises(InputError, match="el2n, grand, forgetting.*found 'entropy'"):
            call("entropy")


@every_difficulty
def test_missing_and_misshapen_signals(name):
    with pytest.raises(InputError, match=f"`{DIFFICULTY[name][0]}` is needed and missing"):
        difficulty_of(name, Signals({"id": [0, 1]}))
    with pytest.raises(InputError, match="`runs` must be at least 1"):
        difficulty_of(name, rows(**{DIFFICULTY[name][0]: _zeros(name, 4)}), runs=0)
    if name != "memorisation":
        with pytest.raises(InputError, match=f"`{DIFFICULTY[name][0]}`.*3 runs; found 4"):
            difficulty_of(name, rows(**{DIFFICULTY[name][0]: _zeros(name, 4)}), runs=3)


def _zeros(name, width):
    spec = SIGNALS[DIFFICULTY[name][0]]
    return np.zeros((2, width) if spec.shape == "N,d" else 2, spec.dtype)


def training(flipped, *, epochs=30, classes=4, seed=0):
    """Logits (N, epochs, classes) of a made run: rows grow towards their true class, at a pace of
    their own; flipped ones are won over to their label late, some of them never."""
    rng = np.random.default_rng(seed)
    n = len(flipped)
    truth = rng.integers(0, classes, n)
    label = np.where(flipped, (truth + rng.integers(1, classes, n)) % classes, truth)
    time = np.arange(epochs)
    learned = 6 / (1 + np.exp(-(time - rng.uniform(1, 8, (n, 1))) / 2))
    memorised = 9 / (1 + np.exp(-(time - rng.uniform(20, 60, (n, 1))) / 2))
    logits = rng.normal(0, 0.7, (n, epochs, classes))
    every = np.arange(n)
    logits[every, :, truth] += learned
    logits[every[flipped], :, label[flipped]] += memorised[flipped]
    return logits, label


def signals_of(logits, label):
    n, _, classes = logits.shape
    every = np.arange(n)
    one_hot = np.eye(classes)[label][:, None, :]
    p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    others = np.where(one_hot == 1, -np.inf, logits).max(axis=2)
    error = np.linalg.norm(p - one_hot, axis=2)
    return rows(
        true_probability=p[every, :, label],
        margin=logits[every, :, label] - others,
        correct=logits[every, :, label] > others,
        el2n=error,
        gradient_norm=error * np.sqrt(2.0),
        loss_trajectory=-np.log(p[every, :, label]),
    )


@pytest.mark.parametrize(
    ("name", "least"),
    [("el2n", 0.97), ("grand", 0.97), ("aum", 0.97), ("loss", 0.97), ("forgetting", 0.8)],
)
def test_flipped_labels_rank_hardest(name, least):
    flipped = np.arange(400) % 10 == 3
    score = difficulty_of(name, signals_of(*training(flipped)))
    assert roc_auc_score(flipped, score) > least


def test_zero_transitions_taken_for_easy_would_hide_flipped_labels():
    """What makes the rule about rows never learned worth a test of its own."""
    flipped = np.arange(400) % 10 == 3
    correct = signals_of(*training(flipped, epochs=14))["correct"]
    transitions = (correct[:, :-1] & ~correct[:, 1:]).sum(axis=1)
    assert roc_auc_score(flipped, transitions) < 0.6
    assert roc_auc_score(flipped, forgotten(correct[:, None, :])[:, 0]) > 0.9


@pytest.mark.parametrize("name", ["el2n", "grand", "forgetting", "aum", "memorisation"])
def test_order_turns_the_ranking_round(name):
    signal = DIFFICULTY[name][0]
    spec = SIGNALS[signal]
    values = np.random.default_rng(3).uniform(-1, 1, (30, 6)).astype(np.float32)
    if spec.dtype == "bool":
        values = values > 0
    elif spec.low == 0:
        values = np.abs(values)
    signals = rows(**{signal: values if spec.shape == "N,d" else values[:, 0]})
    difficulty = difficulty_of(name, signals)
    hard = METHODS[name](keep=0.2, order="hard")(signals, seed=0)
    easy = METHODS[name](keep=0.2, order="easy")(signals, seed=0)
    assert hard.score.tolist() == difficulty.tolist()
    assert easy.score.tolist() == (-difficulty).tolist()
    assert difficulty[hard.keep].min() >= difficulty[~hard.keep].max()
    assert difficulty[easy.keep].max() <= difficulty[~easy.keep].min()
    assert set(np.array(hard.reason_names())[hard.keep]) == {"hard"}
    assert set(np.array(easy.reason_names())[easy.keep]) == {"easy"}
    default = "easy" if name == "aum" else "hard"
    assert METHODS[name]().order == default
    with pytest.raises(InputError, match="`order` must be one of hard, easy; found 'high'"):
        METHODS[name](order="high")


def test_keep_by_order_of_equal_rows():
    signals = Signals({"id": [9, 3, 5], "difficulty": [1.0, 1.0, 1.0]})
    for order in ("hard", "easy"):
        selection = keep_by_order(signals, signals["difficulty"], 0.6, order)
        assert selection.keep.tolist() == [False, True, True]


def test_hardest():
    ids = np.array([4, 3, 2, 1, 0])
    difficulty = np.array([0.5, 0.9, -1.0, 0.9, 0.9], np.float32)
    assert hardest(difficulty, ids, 0.39).tolist() == [False, True, False, False, False]
    assert hardest(difficulty, ids, 0.4).tolist() == [False, True, False, True, False]
    assert not hardest(difficulty, ids, 0.0).any()
    assert hardest(difficulty, ids, 1.0).all()
    assert len(hardest(difficulty[:0], ids[:0], 0.5)) == 0


def test_cut_rows_come_back_last_and_easiest_first():
    signals = Signals({"id": [0, 1, 2, 3, 4], "difficulty": [9.0, 0.1, 7.0, 0.2, 8.0]})
    cut = np.array([True, False, True, False, True])
    place = np.array([0, 1, 0, 0, 0])
    selection = keep_uncut_first(signals, place, cut, 0.6)
    assert selection.score.tolist() == [-4.0, -1.0, -2.0, 0.0, -3.0]
    assert selection.keep.tolist() == [False, True, True, True, False]
    assert selection.reason_names() == [
        *("cut_as_hardest", "in_share", "refilled", "in_share", "cut_as_hardest")
    ]
    assert selection.threshold.tolist() == [-2.0] * 5
    fewer = keep_uncut_first(signals, place, cut, 0.2)
    assert fewer.reason_names()[1] == "beyond_share"
