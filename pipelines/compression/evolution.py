"""Evolution of a budget: units move between like parts of different layers, the total stays.

The search of Týr-the-Pruner (arXiv:2503.09657): children swap a few levels, a short look at many
children picks those worth a longer one, and rounds halve the step. It knows nothing of models:
what a genome is worth is asked from a function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...errors import BudgetError, InputError
from ...storage.shard import disk_errors

Genome = tuple[int, ...]
# Genomes and the number of a stage to what each of them is worth there; lower is better.
Fitness = Callable[[Sequence[Genome], int], list[float]]
_TRIES = 16


@dataclass(frozen=True, slots=True)
class Space:
    """The genomes that may be tried: units kept by each of P parts.

    Attributes
    ----------
    low, total, step, stride
        Of each part: least and most units, what they are a multiple of (or everything), and the
        units that one level of the first round is.
    kind
        Parts of the same kind, whose units cost the same, trade units.
    """

    low: tuple[int, ...]
    total: tuple[int, ...]
    step: tuple[int, ...]
    stride: tuple[int, ...]
    kind: tuple[str, ...]

    def strides(self, number: int) -> tuple[int, ...]:
        """Units of one level in round `number` from 0: halved each time, at least one step."""
        return tuple(
            max(1, (stride // step) >> number) * step
            for stride, step in zip(self.stride, self.step, strict=True)
        )

    def allows(self, part: int, units: int) -> bool:
        """Whether a part may keep so many."""
        whole = units % self.step[part] == 0 or units == self.total[part]
        return self.low[part] <= units <= self.total[part] and whole

    def pools(self) -> list[list[int]]:
        """The parts of each kind that has at least two."""
        kinds: dict[str, list[int]] = {}
        for part, kind in enumerate(self.kind):
            kinds.setdefault(kind, []).append(part)
        return [parts for parts in kinds.values() if len(parts) > 1]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long the search goes on, and how closely it looks.

    Attributes
    ----------
    rounds, generations, offspring, swaps
        Rounds with steps halved, generations in each, children a generation, and the most swaps
        that a child is from its parent.
    survivors
        How many live on after each stage; those of the last are the next parents.
    evaluations
        Genomes that may be asked about at the most, over all stages; None: what the numbers
        above come to.
    """

    rounds: int = 4
    generations: int = 50
    offspring: int = 128
    swaps: int = 4
    survivors: tuple[int, ...] = (16, 4, 2)
    evaluations: int | None = None

    def __post_init__(self) -> None:
        least = min(self.rounds, self.generations, self.offspring, self.swaps, *self.survivors)
        if least < 1 or not self.survivors:
            raise InputError(
                "a search needs at least one of each: rounds, generations, offspring,"
                " swaps and survivors of every stage; found 0."
            )
        if list(self.survivors) != sorted(self.survivors, reverse=True):
            raise InputError(f"`survivors` get fewer from stage to stage; found {self.survivors}.")

    def asked(self, offspring: int) -> int:
        """Evaluations of a generation with so many children."""
        return offspring + sum(min(count, offspring) for count in self.survivors[:-1])

    @property
    def limit(self) -> int:
        """Evaluations at the most: the start, and every generation in full."""
        if self.evaluations is not None:
            return self.evaluations
        return 1 + self.rounds * self.generations * self.asked(self.offspring)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    Attributes
    ----------
    genome, fitness
        The best at the last stage, and what it is worth there.
    history
        The best fitness so far, at the start and after each generation; never rises.
    evaluations
        How many were asked for.
    """

    genome: Genome
    fitness: float
    history: tuple[float, ...]
    evaluations: int


@dataclass
class _Search:
    space: Space
    fitness: Fitness
    schedule: Schedule
    draws: np.random.Generator
    spent: int = 0
    seen: set[Genome] = field(default_factory=set)
    pools: list[list[int]] = field(default_factory=list)

    def ask(self, genomes: Sequence[Genome], stage: int) -> list[float]:
        """What genomes are worth; refuses to go over the budget."""
        if self.spent + len(genomes) > self.schedule.limit:
            raise BudgetError(
                f"expected at most {self.schedule.limit} evaluations; {self.spent} are spent and"
                f" {len(genomes)} more are asked for. Raise `evaluations`."
            )
        self.spent += len(genomes)
        found = list(self.fitness(genomes, stage))
        for genome, value in zip(genomes, found, strict=True):
            if value != value:
                raise InputError(f"expected a number for the budget {genome}; found NaN.")
        return found

    def room(self) -> int:
        """Children for which a whole generation fits into what is left."""
        left = self.schedule.limit - self.spent
        fits = [n for n in range(self.schedule.offspring + 1) if self.schedule.asked(n) <= left]
        return fits[-1]

    def child(self, parent: Genome, strides: Sequence[int]) -> Genome:
        """A parent with one to `swaps` levels moved from one part to another of its kind."""
        made = list(parent)
        pools = self.pools
        weights = np.array([len(parts) for parts in pools], np.float64)
        for _ in range(1 + int(self.draws.integers(self.schedule.swaps))):
            for _ in range(_TRIES):
                parts = pools[int(self.draws.choice(len(pools), p=weights / weights.sum()))]
                up, down = (parts[int(p)] for p in self.draws.choice(len(parts), 2, replace=False))
                more, less = made[up] + strides[up], made[down] - strides[down]
                if self.space.allows(up, more) and self.space.allows(down, less):
                    made[up], made[down] = more, less
                    break
        return tuple(made)

    def children(self, parents: Sequence[Genome], strides: Sequence[int]) -> list[Genome]:
        """New genomes, none of which was asked about before; fewer where there are no more."""
        made: list[Genome] = []
        for _ in range(self.room()):
            for _ in range(_TRIES):
                parent = parents[int(self.draws.integers(len(parents)))]
                child = self.child(parent, strides)
                if child not in self.seen:
                    self.seen.add(child)
                    made.append(child)
                    break
        return made

    def finalists(self, children: list[Genome]) -> list[tuple[float, Genome]]:
        """The children that outlive all stages but the last, with what they are worth there."""
        last = len(self.schedule.survivors) - 1
        for stage in range(last):
            values = self.ask(children, stage)
            order = sorted(range(len(children)), key=lambda at: (values[at], at))
            children = [children[at] for at in order[: self.schedule.survivors[stage]]]
        return list(zip(self.ask(children, last), children, strict=True))


def evolve(start: Genome, space: Space, fitness: Fitness, schedule: Schedule, seed: int) -> Found:
    """Search from a genome; the units of every kind of part stay what they are in it.

    The parents of a generation are compared with its finalists at the last stage, so that the
    best never gets worse. The same arguments ask the same questions in the same order.

    Raises
    ------
    BudgetError
        There are not even evaluations for the start.
    InputError
        The start is outside the space, or a fitness is NaN.
    """
    for part, units in enumerate(start):
        if not space.allows(part, units):
            raise InputError(
                f"expected part {part} to keep {space.low[part]} to {space.total[part]} units in"
                f" steps of {space.step[part]}; the start keeps {units}."
            )
    search = _Search(
        space, fitness, schedule, np.random.default_rng(seed), 0, {start}, space.pools()
    )
    last = len(schedule.survivors) - 1
    parents = [(search.ask([start], last)[0], start)]
    history = [parents[0][0]]
    for strides in _rounds(space, schedule):
        parent_genomes = [genome for _, genome in parents]
        children = search.children(parent_genomes, strides) if search.pools else []
        if not children:
            continue
        parents += search.finalists(children)
        parents.sort(key=lambda one: one[0])  # stable: who came first stays first
        del parents[schedule.survivors[-1] :]
        history.append(parents[0][0])
    return Found(parents[0][1], parents[0][0], tuple(history), search.spent)


def _rounds(space: Space, schedule: Schedule) -> Iterator[tuple[int, ...]]:
    for number in range(schedule.rounds):
        strides = space.strides(number)
        for _ in range(schedule.generations):
            yield strides


class LoggedFitness:
    """A fitness whose answers lie in a file of JSON lines, so that a killed search asks none again.

    A last line that was cut off is left out; a file of another search must not be given.
    """

    def __init__(self, path: Path, fitness: Fitness) -> None:
        self._path, self._fitness = path, fitness
        self._known: dict[tuple[int, Genome], float] = {}
        self.asked = 0
        whole = path.read_bytes() if path.exists() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        for line in kept.splitlines():
            entry = json.loads(line)
            self._known[entry["stage"], tuple(entry["genome"])] = entry["fitness"]
        if len(kept) < len(whole):
            path.write_bytes(kept)

    def __call__(self, genomes: Sequence[Genome], stage: int) -> list[float]:
        """Answers from the file, else asked one by one and written at once."""
        made = []
        for genome in genomes:
            value = self._known.get((stage, genome))
            if value is None:
                value = float(self._fitness([genome], stage)[0])
                self.asked += 1
                entry = {"stage": stage, "genome": list(genome), "fitness": value}
                with disk_errors(str(self._path)), self._path.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                self._known[stage, genome] = value
            made.append(value)
        return made
