"""Digests of JSON values and files, and row ids made from the content of a row.

Pure standard library, so that importing it costs nothing.
"""

import hashlib
import json
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Field = str | bytes | int

_CHUNK = 1 << 20


def canonical_json(value: Any) -> bytes:
    """Give one spelling to a JSON value: sorted keys, no spaces, UTF-8.

    `1` and `1.0` are different values. Tuples count as lists.

    Raises:
        InputError: a key is not a string, a number is not finite, or a value is not JSON
            (a NumPy scalar, a path, bytes), with the place in the value where it stands.
    """
    _check_json(value, "$")
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode("utf-8", errors="surrogatepass")


def _check_json(value: Any, where: str) -> None:
    if value is None or type(value) in (bool, int, str):
        return
    if type(value) is float:
        if value != value or value in (float("inf"), float("-inf")):
            raise InputError(
                f"expected a finite number at {where}, found {value!r}; "
                "write null or a string where a value is missing"
            )
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) is not str:
                raise InputError(
                    f"expected a string key at {where}, found {key!r} of type "
                    f"{type(key).__name__}; convert it to a string"
                )
            _check_json(item, f"{where}.{key}")
        return
    if type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
        return
    raise InputError(
        f"expected a JSON value (null, bool, int, float, str, list, object) at {where}, "
        f"found {type(value).__name__}; convert it first, e.g. with .item(), str() or list()"
    )


def digest(value: Any) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of a local file's bytes."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


def _encode(field: Field, where: str) -> bytes:
    """Tag, length and bytes of one field, so that no two lists of fields share an encoding."""
    if isinstance(field, str):
        # surrogatepass: text read from damaged files still needs an id
        data = field.encode("utf-8", errors="surrogatepass")
        return b"s" + len(data).to_bytes(8, "little") + data
    if isinstance(field, bytes):
        return b"b" + len(field).to_bytes(8, "little") + field
    if isinstance(field, numbers.Integral) and not isinstance(field, bool):
        number = int(field)
        data = number.to_bytes((number.bit_length() + 8) // 8, "little", signed=True)
        return b"i" + len(data).to_bytes(8, "little") + data
    raise InputError(
        f"expected str, bytes or int for a row id{where}, found {type(field).__name__} "
        f"({field!r:.80}); write floats and structures as text first"
    )


def row_id(*fields: Field) -> int:
    """Return the content id of one row: 63 bits, non-negative, so that it fits int64 and FAISS.

    The first 63 bits of BLAKE2b over the fields, each with its type and length:
    `row_id("ab", "c") != row_id("a", "bc")` and `row_id("1") != row_id(1)`.
    Among n rows two different ones share an id with probability about n² / 2⁶⁴
    (5e-8 for a million rows, 0.05 % for a hundred million).

    Raises:
        InputError: no field at all, or one that is not str, bytes or int.
    """
    if not fields:
        raise InputError("expected at least one field for a row id, found none")
    return _hash63(b"".join([_encode(field, "") for field in fields]))


def row_ids(*columns: Iterable[Field]) -> "NDArray[np.int64]":
    """Return `row_id` of every row of equally long columns, as (N,) int64.

    Columns may be lists, NumPy arrays or Arrow arrays.

    Raises:
        InputError: the columns differ in length, or as in `row_id` (with row and column).
    """
    import numpy as np

    if not columns:
        raise InputError("expected at least one column for row ids, found none")
    values = [_as_list(column) for column in columns]
    lengths = [len(column) for column in values]
    if len(set(lengths)) > 1:
        raise InputError(f"expected columns of one length for row ids, found lengths {lengths}")
    out = np.empty(lengths[0], dtype=np.int64)
    for i in range(lengths[0]):
        out[i] = _hash63(
            b"".join(
                [_encode(column[i], f" (row {i}, column {j})") for j, column in enumerate(values)]
            )
        )
    return out


def _hash63(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def _as_list(column: Iterable[Field]) -> Sequence[Field]:
    if isinstance(column, (list, tuple)):
        return column
    for method in ("to_pylist", "tolist"):
        if hasattr(column, method):
            listed: list[Field] = getattr(column, method)()
            return listed
    return list(column)
