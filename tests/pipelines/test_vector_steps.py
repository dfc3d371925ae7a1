"""The steps over embeddings against the slow way of doing the same."""

import numpy as np
import pyarrow as pa
import pytest

from prunery.errors import InputError, RecipeError
from prunery.pipelines.dataset_tables import CLUSTERS, DATASET, SHAPLEY, neighbours, outputs
from prunery.pipelines.decisions import SCHEMA
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.pipelines.tables import vectors_of
from prunery.pruners import rules
from prunery.pruners.signals.shapley import knn_shapley
from prunery.storage import Store, nearest_centres, row_ids, spherical_kmeans

D = 12
N = 90


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write(store, name, step, schema, parts):
    writing = store.write(name=name, step=step, schema=schema, options={"name": name})
    with writing as writer:
        for number in writer.pending(len(parts)):
            with writer.shard(number) as out:
                out.write(parts[number])
        writer.commit()
    return writer.key


class Rows:
    """90 rows of three classes, a third of them in the test split, and their vectors."""

    def __init__(self, n=N, seed=0, scale=1.0):
        rng = np.random.default_rng(seed)
        self.ids = np.array(row_ids(range(n))) if n else np.zeros(0, np.int64)
        self.label = rng.integers(0, 3, n)
        self.split = np.where(np.arange(n) % 3 == 1, "test", "train")
        means = rng.standard_normal((3, D))
        self.vectors = unit(means[self.label] + rng.standard_normal((n, D)))
        self.written = self.vectors * np.float32(scale)

    @property
    def train(self):
        return np.flatnonzero(self.split == "train")

    @property
    def test(self):
        return np.flatnonzero(self.split == "test")

    def data(self, store, name="data"):
        parts = []
        for rows in np.array_split(np.arange(len(self.ids)), 2):
            columns = {field.name: None for field in DATASET}
            columns |= {
                "id": self.ids[rows],
                "source": [f"rows#{row}" for row in rows],
                "split": self.split[rows].tolist(),
                "label": self.label[rows].astype(np.int32),
                "clean_label": np.full(len(rows), -1, np.int32),
                "group": [""] * len(rows),
                "text": [""] * len(rows),
                "features": [[] for _ in rows],
                "image": [b""] * len(rows),
            }
            parts.append(pa.table(columns, schema=DATASET))
        return write(store, name, "read_dataset", DATASET, parts)

    def embedded(self, store, name="vectors", shards=3, order=None):
        schema = outputs(3, D)
        order = np.arange(len(self.ids)) if order is None else order
        parts = []
        for rows in np.array_split(order, shards):
            zero = np.zeros((len(rows), 3), np.float32)
            lists = [
                pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
                for x in (zero, self.written[rows])
            ]
            table = pa.Table.from_arrays(
                [pa.array(self.ids[rows]), *lists], names=schema.names
            ).cast(schema)
            parts.append(table)
        return write(store, name, "teacher_outputs", schema, parts)


def run(store, step, inputs, *, seed=0, threads=1, **options):
    spec = STEPS[step]
    context = StepContext(store=store, name=step, seed=seed, threads=threads)
    return store.table(spec(spec.options.model_validate(options), inputs, context).key)


def as_dict(table, column):
    made = table.to_table()
    values = made.column(column)
    values = (
        vectors_of(values)
        if pa.types.is_fixed_size_list(values.type) and column != "neighbour"
        else np.array(values.to_pylist())
    )
    return dict(zip(made.column("id").to_pylist(), values, strict=True))


