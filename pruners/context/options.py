"""What a caller may ask of a pruned context, checked in one place."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, cast

from ...errors import InputError
from .provence import Aggregation, OnEmpty, Provence


class Searcher(Protocol):
    """Anything that finds something in a text, as a compiled expression of another engine does."""

    def search(self, text: str, /) -> object:
        """What was found, or something false."""


Pattern = str | re.Pattern[str] | Searcher


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """Options of `ContextPruner.prune`; `threshold` and `aggregation` None are the checkpoint's.

    Raises InputError naming the option that is out of range.
    """

    threshold: float | None = None
    aggregation: Aggregation | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    min_sentences: int = 0
    keep_title: bool = True
    protect: tuple[Pattern, ...] = ()
    on_empty: OnEmpty = "empty"

    def __post_init__(self) -> None:
        if isinstance(self.protect, str | re.Pattern) or not isinstance(self.protect, Iterable):
            raise InputError(
                "`protect` must be a list of regular expressions; found"
                f" {type(self.protect).__name__}. Put a single one in a list."
            )
        object.__setattr__(self, "protect", tuple(self.protect))
        for name, low in (("top_k", 1), ("max_tokens", 0), ("min_sentences", 0)):
            _check_whole(name, getattr(self, name), low)
        self.patterns()
        self.method(0.5, "mean")

    def method(self, threshold: float, aggregation: Aggregation) -> Provence:
        """The decision, with a checkpoint's defaults where nothing was asked for."""
        given = self.threshold
        if given is not None and (isinstance(given, bool) or not isinstance(given, int | float)):
            raise InputError(f"`threshold` must be a number; found {type(given).__name__}.")
        return Provence(
            threshold=threshold if given is None else given,
            aggregation=aggregation if self.aggregation is None else self.aggregation,
            keep_title=self.keep_title,
            min_sentences=self.min_sentences,
            on_empty=self.on_empty,
        )

    def patterns(self) -> list[re.Pattern[str] | Searcher]:
        """What `protect` searches with: compiled patterns, and searchers as they were given."""
        return [_compiled(number, pattern) for number, pattern in enumerate(self.protect)]


def _check_whole(name: str, value: int | None, low: int) -> None:
    if value is None and name != "min_sentences":
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(f"`{name}` must be a whole number of at least {low}; found {value!r}.")


def _compiled(number: int, pattern: Pattern) -> re.Pattern[str] | Searcher:
    if isinstance(pattern, re.Pattern):
        if isinstance(pattern.pattern, str):
            return pattern
    elif callable(getattr(pattern, "search", None)):
        return cast(Searcher, pattern)
    if not isinstance(pattern, str):
        raise InputError(
            f"`protect[{number}]` must be a regular expression over text; found"
            f" {type(pattern).__name__}."
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"`protect[{number}]` is no regular expression: {error}.") from error
