"""The micro-batches of one accumulation window as samples, and back to micro-batches.

A batch is what a collator of a causal language model gives: `input_ids` and `labels` (B, S), and
either an `attention_mask` (B, S), one sample a row, or `position_ids` alone, which start again at
0 with every document of a packed (padding-free) row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import InputError

IGNORE = -100
WEIGHT = "prunery_weight"  # (B, S) float32, in a batch whose tokens do not all weigh the same
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

Batch = dict[str, Any]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Piece:
    """One sample: columns `start` to `stop` (excluded) of row `row` of micro-batch `batch`."""

    batch: int
    row: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of its tokens."""
        return self.stop - self.start


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Do the rows of the batch hold several documents each, told apart by `position_ids`?"""
    return "attention_mask" not in batch and "position_ids" in batch


def check_batch(batch: Mapping[str, Any]) -> None:
    """Refuse a batch that cannot be taken apart into samples.

    Raises
    ------
    InputError
        `input_ids` or `labels` is missing, or something in the batch is not a (B, S) tensor.
    """
    for name in ("input_ids", "labels"):
        if not isinstance(batch.get(name), torch.Tensor):
            raise InputError(
                f"selection inside training needs `{name}` in every batch; found {sorted(batch)}."
                " Use a collator for causal language models that gives labels."
            )
    shape = batch["input_ids"].shape
    for name, value in batch.items():
        if name in _BORDERS and is_packed(batch):
            continue
        if name == "shift_labels" or not (isinstance(value, torch.Tensor) and value.shape == shape):
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(
                f"selection inside training understands batches of text; `{name}` must be a"
                f" tensor of shape {tuple(shape)} as `input_ids`; found {found}. Leave it out of"
                " the collator's output, or select before training and export."
            )


def pieces_of(batches: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """The samples of a window, micro-batch by micro-batch, row by row, document by document."""
    pieces: list[Piece] = []
    for number, batch in enumerate(batches):
        rows, width = batch["input_ids"].shape
        if is_packed(batch):
            starts = batch["position_ids"].eq(0).cpu()
            for row in range(rows):
                borders = [0, *starts[row].nonzero().flatten().tolist(), width]
                spans = pairwise(borders)
                pieces += [Piece(number, row, a, b) for a, b in spans if b > a]
            continue
        attended = batch["attention_mask"].ne(0).cpu() if "attention_mask" in batch else None
        for row in range(rows):
            columns = range(width) if attended is None else attended[row].nonzero().flatten()
            if len(columns):
                pieces.append(Piece(number, row, int(columns[0]), int(columns[-1]) + 1))
    return pieces


def candidates(batches: Sequence[Mapping[str, Any]], pieces: Sequence[Piece]) -> list[torch.Tensor]:
    """(B, S) bool of each micro-batch: tokens that are predicted and so may be trained.

    The first token of a sample is never predicted from the sample, whatever its label says.
    """
    masks = [batch["labels"].ne(IGNORE) for batch in batches]
    for piece in pieces:
        masks[piece.batch][piece.row, piece.start] = False
    return masks


def places(pieces: Sequence[Piece], trainable: Sequence[torch.Tensor]) -> tuple[Ints, Ints]:
    """Where the T trainable tokens of a window stand, in the order of its samples.

    Returns position (T,) int64, the token's place in its sample, and owner (T,) int64, the
    number of its sample. That order is also the order of the masks read row by row.
    """
    position, owner = [], []
    masks = [mask.cpu().numpy() for mask in trainable]
    for number, piece in enumerate(pieces):
        places = np.flatnonzero(masks[piece.batch][piece.row, piece.start : piece.stop])
        position.append(places)
        owner.append(np.full(len(places), number))
    return np.concatenate(position).astype(np.int64), np.concatenate(owner).astype(np.int64)


def scatter(values: npt.NDArray[Any], trainable: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """(T,) values back to the places of the trainable tokens, (B, S) each, 0 elsewhere."""
    made, start = [], 0
    for mask in trainable:
        count = int(mask.sum())
        part = torch.as_tensor(values[start : start + count], device=mask.device)
        made.append(torch.zeros(mask.shape, dtype=part.dtype, device=mask.device))
        made[-1][mask] = part
        start += count
    return made


def relabel(
    batches: Sequence[Batch],
    keep: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor] | None = None,
) -> list[Batch]:
    """The same micro-batches with the labels outside `keep` (B, S) at -100.

    Dropped tokens stay in the input, where they are context; only their loss goes. `weight`
    (B, S) float32 goes along where given.
    """
    made = []
    for number, batch in enumerate(batches):
        labels = batch["labels"].masked_fill(~keep[number], IGNORE)
        made.append(dict(batch) | {"labels": labels})
        if weight is not None:
            made[-1][WEIGHT] = weight[number]
    return made


def regroup(
    batches: Sequence[Batch], kept: Sequence[Piece], *, pad: int, multiple: int = 1
) -> list[Batch]:
    """As many micro-batches as before, made of the kept samples alone.

    The samples are ordered by length and cut into groups of equal count, so that padding is
    short; it stands on the right. All ranks of a job must take the same number of forward and
    backward passes, and no pass may be empty: where there are fewer samples than micro-batches,
    the rest get the first two tokens of a sample of the window with every label at -100, which
    adds exactly 0 to the loss and to the gradient (the routers' own loss of a mixture of
    experts aside).

    Parameters
    ----------
    batches
        The window, labels already those to train.
    kept
        Samples to train, any number of them.
    pad
        Token id for padding.
    multiple
        Widths are rounded up to a multiple of this.
    """
    groups = len(batches)
    ordered = sorted(kept, key=lambda piece: piece.length)
    cuts = [len(ordered) * number // groups for number in range(groups + 1)]
    stub = next(iter(pieces_of(batches)))
    stub = replace(stub, stop=min(stub.stop, stub.start + 2))
    made = []
    for low, high in pairwise(cuts):
        batch = _join(batches, ordered[low:high] or [stub], pad=pad, multiple=multiple)
        if low == high:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE)
        made.append(batch)
    return made


def by_length(
    batches: Sequence[Batch], pieces: Sequence[Piece], *, pad: int
) -> tuple[list[Batch], Ints]:
    """The whole window in micro-batches of like lengths, for scoring, which padding slows.

    Also the order (S,) in which the samples stand there, as numbers of `pieces`. Packed rows
    have no padding and stay as they are.
    """
    if is_packed(batches[0]):
        return list(batches), np.arange(len(pieces))
    order = np.argsort([piece.length for piece in pieces], kind="stable")
    return regroup(batches, pieces, pad=pad), order


def _join(batches: Sequence[Batch], pieces: Sequence[Piece], *, pad: int, multiple: int) -> Batch:
    if is_packed(batches[0]):
        return _concatenate(batches, pieces)
    longest = max(piece.length for piece in pieces)
    width = -(-longest // multiple) * multiple
    made: Batch = {}
    for name, like in batches[0].items():
        fill = {"input_ids": pad, "labels": IGNORE}.get(name, 0)
        out = like.new_full((len(pieces), width), fill)
        for row, piece in enumerate(pieces):
            out[row, : piece.length] = _cut(batches, piece, name)
        made[name] = out
    if "attention_mask" not in made and any(piece.length < width for piece in pieces):
        # Rows of one length need no mask; shorter ones beside them do.
        lengths = torch.tensor([piece.length for piece in pieces], device=made["labels"].device)
        columns = torch.arange(width, device=lengths.device)
        made["attention_mask"] = (columns < lengths[:, None]).long()
    return made


def _concatenate(batches: Sequence[Batch], pieces: Sequence[Piece]) -> Batch:
    """One packed row, with the borders that variable-length attention kernels read."""
    made: Batch = {}
    for name in batches[0]:
        if name not in _BORDERS:
            made[name] = torch.cat([_cut(batches, piece, name) for piece in pieces])[None]
    lengths = torch.tensor([piece.length for piece in pieces])
    borders = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    numbers = torch.repeat_interleave(torch.arange(len(pieces), dtype=torch.int32), lengths)
    fresh: Batch = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), borders)
    fresh |= dict.fromkeys(("max_length_q", "max_length_k"), int(lengths.max()))
    fresh["seq_idx"] = numbers[None]
    for name in _BORDERS:
        like = batches[0].get(name)
        if isinstance(like, torch.Tensor):
            made[name] = torch.as_tensor(fresh[name], dtype=like.dtype, device=like.device)
        elif like is not None:
            made[name] = fresh[name]
    return made


def _cut(batches: Sequence[Batch], piece: Piece, name: str) -> torch.Tensor:
    cut: torch.Tensor = batches[piece.batch][name][piece.row, piece.start : piece.stop]
    return cut
