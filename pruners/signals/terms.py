"""Terms of texts with tf * idf weights, for methods that need no model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..contract import Array

# Words; each character of scripts without spaces stands for itself.
_TERM = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff]|"
    r"[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff]+"
)


def terms(text: str) -> list[str]:
    """Case-folded words of a text; single characters in Chinese, Japanese, Thai and Lao."""
    return [found[0].casefold() for found in _TERM.finditer(text)]


def term_signals(texts: Sequence[str]) -> dict[str, Array]:
    """`term_offset` (N+1,), `term` (nnz,) and `term_weight` (nnz,) of N texts.

    weight = tf * ln(N / df), tf the count in the text and df the number of the N texts that
    hold the term (LexRank, arXiv:1109.2128, section 3.1, with the given texts as the corpus).
    A term in every text weighs 0 and is left out. The vocabulary is sorted, so that indices do
    not depend on the order of texts; the weights depend on all of the N texts.
    """
    counted = [Counter(terms(text)) for text in texts]
    found: Counter[str] = Counter()
    for counts in counted:
        found.update(counts.keys())
    n = len(counted)
    index = {term: i for i, term in enumerate(sorted(found))}
    idf = {term: float(np.log(n / df)) for term, df in found.items()}
    offset, term_index, weight = [0], [], []
    for counts in counted:
        for term in sorted(counts):
            if idf[term] > 0:
                term_index.append(index[term])
                weight.append(counts[term] * idf[term])
        offset.append(len(term_index))
    return {
        "term_offset": np.array(offset, np.int64),
        "term": np.array(term_index, np.int64),
        "term_weight": np.array(weight, np.float32),
    }
