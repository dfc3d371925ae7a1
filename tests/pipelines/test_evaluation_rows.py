"""Reading labelled rows: what is accepted, and the message for what is not."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prunery.errors import InputError
from prunery.pipelines.evaluation_rows import (
    answer_sentences,
    cached_rows,
    flatten,
    parse_row,
    read_rows,
    rows_digest,
)

PASSAGE = "Ann met Bob. Bob left in May. Nobody knows why."
GOOD = {
    "question": "When did Bob leave?",
    "passage": PASSAGE,
    "title": "Ann",
    "sentences": [[0, 13], [13, 30], [30, 47]],
    "labels": [0, 1, 0],
    "answers": ["May"],
    "group": "q1",
}


def test_jsonl_gzip_and_parquet_give_the_same_rows(tmp_path):
    lines = json.dumps(GOOD) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    pq.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "c.parquet")
    rows = [read_rows([tmp_path / name]) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    assert rows[0] == rows[1] == rows[2]
    row = rows[0][0]
    assert row.texts == ["Ann met Bob. ", "Bob left in May. ", "Nobody knows why."]
    assert (row.relevant, row.group) == (1, "q1")
    assert len({rows_digest(r) for r in rows}) == 1
    assert rows_digest(rows[0]) != rows_digest(rows[0] * 2)


def test_what_is_absent_is_unknown():
    row = parse_row({"question": "q?", "passage": "One. Two is here."}, where="x")
    assert row.labels is None
    assert row.relevant == -1
    assert row.group == "q?"
    assert "".join(row.texts) == row.passage
    assert parse_row(GOOD | {"labels": [0, 0, 0]}, where="x").relevant == 0
    assert parse_row(GOOD | {"labels": [0, -1, 0]}, where="x").relevant == -1
    assert parse_row(GOOD | {"labels": None, "relevant": 1}, where="x").relevant == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "row 1: `question`"),
        ({"passage": None}, "row 1: `passage`"),
        ({"title": 3}, "row 1: `title`"),
        ({"sentences": [[0, 13], [12, 30]]}, r"`sentences`\[1\].*13 <= start"),
        ({"sentences": [[0, 99]]}, r"`sentences`\[0\].*<= 47"),
        ({"sentences": [[0, 0]]}, r"`sentences`\[0\]"),
        ({"sentences": [3]}, r"`sentences`\[0\]"),
        ({"sentences": []}, "`sentences` is empty"),
        ({"sentences": [[0, 13], [13, 30]], "labels": [0, 1]}, "leave out characters 30 to 47"),
        ({"sentences": [[0, 13], [14, 47]], "labels": [0, 1]}, "leave out characters 13 to 14"),
        ({"sentences": [[4, 47]], "labels": [0]}, "leave out characters 0 to 4"),
        ({"teacher_score": "high"}, "`teacher_score`"),
        ({"labels": [1, 0]}, "`labels` must hold 3"),
        ({"labels": [1, 0, 2]}, "`labels` must hold 3"),
        ({"answers": "May"}, "`answers`"),
        ({"relevant": 2}, "`relevant`"),
    ],
)
def test_bad_rows_are_refused_by_file_row_and_field(tmp_path, change, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(InputError, match=message):
        read_rows([path])


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_rows([tmp_path / "none.jsonl"])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match="unknown ending"):
        read_rows([tmp_path / "a.csv"])
    (tmp_path / "b.jsonl").write_text('{"question": \n')
    with pytest.raises(InputError, match="row 1 is not JSON"):
        read_rows([tmp_path / "b.jsonl"])
    (tmp_path / "c.jsonl").write_text("[]")
    with pytest.raises(InputError, match="JSON object"):
        read_rows([tmp_path / "c.jsonl"])
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(InputError, match="no labelled rows"):
        read_rows([tmp_path / "d.jsonl"])
    (tmp_path / "e.parquet").write_text("PAR1 not")
    with pytest.raises(InputError, match="Parquet"):
        read_rows([tmp_path / "e.parquet"])
    (tmp_path / "f.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(InputError, match="UTF-8"):
        read_rows([tmp_path / "f.jsonl"])


def test_answer_occurrences_by_sentence():
    row = parse_row(GOOD | {"answers": ["Bob", "May. Nobody"]}, where="x")
    assert answer_sentences(row) == [(0, 0), (1, 1), (1, 2)]
    assert answer_sentences(parse_row(GOOD | {"answers": []}, where="x")) == []


def test_rows_are_read_again_when_the_file_changes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD))
    first = cached_rows([str(path)])
    assert cached_rows([str(path)]) is first
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD))
    assert len(cached_rows([str(path)])) == 2
    with pytest.raises(InputError, match="does not exist"):
        cached_rows([str(tmp_path / "none.jsonl")])


def test_white_space_between_borders_goes_to_the_sentence_before():
    bare = GOOD | {"sentences": [[0, 12], [13, 29], [30, 47]]}
    assert parse_row(bare, where="x").sentences == parse_row(GOOD, where="x").sentences


def test_flatten_by_hand():
    other = GOOD | {"group": "q0", "labels": None, "answers": [], "sentences": [[0, 13], [13, 47]]}
    flat = flatten([parse_row(GOOD, where="x"), parse_row(other, where="x")])
    data = flat.data
    assert flat.groups == ["q0", "q1"]
    assert data.passage.tolist() == [0, 0, 0, 1, 1]
    assert data.question.tolist() == [1, 0]
    assert data.chars.tolist() == [13, 17, 17, 13, 34]
    assert data.label.tolist() == [0, 1, 0, -1, -1]
    assert data.relevant.tolist() == [1, -1]
    assert (data.span_question.tolist(), data.span_first.tolist()) == ([1], [1])
    assert data.questions == 2
