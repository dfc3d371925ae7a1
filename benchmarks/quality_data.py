"""Rows for `benchmarks/quality.py` from the real data sets; nothing here is committed as data.

Four sets, each a list of `ContextRow`:

``qed``       QED's development part (Natural Questions passages, borders and evidence sentence by
              its annotators). Evidence is the selected sentence, known where one sentence
              explains the answer; elsewhere labels are unknown and the answer strings remain.
              Fifteen of the 595 selected sentences run over a border (after "Ste ."): all of
              their pieces are evidence, and all must be kept.
``multidoc``  Natural Questions, 20 real passages a question; the gold one is relevant.
``xquad-XX``  SQuAD paragraphs in German, Spanish, Chinese and Arabic; evidence is the sentence
              that the annotated answer starts in.
``hotpot``    HotpotQA, 10 paragraphs a question, evidence are the supporting facts.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from prunery.pipelines.evaluation_rows import ContextRow
from prunery.pruners.context.sentences import split_sentences


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def borders(starts: Sequence[int], length: int) -> tuple[tuple[int, int], ...]:
    """Sentence borders from QED's starts: from 0, each up to the next, empty ones dropped."""
    cuts = sorted({0, *(s for s in starts if 0 < s < length), length})
    return tuple(pairwise(cuts))


def qed(data: Path) -> list[ContextRow]:
    """QED's development part, all of it."""
    rows = []
    for item in lines(data / "rag_qed" / "qed-dev.jsonlines.gz"):
        text = item["paragraph_text"]
        cut = borders(item["sentence_starts"], len(text))
        chosen = item["annotation"].get("selected_sentence")
        labels = None
        if chosen:
            labels = tuple(int(_shares_text(text, chosen, piece)) for piece in cut)
        rows.append(
            ContextRow(
                question=item["question_text"],
                passage=text,
                title=item["title_text"],
                sentences=cut,
                labels=labels,
                answers=tuple(
                    answer["string"] for given in item["original_nq_answers"] for answer in given
                ),
                relevant=1,
                group=str(item["example_id"]),
            )
        )
    return rows


def _shares_text(text: str, chosen: dict[str, Any], piece: tuple[int, int]) -> bool:
    start, end = max(chosen["start"], piece[0]), min(chosen["end"], piece[1])
    return start < end and bool(text[start:end].strip())


def qed_headline(rows: Iterable[ContextRow]) -> list[ContextRow]:
    """Labelled rows whose passage has three sentences or more: the two headline figures."""
    return [row for row in rows if row.labels is not None and len(row.sentences) >= 3]


def multidoc(data: Path, *, candidates: int = 20, questions: int | None = None) -> list[ContextRow]:
    """The first `candidates` passages of each question, the gold one among them."""
    path = data / "derived_nq_multidoc" / "nq-open-30_docs_bm25_gold_first.jsonl.gz"
    rows = []
    for number, item in enumerate(lines(path)[:questions]):
        for passage in item["ctxs"][:candidates]:
            if not passage["text"].strip():
                continue
            rows.append(
                ContextRow(
                    question=item["question"],
                    passage=passage["text"],
                    title=passage["title"],
                    sentences=tuple(split_sentences(passage["text"])),
                    answers=tuple(item["answers"]),
                    relevant=int(passage["isgold"]),
                    group=f"{number:05d}",
                )
            )
    return rows


def xquad(data: Path, language: str) -> list[ContextRow]:
    """One language of XQuAD; rows whose answer starts outside the text are left out."""
    with gzip.open(data / "rag_xquad" / f"xquad.{language}.json.gz", "rt", encoding="utf-8") as f:
        articles = json.load(f)["data"]
    rows = []
    for article in articles:
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            cut = tuple(split_sentences(text))
            for asked in paragraph["qas"]:
                answer = asked["answers"][0]
                at = answer["answer_start"]
                labels = tuple(int(start <= at < end) for start, end in cut)
                if 1 in labels:
                    rows.append(
                        ContextRow(
                            question=asked["question"],
                            passage=text,
                            sentences=cut,
                            labels=labels,
                            answers=(answer["text"],),
                            relevant=1,
                            group=asked["id"],
                        )
                    )
    return rows


