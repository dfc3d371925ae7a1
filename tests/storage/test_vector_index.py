"""Each kind of index against brute force, scores included."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError, StoreError
from prunery.storage import Store, VectorIndex, row_ids, vector_build, vector_index

D = 24
N = 1500
KINDS = ["flat", "hnsw", "ivf,pq"]
METRICS = ["ip", "l2"]


def brute_force(
    vectors: Any, ids: Any, queries: Any, k: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """The best k by (score, id), in float64, rounded once."""
    wide, asked = vectors.astype("f8"), queries.astype("f8")
    if metric == "ip":
        scores = (asked[:, None, :] * wide[None]).sum(-1).astype("f4")
        worse = -scores
    else:
        scores = ((asked[:, None, :] - wide[None]) ** 2).sum(-1).astype("f4")
        worse = scores
    order = np.lexsort((np.broadcast_to(ids, scores.shape), worse), axis=1)[:, :k]
    return ids[order], np.take_along_axis(scores, order, axis=1)


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clustered vectors, as embeddings are, with ids in no order."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((30, D))
    vectors = (centres[rng.integers(0, 30, N)] + 0.5 * rng.standard_normal((N, D))).astype("f4")
    ids = row_ids([f"row {i}" for i in range(N)])
    queries = (vectors[:60] + 0.3 * rng.standard_normal((60, D))).astype("f4")
    return vectors, ids, queries


def build(data: Any, kind: str = "flat", metric: str = "ip", **other: Any) -> VectorIndex:
    return VectorIndex.build(data[0], data[1], kind=kind, metric=metric, threads=1, **other)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 10, 100])
def test_flat_is_brute_force(data: Any, metric: str, k: int) -> None:
    found_ids, found = build(data, metric=metric).search(data[2], k)
    want_ids, want = brute_force(*data, k, metric)
    np.testing.assert_array_equal(found_ids, want_ids)
    np.testing.assert_array_equal(found, want)
    assert found_ids.dtype == np.int64
    assert found.dtype == np.float32


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("kind", "floor"), [("hnsw", 0.97), ("ivf,pq", 0.9)])
def test_other_kinds_find_most_and_score_exactly(
    data: Any, kind: str, floor: float, metric: str
) -> None:
    vectors, ids, queries = data
    found_ids, found = build(data, kind, metric).search(queries, 10)
    want_ids, want = brute_force(*data, 10, metric)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found_ids, want_ids, strict=True)])
    assert recall >= floor
    row_of = {int(i): row for row, i in enumerate(ids)}
    rows = np.vectorize(row_of.__getitem__)(found_ids)
    exact = queries[:, None, :].astype("f8"), vectors[rows].astype("f8")
    if metric == "ip":
        scores = (exact[0] * exact[1]).sum(-1)
        assert (np.diff(found, axis=1) <= 0).all()
    else:
        scores = ((exact[0] - exact[1]) ** 2).sum(-1)
        assert (np.diff(found, axis=1) >= 0).all()
    np.testing.assert_array_equal(found, scores.astype("f4"))
    # what all agree on has the same score in all
    same = found_ids == want_ids
    np.testing.assert_array_equal(found[same], want[same])


@pytest.mark.parametrize("metric", METRICS)
def test_codes_without_vectors_give_their_own_scores(data: Any, metric: str) -> None:
    """No exact scores then, but near, and in order."""
    index = build(data, "ivf,pq", metric, options={"rerank": 0, "nprobe": 999})
    found_ids, found = index.search(data[2], 10)
    want_ids, want = brute_force(*data, 10, metric)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found_ids, want_ids, strict=True)])
    assert 0.4 <= recall < 1
    error = np.abs(found - want) / np.abs(want).max()
    assert 1e-4 < np.median(error) < 0.05
    toward = found if metric == "ip" else -found
    assert (np.diff(toward, axis=1) <= 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("copies", [3, 40, 300])
def test_ties_go_to_the_smaller_id(metric: str, copies: int) -> None:
    """Also where more rows tie at the k-th place than any margin holds."""
    rng = np.random.default_rng(copies)
    base = rng.standard_normal((50, 8)).astype("f4")
    vectors = np.concatenate([base, np.repeat(base[:1], copies, axis=0)])
    ids = rng.permutation(10_000)[: len(vectors)]
    queries = np.concatenate([base[:3], rng.standard_normal((30, 8)).astype("f4")])
    index = VectorIndex.build(vectors, ids, metric=metric, threads=1)  # type: ignore[arg-type]
    for k in (1, 2, copies // 2 + 1, copies + 5):
        found_ids, found = index.search(queries, k)
        want_ids, want = brute_force(vectors, ids, queries, k, metric)
        np.testing.assert_array_equal(found_ids, want_ids)
        np.testing.assert_array_equal(found, want)


def test_a_tie_too_wide_to_search_is_settled_by_going_through_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vector_index, "_MOST_CANDIDATES", 100)
    monkeypatch.setattr(vector_index, "_SCORE_BYTES", 8 * 4 * 64)  # several blocks
    vectors = np.ones((500, 4), np.float32)
    ids = np.random.default_rng(0).permutation(500)
    found_ids, found = VectorIndex.build(vectors, ids, threads=1).search(vectors[:2], 3)
    assert found_ids.tolist() == [[0, 1, 2]] * 2
    assert found.tolist() == [[4.0] * 3] * 2


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 50),
    st.sampled_from(METRICS),
    st.integers(0, 2**32 - 1),
)
def test_flat_is_brute_force_on_coarse_numbers(
    n: int, d: int, k: int, metric: str, seed: int
) -> None:
    """Small integers tie all the time; k may exceed the rows."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (n, d)).astype("f4")
    ids = rng.permutation(1000)[:n]
    queries = rng.integers(-2, 3, (25, d)).astype("f4")
    index = VectorIndex.build(vectors, ids, metric=metric, threads=1)  # type: ignore[arg-type]
    found_ids, found = index.search(queries, k)
    taken = min(n, k)
    want_ids, want = brute_force(vectors, ids, queries, taken, metric)
    np.testing.assert_array_equal(found_ids[:, :taken], want_ids)
    np.testing.assert_array_equal(found[:, :taken], want)
    assert (found_ids[:, taken:] == -1).all()
    assert (found[:, taken:] == (-np.inf if metric == "ip" else np.inf)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_queries_make_no_difference(data: Any, kind: str) -> None:
    """FAISS takes other ways for many queries than for one; the answers are the same."""
    index = build(data, kind)
    whole = index.search(data[2], 10)
    for i in (0, 7, 59):
        single = index.search(data[2][i : i + 1], 10)
        np.testing.assert_array_equal(single[0][0], whole[0][i])
        np.testing.assert_array_equal(single[1][0], whole[1][i])
    assert index.search(data[2][:0], 10)[0].shape == (0, 10)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(data: Any, kind: str, metric: str, tmp_path: Path) -> None:
    index = build(data, kind, metric)
    index.save(tmp_path / "index")
    names = {path.name for path in (tmp_path / "index").iterdir()}
    assert names == {"index.faiss", "ids.i64", "index.json"} | (
        {"vectors.f32"} if kind == "ivf,pq" else set()
    )
    want = index.search(data[2], 10)
    for mmap in (True, False):
        loaded = VectorIndex.load(tmp_path / "index", mmap=mmap)
        assert loaded.meta == index.meta
        assert len(loaded) == N
        found = loaded.search(data[2], 10)
        np.testing.assert_array_equal(found[0], want[0])
        np.testing.assert_array_equal(found[1], want[1])
    with pytest.raises(InputError, match="expected no file or folder"):
        index.save(tmp_path / "index")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_build_gives_the_same_bytes(data: Any, kind: str, tmp_path: Path) -> None:
    """With any number of threads, unless a graph is built without `deterministic`."""
    for name, threads in (("one", 1), ("two", 2)):
        VectorIndex.build(data[0], data[1], kind=kind, threads=threads).save(tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    if kind != "flat":
        build(data, kind, seed=1).save(tmp_path / "other")
        assert (tmp_path / "other" / "index.faiss").read_bytes() != (
            tmp_path / "one" / "index.faiss"
        ).read_bytes()


def test_training_does_not_depend_on_the_order_of_rows(data: Any) -> None:
    order = np.random.default_rng(5).permutation(N)
    for ids, vectors in ((data[1], data[0]), (data[1][order], data[0][order])):
        rows = vector_build.Rows(vectors, ids)
        sample = vector_build._training_rows(rows, {"nlist": 1}, seed=3)
        assert len(sample) == N  # fewer rows than the sample: all
    monkey = vector_build._PQ_CODES
    try:
        vector_build._PQ_CODES = 1
        samples = [
            vector_build._training_rows(vector_build.Rows(v, i), {"nlist": 1}, seed=3)
            for i, v in ((data[1], data[0]), (data[1][order], data[0][order]))
        ]
    finally:
        vector_build._PQ_CODES = monkey
    assert [len(sample) for sample in samples] == [256, 256]
    one, other = ({row.tobytes() for row in sample} for sample in samples)
    assert one == other


@pytest.mark.parametrize("kind", KINDS)
def test_batches_give_the_same_index_as_an_array(data: Any, kind: str, tmp_path: Path) -> None:
    def batches() -> Any:
        for start in range(0, N, 333):
            yield data[1][start : start + 333], data[0][start : start + 333]

    index = VectorIndex.build(batches(), kind=kind, threads=1)
    want, found = build(data, kind).search(data[2], 5), index.search(data[2], 5)
    np.testing.assert_array_equal(found[0], want[0])
    np.testing.assert_array_equal(found[1], want[1])
    index.save(tmp_path / "index")  # also what still lies in the temporary file
    again = VectorIndex.load(tmp_path / "index").search(data[2], 5)
    np.testing.assert_array_equal(again[1], want[1])


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_store(data: Any, kind: str, local_store: Store) -> None:
    index = build(data, kind)
    manifest = index.save_to(local_store, name="index", models={"encoder": "ab" * 32})
    assert (manifest.kind, manifest.rows, manifest.seed) == ("index", N, 0)
    assert manifest.options["kind"] == kind
    assert manifest.notes["index"]["d"] == D
    table = local_store.table("index")
    assert table.to_table(["id"])["id"].to_pylist() == data[1].tolist()
    for mmap in (True, False):
        found = VectorIndex.from_table(table, mmap=mmap).search(data[2], 5)
        want = index.search(data[2], 5)
        np.testing.assert_array_equal(found[0], want[0])
        np.testing.assert_array_equal(found[1], want[1])
    assert local_store.verify() == []
    assert index.save_to(local_store, name="again", models={"encoder": "ab" * 32}) == manifest
    other = build(data, kind, seed=1).save_to(local_store, name="other")
    assert other.key != manifest.key


def test_damage_is_noticed_when_loading(data: Any, local_store: Store, tmp_path: Path) -> None:
    index = build(data, "ivf,pq")
    index.save(tmp_path / "index")
    for name in ("index.faiss", "ids.i64", "vectors.f32"):
        path = tmp_path / "index" / name
        good = path.read_bytes()
        damaged = bytearray(good)
        damaged[len(good) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=rf"{name}: expected SHA-256"):
            VectorIndex.load(tmp_path / "index")
        path.write_bytes(good[:-8])
        with pytest.raises(StoreError, match="build the index again"):
            VectorIndex.load(tmp_path / "index", check=False)
        path.unlink()
        with pytest.raises(StoreError):
            VectorIndex.load(tmp_path / "index")
        path.write_bytes(good)
    meta = tmp_path / "index" / "index.json"
    body = json.loads(meta.read_bytes())
    body["meta"]["rows"] += 1
    meta.write_text(json.dumps(body))
    with pytest.raises(StoreError, match=r"expected \(rows, d, metric, ids\)"):
        VectorIndex.load(tmp_path / "index")
    meta.write_text("{")
    with pytest.raises(StoreError, match="expected a saved index"):
        VectorIndex.load(tmp_path / "index")
    manifest = index.save_to(local_store, name="index")
    stored = next(item for item in manifest.attachments if item["name"] == "vectors.f32")
    path = local_store.backend.local(f"tables/{manifest.key}/{stored['path']}")  # type: ignore[assignment]
    raw = bytearray(path.read_bytes())
    raw[10] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StoreError, match="expected SHA-256"):
        VectorIndex.from_table(local_store.table("index"))


def test_a_table_is_not_an_index(local_store: Store) -> None:
    kind = VectorIndex.schema()
    local_store.commit_once(
        lambda s: s.write(pa.table({"id": [1]}, schema=kind)), name="t", step="s", schema=kind
    )
    with pytest.raises(InputError, match="expected a table of kind 'index'"):
        VectorIndex.from_table(local_store.table("t"))


def test_kinds_by_size() -> None:
    assert vector_build.choose("auto", 0) == "flat"
    assert vector_build.choose("auto", 1_000_000) == "flat"
    assert vector_build.choose("auto", 1_000_001) == "hnsw"
    assert vector_build.choose("auto", 10_000_001) == "ivf,pq"
    assert vector_build.settings("ivf,pq", {}, 1_000_000, 384) == {
        "nlist": 4000, "m": 96, "nprobe": 32, "rerank": 8,
    }  # fmt: skip
    # 39 rows a list at least; m divides d
    assert vector_build.settings("ivf,pq", {}, 1000, 30)["nlist"] == 25
    assert vector_build.settings("ivf,pq", {}, 1000, 30)["m"] == 6
    assert vector_build.settings("ivf,pq", {}, 1000, 7)["m"] == 1


def test_an_empty_index() -> None:
    index = VectorIndex.build(np.empty((0, 3), np.float32), np.empty(0, np.int64))
    ids, scores = index.search(np.ones((2, 3), np.float32), 2)
    assert ids.tolist() == [[-1, -1]] * 2
    assert (scores == -np.inf).all()


def test_half_precision_vectors(data: Any) -> None:
    half = data[0].astype(np.float16)
    want_ids, want = brute_force(half, data[1], data[2].astype(np.float16), 5, "ip")
    index = VectorIndex.build(half, data[1], threads=1)
    found_ids, found = index.search(data[2].astype(np.float16), 5)
    np.testing.assert_array_equal(found_ids, want_ids)
    np.testing.assert_array_equal(found, want)


ONES = np.ones((4, 2), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ONES, [1, 2, 3]), "found 4 vectors and 3 ids"),
        ((ONES, [1, 2, 3, 1]), "every row id once in an index, found 1 again, e.g. 1"),
        ((ONES, [1, 2, 3, -4]), "row ids >= 0, found -4 at 3"),
        ((ONES, [1.0, 2.0, 3.0, 4.0]), "row ids as integers"),
        ((ONES, None), "expected ids with an array"),
        ((ONES.astype("f8"), [1, 2, 3, 4]), "float32 .or float16., found float64"),
        ((ONES[0], [1, 2]), r"shape \(N, d\), found \(2,\)"),
        ((ONES.tolist(), [1, 2, 3, 4]), r"shape \(N, d\), found list"),
        ((np.array([[1, np.nan]], "f4"), [1]), "NaN or infinity in vector 0"),
        (([], None), "at least one batch"),
        (([([1], ONES[:1]), ([2], np.ones((1, 3), "f4"))], None), "2 numbers as before, found 3"),
        (([([1], ONES[:1]), ([2, 3], ONES[:1])], None), "2 ids in the batch from row 1"),
        (([([1], ONES[:1]), ([2], ONES[:1] * np.inf)], None), "in vector 1"),
    ],
)
def test_input_that_is_refused(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VectorIndex.build(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lsh"}, "expected a kind among auto, flat, hnsw and ivf,pq"),
        ({"metric": "cosine"}, "expected a metric among"),
        ({"kind": "hnsw", "options": {"m": 3}}, r"options of 'hnsw' among .* found \['m'\]"),
        ({"kind": "hnsw", "options": {"M": 0}}, "expected M to be at least 1"),
        ({"kind": "hnsw", "options": {"M": 1.5}}, "expected M to be a number"),
        ({"kind": "ivf,pq"}, "expected at least 256 rows to train"),
        ({"threads": 0}, "at least 1 thread"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VectorIndex.build(ONES, np.arange(4), **options)


def test_queries_that_are_refused(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(data)
    for bad in (0, -1, 1.0, True):
        with pytest.raises(InputError, match="expected k to be at least 1"):
            index.search(data[2], bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"vectors of {D} numbers"):
        index.search(data[2][:, :5], 1)
    with pytest.raises(InputError, match="NaN or infinity in vector 1"):
        index.search(np.stack([data[2][0], data[2][1] * np.nan]), 1)
    monkeypatch.setenv("PRUNERY_FAISS_THREADS", "many")
    with pytest.raises(InputError, match="PRUNERY_FAISS_THREADS"):
        index.search(data[2], 1)
    for options in ({"m": 5}, {"nlist": N + 1}):
        with pytest.raises(InputError):
            build(data, "ivf,pq", options=options)
