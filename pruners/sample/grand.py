"""GraNd: rows by the length of their gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .epochs import EpochScore


@dataclass(frozen=True, slots=True, kw_only=True)
class Grand(EpochScore):
    """Keep the rows with the longest gradient of their own loss (GraNd, arXiv:2107.07075).

    score = mean over epochs and runs of the signal `gradient_norm`; higher = harder = kept. Which
    parameters the gradient is over, the last layer's or all, is decided where the signal is made.

    There is no score at initialisation: the published result of that kind came from a
    checkpoint error, and without it the score follows the input's norm and does not beat random
    (Kirsch 2023, arXiv:2303.14753). The signal is taken after each epoch, the first one included.

    Departures: as for `el2n`. Each row's norm is that of its own gradient, undivided by any batch
    size.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    order
        "hard" keeps the highest, as published; "easy" the lowest.
    first_epoch, last_epoch
        The epochs to use, counted from 0, both ends included; None is the last one of a run.
    reduce
        "mean" or "sum" over those epochs; it moves the score and no choice.
    runs
        Training runs whose epochs stand side by side in the trajectory.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"id", "gradient_norm"})
    signal: ClassVar[str] = "gradient_norm"
