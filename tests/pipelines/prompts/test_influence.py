"""The influence of words: by the definition, with halving, within a budget."""

import numpy as np
import pytest

from prunery.errors import BudgetError, InputError
from prunery.pipelines.prompts.asking import Asker, Limits
from prunery.pipelines.prompts.influence import measure_influence

from .scripted import sixteen


def measure(box, rows, labels, shot, words, **more):
    asker = Asker(box, rows, more.pop("limits", Limits()))
    ids = np.arange(len(words), dtype=np.int64) + 100
    return asker, measure_influence(asker, labels, shot, words, ids, **more)


def test_influence_by_the_definition():
    box, rows, labels, shot, words = sixteen()
    _, made = measure(box, rows, labels, shot, words)
    for v, word in enumerate(words):
        with_word = box.label_logprobs([word], rows)[0].astype(np.float64)
        without = box.label_logprobs([""], rows)[0].astype(np.float64)
        gain = np.mean([with_word[n, y] - without[n, y] for n, y in enumerate(labels)])
        assert made.influence["log_likelihood"][v] == pytest.approx(gain, abs=1e-6)
        divergence = np.mean((np.exp(with_word) * (with_word - without)).sum(axis=1))
        assert made.influence["kl"][v] == pytest.approx(divergence, abs=1e-6)
        right = np.mean(with_word.argmax(1) == labels) - np.mean(without.argmax(1) == labels)
        assert made.accuracy[v] == pytest.approx(right)
    assert made.finalist.all()
    assert (made.rows_seen == 16).all()
    assert (made.tokens == 2 * 16).all()


def test_every_word_is_asked_once_on_every_row_and_nothing_more():
    box, rows, labels, shot, words = sixteen()
    asker, _ = measure(box, rows, labels, shot, words)
    assert len(box.asked) == len(set(box.asked)) == 16 * (1 + len(words))
    assert asker.spent.queries == asker.spent.sent == len(box.asked)


def test_halving_asks_less_and_never_twice():
    box, rows, labels, shot, words = sixteen(words=16)
    _, made = measure(box, rows, labels, shot, words, start_shots=2)
    # 16 words on 4 rows, 8 on 4 more, 4 on the last 8, and the empty prompt on all 16.
    assert len(box.asked) == len(set(box.asked)) == 16 + 16 * 4 + 8 * 4 + 4 * 8
    assert made.finalist.sum() == 4
    assert sorted(made.rows_seen.tolist()) == [4] * 8 + [8] * 4 + [16] * 4
    whole = sixteen(words=16)
    _, full = measure(*whole)
    for v in np.flatnonzero(made.finalist):
        for name, value in full.influence.items():
            assert made.influence[name][v] == pytest.approx(value[v])
    seen = made.rows_seen == 4
    four = measure(sixteen(words=16)[0], rows[:4], labels[:4], shot[:4], words)[1]
    np.testing.assert_allclose(made.influence["gap"][seen], four.influence["gap"][seen])


def test_halving_leaves_as_many_as_will_be_kept():
    box, rows, labels, shot, words = sixteen(words=16)
    _, made = measure(box, rows, labels, shot, words, start_shots=2, least=7)
    assert made.finalist.sum() == 7


def test_the_budget_is_hard():
    for limit in (0, 15, 16, 100, 16 * 13 - 1):
        box, rows, labels, shot, words = sixteen()
        with pytest.raises(BudgetError, match="max_queries"):
            measure(box, rows, labels, shot, words, limits=Limits(queries=limit))
        assert len(box.asked) <= limit
    box, rows, labels, shot, words = sixteen()
    measure(box, rows, labels, shot, words, limits=Limits(queries=16 * 13))


def test_bad_input_is_refused():
    box, rows, labels, shot, words = sixteen()
    with pytest.raises(InputError, match="no.*word|found none"):
        measure(box, rows, labels, shot, [])
    with pytest.raises(InputError, match="order of their shots"):
        measure(box, rows, labels, shot[::-1], words)


def test_all_ties():
    box, rows, labels, shot, words = sixteen()
    box.effects = {word: np.zeros(2) for word in words}
    _, made = measure(box, rows, labels, shot, words, start_shots=2)
    assert all((value == 0).all() for value in made.influence.values())
    assert made.finalist.tolist() == [True] * 3 + [False] * 9  # ties go to the smaller id
