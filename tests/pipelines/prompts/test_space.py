"""`PromptSpace`: the stages of a recipe in a notebook, over anything that answers."""

import dataclasses

import numpy as np
import pytest

import prunery
from prunery.errors import BudgetError, InputError, ModelError, RecipeError
from prunery.pipelines.prompts.asking import Limits
from prunery.pipelines.prompts.space import PromptSpace

from .planted import Planted, make_rows
from .scripted import sixteen
from .test_prompt_run import finished, recipe, rows  # noqa: F401  fixtures


def space_of(box, texts, labels, words, **more):
    return PromptSpace(box, rows=texts, labels=labels, words=words, **more)


@pytest.fixture
def small():
    box, texts, labels, _, words = sixteen()
    return space_of(box, texts, labels, words)


class Bare:
    """The least that answers: no classes, no count of tokens."""

    def __init__(self, box):
        self.box = box

    def label_logprobs(self, prompts, texts):
        return self.box.label_logprobs(prompts, texts).tolist()


def test_the_name_is_public():
    assert prunery.PromptSpace is PromptSpace


def test_influences_by_their_definition(small):
    made = small.score()
    box, texts, labels = small.box, small.rows, small.labels
    gold = np.arange(len(texts)), labels
    empty = box.label_logprobs([""], texts)[0][gold].mean(dtype=np.float64)
    for place, word in enumerate(small.words):
        mine = box.label_logprobs([word], texts)[0][gold].mean(dtype=np.float64)
        assert made.influence.influence["log_likelihood"][place] == pytest.approx(mine - empty)
    assert small.influence is None


def test_every_query_is_counted():
    held = Planted({"w1": 1.0})
    space = space_of(held, *make_rows(8)[:2], [f"w{n}" for n in range(12)])
    found = space.score().prune(count=4).search("random", length=2, prompts=10)
    assert found.queries == len(held.asked) == 16 * (1 + 12 + 10)
    assert found.tokens == sum(len(prompt.split()) + 1 for prompt, _ in held.asked)
    made = found.verdict((["0/90", "1/91"], [0, 1]), (["0/92", "1/93", "1/94"], [0, 1, 1]))
    assert made.queries == len(held.asked) == found.queries + 2 * (2 + 3)
    assert [stage.name for stage in made.history] == [
        "words",
        "score",
        "prune",
        "search",
        "verdict",
    ]
    assert [stage.words for stage in made.history] == [12, 12, 4, 4, 4]


def test_pruned_words_are_the_best_in_order(small):
    made = small.score()
    score = made.influence.influence["log_likelihood"].astype(np.float32)
    order = sorted(range(12), key=lambda place: (-score[place], made.ids[place]))
    pruned = made.prune(keep=0.3)
    assert list(pruned.words) == [small.words[place] for place in order[:4]]
    assert pruned.selection.keep.sum() == 4
    assert pruned.parent is made
    # What was measured of the words goes with them.
    kept = pruned.influence.influence["log_likelihood"].astype(np.float32)
    np.testing.assert_array_equal(kept, score[order[:4]])
    assert pruned.prune(count=2).words == pruned.words[:2]
    assert made.prune().words == made.prune(keep=0.1).words


def test_greedy_is_brute_force_where_words_add_up(small):
    found = small.search("greedy", length=2)
    every = [f"{a} {b}" for a in small.words for b in small.words] + list(small.words)
    answers = small.box.label_logprobs(every, small.rows)
    gold = answers[:, np.arange(16), small.labels].mean(axis=1, dtype=np.float64)
    assert found.best.reward <= gold.max() + 1e-9
    assert found.best.reward == pytest.approx(gold[every.index(found.prompt)])
    assert found.best.reward == max(found.rewards)