class TestClusterRows:
    def test_rows_lie_in_the_cluster_of_the_nearest_of_its_means(self, store):
        rows = Rows(scale=3.0)
        table = run(store, "cluster_rows", {"vectors": rows.embedded(store)}, clusters=4)
        assert table.schema.equals(CLUSTERS)
        assert table.shards() == [0, 1, 2]
        assert table.to_table().column("id").to_pylist() == rows.ids.tolist()
        cluster = np.array([as_dict(table, "cluster")[i] for i in rows.ids.tolist()])
        away = np.array([as_dict(table, "centroid_distance")[i] for i in rows.ids.tolist()])
        assert set(cluster) == {0, 1, 2, 3}
        # Settled after 20 rounds: each centre is its rows' mean.
        centres = unit(np.stack([rows.vectors[cluster == c].sum(axis=0) for c in range(4)]))
        found, distance = nearest_centres(rows.vectors, centres)
        assert np.array_equal(found, cluster)
        np.testing.assert_allclose(away, distance, atol=1e-5)

    def test_the_default_is_about_the_square_root_and_the_sample_is_drawn(self, store):
        rows = Rows(n=400)
        key = rows.embedded(store)
        table = run(store, "cluster_rows", {"vectors": key})
        assert len(set(as_dict(table, "cluster").values())) == 20
        other = run(store, "cluster_rows", {"vectors": key}, sample=50)
        assert table.key != other.key
        assert len(set(as_dict(other, "cluster").values())) == 20
        assert as_dict(table, "cluster") != as_dict(other, "cluster")
        again = run(store, "cluster_rows", {"vectors": key}, sample=50, seed=1)
        assert as_dict(again, "cluster") != as_dict(other, "cluster")

    def test_the_draw_starts_k_means_even_where_all_rows_are_in_it(self, store):
        rows = Rows()
        key = rows.embedded(store)
        found = [
            as_dict(run(store, "cluster_rows", {"vectors": key}, seed=seed), "cluster")
            for seed in (0, 1)
        ]
        assert found[0] != found[1]
        ordered = np.lexsort((rows.ids, rules.uniform(0, rows.ids)))
        centres = spherical_kmeans(rows.vectors[ordered], 9)
        wanted = nearest_centres(rows.vectors, centres)[0]
        assert found[0] == dict(zip(rows.ids.tolist(), wanted, strict=True))

    def test_after_a_decision_only_kept_rows_count(self, store):
        rows = Rows()
        keep = np.arange(N) % 4 != 0
        columns = {field.name: pa.nulls(N, field.type) for field in SCHEMA}
        columns |= {"id": rows.ids, "keep": keep, "score": np.zeros(N, np.float32)}
        columns["reason"] = ["distinct"] * N
        decision = write(store, "d", "prune_dataset", SCHEMA, [pa.table(columns, schema=SCHEMA)])
        inputs = {"vectors": rows.embedded(store), "decision": decision}
        table = run(store, "cluster_rows", inputs, clusters=3)
        assert table.to_table().column("id").to_pylist() == rows.ids[keep].tolist()
        both = run(store, "cluster_rows", inputs | {"data": rows.data(store)}, clusters=3)
        train = rows.split == "train"
        assert both.to_table().column("id").to_pylist() == rows.ids[keep & train].tolist()

    def test_neither_the_order_of_rows_nor_shards_nor_threads_matter(self, store):
        rows = Rows()
        table = run(store, "cluster_rows", {"vectors": rows.embedded(store)}, sample=40)
        order = np.random.default_rng(1).permutation(N)
        key = rows.embedded(store, "shuffled", shards=2, order=order)
        other = run(store, "cluster_rows", {"vectors": key}, sample=40, threads=2)
        assert as_dict(table, "cluster") == as_dict(other, "cluster")
        assert as_dict(table, "centroid_distance") == as_dict(other, "centroid_distance")

    def test_with_data_only_training_rows_count(self, store):
        rows = Rows()
        inputs = {"vectors": rows.embedded(store), "data": rows.data(store)}
        table = run(store, "cluster_rows", inputs, clusters=3)
        assert table.to_table().column("id").to_pylist() == rows.ids[rows.train].tolist()
        moved = Rows()
        moved.written = moved.vectors.copy()
        moved.written[rows.test] *= -1
        inputs["vectors"] = moved.embedded(store, "moved")
        other = run(store, "cluster_rows", inputs, clusters=3)
        assert as_dict(table, "centroid_distance") == as_dict(other, "centroid_distance")

    def test_fewer_distinct_rows_than_clusters_make_one_cluster_each(self, store):
        rows = Rows(n=12)
        rows.written = rows.vectors[np.arange(12) % 3].copy()
        rows.written[7] = 0
        table = run(store, "cluster_rows", {"vectors": rows.embedded(store)}, clusters=10)
        cluster = table.to_table().column("cluster").to_numpy()
        away = table.to_table().column("centroid_distance").to_numpy()
        assert len(set(cluster.tolist())) == 3
        same = np.delete(np.arange(12), 7)
        assert all((cluster[i] == cluster[j]) == (i % 3 == j % 3) for i in same for j in same)
        assert away[7] == 1.0
        assert not away[same].any()

    def test_no_row_makes_no_row(self, store):
        table = run(store, "cluster_rows", {"vectors": Rows(n=0).embedded(store, shards=1)})
        assert table.num_rows == 0
        assert table.schema.equals(CLUSTERS)


