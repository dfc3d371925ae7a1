"""Micro-batches taken apart into samples and put together again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pipelines.online_window import (
    IGNORE,
    Piece,
    by_length,
    candidates,
    check_batch,
    pieces_of,
    places,
    regroup,
    relabel,
    scatter,
)


def padded(rows, width=None, left=False):
    width = width or max(len(row) for row in rows)
    ids, mask, labels = [], [], []
    for row in rows:
        gap = width - len(row)
        fill = ([0] * gap, []) if left else ([], [0] * gap)
        ids.append(fill[0] + row + fill[1])
        mask.append(fill[0] + [1] * len(row) + fill[1])
        none = [IGNORE] * gap
        labels.append(none + row if left else row + none)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def packed(documents):
    ids = torch.tensor([token for document in documents for token in document])
    places = [n for document in documents for n in range(len(document))]
    lengths = torch.tensor([len(document) for document in documents])
    borders = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return {
        "input_ids": ids[None],
        "labels": ids[None].clone(),
        "position_ids": torch.tensor([places]),
        "cu_seq_lens_q": borders.to(torch.int32),
        "max_length_q": int(lengths.max()),
        "seq_idx": torch.repeat_interleave(
            torch.arange(len(documents), dtype=torch.int32), lengths
        )[None],
    }


@pytest.mark.parametrize("left", [False, True])
def test_pieces_by_hand(left):
    window = [padded([[5, 6, 7], [8, 9]], width=4, left=left), padded([[4]], left=left)]
    spans = [(1, 4), (2, 4)] if left else [(0, 3), (0, 2)]
    assert pieces_of(window) == [
        Piece(0, 0, *spans[0]),
        Piece(0, 1, *spans[1]),
        Piece(1, 0, 0, 1),
    ]
    found = candidates(window, pieces_of(window))
    wanted = [[0, 0, 1, 1], [0, 0, 0, 1]] if left else [[0, 1, 1, 0], [0, 1, 0, 0]]
    assert found[0].int().tolist() == wanted
    assert found[1].tolist() == [[False]]
    position, owner = places(pieces_of(window), found)
    assert position.tolist() == [1, 2, 1]
    assert owner.tolist() == [0, 0, 1]


def test_packed_pieces_by_hand():
    window = [packed([[5, 6, 7], [8, 9]])]
    assert pieces_of(window) == [Piece(0, 0, 0, 3), Piece(0, 0, 3, 5)]
    assert candidates(window, pieces_of(window))[0].int().tolist() == [[0, 1, 1, 0, 1]]


def test_a_row_that_is_all_padding_is_no_sample():
    batch = padded([[5, 6], [7, 8]])
    batch["attention_mask"][1] = 0
    assert pieces_of([batch]) == [Piece(0, 0, 0, 2)]


def test_regroup_by_hand():
    window = [padded([[5, 6, 7, 8], [9, 9]]), padded([[3, 4, 5]])]
    one, two, three = pieces_of(window)
    short, long = regroup(window, [one, three], pad=77)
    assert short["input_ids"].tolist() == [[3, 4, 5]]
    assert long["input_ids"].tolist() == [[5, 6, 7, 8]]
    both, stub = regroup([*window[:1], window[1]], [two], pad=77, multiple=4)
    assert both["labels"].tolist() == [[IGNORE, IGNORE, IGNORE, IGNORE]]
    assert stub["input_ids"].tolist() == [[9, 9, 77, 77]]
    assert stub["attention_mask"].tolist() == [[1, 1, 0, 0]]
    assert stub["labels"].tolist() == [[9, 9, IGNORE, IGNORE]]


def test_rows_without_a_mask_get_one_where_lengths_differ():
    window = [padded([[5, 6, 7], [1, 2, 3]]), padded([[8, 9], [4, 4]])]
    for batch in window:
        del batch["attention_mask"]
    pieces = pieces_of(window)
    first, second = regroup(window, [pieces[0], *pieces[2:]], pad=0)
    assert first["input_ids"].tolist() == [[8, 9]]
    assert "attention_mask" not in first
    assert second["input_ids"].tolist() == [[4, 4, 0], [5, 6, 7]]
    assert second["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_borders_of_packed_rows_are_made_anew():
    window = [packed([[5, 6, 7], [8, 9], [4, 4, 4, 4]]), packed([[1, 2]])]
    pieces = pieces_of(window)
    first, second = regroup(window, [pieces[0], pieces[1], pieces[2]], pad=0)
    assert first["input_ids"].tolist() == [[8, 9]]
    assert second["input_ids"].tolist() == [[5, 6, 7, 4, 4, 4, 4]]
    assert second["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert second["cu_seq_lens_q"].tolist() == [0, 3, 7]
    assert second["cu_seq_lens_q"].dtype == torch.int32
    assert second["max_length_q"] == 4
    assert second["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    assert "cu_seq_lens_k" not in second, "no more keys than the collator gave"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=9),
    groups=st.integers(1, 4),
    keep=st.integers(0, 2**9 - 1),
    left=st.booleans(),
    pack=st.booleans(),
)
def test_no_token_is_lost_or_trained_twice(lengths, groups, keep, left, pack):
    rows = [[10 * n + k + 1 for k in range(length)] for n, length in enumerate(lengths)]
    parts = [rows[start::groups] for start in range(groups) if rows[start::groups]]
    window = [packed(part) if pack else padded(part, left=left) for part in parts]
    pieces = pieces_of(window)
    assert len(pieces) == len(rows)
    kept = [piece for n, piece in enumerate(pieces) if keep >> n & 1]
    made = regroup(window, kept, pad=0)
    assert len(made) == len(window)
    trained = sorted(
        int(token) for batch in made for token in batch["labels"].flatten() if token != IGNORE
    )
    wanted = sorted(
        int(token)
        for piece in kept
        for token in window[piece.batch]["input_ids"][piece.row, piece.start : piece.stop]
    )
    assert trained == wanted
    for batch in made:
        assert batch["input_ids"].numel() > 0
        on = batch["labels"] != IGNORE
        assert torch.equal(batch["labels"][on], batch["input_ids"][on])
    sizes = [len(pieces_of([batch])) for batch in made]
    assert max(sizes) - min(sizes) <= 1
    if not pack and kept:
        full = [batch["attention_mask"] for batch in made if (batch["labels"] != IGNORE).any()]
        assert all((mask.sum(1).max() == mask.shape[1]) for mask in full), "padding is trimmed"


def test_scatter_and_relabel():
    window = [padded([[5, 6, 7], [8, 9]]), padded([[3, 4]])]
    trainable = candidates(window, pieces_of(window))
    keep = scatter(torch.tensor([True, False, True, False]).numpy(), trainable)
    weight = scatter(torch.tensor([2.0, 3.0, 4.0, 5.0]).numpy(), trainable)
    made = relabel(window, keep, weight)
    assert made[0]["labels"].tolist() == [[IGNORE, 6, IGNORE], [IGNORE, 9, IGNORE]]
    assert made[1]["labels"].tolist() == [[IGNORE, IGNORE]]
    assert made[0]["prunery_weight"].tolist() == [[0, 2, 3], [0, 4, 0]]
    assert made[1]["prunery_weight"].tolist() == [[0, 5]]
    assert window[0]["labels"][0].tolist() == [5, 6, 7], "the batch given is not written to"
    assert torch.equal(made[0]["input_ids"], window[0]["input_ids"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "`labels`"),
        ({"input_ids": [[1, 2]]}, "`input_ids`"),
        ({"pixels": torch.zeros(2, 3, 4)}, "`pixels`"),
        ({"shift_labels": torch.zeros(2, 3)}, "`shift_labels`"),
        ({"note": "text"}, "`note`"),
    ],
)
def test_other_batches_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        check_batch(padded([[5, 6, 7], [8, 9]]) | change)
    check_batch(padded([[5, 6, 7], [8, 9]]))
    check_batch(packed([[5, 6, 7], [8, 9]]))


def test_scoring_order_by_hand():
    window = [padded([[5, 6, 7, 8], [9, 9]]), padded([[3, 4, 5]])]
    scored, order = by_length(window, pieces_of(window), pad=0)
    assert order.tolist() == [1, 2, 0]
    assert [batch["input_ids"].tolist() for batch in scored] == [
        [[9, 9]],
        [[3, 4, 5, 0], [5, 6, 7, 8]],
    ]
    rows = [packed([[5, 6, 7], [8, 9]])]
    scored, order = by_length(rows, pieces_of(rows), pad=0)
    assert order.tolist() == [0, 1]
    assert scored[0] is rows[0]
