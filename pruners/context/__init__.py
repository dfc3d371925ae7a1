"""Pruning of retrieved contexts: the sentences and passages a model reads."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .options import PruneOptions
    from .pruner import ContextPruner
    from .result import PrunedPassage, PrunedSentence, rethreshold
    from .sentences import split_sentences

__all__ = [
    "ContextPruner",
    "PruneOptions",
    "PrunedPassage",
    "PrunedSentence",
    "rethreshold",
    "split_sentences",
]

# Loaded when first used: the methods are imported by the catalogue, which stays light.
_HOME = {
    "ContextPruner": ".pruner",
    "PruneOptions": ".options",
    "PrunedPassage": ".result",
    "PrunedSentence": ".result",
    "rethreshold": ".result",
    "split_sentences": ".sentences",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
