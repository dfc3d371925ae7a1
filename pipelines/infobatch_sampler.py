"""InfoBatch inside a training loop: each epoch skips other easy rows, and weighs up the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import InputError
from ..pruners.contract import Signals, check_fraction
from ..pruners.sample.infobatch import InfoBatch
from ..storage import digest, row_id

IntArray = npt.NDArray[np.int64]


class InfoBatchSampler(Sampler[int]):
    """Positions of the rows to train on this epoch (InfoBatch, arXiv:2303.04947).

        sampler = InfoBatchSampler(ids, epochs=30)
        for epoch in range(30):
            for x, y, index in DataLoader(rows, batch_size=64, sampler=sampler):
                loss = F.cross_entropy(model(x), y, reduction="none")
                sampler.update(index, loss.detach())
                (loss * sampler.weight(index)).mean().backward()

    A row is easy where its last known loss is below the mean of the known ones; each easy row is
    skipped with probability `ratio`, and weighs 1 / (1 - ratio) where it is not, so the expected
    gradient of an epoch is that of all rows. The first epoch has all rows, and so have the last
    ones, from epoch floor(delta * epochs) on. A row whose loss is not known yet is kept.

    What is skipped is a function of (seed, epoch, id) and the losses, the order of (seed, epoch).
    Losses are float64 and ids int64, in arrays of their own: in float32 an id above 2^24 would
    be that of another row. The data set returns each row's position beside it, for `index`.

    Parameters
    ----------
    ids
        (N,) int64, unique; or N for the ids 0 to N - 1.
    epochs
        Of the whole training.
    ratio
        Probability that an easy row is skipped, 0 to below 1.
    delta
        Share of the epochs that skip rows, 0 to 1.
    seed
        Of what is skipped, and of the order.

    Raises InputError where an argument does not fit.
    """

    def __init__(
        self,
        ids: int | npt.ArrayLike,
        *,
        epochs: int,
        ratio: float = 0.5,
        delta: float = 0.875,
        seed: int = 0,
    ) -> None:
        check_fraction("ratio", ratio)
        check_fraction("delta", delta)
        if ratio == 1.0 or epochs < 1:
            raise InputError(
                f"expected a ratio below 1 and at least one epoch; found {ratio} and {epochs}."
            )
        self.ids = np.arange(ids) if isinstance(ids, int) else np.asarray(ids, np.int64)
        self.epochs, self.seed = epochs, seed
        self.epoch = 0
        self._method = InfoBatch(ratio=ratio)
        self._full_from = math.floor(round(delta * epochs, 9))
        self._loss = np.full(len(self.ids), np.nan)
        self._weight = np.ones(len(self.ids), np.float32)
        self._under_way: int | None = None  # rows of the epoch under way
        Signals({"id": self.ids})  # refuses a repeated id

    def __iter__(self) -> Iterator[int]:
        """The next epoch's positions; it counts as done when the last one was taken."""
        keep, self._weight = self._draw()
        rows = np.flatnonzero(keep)
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(rows))
        self._under_way = len(rows)
        yield from rows[order].tolist()
        self.epoch += 1
        self._under_way = None

    def __len__(self) -> int:
        """Rows of the epoch under way, else of the next one as the losses stand now."""
        return int(self._draw()[0].sum()) if self._under_way is None else self._under_way

    def update(self, index: npt.ArrayLike | Tensor, loss: npt.ArrayLike | Tensor) -> None:
        """Take the losses (n,) in nats of the rows at those positions (n,).

        They count from the next epoch on. Raises InputError where a loss is not finite or the
        arrays do not fit.
        """
        rows, found = self._positions(index), _array(loss).astype(np.float64)
        if found.shape != rows.shape or not np.isfinite(found).all():
            raise InputError(
                f"expected one finite loss for each of {len(rows)} rows; found shape"
                f" {found.shape}{'' if np.isfinite(found).all() else ', some not finite'}."
                " Lower the learning rate, or give each row's own loss (reduction='none')."
            )
        self._loss[rows] = found

    def weight(self, index: npt.ArrayLike | Tensor) -> Tensor:
        """(n,) float32 that the losses of those rows are multiplied by this epoch."""
        made = torch.from_numpy(self._weight[self._positions(index)])
        return made.to(index.device) if isinstance(index, Tensor) else made

    def state_dict(self) -> dict[str, Any]:
        """Epochs done and the losses, to go on from after an epoch; see `load_state_dict`."""
        return {"epoch": self.epoch, "loss": self._loss.copy(), "rows": digest(self.ids.tolist())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises InputError for another data set's state."""
        if state["rows"] != digest(self.ids.tolist()):
            raise InputError(
                f"expected the state of a sampler of these {len(self.ids)} rows; found one of"
                f" others ({len(state['loss'])} rows)."
            )
        self.epoch, self._loss = int(state["epoch"]), np.array(state["loss"], np.float64)
        self._weight = np.ones(len(self.ids), np.float32)
        self._under_way = None

    def _draw(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Which rows the epoch has, and their weights; 0 where they are skipped."""
        keep, weight = np.ones(len(self.ids), np.bool_), np.ones(len(self.ids), np.float32)
        known = np.flatnonzero(np.isfinite(self._loss))
        if self.epoch == 0 or self.epoch >= self._full_from or not len(known):
            return keep, weight
        # Only the place beside the mean counts, so that a loss may be negative.
        loss = self._loss[known] - self._loss[known].min()
        signals = Signals({"id": self.ids[known], "answer_loss": loss})
        selection = self._method(signals, seed=row_id("infobatch", self.seed, self.epoch))
        keep[known], weight[known] = selection.keep, selection.weight
        return keep, weight

    def _positions(self, index: npt.ArrayLike | Tensor) -> IntArray:
        rows = _array(index)
        bad = rows.dtype.kind not in "iu" or rows.ndim != 1
        if bad or (len(rows) and not (rows.min() >= 0 and rows.max() < len(self.ids))):
            raise InputError(
                f"expected positions (n,) from 0 to {len(self.ids) - 1}; found {rows.dtype}"
                f" {rows.shape}{'' if bad else f' from {rows.min()} to {rows.max()}'}."
            )
        return rows.astype(np.int64)


def _array(value: npt.ArrayLike | Tensor) -> npt.NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