class TestNeighbours:
    def wanted(self, rows, among, k):
        ids, vectors = rows.ids[among], rows.vectors[among].astype(np.float64)
        far = np.linalg.norm(vectors[:, None] - vectors, axis=2)
        np.fill_diagonal(far, np.inf)
        order = np.lexsort((np.broadcast_to(ids, far.shape), far.astype(np.float32)), axis=1)
        return ids, ids[order[:, :k]], np.take_along_axis(far, order[:, :k], axis=1)

    @pytest.mark.parametrize("kind", ["auto", "hnsw"])
    def test_they_are_the_nearest_others(self, store, kind):
        rows = Rows(scale=2.0)
        table = run(store, "neighbours", {"vectors": rows.embedded(store)}, k=4, kind=kind)
        assert table.schema.equals(neighbours(4))
        assert table.shards() == [0, 1, 2]
        ids, near, far = self.wanted(rows, np.arange(N), 4)
        found, away = as_dict(table, "neighbour"), as_dict(table, "neighbour_distance")
        for row, wanted, distance in zip(ids.tolist(), near, far, strict=True):
            assert found[row].tolist() == wanted.tolist()
            np.testing.assert_allclose(away[row], distance, rtol=1e-5)

    def test_with_data_they_are_training_rows(self, store):
        rows = Rows()
        inputs = {"vectors": rows.embedded(store), "data": rows.data(store)}
        table = run(store, "neighbours", inputs, k=3)
        ids, near, _ = self.wanted(rows, rows.train, 3)
        found = as_dict(table, "neighbour")
        assert list(found) == ids.tolist()
        assert [found[i].tolist() for i in ids.tolist()] == near.tolist()

    def test_copies_of_a_row_are_its_neighbours_and_it_is_not(self, store):
        rows = Rows(n=40)
        rows.written = np.repeat(rows.vectors[:1], 40, axis=0)
        found = as_dict(
            run(store, "neighbours", {"vectors": rows.embedded(store)}, k=3), "neighbour"
        )
        smallest = np.sort(rows.ids)
        for row, near in found.items():
            assert near.tolist() == [i for i in smallest[:4].tolist() if i != row][:3]

    @pytest.mark.parametrize("n", [0, 1, 3])
    def test_fewer_rows_than_k(self, store, n):
        rows = Rows(n=n)
        table = run(store, "neighbours", {"vectors": rows.embedded(store, shards=1)}, k=5)
        assert table.num_rows == n
        found, away = as_dict(table, "neighbour"), as_dict(table, "neighbour_distance")
        for row in rows.ids.tolist():
            others = [i for i in rows.ids.tolist() if i != row]
            assert sorted(found[row][: n - 1].tolist()) == sorted(others)
            assert found[row][n - 1 :].tolist() == [-1] * (5 - (n - 1))
            assert away[row][n - 1 :].tolist() == [0.0] * (5 - (n - 1))


