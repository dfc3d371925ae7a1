"""The decision about words: exact counts, early losers never kept, the published rule beside."""

import numpy as np
import pytest

from prunery.errors import BudgetError, RecipeError
from prunery.pipelines.recipe import parse_recipe
from prunery.pipelines.steps.prune_prompts import ELIMINATED, PrunePromptsOptions, prune_words

IDS = np.arange(40, dtype=np.int64) * 7 + 3
INFLUENCE = np.random.default_rng(0).permutation(40).astype(np.float32)
ALL = np.ones(40, np.bool_)


def decide(finalist=ALL, influence=INFLUENCE, seed=0, **options):
    return prune_words(
        PrunePromptsOptions.model_validate(options), IDS, influence, finalist, seed=seed
    )


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 4), ({"keep": 0.26}, 11), ({"count": 9}, 9), ({"count": 100}, 40), ({"count": 0}, 0)],
)
def test_the_most_influential_stay(options, kept):
    made = decide(**options)
    assert made.kept == kept
    assert set(INFLUENCE[made.keep]) == set(range(40 - kept, 40))


def test_ties_go_to_the_smaller_id():
    made = decide(influence=np.zeros(40, np.float32), count=3)
    assert np.flatnonzero(made.keep).tolist() == [0, 1, 2]


def test_early_losers_are_never_kept():
    finalist = INFLUENCE < 20  # the higher ones were judged on few rows alone
    made = decide(finalist, count=5)
    assert set(INFLUENCE[made.keep]) == {15, 16, 17, 18, 19}
    assert (np.array(made.reason_names())[~finalist] == ELIMINATED).all()
    assert made.dropped() == {"less_influential": 15, ELIMINATED: 20}


def test_a_share_is_one_of_all_words():
    assert decide(INFLUENCE < 20, keep=0.25).kept == decide(keep=0.25).kept == 10
    with pytest.raises(BudgetError, match="`least`"):
        decide(INFLUENCE < 20, count=21)


def test_the_control_is_of_the_same_size_and_of_no_influence():
    made = decide(method="random_prompts", keep=0.1)
    assert made.kept == 4
    other = decide(method="random_prompts", keep=0.1, influence=-INFLUENCE)
    assert np.array_equal(made.keep, other.keep)
    assert not np.array_equal(made.keep, decide(method="random_prompts", keep=0.1, seed=1).keep)
    assert np.array_equal(made.keep, decide(INFLUENCE < 5, method="random_prompts", keep=0.1).keep)


def test_the_published_rule_for_comparison():
    made = decide(rule="percentile", keep=0.1)
    assert np.array_equal(made.keep, np.percentile(INFLUENCE, 90) < INFLUENCE)
    assert decide(rule="percentile", influence=np.zeros(40, np.float32)).kept == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("reward: loss", "reward"),
        ("count: 3, keep: 0.5", "one of them"),
        ("rule: percentile, method: random_prompts", "published rule"),
        ("method: random", "unknown method"),
        ("kepp: 0.5", "unknown option"),
    ],
)
def test_wrong_options_are_refused(line, said):
    text = "name: x\nsteps:\n  data: {step: read_dataset, path: 'builtin:digits'}\n"
    text += "  task: {step: prompt_task, inputs: {data: data}}\n"
    text += "  words: {step: prompt_vocabulary, inputs: {task: task}}\n"
    text += "  influence: {step: prompt_influence, inputs: {task: task, words: words}}\n"
    text += "  prune: {step: prune_prompts, inputs: {influence: influence}, " + line + "}\n"
    with pytest.raises(RecipeError, match=said):
        parse_recipe(text)
