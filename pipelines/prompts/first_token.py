"""The first token of a reply: its log probabilities, and which class each candidate begins.

Two shapes are read, whichever protocol was asked: that of classic completions (`top_logprobs`
is a list of token -> log probability) and that of chats (`content` is a list of tokens, each
with its `top_logprobs`), which llama.cpp gives for both.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import RecipeError
from ...pruners.contract import FloatArray
from ..openai_calls import TryAgainError

# What tokenizers write for the space before a word.
_MARKERS = (b" ", "▁".encode(), "Ġ".encode())
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)|<0x([0-9a-fA-F]{2})>")
#: Servers write this (or the lowest float) for "no probability at all".
_NEVER = -9999.0
#: Rounding that a log probability may exceed 0 by.
_SLACK = 1e-3
# Returned probabilities are rounded to float32, so what they leave is not known below this.
_LEAST_LEFT = 2.0**-24


@dataclass(frozen=True, slots=True)
class TokenReply:
    """What a reply says about its first token.

    Attributes
    ----------
    candidates
        (bytes of the token, log probability in nats), None where the server gave no log
        probabilities; empty where it wrote nothing, or part of a letter.
    partial
        Whether the token was part of a letter, for which llama.cpp tells no candidates.
    prompt_tokens, completion_tokens
        As the server counts them, None where it does not.
    requests
        Tries that it took.
    """

    candidates: list[tuple[bytes, float]] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    requests: int = 1
    partial: bool = False


def parse_reply(body: bytes, requests: int) -> TokenReply:
    """Read a completion or chat completion.

    Raises `TryAgainError` for what is neither, or holds a log probability above 0 or no number.
    """
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        logprobs = choice.get("logprobs")
        text = choice.get("text") or (choice.get("message") or {}).get("content")
        usage = reply.get("usage") or {}
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
        candidates = None if logprobs is None else _candidates(logprobs)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        said = body[:200].decode("utf-8", "replace")
        raise TryAgainError(f"not a completion ({error!r}): {said}", broken=True) from error
    known = [count if type(count) is int and count >= 0 else None for count in counts]
    partial = candidates is None and isinstance(text, str) and set(text) == {"\ufffd"}
    return TokenReply([] if partial else candidates, known[0], known[1], requests, partial)


def _candidates(logprobs: dict[str, Any]) -> list[tuple[bytes, float]] | None:
    """Candidates of the first token, without those of no probability; None where there is none."""
    if (content := logprobs.get("content")) is not None:
        found = list(_of_chat(content[0])) if content else []
    elif (top := logprobs.get("top_logprobs")) is not None or logprobs.get("token_logprobs"):
        found = list(_of_completion(top, logprobs))
    else:
        return None
    return [(token, value) for token, value in found if value > _NEVER]


def _of_chat(first: dict[str, Any]) -> Iterator[tuple[bytes, float]]:
    top = first.get("top_logprobs") or []
    for entry in top if first["token"] in [entry["token"] for entry in top] else [*top, first]:
        yield _token_bytes(entry["token"], entry.get("bytes")), _logprob(entry["logprob"])


def _of_completion(
    top: list[dict[str, float] | None] | None, logprobs: dict[str, Any]
) -> Iterator[tuple[bytes, float]]:
    listed = (top[0] or {}) if top else {}
    for token, value in listed.items():
        yield _token_bytes(token, None), _logprob(value)
    chosen, values = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if chosen and values and chosen[0] not in listed and values[0] is not None:
        yield _token_bytes(chosen[0], None), _logprob(values[0])


def _logprob(value: object) -> float:
    if type(value) not in (int, float) or not value <= _SLACK:  # type: ignore[operator]
        raise ValueError(f"expected a log probability, found {value!r}")
    return min(float(value), 0.0)  # type: ignore[arg-type]


def _token_bytes(token: str, given: Sequence[int] | None) -> bytes:
    if given:
        return bytes(given)
    if found := _BYTES.fullmatch(token):
        return bytes.fromhex((found[1] or found[2]).replace("\\x", ""))
    return token.encode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class Scored:
    """Classes' log probabilities from one reply.

    Attributes
    ----------
    logprobs
        (C,) float32 in nats, normalised over the classes.
    bounded
        Classes that no candidate begins, and that got their bound; 0 where blind.
    blind
        Whether no candidate begins any class; all are equal then.
    unresolved
        The likeliest candidate that begins several classes, where it is likelier than any that
        begins one alone; else empty.
    """

    logprobs: FloatArray
    bounded: int
    blind: bool
    unresolved: bytes


class LabelWords:
    """Words of the C classes, told apart by the first token that a model would write.

    A candidate begins a class where, without the space before it, it is a non-empty prefix of
    the class's word. Upper and lower case are the same where that keeps the words apart.

    Raises
    ------
    RecipeError
        There are fewer than two words, or one is a prefix of another.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if len(words) < 2:
            raise RecipeError(f"expected words for at least 2 classes, found {list(words)}.")
        self._words = [word.casefold().encode("utf-8", "surrogatepass") for word in words]
        self._folds = _clash(self._words) is None
        if not self._folds:
            self._words = [word.encode("utf-8", "surrogatepass") for word in words]
        if (clash := _clash(self._words)) is not None:
            short, long = (words[place] for place in clash)
            raise RecipeError(
                f"{long!r} begins with {short!r}, so the first token of a reply cannot tell these"
                " classes apart. Give words that begin differently in `verbalisers`."
            )

    def begun_by(self, token: bytes) -> list[int]:
        """Classes whose word the token begins, in order."""
        bare = token
        while (marker := next((m for m in _MARKERS if bare.startswith(m)), None)) is not None:
            bare = bare[len(marker) :]
        if self._folds:
            with contextlib.suppress(UnicodeDecodeError):  # part of a letter has no case
                bare = bare.decode().casefold().encode()
        return [place for place, word in enumerate(self._words) if bare and word.startswith(bare)]

    def score(self, candidates: Sequence[tuple[bytes, float]]) -> Scored:
        """Log probabilities of the classes.

        A class takes the probability of all candidates that begin it; one that begins several is
        shared equally, as the reply says no more. A class that none begins takes the most that
        it can have: the lowest log probability returned, or what all returned leave over.
        """
        masses = np.full(len(self._words), -np.inf)
        alone, several = -math.inf, (-math.inf, b"")
        for token, value in candidates:
            begun = self.begun_by(token)
            if not begun:
                continue
            masses[begun] = np.logaddexp(masses[begun], value - math.log(len(begun)))
            if len(begun) > 1:
                several = max(several, (value, token))
            else:
                alone = max(alone, value)
        bounded = np.isneginf(masses)
        if bounded.all():
            equal = np.full(len(masses), -math.log(len(masses)), np.float32)
            return Scored(equal, 0, True, b"")
        left = 1.0 - math.fsum(math.exp(value) for _, value in candidates)
        lowest = min(value for _, value in candidates)
        masses[bounded] = min(lowest, math.log(max(left, _LEAST_LEFT)))
        return Scored(
            (masses - np.logaddexp.reduce(masses)).astype(np.float32),
            int(bounded.sum()),
            False,
            several[1] if several[0] > alone else b"",
        )


def _clash(words: Sequence[bytes]) -> tuple[int, int] | None:
    """Places of a word and of another that begins with it."""
    for place, word in enumerate(words):
        for other, longer in enumerate(words):
            if place != other and longer.startswith(word):
                return place, other
    return None
