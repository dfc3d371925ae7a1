"""What a plan says of a step, and upper bounds on the tokens that it will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .asking import AskOptions, RemoteBox
from .task import PromptTaskOptions

if TYPE_CHECKING:
    from ...pruners.contract import IntArray
    from ...pruners.signals.black_box import BlackBox

BoolMatrix = npt.NDArray[np.bool_]

_CHEAP = 50_000  # texts that are tokenised only to bound what they cost


@dataclass(frozen=True, slots=True)
class Asks:
    """What a step will ask.

    Attributes
    ----------
    prompts
        Prompts, those of several parts counted for each.
    queries
        (prompt, row) pairs that it is charged for.
    sent
        Of these, those that really go to the black box.
    tokens, money
        That it is charged for, at most; None where no bound is cheap, or nothing is priced.
    exact, sent_exact
        Whether `prompts` and `queries`, and whether `sent`, are exact; else they are the most.
    note
        What else is known, such as a limit that does not reach.
    """

    prompts: int
    queries: int
    sent: int
    tokens: int | None = None
    money: float | None = None
    exact: bool = True
    sent_exact: bool = True
    note: str = ""


@dataclass(slots=True)
class Bound:
    """Upper bounds on tokens, from a black box that is asked nothing; None where not cheap."""

    box: BlackBox | RemoteBox | None
    task: PromptTaskOptions
    _worst: dict[tuple[str, ...], str] = field(default_factory=dict)

    @property
    def remote(self) -> bool:
        """Whether answers are asked for one by one; else a prompt is asked on all rows or none."""
        return isinstance(self.box, RemoteBox)

    def spared(self, known: BoolMatrix) -> int:
        """Pairs of the known (P, N) that need not be sent."""
        return int(known.sum() if self.remote else known.all(axis=1).sum() * known.shape[1])

    def tokens(self, prompts: Sequence[str], rows: Sequence[str]) -> IntArray | None:
        """Tokens read for each prompt over all rows, (P,) int64; None where that is not cheap."""
        if self.box is None or not self._cheap(len(prompts) * len(rows)):
            return None
        made: IntArray = self.box.input_tokens(prompts, rows).sum(axis=1)
        return made

    def longest(self, words: Sequence[str], length: int) -> str | None:
        """A prompt that costs as much as any of `length` words: the costliest word, repeated."""
        if not len(words):
            return None
        if tuple(words) not in self._worst:
            cost = self.tokens(words, ["."])
            if cost is None:
                return None
            self._worst[tuple(words)] = words[int(np.argmax(cost))]
        return " ".join([self._worst[tuple(words)]] * length)

    def _cheap(self, texts: int) -> bool:
        few = not self.task.templates()[0].has("prompt") or texts <= _CHEAP
        return self.remote or few

    def charge(self, made: Asks, read: float | None, how: AskOptions) -> Asks:
        """The plan with tokens, money, and what the limits make of it."""
        per_answer = self.box.written_tokens if isinstance(self.box, RemoteBox) else 0
        written = made.queries * per_answer
        limits = how.limits()
        tokens = None if read is None else int(read) + written
        priced = self.remote and (how.input_price is not None or how.output_price is not None)
        money = limits.price(int(read), written) if priced and read is not None else None
        notes = [made.note] if made.note else []
        exact = made.exact
        for name, limit, most in (
            ("max_tokens", limits.tokens, tokens),
            ("max_cost", limits.cost, money),
        ):
            if limit is not None and (most is None or most > limit):
                notes.append(f"`{name}` may end it earlier")
                exact = False
        if tokens is not None and limits.tokens is not None:
            tokens = min(tokens, limits.tokens)
        if money is not None and limits.cost is not None:
            money = min(money, limits.cost)
        sent_exact = made.sent_exact and exact
        return replace(
            made,
            tokens=tokens,
            money=money,
            exact=exact,
            sent_exact=sent_exact,
            note="; ".join(notes),
        )