def test_planted_words_come_through_to_the_verdict():
    strong = [f"good{n}" for n in range(4)]
    box = Planted(dict.fromkeys(strong, 1.5))
    texts, labels, _ = make_rows(16)
    words = [*(f"w{n}" for n in range(36)), *strong]
    space = space_of(box, texts, labels, words).score().prune(keep=0.1)
    assert set(space.words) == set(strong)
    found = space.search("genetic", length=3, prompts=60, population=20)
    held, held_labels = [f"{c}/{n}" for n in range(50, 100) for c in (0, 1)], [0, 1] * 50
    test, test_labels = [f"{c}/{n}" for n in range(200, 260) for c in (0, 1)], [0, 1] * 60
    control = space.parent.prune(count=4, method="random_prompts").search("random", prompts=5)
    made = found.verdict(
        (held, held_labels), (test, test_labels), manual="w1", control=control, finalists=3
    )
    assert made.taken
    assert made.prompt in found.finalists(3)
    assert made.accuracy("found") > made.accuracy("empty") + 0.1
    answers = box.label_logprobs(["w1"], test)[0]
    assert made.accuracy("manual") == pytest.approx((answers.argmax(1) == test_labels).mean())
    assert {row["contender"] for row in made.rows} == {"found", "empty", "manual", "control"}


def test_a_prompt_that_does_not_clearly_win_is_not_taken(small):
    found = small.search("greedy", length=1)
    texts = [f"{row}!" for row in small.rows]
    small.box.box.base |= {f"{row}!": small.box.box.base[row] for row in small.rows}
    made = found.verdict((texts, small.labels), manual=found.prompt, judge="log_likelihood")
    assert (made.chosen, made.taken, made.prompt) == ("manual", False, found.prompt)
    with pytest.raises(InputError, match="nothing is known of 'found' on the test rows"):
        made.accuracy("found", "test")


# -- nothing is ever changed -------------------------------------------------------------------


def test_stages_cannot_be_changed(small):
    scored = small.score()
    for stage in (small, scored, scored.search("random", prompts=2), scored.history[0]):
        name = dataclasses.fields(stage)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(stage, name, None)
    with pytest.raises(ValueError, match="read-only"):
        small.labels[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        small.ids[0] = 1


def test_what_was_given_may_change_afterwards():
    box, texts, labels, _, words = sixteen()
    space = space_of(box, texts, labels, words)
    before = (space.rows, space.words, space.labels.copy())
    texts.clear(), words.clear()
    labels[:] = 0
    assert (space.rows, space.words) == before[:2]
    np.testing.assert_array_equal(space.labels, before[2])


def test_digests_follow_the_parameters_and_the_parents(small):
    def last(space):
        return space.history[-1].digest

    scored = small.score()
    assert last(scored) == last(small.score())
    assert last(scored.prune(keep=0.2)) == last(scored.prune(keep=0.2))
    assert last(scored.prune(keep=0.2)) != last(scored.prune(keep=0.3))
    other = small.score(halving=2)
    assert last(other) != last(scored)
    assert last(other.prune(count=1)) != last(scored.prune(count=1))
    box, texts, labels, _, words = sixteen()
    assert last(space_of(box, texts, labels, words[::-1])) != last(small)


# -- halving and budgets -------------------------------------------------------------------------


def test_rows_of_each_class_are_dealt_out_evenly_to_halving():
    box = Planted({"w3": 1.0})
    texts, labels, _ = make_rows(8)
    order = np.argsort(labels, kind="stable")  # all of one class, then all of the other
    words = [f"w{n}" for n in range(20)]
    space = space_of(box, [texts[place] for place in order], labels[order], words)
    assert list(space.rows) == texts
    made = space.score(halving=2, least=0.1)
    first = [row for prompt, row in box.asked if prompt == words[-1]]
    assert sorted(row.partition("/")[0] for row in first[:4]) == ["0", "0", "1", "1"]
    assert made.queries == 16 + 20 * 4 + 10 * 4 + 5 * 8 == len(box.asked)
    assert list(made.prune(count=5).selection.keep) == list(made.influence.finalist)
    with pytest.raises(BudgetError, match="`least`"):
        made.prune(count=6)


def test_budgets_are_hard(small):
    with pytest.raises(BudgetError, match="max_queries"):
        small.score(budget=Limits(queries=16 * 12))
    assert small.score(budget=Limits(queries=16 * 13)).queries == 16 * 13
    found = small.search("random", prompts=50, budget=Limits(queries=16 * 7 + 15))
    assert (len(found.rewards), found.searched.stop) == (7, "queries")
    with pytest.raises(BudgetError, match="one prompt"):
        small.search("random", budget=Limits(queries=15))


# -- the user's own box -------------------------------------------------------------------------


def test_a_box_needs_one_method_alone(small):
    box, texts, labels, _, words = sixteen()
    bare = space_of(Bare(box), texts, labels, words)
    mine, full = bare.score(), small.score()
    for name, values in full.influence.influence.items():
        np.testing.assert_allclose(mine.influence.influence[name], values, atol=1e-6)
    assert (mine.queries, mine.tokens) == (full.queries, 0)
    assert mine.prune(count=3).search("greedy", length=2).tokens == 0
    for limits in (Limits(tokens=10), Limits(cost=1.0, input_price=1.0, output_price=1.0)):
        with pytest.raises(InputError, match="input_tokens"):
            bare.score(budget=limits)


class Answers:
    """Gives the same array whatever it is asked."""

    def __init__(self, made, **more):
        self.made = made
        self.__dict__.update(more)

    def label_logprobs(self, prompts, texts):
        return self.made(len(prompts), len(texts))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda p, n: np.zeros((p, n)), r"gave shape \(1, 4\)"),
        (lambda p, n: np.log(np.full((p, n, 3), 1 / 3)), r"\(1, 4, 2\) was expected"),
        (lambda p, n: np.full((p, n, 2), -0.1), "sum to 1"),
        (lambda p, n: np.full((p, n, 2), 0.5), "Take the log-softmax"),
        (lambda p, n: np.full((p, n, 2), np.nan), r"row 'a' it gave \[nan, nan\]"),
    ],
)
def test_answers_that_are_no_log_probabilities(made, message):
    space = space_of(Answers(made), list("abcd"), [0, 1, 0, 1], ["w"])
    with pytest.raises(ModelError, match=message):
        space.score()


