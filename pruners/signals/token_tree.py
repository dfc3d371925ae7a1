"""Many continuations of one text in one run of a causal model.

The tokens after a text form a tree: what two continuations begin with is read once. A tree is laid
out as a sequence behind the text, in which each token sees the text and its own ancestors alone
and stands at the position that it would have by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from ..contract import IntArray
from .rendered import Ids
from .tokens import decoder_of

_FITS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
# What a model of another kind may say to a cache, positions or a mask that it does not know.
_REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)


@dataclass(frozen=True)
class Tree:
    """Q nodes, parents before their children; node 0 is the root and stands for any token.

    Attributes
    ----------
    tokens, depth
        (Q,) int64; the root's token is 0.
    sees
        (Q, Q) bool, [i, j] = j is i or an ancestor of i.
    ends
        (S, 1 + M) int64: the node at which each continuation ends, and those at which each of
        the M endings behind it do.
    """

    tokens: IntArray
    depth: IntArray
    sees: npt.NDArray[np.bool_]
    ends: IntArray


@dataclass(frozen=True)
class Prefix:
    """What B texts left in the model: keys and values, padded on the right to T.

    Attributes
    ----------
    cache
        None where T is 0.
    lengths
        (B,) int64 of the texts, on the model's device.
    """

    cache: Any
    lengths: torch.Tensor

    @property
    def width(self) -> int:
        """T."""
        return 0 if self.cache is None else int(self.lengths.max())


def grow(continuations: Sequence[Ids], endings: Sequence[Ids] = ()) -> Tree:
    """The tree of some continuations, each with all the endings behind it."""
    tokens, parents, depth = [0], [0], [0]
    children: dict[tuple[int, int], int] = {}

    def walk(node: int, ids: Ids) -> int:
        for token in ids:
            found = children.get((node, token))
            if found is None:
                found = children[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
                depth.append(depth[node] + 1)
            node = found
        return node

    ends = []
    for ids in continuations:
        at = walk(0, ids)
        ends.append([at, *(walk(at, ending) for ending in endings)])
    sees = np.eye(len(tokens), dtype=bool)
    for node in range(1, len(tokens)):
        sees[node] |= sees[parents[node]]
    return Tree(np.array(tokens), np.array(depth), sees, np.array(ends, np.int64))


def groups(continuations: Sequence[Ids], each: int, width: int) -> list[list[int]]:
    """Places of the continuations, neighbours in order, cut so that trees have about `width` nodes.

    `each` is the number of tokens of the endings behind every one.
    """
    order = sorted(range(len(continuations)), key=lambda place: continuations[place])
    made: list[list[int]] = []
    count = 0
    for at, place in enumerate(order):
        ids = continuations[place]
        new = len(ids) + each
        if at:
            new -= _shared(continuations[order[at - 1]], ids)
        if not made or count + new > width:
            made.append([])
            count, new = 1, len(ids) + each
        made[-1].append(place)
        count += new
    return made


def _shared(one: Ids, other: Ids) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def read_texts(model: Any, texts: Sequence[Ids], fill: int) -> Prefix:
    """Run the texts once and keep their keys and values."""
    device = model.get_input_embeddings().weight.device
    lengths = torch.tensor([len(ids) for ids in texts], device=device)
    width = int(lengths.max())
    if not width:
        return Prefix(None, lengths)
    ids = np.full((len(texts), width), fill, np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    # No mask: no token looks at the padding behind it.
    made = decoder_of(model)(input_ids=torch.from_numpy(ids).to(device), use_cache=True)
    return Prefix(made.past_key_values, lengths)


def read_trees(
    model: Any, prefix: Prefix, roots: Sequence[int], trees: Sequence[Tree]
) -> torch.Tensor:
    """Last hidden states (B, Q, d) of the nodes behind each text; `trees` may be one for all.

    Not finite or meaningless beyond a tree's own nodes.
    """
    device = prefix.lengths.device
    size = max(len(tree.tokens) for tree in trees)
    ids = np.zeros((len(trees), size), np.int64)
    depth = np.zeros((len(trees), size), np.int64)
    sees = np.zeros((len(trees), size, size), bool)
    sees[:, np.arange(size), np.arange(size)] = True  # padding sees itself, else softmax fails
    for row, tree in enumerate(trees):
        count = len(tree.tokens)
        ids[row, :count], depth[row, :count] = tree.tokens, tree.depth
        sees[row, :count, :count] = tree.sees
    many = len(roots)
    nodes = torch.from_numpy(ids).to(device).repeat(many // len(trees), 1)
    nodes[:, 0] = torch.tensor(list(roots), device=device)
    positions = torch.from_numpy(depth).to(device) + prefix.lengths[:, None]
    dtype = model.get_input_embeddings().weight.dtype
    low = torch.finfo(dtype).min
    width = prefix.width
    mask = torch.zeros(many, 1, size, width + size, dtype=dtype, device=device)
    padding = torch.arange(width, device=device)[None] >= prefix.lengths[:, None]
    mask[..., :width].masked_fill_(padding[:, None, None], low)
    mask[..., width:].masked_fill_(~torch.from_numpy(sees).to(device)[:, None], low)
    given = {} if prefix.cache is None else {"past_key_values": _branch(prefix.cache)}
    made = decoder_of(model)(
        input_ids=nodes,
        attention_mask=mask,
        position_ids=positions,
        use_cache=prefix.cache is not None,
        **given,
    )
    hidden: torch.Tensor = made.last_hidden_state
    return hidden


def _branch(cache: Any) -> Any:
    """A cache that grows by itself from the same tensors: growing makes new ones."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    return made


def fits(model: Any) -> bool:
    """Whether trees give what the model says of each continuation by itself; tried once a model.

    Not so for recurrent layers, positions that are not taken from `position_ids` (ALiBi), and
    attention that takes no mask of this form.
    """
    if model not in _FITS:
        _FITS[model] = _try(model)
    return _FITS[model]


def _try(model: Any) -> bool:
    if getattr(model.config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    size = int(model.get_input_embeddings().weight.shape[0])
    numbers = [int(n) for n in np.random.default_rng(0).integers(0, size, 12)]
    texts = [tuple(numbers[:4]), tuple(numbers[4:6])]
    tails: list[Ids] = [(), tuple(numbers[6:8]), (numbers[6], numbers[8]), tuple(numbers[9:12])]
    try:
        tree = grow(tails)
        prefix = read_texts(model, [text[:-1] for text in texts], 0)
        if not all(hasattr(layer, "keys") for layer in prefix.cache.layers):
            return False
        for _ in range(2):  # twice: the first run must leave the prefix as it was
            hidden = read_trees(model, prefix, [text[-1] for text in texts], [tree])
        found = hidden[:, torch.from_numpy(tree.ends[:, 0])]
    except _REFUSALS:
        return False
    room = 1e-3 if found.dtype == torch.float32 else 0.1
    for row, text in enumerate(texts):
        for place, tail in enumerate(tails):
            ids = torch.tensor([[*text, *tail]], device=found.device)
            wanted = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            gap = (found[row, place] - wanted).abs().max()
            if not bool(gap <= room * wanted.abs().max()):
                return False
    return True
