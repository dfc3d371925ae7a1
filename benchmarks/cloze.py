"""Questions made from statements by rule, for the first stage of the shipped model's training.

From a sentence with a date, a number or a name: the name becomes the answer and is taken out, a
question word that fits it is put before what is left, some words fall away, a leading pronoun
becomes the page's title. ("It was released on 12 May 1995 by Sony." of "Foo" -> "when was foo
released by sony".) After Lewis et al. 2019 (arXiv:1906.04980), simplified: no translation model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from default_rows import Labelled, Neighbours, Passage, detokenise, draw, negative_rows, normal

from prunery.pipelines.provence_rows import TrainRow

_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(
    rf"\b(?:\d{{1,2}} (?:{_MONTH})(?:,? \d{{4}})?|(?:{_MONTH})(?: \d{{1,2}}\s?,)? ?\d{{4}}"
    r"|(?:1[4-9]|20)\d\d)\b"
)
_NUMBER = re.compile(r"\b\d[\d,\.]*(?: (?:million|billion|%|percent|km|miles|people|m|years))?\b")
_NAME = re.compile(
    r"\b[A-Z][\w'\u2019\.\-]+(?: (?:of|the|and|de|von|van|la) (?=[A-Z])| ?[A-Z][\w'\u2019\.\-]+)*"
)
_PRONOUN = re.compile(
    r"^(?:He|She|It|They|His|Her|Its|Their|This|The (?:film|song|book|album|series|show|band|team"
    r"|city|town|company|game|novel|episode|event|program|single|character|country|river|school"
    r"|university))\b",
    re.IGNORECASE,
)
_PREPOSITION = re.compile(
    r"\b(in|at|from|on|by|of|near|to|with|for|as|and)\s+(?:the\s+)?$", re.IGNORECASE
)
_FUNCTION_WORDS = (
    "a an the of in on at to for by with and or as is are was were be been being that which who "
    "whom his her its their it he she they this these those from also has have had not but into "
    "than then there when while"
)
_FUNCTION = frozenset(_FUNCTION_WORDS.split())
_WHEN = ("when was", "when did", "when", "what year", "what year was")
_HOW_MANY = ("how many", "how much", "what number of", "how many")
_WHERE = ("where", "where is", "where was", "where did", "which place", "what country")
_WHO = ("who", "who is", "who was", "who did")
_WHAT = ("what", "what is", "which", "what was the", "name of")


def cloze_rows(near: Neighbours, seed: int, negatives: float, limit: int) -> list[TrainRow]:
    """One or two questions for each passage of two sentences or more, at most `limit` in all."""
    rng, items = random.Random(seed), []
    for passage in near.pool:
        size = sum(len(s.split()) for s in passage.sentences)
        if len(passage.sentences) < 2 or size > 220:
            continue
        text = passage
        if rng.random() < 0.5:
            title = detokenise(passage.title) if passage.title else None
            text = Passage(title, tuple(detokenise(s) for s in passage.sentences))
        seen: set[tuple[int, ...]] = set()
        for _ in range(2 if len(passage.sentences) > 3 else 1):
            made = cloze(text, rng)
            if made is not None and made.labels not in seen:
                seen.add(made.labels)
                items.append(made)
    rng.shuffle(items)
    items = [replace(x, group=f"cloze-{i}") for i, x in enumerate(items[:limit])]
    rows: list[TrainRow] = []
    for item, hard in zip(items, near.hard(items, 2), strict=True):
        rows.append(item.row(1.0))
        rows += [
            r
            for r in negative_rows(item, hard, near.pool, negatives, seed)
            if draw(seed, r.passage, r.question) < 0.6
        ]
    return rows


def cloze(passage: Passage, rng: random.Random) -> Labelled | None:
    """A question about one sentence of a passage, or None where no sentence offers one."""
    named = normal(re.sub(r"\(.*?\)", "", passage.title or ""))
    spans = _candidates(passage.sentences, named)
    if not spans:
        return None
    i = rng.choice(sorted({s[0] for s in spans}))
    _, start, end, kind = rng.choice([s for s in spans if s[0] == i])
    sentence = passage.sentences[i]
    question = _question(sentence[:start], sentence[end:], kind, named, rng)
    if not 4 <= len(question.split()) <= 22:
        return None
    answer = normal(sentence[start:end])
    labels = [-1 if answer in normal(s) else 0 for s in passage.sentences]
    labels[i] = 1
    return Labelled(
        "cloze",
        "",
        question,
        passage.title,
        passage.sentences,
        tuple(labels),
        (sentence[start:end],),
    )


def _candidates(sentences: Sequence[str], named: str) -> list[tuple[int, int, int, str]]:
    """(sentence, start, end, kind) of every span that could be an answer."""
    spans: list[tuple[int, int, int, str]] = []
    for i, sentence in enumerate(sentences):
        if not 6 <= len(sentence.split()) <= 60:
            continue
        spans += [(i, *m.span(), "date") for m in _DATE.finditer(sentence)]
        spans += [(i, *m.span(), "number") for m in _NUMBER.finditer(sentence)]
        for m in _NAME.finditer(sentence):
            name = normal(m.group())
            first_word = m.start() == 0 and len(m.group().split()) < 2
            if name and not first_word and name not in named and named not in name.split():
                spans.append((i, *m.span(), "name"))
    return spans


def _question(before: str, after: str, kind: str, named: str, rng: random.Random) -> str:
    found = _PREPOSITION.search(before)
    preposition = found.group(1).lower() if found else ""
    before = before[: found.start()] if found else before
    if kind == "date":
        asked = rng.choice(_WHEN)
    elif kind == "number":
        asked = rng.choice(_HOW_MANY)
    elif preposition in ("in", "at", "near", "from", "to"):
        asked = rng.choice(_WHERE)
    elif preposition == "by" or rng.random() < 0.5:
        asked = rng.choice(_WHO)
    else:
        asked = rng.choice(_WHAT)
    pronoun = bool(_PRONOUN.match(before))
    left, right = normal(_PRONOUN.sub(" ", before)).split(), normal(after).split()
    size = rng.randint(3, 9)
    take = min(len(left), round(size * (0.4 + 0.6 * rng.random())))
    kept = (left[-take:] if take else []) + right[: max(0, size - take)]
    lost = rng.uniform(0.05, 0.45)
    kept = [w for w in kept if rng.random() > (0.55 if w in _FUNCTION else lost)]
    body = " ".join(kept)
    untold = pronoun or not set(named.split()) & set(kept)
    if named and untold and rng.random() < 0.9:
        if rng.random() < 0.6:
            body = f"{named} {body}"
        else:
            body = f"{body} {rng.choice(['of ', 'in ', ''])}{named}"
    asks_first = rng.random() < 0.85
    text = f"{asked} {body}" if asks_first else f"{body} {asked.split()[0]}"
    return " ".join(text.split())
