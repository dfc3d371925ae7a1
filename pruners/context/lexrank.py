"""LexRank: the sentences that a passage itself leans on, whatever the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction

if TYPE_CHECKING:
    Matrix = Any  # scipy.sparse.csr_array

_STEPS = 160
"""Power steps: the error shrinks by 1 - jump each, 0.85^160 = 5e-12. A fixed number, so that
one passage's score does not depend on which others are in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LexRank:
    """Keep each passage's most central sentences; sees no question (LexRank, arXiv:1109.2128).

    Sentences are a graph weighted by idf-modified cosine (the paper's equation 1, which is the
    cosine of `term_weight` = tf * idf). score = N times the stationary probability of a walk that
    follows edges with probability 1 - `jump` and jumps anywhere with `jump` (equation 4), so 1
    is average in every passage. `threshold` None: weights are the cosines (continuous LexRank).
    A number: edges with cosine > threshold count 1, the others 0 (section 3.2).

    A sentence is its own neighbour with weight 1, as in the paper; so no row is empty, not even
    that of a sentence without terms, and no connected-component treatment is needed (as the
    `lexrank` distribution does). Rounded to 1e-6, so that equal sentences tie.

    Relations: `cosine` compares with the question instead; `first_k` often comes close.

    Attributes
    ----------
    keep
        Share of each passage's sentences; exactly ceil(keep * sentences).
    jump
        Probability of a jump, in (0, 1]; 0.15 in the paper's tables (its "damping factor d").
    threshold
        None, or the cosine above which an edge counts; 0.1 in the paper's tables.
    """

    unit: ClassVar[Unit] = "sentence"
    needs: ClassVar[frozenset[str]] = frozenset(
        {"id", "passage", "term_offset", "term", "term_weight"}
    )
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "passage"
    keep: float = 0.5
    jump: float = 0.15
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        if not 0.0 < self.jump <= 1.0:
            raise InputError(f"`jump` must lie in (0, 1]; found {self.jump}.")
        if self.threshold is not None:
            check_fraction("threshold", self.threshold)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N sentences; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        ids, passage = signals["id"], signals["passage"]
        score = np.zeros(len(ids), np.float32)
        if len(ids):
            # In the order of ids, so that sums do not depend on the order of rows.
            order = np.lexsort((ids, passage))
            score[order] = self._centrality(signals.take(order))
        keep = rules.top_fraction_by_group(score, ids, passage, self.keep)
        return Selection(keep, score, (~keep).astype(np.uint8), ("central", "peripheral"))

    def _centrality(self, signals: Signals) -> npt.NDArray[np.float32]:
        _, group, sizes = np.unique(signals["passage"], return_inverse=True, return_counts=True)
        vectors, lonely = _unit_rows(signals, group)
        start = 1.0 / sizes[group]
        walk = _thresholded(vectors, lonely, self.threshold) if self.threshold is not None else None

        def along(mass: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            if walk is not None:
                return np.asarray(walk @ mass)
            return np.asarray(vectors @ (vectors.T @ mass) + lonely * mass)

        degree = along(np.ones(len(group)))
        mass = start
        for _ in range(_STEPS):
            mass = self.jump * start + (1.0 - self.jump) * along(mass / degree)
        return np.round(mass * sizes[group], 6).astype(np.float32)


def _unit_rows(
    signals: Signals, group: npt.NDArray[np.int64]
) -> tuple[Matrix, npt.NDArray[np.float64]]:
    """Rows of unit length over (passage, term), and 1 where a row has no terms else 0, (N,)."""
    from scipy.sparse import csr_array

    offset, term = signals["term_offset"], signals["term"]
    weight = signals["term_weight"].astype(np.float64)
    n = len(offset) - 1
    row = np.repeat(np.arange(n), np.diff(offset))
    # A term of another passage is another column: similarities never cross passages.
    _, column = np.unique(np.stack([group[row], term]), axis=1, return_inverse=True)
    norm = np.sqrt(np.bincount(row, weights=weight**2, minlength=n))
    lonely = (norm == 0).astype(np.float64)
    unit = weight / np.where(norm == 0, 1.0, norm)[row]
    columns = int(column.max(initial=-1)) + 1
    return csr_array((unit, (row, column.ravel())), shape=(n, max(columns, 1))), lonely


def _thresholded(
    vectors: Matrix, lonely: npt.NDArray[np.float64], threshold: float, block: int = 1024
) -> Matrix:
    """1 where the cosine exceeds the threshold, and on the diagonal; in blocks of rows."""
    from scipy.sparse import diags_array, vstack

    parts = []
    for start in range(0, vectors.shape[0], block):
        part = (vectors[start : start + block] @ vectors.T).tocsr()
        # Rounded: a cosine of exactly the threshold must not depend on the last bit.
        part.data = (np.round(part.data, 9) > threshold).astype(np.float64)
        part.eliminate_zeros()
        parts.append(part)
    edges = vstack(parts).tocsr()
    return (edges + diags_array(1.0 - edges.diagonal())).tocsr()
