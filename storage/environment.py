"""What a manifest records of the process that made a table."""

import contextlib
import importlib.metadata
import platform
import resource
import sys

_LIBRARIES = {
    "numpy": "numpy", "pyarrow": "pyarrow", "faiss": "faiss-cpu", "torch": "torch",
    "transformers": "transformers", "tokenizers": "tokenizers",
    "sentence_transformers": "sentence-transformers", "sklearn": "scikit-learn",
    "onnxruntime": "onnxruntime", "safetensors": "safetensors",
}  # fmt: skip


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process has had in its life, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def libraries() -> dict[str, str]:
    """Return the versions of Python and of the libraries loaded that can change a result."""
    found = {"python": platform.python_version()}
    for module, distribution in _LIBRARIES.items():
        if module in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[distribution] = importlib.metadata.version(distribution)
    return found
