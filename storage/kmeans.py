"""Spherical k-means by FAISS, and the nearest centre of each row, the same on every run."""

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .faiss_threads import faiss_threads, load_faiss
from .vector_build import Floats, checked_vectors

# float32 unit vectors miss a cosine of 1 by a few ulps.
_SAME = 1e-6
_BLOCK = 8192


def spherical_kmeans(
    vectors: NDArray[np.float32],
    clusters: int,
    *,
    iterations: int = 20,
    threads: int | None = None,
) -> Floats:
    """Return the centres of unit vectors, as unit vectors.

    The first `clusters` distinct rows are the first centres, so the order of the rows is the
    seed: give them in a random one. A centre that loses all its rows takes over a part of
    another's. The centres do not depend on the number of threads.

    Args:
        vectors: (M, d) float32, each of length 1 or, to no effect, of length 0.
        clusters: how many centres, at least 1.
        iterations: rounds of assignment and mean.
        threads: as for `VectorIndex.build`.

    Returns:
        (C, d) float32. C is `clusters`, or the number of distinct rows other than 0 where
        that is no more: each is a centre then, and no round is run.

    Raises:
        InputError: wrong shape or type, a number that is not finite, or a count below 1.
    """
    for name, value in (("clusters", clusters), ("iterations", iterations)):
        if value < 1:
            raise InputError(f"expected {name} to be at least 1, found {value}")
    rows = checked_vectors(vectors, 0)
    rows = np.ascontiguousarray(rows[rows.any(axis=1)])
    first = _first_distinct(rows, clusters + 1)
    if len(first) <= clusters:
        return rows[first]
    faiss = load_faiss()
    parameters = faiss.ClusteringParameters()
    parameters.niter = iterations
    parameters.spherical = True
    # few or many rows for a centre are the caller's choice: no warning, no second sample
    parameters.min_points_per_centroid = 1
    parameters.max_points_per_centroid = len(rows)
    means = faiss.Clustering(rows.shape[1], clusters, parameters)
    faiss.copy_array_to_vector(rows[first[:clusters]].ravel(), means.centroids)
    with faiss_threads(threads):
        means.train(rows, faiss.IndexFlatIP(rows.shape[1]))
    centres = faiss.vector_to_array(means.centroids)
    return np.asarray(centres, np.float32).reshape(clusters, -1)


def _first_distinct(rows: Floats, most: int) -> NDArray[np.int64]:
    """Numbers of the first rows that no earlier row equals, at most `most`."""
    seen: dict[bytes, int] = {}
    for i, row in enumerate(rows + np.float32(0)):  # -0 and 0 are one number
        seen.setdefault(row.tobytes(), i)
        if len(seen) == most:
            break
    return np.fromiter(seen.values(), np.int64, len(seen))


def nearest_centres(
    vectors: NDArray[np.float32], centres: NDArray[np.float32], *, threads: int | None = None
) -> tuple[NDArray[np.int64], Floats]:
    """Return the nearest centre of each row and the cosine distance to it.

    Where FAISS's float32 products cannot tell two centres apart, float64 does, and then the
    smaller number: equal rows get equal clusters in whatever batch they come.

    Args:
        vectors: (N, d) float32, each of length 1, or 0: such a row has cluster 0, distance 1.
        centres: (C, d) float32 unit vectors.
        threads: as for `VectorIndex.build`.

    Returns:
        cluster (N,) int64 and 1 - cosine (N,) float32, in [0, 2], below 1e-6 given as 0.

    Raises:
        InputError: wrong shape or type, or a number that is not finite.
    """
    rows = checked_vectors(vectors, 0, centres.shape[1])
    cluster = np.zeros(len(rows), np.int64)
    distance = np.ones(len(rows), np.float32)
    if not len(centres):
        return cluster, distance
    faiss = load_faiss()
    index = faiss.IndexFlatIP(centres.shape[1])
    index.add(np.ascontiguousarray(centres))
    wide = centres.astype(np.float64)
    # each of about d float32 operations is off by up to 2^-24 of a product of unit vectors
    error = 2 * (centres.shape[1] + 4) * 2.0**-24
    with faiss_threads(threads):
        for start in range(0, len(rows), _BLOCK):
            block = np.ascontiguousarray(rows[start : start + _BLOCK])
            cosine, found = index.search(block, 2)  # the second is -inf where one is all
            filled = block.any(axis=1)
            nearest = np.where(filled, found[:, 0], 0)
            for row in np.flatnonzero(filled & (cosine[:, 0] - cosine[:, 1] <= error)):
                nearest[row] = (wide * block[row]).sum(axis=1).argmax()
            apart = 1.0 - (wide[nearest] * block).sum(axis=1)
            cluster[start : start + _BLOCK] = nearest
            distance[start : start + _BLOCK] = np.where(apart < _SAME, 0.0, apart)
    return cluster, np.minimum(distance, np.float32(2))
