"""A model of many layers passes in the memory of a few."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_a_deep_model_passes_in_the_memory_of_a_few_layers(tmp_path, root):
    # Blocks this small would stay on the heap of glibc when freed; those of a real model (over
    # 32 MiB) go back to the system, as these do with a low threshold.
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.compression.deep_model", str(tmp_path)],
        env=os.environ | environment,
        cwd=root,
        check=True,
        timeout=300,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = json.loads(ended.stdout)
    assert found["all"] > 390e6
    # Two blocks while one takes the other's place, the grams of the inputs (as large as a block),
    # and library code that is read in on the way.
    assert found["streamed"] < 8 * found["layer"]
    # A block, its gradients, their sums, and their copies in the journal.
    assert found["gradients"] < 8 * found["layer"]
    # The measure sees a walk that holds on to its blocks.
    assert found["held"] > 0.9 * found["few"] > 10 * found["layer"]
