"""Clusters of words: one representative each, whatever the order, threads and ties."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError, RecipeError
from prunery.pipelines.prompts.clusters import (
    PUBLISHED_CLUSTERS,
    cluster_words,
    clusters_wanted,
    unclustered,
)
from prunery.pipelines.prompts.tables import TOKEN_CLUSTERS
from prunery.storage import Store

from ...tiny_models import packaged_tokenizer
from .prompt_rows import plain_rows, rows_of, run_step, text_set


def blobs(n=60, d=5, groups=4, seed=0):
    rng = np.random.default_rng(seed)
    centre = rng.normal(0, 20, (groups, d))
    vectors = centre[np.arange(n) % groups] + rng.normal(0, 0.5, (n, d))
    return rng.choice(10 * n, n, replace=False).astype(np.int64), vectors.astype(np.float32)


@pytest.mark.parametrize("algorithm", ["kmeans", "minibatch"])
def test_well_parted_groups_are_found_and_the_words_nearest_their_means_stand_for_them(algorithm):
    ids, vectors = blobs()
    made = cluster_words(ids, vectors, 4, algorithm=algorithm, seed=3)
    truth = np.arange(60) % 4
    assert len({(a, b) for a, b in zip(truth, made.cluster, strict=True)}) == 4
    assert made.keep.sum() == 4
    for group in range(4):
        own = np.flatnonzero(truth == group)
        mean = vectors[own].astype(np.float64).mean(axis=0)
        distance = np.linalg.norm(vectors[own] - mean, axis=1)
        np.testing.assert_allclose(made.distance[own], distance, rtol=1e-4)
        assert made.keep[own[distance.argmin()]]


@pytest.mark.parametrize("algorithm", ["kmeans", "minibatch"])
def test_the_order_of_the_words_plays_no_part(algorithm):
    ids, vectors = blobs(n=90, groups=9)
    flip = np.random.default_rng(1).permutation(90)
    one = cluster_words(ids, vectors, 7, algorithm=algorithm)
    two = cluster_words(ids[flip], vectors[flip], 7, algorithm=algorithm)
    for name in ("cluster", "distance", "keep"):
        np.testing.assert_array_equal(getattr(one, name)[flip], getattr(two, name))


def test_the_seed_decides():
    ids, _ = blobs(n=200)
    vectors = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    one, same, other = (cluster_words(ids, vectors, 20, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.cluster, same.cluster)
    assert (one.keep != other.keep).any()
    cluster_words(ids, vectors, 3, seed=-1)  # any int is a seed
    cluster_words(ids, vectors, 3, seed=2**40)


def test_equal_words_make_one_cluster_and_the_smaller_id_stands_for_it():
    ids = np.array([9, 4, 7, 2, 5])
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for clusters in (2, 3, 5):
            made = cluster_words(ids, vectors, clusters)
            np.testing.assert_array_equal(made.cluster, [1, 1, 0, 0, 1])
            np.testing.assert_array_equal(made.keep, [False, True, False, True, False])
            np.testing.assert_array_equal(made.distance, np.zeros(5))


def test_ties_of_distance_go_to_the_smaller_id():
    ids = np.array([30, 10, 20])
    vectors = np.array([[-1, 0], [1, 0], [0, 5]], np.float32)
    made = cluster_words(ids[:2], vectors[:2], 1)
    np.testing.assert_array_equal(made.keep, [False, True])
    np.testing.assert_allclose(made.distance, [1, 1])


def test_no_warning_leaks_when_clusters_stay_empty():
    rng = np.random.default_rng(0)
    # 11 distinct vectors that k-means in float32 cannot tell apart well.
    vectors = np.repeat(1000 + 1e-4 * np.arange(11)[:, None] * np.ones(3), 5, axis=0)
    ids = rng.permutation(55)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = cluster_words(ids, vectors.astype(np.float32), 8)
        again = cluster_words(ids, vectors.astype(np.float32), 8, algorithm="minibatch")
    for one in (made, again):
        assert one.keep.sum() == len(set(one.cluster.tolist())) <= 8


def test_one_word():
    made = cluster_words(np.array([5]), np.ones((1, 3), np.float32), 1)
    assert made.keep.tolist() == [True] and made.cluster.tolist() == [0]


def test_refusals():
    with pytest.raises(InputError, match="expected words to cluster"):
        cluster_words(np.zeros(0, np.int64), np.zeros((0, 3), np.float32), 1)
    with pytest.raises(InputError, match="the vector of word 8 is not finite"):
        cluster_words(np.array([4, 8]), np.array([[0.0], [np.nan]], np.float32), 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=25),
    st.integers(1, 30),
    st.sampled_from(["kmeans", "minibatch"]),
    st.integers(0, 2),
)
def test_laws_of_the_clusters(points, clusters, algorithm, seed):
    ids = np.random.default_rng(7).permutation(1000)[: len(points)]
    vectors = np.array(points, np.float32)
    made = cluster_words(ids, vectors, clusters, algorithm=algorithm, seed=seed)
    found = sorted(set(made.cluster.tolist()))
    assert found == list(range(len(found)))
    assert len(found) <= min(clusters, len(set(points)))
    assert made.keep.sum() == len(found)
    kept = [int(ids[i]) for i in np.argsort(made.cluster) if made.keep[i]]
    assert kept == sorted(kept)  # numbered in the order of the representatives' ids
    for cluster in found:
        own = np.flatnonzero(made.cluster == cluster)
        (first,) = own[made.keep[own]]
        assert made.distance[first] == made.distance[own].min()
        tied = own[made.distance[own] == made.distance[first]]
        assert ids[first] == ids[tied].min()


def test_how_many():
    limit = 2 * PUBLISHED_CLUSTERS
    assert clusters_wanted(limit, None) is None
    assert clusters_wanted(limit + 1, None) == 2000
    assert clusters_wanted(50, 20) == 20 and clusters_wanted(10, 20) == 10
    made = unclustered(np.array([7, 3, 5]))
    np.testing.assert_array_equal(made.cluster, [2, 0, 1])
    assert made.keep.all() and not made.distance.any()


_SCRIPT = """
import json, sys
import numpy as np
from prunery.pipelines.prompts.clusters import cluster_words
rng = np.random.default_rng(0)
vectors = rng.normal(size=(3000, 24)).astype(np.float32)
for algorithm in ("kmeans", "minibatch"):
    made = cluster_words(np.arange(3000), vectors, 40, algorithm=algorithm)
    shown = [made.cluster.tolist(), made.distance.view(np.uint32).tolist(), made.keep.tolist()]
    sys.stdout.write(json.dumps(shown))
