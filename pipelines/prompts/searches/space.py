"""The space of prompts, draws from a counter, and never the same prompt twice."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

from ....pruners import rules
from ....pruners.signals.prompt_rewards import FloatArray64
from ...engine import StepOptions

#: Positions in the vocabulary, 1 to `length` of them. Words may repeat.
Prompt = tuple[int, ...]
#: Yields a round of prompts, is sent their rewards (M,): see `pipelines.prompts.search`.
Search = Generator[list[Prompt], FloatArray64, None]

#: Draws of one proposal before the next unseen prompt is taken in its place.
TRIES = 64
_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Space:
    """Prompts of exactly `length` of `vocabulary` words: vocabulary ** length of them."""

    vocabulary: int
    length: int

    @property
    def size(self) -> int:
        """How many prompts there are."""
        return int(self.vocabulary**self.length)

    def prompt(self, number: int) -> Prompt:
        """Prompt `number` of 0 to size - 1: its digits to the base of the vocabulary."""
        words = []
        for _ in range(self.length):
            number, word = divmod(number, self.vocabulary)
            words.append(word)
        return tuple(reversed(words))


class Draws:
    """Uniform draws from (seed, counter) alone: one stream, in the order of the calls."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._block: list[float] = []
        self._drawn = 0

    def one(self) -> float:
        """A number in (0, 1)."""
        place = self._drawn % _BLOCK
        if place == 0:
            counter = np.arange(self._drawn, self._drawn + _BLOCK, dtype=np.int64)
            self._block = rules.uniform(self._seed, counter).tolist()
        self._drawn += 1
        return self._block[place]

    def below(self, high: int) -> int:
        """A whole number in [0, high), for any size of `high`."""
        # In whole numbers: a space of prompts can be larger than any float.
        return min(int(self.one() * (1 << 53)), (1 << 53) - 1) * high >> 53

    def prompt(self, space: Space) -> Prompt:
        """A prompt of the space, each as likely as any other."""
        return tuple(self.below(space.vocabulary) for _ in range(space.length))

    def another(self, word: int, space: Space) -> int:
        """A word other than this one; the same where there is no other."""
        if space.vocabulary == 1:
            return word
        other = self.below(space.vocabulary - 1)
        return other + (other >= word)

    def perturb(self, prompt: Prompt, space: Space) -> Prompt:
        """The prompt with another word in one place."""
        place = self.below(len(prompt))
        return (*prompt[:place], self.another(prompt[place], space), *prompt[place + 1 :])


class Unseen:
    """Makes proposals new: redrawn while already asked, then any prompt that was not.

    With `repeats`, as published, a proposal stands as it was drawn.
    """

    def __init__(self, space: Space, draws: Draws, *, repeats: bool = False) -> None:
        self._space, self._repeats = space, repeats
        self._seen: set[Prompt] = set()
        # i -> step * i + first modulo the size runs through the space once, in a seeded order.
        self._step = 1 + draws.below(space.size)
        while math.gcd(self._step, space.size) > 1:
            self._step += 1
        self._number = draws.below(space.size)

    def take(self, make: Callable[[int], Prompt]) -> Prompt | None:
        """`make(0)`, or the first unseen one of `make(1)`, ...; None when all were asked."""
        if self._repeats:
            return make(0)
        if len(self._seen) == self._space.size:
            return None
        for attempt in range(TRIES):
            made = make(attempt)
            if made not in self._seen:
                break
        else:
            made = self._next()
        self._seen.add(made)
        return made

    def fill(self, count: int, make: Callable[[int], Prompt]) -> list[Prompt]:
        """`count` proposals; fewer when the space is used up."""
        taken = (self.take(make) for _ in range(count))
        return [prompt for prompt in taken if prompt is not None]

    def _next(self) -> Prompt:
        while (made := self._space.prompt(self._number)) in self._seen:
            self._number = (self._number + self._step) % self._space.size
        return made


class SearchMethod(StepOptions):
    """A search: its options, how many prompts it asks about, and the search itself."""

    @abstractmethod
    def asks(self, space: Space) -> int:
        """How many prompts it asks about where no budget ends it: exact, in closed form."""

    @abstractmethod
    def propose(self, space: Space, draws: Draws) -> Search:
        """The search. It is sent a reward for every prompt that it yielded."""
