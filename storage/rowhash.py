"""The logical digest: what rows a table holds, however they were cut, encoded or compressed.

Every row gets a 128-bit hash (two lanes of 64 bits) of its values in schema order. Rows are
combined, in order, by a polynomial over the prime 2⁶¹ - 1 in each lane,

    H(r₁ … rₙ) = Σ rᵢ · bⁿ⁻ⁱ  mod p,        H(A ‖ B) = H(A) · b^|B| + H(B),

so the digest of a table follows from the digests of its parts, and neither batch cuts nor part
borders change it (Karp and Rabin 1987, with rows in place of characters). Equal values hash
alike whatever their encoding: dictionary or plain, 32- or 64-bit offsets, validity bitmap
present or not. Decisions: every NaN is one value, -0.0 equals 0.0, a null differs from every
value, an empty list from a null one.

It finds accidents (a lost, repeated, altered or reordered row escapes with a chance of about
2⁻¹²⁰), not forgery: nothing here is keyed, and the polynomial is linear. Against tampering
with bytes a manifest lists the SHA-256 of every file.
"""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from . import schemas
from .ids import canonical_json

U64 = NDArray[np.uint64]  # (N,) or, for both lanes, (2, N)

PRIME = (1 << 61) - 1
# Two fixed bases in [2, p): digits of the fractional parts of sqrt(2) and sqrt(3).
BASES = (0x0A09E667F3BCC908 % PRIME, 0x1B67AE8584CAA73B % PRIME)
_BLOCK = 8192
# Values looked at to tell whether a column repeats itself.
_LOOKED_AT = 256

_SEEDS = np.array([0x243F6A8885A308D3, 0x13198A2E03707344], np.uint64)  # digits of pi
_SALTS = np.array([0xA4093822299F31D0, 0x082EFA98EC4E6C89], np.uint64)
_NULLS = np.array([0x452821E638D01377, 0xBE5466CF34E90C6C], np.uint64)


@dataclass(slots=True)
class RowHash:
    """The running hash of rows in order: count and both lanes.

    `text` and `parse` carry it through a journal; `then` appends another run of rows.
    """

    rows: int = 0
    lanes: tuple[int, int] = (0, 0)

    def update(self, batch: pa.RecordBatch) -> None:
        """Append the rows of one batch."""
        for start in range(0, batch.num_rows, _BLOCK):
            block = batch.slice(start, _BLOCK)
            hashes = row_hashes(block)
            powers = _powers()[:, _BLOCK - block.num_rows :]
            sums = [_dot(hashes[lane], powers[lane]) for lane in (0, 1)]
            self._append(block.num_rows, (sums[0], sums[1]))

    def then(self, other: "RowHash") -> "RowHash":
        """Return the hash of these rows followed by those of `other`."""
        out = RowHash(self.rows, self.lanes)
        out._append(other.rows, other.lanes)
        return out

    def _append(self, rows: int, lanes: tuple[int, int]) -> None:
        first, second = (
            (lane * pow(base, rows, PRIME) + new) % PRIME
            for lane, base, new in zip(self.lanes, BASES, lanes, strict=True)
        )
        self.rows += rows
        self.lanes = (first, second)

    @property
    def text(self) -> str:
        """Both lanes as 32 hexadecimal digits (the row count stands beside it in a part)."""
        return f"{self.lanes[0]:016x}{self.lanes[1]:016x}"

    @classmethod
    def parse(cls, rows: int, text: str) -> "RowHash":
        """Read back `text`."""
        return cls(rows, (int(text[:16], 16), int(text[16:], 16)))


def table_digest(schema: pa.Schema, parts: Iterable[RowHash]) -> str:
    """Return the logical digest (64 hexadecimal digits) of a table from its parts in order."""
    total = RowHash()
    for part in parts:
        total = total.then(part)
    head = {"columns": schemas.canonical(schema), "rows": total.rows, "hash": total.text}
    return hashlib.sha256(canonical_json(head)).hexdigest()


def row_hashes(batch: pa.RecordBatch) -> U64:
    """Return (2, N) uint64, the hash of each row in two lanes."""
    state = np.repeat(_SEEDS[:, None], batch.num_rows, axis=1)
    for column in batch.columns:
        state = mix64(state ^ value_hashes(column))
    return state


