"""Classification by a masked language model: which class's word fills the gap in the template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ...errors import InputError, ModelError
from ..contract import FloatArray, IntArray
from .black_box import Template
from .label_words import (
    LabelTokens,
    TokenLabels,
    batches,
    check_batch,
    check_window,
    chosen_tokens,
    class_logprobs,
    padded,
    refuse_ids,
    window_of,
    words_inside,
)
from .rendered import Ids, Renderer


class MaskedLabels(TokenLabels):
    """A masked model as a black box; see `black_box.BlackBox`.

    The score of a class is the log probability of its word at the mask. A word of k tokens is
    scored with k masks, the sum of each token's log probability at its own: the tokens of a word
    count as independent given the text (as PET does at first, Schick and Schütze 2021,
    arXiv 2001.07676, without its max-first decoding). Then log softmax over the classes. An
    input is run once for each number of masks that a word needs; the output layer runs at the
    masks alone.

    Parameters
    ----------
    model, tokenizer
        Of transformers; a fast tokenizer with a mask token. The model is used as it is.
    labels
        Words for the C classes, C at least 2.
    template
        With `{text}`, `{prompt}` and `{mask}`.
    batch_tokens
        Tokens of one run, about.
    label_tokens
        `all`, or `first` (as published, ClaPS, arXiv 2310.12774): then one mask.

    Raises
    ------
    RecipeError
        The template or a word does not fit.
    ModelError
        The tokenizer has no mask token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        labels: Sequence[str],
        *,
        template: Template,
        batch_tokens: int = 16_384,
        label_tokens: LabelTokens = "all",
    ) -> None:
        template.check(needs=["text", "prompt", "mask"], allows=[])
        if tokenizer.mask_token_id is None:
            raise ModelError("expected a tokenizer with a mask token; found none. See `causal`.")
        self._model = model
        self._texts = Renderer(tokenizer, template, {"mask": tokenizer.mask_token})
        inside = words_inside(tokenizer, template, labels)
        self._words = chosen_tokens(inside, labels, label_tokens, tokenizer)
        refuse_ids(model, self._words)
        self._sizes = sorted({len(ids) for ids in self._words})
        self._mask = int(tokenizer.mask_token_id)
        pad = tokenizer.pad_token_id
        self._pad = self._mask if pad is None else int(pad)
        self._most = check_batch(batch_tokens)
        self._window = window_of(model, tokenizer)

    def input_tokens(self, prompts: Sequence[str], rows: Sequence[str]) -> IntArray:
        """Tokens (P, N) int64: of the rendered text, once for each number of masks."""
        found = self._texts(prompts, rows)
        lengths: IntArray = found.by_prompt(found.lengths())
        return lengths * len(self._sizes) + sum(self._sizes) - len(self._sizes)

    def label_logprobs(self, prompts: Sequence[str], rows: Sequence[str]) -> FloatArray:
        """Log probabilities (P, N, C) float32; see `BlackBox`."""
        found = self._texts(prompts, rows)
        lengths = check_window(found, self._sizes[-1] - 1, self._window, rows)
        p, n = lengths.shape
        made = np.zeros((p * n, self.classes), np.float32)
        pairs = [(a, b) for a in range(p) for b in range(n)]
        for some in batches(lengths.reshape(-1) + self._sizes[-1] - 1, self._most):
            places = [pairs[place] for place in some]
            sequences = [
                found.ids(*(place[::-1] if found.text_first else place)) for place in places
            ]
            for ids, (_, row) in zip(sequences, places, strict=True):
                if ids.count(self._mask) != 1:
                    raise InputError(
                        f"row {row} ({rows[row][:80]!r}): expected the mask token of the template"
                        f" alone, found {ids.count(self._mask)}. Take it out of rows and prompts."
                    )
            with torch.no_grad():
                made[some] = self._scores(sequences)
        return made.reshape(p, n, self.classes)

    def _scores(self, sequences: Sequence[Ids]) -> FloatArray:
        """Log probabilities (S, C)."""
        device = self._model.get_input_embeddings().weight.device
        scores = torch.zeros(len(sequences), self.classes, device=device)
        for size in self._sizes:
            logits = self._at_masks(sequences, size)  # (S, size, V)
            classes = [number for number, ids in enumerate(self._words) if len(ids) == size]
            words = torch.tensor([self._words[number] for number in classes], device=device)
            if self._sizes == [1]:  # the normaliser is the same for all classes
                scores[:, classes] = logits[:, 0, words[:, 0]].float()
                continue
            normal = logits.float().logsumexp(-1)  # (S, size)
            steps = torch.arange(size, device=device)
            found = logits[:, steps[None], words].float()  # (S, classes, size)
            scores[:, classes] = (found - normal[:, None]).sum(-1)
        return class_logprobs(scores)

    def _at_masks(self, sequences: Sequence[Ids], size: int) -> torch.Tensor:
        """Logits (S, size, V) at the masks, the one mask of each input written `size` times."""
        device = self._model.get_input_embeddings().weight.device
        places = [ids.index(self._mask) for ids in sequences]
        wide = [
            (*ids[:at], *[self._mask] * size, *ids[at + 1 :])
            for ids, at in zip(sequences, places, strict=True)
        ]
        ids, lengths = padded(wide, self._pad, device)
        mask = torch.arange(ids.shape[1], device=device)[None] < lengths[:, None]
        at = torch.tensor(places, device=device)[:, None] + torch.arange(size, device=device)
        with _head_at(self._model, at) as cut:
            logits: torch.Tensor = self._model(input_ids=ids, attention_mask=mask.long()).logits
        if not cut or logits.shape[1] != size:
            return logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))
        return logits


@contextmanager
def _head_at(model: Any, places: torch.Tensor) -> Iterator[list[bool]]:
    """Let the layers above the base model see its states (B, k) at the places alone.

    Yields a list that is no longer empty once the states were cut.
    """
    cut: list[bool] = []

    def narrow(_: Any, __: Any, made: Any) -> Any:
        states = made.last_hidden_state
        made.last_hidden_state = states.gather(
            1, places[..., None].expand(-1, -1, states.shape[-1])
        )
        cut.append(True)
        return made

    base = model.base_model
    if base is model:
        yield cut
        return
    hook = base.register_forward_hook(narrow)
    try:
        yield cut
    finally:
        hook.remove()
