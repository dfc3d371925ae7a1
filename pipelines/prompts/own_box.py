"""A user's own black box, checked: its answers before they are used, its tokens where it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ...errors import InputError, ModelError
from ...pruners.contract import FloatArray, IntArray
from .asking import Limits
from .words import Shots

_NORMALISED = 1e-3  # how far from 1 probabilities may sum to; float16 is good for that


@runtime_checkable
class LabelLogprobs(Protocol):
    """The least that a black box is; see `pruners.signals.black_box.BlackBox` for all of it."""

    def label_logprobs(self, prompts: Sequence[str], rows: Sequence[str]) -> npt.ArrayLike:
        """Log probabilities (P, N, C) in nats, normalised over the C classes."""
        ...


@dataclass(frozen=True, slots=True)
class OwnBox:
    """Any `LabelLogprobs` as a `BlackBox`.

    Attributes
    ----------
    classes
        C: the box's own `classes`, else the highest label and one more.
    counts
        Whether the box has `input_tokens`.
    """

    box: Any
    classes: int
    counts: bool

    @classmethod
    def of(cls, box: Any, rows: Shots) -> OwnBox:
        """Wrap a box, and hold the labels against its classes.

        Raises
        ------
        InputError
            There is no `label_logprobs`, fewer than 2 classes, or a label beyond them.
        """
        if isinstance(box, OwnBox):
            return box
        if not isinstance(box, LabelLogprobs):
            raise InputError(
                f"expected a black box with `label_logprobs(prompts, rows)`, found"
                f" {type(box).__name__}. Write that method, or use `PromptSpace.from_model`."
            )
        highest = int(rows.labels.max())
        classes = int(getattr(box, "classes", highest + 1))
        if classes < 2 or highest >= classes:
            raise InputError(
                f"expected labels from 0 to {classes - 1} of at least 2 classes, found a highest"
                f" label of {highest}. Give the box `classes`, or codes from 0."
            )
        return cls(box, classes, hasattr(box, "input_tokens"))

    def label_logprobs(self, prompts: Sequence[str], rows: Sequence[str]) -> FloatArray:
        """Log probabilities (P, N, C) float32.

        Raises
        ------
        ModelError
            The box answers in another shape, or with numbers that are no log probabilities.
        """
        made = np.asarray(self.box.label_logprobs(list(prompts), list(rows)), np.float32)
        wanted = (len(prompts), len(rows), self.classes)
        if made.shape != wanted:
            raise ModelError(
                f"`label_logprobs` gave shape {made.shape}; (prompts, rows, classes) = {wanted}"
                " was expected. Give the box `classes` where labels do not show all of them."
            )
        off = np.abs(np.exp(made.astype(np.float64)).sum(axis=2) - 1)
        if made.size and not (off <= _NORMALISED).all():
            p, n = np.argwhere(~(off <= _NORMALISED))[0]
            raise ModelError(
                "`label_logprobs` gives log probabilities that sum to 1 over the classes; for"
                f" prompt {prompts[p]!r} on row {rows[n][:80]!r} it gave {made[p, n].tolist()}."
                " Take the log-softmax over the classes."
            )
        return made

    def input_tokens(self, prompts: Sequence[str], rows: Sequence[str]) -> IntArray:
        """Tokens (P, N) int64; 0 where the box does not count."""
        if not self.counts:
            return np.zeros((len(prompts), len(rows)), np.int64)
        return np.asarray(self.box.input_tokens(list(prompts), list(rows)), np.int64)

    def refuse(self, limits: Limits) -> None:
        """Refuse a limit that nobody would hold; raises InputError."""
        if limits.tokens is not None or limits.cost is not None:
            raise InputError(
                "tokens and money are limited, and the black box has no `input_tokens(prompts,"
                " rows)`. Write it, or limit queries alone."
            )
