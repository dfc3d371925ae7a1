"""What each search does of its own: moves by hand, against brute force, and better than random."""

import itertools

import numpy as np
import pytest

from prunery.pipelines.prompts.search import BestSoFar, rounds, start
from prunery.pipelines.prompts.searches.space import Draws, Space, Unseen


def best_of(method, options, ask, **size):
    best, prompts = BestSoFar(), []
    for step in rounds(start(method, options, **size), ask):
        best.see(step.rewards)
        prompts += step.prompts
    return prompts[best.place], best.reward


def batches(method, options, ask, **size):
    return list(rounds(start(method, options, **size), ask))


# -- greedy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_brute_force_where_words_add_up(seed):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.01, 1, (3, 5))
    if seed % 2:
        weights = np.round(weights, 0) + 1  # ties everywhere

    def ask(prompts):
        return np.array([sum(weights[i, w] for i, w in enumerate(prompt)) for prompt in prompts])

    every = list(itertools.product(range(5), repeat=3))
    total = ask(every)
    expected = every[int(np.argmax(total))]  # the first of equals: the smallest positions
    size = {"vocabulary": 5, "length": 3, "prompts": 99, "seed": 0}
    assert best_of("greedy", {}, ask, **size) == (expected, total.max())


def test_greedy_takes_the_best_prefix_on():
    def ask(prompts):
        return np.array([{(1,): 5.0, (1, 2): 9.0, (0, 0): 99.0}.get(p, 0.0) for p in prompts])

    found = batches("greedy", {}, ask, vocabulary=3, length=3, prompts=99, seed=0)
    assert [step.prompts for step in found] == [
        [(0,), (1,), (2,)],
        [(1, 0), (1, 1), (1, 2)],
        [(1, 2, 0), (1, 2, 1), (1, 2, 2)],
    ]


# -- genetic ---------------------------------------------------------------------------------


def linear(weights):
    return lambda prompts: np.array([weights[list(prompt)].sum() for prompt in prompts])


def genetic(ask, vocabulary=1000, length=6, seed=0, **options):
    size = {"vocabulary": vocabulary, "length": length, "prompts": 100_000, "seed": seed}
    return batches("genetic", options, ask, **size)


def worth():
    return linear(np.random.default_rng(7).normal(size=1000))


def elite_of(steps, share):
    """The survivors after some rounds, re-derived: of all asked and kept, the best share."""
    pool = []
    for step in steps:
        pool += zip((-step.rewards).tolist(), step.prompts, strict=True)
        pool = sorted(pool, key=lambda member: member[0])[: max(1, int(len(pool) * share))]
    return [prompt for _, prompt in pool]


def test_a_crossover_takes_each_word_from_either_parent():
    found = genetic(worth(), population=40, mutants=0, crossovers=200, epochs=3, elite=0.25)
    mixed = whole = 0
    for epoch in (1, 2):
        parents = elite_of(found[:epoch], 0.25)
        for child in found[epoch].prompts:
            pairs = [
                (a, b)
                for a, b in itertools.combinations(parents, 2)
                if all(w in two for w, two in zip(child, zip(a, b, strict=True), strict=True))
            ]
            mixed += bool(pairs)
            whole += child in parents
    assert whole == 0
    # All but children of a parent with itself, which change one word instead.
    assert mixed >= 0.9 * 400


def test_a_crossover_draws_its_words_evenly():
    """Two parents without a common word: half of the children's words are from each."""
    found = genetic(worth(), length=12, population=20, mutants=0, crossovers=400, epochs=2)
    parents = elite_of(found[:1], 0.1)
    assert len(parents) == 2
    shares = [np.mean(np.equal(child, parents[0])) for child in found[1].prompts]
    assert 0.46 < np.mean(shares) < 0.54
    # Of each child: Binomial(12, 0.5) / 12 deviates by 0.144, a lopsided draw by more.
    assert 0.12 < np.std(shares) < 0.17


def test_a_mutant_changes_each_word_with_its_probability():
    found = genetic(worth(), length=10, population=10, mutants=500, crossovers=0, epochs=2)
    (parent,) = elite_of(found[:1], 0.1)
    changed = [
        sum(a != b for a, b in zip(child, parent, strict=True)) for child in found[1].prompts
    ]
    assert min(changed) >= 1  # an unchanged one has been asked already
    # Binomial(10, 0.1) given at least 1: the mean is 1 / (1 - 0.9 ** 10) = 1.54.
    assert 1.45 < np.mean(changed) < 1.75
    places = np.not_equal(found[1].prompts, [parent] * 500).sum(axis=0)
    assert places.min() > 40, "every place mutates, the first and the last too"


