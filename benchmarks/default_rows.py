"""Rows that the shipped Provence is trained on, from the data sets beside the checkout.

Held out, by question and by passage: every question of qed-dev and of derived_nq_multidoc, and
every passage that shares more than a fifth of its word 5-grams with a passage of qed-dev or a
gold passage of derived_nq_multidoc. Validation is cut from QED's training part by page title, and
training rows close to a validation passage are left out too.

| set | licence | labels |
| --- | --- | --- |
| rag_qed (training part) | CC BY-SA 3.0 | the sentence of the answer span, and of its bridge |
| rag_litm_nq | CC BY-SA 3.0 | of the sentences that hold a short answer, the one nearest the
  question in words; the others are "no opinion" |
| rag_xquad (English) | CC BY-SA 4.0 | the sentence of the answer's offset |
| rag_hotpotqa | CC BY-SA 4.0 | supporting facts; its other paragraphs are hard negatives |
| rag_2wiki_corpus | Apache-2.0 over CC BY-SA text | negatives and cloze questions alone |
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prunery.pipelines.provence_rows import TrainRow
from prunery.pruners.context.sentences import split_sentences

NEGATIVES = 0.35  # negatives of a question in an epoch; 0.6 of them near ones (BM25)
HARD, RANDOM = 3, 2  # different negatives to draw those from
SINGLE = 0.2  # weight of a passage of one sentence: nothing to choose in it
VALID_EVERY = 11  # one page title in eleven is for validation
OVERLAP = 0.2


@dataclass(frozen=True)
class Labelled:
    """A question with a passage cut in sentences, labels and answers, before it becomes rows."""

    source: str
    group: str
    question: str
    title: str | None
    sentences: tuple[str, ...]
    labels: tuple[int, ...]
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        """The passage."""
        return "".join(self.sentences)

    def row(self, weight: float) -> TrainRow:
        """As a training row."""
        return row_of(
            self.question, self.title, self.sentences, self.labels, self.group, weight, self.answers
        )


@dataclass(frozen=True)
class Passage:
    """A passage of the pool that negatives and cloze questions come from."""

    title: str | None
    sentences: tuple[str, ...]


def row_of(
    question: str,
    title: str | None,
    sentences: Sequence[str],
    labels: Sequence[int],
    group: str,
    weight: float,
    answers: Sequence[str] = (),
) -> TrainRow:
    """A training row from sentences as text."""
    ends = np.cumsum([len(s) for s in sentences]).tolist()
    spans = tuple(zip([0, *ends[:-1]], ends, strict=True))
    return TrainRow(
        question=question,
        passage="".join(sentences),
        title=title,
        sentences=spans,
        labels=tuple(labels),
        answers=tuple(answers),
        group=group,
        weight=round(weight, 6),
    )


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.sub(r"[^\w\s]", " ", text.lower()).split()


def normal(text: str) -> str:
    """Words joined by one space."""
    return " ".join(words(text))


def draw(*parts: object) -> float:
    """A number in 0..1 from a hash of its arguments."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2.0**64


def fivegrams(text: str) -> set[str]:
    """Word 5-grams; the whole text where it is shorter."""
    w = words(text)
    return {" ".join(w[i : i + 5]) for i in range(max(1, len(w) - 4))}


def overlap(text: str, known: set[str]) -> float:
    """Share of a text's 5-grams that are known."""
    grams = fivegrams(text)
    return sum(g in known for g in grams) / len(grams)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Gzipped JSON Lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_json(path: Path) -> Any:
    """Gzipped JSON."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def pieces(text: str) -> tuple[str, ...]:
    """A text cut in sentences by the splitter that inference uses."""
    return tuple(text[a:b] for a, b in split_sentences(text))


class HeldOut:
    """Questions and passages that training must not see."""

    def __init__(self, data: Path) -> None:
        dev = read_lines(data / "rag_qed/qed-dev.jsonlines.gz")
        many = read_lines(data / "derived_nq_multidoc/nq-open-30_docs_bm25_gold_first.jsonl.gz")
        self.questions = {normal(x["question_text"]) for x in dev}
        self.questions |= {normal(x["question"]) for x in many}
        self.grams: set[str] = set()
        for text in [x["paragraph_text"] for x in dev] + [x["ctxs"][0]["text"] for x in many]:
            self.grams |= fivegrams(text)

    def __contains__(self, item: tuple[str, str]) -> bool:
        question, passage = item
        return normal(question) in self.questions or overlap(passage, self.grams) > OVERLAP


def detokenise(text: str) -> str:
    """QED's spaced tokens as ordinary typography: "a , b `` c ''" to 'a, b "c"'."""
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r" ([,.;:?!%\)\]])", r"\1", text)
    text = re.sub(r"([\(\[]) ", r"\1", text)
    text = re.sub(r" ('s|'re|'ve|'ll|'d|'m|n't)\b", r"\1", text)
    text = re.sub(r" '(?= )", "'", text)
    text = re.sub(r"(\w) - (\w)", r"\1-\2", text)
    text = re.sub(r"(\d) -- (\d)", "\\1\u2013\\2", text)
    text = re.sub(r" -- ", " \u2014 ", text)
    return re.sub(r"([$£€]) (\d)", r"\1\2", text)


