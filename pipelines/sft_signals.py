"""Stored signals of fine-tuning samples as the arrays that methods take.

A table row is a sample with lists about its tokens. A method over tokens sees one row a token,
one over samples one row a sample with means over its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import InputError
from ..pruners.contract import SIGNALS, Array, Pruner, Signals
from ..pruners.ragged import segment_mean, token_ids
from .tables import flat, vectors_of

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

TOKEN_LISTS = (
    "loss",
    "entropy",
    "log_sum_exp",
    "target_rank",
    "reference_loss",
    "history_loss",
    "prompt_attention",
)
# Sample signals that are means of a list.
_MEANS = {"answer_loss": "loss", "answer_entropy": "entropy"}
_PER_SAMPLE = ("answer_loss_alone", "loss_trajectory")


@dataclass(frozen=True)
class SftRows:
    """N samples and their T trainable tokens.

    Attributes
    ----------
    ids
        (N,) int64.
    domains
        (N,) str, "" where none was given.
    offset
        (N + 1,) int64, borders of each sample's trainable tokens.
    tokens
        Name to (T,) array: `token_position`, `turn`, `protected` and the stored signals.
    samples
        Name to (N,) or (N, d) array.
    """

    ids: Ints
    domains: list[str]
    offset: Ints
    tokens: Mapping[str, Array]
    samples: Mapping[str, Array] = field(default_factory=dict)

    @property
    def counts(self) -> Ints:
        """(N,) trainable tokens of each sample."""
        return np.diff(self.offset)

    @property
    def owner(self) -> Ints:
        """(T,) number of the sample that each token stands in."""
        return np.repeat(np.arange(len(self.ids)), self.counts)

    def of_tokens(self, pruner: Pruner, rows: Ints) -> Signals:
        """What a method over tokens needs, for the tokens of those numbers."""
        owner = self.owner[rows]
        position = self.tokens["token_position"][rows]
        arrays: dict[str, Array] = {
            "id": token_ids(self.ids[owner], position),
            "sample": self.ids[owner],
        }
        for name in sorted((pruner.needs | pruner.optional) & self.tokens.keys()):
            arrays[name] = self.tokens[name][rows]
        return Signals(arrays)

    def of_samples(self, pruner: Pruner, rows: Ints) -> Signals:
        """What a method over samples needs, for the samples of those numbers."""
        arrays: dict[str, Array] = {"id": self.ids[rows]}
        for name in sorted(pruner.needs | pruner.optional):
            found = self.sample_signal(name)
            if found is not None:
                arrays[name] = found[rows]
        return Signals(arrays)

    def sample_signal(self, name: str) -> Array | None:
        """(N,) or (N, d) values of a sample signal, or None where it was not stored."""
        if name == "answer_tokens":
            return self.counts
        source = _MEANS.get(name)
        if source is None:
            return self.samples.get(name)
        if source not in self.tokens:
            return None
        return segment_mean(self.tokens[source], self.offset).astype(np.float32)


def known_signals(columns: Iterable[str], given: Iterable[str] = ()) -> set[str]:
    """Names of the signals that tables with those columns can give."""
    have = set(columns)
    made = {"id", "sample", "token_position", "turn", "protected", "answer_tokens"}
    made |= have & {*TOKEN_LISTS, *_PER_SAMPLE, "embedding"}
    made |= {name for name, source in _MEANS.items() if source in have}
    return made | set(given)


def rows_of_signals(table: pa.Table) -> SftRows:
    """Samples of a `token_signals` table (or some of its rows)."""
    offset, position = flat(table.column("token_position"))
    tokens: dict[str, Array] = {"token_position": position.astype(np.int64)}
    for name in ("turn", "protected", *TOKEN_LISTS):
        if name in table.column_names:
            _, values = flat(table.column(name))
            tokens[name] = values.astype(SIGNALS[name].dtype, copy=False)
    samples: dict[str, Array] = {}
    if "answer_loss_alone" in table.column_names:
        samples["answer_loss_alone"] = table.column("answer_loss_alone").to_numpy()
    if "loss_trajectory" in table.column_names:
        samples["loss_trajectory"] = _matrix(table.column("loss_trajectory"))
    return SftRows(_ids(table), table.column("domain").to_pylist(), offset, tokens, samples)


def rows_of_tokens(table: pa.Table) -> SftRows:
    """Samples of a `tokenize_chats` table: no signals, but what stands where."""
    borders, trainable = flat(table.column("trainable"))
    trainable = trainable.astype(np.bool_)
    lengths = np.diff(borders)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(trainable)) - np.repeat(borders[:-1], lengths)
    counts = np.bincount(owner[trainable], minlength=len(lengths))
    tokens: dict[str, Array] = {"token_position": place[trainable]}
    for name in ("turn", "protected"):
        _, values = flat(table.column(name))
        tokens[name] = values[trainable].astype(SIGNALS[name].dtype, copy=False)
    offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return SftRows(_ids(table), table.column("domain").to_pylist(), offset, tokens)


def with_embeddings(rows: SftRows, table: pa.Table) -> SftRows:
    """The samples with the vectors of an `embed` table whose rows are theirs, in their order."""
    samples = {**rows.samples, "embedding": vectors_of(table.column("embedding"))}
    return SftRows(rows.ids, rows.domains, rows.offset, rows.tokens, samples)


def with_given(rows: SftRows, chats: pa.Table, given: Mapping[str, str]) -> SftRows:
    """The samples with scores read from their raw rows: signal name to (dotted) key.

    Raises
    ------
    InputError
        A raw row lacks the key, or holds no finite number there; file and row are named.
    """
    made: dict[str, list[float]] = {name: [] for name in given}
    sources = chats.column("source").to_pylist()
    for source, raw in zip(sources, chats.column("raw").to_pylist(), strict=True):
        record = json.loads(raw)
        for name, key in given.items():
            made[name].append(_number(record, key, source))
    arrays = {name: np.array(values, np.float32) for name, values in made.items()}
    return SftRows(rows.ids, rows.domains, rows.offset, rows.tokens, {**rows.samples, **arrays})


def _number(record: Any, key: str, source: str) -> float:
    value = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise InputError(
            f"{source}, key `{key}`: expected a finite number to take as a given score; found"
            f" {value!r}. Mend the row, or leave it out before reading."
        )
    return float(value)


def _matrix(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    offset, values = flat(column)
    widths = np.unique(np.diff(offset))
    if len(widths) > 1:
        raise InputError(
            f"column `loss_trajectory` must hold as many values in every row; found {widths[:3]}."
            " Compute all rows with the same checkpoints."
        )
    width = int(widths[0]) if len(widths) else 0
    return values.astype(np.float32).reshape(len(offset) - 1, width)


def _ids(table: pa.Table) -> Ints:
    return np.asarray(table.column("id").to_numpy(), np.int64)


def lists(values: Array, offset: Ints, kind: pa.DataType) -> pa.ListArray:
    """(T,) values as a list column with those borders."""
    return pa.ListArray.from_arrays(pa.array(offset.astype(np.int32)), pa.array(values, kind))