def value_hashes(column: pa.Array) -> U64:
    """Return (2, N) uint64, the hash of each value of one array, nulls included."""
    t = pa.types
    kind = column.type
    if isinstance(column, pa.ExtensionArray):
        return value_hashes(column.storage)
    if t.is_dictionary(kind):
        return _dictionary_hashes(column)
    if t.is_null(kind):
        return np.repeat(_NULLS[:, None], len(column), axis=1)
    if t.is_struct(kind):
        hashes = _struct_hashes(column)
    elif t.is_map(kind) or t.is_list(kind) or t.is_large_list(kind):
        hashes = _list_hashes(column)
    elif t.is_fixed_size_list(kind):
        hashes = _vector_hashes(column)
    elif t.is_boolean(kind):
        hashes = _number_hashes(_drop_nulls(column).cast(pa.uint8()).to_numpy().astype(np.uint64))
    elif _is_variable(kind) and _repeats(column):
        return _dictionary_hashes(column.dictionary_encode())
    elif _is_variable(kind):
        hashes = _bytes_hashes(column)
    elif kind.bit_width > 64 or t.is_fixed_size_binary(kind):
        width = kind.bit_width // 8
        hashes = _slice_hashes(_fixed_bytes(column, width), np.arange(len(column) + 1) * width)
    else:
        hashes = _number_hashes(_bits(column))
    return _with_nulls(hashes, column)


def _dictionary_hashes(column: pa.DictionaryArray) -> U64:
    """Hash each value of the dictionary once, unless it is longer than the column."""
    if len(column.dictionary) > len(column):
        return value_hashes(column.dictionary_decode())
    indices = column.indices
    if indices.null_count:
        indices = indices.fill_null(0)
    if not len(column.dictionary):  # nothing but nulls
        return np.repeat(_NULLS[:, None], len(column), axis=1)
    return _with_nulls(value_hashes(column.dictionary)[:, np.asarray(indices)], column)


def _repeats(column: pa.Array) -> bool:
    """Whether a look at the first values says that few differ (reasons, names of a split)."""
    return len(column) >= 4 * _LOOKED_AT and len(column[:_LOOKED_AT].unique()) <= _LOOKED_AT // 8


def _with_nulls(hashes: U64, column: pa.Array) -> U64:
    if column.null_count:
        hashes[:, np.asarray(column.is_null())] = _NULLS[:, None]
    return hashes


def _is_variable(kind: pa.DataType) -> bool:
    t = pa.types
    return bool(
        t.is_string(kind) or t.is_large_string(kind) or t.is_binary(kind) or t.is_large_binary(kind)
    )


def _drop_nulls(column: pa.Array) -> pa.Array:
    return column.fill_null(False) if column.null_count else column


# -- fixed width ------------------------------------------------------------------------------


def _fixed_bytes(column: pa.Array, width: int) -> memoryview:
    """The value bytes of a fixed-width array, without its offset (nulls hold anything)."""
    buffer = column.buffers()[1]
    start = column.offset * width
    return memoryview(buffer)[start : start + len(column) * width] if buffer else memoryview(b"")


def _bits(column: pa.Array) -> U64:
    """(N,) the bits of each value, zero-extended; floats in canonical form."""
    width = column.type.bit_width // 8
    raw = np.frombuffer(_fixed_bytes(column, width), dtype=f"u{width}")
    if pa.types.is_floating(column.type):
        raw = _canonical_floats(raw)
    return raw.astype(np.uint64)


def _canonical_floats(raw: NDArray[Any]) -> NDArray[Any]:
    """Bits of floats with one NaN and one zero."""
    width = raw.dtype.itemsize
    values = raw.view(f"f{width}")
    nan = values != values
    minus_zero = raw == raw.dtype.type(1 << (8 * width - 1))
    if not (nan.any() or minus_zero.any()):
        return raw
    out = raw.copy()
    out[minus_zero] = 0
    out[nan] = np.array([np.nan], dtype=f"f{width}").view(f"u{width}")[0]
    return out


def _number_hashes(bits: U64) -> U64:
    return mix64(bits[None, :] + _SALTS[:, None])


