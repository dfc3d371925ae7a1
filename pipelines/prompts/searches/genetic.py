"""Genetic search: the best tenth lives on, mutants and crossovers of it are tried."""

from __future__ import annotations

from pydantic import Field

from ....pruners import rules
from .space import TRIES, Draws, Prompt, Search, SearchMethod, Space, Unseen


class Genetic(SearchMethod):
    """A population, of which the best live on beside their mutants and crossovers (ClaPS, A.1).

    Departures from the published code: a crossover takes each word from either parent (there a
    whole parent is returned); reward and prompt stay together (there the best is read from a
    list that was reordered); survivors are not asked again; no prompt is asked twice: a proposal
    that was is redrawn, with another word in one place if need be; every word may mutate (there
    the first one of a T5 prompt never does). Among equals the one asked first lives on.

    Attributes
    ----------
    population
        Random prompts to begin with.
    mutants, crossovers
        Children of an epoch.
    elite
        Share of parents and children that lives on; at least one.
    mutation
        Probability of each word of a mutant to be another one.
    epochs
        Rounds, the first population included.
    published
        As published: whole-parent crossovers, repeats, survivors asked again every epoch.
    """

    population: int = Field(default=128, ge=1)
    mutants: int = Field(default=64, ge=0)
    crossovers: int = Field(default=64, ge=0)
    elite: float = Field(default=0.1, gt=0, le=1)
    mutation: float = Field(default=0.1, gt=0, le=1)
    epochs: int = Field(default=30, ge=1)
    published: bool = False

    def asks(self, space: Space) -> int:
        """population + (epochs - 1) * children, or the whole space; as published, survivors too."""
        children = self.mutants + self.crossovers
        if not self.published:
            return min(space.size, self.population + (self.epochs - 1) * children)
        total = pool = self.population
        for _ in range(self.epochs - 1):
            pool = self._survivors(pool) + children
            total += pool
        return total

    def propose(self, space: Space, draws: Draws) -> Search:
        """One round an epoch."""
        unseen = Unseen(space, draws, repeats=self.published)
        pool: list[tuple[float, Prompt]] = []
        batch = unseen.fill(self.population, lambda _: draws.prompt(space))
        for epoch in range(self.epochs):
            if not batch:
                return
            reward = yield batch
            pool += zip(reward.tolist(), batch, strict=True)
            pool.sort(key=lambda member: -member[0])  # stable: the one asked first stays first
            del pool[self._survivors(len(pool)) :]
            if epoch + 1 < self.epochs:
                batch = self._children([prompt for _, prompt in pool], space, draws, unseen)
            if self.published:
                batch = [*(prompt for _, prompt in pool), *batch]
                pool = []

    def _survivors(self, pool: int) -> int:
        return max(1, rules.floor_of(pool, self.elite))

    def _children(
        self, parents: list[Prompt], space: Space, draws: Draws, unseen: Unseen
    ) -> list[Prompt]:
        def mutant(_: int) -> Prompt:
            parent = parents[draws.below(len(parents))]
            return tuple(
                draws.another(word, space) if draws.one() < self.mutation else word
                for word in parent
            )

        def crossover(attempt: int) -> Prompt:
            one, other = (parents[draws.below(len(parents))] for _ in range(2))
            if self.published:
                return one if draws.one() < 0.5 else other
            child = tuple(a if draws.one() < 0.5 else b for a, b in zip(one, other, strict=True))
            # Parents alike have no new child between them: then beside them.
            return draws.perturb(child, space) if attempt >= TRIES // 2 else child

        return [*unseen.fill(self.mutants, mutant), *unseen.fill(self.crossovers, crossover)]
