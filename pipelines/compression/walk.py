"""The walk through a model's layers: one block in memory, hidden states on disk, resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...errors import InputError, ModelError
from ...pruners.finite import all_finite
from ...pruners.models.block_layouts import BlockLayout
from ...pruners.models.streamed_model import StreamedModel
from ...pruners.signals.block_statistics import AllSeenError
from .journal import LayerJournal

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right.

    Attributes
    ----------
    rows
        Positions of the rows in the table, (B,) int64.
    input_ids, valid
        (B, T) int64, and (B, T) bool: False where padded.
    counted
        (B, T) bool: the tokens that statistics are taken over, all valid ones or some of them.
    """

    rows: npt.NDArray[np.int64]
    input_ids: Tensor
    valid: Tensor
    counted: Tensor


def batches_of(
    rows: Sequence[npt.ArrayLike],
    *,
    tokens: int,
    pad: int = 0,
    counted: Sequence[npt.ArrayLike] | None = None,
) -> list[Batch]:
    """Rows of token ids in batches of at most `tokens` padded tokens; rows of like length together.

    A longer row goes alone. The same rows give the same batches. `counted` says for each token of
    each row whether statistics look at it; all do where it is not given.
    """
    ids = [np.asarray(row, np.int64) for row in rows]
    marks = [np.ones(len(row), np.bool_) for row in ids]
    if counted is not None:
        marks = [np.asarray(row, np.bool_) for row in counted]
    _check_rows(ids, marks)
    order = sorted(range(len(ids)), key=lambda row: (len(ids[row]), row))
    made: list[Batch] = []
    group: list[int] = []
    for row in order:
        if group and (len(group) + 1) * len(ids[row]) > tokens:
            made.append(_batch(ids, marks, group, pad))
            group = []
        group.append(row)
    if group:
        made.append(_batch(ids, marks, group, pad))
    return made


def _check_rows(ids: Sequence[Ints], marks: Sequence[Bools]) -> None:
    if not ids:
        raise InputError("expected calibration rows, found none. Read more, or lower the filters.")
    for row, (tokens, mark) in enumerate(zip(ids, marks, strict=True)):
        if len(tokens) < 2 or len(mark) != len(tokens):
            raise InputError(
                f"calibration row {row}: expected at least 2 tokens and a mark for each; found"
                f" {len(tokens)} and {len(mark)}. Leave short rows out (`shortest`)."
            )


def _batch(ids: Sequence[Ints], marks: Sequence[Bools], group: list[int], pad: int) -> Batch:
    longest = max(len(ids[row]) for row in group)
    tokens = torch.full((len(group), longest), pad, dtype=torch.int64)
    valid = torch.zeros((len(group), longest), dtype=torch.bool)
    counted = torch.zeros_like(valid)
    for place, row in enumerate(group):
        size = len(ids[row])
        tokens[place, :size] = torch.from_numpy(ids[row])
        valid[place, :size] = True
        counted[place, :size] = torch.from_numpy(marks[row])
    return Batch(np.array(group, np.int64), tokens, valid, counted)


