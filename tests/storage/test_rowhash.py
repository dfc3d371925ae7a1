"""The logical digest against a slow reference, under every cut and encoding."""

import hashlib
import itertools
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.storage import rowhash
from prunery.storage.rowhash import RowHash, table_digest, value_hashes

GOLDEN = "1674bccf0f9f4299e634d1c033e39857ae107afc128de946f587bf008d635e91"

MASK = 2**64 - 1
PRIME = 2**61 - 1
BASES = (0x0A09E667F3BCC908 % PRIME, 0x1B67AE8584CAA73B % PRIME)
SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)
SALTS = (0xA4093822299F31D0, 0x082EFA98EC4E6C89)
NULLS = (0x452821E638D01377, 0xBE5466CF34E90C6C)

Pair = tuple[int, int]


# -- the reference: one Python value at a time -------------------------------------------------


def mix(x: int) -> int:
    x &= MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def halves(data: bytes) -> Pair:
    first, second = struct.unpack("<QQ", data)
    return first, second


def pack(value: Any, kind: pa.DataType) -> bytes:
    """The value's bytes, with one NaN and one zero."""
    if pa.types.is_floating(kind):
        code = {16: "<e", 32: "<f", 64: "<d"}[kind.bit_width]
        if math.isnan(value):
            return {16: b"\x00\x7e", 32: b"\x00\x00\xc0\x7f", 64: b"\0\0\0\0\0\0\xf8\x7f"}[
                kind.bit_width
            ]
        return struct.pack(code, 0.0 if value == 0 else value)
    if pa.types.is_boolean(kind):
        return bytes([value])
    return int(value).to_bytes(kind.bit_width // 8, "little", signed=True)


def value_hash(value: Any, kind: pa.DataType) -> Pair:
    t = pa.types
    if t.is_dictionary(kind):
        return value_hash(value, kind.value_type)
    if value is None:
        return NULLS
    if t.is_string(kind) or t.is_large_string(kind):
        return halves(hashlib.blake2b(value.encode(), digest_size=16).digest())
    if t.is_binary(kind):
        return halves(hashlib.blake2b(value, digest_size=16).digest())
    if t.is_struct(kind):
        state = SEEDS
        for field in kind:
            state = step(state, value_hash(value[field.name], field.type))
        return state
    if t.is_map(kind):
        elements = []
        for key, item in value:
            state = step(SEEDS, value_hash(key, kind.key_type))
            elements.append(step(state, value_hash(item, kind.item_type)))
        return element_hash(elements)
    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        inner = kind.value_type
        if (t.is_integer(inner) or t.is_floating(inner)) and None not in value:
            data = b"".join(pack(item, inner) for item in value)
            return halves(hashlib.sha256(data).digest()[:16])
        return element_hash([value_hash(item, inner) for item in value])
    bits = int.from_bytes(pack(value, kind), "little")
    return mix(bits + SALTS[0]), mix(bits + SALTS[1])


def element_hash(elements: list[Pair]) -> Pair:
    data = b"".join(struct.pack("<QQ", *element) for element in elements)
    return halves(hashlib.blake2b(data, digest_size=16).digest())


def step(state: Pair, value: Pair) -> Pair:
    return mix(state[0] ^ value[0]), mix(state[1] ^ value[1])


def reference(table: pa.Table) -> tuple[int, Pair]:
    lanes = [0, 0]
    for row in table.to_pylist():
        state = SEEDS
        for field in table.schema:
            state = step(state, value_hash(row[field.name], field.type))
        for lane in (0, 1):
            lanes[lane] = (lanes[lane] * BASES[lane] + state[lane]) % PRIME
    return table.num_rows, (lanes[0], lanes[1])


# -- data --------------------------------------------------------------------------------------

FLOATS = st.floats(width=32, allow_nan=True)
KINDS: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.int8(), st.integers(-128, 127)),
    (pa.float32(), FLOATS),
    (pa.float64(), st.floats()),
    (pa.bool_(), st.booleans()),
    (pa.string(), st.text(max_size=8)),
    (pa.binary(), st.binary(max_size=8)),
    (pa.dictionary(pa.int32(), pa.string()), st.sampled_from(["a", "b", ""])),
    (pa.list_(pa.float32()), st.lists(st.none() | FLOATS, max_size=4)),
    (pa.list_(pa.string()), st.lists(st.none() | st.text(max_size=3), max_size=3)),
    (pa.list_(pa.list_(pa.int64())), st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=3)),
    (pa.list_(pa.float32(), 3), st.lists(st.none() | FLOATS, min_size=3, max_size=3)),
    (
        pa.struct([("a", pa.int64()), ("b", pa.string())]),
        st.fixed_dictionaries(
            {"a": st.none() | st.integers(0, 9), "b": st.none() | st.text(max_size=2)}
        ),
    ),
    (
        pa.map_(pa.string(), pa.int64()),
        st.lists(st.tuples(st.text(max_size=2), st.none() | st.integers(0, 9)), max_size=3),
    ),
]


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    chosen = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    n = draw(st.integers(0, 12))
    names, arrays = [], []
    for i, (kind, values) in enumerate(chosen):
        names.append(f"c{i}")
        arrays.append(
            pa.array(draw(st.lists(st.none() | values, min_size=n, max_size=n)), type=kind)
        )
    return pa.table(arrays, names=names)


