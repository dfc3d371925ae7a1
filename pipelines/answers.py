"""Where an answer string stands in a text, tolerant of case, punctuation and articles.

Two strings match when their tokens do: casefolded runs of letters and digits, without the English
articles (the SQuAD normalisation, Rajpurkar et al. 2016, kept with offsets). Scripts written
without spaces have one token a character, so that an answer is found inside a longer run.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

ARTICLES = frozenset({"a", "an", "the"})

# Kana, Han and its extensions, Hangul is spaced and stays whole; Thai, Lao, Khmer, Myanmar.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003134f"
)
# Combining marks stand inside a word (Arabic vowels, Devanagari matras), yet `\w` has no Mn.
_TOKEN = re.compile(
    rf"[{_UNSPACED}]|(?:[^\W_{_UNSPACED}][\u0300-\u036f\u0610-\u061a\u064b-\u065f\u0900-\u0903"
    r"\u093a-\u094f]*)+"
)

Token = tuple[str, int, int]


def tokens(text: str) -> list[Token]:
    """(normalised token, start, end) of a text, in order, articles left out."""
    found = []
    for match in _TOKEN.finditer(text):
        word = unicodedata.normalize("NFKC", match.group()).casefold()
        if word not in ARTICLES:
            found.append((word, match.start(), match.end()))
    return found


def find_answers(text: str, answers: Iterable[str]) -> list[tuple[int, int]]:
    """Character spans [start, end) of every occurrence of any of the answers, sorted.

    An answer without a token (empty, punctuation or articles alone) matches nothing.
    """
    words = tokens(text)
    first: dict[str, list[int]] = {}
    for i, (word, _, _) in enumerate(words):
        first.setdefault(word, []).append(i)
    spans: set[tuple[int, int]] = set()
    for answer in answers:
        wanted = [word for word, _, _ in tokens(answer)]
        for i in first.get(wanted[0], ()) if wanted else ():
            if [word for word, _, _ in words[i : i + len(wanted)]] == wanted:
                spans.add((words[i][1], words[i + len(wanted) - 1][2]))
    return sorted(spans)


def holds_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether any of the answers occurs in the text."""
    return bool(find_answers(text, answers))