def test_a_certain_answer_is_refused_by_name():
    certain = Answers(lambda p, n: np.broadcast_to(np.array([0.0, -np.inf]), (p, n, 2)))
    with pytest.raises(ModelError, match="not finite for prompt ''"):
        space_of(certain, ["a", "b"], [0, 1], ["w"]).score()


@pytest.mark.parametrize(
    ("box", "labels", "message"),
    [
        (object(), [0, 1], "found object"),
        (Answers(None), [0, 0], "at least 2 classes"),
        (Answers(None, classes=2), [0, 2], "highest label of 2"),
    ],
)
def test_boxes_that_do_not_fit(box, labels, message):
    with pytest.raises(InputError, match=message):
        space_of(box, ["a", "b"], labels, ["w"])


# -- what is given wrongly -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"words": []}, "found none. Give `words`"),
        ({"words": ["a", " "]}, "word 1 is ' '"),
        ({"words": ["a", 7]}, "word 1 is 7"),
        ({"words": ["a", "b", "a"]}, "word 2, 'a', stands twice"),
        ({"texts": [], "labels": []}, "at least one text"),
        ({"labels": [0, 1, 0]}, r"2 texts and labels \(3,\)"),
        ({"labels": [0.0, 1.0]}, "whole numbers"),
        ({"labels": [0, -1]}, "codes from 0"),
        ({"texts": ["a", "\n"]}, "row 1 has no text"),
    ],
)
def test_spaces_that_cannot_be(more, message):
    given = {"box": Answers(None), "texts": ["x", "y"], "labels": [0, 1], "words": ["w"], **more}
    with pytest.raises(InputError, match=message):
        space_of(**given)


def test_stages_that_cannot_be(small):
    with pytest.raises(InputError, match="Call `score` first"):
        small.prune()
    with pytest.raises(InputError, match="give one of them"):
        small.score().prune(keep=0.1, count=2)
    with pytest.raises(InputError, match="known: log_likelihood"):
        small.score("accuracy")
    with pytest.raises(InputError, match="prune:"):
        small.score().prune(method="el2n")
    with pytest.raises(RecipeError, match="unknown search"):
        small.search("annealing")
    with pytest.raises(RecipeError, match="popullation"):
        small.search("genetic", popullation=3)
    none = small.score().prune(count=0)
    assert none.words == ()
    with pytest.raises(InputError, match="no word"):
        none.search()
    with pytest.raises(InputError, match="expected words"):
        none.score()


