"""A method's decision about fine-tuning samples, put together as rows of the decision table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..pruners.contract import Array, Pruner, Selection, Signals
from ..pruners.strata import stratified
from ..pruners.token.qtuning import QTuning
from .decisions import BEFORE, spread
from .sft_signals import Bools, Ints, SftRows, lists
from .sft_tables import DECISION
from .tables import flat


@dataclass(frozen=True)
class Earlier:
    """What a decision before this one left: masks, and the words for what it dropped.

    Attributes
    ----------
    tokens
        (T,) bool, tokens that are still candidates.
    reason
        (N,) str, reason of each sample.
    weight
        (N,) float32.
    """

    tokens: Bools
    reason: npt.NDArray[np.object_]
    weight: npt.NDArray[np.float32]

    @classmethod
    def of(cls, table: pa.Table) -> Earlier:
        """Rows of a decision table, in the order of the samples at hand."""
        _, keep = flat(table.column("token_keep"))
        return cls(
            keep.astype(np.bool_),
            np.array(table.column("reason").to_pylist(), object),
            table.column("weight").to_numpy().astype(np.float32),
        )

    @classmethod
    def nothing(cls, rows: SftRows) -> Earlier:
        """No decision was taken yet."""
        n = len(rows.ids)
        every = np.ones(int(rows.offset[-1]), np.bool_)
        return cls(every, np.full(n, "", object), np.ones(n, np.float32))


def decide(
    pruner: Pruner, rows: SftRows, earlier: Earlier, *, seed: int, by_domain: bool
) -> tuple[pa.Table, dict[str, int]]:
    """Rows of `DECISION` in the order of the samples, and the dropped samples by reason.

    Only candidates are shown to the method: the tokens that `earlier` kept, and the samples
    that have one. Samples without a candidate keep their earlier reason.
    """
    decided = _over_tokens if pruner.unit == "token" else _over_samples
    columns = decided(pruner, rows, earlier, seed, by_domain)
    alive = _alive(rows, earlier)
    columns["reason"] = np.where(alive, columns["reason"], earlier.reason)
    keep = columns["token_keep"]
    kept = np.bincount(rows.owner[keep], minlength=len(rows.ids))
    columns["keep"] = kept > 0
    columns["kept_tokens"] = kept
    columns["tokens"] = rows.counts
    columns["weight"] = columns["weight"] * earlier.weight * columns["keep"]
    columns["id"] = rows.ids
    for name, source in (("error", "answer_loss"), ("uncertainty", "answer_entropy")):
        found = rows.sample_signal(source)
        if found is not None:
            columns[name] = found
    made = _table(columns, rows, over_tokens=pruner.unit == "token")
    dropped = columns["reason"][~columns["keep"]]
    names, counts = np.unique(dropped.astype(str), return_counts=True)
    return made, dict(zip(names.tolist(), counts.tolist(), strict=True))


def _alive(rows: SftRows, earlier: Earlier) -> Bools:
    """(N,) bool, samples with a candidate; a sample without tokens is one where none went."""
    left = np.bincount(rows.owner[earlier.tokens], minlength=len(rows.ids))
    return np.asarray((left > 0) | (rows.counts == 0), np.bool_)


def _codes(domains: list[str]) -> Ints:
    return np.unique(np.array(domains, dtype=str), return_inverse=True)[1].astype(np.int64)


def _select(pruner: Pruner, signals: Signals, strata: Ints | None, seed: int) -> Selection:
    if strata is None:
        return pruner(signals, seed=seed)
    return stratified(pruner, signals, strata, seed=seed)


def _over_samples(
    pruner: Pruner, rows: SftRows, earlier: Earlier, seed: int, by_domain: bool
) -> dict[str, Array]:
    n = len(rows.ids)
    alive = np.flatnonzero(_alive(rows, earlier))
    strata = _codes(rows.domains)[alive] if by_domain else None
    selection = _select(pruner, rows.of_samples(pruner, alive), strata, seed)
    keep = np.zeros(n, np.bool_)
    keep[alive] = selection.keep
    rival = np.full(n, -1, np.int64)
    rival[alive] = np.where(selection.rival < 0, -1, alive[np.maximum(selection.rival, 0)])
    return {
        "score": spread(n, alive, selection.score, 0.0),
        "threshold": spread(n, alive, selection.threshold, np.nan),
        "weight": spread(n, alive, selection.weight, 0.0),
        "rival": rival,
        "reason": spread(n, alive, np.array(selection.reason_names(), object), BEFORE),
        "token_keep": keep[rows.owner] & earlier.tokens,
    }


def _over_tokens(
    pruner: Pruner, rows: SftRows, earlier: Earlier, seed: int, by_domain: bool
) -> dict[str, Array]:
    n, total = len(rows.ids), int(rows.offset[-1])
    at = np.flatnonzero(earlier.tokens)
    owner = rows.owner[at]
    strata = _codes(rows.domains)[owner] if by_domain else None
    signals = rows.of_tokens(pruner, at)
    selection = _select(pruner, signals, strata, seed)
    best = np.full(n, -np.inf)
    np.maximum.at(best, owner, selection.score)
    columns: dict[str, Array] = {
        "score": np.where(np.isfinite(best), best, 0.0).astype(np.float32),
        "threshold": np.full(n, np.nan, np.float32),
        "weight": np.ones(n, np.float32),
        "rival": np.full(n, -1, np.int64),
        "reason": _reason_of_samples(selection, owner, n),
        "token_keep": spread(total, at, selection.keep, False),
        "token_score": spread(total, at, selection.score, 0.0),
        "token_reason": spread(total, at, selection.reason, len(selection.reasons)),
    }
    if isinstance(pruner, QTuning):
        columns |= _plane(pruner, signals, strata, rows.ids, seed)
    return columns


def _reason_of_samples(selection: Selection, owner: Ints, n: int) -> npt.NDArray[np.object_]:
    """The most frequent reason among a sample's kept tokens, or among all where none is kept.

    Ties go to the reason that the method lists first.
    """
    kinds = len(selection.reasons)
    kept = np.bincount(owner[selection.keep], minlength=n) > 0
    counted = selection.keep | ~kept[owner]
    votes = np.bincount(
        owner[counted] * kinds + selection.reason[counted], minlength=n * kinds
    ).reshape(n, kinds)
    made = np.array(selection.reasons, object)[votes.argmax(axis=1)]
    return np.where(votes.any(axis=1), made, BEFORE)


def _plane(
    pruner: QTuning, signals: Signals, strata: Ints | None, ids: Ints, seed: int
) -> Mapping[str, Array]:
    """Quadrant of each sample (0 where it was no candidate), and whether the top-up took it."""
    quadrant = np.zeros(len(ids), np.uint8)
    topped = np.zeros(len(ids), np.bool_)
    order = np.argsort(ids)
    groups = [np.arange(signals.n)]
    if strata is not None:
        groups = [np.flatnonzero(strata == code) for code in np.unique(strata)]
    for rows in groups:
        if len(rows):
            plane = pruner.plane(signals.take(rows), seed=seed)
            at = order[np.searchsorted(ids[order], plane.sample)]
            quadrant[at] = plane.quadrant
            topped[at] = plane.topped_up
    return {"quadrant": quadrant, "topped_up": topped}


def _table(columns: Mapping[str, Array], rows: SftRows, *, over_tokens: bool) -> pa.Table:
    none = pa.nulls(len(rows.ids))
    empty = np.zeros(len(rows.ids) + 1, np.int64)
    made = []
    for column in DECISION:
        values = columns.get(column.name)
        if pa.types.is_list(column.type):
            borders = rows.offset if column.name == "token_keep" or over_tokens else empty
            kind = column.type.value_type
            made.append(lists(values if values is not None else np.zeros(0), borders, kind))
        elif values is None:
            made.append(none.cast(column.type))
        elif column.name == "threshold":
            made.append(pa.array(values, column.type, mask=np.isnan(values)))
        elif column.name == "rival":
            rival = rows.ids[np.maximum(values, 0)] if len(values) else values
            made.append(pa.array(rival, column.type, mask=values < 0))
        elif column.name == "quadrant":
            made.append(pa.array(values, column.type, mask=values == 0))
        else:
            made.append(pa.array(values, column.type))
    return pa.Table.from_arrays(made, schema=DECISION)
