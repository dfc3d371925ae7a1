"""A black box whose answers are written down: logits of a row plus what each word adds."""

from __future__ import annotations

import numpy as np


class Scripted:
    """Row i has its own logits (C,), a word adds its effect (C,) to every row.

    `asked` remembers each (prompt, row) that the box was asked about, in order.
    """

    def __init__(self, base, effects, *, fail_at=None):
        self.base = {row: np.asarray(logits, np.float64) for row, logits in base.items()}
        self.effects = {word: np.asarray(e, np.float64) for word, e in effects.items()}
        self.classes = len(next(iter(self.base.values())))
        self.asked = []

    def label_logprobs(self, prompts, rows):
        self.asked += [(prompt, row) for prompt in prompts for row in rows]
        made = np.empty((len(prompts), len(rows), self.classes))
        for p, prompt in enumerate(prompts):
            shift = sum((self.effects[word] for word in prompt.split()), np.zeros(self.classes))
            for n, row in enumerate(rows):
                logits = self.base[row] + shift
                made[p, n] = logits - np.log(np.exp(logits).sum())
        return made.astype(np.float32)

    def input_tokens(self, prompts, rows):
        return np.array([[1 + len(p.split()) for _ in rows] for p in prompts], np.int64).reshape(
            len(prompts), len(rows)
        )


def sixteen(words=12, seed=0):
    """Sixteen rows of two classes in the order of their shots, and words that help or harm."""
    rng = np.random.default_rng(seed)
    labels = np.tile([0, 1], 8)
    rows = [f"row {n}" for n in range(16)]
    shot = np.repeat(np.arange(8), 2)
    base = {row: rng.normal(0, 1, 2) for row in rows}
    effects = {f"w{v}": rng.normal(0, 0.5, 2) for v in range(words)}
    return Scripted(base, effects), rows, labels, shot, list(effects)