def qed(data: Path) -> Iterable[Labelled]:
    """QED's training part: the sentence of the answer, and that of its bridging reference."""
    for file in sorted((data / "rag_qed").glob("nq-train-*-qed.jsonlines.gz")):
        for x in read_lines(file):
            text = x["paragraph_text"]
            starts = sorted({0, *(s for s in x["sentence_starts"] if s < len(text))})
            ends = [*starts[1:], len(text)]
            labels = [0] * len(starts)
            spans = list(x["answer_spans"])
            if x.get("answer_bridge_span"):
                bridge = x["answer_bridge_span"]
                spans.append(bridge[0] if isinstance(bridge[0], list) else bridge)
            for start, _ in spans:
                if start >= 0:
                    labels[max(i for i, s in enumerate(starts) if s <= start)] = 1
            yield Labelled(
                "qed",
                str(x["example_id"]),
                x["question_text"],
                x["title_text"],
                tuple(text[a:b] for a, b in zip(starts, ends, strict=True)),
                tuple(labels),
                tuple(x["answer_text"]),
            )


def litm(data: Path) -> Iterable[Labelled]:
    """Natural Questions of "Lost in the Middle": long answers with their short answers."""
    for x in read_lines(data / "rag_litm_nq/nq-open-oracle.jsonl.gz"):
        gold = x["nq_annotated_gold"]
        sentences = pieces(gold["long_answer"])
        answers = [normal(a) for a in gold["short_answers"] if normal(a)]
        hits = [i for i, s in enumerate(sentences) if any(a in normal(s) for a in answers)]
        if not hits:
            continue
        asked = set(words(x["question"]))
        best = max(hits, key=lambda i: (len(asked & set(words(sentences[i]))), -i))
        labels = [-1 if i in hits else 0 for i in range(len(sentences))]
        labels[best] = 1
        yield Labelled(
            "litm",
            f"litm-{draw(x['question']):.15f}",
            x["question"],
            gold["title"],
            sentences,
            tuple(labels),
            tuple(gold["short_answers"]),
        )


def xquad(data: Path) -> Iterable[Labelled]:
    """XQuAD's English part (questions of SQuAD's development set)."""
    for article in read_json(data / "rag_xquad/xquad.en.json.gz")["data"]:
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            spans = split_sentences(text)
            for qa in paragraph["qas"]:
                at = qa["answers"][0]["answer_start"]
                yield Labelled(
                    "xquad",
                    qa["id"],
                    qa["question"],
                    None,
                    tuple(text[a:b] for a, b in spans),
                    tuple(int(a <= at < b) for a, b in spans),
                    (qa["answers"][0]["text"],),
                )


def hotpot(data: Path) -> Iterable[Labelled]:
    """HotpotQA: both supporting paragraphs, and the others as passages without evidence."""
    for x in read_json(data / "rag_hotpotqa/hotpotqa_train.json.gz"):
        facts: dict[str, set[int]] = defaultdict(set)
        for title, i in x["supporting_facts"]:
            facts[title].add(i)
        for title, sentences in x["context"]:
            if "".join(sentences).strip():
                labels = tuple(int(i in facts[title]) for i in range(len(sentences)))
                yield Labelled(
                    "hotpot",
                    x["_id"],
                    x["question"],
                    title,
                    tuple(sentences),
                    labels,
                    (x["answer"],),
                )


@dataclass(frozen=True)
class Corpus:
    """All labelled passages that may be used, the validation ones apart, and the pool."""

    train: list[Labelled]
    valid: list[Labelled]
    pool: list[Passage]
    counts: Counter[str]


def load(data: Path) -> Corpus:
    """Read every set, leave out what is held out, and cut the validation part."""
    held, counts = HeldOut(data), Counter[str]()
    found: list[Labelled] = []
    for item in (*qed(data), *litm(data), *xquad(data), *hotpot(data)):
        if (item.question, item.text) in held:
            counts[f"{item.source}, held out"] += 1
        elif 1 in item.labels or item.source == "hotpot":
            found.append(item)
    valid = [x for x in found if x.source == "qed" and draw("valid", x.title) * VALID_EVERY < 1]
    grams: set[str] = set()
    for item in valid:
        grams |= fivegrams(item.text)
    chosen = {id(x) for x in valid}
    train = [x for x in found if id(x) not in chosen and overlap(x.text, grams) <= 0.3]
    counts["close to validation"] = len(found) - len(valid) - len(train)
    for item in train:
        counts[item.source + ("" if 1 in item.labels else ", no evidence")] += 1
    counts["validation"] = len(valid)
    return Corpus(train, valid, _pool(data, train, held, grams), counts)