def test_the_best_live_on_and_are_not_asked_again():
    """A best prompt of the first round is a parent for all epochs, and asked once."""
    target = start("genetic", {"population": 30}, vocabulary=1000, length=6, prompts=99, seed=0)
    star = next(target)[17]

    def ask(prompts):
        return np.array([10.0 if prompt == star else 0.0 for prompt in prompts])

    found = genetic(ask, population=30, mutants=20, crossovers=20, epochs=8)
    assert sum(star in step.prompts for step in found) == 1
    close = [sum(a == b for a, b in zip(p, star, strict=True)) for p in found[-1].prompts]
    assert max(close) >= 4


def test_published_mode_repeats_and_mixes_nothing():
    found = genetic(
        worth(), population=40, mutants=0, crossovers=64, epochs=4, elite=0.1, published=True
    )
    assert [len(step.prompts) for step in found] == [40, 4 + 64, 6 + 64, 7 + 64]
    ever = set(found[0].prompts)
    assert all(set(step.prompts) <= ever for step in found), "only whole parents of round 0"
    # Survivors are asked again, at the head of the round.
    best = sorted(zip(found[0].rewards, found[0].prompts, strict=True), reverse=True)[:4]
    assert found[1].prompts[:4] == [prompt for _, prompt in best]


def test_published_mode_asks_what_the_published_script_asks():
    found = genetic(worth(), length=5, published=True)
    sizes = [len(step.prompts) for step in found]
    assert sizes == [128, 12 + 128, *[14 + 128] * 28]
    assert sum(sizes) == 4244


# -- particle swarm --------------------------------------------------------------------------


def test_the_first_places_are_those_of_random_search():
    size = {"vocabulary": 100, "length": 5, "prompts": 500, "seed": 3}
    first = [next(start(method, {}, **size)) for method in ("random", "genetic", "particle_swarm")]
    assert first[0] == first[1] == first[2]


PINNED = [621, 257, 910, 933, 229, 615]

FROZEN = {"mutation": 0.0, "first_own": 0.0, "last_own": 0.0}


def swarm(ask, seed=0, length=8, **options):
    size = {"vocabulary": 1000, "length": length, "prompts": 100_000, "seed": seed}
    return batches("particle_swarm", options, ask, **size)


def turned(found, epoch=1):
    """Share of words that became the best one's, of those that differed; and other changes."""
    before, after = found[epoch - 1].prompts, found[epoch].prompts
    pool = [prompt for step in found[:epoch] for prompt in step.prompts]
    rewards = np.concatenate([step.rewards for step in found[:epoch]])
    best = pool[int(np.argmax(rewards))]
    differed = became = strange = 0
    for old, new in zip(before, after, strict=True):
        for a, b, w in zip(old, new, best, strict=True):
            differed += a != w
            became += a != w and b == w
            strange += b not in (a, w)
    return became / differed, strange


def test_a_particle_turns_to_the_best_of_all_by_the_sigmoid_of_its_velocity():
    """With no inertia, v = -3 (its own best is where it stands) + 3 = 0: half of the words."""
    always = {"first_all": 1.0, "last_all": 1.0, "first_inertia": 0.0, "last_inertia": 0.0}
    found = swarm(worth(), population=300, epochs=1, **FROZEN, **always)
    share, strange = turned(found)
    assert 0.46 < share < 0.54
    # Who turned in no word, and so stood where it had been, moved one word instead. Of 300,
    # the best itself always does, and of the others 1 in 2 ** 8.
    assert strange <= 12


def test_inertia_carries_the_velocity_on():
    """With all inertia and v = 6 at the start half of the particles turn, the others hardly."""
    options = {"first_inertia": 1.0, "last_inertia": 1.0, "first_all": 1.0, "last_all": 1.0}
    found = swarm(worth(), population=400, epochs=1, velocity=60.0, **FROZEN, **options)
    before, after = found[0].prompts, found[1].prompts
    best = before[int(np.argmax(found[0].rewards))]
    shares = [np.mean(np.equal(new, best)) for new in after]
    # One velocity a particle: it turns whole or not at all; those whole collide and move a word.
    assert np.mean(np.array(shares) > 0.7) == pytest.approx(0.5, abs=0.1)
    assert np.mean(np.array(shares) < 0.3) == pytest.approx(0.5, abs=0.1)
    assert len(set(after)) == 400