class TestKnnShapley:
    def wanted(self, rows, asking, k, depth, alone=False, tail="share"):
        train = rows.train
        wide = rows.vectors.astype(np.float64)
        cosine = wide[asking] @ wide[train].T
        if alone:
            np.fill_diagonal(cosine, -np.inf)
        candidates = len(train) - alone
        near = np.argsort(-cosine, axis=1)[:, :candidates]
        agree = rows.label[train][near] == rows.label[asking][:, None]
        beyond = None
        if tail == "share" and depth < candidates:
            beyond = agree[:, depth:].mean(axis=1)
        near, agree = near[:, :depth], agree[:, :depth]
        n = len(train)
        value = knn_shapley(near, agree, k, n, candidates=candidates, beyond=beyond)
        return dict(zip(rows.ids[train].tolist(), value, strict=True))

    def check(self, table, wanted):
        found = as_dict(table, "shapley")
        assert list(found) == list(wanted)
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), atol=1e-7)

    @pytest.mark.parametrize(("depth", "looked_at"), [(None, 30), (7, 7), (60, 60), (999, 60)])
    def test_training_rows_are_valued_by_the_test_split(self, store, depth, looked_at):
        rows = Rows(scale=4.0)
        inputs = {"vectors": rows.embedded(store), "data": rows.data(store)}
        table = run(store, "knn_shapley", inputs, k=3, depth=depth)
        assert table.schema.equals(SHAPLEY)
        wanted = self.wanted(rows, rows.test, 3, looked_at)
        self.check(table, wanted)
        if looked_at == 60:  # exact values add up to the classifier's accuracy
            far = -rows.vectors[rows.test] @ rows.vectors[rows.train].T
            near = rows.label[rows.train][far.argsort(axis=1)[:, :3]]
            accuracy = (near == rows.label[rows.test][:, None]).mean()
            assert sum(wanted.values()) == pytest.approx(accuracy)

    @pytest.mark.parametrize(("depth", "looked_at"), [(8, 8), (999, 59)])
    def test_or_by_each_other(self, store, depth, looked_at):
        rows = Rows()
        inputs = {"vectors": rows.embedded(store), "data": rows.data(store)}
        table = run(store, "knn_shapley", inputs, k=3, depth=depth, validation="self")
        self.check(table, self.wanted(rows, rows.train, 3, looked_at, alone=True))

    @pytest.mark.parametrize("validation", ["test", "self"])
    def test_the_published_tail(self, store, validation):
        rows = Rows()
        rows.label[rows.test[:3]] = 9  # a class that training does not have
        inputs = {"vectors": rows.embedded(store), "data": rows.data(store)}
        alone = validation == "self"
        asking = rows.train if alone else rows.test
        for tail in ("zero", "share"):
            options = {"k": 3, "depth": 6, "tail": tail, "validation": validation}
            table = run(store, "knn_shapley", inputs, **options)
            self.check(table, self.wanted(rows, asking, 3, 6, alone, tail))

    def test_blocks_and_shards_do_not_matter(self, store, monkeypatch):
        rows = Rows()
        inputs = {"vectors": rows.embedded(store), "data": rows.data(store)}
        whole = as_dict(run(store, "knn_shapley", inputs, k=3), "shapley")
        monkeypatch.setattr("prunery.pipelines.steps.knn_shapley._CELLS", 60)
        order = np.random.default_rng(1).permutation(N)
        inputs["vectors"] = rows.embedded(store, "shuffled", shards=5, order=order)
        parts = as_dict(run(store, "knn_shapley", inputs, k=3), "shapley")
        assert whole.keys() == parts.keys()
        np.testing.assert_allclose([parts[i] for i in whole], list(whole.values()), atol=1e-7)

    def test_a_flipped_label_is_worth_less(self, store):
        rows = Rows(n=300)
        rows.vectors = rows.written = unit(np.eye(3, D)[rows.label] * 4 + rows.vectors)
        flipped = rows.train[:20]
        rows.label[flipped] = (rows.label[flipped] + 1) % 3
        inputs = {"vectors": rows.embedded(store), "data": rows.data(store)}
        value = np.array(list(as_dict(run(store, "knn_shapley", inputs, k=5), "shapley").values()))
        assert value[:20].max() < np.median(value[20:])

    @pytest.mark.parametrize("n", [0, 1])
    def test_nobody_to_value_or_to_be_valued_by(self, store, n):
        rows = Rows(n=n)
        inputs = {"vectors": rows.embedded(store, shards=1), "data": rows.data(store)}
        table = run(store, "knn_shapley", inputs, validation="self")
        assert list(as_dict(table, "shapley").values()) == [0.0] * n

    def test_no_validation_row_is_refused(self, store):
        rows = Rows()
        rows.split[:] = "train"
        inputs = {"vectors": rows.embedded(store), "data": rows.data(store)}
        with pytest.raises(InputError, match="no row in the split `test`.*validation: self"):
            run(store, "knn_shapley", inputs)


EVERY = pytest.mark.parametrize("step", ["cluster_rows", "neighbours", "knn_shapley"])


@EVERY
def test_a_vector_that_is_not_finite_is_refused_by_its_row(store, step):
    rows = Rows()
    rows.written = rows.vectors.copy()
    rows.written[rows.train[-1], 3] = np.inf
    inputs = {"vectors": rows.embedded(store), "data": rows.data(store)}
    with pytest.raises(InputError, match=f"infinity in row {rows.ids[rows.train[-1]]}"):
        run(store, step, inputs)


@EVERY
def test_a_repeated_id_is_refused(store, step):
    rows = Rows()
    rows.ids[5] = rows.ids[2]
    inputs = {"vectors": rows.embedded(store), "data": Rows().data(store)}
    with pytest.raises(InputError, match=f"holds row {rows.ids[2]} twice"):
        run(store, step, inputs)


@EVERY
def test_a_row_without_a_vector_is_refused(store, step):
    rows = Rows()
    inputs = {"vectors": rows.embedded(store, order=np.arange(N - 1)), "data": rows.data(store)}
    assert rows.split[-1] == "train"
    with pytest.raises(InputError, match=f"no vector for 1 of 60 rows, row {rows.ids[-1]}"):
        run(store, step, inputs)


@EVERY
def test_a_table_without_vectors_is_refused(store, step):
    rows = Rows()
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False)])
    key = write(store, "bare", "teacher_outputs", schema, [pa.table([rows.ids], schema=schema)])
    with pytest.raises(RecipeError, match="must hold a column `embedding`"):
        run(store, step, {"vectors": key, "data": rows.data(store)})


@EVERY
def test_long_vectors_are_scaled_without_overflow(store, step):
    rows = Rows(scale=1e25)
    same = Rows(scale=1.0)
    data = rows.data(store)
    column = {"cluster_rows": "cluster", "neighbours": "neighbour_distance"}.get(step, "shapley")
    found = [
        as_dict(run(store, step, {"vectors": r.embedded(store, name), "data": data}), column)
        for r, name in ((rows, "long"), (same, "short"))
    ]
    for row in found[0]:
        np.testing.assert_allclose(found[0][row], found[1][row], atol=1e-5)
