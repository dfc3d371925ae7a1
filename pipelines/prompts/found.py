"""What a search in a notebook found, and whether it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...pruners import rules
from ...pruners.contract import IntArray
from .asking import Limits
from .contest import contest
from .searching import Asked, Searched
from .stages import Stage, check_disjoint, made_by, shots_of
from .verdict import FOUND, Judge

if TYPE_CHECKING:
    from .space import PromptSpace

Rows = tuple[Sequence[str], Sequence[int] | IntArray]


@dataclass(frozen=True, eq=False, repr=False)
class FoundPrompt:
    """What a search found.

    Attributes
    ----------
    space
        Where it was found.
    searched
        Every prompt that was asked about, in order, and why the search ended.
    history
        That of the space, and the search.
    """

    space: PromptSpace
    searched: Searched
    history: tuple[Stage, ...]

    @property
    def best(self) -> Asked:
        """The prompt with the highest reward, as it was asked."""
        if not self.searched.asked:
            raise InputError("the search asked about no prompt. Raise `prompts`.")
        return self.searched.asked[self.searched.best]

    @property
    def prompt(self) -> str:
        """The best prompt."""
        return self.best.prompt

    @property
    def rewards(self) -> npt.NDArray[np.float64]:
        """Of each prompt asked, (M,) float64."""
        return np.array([one.reward for one in self.searched.asked], np.float64)

    @property
    def queries(self) -> int:
        """(prompt, row) pairs asked in all stages."""
        return sum(stage.queries for stage in self.history)

    @property
    def tokens(self) -> int:
        """Tokens read and written in all stages."""
        return sum(stage.tokens for stage in self.history)

    def __repr__(self) -> str:
        if not self.searched.asked:
            return "FoundPrompt(nothing asked)"
        return (
            f"FoundPrompt({self.prompt!r}, reward {self.best.reward:.4f},"
            f" {len(self.searched.asked):,} prompts, stopped: {self.searched.stop})"
        )

    def finalists(self, count: int) -> list[str]:
        """The `count` prompts with the highest reward, ties to the one asked first."""
        order = rules.best_first(self.rewards.astype(np.float32), np.arange(len(self.rewards)))
        prompts = [self.prompt, *(self.searched.asked[place].prompt for place in order)]
        return list(dict.fromkeys(prompts))[:count]

    def verdict(
        self,
        validation: Rows,
        test: Rows | None = None,
        *,
        manual: str = "",
        control: FoundPrompt | str | None = None,
        judge: Judge = "log_likelihood",
        finalists: int = 1,
        seed: int = 0,
        budget: Limits | None = None,
    ) -> PromptVerdict:
        """Whether the prompt is taken: it must beat the empty and the manual one by over 1 s.e.

        Parameters
        ----------
        validation, test
            (texts, codes) that no search has seen; the first decide, the second report.
        manual
            A prompt written by hand; "" for none.
        control
            Another search's find, which is compared and never taken.
        judge, finalists
            As options of `test_prompts`.

        Raises
        ------
        InputError
            There are no validation rows, or a text stands in two parts.
        BudgetError
            The budget does not reach.
        """
        parts = {"validation": shots_of(*validation, "validation")}
        if test is not None:
            parts["test"] = shots_of(*test, "test")
        check_disjoint({"rows": self.space.rows, **{k: v.texts for k, v in parts.items()}})
        texts = [text for part in parts.values() for text in part.texts]
        asker = self.space.asker(budget, texts)
        rows = contest(
            asker,
            parts,
            finalists=self.finalists(finalists),
            manual=manual.strip(),
            control=control.prompt if isinstance(control, FoundPrompt) else control,
            judge=judge,
            seed=seed,
        )
        parameters = {"manual": manual, "judge": judge, "finalists": finalists, "seed": seed}
        stage = made_by(self.history, "verdict", parameters, len(self.space.words), asker)
        chosen = next(row for row in rows if row["chosen"])
        return PromptVerdict(
            chosen["prompt"], chosen["contender"], chosen["reason"], rows, (*self.history, stage)
        )


@dataclass(frozen=True, eq=False)
class PromptVerdict:
    """Which prompt is taken, and why.

    Attributes
    ----------
    prompt
        To use; "" is the empty prompt.
    chosen
        found, empty or manual.
    reason
        In words.
    rows
        A dictionary for each contender and part, with the columns of `tables.VERDICT`.
    history
        All stages.
    """

    prompt: str
    chosen: str
    reason: str
    rows: list[dict[str, Any]]
    history: tuple[Stage, ...]

    @property
    def taken(self) -> bool:
        """Whether that is the found prompt."""
        return self.chosen == FOUND

    def accuracy(self, contender: str, part: Literal["validation", "test"] = "test") -> float:
        """Share of right rows of a contender on a part."""
        for row in self.rows:
            if (row["contender"], row["part"]) == (contender, part):
                return float(row["accuracy"])
        raise InputError(f"nothing is known of {contender!r} on the {part} rows.")

    @property
    def queries(self) -> int:
        """(prompt, row) pairs asked in all stages."""
        return sum(stage.queries for stage in self.history)

    @property
    def tokens(self) -> int:
        """Tokens read and written in all stages."""
        return sum(stage.tokens for stage in self.history)
