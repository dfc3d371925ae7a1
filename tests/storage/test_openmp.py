"""FAISS and torch in one process: two OpenMP runtimes, no deadlock, no crash, right answers.

Each case is a process of its own with a time limit, since what it looks for is a hang.
"""

import subprocess
import sys

import pytest

COMMON = """
import os, sys, threading
import numpy as np
{imports}
from prunery.storage import VectorIndex
rng = np.random.default_rng(0)
x = rng.standard_normal((4000, 32)).astype("f4")
q = rng.standard_normal((64, 32)).astype("f4")
want = (q @ x.T).argmax(1)
index = VectorIndex.build(x, np.arange(4000), threads=2)
graph = VectorIndex.build(x, np.arange(4000), kind="hnsw", deterministic=False, threads=2)

def search():
    ids, _ = index.search(q, 3, threads=2)
    assert (ids[:, 0] == want).all()
    graph.search(q, 3, threads=2)

def multiply():
    a = torch.from_numpy(x[:1000]).requires_grad_()
    (a @ a.T).exp().mean().backward()
    assert torch.isfinite(a.grad).all()

def both(times):
    for _ in range(times):
        search()
        multiply()
"""

ORDERS = {
    "faiss first": "import faiss, torch",
    "torch first": "import torch, faiss",
    "torch used first": "import torch\ntorch.set_num_threads(2)\n"
    "(torch.ones(500, 500) @ torch.ones(500, 500)).sum()\nimport faiss",
}


def run(code: str, imports: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", COMMON.format(imports=imports) + code],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    return done.stdout.strip()


@pytest.mark.parametrize("imports", ORDERS.values(), ids=list(ORDERS))
def test_in_turn_and_from_threads(imports: str) -> None:
    code = """
torch.set_num_threads(2)
both(5)
threads = [threading.Thread(target=both, args=(4,)) for _ in range(3)]
failed = []
threading.excepthook = lambda error: failed.append(error)
for thread in threads: thread.start()
for thread in threads: thread.join()
print("done", len(failed), torch.get_num_threads())
"""
    assert run(code, imports) == "done 0 2"


def test_a_search_leaves_the_thread_counts_as_they_were() -> None:
    code = """
faiss.omp_set_num_threads(1)
torch.set_num_threads(1)
search()
print(faiss.omp_get_max_threads(), torch.get_num_threads())
"""
    assert run(code, "import faiss, torch") == "1 1"


def test_a_forked_child_searches() -> None:
    """A team of OpenMP threads does not survive a fork; the child goes on with one thread."""
    code = """
import signal
search()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    search()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run(code, "import faiss") == "0"
