"""What each word is worth as a prompt: its influence, measured on the training rows.

ClaPS (Zhou et al. 2023, arXiv:2310.12774): the reward of the template with the word alone as the
prompt, minus that with the empty prompt. All rewards are computed from the same answers, so
another one costs no query. With successive halving most words are asked on few rows and only the
best go on; those that reach the end have been asked on all rows, each row once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...pruners.contract import BoolArray, FloatArray, IntArray
from ...pruners.signals.prompt_rewards import accuracy, influence
from .asking import Asker
from .halving import advance, rows_of, schedule

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measured:
    """Influences of V words; the empty prompt's are 0 by definition.

    Attributes
    ----------
    influence
        Reward name to (V,) float64, higher = kept; over the rows that the word was asked on, with
        the empty prompt's reward on the same rows taken off.
    accuracy
        (V,) float64, share of right rows minus that of the empty prompt.
    rows_seen
        (V,) int64; the first so many training rows.
    finalist
        (V,) bool: asked on all rows.
    tokens
        (V,) int64 that the model read for the word.
    logprobs
        For each word (rows_seen, C) float32.
    empty
        (N, C) float32, and its tokens.
    """

    influence: dict[str, Float64Array]
    accuracy: Float64Array
    rows_seen: IntArray
    finalist: BoolArray
    tokens: IntArray
    logprobs: list[FloatArray]
    empty: FloatArray
    empty_tokens: int


def measure_influence(
    asker: Asker,
    labels: IntArray,
    shot: IntArray,
    words: Sequence[str],
    ids: IntArray,
    *,
    start_shots: int | None = None,
    least: int = 1,
    by: str = "log_likelihood",
) -> Measured:
    """Ask about the empty prompt on all rows, and about each word alone.

    Parameters
    ----------
    asker
        With the N training rows, in an order in which `shot` never falls.
    labels, shot
        (N,) int64: class, and place of the row among the shots of its class.
    words, ids
        V words and their row ids, which settle ties.
    start_shots
        Rows of each class that halving starts with; None asks every word on every row.
    least
        Words that halving leaves at the end, at least.
    by
        The reward that halving ranks by.

    Raises
    ------
    BudgetError
        The budget does not reach; answers so far are in the log.
    InputError
        There is no word, or the rows are not in the order of their shots.
    """
    if not len(words):
        raise InputError("expected words to measure, found none. Loosen the vocabulary's filter.")
    if (np.diff(shot) < 0).any():
        raise InputError("training rows must stand in the order of their shots; sort them first.")
    v, n = len(words), len(labels)
    empty, empty_tokens = asker.must_ask([""])
    answers = np.full((v, n, asker.box.classes), np.nan, np.float32)
    tokens = np.zeros(v, np.int64)
    seen = np.zeros(v, np.int64)
    most = int(shot.max()) + 1
    alive = np.arange(v)
    asked = 0
    for rung in schedule(v, most, start_shots or most, least=least):
        if len(alive) > rung.candidates:
            known = answers[alive, :asked], labels[:asked], empty[0, :asked]
            score = influence(*known)[by]
            alive = alive[advance(score, ids[alive], rung.candidates)]
        reach = len(rows_of(shot, rung.shots))
        rows = np.arange(asked, reach)
        found, read = asker.must_ask([words[int(place)] for place in alive], rows)
        answers[alive, asked:reach] = found
        tokens[alive] += read
        seen[alive] = asked = reach
    return _measured(answers, empty[0], labels, seen, tokens, int(empty_tokens[0]))


def _measured(
    answers: FloatArray,
    empty: FloatArray,
    labels: IntArray,
    seen: IntArray,
    tokens: IntArray,
    empty_tokens: int,
) -> Measured:
    v, n = answers.shape[:2]
    made: dict[str, Float64Array] = {}
    right = np.zeros(v)
    for reach in np.unique(seen):
        at = np.flatnonzero(seen == reach)
        part, base, gold = answers[at, :reach], empty[:reach], labels[:reach]
        for name, value in influence(part, gold, base).items():
            made.setdefault(name, np.zeros(v))[at] = value
        right[at] = accuracy(part, gold) - accuracy(base[None], gold)[0]
    logprobs = [answers[place, : seen[place]] for place in range(v)]
    return Measured(made, right, seen, np.asarray(seen == n), tokens, logprobs, empty, empty_tokens)