@dataclass
class LayerVisit:
    """One layer of the walk, as the work done at it sees it.

    Attributes
    ----------
    layer, block
        Number, and the block with its weights; what is changed in it stays changed for what
        `forward` computes afterwards.
    dropped
        Set by a visit that removes the layer: its outputs are then its inputs.
    current
        The batch under way, for hooks.
    autocast
        Multiply in bfloat16 in passes (`torch.autocast`); hidden states keep their dtype.
    """

    model: StreamedModel
    layer: int
    block: nn.Module
    batches: Sequence[Batch]
    journal: LayerJournal
    dropped: bool = False
    current: Batch | None = None
    autocast: bool = False
    forwarded: bool = field(default=False, init=False)

    @property
    def layout(self) -> BlockLayout:
        """Of the model's architecture."""
        return self.model.layout

    def forward(
        self, each: Callable[[Batch, Tensor, Tensor], None] | None = None, *, keep: bool = True
    ) -> None:
        """Run the block over all batches; the outputs of the last call go to the next layer.

        `each` is called with a batch, its inputs and outputs (B, T, d). `keep=False` leaves the
        outputs of an earlier call as they are. Hooks of the caller see `current`.
        """
        for number, batch in enumerate(self.batches):
            self.current = batch
            hidden, out = self.one(number)
            if each is not None:
                each(batch, hidden, out)
            if keep:
                self.journal.put_hidden(self.layer + 1, number, out)
        self.current = None
        self.forwarded = self.forwarded or keep

    def one(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and outputs (B, T, d) of the block for one batch, without gradients.

        A hook may end the block's run early (`AllSeenError`): the outputs are then what entered
        the last matrix.
        """
        hidden = self.inputs(number)
        if self.dropped:
            return hidden, hidden
        call = self.call(number)
        with torch.no_grad(), torch.autocast(hidden.device.type, torch.bfloat16, self.autocast):
            try:
                out = self.model.run(self.block, hidden, call).to(hidden.dtype)
            except AllSeenError as seen:
                out = seen.last.view(*hidden.shape[:2], -1)
        # Padding may hold anything; it is looked at apart only where something is not finite.
        if not all_finite(out) and not all_finite(out[self.batches[number].valid.to(out.device)]):
            row = int(self.batches[number].rows[0])
            raise ModelError(
                f"layer {self.layer}: expected finite outputs; found a NaN or an infinity in the"
                f" batch of calibration row {row}. Use a wider dtype, or look at that row."
            )
        return hidden, out

    def inputs(self, number: int) -> Tensor:
        """What the block takes of a batch, (B, T, d)."""
        return self.journal.hidden(self.layer, number).to(self.model.device)

    def call(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The other arguments of the block for a batch."""
        batch = self.batches[number]
        return self.model.prepare(batch.input_ids, batch.valid).calls[self.layer]


Made = tuple[Mapping[str, Tensor], Sequence[Mapping[str, Any]]]


def walk(
    model: StreamedModel,
    batches: Sequence[Batch],
    journal: LayerJournal,
    visit: Callable[[LayerVisit], Made],
    *,
    replay: Callable[[LayerVisit, dict[str, Tensor], list[dict[str, Any]]], None] | None = None,
    each_layer: Callable[[int], None] | None = None,
    outputs: bool = True,
    autocast: bool = False,
) -> None:
    """Visit every layer in order, from where the journal stands.

    `visit` gets the layer with its dense weights and gives the tensors and rows to record. It may
    call `LayerVisit.forward` as often as it needs; where it does not, it is called once after
    it, so that the next layer gets what this one makes now. Where hidden states were lost (or the
    journal was made on another machine), done layers are run again: `replay` puts their recorded
    tensors back into the block, and without it the block runs as it is. `outputs=False` leaves out
    what the last layer gives, where nothing reads it; `autocast` is that of `LayerVisit`.
    """
    done = journal.done()
    start = done if done and journal.has_hidden(done, len(batches)) else 0
    if start == 0 and done < model.layers:
        for number, batch in enumerate(batches):
            hidden = model.prepare(batch.input_ids, batch.valid).hidden
            journal.put_hidden(0, number, hidden)
    for layer in range(start, model.layers):
        if done >= model.layers:
            break
        here = LayerVisit(model, layer, model.block(layer), batches, journal, autocast=autocast)
        if layer < done:
            if replay is not None:
                replay(here, journal.tensors(layer), journal.rows(layer))
            here.forward()
            continue
        tensors, rows = visit(here)
        if not here.forwarded and (outputs or layer + 1 < model.layers):
            here.forward()
        journal.record(layer, tensors, rows)
        # Else two layers would be in memory while the next is read and run.
        del here, tensors, rows
        if each_layer is not None:
            each_layer(layer)
