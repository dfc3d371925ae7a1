import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pipelines.provence_batches import (
    Special,
    TokenRow,
    batch_by_length,
    collate,
    draw_epoch,
    make_example,
    tokenise_rows,
)
from prunery.pipelines.provence_rows import TrainRow

from ..pruners.models.tiny import tokenizer

SPECIAL = Special(cls=2, sep=3, pad=0, mask=4)


def row(**changed: object) -> TokenRow:
    values = {
        "question": [10, 11],
        "title": [20],
        "sentences": [[30, 31], [40], [50, 51, 52]],
        "labels": (0, 1, -1),
        "answer": [[False, False], [True], [False, False, False]],
        "teacher_score": None,
        "weight": 1.0,
    }
    return TokenRow(**(values | changed))


def test_layout_by_hand() -> None:
    e = make_example(row(), SPECIAL, 64, title=True)
    assert e.ids == [2, 10, 11, 3, 20, 30, 31, 40, 50, 51, 52, 3]
    assert e.start == 4
    assert e.segment == [-1, -1, -1, -1, -1, 0, 0, 1, 2, 2, 2, -1]
    assert e.answer == [-1, -1, -1, -1, -1, 0, 0, 1, 0, 0, 0, -1]
    assert e.labels == [0, 1, -1]
    assert e.relevant
    bare = make_example(row(), SPECIAL, 64, title=False)
    assert bare.ids == [2, 10, 11, 3, 30, 31, 40, 50, 51, 52, 3]


def test_ids_are_those_of_the_sentences_alone() -> None:
    made = tokenise_rows(
        tokenizer(),
        [
            TrainRow(
                question="ab",
                passage="cd. e?",
                title="z",
                sentences=((0, 4), (4, 6)),
                labels=(0, 1),
                answers=("e",),
                group="g",
            )
        ],
    )[0]
    one = tokenizer()(["cd. ", "e?"], add_special_tokens=False)["input_ids"]
    assert made.sentences == one
    assert made.question == [5, 6]
    assert made.title == [30]
    assert made.answer == [[False] * len(one[0]), [True, False]]


def test_window_keeps_the_evidence_and_its_context_before_it() -> None:
    long = row(
        sentences=[[30] * 6, [40] * 2, [50] * 6], answer=[[False] * 6, [True] * 2, [False] * 6]
    )
    e = make_example(long, SPECIAL, 14, title=True)
    # Room for 14 - [CLS] 2 [SEP] title - [SEP] = 8 tokens: the evidence and the sentence before.
    assert e.ids == [2, 10, 11, 3, 20, *[30] * 6, 40, 40, 3]
    assert e.labels == [0, 1]
    assert len(e.ids) == 14


def test_question_leaves_half_the_window_to_the_passage() -> None:
    e = make_example(row(question=[10] * 500), SPECIAL, 40, title=False)
    assert e.start <= 20
    assert len(e.ids) <= 40
    assert e.labels == [0, 1, -1]


def test_a_sentence_beyond_the_window_is_cut() -> None:
    e = make_example(
        row(sentences=[[30] * 90], labels=(1,), answer=[[False] * 90]), SPECIAL, 20, title=False
    )
    assert len(e.ids) == 20
    assert e.labels == [1]
    assert e.segment.count(0) == 15


def test_draws_follow_the_weights_and_the_epoch() -> None:
    rows = [row(weight=w) for w in (0.0, 1.0, 2.0, 0.5)] * 300
    options = {"max_length": 64, "title_dropout": 0.5, "token_mask": 0.0, "seed": 3}
    first = draw_epoch(rows, SPECIAL, epoch=0, **options)
    assert len(first) == pytest.approx(300 * 3.5, rel=0.05)
    assert first == draw_epoch(rows, SPECIAL, epoch=0, **options)
    assert first != draw_epoch(rows, SPECIAL, epoch=1, **options)
    titled = sum(20 in e.ids for e in first) / len(first)
    assert 0.4 < titled < 0.6


def test_masking_spares_special_tokens() -> None:
    made = draw_epoch(
        [row()] * 400, SPECIAL, max_length=64, title_dropout=0.0, token_mask=0.3, seed=0, epoch=0
    )
    inner = [x for e in made for k, x in enumerate(e.ids) if k not in (0, 3, 11)]
    assert 0.25 < inner.count(4) / len(inner) < 0.35
    assert all((e.ids[0], e.ids[3], e.ids[11]) == (2, 3, 3) for e in made)


def test_batches_hold_every_window_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 500).tolist()
    for rng in (None, np.random.default_rng(1)):
        parts = batch_by_length(lengths, 300, rng)
        assert sorted(i for part in parts for i in part) == list(range(500))
        assert all(max(lengths[i] for i in p) * len(p) <= 300 for p in parts)
    assert batch_by_length([900, 5], 300) == [[1], [0]]
    assert batch_by_length([], 300) == []


def test_collate_pads() -> None:
    short = make_example(
        row(sentences=[[30]], labels=(0,), answer=[[False]], teacher_score=1.5),
        SPECIAL,
        64,
        title=False,
    )
    batch = collate([make_example(row(), SPECIAL, 64, title=True), short], SPECIAL)
    assert batch.input_ids[1].tolist() == [2, 10, 11, 3, 30, 3, 0, 0, 0, 0, 0, 0]
    assert batch.attention_mask[1].tolist() == [1] * 6 + [0] * 6
    assert batch.token_type_ids[1].tolist() == [0, 0, 0, 0, 1, 1] + [0] * 6
    assert batch.labels.tolist() == [[0, 1, -1], [0, -1, -1]]
    assert batch.relevant.tolist() == [1, 0]
    assert batch.teacher[0].isnan()
    assert batch.teacher[1] == 1.5


def test_a_tokenizer_without_separators_is_refused() -> None:
    class Bare:
        cls_token_id, sep_token_id, pad_token_id, mask_token_id = None, 1, 2, None

    with pytest.raises(InputError, match="cls, sep and pad"):
        Special.of(Bare())