def hashed(table: pa.Table, cuts: list[int] | None = None) -> RowHash:
    out = RowHash()
    borders = sorted({0, table.num_rows, *(cut % (table.num_rows + 1) for cut in cuts or [])})
    for start, stop in itertools.pairwise(borders):
        for batch in table.slice(start, stop - start).combine_chunks().to_batches():
            out.update(batch)
    return out


@settings(max_examples=200, deadline=None)
@given(tables())
def test_the_hash_is_what_the_reference_says(table: pa.Table) -> None:
    found = hashed(table)
    assert (found.rows, found.lanes) == reference(table)


@settings(max_examples=150, deadline=None)
@given(tables(), st.lists(st.integers(0, 100), max_size=4), st.integers(0, 12))
def test_cuts_make_no_difference(table: pa.Table, cuts: list[int], at: int) -> None:
    whole = hashed(table)
    assert hashed(table, cuts) == whole
    # sliced, not copied: offsets inside the buffers
    sliced = RowHash()
    at = min(at, table.num_rows)
    for piece in (table.slice(0, at), table.slice(at)):
        for batch in piece.to_batches():
            sliced.update(batch)
    assert sliced == whole
    # and as shards
    first, second = hashed(table.slice(0, at)), hashed(table.slice(at))
    assert first.then(second) == whole
    assert table_digest(table.schema, [first, second]) == table_digest(table.schema, [whole])
    again = RowHash.parse(whole.rows, whole.text)
    assert again == whole


def test_long_tables_cross_block_borders() -> None:
    rng = np.random.default_rng(0)
    n = 3 * 8192 + 17
    table = pa.table({"id": rng.integers(0, 2**62, n), "x": rng.random(n).astype("f4")})
    whole = hashed(table)
    assert (whole.rows, whole.lanes) == reference(table)
    assert hashed(table, [1, 8191, 8192, 8193, 20_000]) == whole


def test_dictionaries_make_no_difference() -> None:
    values = ["x", None, "y", "x", ""] * 5
    plain = pa.table({"c": pa.array(values)})
    orders = [["x", "y", ""], ["", "unused", "y", "x"]]
    for order in orders:
        codes = [None if value is None else order.index(value) for value in values]
        encoded = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(order))
        table = pa.table({"c": encoded})
        assert hashed(table) == hashed(plain)
        assert table_digest(table.schema, [hashed(table)]) == table_digest(
            plain.schema, [hashed(plain)]
        )
    nulls = pa.DictionaryArray.from_arrays(
        pa.array([None, None], pa.int8()), pa.array([], "string")
    )
    assert hashed(pa.table({"c": nulls})) == hashed(
        pa.table({"c": pa.array([None, None], "string")})
    )
    inside = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), pa.array([None, "a"]))
    assert hashed(pa.table({"c": inside})) == hashed(pa.table({"c": pa.array([None, "a"])}))


@pytest.mark.parametrize(
    "recode",
    [
        lambda t: t.cast(pa.schema([("s", pa.large_string()), ("l", pa.large_list(pa.int64()))])),
        lambda t: pa.table({"s": t["s"].dictionary_encode(), "l": t["l"]}),
    ],
)
def test_widths_of_offsets_make_no_difference(recode: Callable[[pa.Table], pa.Table]) -> None:
    table = pa.table(
        {"s": ["a", None, "ccc"], "l": pa.array([[1], None, [2, None]], pa.list_(pa.int64()))}
    )
    other = recode(table)
    assert table_digest(other.schema, [hashed(other)]) == table_digest(
        table.schema, [hashed(table)]
    )


