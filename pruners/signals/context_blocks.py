"""Scores of packed blocks, filled in from any batch: of one caller's blocks, or of many's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import ModelError
from ..context.packing import Packed
from ..contract import Array, BoolArray, FloatArray, IntArray

Block = tuple[Packed, int]
"""A block of a packed list, by its number."""


def batch_arrays(blocks: Sequence[Block], width: int) -> tuple[Array, Array, Array]:
    """Ids, attention mask and token types (B, width) int64 of blocks, padded right.

    The blocks may be of several packed lists, all of one model's frame.
    """
    pad = blocks[0][0].frame.pad
    ids = np.full((len(blocks), width), pad, np.int64)
    types = np.zeros((len(blocks), width), np.int64)
    mask = np.zeros((len(blocks), width), np.int64)
    for row, (packed, block) in enumerate(blocks):
        mask[row, : packed.write_block(block, ids[row], types[row])] = 1
    return ids, mask, types


class BlockScores:
    """What a network says about one packed list of P pairs, block by block in any order.

    One thread at a time may `put`.

    Attributes
    ----------
    packed
        The pairs' tokens and blocks.
    lengths
        (B,) int64, tokens of each block.
    left
        Blocks that have no score yet.
    finite
        (P,) bool, whether every number of the pair was finite so far.
    """

    def __init__(self, packed: Packed) -> None:
        pairs = len(packed.question_ids)
        self.packed = packed
        self.lengths = packed.block_length
        self.left = len(self.lengths)
        self.finite: BoolArray = np.ones(pairs, np.bool_)
        self._first = np.zeros(self.left, np.bool_)
        self._first[np.unique(packed.block_pair, return_index=True)[1]] = True
        self._relevance = np.full(pairs, -np.inf, np.float32)
        self._title = np.zeros(pairs, np.float32)
        self._token = np.zeros(len(packed.ids), np.float32)

    def put(self, block: int, rank: float, keep: FloatArray) -> None:
        """Take one row of a forward pass: ranking logit, and keep logits (T,) float32.

        `keep` may be longer than the block; what follows it is padding and is not read.
        """
        packed = self.packed
        pair = int(packed.block_pair[block])
        begin, end = int(packed.block_start[block]), int(packed.block_end[block])
        title, body = packed.question_end(pair), packed.body_start(pair)
        read = keep[title : body + end - begin]
        self.left -= 1
        if not (np.isfinite(rank) and np.isfinite(read).all()):
            self.finite[pair] = False
            return
        self._relevance[pair] = max(self._relevance[pair], rank)
        self._token[begin:end] = read[body - title :]
        if self._first[block] and body > title:
            self._title[pair] = sigmoid(read[: body - title]).mean()

    def relevance_logit(self, without_text: np.float32) -> FloatArray:
        """(P,) float32, maximum over the pair's blocks; `without_text` where it has none."""
        return np.where(np.isneginf(self._relevance), without_text, self._relevance)

    @property
    def title_keep_probability(self) -> FloatArray:
        """(P,) float32, mean over the title's tokens in the first block; 0 without a title."""
        return self._title

    def token_keep_probability(self) -> FloatArray:
        """(T,) float32."""
        return sigmoid(self._token)

    @property
    def blocks(self) -> IntArray:
        """(P,) int64, blocks of each pair."""
        return np.bincount(self.packed.block_pair, minlength=len(self.finite)).astype(np.int64)


def not_finite() -> ModelError:
    """The error of a passage whose scores are not numbers."""
    return ModelError(
        "the network gave a score that is not finite. Load it in float32, or check the"
        " checkpoint's weights; no score is made up in its place."
    )


def sigmoid(logit: FloatArray) -> FloatArray:
    """1 / (1 + exp(-x)), float32, without overflow."""
    half = np.tanh(logit.astype(np.float64) * 0.5)
    return (0.5 * (1.0 + half)).astype(np.float32)
