"""Searches by name, as generators that ask for nothing themselves.

A prompt is a tuple of positions in the vocabulary. A search yields a round of prompts and is sent
their rewards; whoever runs it asks the black box:

    search = start("genetic", {}, vocabulary=200, length=5, prompts=1000, seed=0)
    for round in rounds(search, ask):
        ...

As a search is a function of its arguments and of the rewards alone, one that was killed is taken
up again by being sent the recorded rewards: it then proposes what it would have proposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from ...errors import InputError, RecipeError
from ...pruners.contract import check_count
from ...pruners.signals.prompt_rewards import FloatArray64
from .searches.genetic import Genetic
from .searches.greedy import Greedy
from .searches.particle_swarm import ParticleSwarm
from .searches.random_search import RandomSearch
from .searches.space import Draws, Prompt, Search, SearchMethod, Space

#: Every search by name. A new one is one file, one line here and one test.
SEARCHES: dict[str, type[SearchMethod]] = {
    "greedy": Greedy,
    "genetic": Genetic,
    "particle_swarm": ParticleSwarm,
    "random": RandomSearch,
}


def make_search(method: str, options: Mapping[str, Any] | None = None) -> SearchMethod:
    """A search's options, checked.

    Raises
    ------
    RecipeError
        The search or an option is unknown, or an option is out of range.
    """
    if method not in SEARCHES:
        raise RecipeError(f"unknown search {method!r}; known: {', '.join(SEARCHES)}.")
    kind = SEARCHES[method]
    try:
        return kind.model_validate(dict(options or {}))
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(kind.model_fields) or "none"
        raise RecipeError(
            f"search `{method}`, option `{'.'.join(map(str, first['loc']))}`: {first['msg']};"
            f" its options: {known}."
        ) from error


def start(
    method: str,
    options: Mapping[str, Any] | None = None,
    *,
    vocabulary: int,
    length: int,
    prompts: int,
    seed: int,
) -> Search:
    """A search over prompts of `length` words, that proposes at most `prompts` prompts.

    `next(search)` gives the first round. `search.send(rewards)` with one reward a prompt, in
    order, gives the next, or ends (StopIteration) where the search has nothing more to ask.
    Fewer rewards than prompts say that the budget has ended: the search ends too. No round is
    empty; one that would go beyond `prompts` is cut. Words may repeat within a prompt, so the
    length is not bound by the vocabulary. Apart from the published mode of `genetic`, no prompt
    is proposed twice; a space that is used up ends the search.

    Raises
    ------
    RecipeError
        The search or one of its options is wrong.
    InputError
        The vocabulary is empty or a count is out of range; while it runs, rewards are NaN or
        more than were asked for.
    """
    search = make_search(method, options)
    space = _space(vocabulary, length, prompts)
    return _held(search.propose(space, Draws(seed)), prompts)


def asks(
    method: str,
    options: Mapping[str, Any] | None = None,
    *,
    vocabulary: int,
    length: int,
    prompts: int,
) -> int:
    """How many prompts a search that is not cut short by a budget will ask about, exactly.

    Greedy: length * vocabulary. Genetic: population + (epochs - 1) * (mutants + crossovers).
    Particle swarm: population * (1 + epochs). Each at most `prompts`, and all but greedy (which
    asks about shorter prompts too) at most vocabulary ** length.
    """
    space = _space(vocabulary, length, prompts)
    return min(prompts, make_search(method, options).asks(space))


def known_first(
    method: str,
    options: Mapping[str, Any] | None = None,
    *,
    vocabulary: int,
    length: int,
    prompts: int,
) -> int:
    """How many of them are prompts of one word, which the influence pass has asked already.

    Greedy's first round; all of them for prompts of one word.
    """
    total = asks(method, options, vocabulary=vocabulary, length=length, prompts=prompts)
    if length == 1:
        return total
    return min(total, vocabulary) if method == "greedy" else 0


class Round(NamedTuple):
    """What was asked and answered: M rewards for the first M of the prompts."""

    number: int
    prompts: list[Prompt]
    rewards: FloatArray64


def rounds(search: Search, ask: Callable[[list[Prompt]], npt.ArrayLike]) -> Iterator[Round]:
    """Run a search: `ask(prompts)` gives their rewards (M,), fewer where the budget ends.

    Each round is yielded once it is answered, with the prompts that were.
    """
    batch = next(search, None)
    number = 0
    while batch is not None:
        answered = np.asarray(ask(batch), np.float64)
        try:
            following = search.send(answered)
        except StopIteration:
            following = None
        yield Round(number, batch[: len(answered)], answered)
        batch, number = following, number + 1


@dataclass(slots=True)
class BestSoFar:
    """The best of what was seen: the first maximum; of equals that with the lower loss.

    Attributes
    ----------
    place
        Its place among all that were seen, from 0; -1 before the first.
    reward, loss
        Of it.
    seen
        How many were.
    """

    place: int = -1
    reward: float = -math.inf
    loss: float = math.inf
    seen: int = 0

    def see(
        self, rewards: Sequence[float] | FloatArray64, losses: Sequence[float] | None = None
    ) -> FloatArray64:
        """The highest reward so far after each of M more, (M,) float64."""
        made = np.empty(len(rewards))
        for number, reward in enumerate(rewards):
            loss = 0.0 if losses is None else float(losses[number])
            if self.place < 0 or (reward, -loss) > (self.reward, -self.loss):
                self.place, self.reward, self.loss = self.seen, float(reward), loss
            self.seen += 1
            made[number] = self.reward
        return made


def _space(vocabulary: int, length: int, prompts: int) -> Space:
    if vocabulary == 0:
        raise InputError(
            "there is no word to search with. Keep more of the vocabulary (`keep`), or give a"
            " larger one."
        )
    check_count("vocabulary", vocabulary, low=1)
    check_count("length", length, low=1)
    check_count("prompts", prompts)
    return Space(vocabulary, length)


def _held(inner: Search, prompts: int) -> Search:
    """The search within its number of prompts, its rewards checked."""
    left = prompts
    batch = next(inner, None) if left else None
    while batch:
        batch = batch[:left]
        reward = _checked((yield batch), batch)
        left -= len(batch)
        if left == 0 or len(reward) < len(batch):
            return
        try:
            batch = inner.send(reward)
        except StopIteration:
            return


def _checked(rewards: Any, batch: list[Prompt]) -> FloatArray64:
    made = np.asarray(rewards, np.float64)
    if made.ndim != 1 or len(made) > len(batch):
        raise InputError(
            f"a search expects up to {len(batch)} rewards (M,) for its {len(batch)} prompts;"
            f" found shape {made.shape}."
        )
    missing = np.flatnonzero(np.isnan(made))
    if len(missing):
        raise InputError(
            f"rewards must be numbers; that of prompt {batch[int(missing[0])]} is NaN. Ask"
            " again, or repair the reward."
        )
    return made