def test_nan_and_zero_are_decided() -> None:
    other_nan = np.array([0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
    nans = np.array([np.nan, np.nan], np.float32)
    assert hashed(pa.table({"x": other_nan})) == hashed(pa.table({"x": nans}))
    assert hashed(pa.table({"x": [0.0, -0.0]})) == hashed(pa.table({"x": [-0.0, 0.0]}))

    def vectors(values: Any) -> pa.Table:
        return pa.table({"v": pa.FixedSizeListArray.from_arrays(pa.array(values), 2)})

    assert hashed(vectors(other_nan)) == hashed(vectors(nans))
    assert hashed(vectors([-0.0, 1.0])) == hashed(vectors([0.0, 1.0]))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2], [2, 1]),
        ([1, 1], [1]),
        ([0], [None]),
        ([0.0], [5e-324]),
        ([float("nan")], [None]),
        ([""], [None]),
        (["ab", "c"], ["a", "bc"]),
        ([[]], [None]),
        ([[1], [2]], [[1, 2], []]),
        ([[None]], [[]]),
        ([[None, 1]], [[1, None]]),
        ([True], [False]),
    ],
)
def test_different_rows_differ(one: list[Any], other: list[Any]) -> None:
    kind = pa.array(one + other).type
    first, second = (pa.table({"c": pa.array(rows, kind)}) for rows in (one, other))
    assert hashed(first) != hashed(second)


def test_names_types_and_order_of_columns_count() -> None:
    base = pa.table({"a": pa.array([1], pa.int64()), "b": pa.array([2], pa.int64())})
    others = [
        base.rename_columns(["a", "c"]),
        base.select(["b", "a"]),
        base.set_column(0, "a", pa.array([1], pa.int32())),
        pa.table({"a": pa.array([2], pa.int64()), "b": pa.array([1], pa.int64())}),
    ]
    digests = {table_digest(table.schema, [hashed(table)]) for table in [base, *others]}
    assert len(digests) == 5


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (pa.timestamp("us", "UTC"), pa.int64()),
        (pa.date32(), pa.int32()),
        (pa.time64("ns"), pa.int64()),
        (pa.duration("ms"), pa.int64()),
    ],
)
def test_times_hash_as_their_numbers_under_another_type(kind: pa.DataType, bits: Any) -> None:
    numbers = pa.array([0, 1, None, 86_399], bits)
    times, plain = pa.table({"c": numbers.cast(kind)}), pa.table({"c": numbers})
    assert hashed(times, [1, 3]) == hashed(plain)
    assert table_digest(times.schema, [hashed(times)]) != table_digest(
        plain.schema, [hashed(plain)]
    )


def test_wide_fixed_values() -> None:
    decimals = pa.array(["1.50", None, "-2.25"]).cast(pa.decimal128(20, 2))
    fixed = pa.array([b"abc", b"abd", None], pa.binary(3))
    table = pa.table({"d": decimals, "f": fixed})
    assert hashed(table, [1, 2]) == hashed(table)
    swapped = pa.table({"d": decimals, "f": pa.array([b"abd", b"abc", None], pa.binary(3))})
    assert hashed(swapped) != hashed(table)
    one = pa.table({"f": pa.array([b"abc"], pa.binary(3))})
    text = pa.table({"f": pa.array([b"abc"], pa.binary())})
    assert hashed(one) == hashed(text)  # the same bytes; the type tells them apart
    assert table_digest(one.schema, [hashed(one)]) != table_digest(text.schema, [hashed(text)])


def test_half_floats() -> None:
    half = pa.table({"h": pa.array(np.array([1.5, np.nan, -0.0], np.float16))})
    other = pa.table({"h": pa.array(np.array([1.5, -np.nan, 0.0], np.float16))})
    assert hashed(half) == hashed(other)


def test_dot_is_exact_at_the_extremes() -> None:
    powers = rowhash._powers()
    for values in (np.full(8192, MASK, np.uint64), np.arange(8192, dtype=np.uint64)):
        for lane in (0, 1):
            want = sum(int(v) * int(p) for v, p in zip(values, powers[lane], strict=True)) % PRIME
            assert rowhash._dot(values, powers[lane]) % PRIME == want


def test_golden_digest_of_a_table() -> None:
    """Stays the same across versions: stored digests are compared with it."""
    table = pa.table(
        {
            "id": pa.array([1, 2, 3], pa.int64()),
            "text": ["a", None, "ü"],
            "score": pa.array([0.5, float("nan"), -0.0], pa.float32()),
        }
    )
    count, lanes = reference(table)
    assert (count, f"{lanes[0]:016x}{lanes[1]:016x}") == (3, hashed(table).text)
    assert table_digest(table.schema, [hashed(table)]) == GOLDEN


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_a_column_that_repeats_itself_hashes_as_one_value_at_a_time(kind):
    values = ["kept", None, "", "dropped", "kept"] * 400 + [str(i) for i in range(300)]
    column = pa.array([v if v is None else v.encode() for v in values], pa.binary()).cast(kind)
    singles = np.concatenate([value_hashes(column[i : i + 1]) for i in range(len(column))], axis=1)
    assert np.array_equal(value_hashes(column), singles)
    assert np.array_equal(value_hashes(column.slice(3)), singles[:, 3:])
