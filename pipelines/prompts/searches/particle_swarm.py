"""Particle swarm over prompts: each turns, word by word, to its own best and to the best of all."""

from __future__ import annotations

import math

from pydantic import Field

from .space import Draws, Prompt, Search, SearchMethod, Space, Unseen

_PULL = 3.0  # of a best word that differs; of one that is there already, its negative


class ParticleSwarm(SearchMethod):
    """Particles that turn to their own best prompt and to the best of all (ClaPS, A.1).

    The discrete form of Zang et al. 2020 (arXiv:1910.12196). A particle has a velocity a word,
    v <- w v + (1 - w) (pull of its own best + pull of the best of all), a pull being 3 where
    the words differ and -3 where they agree. With probability C1 it turns to its own best, then
    with C2 to the best of all: each word becomes that one's with probability sigmoid(v). The
    inertia w and C1 fall, C2 rises, linearly over the epochs. Then, with probability
    `mutation`, one word becomes another.

    Departures from the published code: a mutated particle is asked once, after its mutation
    (there also before, an answer that is not used); bests are copies (there a mutation can
    overwrite a particle's best in place); a particle never goes where one has been: it turns
    again, and then changes one word. Of equal rewards the first stays best.

    Attributes
    ----------
    population
        Particles.
    epochs
        Rounds after the first.
    first_inertia, last_inertia
        w, from and towards.
    first_own, last_own
        C1, from and towards.
    first_all, last_all
        C2, from and towards.
    velocity
        The first velocity of a particle is uniform in (-velocity, velocity).
    mutation
        Probability that a particle changes one word.
    """

    population: int = Field(default=128, ge=1)
    epochs: int = Field(default=30, ge=0)
    first_inertia: float = Field(default=0.8, ge=0, le=1)
    last_inertia: float = Field(default=0.2, ge=0, le=1)
    first_own: float = Field(default=0.8, ge=0, le=1)
    last_own: float = Field(default=0.2, ge=0, le=1)
    first_all: float = Field(default=0.2, ge=0, le=1)
    last_all: float = Field(default=0.8, ge=0, le=1)
    velocity: float = Field(default=3.0, ge=0)
    mutation: float = Field(default=0.1, ge=0, le=1)

    def asks(self, space: Space) -> int:
        """population * (1 + epochs), or the whole space."""
        return min(space.size, self.population * (1 + self.epochs))

    def propose(self, space: Space, draws: Draws) -> Search:
        """The first places, then one round an epoch."""
        unseen = Unseen(space, draws)
        places = unseen.fill(self.population, lambda _: draws.prompt(space))
        reward = (yield places).tolist()
        speed = [[(2 * draws.one() - 1) * self.velocity] * space.length for _ in places]
        own = list(zip(reward, places, strict=True))
        best = max(own, key=lambda member: member[0])  # the first of equals
        for epoch in range(self.epochs):
            moved = self._moved(places, speed, own, best, epoch / self.epochs, draws, space, unseen)
            if not moved:
                return
            places[: len(moved)] = moved  # fewer only where the space is used up
            reward = (yield moved).tolist()
            for particle, member in enumerate(zip(reward, moved, strict=True)):
                if member[0] > own[particle][0]:
                    own[particle] = member
                if member[0] > best[0]:
                    best = member

    def _moved(
        self,
        places: list[Prompt],
        speed: list[list[float]],
        own: list[tuple[float, Prompt]],
        best: tuple[float, Prompt],
        done: float,
        draws: Draws,
        space: Space,
        unseen: Unseen,
    ) -> list[Prompt]:
        """Where the particles go; velocities are changed in place."""
        inertia = _between(self.first_inertia, self.last_inertia, done)
        to_own = _between(self.first_own, self.last_own, done)
        to_all = _between(self.first_all, self.last_all, done)
        moved: list[Prompt] = []
        for place, velocity, (_, mine) in zip(places, speed, own, strict=True):
            for word, here in enumerate(place):
                pull = _pull(here, mine[word]) + _pull(here, best[1][word])
                velocity[word] = inertia * velocity[word] + (1 - inertia) * pull
            turning = [1 / (1 + math.exp(-v)) for v in velocity]

            def move(
                attempt: int,
                place: Prompt = place,
                mine: Prompt = mine,
                turning: list[float] = turning,
            ) -> Prompt:
                if draws.one() < to_own:
                    place = _turn(place, mine, turning, draws)
                if draws.one() < to_all:
                    place = _turn(place, best[1], turning, draws)
                if attempt or draws.one() < self.mutation:
                    place = draws.perturb(place, space)
                return place

            new = unseen.take(move)
            if new is None:
                break
            moved.append(new)
        return moved


def _between(first: float, last: float, done: float) -> float:
    return first + (last - first) * done


def _pull(word: int, other: int) -> float:
    return -_PULL if word == other else _PULL


def _turn(place: Prompt, to: Prompt, turning: list[float], draws: Draws) -> Prompt:
    return tuple(
        b if draws.one() < chance else a for a, b, chance in zip(place, to, turning, strict=True)
    )
