"""The search for a budget, on landscapes whose best is known."""

import json

import numpy as np
import pytest

from prunery.errors import BudgetError, InputError
from prunery.pipelines.compression.evolution import LoggedFitness, Schedule, Space, evolve

PARTS, TOTAL = 12, 64
SMALL = Schedule(rounds=3, generations=12, offspring=16, swaps=3, survivors=(6, 3, 2))


def space(kinds=2, step=1, low=4, parts=PARTS, total=TOTAL, stride=8):
    kind = tuple(f"kind {part % kinds}" for part in range(parts))
    return Space((low,) * parts, (total,) * parts, (step,) * parts, (stride,) * parts, kind)


def landscape(seed, parts=PARTS, total=TOTAL):
    """A separable convex cost, and its minimum by greedy marginal gains (exact for convex)."""
    weight = np.random.default_rng(seed).gamma(0.5, size=parts) + 0.01

    def cost(genome, stage=2):
        noise = 0.0
        if stage < 2:  # shorter looks see less exactly
            noise = 0.02 * (hash((genome, stage)) % 97 / 97 - 0.5)
        return float((weight * (1 - np.array(genome) / total) ** 2).sum()) * (1 + noise)

    def best(budget_of_kind, kinds, low):
        keep = np.full(parts, low)
        for kind, budget in budget_of_kind.items():
            at = [p for p in range(parts) if kinds[p] == kind]
            for _ in range(budget - low * len(at)):
                gains = []
                for p in at:
                    if keep[p] < total:
                        now, then = (1 - keep[p] / total) ** 2, (1 - (keep[p] + 1) / total) ** 2
                        gains.append((weight[p] * (now - then), -p))
                keep[-max(gains)[1]] += 1
        return tuple(int(k) for k in keep)

    return cost, best


def fitness_of(cost):
    return lambda genomes, stage: [cost(genome, stage) for genome in genomes]


def sums(genome, where):
    made = {}
    for units, kind in zip(genome, where.kind, strict=True):
        made[kind] = made.get(kind, 0) + units
    return made