def test_nobody_turns_where_nothing_pulls():
    never = {"first_all": 0.0, "last_all": 0.0}
    found = swarm(worth(), population=100, epochs=1, **FROZEN, **never)
    # Each stands where it has been: one word of it changes.
    changed = [
        sum(a != b for a, b in zip(old, new, strict=True))
        for old, new in zip(found[0].prompts, found[1].prompts, strict=True)
    ]
    assert changed == [1] * 100


def test_mutation_changes_one_word_of_some():
    """Beside the turns to the best, one word of every second particle."""
    options = {**FROZEN, "first_all": 1.0, "last_all": 1.0, "first_inertia": 0.0}
    plain, mutated = (
        turned(swarm(worth(), population=600, epochs=1, **{**options, "mutation": m}))[1]
        for m in (0.0, 0.5)
    )
    assert plain < 20
    assert 240 < mutated < 360


def test_a_particle_goes_back_to_its_own_best():
    """From the second epoch, with C1 = 1 and C2 = 0: words return to where the best was."""
    options = {"mutation": 1.0, "first_own": 1.0, "last_own": 1.0, "first_all": 0, "last_all": 0}
    first = swarm(worth(), population=200, epochs=1, **options)[0].prompts

    def ask(prompts):
        return np.array([1.0 if prompt in set(first) else 0.0 for prompt in prompts])

    found = swarm(ask, population=200, epochs=12, **options)
    # Own bests are the first places; a walk that forgot them would be 12 words away.
    away = [
        sum(a != b for a, b in zip(new, old, strict=True))
        for new, old in zip(found[-1].prompts, found[0].prompts, strict=True)
    ]
    assert np.mean(away) < 4.5


def expected_turns(places, speed, own, best, inertia, to_own, to_all):
    """Words expected to become the own best's and the best of all's; `speed` moves on.

    To the own are counted where place, own best and best of all are three words; to the best
    there, and where a particle stands at its own best. Who does not move at all, or only back
    to its own best, is moved anew, and one word changes.
    """
    pull = np.where(places == own, -3, 3) + np.where(places == best, -3, 3)
    speed[:] = inertia * speed + (1 - inertia) * pull
    chance = 1 / (1 + np.exp(-speed))
    not_own = np.where(places == own, 1.0, 1 - chance).prod(axis=1)
    not_all = np.where(places == best, 1.0, 1 - chance).prod(axis=1)
    stays = (1 - to_own + to_own * not_own) * (1 - to_all + to_all * not_all)
    back = np.where(places == own, 1.0, chance).prod(axis=1) * (places != own).any(axis=1)
    stays += to_own * back * (1 - to_all + to_all * np.where(own == best, 1.0, 1 - chance).prod(1))
    again = (1 + stays)[:, None]
    apart = (places != own) & (places != best) & (own != best)
    become_own = (again * to_own * chance * (1 - to_all * chance))[apart].sum()
    become_best = (again * to_all * chance)[(places != best) & (own == places)].sum()
    return become_own, become_best + (again * to_all * chance)[apart].sum(), apart


def rising():
    """Every round better than the last, its best at another particle: all bests move on."""
    told = []

    def ask(prompts):
        told.append(len(prompts))
        return 10.0 * len(told) + (np.arange(len(prompts)) == len(told))

    return ask


@pytest.mark.parametrize(
    ("ask", "own_and_all", "tolerance"),
    [
        (worth(), ((0.8, 0.2), (0.2, 0.8)), 0.12),
        (lambda prompts: np.zeros(len(prompts)), ((0.8, 0.2), (0.2, 0.8)), 0.12),
        (rising(), ((0.0, 0.0), (1.0, 1.0)), 0.03),  # all turn: what counts are the velocities
    ],
    ids=["by worth", "tied", "rising"],
)
def test_every_epoch_turns_as_its_velocities_say(ask, own_and_all, tolerance):
    """The whole law re-derived from what was asked and answered: inertia, C1, C2, both bests."""
    epochs, (c1, c2) = 6, own_and_all
    gates = {"first_own": c1[0], "last_own": c1[1], "first_all": c2[0], "last_all": c2[1]}
    options = {"population": 300, "epochs": epochs, "velocity": 0.0, "mutation": 0.0}
    found = swarm(ask, length=40, **options, **gates)
    own, held = np.array(found[0].prompts), found[0].rewards.copy()
    best, top = own[held.argmax()].copy(), held.max()
    places, speed = own.copy(), np.zeros(own.shape)
    for epoch in range(epochs):
        done = epoch / epochs
        to_own, to_all = (first + (last - first) * done for first, last in (c1, c2))
        inertia = 0.8 - 0.6 * done
        wanted = expected_turns(places, speed, own, best, inertia, to_own, to_all)
        new, reward = np.array(found[epoch + 1].prompts), found[epoch + 1].rewards
        apart = wanted[2]
        to_best = ((new == best) & (apart | ((places != best) & (own == places)))).sum()
        slack = tolerance * wanted[1] + 2 * np.sqrt(wanted[1])  # few are left to turn at the end
        assert abs(to_best - wanted[1]) < slack, epoch
        if wanted[0] > 200:
            assert ((new == own) & apart).sum() == pytest.approx(wanted[0], rel=tolerance), epoch
        better = reward > held
        own[better], held[better] = new[better], reward[better]
        if reward.max() > top:
            best, top = new[reward.argmax()].copy(), reward.max()
        places = new


