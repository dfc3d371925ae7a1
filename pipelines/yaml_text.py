"""YAML of strangers as plain values: read in bounded time and memory, or refused.

PyYAML's safe loader makes no objects of other types, but it follows anchors and nests without end:
a few hundred bytes of aliases of aliases unfold to any size. So the text's events are counted
first, with every alias at the size of what it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from ..errors import RecipeError

MOST_CHARACTERS = 2**20
"""Of the text, and of the values of what it unfolds to."""
MOST_VALUES = 10_000
"""Values, keys and collections of what it unfolds to; PyYAML reads some thousands a second."""
MOST_LEVELS = 64
"""Collections within each other; a recipe has three or four."""


def load_yaml(text: str, origin: str, *, look: Callable[[yaml.Node], None] = lambda _: None) -> Any:
    """The plain value of a YAML text.

    Parameters
    ----------
    origin
        Where the text is from, for messages.
    look
        Called with the root node, which knows line numbers, before merge keys (`<<`) change it.

    Raises
    ------
    RecipeError
        Not YAML, longer or deeper than allowed, or with tags of objects.
    """
    if len(text) > MOST_CHARACTERS:
        raise RecipeError(
            f"{origin} has {len(text)} characters; {MOST_CHARACTERS} are allowed. Put rows into a"
            " file of their own and name its path."
        )
    try:
        _Unfolded(origin).check(text)
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            look(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin} is not valid YAML: {error}") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        # What PyYAML's constructors raise at a 32nd of May, ten thousand digits, an empty !!int.
        raise RecipeError(f"{origin} holds a value that cannot be read: {error!r:.200}") from error


class _Size(NamedTuple):
    values: int = 0
    characters: int = 0

    def more(self, by: _Size, sign: int = 1) -> _Size:
        return _Size(self.values + sign * by.values, self.characters + sign * by.characters)


@dataclass(slots=True)
class _Open:
    """A collection whose end has not come yet."""

    anchor: str | None
    before: _Size
    levels: int = 0


class _Unfolded:
    """How long and how deep a text is once its aliases are written out."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._size = _Size()
        self._stack: list[_Open] = []
        self._known: dict[str, tuple[_Size, int]] = {}  # size and levels by anchor

    def check(self, text: str) -> None:
        """Raises RecipeError past a bound, yaml.YAMLError where there is no YAML."""
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                self._stack.append(_Open(event.anchor, self._size))
                self._add(_Size(1), 0, event)
            elif isinstance(event, yaml.CollectionEndEvent):
                self._close()
            elif isinstance(event, yaml.AliasEvent):
                self._alias(event)
            elif isinstance(event, yaml.ScalarEvent):
                size = _Size(1, len(event.value))
                if event.anchor:
                    self._known[event.anchor] = size, 0
                self._add(size, 0, event)

    def _close(self) -> None:
        ended = self._stack.pop()
        levels = ended.levels + 1
        if ended.anchor:
            self._known[ended.anchor] = self._size.more(ended.before, -1), levels
        if self._stack:
            self._stack[-1].levels = max(self._stack[-1].levels, levels)

    def _alias(self, event: yaml.AliasEvent) -> None:
        if any(one.anchor == event.anchor for one in self._stack):
            raise RecipeError(
                f"{self._at(event)}: `*{event.anchor}` stands within what it stands for."
            )
        # An unknown one is refused later.
        size, levels = self._known.get(event.anchor or "", (_Size(), 0))
        self._add(size, levels, event)

    def _add(self, size: _Size, levels: int, event: yaml.Event) -> None:
        self._size = self._size.more(size)
        if self._size.values > MOST_VALUES or self._size.characters > MOST_CHARACTERS:
            raise RecipeError(
                f"{self._at(event)}: with its aliases written out the text has more than"
                f" {MOST_VALUES} values or {MOST_CHARACTERS} characters, the most allowed. Put rows"
                " into a file of their own and name its path."
            )
        if self._stack:
            self._stack[-1].levels = max(self._stack[-1].levels, levels)
        if len(self._stack) + levels > MOST_LEVELS:
            raise RecipeError(
                f"{self._at(event)}: more than {MOST_LEVELS} lists and mappings within each other."
            )

    def _at(self, event: yaml.Event) -> str:
        mark = event.start_mark
        return self._origin if mark is None else f"{self._origin}, line {mark.line + 1}"
