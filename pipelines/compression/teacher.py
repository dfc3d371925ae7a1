"""What a dense model says about each token, small enough to keep: its top logits and the rest.

For each target the k most likely tokens are kept with their log probabilities, and the mass of
all others as one number. A student is compared over those k + 1 classes. By the data-processing
inequality the divergence is at most that over the whole vocabulary, and it is equal to it where
k is the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from ...errors import InputError, ModelError
from ...storage import Table
from .teacher_tables import teacher_schema

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Targets:
    """What a teacher says about N targets.

    Attributes
    ----------
    indices
        (N, k) int64, ids of the most likely tokens, ascending; ties for the last place go to the
        smaller id.
    values
        (N, k) float32, their natural log probabilities (logit - logsumexp).
    tail
        (N,) float32, natural log of the mass of all other tokens; -inf where there are none.
    logsumexp
        (N,) float32, of the logits, nats.
    """

    indices: Tensor
    values: Tensor
    tail: Tensor
    logsumexp: Tensor

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        parts = (self.indices, self.values, self.tail, self.logsumexp)
        return Targets(*(part.to(device) for part in parts))


def teacher_targets(logits: Tensor, k: int) -> Targets:
    """Keep the k largest of each row of logits (N, V); k beyond V is V."""
    k = min(k, logits.shape[1])
    wide = logits.double()
    border = torch.topk(wide, k, dim=1, sorted=True).values[:, -1:]
    above, equal = wide > border, wide == border
    room = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= room))
    indices = chosen.nonzero()[:, 1].reshape(len(logits), k)
    whole = wide.logsumexp(1)
    values = wide.gather(1, indices) - whole[:, None]
    tail = wide.masked_fill(chosen, -torch.inf).logsumexp(1) - whole
    return Targets(indices, values.float(), tail.float(), whole.float())


def target_divergence(logits: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) over k + 1 classes for each target, (N,) nats; 0 = they agree.

    Parameters
    ----------
    logits
        (N, V) of the student, with gradients where it is trained.
    targets
        Of the same N places.
    temperature
        Both distributions over the k + 1 classes are raised to 1 / temperature and scaled to
        sum 1. Where k is the vocabulary this is the tempered softmax of Hinton et al.
        (arXiv:1503.02531); below that the tail is tempered as one class, since its tokens are
        not known apart.
    """
    student = _classes(logits, targets.indices)
    teacher = torch.cat([targets.values, targets.tail[:, None]], 1).to(student)
    if targets.indices.shape[1] == logits.shape[1]:
        student, teacher = student[:, :-1], teacher[:, :-1]
    # Rounded log probabilities do not quite sum to 1.
    teacher = torch.log_softmax(teacher / temperature, 1)
    student = torch.log_softmax(student / temperature, 1)
    share = teacher.exp()
    # A tail that float32 rounds to no mass at all adds nothing: 0 log 0 = 0.
    apart = torch.where(share > 0, teacher - student, torch.zeros_like(student))
    return (share * apart).sum(1)


def _classes(logits: Tensor, indices: Tensor) -> Tensor:
    """Log mass of the chosen tokens and, last, of all others together, (N, k + 1)."""
    logits = logits.float()
    whole = logits.logsumexp(1, keepdim=True)
    top = logits.gather(1, indices) - whole
    if indices.shape[1] == logits.shape[1]:
        return torch.cat([top, torch.zeros_like(whole)], 1)
    rest = logits.scatter(1, indices, -torch.inf).logsumexp(1, keepdim=True) - whole
    return torch.cat([top, rest], 1)


def targets_row(
    id_: int, positions: Array, targets: Targets, schema: pa.Schema
) -> dict[str, Array | int]:
    """One row of the teacher's table: `positions` are those of the targets in the row."""
    value = schema.field("values").type.value_type.to_pandas_dtype()
    return {
        "id": id_,
        "token_position": positions.astype(np.int32),
        "values": targets.values.cpu().numpy().ravel().astype(value),
        "indices": targets.indices.cpu().numpy().ravel().astype(np.int32),
        "tail": targets.tail.cpu().numpy(),
        "logsumexp": targets.logsumexp.cpu().numpy(),
    }


