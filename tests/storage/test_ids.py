"""Row ids and digests."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.storage import canonical_json, digest, file_digest, row_id, row_ids

FIELDS = st.one_of(st.text(), st.binary(), st.integers(-(2**80), 2**80))


def test_golden_ids() -> None:
    # blake2b(8 bytes) of b"s" + little-endian length + text, halved:
    # python -c "import hashlib; print(int.from_bytes(hashlib.blake2b(
    #   b's' + (5).to_bytes(8,'little') + b'hello', digest_size=8).digest(), 'little') >> 1)"
    assert row_id("hello") == 7087807923847399027
    assert row_id("hello", 3, b"\x00") == 5201536270916633463


def test_golden_digest() -> None:
    # printf '{"a":[1,2.5,null,true],"b":"é"}' | sha256sum
    value = {"b": "é", "a": (1, 2.5, None, True)}
    assert canonical_json(value) == '{"a":[1,2.5,null,true],"b":"é"}'.encode()
    assert digest(value) == "2d13915cea65e5c86a2097e51aa092fb3f5a29e3b40d276704fc891f0f063399"


@given(st.lists(FIELDS, min_size=1, max_size=4))
def test_an_id_fits_int64_and_repeats(fields: list[str | bytes | int]) -> None:
    first = row_id(*fields)
    assert 0 <= first < 2**63
    assert first == row_id(*fields)


@given(st.lists(FIELDS, min_size=1, max_size=4), st.lists(FIELDS, min_size=1, max_size=4))
def test_ids_differ_where_fields_differ(
    one: list[str | bytes | int], other: list[str | bytes | int]
) -> None:
    same = len(one) == len(other) and all(
        type(a) is type(b) and a == b for a, b in zip(one, other, strict=True)
    )
    assert (row_id(*one) == row_id(*other)) == same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("1",), (1,)),
        (("a",), (b"a",)),
        (("a", ""), ("a",)),
        ((255,), (-1,)),
        ((0,), ("",)),
    ],
)
def test_types_and_borders_count(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert row_id(*one) != row_id(*other)


@given(st.lists(st.tuples(st.text(), st.integers(-(2**63), 2**63 - 1)), max_size=20))
def test_columns_give_the_ids_of_their_rows(rows: list[tuple[str, int]]) -> None:
    texts, numbers = [text for text, _ in rows], [number for _, number in rows]
    want = [row_id(*row) for row in rows]
    as_arrays = row_ids(
        [text.encode("utf-8", "surrogatepass") for text in texts], np.array(numbers, np.int64)
    )
    assert row_ids(texts, numbers).tolist() == want
    assert row_ids(texts, numbers).dtype == np.int64
    assert as_arrays.tolist() == [
        row_id(text.encode("utf-8", "surrogatepass"), number) for text, number in rows
    ]


def test_arrow_columns() -> None:
    assert row_ids(pa.array(["x", "y"]), pa.chunked_array([[1], [2]])).tolist() == [
        row_id("x", 1),
        row_id("y", 2),
    ]


def test_lone_surrogates_have_ids() -> None:
    assert row_id("\ud800") != row_id("\ud801")


@pytest.mark.parametrize("bad", [1.5, None, True, ["a"]])
def test_other_fields_are_refused(bad: object) -> None:
    with pytest.raises(InputError, match="expected str, bytes or int"):
        row_id(bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"row 1, column 0"):
        row_ids(["fine", bad])  # type: ignore[list-item]


def test_no_field_and_ragged_columns_are_refused() -> None:
    with pytest.raises(InputError, match="at least one field"):
        row_id()
    with pytest.raises(InputError, match="at least one column"):
        row_ids()
    with pytest.raises(InputError, match=r"found lengths \[2, 1\]"):
        row_ids(["a", "b"], ["c"])


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, float("nan")]}, r"\$\.a\[1\]"),
        ({"a": {"b": float("inf")}}, r"\$\.a\.b"),
        ({1: 2}, r"\$"),
        ({"a": b"x"}, r"\$\.a"),
        ({"a": np.float32(1)}, r"\$\.a"),
        ([{"x": {1, 2}}], r"\$\[0\]\.x"),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(value: object, place: str) -> None:
    with pytest.raises(InputError, match=rf"at {place}"):
        digest(value)


def test_digests_tell_values_apart() -> None:
    values = [1, 1.0, "1", True, None, [], {}, [1], ["1"], {"a": 1}, {"a": [1]}, ""]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest((1, 2)) == digest([1, 2])


def test_file_digest(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert file_digest(path) == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    )


def test_importing_the_package_loads_neither_arrow_nor_faiss() -> None:
    code = (
        "import sys, prunery.storage as s; s.row_id('a'); s.digest({});"
        "print([m for m in ('pyarrow', 'faiss', 'numpy', 'torch', 's3fs') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert out.stdout.strip() == "[]"


def test_every_exported_name_is_there() -> None:
    import prunery.storage as storage

    for name in storage.__all__:
        assert getattr(storage, name) is not None
    with pytest.raises(AttributeError):
        storage.nothing  # noqa: B018
