"""What every search keeps: exact counts, nothing twice, budget, replay, best so far, refusals."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError, RecipeError
from prunery.pipelines.prompts.search import (
    SEARCHES,
    BestSoFar,
    asks,
    known_first,
    make_search,
    rounds,
    start,
)

every_search = pytest.mark.parametrize("method", SEARCHES)

# Small ones, so that many rounds pass in few prompts.
OPTIONS = {
    "greedy": {},
    "genetic": {"population": 12, "mutants": 5, "crossovers": 6, "epochs": 6, "elite": 0.2},
    "particle_swarm": {"population": 9, "epochs": 5},
    "random": {"batch": 10},
}


def worth(prompt):
    """A rough landscape: a pseudo-random number for every prompt."""
    return float(np.random.default_rng(list(prompt)).normal())


def landscape(prompts):
    return np.array([worth(prompt) for prompt in prompts])


def run(method, options, seed=0, ask=landscape, **size):
    return list(rounds(start(method, options, seed=seed, **size), ask))


def asked(found):
    return [prompt for step in found for prompt in step.prompts]


SIZES = [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (7, 1), (5, 3), (40, 5), (3000, 5)]


@every_search
@pytest.mark.parametrize(("vocabulary", "length"), SIZES)
@pytest.mark.parametrize("prompts", [0, 1, 7, 12, 13, 50, 400])
@pytest.mark.parametrize("small", [True, False])
def test_asks_is_exact_and_nothing_is_asked_twice(method, vocabulary, length, prompts, small):
    """Also where the space is used up before the prompts are."""
    options = OPTIONS[method] if small else {}
    size = {"vocabulary": vocabulary, "length": length, "prompts": prompts}
    found = run(method, options, **size)
    all_asked = asked(found)
    assert len(all_asked) == asks(method, options, **size) <= prompts
    assert len(set(all_asked)) == len(all_asked)
    assert all(step.prompts for step in found), "no round is empty"
    for prompt in all_asked:
        assert len(prompt) == length or method == "greedy"
        assert 1 <= len(prompt) <= length
        assert all(0 <= word < vocabulary for word in prompt)
        assert all(type(word) is int for word in prompt)


@every_search
def test_the_closed_forms_of_the_defaults(method):
    """Of 200 words, 5 a prompt, and no cap to speak of."""
    expected = {
        "greedy": 5 * 200,
        "genetic": 128 + 29 * 128,
        "particle_swarm": 128 + 30 * 128,
        "random": 10_000,
    }
    size = {"vocabulary": 200, "length": 5, "prompts": 10_000}
    assert asks(method, {}, **size) == expected[method]
    assert (
        len(asked(run(method, {}, ask=lambda batch: np.zeros(len(batch)), **size)))
        == (expected[method])
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 120),
    st.integers(1, 15),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(1, 7),
    st.sampled_from([0.01, 0.1, 0.35, 1]),
    st.booleans(),
)
def test_asks_of_any_genetic_search(v, k, prompts, population, mutants, crossovers, epochs, e, p):
    options = {
        "population": population,
        "mutants": mutants,
        "crossovers": crossovers,
        "epochs": epochs,
        "elite": e,
        "published": p,
    }
    size = {"vocabulary": v, "length": k, "prompts": prompts}
    assert len(asked(run("genetic", options, **size))) == asks("genetic", options, **size)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 4), st.integers(0, 120), st.integers(1, 15), st.integers(0, 8)
)
def test_asks_of_any_particle_swarm(vocabulary, length, prompts, population, epochs):
    options = {"population": population, "epochs": epochs}
    size = {"vocabulary": vocabulary, "length": length, "prompts": prompts}
    found = run("particle_swarm", options, **size)
    assert len(asked(found)) == asks("particle_swarm", options, **size)


@pytest.mark.parametrize("method", ["genetic", "particle_swarm", "random"])
def test_a_space_that_is_used_up_was_asked_whole(method):
    found = run(method, OPTIONS[method], vocabulary=3, length=3, prompts=1000)
    assert set(asked(found)) == set(itertools.product(range(3), repeat=3))


@every_search
def test_a_seed_decides_everything(method):
    size = {"vocabulary": 50, "length": 4, "prompts": 60}
    one, again, other = (asked(run(method, OPTIONS[method], s, **size)) for s in (1, 1, 2))
    assert one == again
    assert (one == other) == (method == "greedy")


@every_search
def test_best_so_far_never_falls(method):
    found = run(method, OPTIONS[method], vocabulary=30, length=3, prompts=90)
    best, line = BestSoFar(), []
    for step in found:
        line += best.see(step.rewards).tolist()
    flat = [worth(prompt) for prompt in asked(found)]
    assert line == np.maximum.accumulate(flat).tolist()
    assert best.reward == max(flat)
    assert best.place == flat.index(max(flat))
    assert best.seen == len(flat)


@every_search
def test_the_budget_may_end_anywhere(method):
    """After each number of answers: what was asked is a prefix of the whole, and then no more."""
    size = {"vocabulary": 8, "length": 3, "prompts": 40}
    whole = asked(run(method, OPTIONS[method], **size))
    for budget in range(len(whole) + 1):
        left = [budget]

        def ask(batch, left=left):
            some = batch[: left[0]]
            left[0] -= len(some)
            return landscape(some)

        assert asked(run(method, OPTIONS[method], ask=ask, **size)) == whole[:budget]
        # The cap on prompts ends it at the same place.
        capped = asked(run(method, OPTIONS[method], **{**size, "prompts": budget}))
        assert capped == whole[:budget]


@every_search
def test_a_search_taken_up_from_its_record_goes_on_as_it_would_have(method):
    size = {"vocabulary": 20, "length": 3, "prompts": 70, "seed": 5}
    record = list(rounds(start(method, OPTIONS[method], **size), landscape))
    assert len(record) > 2
    for known in range(len(record)):
        search = start(method, OPTIONS[method], **size)
        batch = next(search)
        for step in record[:known]:
            assert batch == step.prompts
            batch = search.send(step.rewards)
        assert batch == record[known].prompts


@every_search
def test_a_search_learns_from_rewards_alone(method):
    """Other rewards, other prompts; but for random search, which does not look."""
    size = {"vocabulary": 20, "length": 3, "prompts": 70}
    one = asked(run(method, OPTIONS[method], **size))
    other = asked(run(method, OPTIONS[method], ask=lambda b: -landscape(b), **size))
    assert (one == other) == (method == "random")


@every_search
def test_all_rewards_tied_or_hopeless(method):
    size = {"vocabulary": 6, "length": 3, "prompts": 60}
    expected = asks(method, OPTIONS[method], **size)
    for value in (0.0, -math.inf):
        found = run(method, OPTIONS[method], ask=lambda b, x=value: np.full(len(b), x), **size)
        assert len(asked(found)) == expected


@every_search
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda n: [math.nan] * n, "is NaN"),
        (lambda n: [0.0] * (n + 1), r"found shape \("),
        (lambda n: [[0.0]] * n, r"found shape \("),
        (lambda n: 0.0, r"found shape \(\)"),
    ],
)
def test_bad_rewards_are_refused(method, given, message):
    search = start(method, OPTIONS[method], vocabulary=9, length=2, prompts=50, seed=0)
    with pytest.raises(InputError, match=message):
        search.send(given(len(next(search))))


@every_search
def test_what_is_refused_at_once(method):
    good = {"vocabulary": 5, "length": 2, "prompts": 5}
    for name, value, message in [
        ("vocabulary", 0, "no word to search with"),
        ("vocabulary", -1, "vocabulary"),
        ("length", 0, "length"),
        ("prompts", -1, "prompts"),
    ]:
        with pytest.raises(InputError, match=message):
            start(method, {}, **{**good, name: value}, seed=0)
        with pytest.raises(InputError, match=message):
            asks(method, {}, **{**good, name: value})
    with pytest.raises(RecipeError, match="no_such_option"):
        start(method, {"no_such_option": 1}, **good, seed=0)


def test_unknown_searches_and_options_are_named():
    with pytest.raises(RecipeError, match="unknown search 'annealing'; known: greedy"):
        make_search("annealing")
    with pytest.raises(RecipeError, match=r"`genetic`, option `elite`.*its options: population"):
        make_search("genetic", {"elite": 0.0})
    with pytest.raises(RecipeError, match="population"):
        make_search("particle_swarm", {"population": "many"})


def test_more_words_than_there_are_is_no_fault():
    """Words may repeat: two words, prompts of nine."""
    found = run("random", {}, vocabulary=2, length=9, prompts=10_000)
    assert len(asked(found)) == 2**9


def test_spaces_beyond_any_float():
    found = run("genetic", {}, vocabulary=50_000, length=100, prompts=300)
    assert len(asked(found)) == 300


@every_search
def test_what_the_influence_pass_has_asked(method):
    size = {"vocabulary": 30, "length": 3, "prompts": 50}
    found = asked(run(method, OPTIONS[method], **size))
    one_word = sum(len(prompt) == 1 for prompt in found)
    assert known_first(method, OPTIONS[method], **size) == one_word
    size = {"vocabulary": 30, "length": 1, "prompts": 25}
    assert known_first(method, OPTIONS[method], **size) == 25
    size = {"vocabulary": 30, "length": 3, "prompts": 7}
    assert known_first(method, {}, **size) == (7 if method == "greedy" else 0)


def test_of_equals_the_first_is_best_unless_another_has_less_loss():
    best = BestSoFar()
    assert best.see([1.0, 3.0, 3.0]).tolist() == [1.0, 3.0, 3.0]
    assert best.place == 1
    best = BestSoFar()
    best.see([3.0, 3.0, 3.0, 2.0], [0.5, 0.2, 0.2, 0.0])
    assert (best.place, best.reward, best.loss) == (1, 3.0, 0.2)
    best.see([3.0], [0.1])
    assert best.place == 4
    best = BestSoFar()
    assert best.place == -1
    assert best.see([-math.inf]).tolist() == [-math.inf]
    assert best.place == 0
