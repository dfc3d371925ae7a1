"""Whether an answer survives, worked by hand."""

import numpy as np
import pyarrow as pa

from prunery.pipelines.bundles import Bundle, _occurrences, baseline_masks

TEXTS = {7: "Red one. The answer is blue sky. End.", 8: "Blue sky here. Nothing else."}
SPANS = [(7, 0, 9), (7, 9, 33), (7, 33, 37), (8, 0, 15), (8, 15, 28)]


def bundle(answers):
    chunk = np.array([c for c, _, _ in SPANS])
    made = Bundle(
        question={"id": 1, "name": "q", "question": "?", "answers": answers},
        rows=(0, 5),
        ids=np.arange(5),
        passage=chunk * 10,
        chunk=chunk,
        position=np.array([0, 1, 2, 0, 1]),
        tokens=np.full(5, 3),
        start=np.array([a for _, a, _ in SPANS]),
        end=np.array([b for _, _, b in SPANS]),
        texts=TEXTS,
        titles={7: "", 8: ""},
        columns=pa.table({"question_similarity": np.array([0.1, 0.9, 0.2, 0.3, 0.0], "float32")}),
    )
    made.occurrences.extend(_occurrences(made))
    return made


def keep(*rows):
    mask = np.zeros(5, bool)
    mask[list(rows)] = True
    return mask


def test_an_answer_survives_where_one_occurrence_is_whole():
    made = bundle(["blue sky"])
    assert [list(rows) for rows in made.occurrences] == [[1], [3]]
    assert made.survives(keep(1))
    assert made.survives(keep(3, 4))
    assert not made.survives(keep(0, 2, 4))


def test_an_answer_over_two_sentences_needs_both():
    made = bundle(["blue sky. End"])
    assert [list(rows) for rows in made.occurrences] == [[1, 2]]
    assert not made.survives(keep(1))
    assert made.survives(keep(1, 2))


def test_no_answers_and_answers_that_are_not_there():
    assert not bundle(None).asked
    assert bundle(["green"]).asked
    assert not bundle(["green"]).answerable


def test_passages_are_runs_of_sentences():
    assert bundle(None).passages() == [(0, 3), (3, 5)]


def test_baselines_stay_within_the_limit_and_take_their_own_best():
    made = bundle(["blue sky"])
    masks = baseline_masks(made, limit=40, seed=0)
    # cosine: sentence 1 (24 characters), then 3 (15); 2 (4) would be 43; 0 and 4 too.
    assert list(np.flatnonzero(masks["cosine"])) == [1, 3]
    # first_k: the first sentences (9 + 15), then by id the second of passage 7 does not fit
    # (24), the second of passage 8 (13) does.
    assert list(np.flatnonzero(masks["first_k"])) == [0, 3, 4]
    assert made.chars[masks["random"]].sum() <= 40
