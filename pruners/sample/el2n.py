"""EL2N: rows by the length of the error vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .epochs import EpochScore


@dataclass(frozen=True, slots=True, kw_only=True)
class El2n(EpochScore):
    """Keep the rows with the longest error vector (EL2N, arXiv:2107.07075).

    score = mean over epochs and runs of the signal `el2n`, the Euclidean length of
    (softmax(logits) - one-hot label); higher = harder = kept. Flipped labels score high too, so
    with noisy labels and a small `keep` the noise is what is kept: cut the hardest first (`ccs`)
    or keep the easy ones.

    Departures: the paper scores one early epoch (10 to 20 of 200) over ten or more runs; here
    it is every epoch unless `first_epoch` and `last_epoch` say otherwise, and as many runs as
    were trained. Others sum over the first ten epochs of one run: `last_epoch=9, reduce="sum"`.

    Measured (benchmarks/RESULTS.md): on MNIST with clean labels better than random rows from
    30 % on; with 20 % wrong labels worse at every fraction without a teacher, better from 30 % on
    with one. On CIFAR-10 at 50 % worse by 19.5 points, with a teacher by 4.8.

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

    needs: ClassVar[frozenset[str]] = frozenset({"id", "el2n"})
    signal: ClassVar[str] = "el2n"
