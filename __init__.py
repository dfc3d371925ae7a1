"""Prune what a model reads, and then the model itself.

Importing this package imports neither torch nor Prefect: the public names below are
loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .api.client import AsyncClient, Client
    from .pipelines.dynamics import DynamicsRecorder
    from .pipelines.infobatch_sampler import InfoBatchSampler
    from .pipelines.online_selection import OnlineSelection
    from .pipelines.prompts.space import PromptSpace
    from .pipelines.pruning_trainer import PruningTrainer, PruningTrainerMixin
    from .pruners.catalogue import METHODS
    from .pruners.context import ContextPruner, PrunedPassage
    from .storage import Store, VectorIndex

__all__ = [
    "METHODS",
    "AsyncClient",
    "Client",
    "ContextPruner",
    "DynamicsRecorder",
    "InfoBatchSampler",
    "OnlineSelection",
    "PromptSpace",
    "PrunedPassage",
    "PruningTrainer",
    "PruningTrainerMixin",
    "Store",
    "VectorIndex",
    "__version__",
]

_HOME = {
    "METHODS": ".pruners.catalogue",
    "AsyncClient": ".api.client",
    "Client": ".api.client",
    "ContextPruner": ".pruners.context",
    "DynamicsRecorder": ".pipelines.dynamics",
    "InfoBatchSampler": ".pipelines.infobatch_sampler",
    "OnlineSelection": ".pipelines.online_selection",
    "PromptSpace": ".pipelines.prompts.space",
    "PrunedPassage": ".pruners.context",
    "PruningTrainer": ".pipelines.pruning_trainer",
    "PruningTrainerMixin": ".pipelines.pruning_trainer",
    "Store": ".storage",
    "VectorIndex": ".storage",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
