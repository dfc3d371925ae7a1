"""Classification by a sequence-to-sequence model: which class's word answers the prompted text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...errors import ModelError
from ..contract import FloatArray
from .black_box import Template
from .label_words import (
    LabelTokens,
    TokenLabels,
    batches,
    beginnings,
    check_batch,
    check_window,
    chosen_tokens,
    class_logprobs,
    padded,
    refuse_ids,
    window_of,
    words_alone,
)
from .rendered import Ids, Renderer

_LOGITS = 2**26  # numbers of one block of logits, at most


class Seq2SeqLabels(TokenLabels):
    """An encoder with a decoder (T5, BART) as a black box; see `black_box.BlackBox`.

    The encoder reads the rendered text once. The score of a class is the log probability that
    the decoder begins its answer with the class's word: of the word's first token, as published
    (ClaPS, arXiv 2310.12774: the first step of the decoder), or of all its tokens given those
    before, the sum. Then log softmax over the classes. The answer begins as generation would:
    with `decoder_start_token_id` and, where the model is generated from with one (BART),
    `forced_bos_token_id`. No end of the answer is scored.

    Parameters
    ----------
    model, tokenizer
        Of transformers; a fast tokenizer. The model is used as it is.
    labels
        Words for the C classes, C at least 2.
    template
        With `{text}` and `{prompt}`.
    batch_tokens
        Tokens of one run of the encoder, about.
    label_tokens
        `all` or `first`.

    Raises
    ------
    RecipeError
        The template or a word does not fit.
    ModelError
        The model names no token that an answer starts with.
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
        template.check(needs=["text", "prompt"], allows=[])
        self._model = model
        self._texts = Renderer(tokenizer, template)
        alone = words_alone(tokenizer, labels)
        self._words = chosen_tokens(alone, labels, label_tokens, tokenizer)
        refuse_ids(model, self._words)
        self._start = _start(model)
        begun = beginnings(self._words)
        # What the decoder reads: the longest beginnings, which hold the others.
        longest = [
            ids
            for ids in begun
            if not any(ids == more[: len(ids)] for more in begun if more != ids)
        ]
        self._paths: list[Ids] = longest or [()]
        pad = tokenizer.pad_token_id
        self._pad = 0 if pad is None else int(pad)
        self._most = check_batch(batch_tokens)
        self._window = window_of(model, tokenizer)

    def label_logprobs(self, prompts: Sequence[str], rows: Sequence[str]) -> FloatArray:
        """Log probabilities (P, N, C) float32; see `BlackBox`."""
        found = self._texts(prompts, rows)
        lengths = check_window(found, 0, self._window, rows)
        p, n = lengths.shape
        made = np.zeros((p * n, self.classes), np.float32)
        for some in batches(lengths.reshape(-1), self._most):
            places = [divmod(int(place), n) for place in some]
            sequences = [
                found.ids(b, a) if found.text_first else found.ids(a, b) for a, b in places
            ]
            with torch.no_grad():
                made[some] = self._scores(sequences)
        return made.reshape(p, n, self.classes)

    def _scores(self, sequences: Sequence[Ids]) -> FloatArray:
        """Log probabilities (S, C)."""
        device = self._model.get_input_embeddings().weight.device
        ids, lengths = padded(sequences, self._pad, device)
        mask = (torch.arange(ids.shape[1], device=device)[None] < lengths[:, None]).long()
        states = self._model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        answers, _ = padded([(*self._start, *path) for path in self._paths], self._pad, device)
        size = self._model.config.get_text_config(decoder=True).vocab_size
        each = max(1, _LOGITS // (answers.numel() * size))
        parts = [
            self._decoded(states[at : at + each], mask[at : at + each], answers)
            for at in range(0, len(states), each)
        ]
        return class_logprobs(torch.cat(parts))

    def _decoded(
        self, states: torch.Tensor, mask: torch.Tensor, answers: torch.Tensor
    ) -> torch.Tensor:
        """Scores (S, C) of the words, before they are set against each other."""
        paths = len(answers)
        made = self._model(
            encoder_outputs=(states.repeat_interleave(paths, 0),),
            attention_mask=mask.repeat_interleave(paths, 0),
            decoder_input_ids=answers.repeat(len(states), 1),
            use_cache=False,
        ).logits
        logits = made.unflatten(0, (len(states), paths)).float()  # (S, paths, steps, V)
        normal = logits.logsumexp(-1)
        first = len(self._start) - 1
        scores: torch.Tensor = logits.new_zeros(len(states), self.classes)
        for number, ids in enumerate(self._words):
            held = (path[: len(ids) - 1] == ids[:-1] for path in self._paths)
            path = next(place for place, found in enumerate(held) if found)
            for step, token in enumerate(ids):
                at = first + step
                scores[:, number] += logits[:, path, at, token] - normal[:, path, at]
        return scores


def _start(model: Any) -> Ids:
    """Ids that an answer begins with."""
    given = [getattr(model, "generation_config", None), model.config]
    named: list[int] = []
    for name in ("decoder_start_token_id", "forced_bos_token_id"):
        values = [getattr(config, name, None) for config in given]
        named += [int(value) for value in values if value is not None][:1]
        if not named:
            raise ModelError(
                f"{type(model).__name__}: expected `decoder_start_token_id` in its configuration,"
                " which an answer starts with; found none. Add it to config.json."
            )
    return tuple(named)
