"""Running a search: rewards by the definition, a hard budget, the same again after a stop."""

import numpy as np
import pytest

from prunery.errors import BudgetError, InputError
from prunery.pipelines.prompts.asking import Asker, Limits
from prunery.pipelines.prompts.search import SEARCHES
from prunery.pipelines.prompts.searching import run_search

from .scripted import sixteen

SMALL = {
    "greedy": {},
    "genetic": {"population": 12, "mutants": 6, "crossovers": 6, "epochs": 4},
    "particle_swarm": {"population": 12, "epochs": 3},
    "random": {},
}


def search(box, rows, labels, words, method, *, limits=None, prompts=48, log=None, **more):
    asker = Asker(box, rows, limits or Limits(), log, batch=64)
    return asker, run_search(
        asker,
        labels,
        words,
        method=method,
        length=3,
        prompts=prompts,
        options=SMALL[method],
        seed=1,
        **more,
    )


def test_small_options_cover_every_search():
    assert set(SMALL) == set(SEARCHES)


@pytest.mark.parametrize("method", SEARCHES)
def test_rows_of_a_search(method):
    box, rows, labels, _, words = sixteen()
    _, made = search(box, rows, labels, words, method)
    best = -np.inf
    for place, one in enumerate(made.asked):
        answers = box.label_logprobs([one.prompt], rows)[0]
        assert one.prompt == " ".join(words[word] for word in one.words)
        assert one.reward == pytest.approx(float(answers[np.arange(16), labels].mean()), abs=1e-6)
        assert one.accuracy == pytest.approx((answers.argmax(1) == labels).mean())
        best = max(best, one.reward)
        assert one.best == best
        assert one.queries == 16 * (place + 1)
    assert made.asked[made.best].reward == best
    assert len({one.prompt for one in made.asked}) == len(made.asked)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("limit", [{"queries": 16 * 20 + 15}, {"tokens": 900}, {"cost": 0.9}])
def test_the_budget_ends_a_search_in_the_middle(method, limit):
    box, rows, labels, _, words = sixteen()
    limits = Limits(**limit, input_price=1000.0, output_price=0.0)
    asker, made = search(box, rows, labels, words, method, limits=limits)
    name, most = next(iter(limit.items()))
    assert made.stop == name
    spent = {"queries": asker.spent.queries, "tokens": asker.spent.read}
    spent["cost"] = spent["tokens"] * 1000 / 1e6
    assert 0 < spent[name] <= most
    assert len(box.asked) == 16 * len(made.asked)
    whole = search(sixteen()[0], rows, labels, words, method)[1]
    assert made.asked == whole.asked[: len(made.asked)]


def test_a_budget_for_no_prompt_at_all():
    box, rows, labels, _, words = sixteen()
    with pytest.raises(BudgetError, match="one prompt"):
        search(box, rows, labels, words, "random", limits=Limits(queries=15))
    assert not box.asked


def test_no_word():
    box, rows, labels, _, _ = sixteen()
    with pytest.raises(InputError, match="no word"):
        search(box, rows, labels, [], "random")


def test_without_labels():
    box, rows, labels, _, words = sixteen()
    made = search(box, rows, labels, words, "greedy", reward="kl")[1]
    turned = search(sixteen()[0], rows, 1 - labels, words, "greedy", reward="kl")[1]
    assert [one.prompt for one in made.asked] == [one.prompt for one in turned.asked]
    assert made.asked[made.best].reward > 0


class Dies(Exception):
    """What a killed process looks like from inside."""


class Memory:
    """A log of answers that lives longer than the process that filled it."""

    def __init__(self):
        self.known = {}

    def find(self, prompts, rows):
        return [[self.known.get((p, r)) for r in rows] for p in prompts]

    def keep(self, pairs, answers):
        self.known.update(zip(pairs, answers, strict=True))


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_taken_up_again_it_asks_the_next_query_and_none_twice(method, after):
    box, rows, labels, _, words = sixteen()
    whole = search(box, rows, labels, words, method)[1]
    log, first = Memory(), sixteen()[0]
    answer = first.label_logprobs

    def dying(prompts, texts):
        if len(first.asked) >= after * 64:
            raise Dies
        return answer(prompts, texts)

    first.label_logprobs = dying
    with pytest.raises(Dies):
        search(first, rows, labels, words, method, log=log)
    second = sixteen()[0]
    asker, again = search(second, rows, labels, words, method, log=log)
    assert again == whole
    assert first.asked + second.asked == box.asked
    assert asker.spent.sent == len(second.asked)
