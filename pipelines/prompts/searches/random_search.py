"""Random search: what every other search must beat at the same number of prompts."""

from __future__ import annotations

from pydantic import Field

from .space import Draws, Search, SearchMethod, Space, Unseen


class RandomSearch(SearchMethod):
    """Distinct prompts of the full length, each as likely as any other.

    With one seed its first prompts are also the first population of `genetic` and of
    `particle_swarm`.

    Attributes
    ----------
    batch
        Prompts of a round.
    """

    batch: int = Field(default=128, ge=1)

    def asks(self, space: Space) -> int:
        """All of them: only the budget or the end of the space stops it."""
        return space.size

    def propose(self, space: Space, draws: Draws) -> Search:
        """Rounds of `batch` prompts."""
        unseen = Unseen(space, draws)
        while batch := unseen.fill(self.batch, lambda _: draws.prompt(space)):
            yield batch