@pytest.mark.parametrize("seed", range(4))
def test_it_comes_near_the_best_budget_and_beats_random_search(seed):
    where, start = space(), (TOTAL // 2,) * PARTS
    cost, best = landscape(seed)
    optimum = cost(best(sums(start, where), where.kind, 4))
    found = evolve(start, where, fitness_of(cost), SMALL, seed)
    assert found.fitness == cost(found.genome)
    assert found.fitness <= cost(start)
    gap = cost(start) - optimum
    assert found.fitness - optimum < 0.1 * gap

    rng = np.random.default_rng(seed)
    tried = []
    for _ in range(found.evaluations):  # random budgets of the same sums, at full length
        genome = np.zeros(PARTS, int)
        for kind in set(where.kind):
            at = [p for p in range(PARTS) if where.kind[p] == kind]
            share = rng.dirichlet(np.ones(len(at))) * (TOTAL // 2 - 4) * len(at)
            whole = np.minimum(np.floor(share).astype(int) + 4, TOTAL)
            while whole.sum() < TOTAL // 2 * len(at):
                whole[rng.choice(np.flatnonzero(whole < TOTAL))] += 1
            genome[at] = whole
        tried.append(cost(tuple(genome)))
    assert found.fitness < min(tried)


def test_no_genome_breaks_its_budget_or_its_bounds_and_none_is_asked_twice():
    where, start = space(kinds=3, step=4), (32,) * PARTS
    asked = []

    def watching(genomes, stage):
        for genome in genomes:
            assert sums(genome, where) == sums(start, where)
            assert all(4 <= units <= TOTAL and units % 4 == 0 for units in genome)
            asked.append((genome, stage))
        return [float(np.var(genome)) for genome in genomes]

    found = evolve(start, where, watching, SMALL, 0)
    assert len(asked) == len(set(asked)) == found.evaluations <= SMALL.limit
    assert found.genome == start  # the variance of equal parts is the least


def test_levels_are_halved_from_round_to_round_down_to_one_step():
    space = Space(
        low=(0, 0, 0), total=(64, 64, 64), step=(2, 4, 1), stride=(16, 12, 1), kind=("a",) * 3
    )
    found = [space.strides(number) for number in range(5)]
    assert found == [(16, 12, 1), (8, 4, 1), (4, 4, 1), (2, 4, 1), (2, 4, 1)]


def test_the_best_so_far_never_rises():
    cost, _ = landscape(9)
    found = evolve((32,) * PARTS, space(), fitness_of(cost), SMALL, 1)
    assert all(b <= a for a, b in zip(found.history, found.history[1:], strict=False))
    assert found.history[-1] == found.fitness < found.history[0]


@pytest.mark.parametrize("limit", [1, 2, 5, 17, 60])
def test_a_hard_limit_on_evaluations_is_kept(limit):
    cost, _ = landscape(2)
    count = 0

    def counting(genomes, stage):
        nonlocal count
        count += len(genomes)
        return [cost(genome) for genome in genomes]

    schedule = Schedule(4, 50, 16, 3, (6, 3, 2), evaluations=limit)
    found = evolve((32,) * PARTS, space(), counting, schedule, 0)
    assert count == found.evaluations <= limit
    with pytest.raises(BudgetError, match="at most 0 evaluations"):
        evolve((32,) * PARTS, space(), counting, Schedule(evaluations=0), 0)


def test_the_stated_limit_is_what_all_generations_ask():
    cost, _ = landscape(3, 40, 640)
    found = evolve((320,) * 40, space(parts=40, total=640), fitness_of(cost), SMALL, 0)
    assert found.evaluations == SMALL.limit == 1 + 3 * 12 * (16 + 6 + 3)


def test_the_same_seed_asks_the_same_and_another_seed_other_questions():
    cost, _ = landscape(4)

    def run(seed):
        asked = []

        def watching(genomes, stage):
            asked.extend((stage, *genome) for genome in genomes)
            return [cost(genome, stage) for genome in genomes]

        evolve((32,) * PARTS, space(), watching, SMALL, seed)
        return asked

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_a_killed_search_asks_nothing_again(tmp_path):
    cost, _ = landscape(5)
    whole = evolve((32,) * PARTS, space(), fitness_of(cost), SMALL, 0)
    path, count = tmp_path / "log.jsonl", 0

    def dying(genomes, stage):
        nonlocal count
        if count == 100:
            raise KeyboardInterrupt
        count += 1
        return [cost(genome, stage) for genome in genomes]

    with pytest.raises(KeyboardInterrupt):
        evolve((32,) * PARTS, space(), LoggedFitness(path, dying), SMALL, 0)
    with path.open("a") as file:
        file.write('{"stage": 0, "gen')  # cut off in the middle of a line
    again = LoggedFitness(path, fitness_of(cost))
    assert evolve((32,) * PARTS, space(), again, SMALL, 0) == whole
    assert again.asked == whole.evaluations - 100
    last = LoggedFitness(path, fitness_of(None))
    assert evolve((32,) * PARTS, space(), last, SMALL, 0) == whole
    assert last.asked == 0
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_nothing_to_trade_ends_at_the_start():
    where = Space((1, 1), (8, 8), (1, 1), (1, 1), ("a", "b"))
    found = evolve((4, 4), where, lambda g, s: [1.0] * len(g), SMALL, 0)
    assert found.genome == (4, 4)
    assert found.evaluations == 1


def test_a_start_outside_the_space_nan_and_empty_schedules_are_refused():
    with pytest.raises(InputError, match="part 0 to keep 4 to 64"):
        evolve((2,) * PARTS, space(), fitness_of(None), SMALL, 0)
    with pytest.raises(InputError, match="NaN"):
        evolve((8,) * PARTS, space(), lambda g, s: [float("nan")] * len(g), SMALL, 0)
    with pytest.raises(InputError, match="at least one"):
        Schedule(generations=0)
    with pytest.raises(InputError, match="fewer from stage"):
        Schedule(survivors=(2, 4))
