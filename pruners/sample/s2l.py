"""S2L: equal shares of the clusters of loss trajectories, small clusters first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import (
    Budget,
    FloatArray,
    IntArray,
    Scope,
    Selection,
    Signals,
    Unit,
    check_count,
    check_fraction,
)
from .best import keep_best


@dataclass(frozen=True, slots=True, kw_only=True)
class S2L:
    """Keep equal shares of the clusters of rows that were learned alike (arXiv:2403.07384).

    Rows are clustered by `loss_trajectory`, their mean loss in nats under the checkpoints of
    one run of a small model (k-means, scikit-learn, one start). Budget is given to clusters
    from the smallest up: each gets an equal share of what is left, so small clusters are kept
    whole and large ones are cut to one size. Inside a cluster rows are drawn.

    score = minus the row's place in the draw of its own cluster; highest kept. That gives the
    same shares as the paper's loop, to one row a cluster, and makes a larger budget keep a
    superset; the rows of the last, part-filled place go by smaller id.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    clusters
        Number of clusters; fewer where there are fewer distinct trajectories.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "loss_trajectory"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5
    clusters: int = 100

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_count("clusters", self.clusters, low=1)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        ids = signals.require(self.needs)["id"]
        cluster = np.zeros(len(ids), np.int64)
        # In the order of ids, so that the order of rows does not move a centre.
        order = np.argsort(ids)
        cluster[order] = cluster_rows(signals["loss_trajectory"][order], self.clusters, seed)
        place = rules.rank_in_group(rules.uniform(seed, ids), ids, cluster)
        score = (-place).astype(np.float32)
        return keep_best(signals, score, self.keep, ("in_share", "beyond_share"))


def cluster_rows(trajectory: FloatArray, clusters: int, seed: int) -> IntArray:
    """Cluster of each row of `trajectory` (N, d) by k-means, (N,) int64."""
    from sklearn.cluster import KMeans

    distinct = len(np.unique(trajectory, axis=0))
    if distinct <= 1:
        return np.zeros(len(trajectory), np.int64)
    means = KMeans(min(clusters, distinct), n_init=1, random_state=seed % 2**32)
    # float64: the order in which threads add up must not move a row to another cluster.
    return np.asarray(means.fit_predict(trajectory.astype(np.float64)), np.int64)
