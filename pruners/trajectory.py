"""Arithmetic over training trajectories: one value a row, run and epoch.

Sums go epoch by epoch or window by window, so that no float64 copy of a whole trajectory is
made and a row's result has the same bits wherever the row stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .contract import Array, FloatArray

Float64Array = npt.NDArray[np.float64]

# Epochs below which `dyn_unc` and `dual` cannot be trusted: they look for rows that a model comes
# to memorise, and in a short run it has memorised none. Flipped labels then rank below clean rows
# (AUC about 0.2 by dyn_unc, near chance by dual).
SHORT_RUN = 30


def by_run(name: str, trajectory: Array, runs: int) -> Array:
    """View a trajectory (N, runs * epochs) as (N, runs, epochs); `name` is for the message.

    Raises
    ------
    InputError
        The width is no positive multiple of `runs`.
    """
    n, width = trajectory.shape
    if width == 0 or width % runs:
        raise InputError(
            f"signal `{name}` must hold the same number of epochs, at least one, for each of"
            f" {runs} runs; found {width} values a row. Set `runs` to the number of training runs,"
            " and give all epochs of each."
        )
    return trajectory.reshape(n, runs, width // runs)


def epoch_mean(trajectory: Array) -> Float64Array:
    """Mean over the epochs of each run: (N, runs, epochs) -> (N, runs) float64."""
    total = np.zeros(trajectory.shape[:2])
    for epoch in range(trajectory.shape[2]):
        total += trajectory[:, :, epoch]
    return np.asarray(total / trajectory.shape[2], np.float64)


def windows(trajectory: Array, size: int) -> Iterator[Float64Array]:
    """Every run of `size` epochs in a row, oldest first: (N, runs, size) float64 each.

    One window, the whole trajectory, where it is shorter than `size`.
    """
    epochs = trajectory.shape[2]
    size = min(size, epochs)
    for start in range(epochs - size + 1):
        yield trajectory[:, :, start : start + size].astype(np.float64)


def window_mean(
    trajectory: Array, size: int, formula: Callable[[Float64Array], Float64Array]
) -> Float64Array:
    """Mean over the windows of a formula (N, runs, size) -> (N, runs): (N, runs) float64."""
    count = 0
    total = np.zeros(trajectory.shape[:2])
    for window in windows(trajectory, size):
        total += formula(window)
        count += 1
    return total / count


def deviation(window: Float64Array) -> Float64Array:
    """Standard deviation over the last axis; it divides by the number of epochs.

    Dividing by one less, as torch does, scales all rows alike.
    """
    return np.asarray(window.std(axis=-1), np.float64)


def run_mean(values: Float64Array) -> FloatArray:
    """Mean over runs: (N, runs) -> (N,) float32."""
    return np.asarray(values.mean(axis=1), np.float32)
