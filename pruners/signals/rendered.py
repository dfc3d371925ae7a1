"""Token ids of a template filled with every prompt and every row, each side tokenised once.

The ids of (prompt, row) are exactly those of the whole rendered string. Where a single space
stands between what comes first and what comes second, no piece of the vocabulary reaches over it,
and then the ids are those of the left side followed by those of the right: P + N short strings
instead of P x N long ones. What does not have such a border is tokenised whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import InputError
from ..contract import IntArray
from .black_box import Template

Ids = tuple[int, ...]

# A piece that holds a space (as SentencePiece and byte-level BPE write it) behind something else.
_OVER_A_SPACE = re.compile(r"[^▁Ġ ][▁Ġ ]")
_KEPT = 100_000  # sides that are remembered, at most


@dataclass(frozen=True)
class Rendered:
    """Ids of P prompts x N rows.

    Attributes
    ----------
    text_first
        Whether the row stands before the prompt: then `left` are rows, else prompts.
    left, right
        Ids of each side with the special tokens around; None where its strings are in `whole`.
    whole
        (left place, right place) to ids, of every pair with a side that is None.
    """

    text_first: bool
    left: list[Ids | None]
    right: list[Ids | None]
    whole: dict[tuple[int, int], Ids]

    def ids(self, left: int, right: int) -> Ids:
        """Ids of a pair."""
        head, tail = self.left[left], self.right[right]
        if head is None or tail is None:
            return self.whole[left, right]
        return head + tail

    def lengths(self) -> IntArray:
        """Number of ids of each pair (L, R) int64."""
        sides = [
            np.array([0 if ids is None else len(ids) for ids in side], np.int64)
            for side in (self.left, self.right)
        ]
        made = sides[0][:, None] + sides[1][None]
        for place, ids in self.whole.items():
            made[place] = len(ids)
        return made

    def by_prompt(self, values: Any) -> Any:
        """(L, R, ...) as (P, N, ...)."""
        return values.swapaxes(0, 1) if self.text_first else values


class Renderer:
    """A template and a tokenizer.

    Parameters
    ----------
    tokenizer
        A fast tokenizer of transformers.
    template
        With `{text}` and `{prompt}`.
    values
        What other slots are filled with.
    ends
        Keep the special tokens that the tokenizer sets behind a text. A causal model goes on
        with the text, so for it they are left off.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        values: dict[str, str] | None = None,
        *,
        ends: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._values = values or {}
        self._head, self._tail = _marks(tokenizer)
        self.tail = 0 if ends else self._tail  # special tokens that are left off
        self._joins = _reaches_over_spaces(tokenizer)
        self._before, self._first, self._between, self._after = self._pieces()
        self._border = _border(self._between)
        self._kept: tuple[dict[str, Ids | None], dict[str, Ids | None]] = ({}, {})
        self._last: tuple[tuple[tuple[str, ...], tuple[str, ...]], Rendered] | None = None

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of whole texts with their special tokens."""
        if not texts:
            return []
        made = self._tokenizer(
            list(texts),
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return [tuple(ids[: len(ids) - self.tail]) for ids in made]

    def render(self, prompt: str, text: str) -> str:
        """The whole string."""
        return self._template.render(prompt=prompt, text=text, **self._values)

    def __call__(self, prompts: Sequence[str], rows: Sequence[str]) -> Rendered:
        """Ids of every (prompt, row); the answer to the last question is kept."""
        asked = (tuple(prompts), tuple(rows))
        if self._last is not None and self._last[0] == asked:
            return self._last[1]
        text_first = self._first == "text"
        sides = (rows, prompts) if text_first else (prompts, rows)
        left = self._side(0, sides[0])
        right = self._side(1, sides[1])
        open_ = [
            (a, b)
            for a in range(len(left))
            for b in range(len(right))
            if left[a] is None or right[b] is None
        ]
        strings = [
            self.render(prompts[b], rows[a]) if text_first else self.render(prompts[a], rows[b])
            for a, b in open_
        ]
        whole = dict(zip(open_, self.encode(strings), strict=True))
        made = Rendered(text_first, left, right, whole)
        self._last = (asked, made)
        return made

    # -- the two sides ---------------------------------------------------------------------------

    def _pieces(self) -> tuple[str, str, str, str]:
        """What stands before the first of text and prompt, which that is, between, and after."""
        literals, slots, text = [], [], ""
        for literal, slot in self._template.parts:
            text += literal
            if slot in ("text", "prompt"):
                literals.append(text)
                slots.append(slot)
                text = ""
            elif slot:
                text += self._values.get(slot, "")
        if len(slots) != 2:
            raise InputError(
                f"template {self._template.source!r}: expected {{text}} and {{prompt}}; found"
                f" {', '.join(slots) or 'neither'}."
            )
        return literals[0], slots[0], literals[1], text

    def _strings(self, side: int, value: str) -> str | None:
        """One side's part of the rendered string; None where it depends on the other side."""
        if self._border is None or self._joins:
            return None
        head, tail = self._between[: self._border], self._between[self._border :]
        if (side == 0) == (self._first == "text"):  # a row: what fills its slot changes no space
            made = self._before + value + head if side == 0 else tail + value + self._after
        elif side == 1:
            start = f"{self._before}x{head}"
            whole = self.render(value, "x")
            if not whole.startswith(start):
                return None
            made = whole[len(start) :]
        else:
            end = f"{tail}x{self._after}"
            whole = self.render(value, "x")
            if not whole.endswith(end):
                return None
            made = whole[: len(whole) - len(end)]
        if side == 0:
            return made if made and not _blank(made[-1]) else None
        open_ = made[:1] == " " and len(made) > 1 and not _blank(made[1])
        return made if open_ or not made else None

    def _side(self, side: int, values: Sequence[str]) -> list[Ids | None]:
        """Ids of one side of each value."""
        kept = self._kept[side]
        if len(kept) + len(values) > _KEPT:
            kept.clear()
        new = [value for value in dict.fromkeys(values) if value not in kept]
        strings = [(value, self._strings(side, value)) for value in new]
        kept.update(dict.fromkeys(new))
        found = [(value, part) for value, part in strings if part is not None]
        if found:
            parts = [part for _, part in found]
            tokens = self._left_ids(parts) if side == 0 else self._right_ids(parts)
            kept.update(zip([value for value, _ in found], tokens, strict=True))
        return [kept[value] for value in values]

    def _left_ids(self, parts: list[str]) -> list[Ids | None]:
        """Ids of the left sides, special tokens before them included.

        Each is held against a plain word behind it: special tokens that a text holds may change
        what follows them. Then the side counts as one without a border.
        """
        (tail,) = self._right_ids([" x"])
        made: list[Ids | None] = []
        for ids, more in zip(
            self.encode(parts), self.encode([part + " x" for part in parts]), strict=True
        ):
            head = ids[: len(ids) - self._cut]
            made.append(head if tail is not None and head + tail == more else None)
        return made

    def _right_ids(self, parts: list[str]) -> list[Ids | None]:
        """Ids of the right sides, behind a plain word, special tokens behind them included."""
        start = self.encode(["x"])[0]
        start = start[: len(start) - self._cut]
        return [
            ids[len(start) :] if ids[: len(start)] == start else None
            for ids in self.encode(["x" + part for part in parts])
        ]

    @property
    def _cut(self) -> int:
        """Special tokens behind a text that `encode` leaves there."""
        return self._tail - self.tail


def _blank(letter: str) -> bool:
    """White space, or the mark that SentencePiece writes for it."""
    return letter.isspace() or letter == "▁"


def _border(between: str) -> int | None:
    """Place of the last single space between the slots; None where there is none."""
    for place in range(len(between) - 1, -1, -1):
        near = between[max(0, place - 1) : place] + between[place + 1 : place + 2]
        if between[place] == " " and not any(map(_blank, near)):
            return place
    return None


def _marks(tokenizer: Any) -> tuple[int, int]:
    """Special tokens that a tokenizer sets before and behind a text."""
    plain = tokenizer("x", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("x", verbose=False)["input_ids"]
    for head in range(len(whole) - len(plain) + 1):
        if whole[head : head + len(plain)] == plain:
            return head, len(whole) - len(plain) - head
    raise InputError(
        f"tokenizer {tokenizer.name_or_path!r}: expected special tokens around a text, not in it."
    )


def _reaches_over_spaces(tokenizer: Any) -> bool:
    """Whether a piece of the vocabulary holds a space behind another letter."""
    added = set(tokenizer.get_added_vocab())
    return any(_OVER_A_SPACE.search(piece) for piece in tokenizer.get_vocab() if piece not in added)
