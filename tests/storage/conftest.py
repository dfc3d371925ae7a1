"""A store in a folder, and one on a server that speaks the S3 protocol over HTTP."""

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunery.storage import Store


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, Any]]:
    """storage_options of a running server with a bucket named `bucket`."""
    server = pytest.importorskip("moto.server", reason="the extra dev (moto) is not installed")
    s3fs = pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}
    s3fs.S3FileSystem(**options).mkdir("bucket")
    yield options
    running.stop()


@pytest.fixture
def s3_store(s3_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store in a bucket."""
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    return Store(f"s3://bucket/{uuid.uuid4().hex}", storage_options=s3_options)


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    """An empty store in a folder."""
    return Store(tmp_path / "store")


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store in a folder, then one in a bucket: what holds there holds here."""
    found: Store = request.getfixturevalue(f"{request.param}_store")
    return found