def hotpot(data: Path) -> list[ContextRow]:
    """HotpotQA: ten paragraphs a question; one without a supporting fact holds no evidence."""
    with gzip.open(data / "rag_hotpotqa" / "hotpotqa_train.json.gz", "rt", encoding="utf-8") as f:
        questions = json.load(f)
    rows = []
    for item in questions:
        facts = {(title, number) for title, number in item["supporting_facts"]}
        for title, sentences in item["context"]:
            text = "".join(sentences)
            if not text.strip():
                continue
            ends = [len("".join(sentences[: i + 1])) for i in range(len(sentences))]
            cut = [(a, b, i) for i, (a, b) in enumerate(pairwise([0, *ends])) if b > a]
            labels = tuple(int((title, i) in facts) for _, _, i in cut)
            rows.append(
                ContextRow(
                    question=item["question"],
                    passage=text,
                    title=title,
                    sentences=tuple((a, b) for a, b, _ in cut),
                    labels=labels,
                    answers=(item["answer"],),
                    relevant=int(1 in labels),
                    group=str(item["_id"]),
                )
            )
    return rows


def _words(text: str) -> list[str]:
    return re.sub(r"[^\w\s]", " ", text.lower()).split()


def _grams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = _words(text)
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


@dataclass(frozen=True)
class Seen:
    """What of some rows a model met in training.

    Attributes
    ----------
    questions
        Normalised (`key`) questions of the rows that were asked in training.
    passages
        Passages of the rows of which some one training passage holds more than a share of the
        five-word sequences (a passage of fewer words than five is one sequence).
    """

    questions: frozenset[str]
    passages: frozenset[str]

    def count(self, rows: Sequence[ContextRow]) -> dict[str, int]:
        """Distinct questions and passages of rows, and how many of them were seen."""
        asked, texts = {key(row.question) for row in rows}, {row.passage for row in rows}
        return {
            "questions": len(asked & self.questions),
            "of_questions": len(asked),
            "passages": len(texts & self.passages),
            "of_passages": len(texts),
        }

    def without(self, rows: Sequence[ContextRow]) -> list[ContextRow]:
        """The rows whose question and passage are both new."""
        return [
            row
            for row in rows
            if key(row.question) not in self.questions and row.passage not in self.passages
        ]


def key(question: str) -> str:
    """A question without case and punctuation."""
    return " ".join(_words(question))


def seen(
    trained: Iterable[tuple[str, str]], rows: Sequence[ContextRow], *, share: float = 0.2
) -> Seen:
    """Look for rows in the (question, passage) pairs of training; "" where there is no question."""
    passages = {row.passage: _grams(row.passage) for row in rows}
    holders: dict[tuple[str, ...], list[str]] = {}
    for passage, grams in passages.items():
        for gram in grams:
            holders.setdefault(gram, []).append(passage)
    wanted = {key(row.question) for row in rows}
    asked: set[str] = set()
    found: set[str] = set()
    for question, passage in trained:
        asked |= {key(question)} & wanted
        shared = Counter(p for gram in _grams(passage) for p in holders.get(gram, ()))
        found |= {p for p, count in shared.items() if count > share * len(passages[p])}
    return Seen(frozenset(asked), frozenset(found))


def golden(rows: Sequence[ContextRow]) -> list[ContextRow]:
    """The rows of the questions that still have a relevant passage."""
    groups = {row.group for row in rows if row.relevant == 1}
    return [row for row in rows if row.group in groups]


def write_rows(path: Path, rows: Sequence[ContextRow]) -> Path:
    """Rows as JSON Lines, the form that `prunery evaluate context` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:  # else scores stay valid
        path.write_text(text, encoding="utf-8")
    return path