def test_no_text_stands_in_two_parts(small):
    found = small.search("random", prompts=2)
    with pytest.raises(InputError, match="`rows` and in `validation`"):
        found.verdict((["ROW  0", "new"], [0, 1]))
    with pytest.raises(InputError, match="`validation` and in `test`"):
        found.verdict((["new", "old"], [0, 1]), (["older", "New"], [0, 1]))
    with pytest.raises(InputError, match="`validation`: expected at least one text"):
        found.verdict(([], []))


# -- clusters and control ------------------------------------------------------------------------


def test_one_word_of_each_cluster_stays(small):
    vectors = np.repeat(np.eye(4), 3, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(12, 4))
    made = small.cluster(vectors, k=4)
    assert sorted(small.words.index(word) // 3 for word in made.words) == [0, 1, 2, 3]
    assert list(made.ids) == sorted(made.ids)
    assert made.clusters.keep.sum() == 4
    assert len(made.clusters.cluster) == 12
    again = small.cluster(lambda words: vectors, k=4)
    assert again.words == made.words
    scored = small.score().cluster(vectors, k=4)
    assert scored.words == made.words
    assert scored.influence.accuracy.shape == (4,)
    # At most twice the published number: every word stands for itself, nothing is needed.
    assert set(small.cluster().words) == set(small.words)
    with pytest.raises(InputError, match="needs a vector for each word"):
        small.cluster(k=4)
    with pytest.raises(InputError, match=r"expected vectors \(12, d\)"):
        small.cluster(vectors[:3], k=2)


def test_the_control_is_as_large_and_needs_no_influence(small):
    drawn = small.prune(keep=0.3, method="random_prompts", seed=4)
    assert len(drawn.words) == len(small.score().prune(keep=0.3).words) == 4
    assert drawn.words == small.score().prune(keep=0.3, method="random_prompts", seed=4).words
    assert drawn.words != small.prune(keep=0.3, method="random_prompts", seed=5).words


# -- the same as a recipe ------------------------------------------------------------------------


def test_the_numbers_of_a_recipe(finished, models):  # noqa: F811
    part = {}
    for row in sorted(rows(finished, "task"), key=lambda r: (r["shot"], r["label"], r["id"])):
        part.setdefault(row["part"], []).append(row)
    texts = {name: [row["text"] for row in own] for name, own in part.items()}
    labels = {name: [row["label"] for row in own] for name, own in part.items()}
    words = [row["text"] for row in rows(finished, "vocabulary") if row["keep"]]
    classes = finished.store.table(finished.manifests["task"].key).manifest.notes["classes"]
    space = PromptSpace.from_model(
        models[0], rows=texts["train"], labels=labels["train"], classes=classes, words=words
    )
    pruned = space.score().prune(keep=0.4)
    decided = [row for row in rows(finished, "prune") if row["keep"]]
    assert set(pruned.words) == {row["text"] for row in decided}
    options = {"population": 12, "mutants": 6, "crossovers": 6}
    found = pruned.search("genetic", length=2, prompts=40, **options)
    asked = rows(finished, "search")
    assert [one.prompt for one in found.searched.asked] == [row["prompt"] for row in asked]
    np.testing.assert_allclose(found.rewards, [row["reward"] for row in asked], atol=1e-6)
    control = space.prune(keep=0.4, method="random_prompts").search("random", length=2, prompts=40)
    verdict = found.verdict(
        *((texts[name], labels[name]) for name in ("validation", "test")),
        manual="about",
        control=control,
    )
    stored = rows(finished, "test")
    for mine, theirs in zip(verdict.rows, stored, strict=True):
        assert {k: v for k, v in mine.items() if isinstance(v, str | bool)} == {
            k: v for k, v in theirs.items() if isinstance(v, str | bool)
        }
        assert mine["accuracy"] == pytest.approx(theirs["accuracy"])


def test_a_model_s_own_words_and_vectors(models):
    given = {"rows": ["a ship", "a farm"], "labels": [0, 1], "classes": ["sea", "land"]}
    space = PromptSpace.from_model(models[0], **given)
    assert len(space.words) > 3
    assert all(word.isalpha() for word in space.words)
    made = space.cluster(k=3)
    assert len(made.words) <= 3
    with pytest.raises(RecipeError, match="template"):
        PromptSpace.from_model(models[0], **given, template="{txt}")
    with pytest.raises(InputError, match="Give `words`"):
        PromptSpace.from_model("m", **given, black_box="endpoint", base_url="http://127.0.0.1:9/v1")
