"""An S3 server that errs, stalls, cuts off and answers with what was: a whole table or an error."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunery.errors import StoreError
from prunery.storage import Store

from .rows import expected, write
from .s3_proxy import Asked, Cut, Fails, Proxy, Stale, Stalls, proxy

SHARDS = 2
WANT = expected(SHARDS)


@pytest.fixture(scope="module")
def between(s3_options: dict[str, Any]) -> Iterator[Proxy]:
    with proxy(s3_options["endpoint_url"]) as made:
        yield made


@pytest.fixture
def faulty(
    between: Proxy, s3_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """An empty store behind the proxy, which is well until a test says otherwise."""
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    between.rule = lambda asked: None
    # Short times and no second attempts of botocore's, so that a test is not their sum.
    config = {"read_timeout": 1, "connect_timeout": 1, "retries": {"max_attempts": 0}}
    options = {**s3_options, "endpoint_url": between.url, "config_kwargs": config}
    store: Any = Store(f"s3://bucket/{uuid.uuid4().hex}", storage_options=options)
    monkeypatch.setattr(type(store.backend._fs), "retries", 2)
    yield store
    between.rule = lambda asked: None


@pytest.fixture
def straight(faulty: Store, s3_options: dict[str, Any]) -> Store:
    """The same store without the proxy."""
    return Store(faulty.uri, storage_options=s3_options)


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = Store(tmp_path_factory.mktemp("undisturbed") / "store")
    return write(store, SHARDS).logical_digest


@pytest.fixture(scope="module")
def requests(between: Proxy, s3_options: dict[str, Any]) -> int:
    """How many requests one undisturbed writing takes."""
    between.rule = lambda asked: None
    options = {**s3_options, "endpoint_url": between.url}
    before = len(between.asked)
    write(Store(f"s3://bucket/{uuid.uuid4().hex}", storage_options=options), SHARDS)
    return len(between.asked) - before


def check_nothing_or_all(store: Store, digest: str) -> None:
    """What a reader without faults sees: no table, or the whole one."""
    assert [one.logical_digest for one in store.tables()] in ([], [digest])
    for name in store.names():
        assert store.table(name).to_table().equals(WANT)
    assert store.verify() == []


def check_rerun(store: Store, digest: str) -> None:
    assert write(store, SHARDS).logical_digest == digest
    assert store.table("chunks").to_table().equals(WANT)
    assert store.verify() == []


WHAT = [
    Fails(500, "InternalError"),
    Fails(503, "SlowDown"),
    Fails(403, "AccessDenied"),
    Stalls(2.0),
    Cut(nothing=True),
]


@pytest.mark.parametrize("what", WHAT, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
def test_a_server_that_fails_for_good_in_the_middle(
    faulty: Store, straight: Store, between: Proxy, digest: str, requests: int, what: Any,
    share: float,
) -> None:  # fmt: skip
    between.fails_from(int(share * requests), what)
    with pytest.raises(StoreError) as caught:
        write(faulty, SHARDS)
    assert faulty.uri in str(caught.value)
    check_nothing_or_all(straight, digest)
    between.rule = lambda asked: None
    check_rerun(faulty, digest)


@pytest.mark.parametrize("what", [Fails(503, "SlowDown"), Fails(500, "InternalError")], ids=str)
def test_errors_now_and_then_are_ridden_out(
    s3_options: dict[str, Any], faulty: Store, between: Proxy, digest: str, what: Any
) -> None:
    """With the attempts that botocore makes unless told otherwise."""
    patient = Store(faulty.uri, storage_options={**s3_options, "endpoint_url": between.url})
    between.rule = lambda asked: what if asked.number % 5 == 0 else None
    check_rerun(patient, digest)


def test_answers_that_get_lost_though_it_was_done(
    faulty: Store, straight: Store, between: Proxy, digest: str, requests: int
) -> None:
    """Each single answer in turn: the rerun finds what was done, and makes nothing twice."""
    for number in range(0, requests, 6):
        store = Store(f"{faulty.uri}/{number}", storage_options=faulty_options(faulty))
        between.fails_from(number, Cut(nothing=True), count=1)
        try:
            write(store, SHARDS)
        except StoreError:
            between.rule = lambda asked: None
        check_rerun(store, digest)


def faulty_options(store: Any) -> dict[str, Any]:
    options: dict[str, Any] = store._options
    return options


@pytest.mark.parametrize("what", [Cut(), Stalls(2.0), Fails(503, "SlowDown")], ids=str)
def test_reading_is_the_whole_table_or_an_error(faulty: Store, between: Proxy, what: Any) -> None:
    write(faulty, SHARDS)
    before = len(between.asked)
    assert faulty.table("chunks").to_table().equals(WANT)
    reads = len(between.asked) - before
    failed = 0
    places = {0, reads // 2, reads - 1}
    for number in places:
        between.fails_from(number, what)
        try:
            assert faulty.table("chunks").to_table().equals(WANT)
        except StoreError:
            failed += 1
    assert failed == len(places)
    between.rule = lambda asked: None
    assert faulty.table("chunks").to_table().equals(WANT)


def test_listings_that_are_behind(
    faulty: Store, straight: Store, between: Proxy, digest: str
) -> None:
    """The journal seems empty, the bucket too: shards are made again, and are the same."""
    assert faulty.tables() == [] and faulty.names() == {}
    between.fails_from(14, Fails(500, "InternalError"))
    with pytest.raises(StoreError):
        write(faulty, SHARDS)
    between.rule = lambda asked: Stale() if asked.listing else None
    try:
        write(faulty, SHARDS)
    except StoreError:
        check_nothing_or_all(straight, digest)
    between.rule = lambda asked: None
    check_rerun(faulty, digest)


def manifest(asked: Asked) -> bool:
    return asked.method in ("GET", "HEAD") and "/manifest.json" in asked.path


def test_a_manifest_that_is_not_there_yet(
    faulty: Store, straight: Store, between: Proxy, digest: str
) -> None:
    """Read right after the write, it answers "no such key": no table, never half of one."""
    key = write(straight, SHARDS).key
    between.first.clear()
    between.rule = lambda asked: Stale() if manifest(asked) else None
    with pytest.raises(StoreError):
        faulty.table("chunks")
    assert not faulty.exists(key)
    # A writer that cannot see the table makes it again; the first one stays as it was.
    before = straight.backend.read(f"tables/{key}/manifest.json")
    with contextlib.suppress(StoreError):
        write(faulty, SHARDS)
    assert straight.backend.read(f"tables/{key}/manifest.json") == before
    check_nothing_or_all(straight, digest)
    between.rule = lambda asked: None
    check_rerun(faulty, digest)


def test_a_name_that_is_behind_leads_to_a_whole_table(
    faulty: Store, straight: Store, between: Proxy
) -> None:
    write(straight, SHARDS)
    between.first.clear()
    assert faulty.table("chunks").to_table().equals(WANT)
    write(straight, SHARDS, salt="new", options={"salt": "new"})
    between.rule = lambda asked: Stale() if "/names/" in asked.path else None
    assert faulty.table("chunks").to_table().equals(WANT)
    between.rule = lambda asked: None
    assert faulty.table("chunks").to_table().equals(expected(SHARDS, salt="new"))
