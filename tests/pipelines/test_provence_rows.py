import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prunery.errors import InputError
from prunery.pipelines.evaluation_rows import read_rows as read_evaluation_rows
from prunery.pipelines.provence_rows import (
    TrainRow,
    read_rows,
    row_from,
    split_by_group,
    write_rows,
)

GOOD: dict[str, Any] = {
    "question": "who",
    "passage": "A b. C d.",
    "title": "T",
    "sentences": [[0, 5], [5, 9]],
    "labels": [1, -1],
    "answers": ["b"],
    "teacher_score": 2.5,
    "group": "g",
    "weight": 0.5,
}


def test_row_is_read_field_by_field() -> None:
    row = row_from(GOOD, "f, row 1")
    assert row.texts == ["A b. ", "C d."]
    assert (row.labels, row.answers, row.teacher_score) == ((1, -1), ("b",), 2.5)
    assert (row.group, row.weight, row.relevant) == ("g", 0.5, True)


def test_optional_fields_have_defaults() -> None:
    keep = ("question", "passage", "sentences", "labels")
    row = row_from({k: GOOD[k] for k in keep}, "f, row 1")
    assert (row.title, row.answers, row.teacher_score) == (None, (), None)
    assert (row.group, row.weight) == ("who", 1.0)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"question": " "}, "question"),
        ({"passage": 3}, "passage"),
        ({"title": ["T"]}, "title"),
        ({"sentences": [[0, 5], [4, 9]]}, "sentences"),
        ({"sentences": [[0, 5], [5, 10]]}, "sentences"),
        ({"sentences": [[0, 5, 9]]}, "sentences"),
        ({"sentences": []}, "sentences"),
        ({"sentences": None}, "sentences"),
        ({"labels": [1]}, "labels"),
        ({"labels": [1, 2]}, "labels"),
        ({"labels": [1, True]}, "labels"),
        ({"answers": [1]}, "answers"),
        ({"teacher_score": float("nan")}, "teacher_score"),
        ({"weight": -1}, "weight"),
        ({"weight": True}, "weight"),
    ],
)
def test_bad_rows_are_refused_by_file_row_and_column(change: dict[str, Any], column: str) -> None:
    with pytest.raises(InputError, match=rf"rows\.jsonl, row 7, {column}: expected"):
        row_from(GOOD | change, "rows.jsonl, row 7")


def test_files_round_trip(tmp_path: Path) -> None:
    rows = [row_from(GOOD, ""), row_from(GOOD | {"title": None, "teacher_score": None}, "")]
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert write_rows(tmp_path / name, rows) == 2
        assert read_rows(tmp_path / name) == rows
    pq.write_table(pa.Table.from_pylist([GOOD, GOOD]), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [rows[0]] * 2
    again = tmp_path / "b.jsonl.gz"
    write_rows(again, rows)
    assert again.read_bytes() == (tmp_path / "a.jsonl.gz").read_bytes()


def test_evaluation_reads_the_same_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [row_from(GOOD, "")])
    found = list(read_evaluation_rows([tmp_path / "a.jsonl"]))
    assert found[0].texts == ["A b. ", "C d."]
    assert found[0].labels == (1, -1)


def test_unreadable_files_say_which(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n{broken\n")
    with pytest.raises(InputError, match="line 2"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match="JSON object"):
        read_rows(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(InputError, match="found none"):
        read_rows(tmp_path / "c.jsonl")


def test_split_is_by_question_and_does_not_depend_on_order() -> None:
    rows = [
        TrainRow(
            question=f"q{i % 40}",
            passage="x",
            sentences=((0, 1),),
            labels=(i % 2,),
            group=f"q{i % 40}",
        )
        for i in range(120)
    ]
    train, valid = split_by_group(rows, 0.25, seed=1)
    assert len(train) + len(valid) == 120
    assert not {r.group for r in train} & {r.group for r in valid}
    assert 0.1 < len(valid) / 120 < 0.45
    assert {r.group for r in split_by_group(rows[::-1], 0.25, seed=1)[1]} == {
        r.group for r in valid
    }
    assert {r.group for r in split_by_group(rows, 0.25, seed=2)[1]} != {r.group for r in valid}
