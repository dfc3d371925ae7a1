"""What `prompt_quality.py` works on: few-shot tasks, candidate words, and the encoder.

The tasks are the 16-shot draws of RLPrompt's repository, five seeds each, beside the checkout
(../shared/data/cls_fewshot16, not shipped): TASK.16-SEED.train.tsv and .dev.tsv, TASK.test.tsv.gz,
a header, then `text<TAB>code` without quoting.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prunery.pipelines.prompts.clusters import cluster_words
from prunery.pipelines.prompts.draw import text_key
from prunery.pipelines.prompts.vocabulary import WordFilter, tokenizer_entries, vocabulary_rows
from prunery.pipelines.prompts.words import Shots
from prunery.pruners.models.token_rows import token_vectors
from prunery.pruners.signals.black_box import Template
from prunery.pruners.signals.encoder_labels import EncoderLabels
from prunery.storage import row_id

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "cls_fewshot16"
SEEDS = (100, 13, 21, 42, 87)
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Task:
    """A word for each class, in the order of the codes, and a prompt written by hand.

    Both were written down before anything was measured, and not changed after.
    """

    words: tuple[str, ...]
    manual: str
    own_validation: bool = True  # False: the dev files repeat the training rows


TASKS = {
    "sst-2": Task(("terrible", "great"), "This movie is"),
    "mr": Task(("terrible", "great"), "This movie is"),
    "cr": Task(("terrible", "great"), "This product is"),
    "subj": Task(("subjective", "objective"), "This sentence is", own_validation=False),
    "agnews": Task(("world", "sports", "business", "technology"), "This news is about"),
    "trec": Task(
        ("description", "entity", "abbreviation", "human", "location", "number"),
        "This question asks for a",
    ),
}


def read_rows(path: Path) -> list[tuple[str, int]]:
    """(text, code) of each row with a text.

    Raises
    ------
    ValueError
        A line is not a text and a code; the file and line are named.
    """
    raw = path.read_bytes()
    lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().split("\n")
    made = []
    for number, line in enumerate(lines[1:], 2):
        text, tab, code = line.rstrip("\r").rpartition("\t")
        if not line.strip():
            continue
        if not tab or not code.isdigit():
            raise ValueError(f"{path}, line {number}: expected text, tab and code; found {line!r}")
        if text.strip():
            made.append((text, int(code)))
    return made


def parts_of(
    name: str, seed: int, folder: Path, seeds: Sequence[int] | None = None
) -> dict[str, Shots]:
    """Rows to search on, to judge with and to test on; no text stands in two of them.

    subj's dev files repeat its training rows: there the rows to judge with are the first 16 a
    class of the other seeds' training files that are not among this seed's nor the test rows.
    """

    def file(at: int, part: str) -> list[tuple[str, int]]:
        return read_rows(folder / f"{name}.16-{at}.{part}.tsv")

    train, test = file(seed, "train"), read_rows(folder / f"{name}.test.tsv.gz")
    if TASKS[name].own_validation:
        judged = without(file(seed, "dev"), train)
    else:
        others = [row for at in seeds or SEEDS if at != seed for row in file(at, "train")]
        judged = without(others, [*train, *test])
    judged = first_of_class(judged, 16)
    return {
        "train": shots(without(train, [])),
        "validation": shots(judged),
        "test": shots(without(test, [*train, *judged])),
    }


def without(rows: Sequence[tuple[str, int]], seen: Sequence[tuple[str, int]]) -> list[Any]:
    """The rows whose text is not among the others', each text once."""
    known = {text_key(text) for text, _ in seen}
    made = []
    for text, code in rows:
        key = text_key(text)
        if key not in known:
            known.add(key)
            made.append((text, code))
    return made


def first_of_class(rows: Sequence[tuple[str, int]], most: int) -> list[tuple[str, int]]:
    """The first so many of each class."""
    count: Counter[int] = Counter()
    made = []
    for text, code in rows:
        count[code] += 1
        if count[code] <= most:
            made.append((text, code))
    return made


