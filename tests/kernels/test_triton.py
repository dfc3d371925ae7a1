"""The Triton kernels without a GPU: in the interpreter, and compiled for sm_80 and sm_90.

The interpreter must be chosen before the kernels are imported and cannot compile, so each half
is a process of its own. With a GPU, test_gpu.py runs them for real.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from prunery.kernels import token_stats

NEEDS = pytest.mark.skipif(
    find_spec("triton") is None,
    reason="Triton is not installed: pip install 'prunery[triton]'",
)


def run(root, names, environment):
    paths = [f"tests/kernels/{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths]
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=root, env=kept | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@NEEDS
@pytest.mark.timeout(900)
def test_in_the_interpreter(root):
    run(root, ["interpreted", "interpreted_weights"], {"TRITON_INTERPRET": "1"})


@NEEDS
@pytest.mark.timeout(900)
def test_compiled_ahead(root, cache):
    """Triton keeps what it compiled by a digest of source and options, here beside pytest's."""
    place = {"TRITON_CACHE_DIR": str(cache.mkdir("triton"))}
    run(root, ["compiled", "compiled_weights"], place)


def test_absence_names_the_extra(monkeypatch):
    monkeypatch.setattr("prunery.kernels.dispatch.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install\s+'prunery\[triton\]'"):
        token_stats(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), impl="triton")
    # "auto" goes on without it.
    token_stats(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]))
