"""Labelled data sets that are there without a download: scikit-learn's handwritten digits."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

DIGITS = "builtin:digits"
NOISY_DIGITS = "builtin:noisy-digits"
NAMES = (DIGITS, NOISY_DIGITS)
NOISE = 0.1
"""Share of the training labels of `builtin:noisy-digits` that are flipped, with seed 0."""


@lru_cache(maxsize=1)
def digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels (1797, 8, 8) uint8 and digits (1797,) int64, in scikit-learn's order.

    The data set's counts of 0 to 16 are stretched to 0 to 255.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
    return pixels, found.target.astype(np.int64)


def digest() -> str:
    """SHA-256 of pixels and labels."""
    pixels, labels = digits()
    return hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
