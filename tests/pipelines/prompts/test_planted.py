"""Words planted in a synthetic black box are found again: full pass and successive halving."""

import numpy as np
import pytest

from prunery.pipelines.prompts.halving import advance, queries, rows_of, schedule
from prunery.pipelines.prompts.search import rounds, start
from prunery.pruners.contract import Signals
from prunery.pruners.prompt.claps import Claps
from prunery.pruners.prompt.random_prompts import RandomPrompts
from prunery.pruners.signals.black_box import BlackBox
from prunery.pruners.signals.prompt_rewards import influence, rewards

from .planted import Planted, make_rows, make_vocabulary

SIZE, PLANTED, SHOTS = 600, 60, 16


def measure(box, words, texts, labels, shot, ids, reward, start_shots, least):
    """Influences of all words; those that halving drops lie below all that go on."""
    empty = box.label_logprobs([""], texts)[0]
    score = np.full(len(words), -np.inf)
    answers = np.zeros((len(words), len(texts), box.classes), np.float32)
    alive, before = np.arange(len(words)), 0
    for number, rung in enumerate(schedule(len(words), SHOTS, start_shots, least=least)):
        if number:
            alive = alive[advance(score[alive], ids[alive], rung.candidates)]
            score[:] = -np.inf
        new = rows_of(shot, rung.shots, before)
        asked = box.label_logprobs([words[i] for i in alive], [texts[i] for i in new])
        answers[np.ix_(alive, new)] = asked
        seen = rows_of(shot, rung.shots)
        score[alive] = influence(answers[np.ix_(alive, seen)], labels[seen], empty[seen])[reward]
        before = rung.shots
    return score, alive


def recall(kept, words, planted):
    return np.mean([kept[words.index(word)] for word in planted])


@pytest.mark.parametrize("reward", ["log_likelihood", "gap", "kl"])
@pytest.mark.parametrize("start_shots", [SHOTS, 4])
@pytest.mark.parametrize("classes", [2, 4])
def test_planted_words_are_kept(reward, start_shots, classes):
    words, planted = make_vocabulary(SIZE, PLANTED)
    texts, labels, shot = make_rows(SHOTS, classes)
    ids = np.random.default_rng(0).permutation(SIZE)
    box = Planted(planted, classes)
    assert isinstance(box, BlackBox)
    score, alive = measure(box, words, texts, labels, shot, ids, reward, start_shots, PLANTED)
    # The words that saw all rows are what is decided about.
    signals = Signals({"id": ids[alive], "prompt_influence": score[alive].astype(np.float32)})
    kept = np.zeros(SIZE, bool)
    kept[alive] = Claps(keep=PLANTED / len(alive))(signals, seed=0).keep
    assert kept.sum() == PLANTED
    assert recall(kept, words, planted) >= 0.95
    # The bill: as planned, each pair once.
    plan = schedule(SIZE, SHOTS, start_shots, least=PLANTED)
    assert len(box.asked) == queries(plan, lambda s: len(rows_of(shot, s)))
    assert len(set(box.asked)) == len(box.asked)


def test_random_words_are_not_the_planted_ones():
    """The recall above is not given away: chance, and a box that is mostly noise, have far less."""
    words, planted = make_vocabulary(SIZE, PLANTED)
    texts, labels, shot = make_rows(SHOTS)
    ids = np.arange(SIZE)
    control = RandomPrompts()(Signals({"id": ids}), seed=0).keep
    assert recall(control, words, planted) < 0.3
    score, _ = measure(
        Planted(planted, noise=8.0), words, texts, labels, shot, ids, "gap", SHOTS, PLANTED
    )
    assert recall(advance(score, ids, PLANTED), words, planted) < 0.6


@pytest.mark.parametrize("method", ["greedy", "genetic", "particle_swarm", "random"])
def test_a_search_in_the_planted_words_beats_one_in_random_words(method):
    """At equal prompts, by what it is searched for and on rows that it has not seen."""
    words, planted = make_vocabulary(SIZE, 20, strength=0.5)
    box = Planted(planted, noise=0.2)
    texts, labels, _ = make_rows(2 * SHOTS)
    train, held = slice(0, 2 * SHOTS), slice(2 * SHOTS, None)
    empty = box.label_logprobs([""], texts)[0]
    control = [words[i] for i in np.random.default_rng(1).choice(SIZE, 20, replace=False)]

    def found(space):
        def ask(prompts):
            told = [" ".join(space[word] for word in prompt) for prompt in prompts]
            answers = box.label_logprobs(told, texts[train])
            return rewards(answers, labels[train], empty[train])["log_likelihood"]

        best = (-np.inf, ())
        run = start(method, {}, vocabulary=len(space), length=3, prompts=300, seed=0)
        for step in rounds(run, ask):
            place = int(np.argmax(step.rewards))
            best = max(best, (step.rewards[place], step.prompts[place]))
        told = " ".join(space[word] for word in best[1])
        answers = box.label_logprobs([told], texts[held])
        return best[0], rewards(answers, labels[held], empty[held])["log_likelihood"][0]

    pruned, random = found(list(planted)), found(control)
    assert pruned[0] > random[0] + 0.05
    assert pruned[1] > random[1] + 0.05