# -- all against random ----------------------------------------------------------------------


def planted(seed, vocabulary=100, length=5):
    """Few good words, some good beside each other, a different one at each place."""
    rng = np.random.default_rng(seed)
    single = np.where(rng.random(vocabulary) < 0.1, rng.uniform(0.5, 1, vocabulary), 0.0)
    place = rng.normal(0, 0.2, (length, vocabulary))
    pair = np.where(rng.random((vocabulary, vocabulary)) < 0.02, 0.5, 0.0)

    def ask(prompts):
        return np.array(
            [
                np.tanh(
                    0.3
                    * (
                        single[list(set(p))].sum()
                        + sum(place[i, w] for i, w in enumerate(p))
                        + sum(pair[a, b] for a, b in itertools.pairwise(p))
                    )
                )
                for p in prompts
            ]
        )

    return ask


@pytest.mark.parametrize("method", ["greedy", "genetic", "particle_swarm"])
def test_better_than_random_at_equal_prompts(method):
    """On 20 planted landscapes; random search against itself would win half of them."""
    wins, leads = 0, []
    for seed in range(20):
        size = {"vocabulary": 100, "length": 5, "prompts": 500, "seed": seed}
        options = {} if method == "greedy" else {"population": 50}
        ask = planted(seed)
        lead = best_of(method, options, ask, **size)[1] - best_of("random", {}, ask, **size)[1]
        wins += lead > 0
        leads.append(lead)
    assert wins >= 17
    assert np.mean(leads) > 3 * np.std(leads, ddof=1) / np.sqrt(20)


# -- the space -------------------------------------------------------------------------------


def test_numbers_are_prompts():
    space = Space(3, 2)
    assert [space.prompt(number) for number in range(space.size)] == list(
        itertools.product(range(3), repeat=2)
    )


def test_draws_are_pinned():
    """From (seed, counter) alone, so no library's generator may move them."""
    draws = Draws(11)
    assert [draws.below(1000) for _ in range(6)] == PINNED
    other = Draws(11)
    assert [other.below(1000) for _ in range(6)] == PINNED


def test_draws_are_uniform():
    draws = Draws(0)
    counts = np.bincount([draws.below(7) for _ in range(70_000)], minlength=7)
    assert len(counts) == 7
    assert abs(counts - 10_000).max() < 400
    assert {draws.below(1) for _ in range(9)} == {0}
    huge = 10**60
    assert 0.4 < np.mean([draws.below(huge) / huge for _ in range(5000)]) < 0.6
    others = np.bincount([draws.another(2, Space(5, 1)) for _ in range(5000)], minlength=5)
    assert others[2] == 0
    assert others[[0, 1, 3, 4]].min() > 1100


def test_a_proposal_that_will_not_change_becomes_the_next_unseen_one():
    space, calls = Space(4, 2), []
    unseen = Unseen(space, Draws(1))

    def stubborn(attempt):
        calls.append(attempt)
        return (0, 0)

    found = unseen.fill(99, stubborn)
    assert found[0] == (0, 0)
    assert len(found) == len(set(found)) == 16
    assert calls[:3] == [0, 0, 1]
    assert max(calls) == 63
    # Another seed goes through the space in another order.
    assert found[1:] != Unseen(space, Draws(2)).fill(99, stubborn)[1:]


def test_random_prompts_are_uniform():
    firsts = [
        next(start("random", {}, vocabulary=3, length=2, prompts=1, seed=seed))[0]
        for seed in range(1800)
    ]
    counts = [firsts.count(prompt) for prompt in itertools.product(range(3), repeat=2)]
    assert min(counts) > 150
    assert max(counts) < 255
