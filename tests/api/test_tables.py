"""Tables over HTTP: what is shown is what the store holds, and nothing else can be reached."""

import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from prunery.api.stored_context import whole
from prunery.api.table_cells import Page, page_of, plain
from prunery.api.table_list import listing, manifest_of
from prunery.errors import InputError
from prunery.pipelines.explain import explain
from prunery.storage import Store

from .live import application


def client_of(store):
    return TestClient(application(store=str(store.uri)), base_url="http://127.0.0.1")


@pytest.fixture(scope="module")
def client(small_store):
    return client_of(small_store)


@pytest.fixture
def wide(tmp_path):
    """A store with one table of awkward cells in three shards."""
    store = Store(tmp_path / "store")
    schema = pa.schema(
        [("id", pa.int64()), ("text", pa.string()), ("raw", pa.binary()),
         ("vector", pa.list_(pa.float32())), ("score", pa.float64())]
    )  # fmt: skip
    with store.write(name="wide", step="demo", schema=schema) as writer:
        for shard in writer.pending(3):
            with writer.shard(shard) as out:
                rows = [
                    {"id": 2**62 + 10 * shard + i, "text": "é" * 5000, "raw": b"\xff" * 300,
                     "vector": [0.5] * 40, "score": float("nan") if i else 1.5}
                    for i in range(4)
                ]  # fmt: skip
                out.write(pa.Table.from_pylist(rows, schema))
                out.reject({"text": f"row {shard}"}, "too short")
        writer.commit()
    return store


def test_tables_are_listed_newest_first_and_paged(client, small_store):
    first = client.get("/v1/tables", params={"limit": 5}).json()
    assert first["total"] == len(small_store.tables()) and first["next_offset"] == 5
    rest = client.get("/v1/tables", params={"limit": 200, "offset": 5}).json()
    assert rest["next_offset"] is None
    rows = first["tables"] + rest["tables"]
    assert [row["created"] for row in rows] == sorted((r["created"] for r in rows), reverse=True)
    assert {row["key"] for row in rows} == {m.key for m in small_store.tables()}
    (prune,) = client.get("/v1/tables", params={"step": "prune_context"}).json()["tables"]
    stored = small_store.manifest("prune")
    assert (prune["names"], prune["rows"], prune["kept"]) == (["prune"], stored.rows, stored.kept)
    assert prune["dropped"] == sum(stored.dropped.values()) and prune["reasons"] == stored.dropped


def test_a_table_is_found_by_name_key_and_its_beginning(client, small_store):
    key = small_store.resolve("chunks")
    found = [client.get(f"/v1/tables/{ref}").json() for ref in ("chunks", key, key[:10])]
    assert {one["key"] for one in found} == {key}
    assert found[0]["options"] == small_store.manifest("chunks").options
    assert found[0]["names"] == ["chunks"]


@pytest.mark.parametrize(
    "ref",
    ["..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "a%00b", "names%2fchunks.json", "%2fetc%2fpasswd",
     "-x", "chunks%2e%2e%2f", "C:%5cwindows", "chunks%0a", "x" * 500, "nothing", "abcdef"],
)  # fmt: skip
@pytest.mark.parametrize(
    "place", ["tables/{}", "tables/{}/rows", "tables/{}/lineage", "reports/{}"]
)
def test_only_what_the_store_lists_is_reached(client, ref, place):
    answer = client.get("/v1/" + place.format(ref))
    assert answer.status_code == 404
    assert "root:" not in answer.text and answer.json()["error"]["type"] == "not_found"


def test_no_file_is_opened_for_a_reference_that_is_none(small_store, monkeypatch):
    from prunery.api.errors import NotServed

    def refuse(*_):
        raise AssertionError("the store was asked")

    monkeypatch.setattr(Store, "resolve", refuse)
    for ref in ("..", "../names/chunks", "a/b", "a\0b", "", ".hidden", "a\n"):
        with pytest.raises(NotServed):
            manifest_of(small_store, ref)


