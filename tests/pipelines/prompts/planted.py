"""A black box whose influential words are known: each pulls towards the right class."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from scipy.special import log_softmax, ndtri

from prunery.pruners.rules import uniform


def code(text):
    """63 bits of a text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_rows(shots, classes=2):
    """Texts "class/shot", labels and shots, in the order of the shots."""
    places = [(label, shot) for shot in range(shots) for label in range(classes)]
    texts = [f"{label}/{shot}" for label, shot in places]
    labels = np.array([label for label, _ in places], np.int64)
    return texts, labels, np.array([shot for _, shot in places], np.int64)


@dataclass
class Planted:
    """Logits of a row: normal noise of the row, plus, at its right class, what the words pull.

    A word pulls by its strength in `words` (0 where it is not there) and by normal noise of
    (word, row); the sum over the words of a prompt saturates at `most`, as tanh does. The answer
    for a (prompt, row) is a function of their texts alone.
    """

    words: dict[str, float]
    classes: int = 2
    noise: float = 0.3
    most: float = 4.0
    asked: list = field(default_factory=list)  # (prompt, row) pairs in order

    def label_logprobs(self, prompts, rows):
        codes = np.array([code(row) for row in rows], np.int64)
        gold = np.array([int(row.partition("/")[0]) for row in rows])
        base = np.stack([ndtri(uniform(c, codes)) for c in range(self.classes)], axis=1)
        made = np.empty((len(prompts), len(rows), self.classes), np.float32)
        for number, prompt in enumerate(prompts):
            pull = np.zeros(len(rows))
            for word in prompt.split():
                jitter = ndtri(uniform(code(word), codes))
                pull += self.words.get(word, 0.0) + self.noise * jitter
            logits = base.copy()
            logits[np.arange(len(rows)), gold] += self.most * np.tanh(pull / self.most)
            made[number] = log_softmax(logits, axis=1)
            self.asked += [(prompt, row) for row in rows]
        return made

    def input_tokens(self, prompts, rows):
        read = [[len(prompt.split()) + 1 for _ in rows] for prompt in prompts]
        return np.array(read, np.int64).reshape(len(prompts), len(rows))


def make_vocabulary(size, planted, strength=1.0):
    """`size` words, of which `planted` (spread over them) pull by `strength`."""
    words = [f"w{number}" for number in range(size)]
    chosen = [words[number * size // planted] for number in range(planted)]
    return words, dict.fromkeys(chosen, strength)
