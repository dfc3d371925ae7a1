"""One Prefect server for all tests of flows, with a database of its own."""

import os

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")

import pytest

from ..small_run import small_recipe, write_corpus
from ..tiny_models import tiny_encoder, tiny_provence


@pytest.fixture(scope="session")
def server():
    """A temporary server; `PREFECT_API_URL` names it, as a configured one would be."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A function that gives the small recipe with overrides."""
    models = tmp_path_factory.mktemp("models")
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    made = tiny_encoder(models), tiny_provence(models)
    return lambda *overrides: small_recipe(corpus, *made, *overrides)