def _pool(data: Path, train: list[Labelled], held: HeldOut, valid: set[str]) -> list[Passage]:
    pool: dict[str, Passage] = {}
    for item in train:
        pool.setdefault(normal(item.text), Passage(item.title, item.sentences))
    others = [
        (x["title"], pieces(x["text"]))
        for x in read_json(data / "rag_2wiki_corpus/2wikimultihopqa_corpus.json.gz")
    ]
    corpus = read_json(data / "rag_hotpotqa/hotpotqa_train_corpus.json.gz")
    others += [(title, tuple(sentences)) for title, sentences in corpus.items()]
    for title, sentences in others:
        text = "".join(sentences)
        free = ("", text) not in held and overlap(text, valid) <= 0.3
        if normal(text) and free:
            pool.setdefault(normal(text), Passage(title, sentences))
    return list(pool.values())


class Neighbours:
    """BM25 (k1 1.2, b 0.75) over the pool: passages near a question that do not answer it."""

    def __init__(self, pool: Sequence[Passage]) -> None:
        from scipy import sparse
        from sklearn.feature_extraction.text import CountVectorizer

        self.pool = pool
        self.text = [normal("".join(p.sentences)) for p in pool]
        titled = [f"{normal(p.title or '')} {t}" for p, t in zip(pool, self.text, strict=True)]
        self.vectoriser = CountVectorizer(token_pattern=r"\S+", dtype=np.float32)
        counts = self.vectoriser.fit_transform(titled).tocoo()
        length = np.bincount(counts.row, counts.data, len(pool))
        df = np.bincount(counts.col, minlength=counts.shape[1])
        idf = np.log(1 + (len(pool) - df + 0.5) / (df + 0.5))
        norm = 1.2 * (0.25 + 0.75 * length / length.mean())
        weight = counts.data * 2.2 / (counts.data + norm[counts.row]) * idf[counts.col]
        self.matrix = sparse.csr_matrix(
            (weight.astype(np.float32), (counts.row, counts.col)), counts.shape
        ).T.tocsr()

    def hard(self, items: Sequence[Labelled], count: int) -> list[list[int]]:
        """For each item, indices of near passages without its answer, nearest first."""
        found: list[list[int]] = []
        for at in range(0, len(items), 500):
            part = items[at : at + 500]
            asked = self.vectoriser.transform([normal(x.question) for x in part]) > 0
            score = (asked.astype(np.float32) @ self.matrix).toarray()
            for item, near in zip(part, np.argsort(-score, axis=1, kind="stable"), strict=True):
                found.append(self._others(item, near[:16].tolist())[:count])
        return found

    def _others(self, item: Labelled, near: Iterable[int]) -> list[int]:
        own, answers = normal(item.text), [a for a in map(normal, item.answers) if a]
        return [
            j
            for j in near
            if self.text[j] != own
            and (item.title is None or self.pool[j].title != item.title)
            and not any(a in self.text[j] for a in answers)
        ]


def plain(item: Labelled) -> Labelled:
    """The same in ordinary typography, half of the questions with a question mark."""
    mark = "?" if draw("mark", item.group) < 0.5 and not item.question.endswith("?") else ""
    return replace(
        item,
        question=item.question + mark,
        title=detokenise(item.title) if item.title else None,
        sentences=tuple(detokenise(s) for s in item.sentences),
        answers=tuple(detokenise(a) for a in item.answers),
    )


def training_rows(
    items: Sequence[Labelled], near: Neighbours, seed: int, negatives: float = NEGATIVES
) -> list[TrainRow]:
    """Rows of labelled passages, both typographies, with near and random negatives."""
    rows: list[TrainRow] = []
    for item, hard in zip(items, near.hard(items, HARD), strict=True):
        weight = 1.0 if len(item.sentences) > 1 else SINGLE
        if item.source == "qed":
            rows += [item.row(weight / 2), plain(item).row(weight / 2)]
        else:
            rows.append(item.row(weight))
        if 1 in item.labels:
            rows += negative_rows(item, hard, near.pool, negatives, seed)
    return rows


def negative_rows(
    item: Labelled, hard: Sequence[int], pool: Sequence[Passage], negatives: float, seed: int
) -> list[TrainRow]:
    """Passages of other questions, every sentence labelled 0."""
    far = [int(draw(seed, item.group, item.question, k) * len(pool)) for k in range(RANDOM)]
    far = [j for j in far if pool[j].title != item.title]
    share = [(j, 0.6 * negatives / len(hard)) for j in hard] + [
        (j, 0.4 * negatives / len(far)) for j in far
    ]
    return [
        row_of(
            item.question,
            pool[j].title,
            pool[j].sentences,
            [0] * len(pool[j].sentences),
            item.group,
            weight,
        )
        for j, weight in share
    ]
