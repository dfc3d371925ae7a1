"""Tiny models and one finished run, shared by the tests of the steps."""

import pytest

from prunery.pipelines.run import run_recipe
from prunery.storage import Store

from ..small_run import small_recipe, write_corpus
from ..tiny_models import tiny_encoder, tiny_provence


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """(encoder folder, Provence folder), random weights."""
    folder = tmp_path_factory.mktemp("models")
    return tiny_encoder(folder), tiny_provence(folder)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def small(corpus, models):
    """A function that gives the small recipe with overrides."""
    return lambda *overrides: small_recipe(corpus, *models, *overrides)


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """The result of one run of the small recipe; its store is for reading and adding."""
    return run_recipe(small(), Store(tmp_path_factory.mktemp("finished")), threads=1)