def test_rows_come_in_order_across_shards(wide):
    client = client_of(wide)
    ids = [str(2**62 + 10 * shard + i) for shard in range(3) for i in range(4)]
    got, offset = [], 0
    while offset is not None:
        page = client.get("/v1/tables/wide/rows", params={"offset": offset, "limit": 5}).json()
        got += [row["id"] for row in page["rows"]]
        offset = page["next_offset"]
    assert got == ids
    beyond = client.get("/v1/tables/wide/rows", params={"offset": 10**9}).json()
    assert beyond["rows"] == [] and beyond["next_offset"] is None


def test_large_cells_are_cut_and_marked(wide):
    page = client_of(wide).get("/v1/tables/wide/rows", params={"limit": 2, "cell": 10}).json()
    row = page["rows"][0]
    assert row["text"] == "é" * 10 + "…" and row["raw"] == "ff" * 24 + "…"
    assert row["vector"] == [0.5] * 16 and page["rows"][1]["score"] == "NaN"
    told = {
        one["column"]: (one["size"], one["unit"]) for one in page["shortened"] if not one["row"]
    }
    assert told == {"text": (5000, "characters"), "raw": (300, "bytes"), "vector": (40, "items")}


def test_only_the_columns_asked_for(wide):
    client = client_of(wide)
    page = client.get("/v1/tables/wide/rows", params={"columns": "id, score", "limit": 1}).json()
    assert list(page["rows"][0]) == ["id", "score"]
    assert [one["name"] for one in page["columns"]] == ["id", "score"]
    wrong = client.get("/v1/tables/wide/rows", params={"columns": "ids"})
    assert wrong.status_code == 422 and "there are: id, text" in wrong.json()["error"]["message"]


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "offset=-1", "cell=100000", "limit=x"])
def test_limits_of_a_page(wide, query):
    assert client_of(wide).get(f"/v1/tables/wide/rows?{query}").status_code == 422


def test_a_page_of_large_rows_ends_early(wide, monkeypatch):
    monkeypatch.setattr("prunery.api.table_cells.PAGE_BYTES", 3000)
    page = page_of(wide.table("wide"), 0, 12, None, 4000)
    assert len(page.rows) == 1
    told = client_of(wide).get("/v1/tables/wide/rows", params={"cell": 4000}).json()
    assert told["next_offset"] == 1


def test_rejects_with_their_reasons(wide):
    page = client_of(wide).get("/v1/tables/wide/rejects", params={"offset": 1}).json()
    assert [row["reason"] for row in page["rows"]] == ["too short"] * 2 and page["total"] == 3


def test_damage_is_not_taken_for_absence(wide):
    key = wide.resolve("wide")
    client = client_of(wide)
    for part in (wide.backend.local(f"tables/{key}") or "").glob("part-*"):
        part.write_bytes(b"PAR1" + b"\0" * 40)
    answer = client.get("/v1/tables/wide/rows")
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "store"


def test_lineage_has_every_ancestor_and_what_was_made(client, small_store):
    graph = client.get("/v1/tables/signals/lineage").json()
    wanted = {m.key: m for m in small_store.lineage("signals")}
    assert {one["key"] for one in graph["nodes"]} == set(wanted)
    edges = {(edge["from"], edge["to"]) for edge in graph["edges"]}
    assert edges == {(parent, key) for key, m in wanted.items() for parent in m.parents}
    depth = {one["key"]: one["depth"] for one in graph["nodes"]}
    assert all(depth[a] < depth[b] for a, b in edges) and min(depth.values()) == 0
    more = client.get("/v1/tables/signals/lineage", params={"descendants": True}).json()
    assert {one["name"] for one in more["nodes"]} >= {"prune", "contexts", "report", "chunks"}


def test_a_missing_ancestor_is_shown_as_missing(tmp_path):
    store = Store(tmp_path / "store")
    schema = pa.schema([("id", pa.int64())])
    first = store.commit_once(
        lambda out: out.write(pa.table({"id": [1]}, schema)), name="a", step="a", schema=schema
    )
    store.commit_once(
        lambda out: out.write(pa.table({"id": [2]}, schema)),
        name="b", step="b", schema=schema, inputs=[first.key],
    )  # fmt: skip
    store.remove(first.key)
    nodes = client_of(store).get("/v1/tables/b/lineage").json()["nodes"]
    assert [(one["name"], one["missing"]) for one in nodes] == [("b", False), ("missing", True)]


