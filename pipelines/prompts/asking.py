"""Asking a black box within a hard budget, and never twice for what is known.

A query is one prompt on one row. The budget is charged for every query asked, whether the answer
came from the model or from the log of answers: so a search that was killed and starts again is
charged, and stops, exactly as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from pydantic import Field, model_validator

from ...errors import BudgetError, ModelError
from ...pruners.contract import FloatArray, IntArray
from ...pruners.signals.black_box import BlackBox
from ..engine import StepOptions

#: (prompt, row) -> log probabilities (C,), tokens read, tokens written.
Answer = tuple[FloatArray, int, int]


class AskOptions(StepOptions):
    """How a step asks its black box, and what it may spend. What is asked is in the task.

    Attributes
    ----------
    max_queries
        (prompt, row) pairs that the step may ask, at most.
    max_tokens
        Tokens that it may have read (and, from an endpoint, written), at most.
    max_cost
        Money that it may spend, in the currency of the prices; needs both prices.
    input_price, output_price
        Of an endpoint, for a million tokens.
    remember
        Keep every answer in the log of answers, so that nothing is asked twice.
    batch_tokens
        Tokens of a batch of a model on this machine.
    device
        Of a model on this machine; None is the GPU where there is one.
    concurrency, timeout_seconds, retries, api_key_env
        Of an endpoint; see `openai_client.Endpoint`.
    """

    max_queries: int | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, ge=0)
    max_cost: float | None = Field(default=None, ge=0)
    input_price: float | None = Field(default=None, ge=0)
    output_price: float | None = Field(default=None, ge=0)
    remember: bool = True
    batch_tokens: int = Field(default=16_384, ge=1)
    device: str | None = None
    concurrency: int = Field(default=8, ge=1, le=1024)
    timeout_seconds: float = Field(default=60.0, gt=0)
    retries: int = Field(default=5, ge=0)
    api_key_env: str = "OPENAI_API_KEY"

    @model_validator(mode="after")
    def _priced(self) -> AskOptions:
        if self.max_cost is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("`max_cost` needs `input_price` and `output_price`: give both")
        return self

    def identity(self) -> dict[str, object]:
        """What enters the key: a budget never changes what a finished table holds."""
        limits = {"max_queries", "max_tokens", "max_cost"}
        return self.model_dump(exclude=set(HOW_ALONE) | limits)

    def limits(self) -> Limits:
        """The budget."""
        return Limits(
            self.max_queries, self.max_tokens, self.max_cost, self.input_price, self.output_price
        )


# Options that change what it costs or how fast it goes, never an answer.
HOW_ALONE = frozenset(AskOptions.model_fields) - {"max_queries", "max_tokens", "max_cost"}


@dataclass(frozen=True, slots=True)
class Limits:
    """A budget: queries, tokens, money; None is no limit. Prices are for a million tokens."""

    queries: int | None = None
    tokens: int | None = None
    cost: float | None = None
    input_price: float | None = None
    output_price: float | None = None

    @property
    def bound_by_size(self) -> bool:
        """Whether tokens or money are limited, and not queries alone."""
        return self.tokens is not None or self.cost is not None

    def price(self, read: int, written: int) -> float:
        """What so many tokens cost; 0 where prices are not given."""
        return (read * (self.input_price or 0.0) + written * (self.output_price or 0.0)) / 1e6


@dataclass(slots=True)
class Spent:
    """What was charged so far, and how much of it was really sent to the model."""

    queries: int = 0
    read: int = 0
    written: int = 0
    sent: int = 0

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.read + self.written


class AnswerLog(Protocol):
    """Where answers are kept for good; see `answer_log.SqliteLog`."""

    def find(self, prompts: Sequence[str], rows: Sequence[str]) -> list[list[Answer | None]]:
        """What is known of each (prompt, row)."""
        ...

    def keep(self, pairs: Sequence[tuple[str, str]], answers: Sequence[Answer]) -> None:
        """Write answers down durably before anyone uses them."""
        ...


@runtime_checkable
class RemoteBox(Protocol):
    """A black box that is paid for by the answer: told one by one, as they come."""

    classes: int
    written_tokens: int  # that one answer may write, at most

    def input_tokens(self, prompts: Sequence[str], rows: Sequence[str]) -> IntArray:
        """An upper bound on the tokens of each (prompt, row), (P, N)."""
        ...

    def answer_all(
        self, pairs: Sequence[tuple[str, str]], done: Callable[[int, Answer], None]
    ) -> None:
        """Ask all pairs; `done(place, answer)` is called for each as it arrives."""
        ...


@dataclass
class Asker:
    """One step's way to its black box: rows fixed, prompts asked, budget held, answers logged.

    Attributes
    ----------
    rows
        The N texts that every prompt is asked on.
    batch
        Queries that are sent together, at most; a batch holds whole prompts.
    """

    box: BlackBox | RemoteBox
    rows: Sequence[str]
    limits: Limits = field(default_factory=Limits)
    log: AnswerLog | None = None
    batch: int = 1024
    spent: Spent = field(default_factory=Spent)
    # Pairs answered in this run. An answer that only an earlier run asked for is weighed by its
    # bound, as it was then: else a run that goes on could afford more than one that was not killed.
    _asked: set[tuple[str, str]] = field(default_factory=set, init=False, repr=False)

    def ask(
        self, prompts: Sequence[str], rows: IntArray | None = None
    ) -> tuple[FloatArray, IntArray]:
        """Log probabilities (M, N, C) float32 and tokens (M,) of the first M <= P prompts.

        M < P where the budget does not reach for more: then `exhausted` says which part of it.
        `rows` are places among the rows, all by default. Nothing is sent that could overrun a
        limit.
        """
        texts = self.rows if rows is None else [self.rows[int(place)] for place in rows]
        made = [np.zeros((0, len(texts), self.box.classes), np.float32)]
        tokens = [np.zeros(0, np.int64)]
        step = max(1, self.batch // max(1, len(texts)))
        at = 0
        while at < len(prompts):
            some = list(prompts[at : at + step])
            known = self._known(some, texts)
            fit = self._fitting(some, texts, known)
            if not fit:
                break
            answers, read = self._answers(some[:fit], texts, known[:fit])
            made.append(answers)
            tokens.append(read)
            at += fit  # where some did not fit: what these really cost may leave room for more
        return np.concatenate(made), np.concatenate(tokens)

    def exhausted(self, prompt: str, rows: IntArray | None = None) -> str | None:
        """Which limit forbids asking about one more prompt: queries, tokens, cost; None if none."""
        texts = self.rows if rows is None else [self.rows[int(place)] for place in rows]
        return self._stopper([prompt], texts, self._known([prompt], texts), 1)

    def must_ask(
        self, prompts: Sequence[str], rows: IntArray | None = None
    ) -> tuple[FloatArray, IntArray]:
        """As `ask`, for a step that is worth nothing without all of the answers.

        Raises
        ------
        BudgetError
            The budget does not reach; the answers so far are kept.
        """
        made, tokens = self.ask(prompts, rows)
        if len(made) < len(prompts):
            what = self.exhausted(prompts[len(made)], rows)
            limit = {"queries": "max_queries", "tokens": "max_tokens", "cost": "max_cost"}[
                str(what)
            ]
            raise BudgetError(
                f"`{limit}` is reached after {self.spent.queries} queries and"
                f" {self.spent.tokens} tokens, with {len(prompts) - len(made)} prompts left to"
                " ask. Every answer so far is kept: raise it and run again to go on from here, or"
                " see `prunery plan` for what the whole step asks."
            )
        return made, tokens

    # -- budget --------------------------------------------------------------------------------

    def _known(self, prompts: list[str], texts: Sequence[str]) -> list[list[Answer | None]]:
        if self.log is None:
            return [[None] * len(texts) for _ in prompts]
        return self.log.find(prompts, texts)

    def _fitting(
        self, prompts: list[str], texts: Sequence[str], known: list[list[Answer | None]]
    ) -> int:
        """How many of the prompts, from the first, fit into what is left."""
        if self._stopper(prompts, texts, known, len(prompts)) is None:
            return len(prompts)
        low, high = 0, len(prompts) - 1
        while low < high:  # what is charged grows with every prompt
            middle = (low + high + 1) // 2
            if self._stopper(prompts, texts, known, middle) is None:
                low = middle
            else:
                high = middle - 1
        return low

    def _stopper(
        self,
        prompts: list[str],
        texts: Sequence[str],
        known: list[list[Answer | None]],
        count: int,
    ) -> str | None:
        limits, spent = self.limits, self.spent
        queries = spent.queries + count * len(texts)
        if limits.queries is not None and queries > limits.queries:
            return "queries"
        if not limits.bound_by_size:
            return None
        bound = self.box.input_tokens(prompts[:count], texts)
        more = self.box.written_tokens if isinstance(self.box, RemoteBox) else 0
        read, written = spent.read, spent.written
        for prompt, line, bounds in zip(prompts, known, bound, strict=False):
            for text, answer, most in zip(texts, line, bounds, strict=True):
                if answer is not None and (prompt, text) in self._asked:
                    read, written = read + answer[1], written + answer[2]
                else:
                    read, written = read + int(most), written + more
        if limits.tokens is not None and read + written > limits.tokens:
            return "tokens"
        if limits.cost is not None and limits.price(read, written) > limits.cost:
            return "cost"
        return None

    # -- answers -------------------------------------------------------------------------------

    def _answers(
        self, prompts: list[str], texts: Sequence[str], known: list[list[Answer | None]]
    ) -> tuple[FloatArray, IntArray]:
        if self.log is None and not isinstance(self.box, RemoteBox):
            return self._straight(prompts, texts)
        missing = [
            (p, n) for p, line in enumerate(known) for n, found in enumerate(line) if found is None
        ]
        if missing and isinstance(self.box, RemoteBox):
            self._ask_remote(prompts, texts, known, missing)
        elif missing:
            self._ask_here(prompts, texts, known)
        self.spent.sent += len(missing)
        made = np.empty((len(prompts), len(texts), self.box.classes), np.float32)
        tokens = np.zeros(len(prompts), np.int64)
        for p, line in enumerate(known):
            for n, answer in enumerate(line):
                assert answer is not None  # every place was filled above
                made[p, n] = answer[0]
                tokens[p] += answer[1] + answer[2]
                self.spent.read += answer[1]
                self.spent.written += answer[2]
        self.spent.queries += made.shape[0] * made.shape[1]
        if isinstance(self.box, RemoteBox) and self.limits.bound_by_size:
            self._asked.update((prompt, text) for prompt in prompts for text in texts)
        _check_finite(made, prompts, texts)
        return made, tokens

    def _straight(self, prompts: list[str], texts: Sequence[str]) -> tuple[FloatArray, IntArray]:
        """Ask a model on this machine without a log."""
        assert not isinstance(self.box, RemoteBox)
        made = self.box.label_logprobs(prompts, texts)
        tokens = self.box.input_tokens(prompts, texts).sum(axis=1)
        self.spent.sent += made.shape[0] * made.shape[1]
        self.spent.queries += made.shape[0] * made.shape[1]
        self.spent.read += int(tokens.sum())
        _check_finite(made, prompts, texts)
        return made, tokens

    def _ask_here(
        self, prompts: list[str], texts: Sequence[str], known: list[list[Answer | None]]
    ) -> None:
        """Ask about the prompts with a gap, on all rows, so that batches are whole."""
        assert not isinstance(self.box, RemoteBox)
        open_ = [p for p, line in enumerate(known) if None in line]
        wanted = [prompts[p] for p in open_]
        found = self.box.label_logprobs(wanted, texts)
        read = self.box.input_tokens(wanted, texts)
        for place, p in enumerate(open_):
            known[p] = [(found[place, n], int(read[place, n]), 0) for n in range(len(texts))]
        if self.log is not None:
            pairs = [(prompt, text) for prompt in wanted for text in texts]
            answers = [answer for p in open_ for answer in known[p] if answer is not None]
            self.log.keep(pairs, answers)

    def _ask_remote(
        self,
        prompts: list[str],
        texts: Sequence[str],
        known: list[list[Answer | None]],
        missing: list[tuple[int, int]],
    ) -> None:
        assert isinstance(self.box, RemoteBox)
        places: dict[tuple[str, str], list[tuple[int, int]]] = {}  # equal pairs are asked once
        for p, n in missing:
            places.setdefault((prompts[p], texts[n]), []).append((p, n))
        pairs = list(places)

        def done(place: int, answer: Answer) -> None:
            if self.log is not None:
                self.log.keep([pairs[place]], [answer])
            for p, n in places[pairs[place]]:
                known[p][n] = answer

        self.box.answer_all(pairs, done)


def _check_finite(made: FloatArray, prompts: list[str], texts: Sequence[str]) -> None:
    if not np.isfinite(made).all():
        p, n = np.argwhere(~np.isfinite(made).all(axis=2))[0]
        raise ModelError(
            f"the black box gave a log probability that is not finite for prompt {prompts[p]!r}"
            f" on row {texts[n][:80]!r}. Use float32, or another model."
        )
