"""FAISS, loaded when needed, with a thread count of its own.

The faiss-cpu wheel carries its own OpenMP runtime and its own OpenBLAS; torch carries another
OpenMP. On Linux the two live side by side: each keeps its own pool, and the count set here
changes neither torch's nor, being a per-thread setting in OpenMP, another thread's. What does
hang is an OpenMP team started in a child of `fork` whose parent had one, since the pool's
threads do not exist in the child; so a forked child searches with one thread. On macOS, where
two OpenMP runtimes are known to crash, the default is one thread too.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import InputError

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def load_faiss() -> Any:
    """Import FAISS."""
    import faiss

    return faiss


def default_threads() -> int:
    """Return `PRUNERY_FAISS_THREADS` where set, else the CPUs this process may use.

    Raises:
        InputError: the variable is not a count.
    """
    text = os.environ.get("PRUNERY_FAISS_THREADS")
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise InputError(
                f"expected PRUNERY_FAISS_THREADS to be a number of at least 1, found {text!r}"
            )
        return int(text)
    if sys.platform == "darwin":
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def faiss_threads(threads: int | None = None) -> Iterator[Any]:
    """Give FAISS with this many threads for the block; the count before comes back after it."""
    if threads is not None and threads < 1:
        raise InputError(f"expected at least 1 thread, found {threads}")
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if _forked else threads or default_threads())
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)
