"""Logs of answers go to a folder of the test run, never to the user's cache."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("PRUNERY_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
