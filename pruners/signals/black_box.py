"""What every model that classifies with a prompt looks like from outside, and prompt templates.

A black box answers one question: how likely is each class for a row under a prompt? Nothing else
of the model is looked at, so a causal, masked or sequence-to-sequence network, a sentence encoder
and a paid endpoint are searched by the same code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from ...errors import RecipeError
from ..contract import FloatArray, IntArray

SLOTS = ("prompt", "text", "label", "mask")
_SLOT = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@runtime_checkable
class BlackBox(Protocol):
    """A model that gives the log probability of each class for a row under a prompt.

    A prompt is a string; "" means no prompt at all. A row is the text to classify. The answer
    for a (prompt, row) does not depend on the others asked with it, up to the rounding of batches.
    """

    @property
    def classes(self) -> int:
        """C, the number of classes."""
        ...

    def label_logprobs(self, prompts: Sequence[str], rows: Sequence[str]) -> FloatArray:
        """Log probabilities (P, N, C) float32 in nats, each row of C normalised over the classes.

        Raises
        ------
        ModelError
            The model gives numbers that are not finite.
        InputError
            An input is longer than the model reads.
        """
        ...

    def input_tokens(self, prompts: Sequence[str], rows: Sequence[str]) -> IntArray:
        """Tokens that each (prompt, row) is read as, (P, N) int64.

        Exact for a model on this machine (tokens of the labels and of shared prefixes count as
        if each input were read alone), an upper bound for one behind an endpoint.
        """
        ...


@dataclass(frozen=True)
class Template:
    """A text with slots in braces: `{prompt}`, `{text}`, `{label}`, `{mask}`; `{{` is a brace.

    The empty prompt leaves no trace: the slot goes together with one space, that after it or
    else that before it. What fills a slot is put in as it is, braces and all.

    Raises
    ------
    RecipeError
        A slot is unknown or stands twice, or a brace is alone.
    """

    source: str

    def __post_init__(self) -> None:
        slots = self.slots
        for slot in slots:
            if slot not in SLOTS:
                raise RecipeError(
                    f"template {self.source!r}: unknown slot {{{slot}}}; known:"
                    f" {', '.join(SLOTS)}. Write {{{{ and }}}} for braces."
                )
            if slots.count(slot) > 1:
                raise RecipeError(
                    f"template {self.source!r}: {{{slot}}} stands twice; once will do."
                )

    @cached_property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """(literal, slot) pairs in order; the last one's slot is ""."""
        made: list[tuple[str, str]] = []
        literal, at = "", 0
        for found in _SLOT.finditer(self.source):
            literal += self.source[at : found.start()]
            at = found.end()
            if found.group() in ("{{", "}}"):
                literal += found.group()[0]
            elif found.group(1) is None:
                raise RecipeError(
                    f"template {self.source!r}: a {found.group()!r} without its partner at"
                    f" character {found.start()}. Write {{{{ and }}}} for braces."
                )
            elif not found.group(1):
                raise RecipeError(
                    f"template {self.source!r}: an unknown slot {{}} without a name; known:"
                    f" {', '.join(SLOTS)}. Write {{{{ and }}}} for braces."
                )
            else:
                made.append((literal, found.group(1)))
                literal = ""
        made.append((literal + self.source[at:], ""))
        return tuple(made)

    @property
    def slots(self) -> list[str]:
        """Names of the slots in order."""
        return [slot for _, slot in self.parts if slot]

    def has(self, slot: str) -> bool:
        """Whether the template has that slot."""
        return slot in self.slots

    def render(self, **values: str) -> str:
        """The text with every slot filled; a slot without a value is left empty."""
        made = ""
        empty = False  # the slot before was {prompt}, left empty, after a space of the template
        spaced = False
        for literal, slot in self.parts:
            if empty:
                if literal.startswith(" "):
                    literal = literal[1:]
                elif spaced:
                    made = made[:-1]
            made += literal
            empty = slot == "prompt" and not values.get(slot)
            spaced = literal.endswith(" ")
            made += values.get(slot, "") if slot else ""
        return made

    def check(self, *, needs: Sequence[str], allows: Sequence[str]) -> None:
        """Refuse a template without a slot that it needs, or with one that has no place in it."""
        slots = self.slots
        for slot in needs:
            if slot not in slots:
                raise RecipeError(f"template {self.source!r} needs the slot {{{slot}}}. Add it.")
        for slot in slots:
            if slot not in (*needs, *allows):
                raise RecipeError(
                    f"template {self.source!r}: {{{slot}}} has no place here; allowed:"
                    f" {', '.join([*needs, *allows])}."
                )