def mix64(x: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64 bits."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


# -- variable width and nested ----------------------------------------------------------------


def _slice_hashes(data: memoryview, offsets: NDArray[Any]) -> U64:
    """(2, N) BLAKE2b of data[offsets[i]:offsets[i+1]]."""
    blake2b = hashlib.blake2b
    ends = offsets.tolist()
    digests = [
        blake2b(data[start:end], digest_size=16).digest() for start, end in itertools.pairwise(ends)
    ]
    return _lanes(digests)


def _long_slice_hashes(data: memoryview, offsets: NDArray[Any]) -> U64:
    """(2, N) the first half of SHA-256, twice as fast on slices of a kilobyte with SHA-NI."""
    sha256 = hashlib.sha256
    ends = offsets.tolist()
    digests = [sha256(data[start:end]).digest()[:16] for start, end in itertools.pairwise(ends)]
    return _lanes(digests)


def _lanes(digests: list[bytes]) -> U64:
    pairs = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    return np.ascontiguousarray(pairs.T).astype(np.uint64)


def _bytes_hashes(column: pa.Array) -> U64:
    large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    _, offset_buffer, data = column.buffers()
    if len(column) == 0 or offset_buffer is None:
        return np.empty((2, 0), np.uint64)
    offsets = np.frombuffer(offset_buffer, dtype="i8" if large else "i4")
    offsets = offsets[column.offset : column.offset + len(column) + 1]
    return _slice_hashes(memoryview(data) if data else memoryview(b""), offsets)


def _list_hashes(column: pa.Array) -> U64:
    if len(column) == 0:
        return np.empty((2, 0), np.uint64)
    offsets = np.asarray(column.offsets).astype(np.int64)  # the array's own offset is applied
    if pa.types.is_map(column.type):
        keys, items = value_hashes(column.keys), value_hashes(column.items)
        return _element_hashes(mix64(mix64(_SEEDS[:, None] ^ keys) ^ items), offsets)
    first, last = int(offsets[0]), int(offsets[-1])
    return _sequence_hashes(column.values.slice(first, last - first), offsets - first)


def _vector_hashes(column: pa.Array) -> U64:
    d = column.type.list_size
    values = column.values.slice(column.offset * d, len(column) * d)
    return _sequence_hashes(values, np.arange(len(column) + 1) * d)


def _sequence_hashes(values: pa.Array, offsets: NDArray[np.int64]) -> U64:
    """Hash of lists: SHA-256 over numbers' bytes, else BLAKE2b over the elements' hashes.

    Numbers with a null among them take the second way. That is decided for each row by the
    row alone, so the cut into batches makes no difference.
    """
    if not _is_number(values.type):
        return _element_hashes(value_hashes(values), offsets)
    if not values.null_count:
        return _number_list_hashes(values, offsets)
    nulls = np.concatenate([[0], np.cumsum(np.asarray(values.is_null()))])
    whole = nulls[offsets[1:]] == nulls[offsets[:-1]]
    hashes = _element_hashes(value_hashes(values), offsets)
    hashes[:, whole] = _number_list_hashes(values, offsets)[:, whole]
    return hashes


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _number_list_hashes(values: pa.Array, offsets: NDArray[np.int64]) -> U64:
    width = values.type.bit_width // 8
    raw = np.frombuffer(_fixed_bytes(values, width), dtype=f"u{width}")
    if pa.types.is_floating(values.type):
        raw = _canonical_floats(raw)
    data = raw.data.cast("B") if raw.size else memoryview(b"")
    return _long_slice_hashes(data, offsets * width)


def _element_hashes(elements: U64, offsets: NDArray[np.int64]) -> U64:
    data = np.ascontiguousarray(elements.T).astype("<u8").tobytes()  # (M, 2)
    return _slice_hashes(memoryview(data), offsets * 16)


def _struct_hashes(column: pa.Array) -> U64:
    state = np.repeat(_SEEDS[:, None], len(column), axis=1)
    for i in range(column.type.num_fields):
        # .field ignores the struct's offset and bitmap; the bitmap is applied by the caller
        child = column.field(i)
        if len(child) != len(column):
            child = child.slice(column.offset, len(column))
        state = mix64(state ^ value_hashes(child))
    return state


# -- the polynomial ---------------------------------------------------------------------------

_POWERS: list[U64] = []


def _powers() -> U64:
    """(2, _BLOCK) powers b^(_BLOCK-1) … b⁰ of both bases."""
    if not _POWERS:
        table = [[pow(base, e, PRIME) for e in range(_BLOCK - 1, -1, -1)] for base in BASES]
        _POWERS.append(np.array(table, dtype=np.uint64))
    return _POWERS[0]


def _dot(values: U64, powers: U64) -> int:
    """Σ valuesᵢ · powersᵢ mod p, exactly, in 64-bit arithmetic."""
    low, high = np.uint64((1 << 32) - 1), np.uint64(32)
    p, bits = np.uint64(PRIME), np.uint64(61)
    values = (values >> bits) + (values & p)
    a1, a0 = values >> high, values & low
    b1, b0 = powers >> high, powers & low
    top, middle, bottom = a1 * b1, a1 * b0 + a0 * b1, a0 * b0
    product = (
        (top << np.uint64(3))  # 2⁶⁴ ≡ 2³
        + (middle >> np.uint64(29))  # 2³² · 2²⁹ = 2⁶¹ ≡ 1
        + ((middle & np.uint64((1 << 29) - 1)) << high)
        + (bottom >> bits)
        + (bottom & p)
    )
    # Sums of halves: at most 8192 terms below 2³² each cannot overflow.
    return (int((product >> high).sum()) << 32) + int((product & low).sum())
