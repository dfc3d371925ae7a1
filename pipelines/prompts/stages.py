"""What the stages of `PromptSpace` share: a note of what was done, and checks of what is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...pruners.contract import IntArray
from .asking import Asker
from .draw import text_key
from .influence import Measured
from .tables import REWARDS
from .words import Shots


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the way: its parameters, the words it left, and what it asked.

    `digest` is of the parameters, of what the stage was given, and of the stage before it. The
    black box is in no digest.
    """

    name: str
    parameters: Mapping[str, Any]
    words: int
    queries: int = 0
    tokens: int = 0
    digest: str = ""


def made_by(
    history: tuple[Stage, ...],
    name: str,
    parameters: Mapping[str, Any],
    words: int,
    asker: Asker | None = None,
    given: Mapping[str, Any] | None = None,
) -> Stage:
    """The stage that comes after a history; `given` are the arrays that only it has seen."""
    seed = history[-1].digest if history else ""
    told = json.dumps([seed, name, dict(parameters), _plain(given)], sort_keys=True, default=str)
    digest = hashlib.sha256(told.encode()).hexdigest()[:32]
    spent = (asker.spent.queries, asker.spent.tokens) if asker else (0, 0)
    return Stage(name, dict(parameters), words, *spent, digest)


def _plain(given: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in (given or {}).items()}


def frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, which from here on cannot be written to."""
    array.setflags(write=False)
    return array


def shot_of(labels: IntArray) -> IntArray:
    """Place of each row within its class, (N,)."""
    made = np.zeros(len(labels), np.int64)
    for code in np.unique(labels):
        at = np.flatnonzero(labels == code)
        made[at] = np.arange(len(at))
    return made


def shots_of(texts: Sequence[str], labels: Sequence[int] | IntArray, name: str) -> Shots:
    """Texts and their codes as rows in the order given.

    Raises
    ------
    InputError
        There are none, a text is empty, or labels are no codes; `name` says of what.
    """
    codes = np.asarray(labels)
    if not len(texts) or codes.shape != (len(texts),):
        raise InputError(
            f"`{name}`: expected at least one text and a code for each; found {len(texts)} texts"
            f" and labels {codes.shape}."
        )
    if codes.dtype.kind not in "iu" or codes.min() < 0:
        raise InputError(
            f"`{name}`: labels are codes from 0, whole numbers; found {codes.dtype}"
            f" {codes[:3].tolist()}."
        )
    empty = next((place for place, text in enumerate(texts) if not str(text).strip()), None)
    if empty is not None:
        raise InputError(f"`{name}`: row {empty} has no text. Leave it out.")
    made = codes.astype(np.int64)
    return Shots(list(texts), made, shot_of(made), np.arange(len(made)))


def check_words(words: Sequence[str]) -> None:
    """Refuse candidate words that are none, empty, or stand twice."""
    if not words:
        raise InputError("expected candidate words, found none. Give `words`.")
    seen: set[str] = set()
    for place, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise InputError(f"word {place} is {word!r}; expected a word or phrase. Leave it out.")
        if word in seen:
            raise InputError(f"word {place}, {word!r}, stands twice. Leave one out.")
        seen.add(word)


def check_disjoint(parts: Mapping[str, Sequence[str]]) -> None:
    """Refuse a text that stands in two parts, however it is spaced or cased."""
    where: dict[str, str] = {}
    for name, texts in parts.items():
        for text in texts:
            before = where.setdefault(text_key(text), name)
            if before != name:
                raise InputError(
                    f"{text[:80]!r} stands in `{before}` and in `{name}`, so the verdict would"
                    " not be about unseen rows. Leave it out of one."
                )


def check_reward(reward: str) -> None:
    """Refuse a reward that is unknown."""
    if reward not in REWARDS:
        raise InputError(f"unknown reward {reward!r}; known: {', '.join(REWARDS)}.")


def of_some(measured: Measured, at: IntArray) -> Measured:
    """What was measured of the words at some places, in that order."""
    return replace(
        measured,
        influence={name: values[at] for name, values in measured.influence.items()},
        accuracy=measured.accuracy[at],
        rows_seen=measured.rows_seen[at],
        finalist=measured.finalist[at],
        tokens=measured.tokens[at],
        logprobs=[measured.logprobs[place] for place in at],
    )
