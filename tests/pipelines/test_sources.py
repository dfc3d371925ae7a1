"""Files of every kind become documents, bad rows are named, offsets point into the source."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pipelines import sources
from prunery.pipelines.html_text import html_text


class Rejects:
    def __init__(self):
        self.seen = []

    def __call__(self, row, reason, where):
        self.seen.append((row, reason, where))


def read(path, reject=None, **options):
    found = sources.scan([str(path)], **options)
    reject = reject or Rejects()
    return [doc for piece in found.pieces for doc in sources.read_piece(piece, reject)]


def test_folder_is_read_in_order_with_relative_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("# Two\n\nText.")
    (tmp_path / "one.txt").write_text("One.")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    found = sources.scan([str(tmp_path)])
    assert [piece.name for piece in found.pieces] == ["b/two.md", "one.txt"]
    assert found.skipped == ("image.png",)


def test_glob_keeps_names_below_the_fixed_part(tmp_path):
    for name in ("a/x.txt", "a/y.md", "b/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("t")
    found = sources.scan([str(tmp_path / "*" / "x.txt")])
    assert [piece.name for piece in found.pieces] == ["a/x.txt", "b/x.txt"]


def test_digest_follows_names_and_contents_not_places(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "f.txt").write_text("same")
    one, two = (sources.scan([str(tmp_path / f)]).digest for f in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "f.txt").write_text("other")
    assert sources.scan([str(tmp_path / "two")]).digest != one
    (tmp_path / "two" / "f.txt").write_text("same")
    (tmp_path / "two" / "f.txt").rename(tmp_path / "two" / "g.txt")
    assert sources.scan([str(tmp_path / "two")]).digest != one


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: [str(p / "nothing")], "no such file or folder"),
        (lambda p: [str(p / "*.txt")], "matches no file"),
        (lambda p: [str(p)], "found no readable file"),
        (lambda p: [str(p / "data.bin")], "cannot tell the format"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, make, words):
    (tmp_path / "data.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=words):
        sources.scan(make(tmp_path))


def test_jsonl_rows_and_every_kind_of_bad_row(tmp_path):
    lines = [
        b'{"text": "good", "title": "T"}',
        b"",
        b"{not json",
        b"[1, 2]",
        b'{"body": "x"}',
        b'{"text": 7}',
        b'{"text": "ok", "title": ["no"]}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": "last"}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    rejects = Rejects()
    docs = read(path, rejects)
    assert [(d.source, d.text, d.title) for d in docs] == [
        ("rows.jsonl#1", "good", "T"),
        ("rows.jsonl#10", "last", ""),
    ]
    assert [where for _, _, where in rejects.seen] == [
        "rows.jsonl, row 3",
        "rows.jsonl, row 4",
        "rows.jsonl, row 5, column text",
        "rows.jsonl, row 6, column text",
        "rows.jsonl, row 7, column title",
        "rows.jsonl, row 8, column text",
        "rows.jsonl, row 9",
    ]
    assert "surrogate" in rejects.seen[5][1]


def test_large_jsonl_is_cut_at_lines_and_loses_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"row {i} " + "x" * (i % 37)} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sources.scan([str(path)], piece_bytes=200)
    assert len(found.pieces) > 10
    docs = [d for piece in reversed(found.pieces) for d in sources.read_piece(piece, Rejects())]
    by_row = sorted((int(d.source.split("#")[1]), d.text) for d in docs)
    assert by_row == [(i + 1, row["text"]) for i, row in enumerate(rows)]
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    name = "rows.jsonl"
    whole = hashlib.sha256(f"{len(name)}:{name}:jsonl:{expected};".encode()).hexdigest()
    assert found.digest == whole


def test_parquet_row_groups_and_missing_column(tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.table({"text": [f"t{i}" for i in range(9)] + [None], "n": list(range(10))})
    pq.write_table(table, path, row_group_size=4)
    rejects = Rejects()
    docs = read(path, rejects, piece_bytes=1)
    assert [(d.source, d.text) for d in docs] == [(f"t.parquet#{i + 1}", f"t{i}") for i in range(9)]
    assert rejects.seen[0][2] == "t.parquet, row 10, column text"
    piece = sources.scan([str(path)]).pieces[0]
    with pytest.raises(InputError, match="has no column `words`; it has text, n"):
        list(sources.read_piece(piece, Rejects(), text_field="words"))


def test_a_file_that_is_not_utf8_is_rejected_with_its_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("für".encode("latin-1"))
    rejects = Rejects()
    assert read(path, rejects) == []
    assert "byte 1 is 0xfc" in rejects.seen[0][1]


def test_byte_order_mark_is_not_text_but_counts(tmp_path):
    path = tmp_path / "bom.txt"
    path.write_bytes("\ufeffAbc".encode())
    (doc,) = read(path)
    assert doc.text == "Abc"
    start, end = doc.span(0, 3)
    assert path.read_bytes().decode()[start:end] == "Abc"


def test_jsonl_changed_after_the_scan_stops(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    (piece,) = sources.scan([str(path)]).pieces
    path.write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="changed while it was read"):
        list(sources.read_piece(piece, Rejects()))


def test_group_pieces_fills_groups_in_order():
    pieces = [sources.Piece("p", str(i), "text", size) for i, size in enumerate([3, 3, 9, 1, 1])]
    groups = sources.group_pieces(pieces, limit=6)
    assert [[p.name for p in group] for group in groups] == [["0", "1"], ["2"], ["3", "4"]]


def test_python_docs_are_whole():
    found = sources.scan([sources.BUILTIN_DOCS])
    docs = {d.source: d.text for p in found.pieces for d in sources.read_piece(p, Rejects())}
    from pydoc_data.topics import topics

    assert docs == topics


def test_html_text_offsets_and_headings():
    source = (
        "<html><head><title>A &amp; B</title><style>p{}</style><script>var x = '<p>no</p>';"
        "</script></head>\n<body><h1>One</h1><p>Fish &amp; chips<br>and   more&nbsp;peas"
        "</p><pre>a\n  b</pre><table><tr><td>x</td><td>y</td></tr></table></body></html>"
    )
    page = html_text(source)
    assert page.title == "A & B"
    assert page.text.split() == [
        "One",
        "Fish",
        "&",
        "chips",
        "and",
        "more",
        "peas",
        "a",
        "b",
        "x",
        "y",
    ]
    assert "a\n  b" in page.text
    assert "more\xa0peas" in page.text
    assert "var x" not in page.text
    start, end, level = page.headings[0]
    assert (page.text[start:end], level) == ("One", 1)
    assert len(page.offsets) == len(page.text)
    for word in ("Fish", "chips", "peas", "b"):
        at = page.text.index(word)
        origin = page.offsets[at]
        assert source[origin : origin + len(word)] == word
    ampersand = page.text.index("&")
    assert source[page.offsets[ampersand] :].startswith("&amp;")


@given(st.text(alphabet="<>/ab p&;\n\"'=h1-!", max_size=60))
def test_any_markup_gives_text_with_aligned_offsets(source):
    page = html_text(source)
    assert len(page.offsets) == len(page.text)
    assert all(0 <= offset <= len(source) for offset in page.offsets)
    assert list(page.offsets) == sorted(page.offsets)


def test_html_document_spans_point_into_the_file(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<p>caf&eacute; au lait</p>")
    (doc,) = read(path)
    at = doc.text.index("café")
    start, _ = doc.span(at, at + 4)
    assert path.read_text()[start:].startswith("caf&eacute;")


def test_many_paths_are_one_source(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    found = sources.scan([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert [Path(p.path).name for p in found.pieces] == ["a.txt", "b.txt"]
