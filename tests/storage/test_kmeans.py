"""Spherical k-means: the definition, the same on every run, and odd inputs."""

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.storage import nearest_centres, spherical_kmeans


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def blobs(clusters, each, d=16, seed=0):
    rng = np.random.default_rng(seed)
    centres = unit(rng.standard_normal((clusters, d)))
    label = rng.permutation(np.repeat(np.arange(clusters), each))
    return unit(centres[label] + 0.05 * rng.standard_normal((len(label), d))), label


def objective(vectors, centres):
    return float((vectors @ centres.T).max(axis=1).sum())


def test_blobs_are_found():
    vectors, label = blobs(4, 50)
    rng = np.random.default_rng(0)
    starts = [vectors[rng.permutation(200)] for _ in range(20)]
    found = [spherical_kmeans(rows, 4) for rows in starts]
    best = max(found, key=lambda centres: objective(vectors, centres))
    cluster, distance = nearest_centres(vectors, best)
    assert len({(a, b) for a, b in zip(cluster, label, strict=True)}) == 4
    assert distance.max() < 0.1


def test_a_round_is_assignment_and_normalised_mean():
    vectors, _ = blobs(5, 40)
    centres = spherical_kmeans(vectors, 4, iterations=3)
    wanted = vectors[:4].astype(np.float64)
    for _ in range(3):
        near = (vectors @ wanted.T).argmax(axis=1)
        means = np.stack([vectors[near == c].astype(np.float64).sum(axis=0) for c in range(4)])
        wanted = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(centres, wanted, atol=1e-5)
    assert objective(vectors, centres) > objective(vectors, vectors[:4])


def test_threads_and_runs_do_not_matter():
    vectors, _ = blobs(20, 100, d=48)
    centres = spherical_kmeans(vectors, 30, threads=1)
    assert np.array_equal(centres, spherical_kmeans(vectors, 30, threads=2))
    one, two = nearest_centres(vectors, centres, threads=1), nearest_centres(vectors, centres)
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])


def test_the_nearest_centre_and_the_distance_to_it():
    vectors, _ = blobs(9, 30)
    centres = unit(np.random.default_rng(1).standard_normal((7, 16)))
    cluster, distance = nearest_centres(vectors, centres)
    cosine = vectors.astype(np.float64) @ centres.T
    assert np.array_equal(cluster, cosine.argmax(axis=1))
    np.testing.assert_allclose(distance, 1 - cosine.max(axis=1), atol=1e-6)
    assert cluster.dtype == np.int64
    assert distance.dtype == np.float32


def test_a_tie_goes_to_the_smaller_number_in_a_batch_of_any_size():
    centre = unit(np.random.default_rng(2).standard_normal((1, 37)))
    other = unit(np.random.default_rng(3).standard_normal((1, 37)))
    centres = np.concatenate([other, centre, centre, centre])
    for size in (1, 19, 20, 300):
        cluster, distance = nearest_centres(np.repeat(centre, size, axis=0), centres)
        assert set(cluster.tolist()) == {1}
        assert not distance.any()


def test_no_more_centres_than_distinct_rows():
    vectors = np.repeat(unit(np.random.default_rng(4).standard_normal((3, 8))), 10, axis=0)
    vectors[5] = 0
    centres = spherical_kmeans(vectors, 50)
    assert np.array_equal(centres, vectors[[0, 10, 20]])
    assert np.array_equal(spherical_kmeans(vectors, 3), centres)
    cluster, distance = nearest_centres(vectors, centres)
    assert np.array_equal(cluster, [0] * 10 + [1] * 10 + [2] * 10)
    assert distance[5] == 1.0
    assert not np.delete(distance, 5).any()


def test_minus_zero_is_zero():
    vectors = np.array([[0.0, 1.0], [-0.0, 1.0]], np.float32)
    assert len(spherical_kmeans(vectors, 2)) == 1


def test_few_distinct_rows_among_many_copies_are_first_centres():
    vectors = np.repeat(unit(np.random.default_rng(5).standard_normal((6, 8))), 50, axis=0)
    centres = spherical_kmeans(vectors, 4, iterations=1)
    assert len(np.unique(centres.round(5), axis=0)) == 4


@pytest.mark.parametrize("rows", [np.zeros((0, 4), np.float32), np.zeros((3, 4), np.float32)])
def test_no_row_with_a_direction(rows):
    centres = spherical_kmeans(rows, 2)
    assert centres.shape == (0, 4)
    cluster, distance = nearest_centres(rows, centres)
    assert cluster.tolist() == [0] * len(rows)
    assert distance.tolist() == [1.0] * len(rows)


def test_what_is_refused():
    rows = np.ones((3, 2), np.float32)
    with pytest.raises(InputError, match="clusters to be at least 1"):
        spherical_kmeans(rows, 0)
    with pytest.raises(InputError, match="iterations to be at least 1"):
        spherical_kmeans(rows, 1, iterations=0)
    rows[1, 1] = np.nan
    with pytest.raises(InputError, match="vector 1"):
        spherical_kmeans(rows, 1)
    with pytest.raises(InputError, match="vector 1"):
        nearest_centres(rows, np.ones((1, 2), np.float32))
