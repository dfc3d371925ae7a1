"""Opening a Hugging Face language model of any kind as a black box."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import InputError
from ..models.language import DType, kept_language
from .black_box import BlackBox, Template
from .causal_labels import CausalLabels
from .label_words import LabelTokens
from .masked_labels import MaskedLabels
from .seq2seq_labels import Seq2SeqLabels

_BOXES: dict[str, type[CausalLabels | MaskedLabels | Seq2SeqLabels]] = {
    "causal": CausalLabels,
    "masked": MaskedLabels,
    "seq2seq": Seq2SeqLabels,
}


def open_labels(
    head: str,
    name: str,
    labels: Sequence[str],
    template: Template,
    *,
    device: str | None = None,
    dtype: DType = "float32",
    batch_tokens: int = 16_384,
    label_tokens: LabelTokens = "all",
) -> BlackBox:
    """A language model as a black box; the model is read once a process.

    Parameters
    ----------
    head
        causal, masked or seq2seq.
    name
        A folder or a hub id; see `resolve_language`.
    labels
        Words for the C classes.
    template, batch_tokens, label_tokens
        See `CausalLabels`, `MaskedLabels`, `Seq2SeqLabels`.
    device
        None is the GPU where there is one.

    Raises
    ------
    ModelError
        The model cannot be found or read, or is of another kind.
    RecipeError
        The template or a word does not fit it.
    """
    if head not in _BOXES:
        raise InputError(f"`head` is one of {', '.join(_BOXES)}; found {head!r}.")
    loaded = kept_language(name, head, device, dtype)
    return _BOXES[head](
        loaded.model,
        loaded.tokenizer,
        labels,
        template=template,
        batch_tokens=batch_tokens,
        label_tokens=label_tokens,
    )
