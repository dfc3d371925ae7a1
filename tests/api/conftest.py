"""What several tests of the service share: a store with one small run in it."""

import pytest

from prunery.pipelines.run import run_recipe
from prunery.storage import Store

from ..small_run import small_recipe, write_corpus
from ..tiny_models import tiny_encoder, tiny_provence


@pytest.fixture(scope="session")
def small_store(tmp_path_factory):
    """A store that holds every table of the small recipe, report included."""
    models = tmp_path_factory.mktemp("models")
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    store = Store(tmp_path_factory.mktemp("run") / "store")
    run_recipe(small_recipe(corpus, tiny_encoder(models), tiny_provence(models)), store)
    return store
