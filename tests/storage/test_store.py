"""Tables, names and manifests, in a folder and on S3 alike."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from prunery.errors import InputError, StoreError
from prunery.storage import Manifest, Store, row_ids, schemas

from .rows import arguments, expected, rows, schema, write


def test_what_was_written_is_read(store: Store) -> None:
    manifest = write(store, shards=3, n=20)
    table = store.table("chunks")
    assert table.to_table().equals(expected(3, 20))
    assert table.num_rows == manifest.rows == 60
    assert table.schema == schema()
    assert table.key == manifest.key == store.resolve("chunks")
    assert table.shards() == [0, 1, 2]
    assert pa.Table.from_batches(table.shard_batches(1)).equals(rows(1, 20))
    sizes = [batch.num_rows for batch in table.batches(batch_rows=7)]
    assert max(sizes) <= 7
    assert sum(sizes) == 60
    picked = table.to_table(["score", "id"])
    assert picked.equals(expected(3, 20).select(["score", "id"]))
    assert store.verify() == []


def test_a_table_without_rows_or_shards(local_store: Store) -> None:
    store = local_store
    none = write(store, shards=0, name="none")
    empty = write(store, shards=1, n=0, options={"n": 0}, name="empty")
    assert (none.rows, empty.rows) == (0, 0)
    for name in ("none", "empty"):
        table = store.table(name)
        assert table.to_table().equals(schema().empty_table())
        assert list(table.batches(["id"])) == []
    assert none.logical_digest == empty.logical_digest
    assert store.verify() == []


def test_the_manifest_says_how_it_came_about(store: Store) -> None:
    parent = write(store, shards=1)
    with store.write(
        **arguments(
            name="kept",
            step="prune",
            version=3,
            options={"threshold": 0.5},
            inputs=[parent.key],
            models={"reranker": "ab" * 32},
            seed=7,
        )
    ) as writer:
        for i in writer.pending(2):
            with writer.shard(i) as shard:
                shard.write(rows(i))
                shard.count(kept=4, dropped={"threshold": 5})
                shard.count(dropped={"threshold": 1, "budget": i})
                shard.reject({"line": i, "text": "\ud800", "x": float("nan")}, "not UTF-8")
        manifest = writer.commit(notes={"threshold": 0.5})
    assert manifest == store.manifest("kept")
    body = json.loads(store.backend.read(f"tables/{manifest.key}/manifest.json"))
    for key in ("name", "step", "key", "parents", "logical_digest", "parts", "kept", "dropped"):
        assert body[key] == getattr(manifest, key)
    assert (manifest.name, manifest.step, manifest.version, manifest.seed) == (
        "kept", "prune", 3, 7,
    )  # fmt: skip
    assert manifest.parents == [parent.key]
    assert manifest.options == manifest.notes == {"threshold": 0.5}
    assert manifest.models == {"reranker": "ab" * 32}
    assert (manifest.rows, manifest.kept, manifest.rejected) == (20, 8, 2)
    assert manifest.dropped == {"threshold": 12, "budget": 1}
    assert manifest.libraries["pyarrow"] == pa.__version__
    assert manifest.seconds > 0
    assert manifest.shard_seconds > 0
    assert 10e6 < manifest.peak_memory_bytes < 1e12
    assert [part["shard"] for part in manifest.parts] == [0, 1]
    assert sum(part["rows"] for part in manifest.parts) == 20
    assert manifest.bytes == sum(item["bytes"] for item in manifest.files())
    rejects = store.table("kept").rejects().to_pylist()
    assert [(r["shard"], r["reason"]) for r in rejects] == [(0, "not UTF-8"), (1, "not UTF-8")]
    assert json.loads(rejects[1]["row"])["line"] == 1
    assert store.verify() == []


def test_keys(local_store: Store) -> None:
    store = local_store
    parent = write(store).key
    base = {"step": "s", "version": 1, "options": {"a": 1}, "inputs": [parent],
            "models": {"m": "x"}, "seed": 0}  # fmt: skip
    others = [
        {"step": "t"}, {"version": 2}, {"options": {"a": 2}}, {"options": {"a": 1.0}},
        {"inputs": []}, {"inputs": [parent, parent]}, {"models": {"m": "y"}}, {"seed": 1},
    ]  # fmt: skip
    keys = {store.key(**{**base, **other}) for other in [{}, *others]}
    assert len(keys) == 9
    assert store.key(**base) == store.key(**dict(reversed(base.items())))
    # printf '{"inputs":[],"models":{},"options":{},"seed":0,"step":"chunk","version":1}' |
    # sha256sum
    assert store.key(step="chunk", version=1, options={}, inputs=[], models={}, seed=0) == (
        "0a18d136983ab46256d81253b99f211eabe8d67cf6fc6caa56ff20b6cfff9657"
    )


def test_a_committed_table_is_used_again(store: Store) -> None:
    first = write(store)
    with store.write(**arguments(name="again")) as writer:
        assert writer.committed
        assert writer.pending(3) == []
        writer.attach("ignored.txt", b"")
        with pytest.raises(StoreError, match="is committed and cannot change"):
            writer.shard(0)
        assert writer.commit() == first
    assert store.names() == {"again": first.key, "chunks": first.key}


def test_a_failed_shard_leaves_nothing_and_the_rest_is_kept(store: Store) -> None:
    def fail_in_the_second() -> None:
        with store.write(**arguments()) as writer:
            for i in writer.pending(3):
                with writer.shard(i) as shard:
                    shard.write(rows(i))
                    if i == 1:
                        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_the_second()
    assert store.tables() == []
    assert store.names() == {}
    files = [info.path for info in store.backend.walk("tables")]
    assert len(files) == 1
    assert "part-00000-" in files[0]
    assert not any("/tmp/" in info.path for info in store.backend.walk("work"))
    with store.write(**arguments()) as again:
        assert not again.committed
        assert again.pending(3) == [1, 2]
        with pytest.raises(StoreError, match=r"expected 3 finished shards, found 2 missing: 1, 2"):
            again.commit()
    assert write(store).rows == 30
    assert store.table("chunks").to_table().equals(expected())
    left = {info.path for info in store.backend.walk("work")}
    assert left <= {"work/gc.lock", "work/names.lock"}


def test_shards_in_any_order_and_by_several_writers(local_store: Store) -> None:
    store = local_store
    with store.write(**arguments()) as one, store.write(**arguments()) as other:
        assert one.pending(3) == other.pending(3) == [0, 1, 2]
        for writer, i in ((one, 2), (other, 0), (one, 1)):
            with writer.shard(i) as shard:
                shard.write(rows(i))
        assert one.pending(3) == other.pending(3) == []
        first = one.commit()
        assert other.commit() == first
    assert store.table("chunks").to_table().equals(expected())


def test_the_second_writer_of_a_shard_gives_way(store: Store) -> None:
    with store.write(**arguments()) as one, store.write(**arguments()) as other:
        for writer in (one, other):
            for i in range(2):
                with writer.shard(i) as shard:
                    shard.write(rows(i))
        manifest = one.commit()
        assert other.commit() == manifest
    assert store.verify() == []
    listed = {part["path"] for part in manifest.parts} | {"manifest.json"}
    files = store.backend.walk(f"tables/{manifest.key}")
    assert {info.path.rpartition("/")[2] for info in files} == listed


def test_rows_that_differ_under_one_key_are_reported(store: Store) -> None:
    with store.write(**arguments()) as one, store.write(**arguments()) as other:
        with one.shard(0) as shard:
            shard.write(rows(0))
        with (
            pytest.raises(StoreError, match="found that two writers made shard 0"),
            other.shard(0) as shard,
        ):
            shard.write(rows(0, salt="other"))
        one.commit()
    with store.write(**arguments(options={"race": 1})) as late:
        with late.shard(0) as shard:
            shard.write(rows(0, salt="late"))
        store.backend.remove_tree(f"work/{late.key}/journal")
        with store.write(**arguments(options={"race": 1})) as early:
            with early.shard(0) as shard:
                shard.write(rows(0, salt="early"))
            won = early.commit()
        with pytest.raises(StoreError, match="two writers made shard 0"):
            late.commit()
    assert store.manifest(won.key) == won
    assert store.verify() == []


def test_another_cut_starts_over_only_when_nobody_else_writes(local_store: Store) -> None:
    store = local_store
    with store.write(**arguments()) as writer:
        writer.pending(3)
        with writer.shard(0) as shard:
            shard.write(rows(0))
        with (
            store.write(**arguments()) as other,
            pytest.raises(StoreError, match=r"expected a cut into 2 shards, found .* in 3"),
        ):
            other.pending(2)
        assert writer.pending(3) == [1, 2]
    with store.write(**arguments()) as writer:
        assert writer.pending(2) == [0, 1]
        for i in range(2):
            with writer.shard(i) as shard:
                shard.write(rows(i))
        with pytest.raises(InputError, match="below 2 as planned, found 2"):
            writer.shard(2)
        assert writer.commit().rows == 20


def test_names_and_references(local_store: Store) -> None:
    store = local_store
    first = write(store, options={"v": 1})
    second = write(store, options={"v": 2})
    third = write(store, options={"v": 3}, name="other")
    assert store.names() == {"chunks": second.key, "other": third.key}
    assert store.history("chunks") == [second.key, first.key]
    store.point("chunks", first.key)
    store.point("chunks", first.key)  # no change, no history
    assert store.history("chunks") == [first.key, second.key, first.key]
    assert store.resolve("chunks") == first.key
    assert store.resolve(second.key) == second.key
    assert store.resolve(third.key[:9]) == third.key
    assert [m.key for m in store.tables()] == sorted(
        [first.key, second.key, third.key],
        key=lambda key: (store.manifest(key).created, key),
    )
    with pytest.raises(StoreError, match=r"did you mean 'chunks'\? .*names there: chunks, other"):
        store.resolve("chunk")
    with pytest.raises(StoreError, match="found 'ffffff'"):
        store.resolve("ffffff")
    with pytest.raises(StoreError, match=f"found '{first.key[:5]}'"):
        store.resolve(first.key[:5])  # too short
    with pytest.raises(StoreError, match="found none with key"):
        store.point("x", "0" * 64)
    for bad in ("", "../x", "a/b", ".hidden", "x" * 200):
        with pytest.raises(InputError, match="expected a name of up to 128"):
            store.point(bad, first.key)


def test_an_ambiguous_start_lists_the_candidates(local_store: Store) -> None:
    real = write(local_store).key
    twin = real[:10] + "0" * 54
    local_store.backend.replace(f"tables/{twin}/manifest.json", b"{}")
    with pytest.raises(StoreError, match="found 2 tables that start with") as caught:
        local_store.resolve(real[:8])
    assert real[:16] in str(caught.value)


def test_lookup_by_id(store: Store) -> None:
    write(store, shards=3, n=50)
    table = store.table("chunks")
    whole = expected(3, 50)
    ids = whole["id"].to_numpy()
    asked = [ids[140], ids[3], ids[77], ids[3]]
    found = table.lookup(asked)
    assert found.equals(whole.take([140, 3, 77, 3]))
    assert table.lookup(asked, ["text"]).column_names == ["text"]
    assert table.lookup([], ["id"]).num_rows == 0
    with pytest.raises(InputError, match="found none for 1: \\[12\\]"):
        table.lookup([ids[0], 12])
    assert table.lookup([12, ids[0]], ["id"], missing="skip")["id"].to_pylist() == [ids[0]]


def test_lookup_of_an_id_with_several_rows(local_store: Store) -> None:
    kind = pa.schema([schemas.id_field(), ("sentence", pa.int32())])
    pieces = [([5, 7, 5], [0, 1, 2]), ([7, 9], [3, 4])]
    with local_store.write(name="sentences", step="split", schema=kind) as writer:
        for i, (ids, numbers) in enumerate(pieces):
            with writer.shard(i) as shard:
                shard.write(pa.table({"id": ids, "sentence": pa.array(numbers, pa.int32())}))
        writer.commit()
    found = local_store.table("sentences").lookup([7, 5])
    assert found.to_pydict() == {"id": [7, 7, 5, 5], "sentence": [1, 3, 0, 2]}


def test_attachments(store: Store, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>report</p>")
    (tmp_path / "moved.bin").write_bytes(b"\0" * 1000)
    with store.write(name="report", step="report", kind="report") as writer:
        writer.attach("report.html", tmp_path / "report.html")
        writer.attach("data.json", b"{}")
        writer.attach("moved.bin", str(tmp_path / "moved.bin"), move=True)
        with pytest.raises(InputError, match="a second time"):
            writer.attach("data.json", b"")
        with pytest.raises(InputError, match="expected an attachment name"):
            writer.attach("../evil", b"")
        manifest = writer.commit()
    assert [item["name"] for item in manifest.attachments] == [
        "data.json", "moved.bin", "report.html",
    ]  # fmt: skip
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "moved.bin").exists()
    table = store.table("report")
    assert table.attachment("report.html").read_text() == "<p>report</p>"
    assert table.attachment("report.html").read_text() == "<p>report</p>"  # from the cache
    assert table.attachment("moved.bin").stat().st_size == 1000
    with pytest.raises(InputError, match=r"found 'x'"):
        table.attachment("x")
    assert store.verify() == []
    store.backend.replace(
        f"tables/{manifest.key}/{manifest.attachments[0]['path']}", b"too long by far"
    )
    with pytest.raises(StoreError, match="expected 2 bytes as the manifest lists, found 15"):
        table.attachment("data.json")
    assert {problem.what for problem in store.verify("report")} == {"bytes", "sha256"}


def test_lineage_puts_ancestors_first(local_store: Store) -> None:
    store = local_store
    source = write(store, name="source", options={"n": 0})
    left = write(store, name="left", options={"n": 1}, inputs=[source.key])
    right = write(store, name="right", options={"n": 2}, inputs=[source.key])
    joined = write(store, name="joined", options={"n": 3}, inputs=[right.key, left.key])
    names = [manifest.name for manifest in store.lineage("joined")]
    assert names == ["source", "right", "left", "joined"]
    assert [m.key for m in store.lineage(left.key)] == [source.key, left.key]
    store.remove("left")
    with pytest.raises(StoreError, match=f"expected its input {left.key}"):
        store.lineage("joined")
    problems = store.verify(joined.key)
    assert [problem.what for problem in problems] == ["parent"]
    assert "remove the table and run its step again" in str(problems[0])


def test_inputs_have_to_be_there(local_store: Store) -> None:
    store = local_store
    with (
        pytest.raises(StoreError, match=r"found no table 1{64}.*digests of source files"),
        store.write(**arguments(inputs=["1" * 64])),
    ):
        pass
    with pytest.raises(InputError, match="64 hexadecimal digits, found 'chunks'"):
        store.write(**arguments(inputs=["chunks"]))


def test_a_removed_table_can_be_made_again(local_store: Store) -> None:
    store = local_store
    first = write(store)
    store.remove("chunks")
    assert not store.exists(first.key)
    assert store.names() == {"chunks": first.key}
    with pytest.raises(StoreError, match="run its step again"):
        store.table("chunks")
    assert [problem.what for problem in store.verify()] == ["name"]
    again = write(store)
    assert again.logical_digest == first.logical_digest
    assert store.verify() == []


def test_commit_once(local_store: Store) -> None:
    store = local_store
    calls: list[int] = []

    def produce(shard) -> None:  # type: ignore[no-untyped-def]
        calls.append(shard.shard)
        shard.write(rows(0))

    first = store.commit_once(produce, notes={"a": 1}, **arguments())
    assert store.commit_once(produce, **arguments()) == first
    assert calls == [0]
    assert store.table(first.key).to_table().equals(rows(0))


def test_encodings_are_cast_but_values_never(local_store: Store) -> None:
    store = local_store
    kind = pa.schema([schemas.id_field(), ("why", schemas.category()), ("text", pa.string())])
    plain = pa.table(
        {"id": pa.array([1, 2]), "why": ["a", "b"], "text": pa.array(["x", "y"], pa.large_string())}
    )
    with store.write(name="t", step="s", schema=kind) as writer:
        with writer.shard(0) as shard:
            shard.write(plain)
            shard.write(plain.to_batches()[0])
        writer.commit()
    assert store.table("t").schema == kind
    assert store.table("t").to_table()["why"].to_pylist() == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"id": [1]}, r"expected the columns \['id', 'score'\] in this order, found \['id'\]"),
        ({"score": [1.0], "id": [1]}, "in this order"),
        ({"id": [1], "score": pa.array([1.0], pa.float64())}, "'score': expected float, found dou"),
        ({"id": [1, None], "score": pa.array([1.0] * 2, pa.float32())}, "'id'.*the first in row 1"),
        ({"id": [3, -4], "score": pa.array([1.0] * 2, pa.float32())}, "row ids >= 0, found -4"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    local_store: Store, table: dict[str, object], message: str
) -> None:
    kind = pa.schema([schemas.id_field(), ("score", pa.float32())])
    with (
        pytest.raises(InputError, match=message),
        local_store.write(name="t", step="s", schema=kind) as writer,
        writer.shard(0) as shard,
    ):
        shard.write(pa.table(table))
    assert local_store.tables() == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (pa.schema([("a", pa.int64()), ("a", pa.string())]), "more than once: \\['a'\\]"),
        (pa.schema([("id", pa.int32())]), "expected column 'id' to hold row ids as int64"),
        (pa.schema([("a.b", pa.int64())]), "without '.'"),
        (pa.schema([("a", pa.struct([("b.c", pa.int64())]))]), "column 'a'.*without '.'"),
        (pa.schema([("a", pa.month_day_nano_interval())]), "column 'a'.*a type the store can hold"),
        (None, "expected a schema for a table"),
        ({"a": "int64"}, r"expected a pyarrow.Schema, found dict"),
    ],
)
def test_schemas_that_cannot_be_kept_are_refused(
    local_store: Store, kind: pa.Schema, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        local_store.write(name="t", step="s", schema=kind)


def test_wrong_arguments_are_refused(local_store: Store) -> None:
    write(local_store)
    table = local_store.table("chunks")
    with pytest.raises(InputError, match=r"expected columns among .* found \['nope'\]"):
        table.batches(["nope"])
    with pytest.raises(InputError, match="found the string 'id'"):
        table.batches("id")
    with pytest.raises(InputError, match="at least one column"):
        table.batches([])
    with pytest.raises(InputError, match="batch_rows=0"):
        table.batches(batch_rows=0)
    with pytest.raises(InputError, match=r"expected a shard among \[0, 1, 2\], found 3"):
        table.shard_batches(3)
    with pytest.raises(InputError, match="expected a kind among"):
        local_store.write(**arguments(kind="tabel"))
    with pytest.raises(InputError, match="expected a step"):
        local_store.write(**arguments(step="a/b"))
    with local_store.write(**arguments(options={"x": 1})) as writer:
        for bad in (-1, True, 1.5):
            with pytest.raises(InputError, match="number of shards"):
                writer.pending(bad)  # type: ignore[arg-type]
            with pytest.raises(InputError, match="shard number"):
                writer.shard(bad)  # type: ignore[arg-type]
        with writer.shard(0) as shard:
            with pytest.raises(InputError, match=r"dropped\['x'\], found -1"):
                shard.count(dropped={"x": -1})
            with pytest.raises(InputError, match="found dict"):
                shard.write({"id": [1]})  # type: ignore[arg-type]
        with pytest.raises(StoreError, match="shard 0 is not open"):
            shard.write(rows(0))
    for uri in ("gs://bucket/x", "http://host/x"):
        with pytest.raises(InputError, match="expected a store at a path"):
            Store(uri)
    with pytest.raises(InputError, match="found no bucket"):
        Store("s3://")


def test_a_store_can_be_pickled(store: Store) -> None:
    write(store)
    again = pickle.loads(pickle.dumps(store))
    assert again.uri == store.uri
    assert again.table("chunks").to_table().equals(expected())


def test_looking_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"file://{tmp_path}/nowhere")
    assert store.names() == {}
    assert store.tables() == []
    assert store.verify() == []
    assert store.gc().what == ()
    with pytest.raises(StoreError, match="names there: none yet"):
        store.table("x")
    assert not (tmp_path / "nowhere").exists()
    monkeypatch.setenv("PRUNERY_STORE", "s3://b/p")
    assert Store.default_uri() == "s3://b/p"
    monkeypatch.delenv("PRUNERY_STORE")
    assert Store.default_uri() == "./prunery-store"


def test_manifests_are_checked(local_store: Store) -> None:
    store = local_store
    manifest = write(store)
    path = f"tables/{manifest.key}/manifest.json"
    good = store.backend.read(path)
    assert Manifest.from_bytes(good, path) == manifest
    body = json.loads(good)
    body["kept"] += 1
    cases = [
        (good.replace(b'"seed": 0', b'"seed": 1'), "was altered"),
        (json.dumps(body).encode(), "was altered"),
        (good[:100], "expected JSON"),
        (b"[]", "expected a JSON object"),
        (good.replace(b'"format": 1', b'"format": 2'), "expected manifest format 1, found 2"),
    ]
    for damaged, message in cases:
        store.backend.replace(path, damaged)
        with pytest.raises(StoreError, match=message):
            store.table("chunks")
        assert [problem.what for problem in store.verify()] == ["manifest"]
    store.backend.replace(path, good)
    other = "0" * 64
    store.backend.replace(f"tables/{other}/manifest.json", good)
    with pytest.raises(StoreError, match="expected the manifest of 0"):
        store.manifest(other)


def test_ids_of_a_large_table_stay_in_row_order(local_store: Store) -> None:
    """More rows than one row group and one batch; the id index is over all parts."""
    n = 40_000
    kind = pa.schema([schemas.id_field(), ("x", pa.float32())])
    texts = [f"row {i}" for i in range(n)]
    table = pa.table({"id": row_ids(texts), "x": np.arange(n, dtype="f4")}, schema=kind)
    with local_store.write(name="t", step="s", schema=kind) as writer:
        for i in range(2):
            with writer.shard(i) as shard:
                for start in range(0, n // 2, 999):
                    stop = min(start + 999, n // 2)
                    shard.write(table.slice(i * n // 2 + start, stop - start))
        writer.commit()
    read = local_store.table("t")
    assert read.to_table().equals(table)
    picked = np.random.default_rng(0).permutation(n)[:500]
    assert read.lookup(table["id"].take(pa.array(picked)).to_pylist()).equals(
        table.take(pa.array(picked))
    )


def test_another_cut_never_removes_what_was_committed_meanwhile(local_store: Store) -> None:
    with local_store.write(**arguments()) as late:
        manifest = write(local_store, shards=3)
        assert late.pending(2) == []
        assert late.committed
        assert late.commit() == manifest
    assert local_store.table("chunks").to_table().equals(expected())


def test_unfinished_work_can_be_dropped(store: Store) -> None:
    with store.write(**arguments()) as writer:
        writer.pending(3)
        with writer.shard(0) as shard:
            shard.write(rows(0))
        if store.backend.local("") is not None:
            with pytest.raises(StoreError, match="found a writer"):
                store.remove(writer.key)
    if store.backend.local("") is None:  # nobody can know that the writer is gone
        with (
            store.write(**arguments()) as writer,
            pytest.raises(StoreError, match="drop what it left with Store.remove"),
        ):
            writer.pending(2)
    store.remove(writer.key)
    assert not list(store.backend.walk("tables"))
    assert write(store, shards=2).rows == 20
    with pytest.raises(StoreError, match="expected a name or key"):
        store.remove("0" * 64)
