"""What makes a layer smaller: the interface between the walk and the families of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from .walk import LayerVisit, Made

# (module, statistic) -> array; see pruners/signals/block_statistics.py for the names.
LayerStatistics = Mapping[tuple[str, str], Tensor]

CODES = "codes:"
"""Prefix of tensors that go to a file of their own beside the weights (quantised codes)."""


class Compressor(Protocol):
    """One family of methods, set up for one model and plan.

    Attributes
    ----------
    wanted
        Names of the statistics that it needs of a layer's inputs.
    """

    wanted: frozenset[str]

    def __call__(
        self, visit: LayerVisit, statistics: LayerStatistics, plan: Sequence[Mapping[str, Any]]
    ) -> Made:
        """Change `visit.block` in place and say what was done.

        Parameters
        ----------
        statistics
            Of the inputs that the layer gets.
        plan
            The rows of `tables.PLAN` about this layer.

        Returns the tensors of the block by their names inside it (all of them, so that the block
        can be written; codes of quantised weights under `CODES` + name), and rows of
        `tables.COMPRESSED` without `id` and `layer`. A layer that is removed sets
        `visit.dropped` and returns no tensors.
        """
        ...

    def config(self) -> Mapping[str, Any]:
        """Keys of config.json that change, known after the last layer."""
        ...


def block_tensors(visit: LayerVisit) -> dict[str, Tensor]:
    """All tensors of a layer's block, by their names inside it."""
    return {name: param.detach() for name, param in visit.block.named_parameters()}