def shots(rows: Sequence[tuple[str, int]]) -> Shots:
    """Rows in the order of their shots, then of their classes."""
    count: Counter[int] = Counter()
    numbered = []
    for text, code in rows:
        numbered.append((count[code], code, text))
        count[code] += 1
    numbered.sort(key=lambda row: row[:2])
    return Shots(
        [text for _, _, text in numbered],
        np.array([code for _, code, _ in numbered], np.int64),
        np.array([shot for shot, _, _ in numbered], np.int64),
        np.array([row_id(text) for _, _, text in numbered], np.int64),
    )


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Candidate words by id, and how many the tokenizer had and were fit."""

    words: list[str]
    ids: Ints
    entries: int
    fit: int


def vocabulary(encoder: Any, clusters: int, path: Path) -> Vocabulary:
    """Words that stand for the clusters of the encoder's own vocabulary, made once."""
    if not path.exists():
        entries = tokenizer_entries(encoder.tokenizer, word_start=True)
        rows = vocabulary_rows(entries, WordFilter())
        fit = sorted((row["id"], row["text"]) for row in rows if row["keep"])
        ids = np.array([number for number, _ in fit], np.int64)
        texts = [text for _, text in fit]
        made = cluster_words(ids, token_vectors(encoder.folder, texts), clusters, seed=0)
        words = [texts[place] for place in np.flatnonzero(made.keep)]
        path.write_text(json.dumps({"words": words, "entries": len(rows), "fit": len(fit)}))
    told = json.loads(path.read_text())
    ids = np.array([row_id("prompt_word", word) for word in told["words"]], np.int64)
    return Vocabulary(told["words"], ids, told["entries"], told["fit"])


class Encoder:
    """The packaged all-MiniLM-L6-v2, texts of one length together, so that nothing is padded.

    The last `most` texts are kept with their vectors and tokens: seeds, spaces and searches ask
    about many of the same descriptions.
    """

    def __init__(self, dtype: str, *, most: int = 400_000, batch: int = 16_384) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        from prunery.pruners.models.encoders import PACKAGED_NAME, resolve_encoder

        self.folder = resolve_encoder(PACKAGED_NAME).path
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        self._model: Any = AutoModel.from_pretrained(
            self.folder, local_files_only=True, dtype=getattr(torch, dtype)
        ).eval()
        self._window, self._batch = 256, batch
        self._kept: OrderedDict[str, tuple[Floats, int]] = OrderedDict()
        self._most = most
        self.encoded = 0

    def encode(self, texts: list[str]) -> Floats:
        """Unit vectors (N, d) float32."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        if new:
            self._add(new)
        made = np.stack([self._kept[text][0] for text in texts])
        for text in texts:
            self._kept.move_to_end(text)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return made

    def count(self, texts: list[str]) -> Ints:
        """Tokens (N,) with their marks."""
        new = [text for text in texts if text not in self._kept]
        lengths = dict(zip(new, map(len, self._ids(new)), strict=True)) if new else {}
        return np.array(
            [self._kept[t][1] if t in self._kept else lengths[t] for t in texts], np.int64
        )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self._window)["input_ids"]  # type: ignore[no-any-return]

    def _add(self, texts: list[str]) -> None:
        import torch

        ids = self._ids(texts)
        for places in _same_length(ids, self._batch):
            batch = torch.tensor([ids[place] for place in places])
            with torch.inference_mode():
                hidden = self._model(input_ids=batch).last_hidden_state.float().mean(dim=1)
                vectors = torch.nn.functional.normalize(hidden, dim=1).numpy()
            for place, vector in zip(places, vectors, strict=True):
                self._kept[texts[place]] = vector.copy(), len(ids[place])
        self.encoded += len(texts)


def _same_length(ids: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for place, one in enumerate(ids):
        by_length.setdefault(len(one), []).append(place)
    for length, places in sorted(by_length.items()):
        step = max(1, tokens // length)
        for start in range(0, len(places), step):
            yield places[start : start + step]


def open_boxes(tasks: Sequence[str], encoder: Any) -> dict[str, EncoderLabels]:
    """The black box of each task; its texts are encoded once."""
    return {
        task: EncoderLabels(
            encoder.encode,
            encoder.count,
            TASKS[task].words,
            template=Template("{text}"),
            label_template=Template("{prompt} {label}"),
        )
        for task in tasks
    }
