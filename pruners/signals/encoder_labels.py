"""Zero-shot classification by sentence embeddings: the class whose description lies nearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...errors import InputError, ModelError
from ..contract import FloatArray, IntArray
from .black_box import Template

Encode = Callable[[list[str]], FloatArray]
CountTokens = Callable[[list[str]], IntArray]

#: What sentence-transformers' contrastive loss divides cosines by (its `scale` of 20).
TEMPERATURE = 0.05


class EncoderLabels:
    """A sentence encoder as a black box: log softmax over classes of cosine / temperature.

    The cosine is between the row (`template`, with `{text}`) and the description of the class
    (`label_template`, with `{label}`). The prompt stands in either, or in both; what it does not
    stand in is encoded once and kept, so with the prompt in the labels' template alone a prompt
    costs C short texts however many rows there are. A text beyond the encoder's window is cut by
    the encoder, as wherever it embeds; networks that read the prompt refuse such a row instead.

    Parameters
    ----------
    encode
        Texts to unit vectors (N, d) float32.
    count
        Texts to their numbers of tokens (N,) int64.
    labels
        Words for the C classes, C at least 2.

    Raises
    ------
    RecipeError
        A template lacks its slot, or neither has `{prompt}`.
    """

    def __init__(
        self,
        encode: Encode,
        count: CountTokens,
        labels: Sequence[str],
        *,
        template: Template,
        label_template: Template,
        temperature: float = TEMPERATURE,
    ) -> None:
        template.check(needs=["text"], allows=["prompt"])
        label_template.check(needs=["label"], allows=["prompt"])
        if not (template.has("prompt") or label_template.has("prompt")):
            raise InputError(
                f"templates {template.source!r} and {label_template.source!r}: one of them needs"
                " {prompt}, else no prompt changes anything."
            )
        if len(labels) < 2:
            raise InputError(f"expected words for at least 2 classes, found {list(labels)}.")
        if not 0 < temperature < float("inf"):
            raise InputError(f"`temperature` is above 0; found {temperature}.")
        self._encode = encode
        self._count = count
        self._labels = list(labels)
        self._template = template
        self._label_template = label_template
        self._temperature = temperature
        self._kept: dict[str, FloatArray] = {}  # vectors of texts without a prompt in them

    @property
    def classes(self) -> int:
        """C, the number of classes."""
        return len(self._labels)

    def label_logprobs(self, prompts: Sequence[str], rows: Sequence[str]) -> FloatArray:
        """Log probabilities (P, N, C) float32; see `BlackBox`."""
        p, n, c = len(prompts), len(rows), self.classes
        if not p or not n:
            return np.zeros((p, n, c), np.float32)
        texts = self._vectors(self._template, "text", prompts, rows)
        labels = self._vectors(self._label_template, "label", prompts, self._labels)
        cosine = np.matmul(texts, labels.transpose(0, 2, 1))  # (P or 1, N, C)
        logits = np.broadcast_to(cosine, (p, n, c)).astype(np.float64) / self._temperature
        if not np.isfinite(logits).all():
            raise ModelError("the encoder gives vectors that are not finite; use another model.")
        logits -= logits.max(axis=2, keepdims=True)
        return np.asarray(logits - np.log(np.exp(logits).sum(axis=2, keepdims=True)), np.float32)

    def input_tokens(self, prompts: Sequence[str], rows: Sequence[str]) -> IntArray:
        """Tokens (P, N) int64: of the row, and of the C descriptions where the prompt is in them.

        Descriptions are read once a prompt, whatever the rows: they count for its first row.
        """
        made = np.zeros((len(prompts), len(rows)), np.int64)
        if not made.size:
            return made
        if self._template.has("prompt"):
            rendered = [self._template.render(prompt=p, text=r) for p in prompts for r in rows]
            made += self._count(rendered).reshape(made.shape)
        if self._label_template.has("prompt"):
            described = [
                self._label_template.render(prompt=p, label=w)
                for p in prompts
                for w in self._labels
            ]
            made[:, 0] += self._count(described).reshape(len(prompts), -1).sum(axis=1)
        return made

    def _vectors(
        self, template: Template, slot: str, prompts: Sequence[str], values: Sequence[str]
    ) -> FloatArray:
        """(P, M, d), or (1, M, d) where the template has no prompt."""
        if template.has("prompt"):
            filled = [template.render(prompt=p, **{slot: v}) for p in prompts for v in values]
            return self._encode(filled).reshape(len(prompts), len(values), -1)
        filled = [template.render(**{slot: v}) for v in values]
        new = [text for text in dict.fromkeys(filled) if text not in self._kept]
        if new:
            self._kept |= dict(zip(new, self._encode(new), strict=True))
        return np.stack([self._kept[text] for text in filled])[None]