def test_an_explanation_is_that_of_the_library(client, small_store):
    row = small_store.table("prune").to_table().column("id")[0].as_py()
    made = client.get(f"/v1/tables/prune/explain/{row}").json()
    wanted = explain(small_store, "prune", row)
    assert made["lines"] == wanted.lines() and made["row"]["id"] == str(row)
    assert [one["row"] for one in made["verdicts"]] == [str(one.row) for one in wanted.verdicts]
    assert client.get("/v1/tables/prune/explain/1").status_code == 404
    for wrong in ("x", "1.5", "9" * 30, "%20"):
        assert client.get(f"/v1/tables/prune/explain/{wrong}").status_code == 422


@pytest.mark.parametrize("text", ["", "-", "١", "1e3", "--1", str(2**63)])
def test_row_ids_are_whole_numbers_of_64_bits(text):
    with pytest.raises(InputError):
        whole(text, "a row's id")


def test_stored_questions_and_their_scored_sentences(client, small_store):
    for ref in ("signals", "prune", "contexts", "report"):
        asked = client.get(f"/v1/tables/{ref}/questions").json()
        assert asked["total"] == 5 and asked["decision"]["method"] == "provence"
    one = asked["questions"][0]
    made = client.get("/v1/tables/report/contexts", params={"question": one["id"]}).json()
    assert made["question"] == {"id": one["id"], "question": one["question"]}
    signals = small_store.table("signals").to_table().to_pylist()
    mine = [row for row in signals if str(row["question"]) == one["id"]]
    sentences = [s for passage in made["results"] for s in passage["sentences"]]
    assert [s["id"] for s in sentences] == [str(row["id"]) for row in mine]
    assert [s["score"] for s in sentences] == [row["keep_probability"] for row in mine]
    kept = {r["id"]: r["keep"] for r in small_store.table("prune").to_table().to_pylist()}
    assert [s["stored_kept"] for s in sentences] == [kept[row["id"]] for row in mine]
    for passage in made["results"]:
        ends = [s["end"] for s in passage["sentences"]]
        assert ends[-1] <= len(passage["text"]) and ends == sorted(ends)


def test_other_tables_hold_no_contexts(client):
    answer = client.get("/v1/tables/chunks/questions")
    assert answer.status_code == 404 and "context_signals" in answer.json()["error"]["message"]
    assert client.get("/v1/tables/prune/contexts", params={"question": "7"}).status_code == 404
    assert client.get("/v1/tables/prune/contexts", params={"question": "x"}).status_code == 422


def test_a_report_is_sandboxed_and_escaped(client):
    answer = client.get("/v1/reports/report")
    policy = answer.headers.get_list("content-security-policy")
    assert len(policy) == 1 and policy[0].startswith("sandbox; default-src 'none'")
    assert "script-src" not in policy[0] and "allow-scripts" not in policy[0]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "<script>alert" not in answer.text and "&lt;script&gt;alert" in answer.text
    assert client.get("/v1/reports/prune").status_code == 404


def test_without_a_store_nothing_is_shown():
    answer = TestClient(application(), base_url="http://127.0.0.1").get("/v1/tables")
    assert answer.status_code == 404 and "--store" in answer.json()["error"]["message"]


def test_new_tables_are_seen_after_a_moment(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    store.backend.replace("names/.keep", b"")
    assert listing(store).manifests == {}
    schema = pa.schema([("id", pa.int64())])
    store.commit_once(
        lambda out: out.write(pa.table({"id": [1]}, schema)), name="a", step="a", schema=schema
    )
    monkeypatch.setattr("prunery.api.table_list._FRESH_SECONDS", 0.0)
    assert len(listing(store).manifests) == 1


def test_plain_values_are_json():
    page = Page()
    page.add({"a": {"b": [1, 2**60, None, True, b"\x01"]}, "c": float("inf")}, frozenset(), 100)
    assert page.rows == [{"a": {"b": [1, str(2**60), None, True, "01"]}, "c": "Infinity"}]
    assert plain({1: (2**60, 5, b"\x01")}) == {"1": [str(2**60), 5, "01"]}