"""


def test_the_number_of_threads_plays_no_part():
    made = []
    for threads in ("1", "2"):
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", _SCRIPT]
        done = subprocess.run(command, capture_output=True, check=True, env=environment)
        made.append(done.stdout)
    assert made[0] == made[1] and len(made[0]) > 10_000


# -- the step ------------------------------------------------------------------------------------

INPUTS = {"task": "prompt_task", "vocabulary": "prompt_vocabulary"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with a task and 200 words; its tests add tables under names that they alone read."""
    made = Store(tmp_path_factory.mktemp("clusters"))
    text_set(made, plain_rows())
    run_step(made, "prompt_task", {"data": "data"}, shots=2, validation_shots=2)
    run_step(made, "prompt_vocabulary", {"task": "prompt_task"}, most=200)
    return made


def cluster(store, inputs=INPUTS, **options):
    return run_step(store, "cluster_tokens", inputs, **options)


def test_the_step_clusters_the_kept_words(store):
    manifest = cluster(store, clusters=30)
    table = store.table("cluster_tokens").to_table()
    assert table.schema.equals(TOKEN_CLUSTERS)
    made = table.to_pylist()
    words = {row["id"]: row["text"] for row in rows_of(store, "prompt_vocabulary") if row["keep"]}
    assert {row["id"]: row["text"] for row in made} == words
    assert [row["id"] for row in made] == sorted(words)
    assert manifest.kept == 30 and manifest.dropped == {"in_cluster": 170}
    assert {(row["keep"], row["reason"]) for row in made} == {
        (True, "representative"),
        (False, "in_cluster"),
    }


