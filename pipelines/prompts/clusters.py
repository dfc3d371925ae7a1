"""Groups of like words, and one word to stand for each: a shorter list to measure.

The reference clusters a vocabulary's input embeddings into 2000 by k-means and takes the word
nearest to each centre (ClaPS, arXiv 2310.12774); two centres may then share a word. Here the word
is the nearest among the cluster's own, so each cluster has one and no two the same.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...pruners.contract import BoolArray, FloatArray, IntArray

Algorithm = Literal["kmeans", "minibatch"]

PUBLISHED_CLUSTERS = 2000
REPRESENTATIVE, IN_CLUSTER = "representative", "in_cluster"
_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Clustered:
    """Clusters of N words, all (N,) in the order of the words given.

    Attributes
    ----------
    cluster
        int32, from 0 in the order of the representatives' ids.
    distance
        float32, Euclidean, to the mean of the cluster.
    keep
        bool, the nearest word of each cluster.
    """

    cluster: npt.NDArray[np.int32]
    distance: FloatArray
    keep: BoolArray


def clusters_wanted(words: int, clusters: int | None) -> int | None:
    """How many clusters to make; None for none, every word then stands for itself.

    None takes the published 2000, and none for up to twice as many words, where clustering
    saves less than it can hide.
    """
    if clusters is not None:
        return min(clusters, words)
    return PUBLISHED_CLUSTERS if words > 2 * PUBLISHED_CLUSTERS else None


def unclustered(ids: IntArray) -> Clustered:
    """Every word in a cluster of its own."""
    n = len(ids)
    cluster = np.empty(n, np.int32)
    cluster[np.argsort(ids)] = np.arange(n, dtype=np.int32)
    return Clustered(cluster, np.zeros(n, np.float32), np.ones(n, np.bool_))


def cluster_words(
    ids: IntArray,
    vectors: FloatArray,
    clusters: int,
    *,
    algorithm: Algorithm = "kmeans",
    iterations: int = 300,
    seed: int = 0,
) -> Clustered:
    """Cluster words by k-means (k-means++ from `seed`, one start) and pick one for each cluster.

    The order of the words plays no part. Runs in one thread: sums of several threads would hang
    on their number. Fewer distinct vectors than clusters make one cluster each. A word's distance
    is that to the mean of its cluster, worked out in float64 and compared as float32, so that
    the words of a pair are as far off as each other; ties go to the smaller id.

    Parameters
    ----------
    ids, vectors
        (N,) int64, distinct, and (N, d) float32.

    Raises
    ------
    InputError
        A vector is not finite, or there is no word.
    """
    if not len(ids):
        raise InputError("expected words to cluster, found none. Look at `prompt_vocabulary`.")
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise InputError(
            f"the vector of word {int(ids[row])} is not finite. Use another model, or"
            " `vectors: encoder`."
        )
    order = np.argsort(ids)
    rows = np.ascontiguousarray(vectors[order], np.float32)
    distinct, copy_of = np.unique(rows, axis=0, return_inverse=True)
    label = copy_of.reshape(-1)
    if clusters < len(distinct):
        label = _kmeans(rows, clusters, algorithm, iterations, seed)
    distance = _distances(rows, label).astype(np.float32)
    # Sorted by (cluster, distance, id): the first of each cluster is its representative.
    ranked = np.lexsort((np.arange(len(rows)), distance, label))
    first = ranked[np.flatnonzero(np.diff(label[ranked], prepend=-1))]
    number = np.full(int(label.max()) + 1, -1, np.int32)
    number[label[np.sort(first)]] = np.arange(len(first), dtype=np.int32)
    keep = np.zeros(len(rows), np.bool_)
    keep[first] = True
    back = np.argsort(order)
    return Clustered(number[label][back], distance[back], keep[back])


def _kmeans(
    rows: FloatArray, clusters: int, algorithm: Algorithm, iterations: int, seed: int
) -> IntArray:
    """Cluster of each row, (N,) int64; a cluster may be empty."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    same: dict[str, Any] = {
        "n_clusters": clusters,
        "init": "k-means++",
        "n_init": 1,
        "max_iter": iterations,
        "random_state": seed % 2**32,
    }
    if algorithm == "kmeans":
        model: Any = KMeans(**same)
    else:
        # A batch smaller than the number of clusters leaves centres without a row.
        model = MiniBatchKMeans(**same, batch_size=max(_BATCH, 2 * clusters))
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Fewer clusters than asked for: they are counted in the table.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows)
    return np.asarray(model.labels_, np.int64)


def _distances(rows: FloatArray, label: IntArray) -> npt.NDArray[np.float64]:
    """Euclidean distance of each row to the mean of its cluster, (N,)."""
    order = np.argsort(label, kind="stable")
    starts = np.flatnonzero(np.diff(label[order], prepend=-1))
    counts = np.diff(np.append(starts, len(rows)))
    exact = rows[order].astype(np.float64)
    mean = np.add.reduceat(exact, starts, axis=0) / counts[:, None]
    exact -= np.repeat(mean, counts, axis=0)
    made = np.empty(len(rows))
    made[order] = np.sqrt(np.einsum("nd,nd->n", exact, exact))
    return made
