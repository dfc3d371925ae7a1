"""Run a search against a black box: ask, reward, keep the best, stop at the budget.

A search is a function of its seed and of the answers, and every answer is in the log before it is
used: so a search that was killed proposes the same prompts again, finds what it had asked in the
log, and goes on with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import BudgetError
from ...pruners.contract import FloatArray, IntArray
from ...pruners.signals.prompt_rewards import accuracy, rewards
from .asking import Asker
from .search import BestSoFar, rounds, start
from .searches.space import Prompt

#: Why a search ended: the limit that was reached, `prompts`, or that it had no more to ask.
FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt that was asked about; `queries` and `tokens` are running totals."""

    round: int
    words: Prompt
    prompt: str
    reward: float
    accuracy: float
    best: float
    queries: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Searched:
    """All prompts that a search asked about, in order, and why it ended.

    `best` is the place of the best: the highest reward, of equals the lower loss, then the first.
    """

    asked: list[Asked]
    stop: str
    best: int


def text_of(words: Sequence[str], prompt: Prompt) -> str:
    """The prompt as text: its words, one space between them."""
    return " ".join(words[place] for place in prompt)


def run_search(
    asker: Asker,
    labels: IntArray,
    words: Sequence[str],
    *,
    method: str,
    length: int,
    prompts: int,
    reward: str = "log_likelihood",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda asked: None,
) -> Searched:
    """Search for the prompt of V words with the highest reward on the asker's N rows.

    Parameters
    ----------
    labels
        (N,) codes.
    length
        Words of a prompt.
    prompts
        How many are asked about, at most.
    reward
        Of `prompt_rewards.rewards`; `kl` also asks about the empty prompt.
    progress
        Is told how many prompts were asked so far, after each round.

    Raises
    ------
    BudgetError
        The budget does not reach for one prompt.
    InputError, RecipeError
        There is no word, or the search or an option is unknown.
    """
    search = start(
        method, options, vocabulary=len(words), length=length, prompts=prompts, seed=seed
    )
    n, classes = len(labels), asker.box.classes
    empty = asker.must_ask([""])[0][0] if reward == "kl" else np.zeros((n, classes), np.float32)
    runner = _Runner(asker, labels, words, empty, reward)
    best, asked = BestSoFar(), []
    for number, some, scores in rounds(search, runner.ask):
        highest = best.see(scores, runner.losses)
        for place, prompt in enumerate(some):
            queries, tokens = runner.totals[place]
            asked.append(
                Asked(
                    number,
                    prompt,
                    text_of(words, prompt),
                    float(scores[place]),
                    float(runner.right[place]),
                    float(highest[place]),
                    queries,
                    tokens,
                )
            )
        progress(len(asked))
    if not asked and runner.stop:
        raise BudgetError(
            f"the budget ({runner.stop}) does not reach for one prompt on {n} rows. Raise it, or"
            " see `prunery plan`."
        )
    stop = runner.stop or ("prompts" if len(asked) >= prompts else FINISHED)
    return Searched(asked, stop, best.place)


class _Runner:
    """Asks about one round at a time and keeps what `run_search` writes down of it."""

    def __init__(
        self,
        asker: Asker,
        labels: IntArray,
        words: Sequence[str],
        empty: FloatArray,
        reward: str,
    ) -> None:
        self._asker, self._labels, self._words = asker, labels, words
        self._empty, self._reward = empty, reward
        self.stop: str | None = None
        self.right: FloatArray = np.zeros(0, np.float32)
        self.losses: list[float] = []
        self.totals: list[tuple[int, int]] = []

    def ask(self, prompts: list[Prompt]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Rewards of the first prompts that the budget reaches for."""
        texts = [text_of(self._words, prompt) for prompt in prompts]
        spent = self._asker.spent
        queries, tokens = spent.queries, spent.tokens
        answers, read = self._asker.ask(texts)
        if len(answers) < len(prompts):
            self.stop = self._asker.exhausted(texts[len(answers)])
        if not len(answers):
            self.right, self.losses, self.totals = np.zeros(0, np.float32), [], []
            return np.zeros(0)
        made = rewards(answers, self._labels, self._empty)
        self.right = accuracy(answers, self._labels).astype(np.float32)
        self.losses = (-made["log_likelihood"]).tolist()
        each = queries + len(self._labels) * np.arange(1, len(answers) + 1)
        self.totals = list(zip(each.tolist(), (tokens + np.cumsum(read)).tolist(), strict=True))
        return made[self._reward]