class TeacherTable:
    """A table of the step `teacher_logits`, asked by row and position."""

    def __init__(self, table: Table) -> None:
        if table.schema.names != teacher_schema(pa.float32()).names:
            raise InputError(
                f"`{table.manifest.name}`: expected the columns of a teacher_logits table; found"
                f" {', '.join(table.schema.names)}. Give the step's table as `teacher`."
            )
        self._table = table

    def targets(self, ids: Sequence[int], positions: Sequence[Array]) -> Targets:
        """Targets of some rows at those positions of each, one after another.

        Raises InputError where the teacher was not asked about a row or position.
        """
        found = self._table.lookup(ids, missing="skip").to_pylist()
        rows = {row["id"]: row for row in found}
        parts: list[tuple[Array, Array, Array, Array]] = []
        for id_, wanted in zip(ids, positions, strict=True):
            if id_ not in rows:
                raise InputError(
                    f"`{self._table.manifest.name}`: expected what the teacher says about row"
                    f" {id_}; found none. Make teacher_logits from the same rows."
                )
            parts.append(self._row(rows[id_], wanted))
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        indices, values, tail, whole = (torch.from_numpy(column) for column in columns)
        return Targets(indices, values, tail, whole)

    def _row(self, row: dict[str, Any], wanted: Array) -> tuple[Array, Array, Array, Array]:
        known = np.array(row["token_position"], np.int64)
        at = np.searchsorted(known, wanted)
        missing = (at >= len(known)) | (known[np.minimum(at, len(known) - 1)] != wanted)
        if missing.any():
            raise InputError(
                f"`{self._table.manifest.name}`, row {row['id']}: expected what the teacher says"
                f" about position {int(wanted[np.argmax(missing)])}; found others. Make"
                " teacher_logits from the same rows."
            )
        k = len(row["indices"]) // len(known)
        indices = np.array(row["indices"], np.int64).reshape(-1, k)
        values = np.array(row["values"], np.float32).reshape(-1, k)
        tail, whole = np.array(row["tail"], np.float32), np.array(row["logsumexp"], np.float32)
        return indices[at], values[at], tail[at], whole[at]


def ask_teacher(
    model: Any,
    rows: Sequence[tuple[int, Array, Array]],
    *,
    k: int,
    tokens: int,
    schema: pa.Schema,
) -> list[dict[str, Any]]:
    """Rows of the teacher's table, in the order given.

    Parameters
    ----------
    model
        A causal model of transformers.
    rows
        Id, token ids (L,) and positions of the targets (T,), T >= 1.
    k, tokens
        Entries to keep of each target, and padded tokens in a batch at most.
    schema
        Of `teacher_schema`.

    Raises ModelError, naming the row, where logits are not finite.
    """
    order = sorted(range(len(rows)), key=lambda at: (len(rows[at][1]), rows[at][0]))
    made: dict[int, dict[str, Any]] = {}
    group: list[int] = []
    for at in order:
        if group and (len(group) + 1) * len(rows[at][1]) > tokens:
            made |= _ask(model, rows, group, k, schema)
            group = []
        group.append(at)
    if group:
        made |= _ask(model, rows, group, k, schema)
    return [made[at] for at in range(len(rows))]


def _ask(
    model: Any,
    rows: Sequence[tuple[int, Array, Array]],
    group: list[int],
    k: int,
    schema: pa.Schema,
) -> dict[int, dict[str, Any]]:
    longest = max(len(rows[at][1]) for at in group)
    ids = torch.zeros((len(group), longest), dtype=torch.int64)
    valid = torch.zeros_like(ids)
    for place, at in enumerate(group):
        size = len(rows[at][1])
        ids[place, :size] = torch.from_numpy(rows[at][1])
        valid[place, :size] = 1
    with torch.no_grad():
        logits = model(
            input_ids=ids.to(model.device),
            attention_mask=None if bool(valid.all()) else valid.to(model.device),
            use_cache=False,
        ).logits
    made = {}
    for place, at in enumerate(group):
        id_, _, positions = rows[at]
        here = logits[place, torch.from_numpy(positions - 1).to(logits.device)]
        if not bool(torch.isfinite(here).all()):
            raise ModelError(
                f"row {id_}: expected finite logits of the teacher; found others. Use a wider"
                " dtype, or look at that row."
            )
        made[at] = targets_row(id_, positions, teacher_targets(here, k), schema)
    return made
