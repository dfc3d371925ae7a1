"""Classification by a causal language model: which class's word goes on with the prompted text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...kernels import token_stats
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
    words_after,
)
from .rendered import Ids, Rendered, Renderer
from .token_tree import Prefix, fits, groups, grow, read_texts, read_trees
from .tokens import Head, decoder_of, read_head

# Nodes of a tree: each run reads the texts' keys and values once more, and each node looks at all
# other nodes. So many, or as many more as a run of so many tokens takes.
_NODES, _MOST_NODES = 32, 256
_RUN = 2048
# Trees cost more a token than plain sequences do (a mask, a cache): what they must save at least.
_WORTH = 1.3


class CausalLabels(TokenLabels):
    """A causal model as a black box; see `black_box.BlackBox`.

    The score of a class is the log probability of its word after the rendered text: of its first
    token, as published (ClaPS, arXiv 2310.12774: the last position's logits), or of all its
    tokens one after the other, the sum. Then log softmax over the classes. Words are not
    normalised by their length.

    A text that several prompts follow is read once: its keys and values are kept, and the
    prompts behind it are read as a tree (see `token_tree`). The same is done for a prompt that
    several texts follow, where that saves enough. The output layer runs at the last token of
    each input and for the tokens of the words alone.

    Parameters
    ----------
    model, tokenizer
        Of transformers; a fast tokenizer. The model is used as it is: eval mode.
    labels
        Words for the C classes, C at least 2. A space stands before a word, unless the template
        ends in white space.
    template
        With `{text}` and `{prompt}`.
    batch_tokens
        Tokens of one run, about; as many are kept of texts that were read.
    label_tokens
        `all` or `first`.

    Raises
    ------
    RecipeError
        The template or a word does not fit.
    ModelError
        The model's output layer cannot be read.
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
        self._texts = Renderer(tokenizer, template, ends=False)
        after = words_after(tokenizer, template, labels, self._texts.tail)
        self._words = chosen_tokens(after, labels, label_tokens, tokenizer)
        refuse_ids(model, self._words)
        self._endings = beginnings(self._words)
        self._more = max(len(ids) for ids in self._words) - 1
        self._most = check_batch(batch_tokens)
        self._window = window_of(model, tokenizer)
        self._kept: OrderedDict[tuple[Ids, ...], Prefix] = OrderedDict()
        decoder_of(model)

    def label_logprobs(self, prompts: Sequence[str], rows: Sequence[str]) -> FloatArray:
        """Log probabilities (P, N, C) float32; see `BlackBox`."""
        found = self._texts(prompts, rows)
        check_window(found, self._more, self._window, rows)
        scores = np.zeros((len(found.left), len(found.right), self.classes), np.float32)
        if scores.size:
            with torch.no_grad():
                self._fill(scores, found)
        made: FloatArray = np.ascontiguousarray(found.by_prompt(scores))
        return made

    # -- what is read how ------------------------------------------------------------------------

    def _fill(self, scores: FloatArray, found: Rendered) -> None:
        """Scores (L, R, C) of all pairs: by trees where sides are shared, else one by one."""
        head = read_head(self._model)
        done = np.zeros(scores.shape[:2], bool)
        trees = fits(self._model) and self._unwindowed(int(found.lengths().max()) + self._more)
        if trees and scores.shape[1] > 1:
            lefts = [place for place, ids in enumerate(found.left) if ids is not None]
            rights = [place for place, ids in enumerate(found.right) if ids is not None]
            heads = [ids for ids in found.left if ids is not None]
            tails = [ids for ids in found.right if ids is not None]
            if heads and tails and self._pays(heads, tails):
                scores[np.ix_(lefts, rights)] = self._shared(head, heads, [tails])
                done[np.ix_(lefts, rights)] = True
            self._fill_uneven(scores, done, found, head)
        pairs = [(int(a), int(b)) for a, b in np.argwhere(~done)]
        if pairs:
            sequences = [found.ids(a, b) for a, b in pairs]
            scores[tuple(np.array(pairs).T)] = self._alone(head, sequences, trees)

    def _fill_uneven(
        self, scores: FloatArray, done: npt.NDArray[np.bool_], found: Rendered, head: Head
    ) -> None:
        """The left sides without a border: each shares what all its inputs begin with."""
        places, texts, tails = [], [], []
        for place in [place for place, ids in enumerate(found.left) if ids is None]:
            common, own = _common([found.ids(place, b) for b in range(scores.shape[1])])
            if common and self._pays([common], own):
                places.append(place)
                texts.append(common)
                tails.append(own)
        if places:
            scores[places] = self._shared(head, texts, tails)
            done[places] = True

    def _pays(self, texts: Sequence[Ids], tails: Sequence[Ids]) -> bool:
        """Whether reading the texts once saves enough tokens."""
        each = sum(len(ids) for ids in tails) + len(tails)
        whole = sum(len(ids) for ids in texts) * len(tails) + each * len(texts)
        return whole > _WORTH * (sum(len(ids) for ids in texts) + each * len(texts))

    def _unwindowed(self, length: int) -> bool:
        """Whether no layer would look at a part of so long a text alone."""
        config = self._model.config.get_text_config(decoder=True)
        near = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        return all(size is None or length < size for size in near)

    # -- trees -----------------------------------------------------------------------------------

    def _shared(
        self, head: Head, texts: Sequence[Ids], tails: Sequence[Sequence[Ids]]
    ) -> FloatArray:
        """Scores (L, R, C) of every text with its R continuations, or with those of all texts."""
        scores = np.zeros((len(texts), len(tails[0]), self.classes), np.float32)
        nodes = max(_NODES, min(_MOST_NODES, _RUN // len(texts)))
        parts = groups(tails[0], len(self._endings), max(2, min(nodes, self._most)))
        # [group][text or 0]
        trees = [
            [grow([own[place] for place in part], self._endings) for own in tails] for part in parts
        ]
        widest = max(len(tree.tokens) for group in trees for tree in group)
        lengths = np.array([len(ids) for ids in texts], np.int64)
        for some in batches(np.maximum(lengths, widest), self._most):
            prefix = self._prefix(tuple(texts[row][:-1] for row in some))
            roots = [texts[row][-1] for row in some]
            for part, group in zip(parts, trees, strict=True):
                here = group if len(group) == 1 else [group[row] for row in some]
                hidden = read_trees(self._model, prefix, roots, here)
                ends = torch.from_numpy(np.stack([tree.ends for tree in here])).to(hidden.device)
                rows = torch.arange(len(hidden), device=hidden.device)[:, None, None]
                scores[np.ix_(some, np.array(part))] = self._scores(head, hidden[rows, ends])
        return scores

    def _prefix(self, texts: tuple[Ids, ...]) -> Prefix:
        """The texts' keys and values, read once as long as they are asked again and again."""
        found = self._kept.pop(texts, None)
        if found is None:
            room = self._most - len(texts) * max(len(ids) for ids in texts)
            while self._kept and self._held() > room:
                self._kept.popitem(last=False)
            found = read_texts(self._model, texts, self._words[0][0])
        self._kept[texts] = found
        return found

    def _held(self) -> int:
        return sum(len(prefix.lengths) * prefix.width for prefix in self._kept.values())

    # -- one by one ------------------------------------------------------------------------------

    def _alone(self, head: Head, sequences: Sequence[Ids], trees: bool) -> FloatArray:
        """Scores (S, C) of whole inputs."""
        scores = np.zeros((len(sequences), self.classes), np.float32)
        lengths = np.array([len(ids) + self._more for ids in sequences], np.int64)
        for some in batches(lengths, self._most):
            read = [sequences[place] for place in some]
            branched = self._endings and trees
            hidden = self._branched(read) if branched else self._straight(read)
            scores[some] = self._scores(head, hidden)
        return scores

    def _branched(self, sequences: Sequence[Ids]) -> torch.Tensor:
        """Hidden states (S, 1 + M, d) at the end of each input and of each beginning of a word."""
        prefix = read_texts(self._model, [ids[:-1] for ids in sequences], self._words[0][0])
        tree = grow([()], self._endings)
        hidden = read_trees(self._model, prefix, [ids[-1] for ids in sequences], [tree])
        return hidden[:, torch.from_numpy(tree.ends[0]).to(hidden.device)]

    def _straight(self, sequences: Sequence[Ids]) -> torch.Tensor:
        """The same with every beginning of a word read behind a copy of its input."""
        made = []
        for ending in [(), *self._endings]:
            device = self._model.get_input_embeddings().weight.device
            ids, lengths = padded([ids + ending for ids in sequences], self._words[0][0], device)
            # No mask: no token looks at the padding behind it.
            states = decoder_of(self._model)(input_ids=ids, use_cache=False).last_hidden_state
            made.append(states[torch.arange(len(ids), device=device), lengths - 1])
        return torch.stack(made, dim=1)

    # -- the output layer ------------------------------------------------------------------------

    def _scores(self, head: Head, hidden: torch.Tensor) -> FloatArray:
        """Log probabilities (..., C) from hidden states (..., 1 + M, d).

        The normaliser of the first token is the same for all classes and left out.
        """
        first = torch.tensor([ids[0] for ids in self._words], device=hidden.device)
        made = hidden[..., 0, :].float() @ head.weight[first].float().T
        if head.bias is not None:
            made = made + head.bias[first].float()
        made = made * head.scale
        if head.softcap is not None:
            made = head.softcap * torch.tanh(made / head.softcap)
        if not self._endings:
            return class_logprobs(made)
        asked = [
            (number, 1 + self._endings.index(ids[:size]), ids[size])
            for number, ids in enumerate(self._words)
            for size in range(1, len(ids))
        ]
        states = hidden[..., [node for _, node, _ in asked], :]
        wanted = torch.tensor([token for _, _, token in asked], device=hidden.device)
        more = token_stats(
            states.reshape(-1, states.shape[-1]),
            head.weight,
            wanted.expand(states.shape[:-1]).reshape(-1),
            bias=head.bias,
            softcap=head.softcap,
            scale=head.scale,
        ).nll.reshape(states.shape[:-1])
        numbers = torch.tensor([number for number, _, _ in asked], device=hidden.device)
        return class_logprobs(made.index_add(-1, numbers, -more))


def _common(sequences: Sequence[Ids]) -> tuple[Ids, list[Ids]]:
    """The longest beginning of all, and what follows it in each."""
    low, high = min(sequences), max(sequences)
    size = 0
    while size < min(len(low), len(high)) and low[size] == high[size]:
        size += 1
    return low[:size], [ids[size:] for ids in sequences]
