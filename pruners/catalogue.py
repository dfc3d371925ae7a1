"""Every method by name. A new one is one file, one line here and one golden case."""

from __future__ import annotations

from .contract import Pruner
from .sample.near_duplicate import NearDuplicate
from .sample.random import Random

METHODS: dict[str, type[Pruner]] = {
    # sample
    "random": Random,
    "near_duplicate": NearDuplicate,
}