def test_the_step_clusters_the_models_own_rows(store):
    """Against the matrix read by transformers and the tokenizer's pieces."""
    from transformers import AutoModel

    from prunery.pruners.models.encoders import packaged_folder

    cluster(store, clusters=30)
    made = rows_of(store, "cluster_tokens")
    model = AutoModel.from_pretrained(packaged_folder())
    matrix = model.get_input_embeddings().weight.detach().numpy()
    tokenizer = packaged_tokenizer()
    vectors = np.stack(
        [matrix[tokenizer.encode(row["text"], add_special_tokens=False)].mean(0) for row in made]
    )
    label = np.array([row["cluster"] for row in made])
    pairs = 0
    for number in range(30):
        own = np.flatnonzero(label == number)
        gap = np.linalg.norm(vectors[own] - vectors[own].mean(axis=0), axis=1)
        told = np.array([made[row]["centroid_distance"] for row in own])
        np.testing.assert_allclose(told, gap, atol=1e-4)
        ties = own[told == told.min()]
        assert made[ties[0]]["keep"]  # rows are in the order of their ids
        pairs += len(own) == len(ties) == 2
    assert pairs  # both words of a pair are as far from their mean: the smaller id it is


def test_few_words_stand_for_themselves_unless_asked(store):
    manifest = cluster(store)
    assert manifest.kept == 200 and manifest.dropped == {} and manifest.models == {}
    assert {row["reason"] for row in rows_of(store, "cluster_tokens")} == {"representative"}
    assert cluster(store, algorithm="minibatch", iterations=5).key == manifest.key


def test_what_changes_rows_changes_the_key(store):
    first = cluster(store, clusters=30)
    assert first.models["vectors"]
    others = [
        cluster(store, clusters=31),
        cluster(store, clusters=30, algorithm="minibatch"),
        cluster(store, clusters=30, iterations=1),
        cluster(store, clusters=30, seed=1),
        cluster(store, clusters=30, vectors="encoder"),
    ]
    assert len({first.key, *(other.key for other in others)}) == 6
    # As many as words, or more, are the same clusters.
    assert cluster(store, clusters=200).key == cluster(store, clusters=999).key


def test_an_endpoints_rows_are_not_here(store, tmp_path):
    endpoint = {"black_box": "endpoint", "model": "some", "base_url": "http://127.0.0.1:9/v1"}
    task = {"shots": 2, "validation_shots": 2, **endpoint}
    run_step(store, "prompt_task", {"data": "data"}, name="far_task", **task)
    words = tmp_path / "words.txt"
    words.write_text("sun\nmoon\nstar\ncar\nbus\ntrain\n")
    file = {"source": "file", "path": str(words)}
    run_step(store, "prompt_vocabulary", {"task": "far_task"}, name="far_words", **file)
    far = {"task": "far_task", "vocabulary": "far_words"}
    with pytest.raises(RecipeError, match="vectors: encoder"):
        cluster(store, far, clusters=2)
    assert cluster(store, far).kept == 6
    assert cluster(store, far, clusters=2, vectors="encoder").kept == 2
    made = rows_of(store, "cluster_tokens")
    sky = {row["cluster"] for row in made if row["text"] in ("sun", "moon", "star")}
    assert len(sky) == 1 and len({row["cluster"] for row in made}) == 2


def test_an_encoder_without_token_rows_is_asked_for_the_words(store, tmp_path):
    """A table of static vectors is no network: what it makes of a word alone is taken."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    folder = tmp_path / "static"
    made = StaticEmbedding(packaged_tokenizer().backend_tokenizer, embedding_dim=6)
    SentenceTransformer(modules=[made], device="cpu").save(str(folder))
    task = {"shots": 2, "validation_shots": 2, "model": str(folder)}
    run_step(store, "prompt_task", {"data": "data"}, name="static_task", **task)
    words = tmp_path / "words.txt"
    words.write_text("sun\nmoon\nstar\ncar\n")
    file = {"source": "file", "path": str(words)}
    run_step(store, "prompt_vocabulary", {"task": "static_task"}, name="static_words", **file)
    static = {"task": "static_task", "vocabulary": "static_words"}
    manifest = cluster(store, static, clusters=2)
    assert manifest.kept == 2 and manifest.options["vectors"] == "encoder"
