"""Greedy search: word by word, the best so far with every word of the vocabulary after it."""

from __future__ import annotations

import numpy as np

from .space import Draws, Prompt, Search, SearchMethod, Space


class Greedy(SearchMethod):
    """Position by position, the best prefix and each word after it (arXiv:2310.12774, A.1).

    The first round are the prompts of one word, that the influence pass has asked already. Of
    equal rewards the smaller position in the vocabulary wins. The prefix grows to the full
    length even where that lowers the reward, as published; the best prompt of any length is
    still the best so far.
    """

    def asks(self, space: Space) -> int:
        """length * vocabulary: prompts of different rounds differ in length, none is repeated."""
        return space.length * space.vocabulary

    def propose(self, space: Space, draws: Draws) -> Search:
        """One round a position."""
        prefix: Prompt = ()
        for _ in range(space.length):
            batch = [(*prefix, word) for word in range(space.vocabulary)]
            reward = yield batch
            prefix = batch[int(np.argmax(reward))]
