"""What every test shares: no network, no user's home, the shared data where it lies."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes share the cores already; threads beside them would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss  # noqa: F401  before torch: both bring an OpenMP runtime, and this order is safe
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data that lies beside the checkout, or a skip that says so."""
    folder = Path(os.environ.get("PRUNERY_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real data sets (../shared/data or PRUNERY_SHARED_DATA) are not here")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root, which is also the package."""
    return ROOT
