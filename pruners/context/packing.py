"""From text to blocks of tokens that fit the window: nothing is tokenised twice, nothing lost.

A passage is cut into sentences, every distinct sentence is tokenised once, and a passage's ids
are its sentences' ids end to end. A block is then a range of that array, so that a token's
probability goes back to its place by the same range, whatever the block it was scored in.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...errors import InputError, ModelError
from ..contract import Array, IntArray
from .sentences import split_sentences

Span = tuple[int, int]

_SURROGATES = dict.fromkeys(range(55296, 57344), "�")
_PUNCTUATION = {ord(char): None for char in string.punctuation}


class PackingConfig(Protocol):
    """What packing reads of a checkpoint's config (`ProvenceConfig` has it)."""

    @property
    def max_length(self) -> int:
        """Tokens in one window, special tokens included."""

    @property
    def pair(self) -> Any:
        """How question and passage are joined."""

    @property
    def token_types(self) -> bool:
        """Whether the passage has token type 1."""

    @property
    def normalise_question(self) -> bool:
        """Whether questions are lower-cased and stripped of ASCII punctuation."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Special tokens around a pair, and how the window is shared out.

    A block is `head question middle title? sentences tail`. The question is cut at its tail so
    that title and sentences keep at least half of the window; the title is cut so that it takes
    at most a quarter of what they have.
    """

    head: tuple[int, ...]
    middle: tuple[int, ...]
    tail: tuple[int, ...]
    pad: int
    max_length: int
    token_types: bool
    normalise_question: bool

    @classmethod
    def of(cls, tokenizer: Any, config: PackingConfig) -> Frame:
        """Read the special ids of a tokenizer; raises ModelError where one is missing."""
        first, last = _special(tokenizer, "cls", "bos"), _special(tokenizer, "sep", "eos")
        twice = config.pair == "cls_q_sep_sep_p_sep"
        pad = tokenizer.pad_token_id
        return cls(
            head=(first,),
            middle=(last, last) if twice else (last,),
            tail=(last,),
            pad=0 if pad is None else int(pad),
            max_length=config.max_length,
            token_types=config.token_types,
            normalise_question=config.normalise_question,
        )

    @property
    def room(self) -> int:
        """Tokens of a window left to question, title and sentences."""
        return self.max_length - len(self.head) - len(self.middle) - len(self.tail)

    @property
    def question_cap(self) -> int:
        """Most tokens of a question."""
        return max(1, self.room - (self.max_length + 1) // 2)

    def title_cap(self, question_tokens: int) -> int:
        """Most tokens of a title beside a question of that length (after its cut)."""
        return (self.room - question_tokens) // 4


def _special(tokenizer: Any, *names: str) -> int:
    for name in names:
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is not None:
            return int(found)
    raise ModelError(
        f"the tokenizer has no {' or '.join(names)} token, which the pair layout needs."
        " Use the tokenizer that the checkpoint was trained with."
    )


class TokenSource:
    """Ids of texts without special tokens, each distinct text encoded once a call.

    Holds its own copy of a fast tokenizer's core with truncation and padding off, so that
    neither the state of the caller's tokenizer nor threads matter.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._slow = tokenizer
        self._fast: Any = None
        if getattr(tokenizer, "is_fast", False):
            from tokenizers import Tokenizer

            self._fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._fast.no_truncation()
            self._fast.no_padding()

    def encode(self, texts: Sequence[str]) -> list[IntArray]:
        """Ids of each text, (n_i,) int64; lone surrogates are read as U+FFFD."""
        if not texts:
            return []
        clean = [_encodable(text) for text in texts]
        if self._fast is None:
            made = self._slow(clean, add_special_tokens=False, truncation=False)["input_ids"]
            return [np.asarray(ids, dtype=np.int64) for ids in made]
        encoded = self._fast.encode_batch_fast(clean, add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int64) for one in encoded]


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.translate(_SURROGATES)
    return text


@dataclass(frozen=True, slots=True)
class Pair:
    """One question with one passage; `sentences` are given borders, else they are found."""

    question: str
    passage: str
    title: str | None = None
    sentences: tuple[Span, ...] | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """Tokens and blocks of P pairs with S sentences and T passage tokens in all.

    Titles are no sentences here; they stand in `title_ids` and are scored in the first block.

    Attributes
    ----------
    spans
        (S, 2) int64, character borders in the passage.
    sentence_offset
        (P + 1,) int64, borders of each pair's sentences.
    token_offset
        (S + 1,) int64, borders of each sentence's tokens in `ids`.
    ids
        (T,) int64, the passages' tokens end to end.
    question_ids, title_ids
        For each pair, already cut to their caps; no title is an empty array.
    title_tokens
        (P,) int64, tokens of the whole title, before the cut.
    truncated
        (P,) bool, the question or the title was cut.
    block_pair, block_start, block_end
        (B,) int64: the pair of each block and its range of `ids`; blocks of a pair stand
        together and in order.
    """

    frame: Frame
    spans: IntArray
    sentence_offset: IntArray
    token_offset: IntArray
    ids: IntArray
    question_ids: list[IntArray]
    title_ids: list[IntArray]
    title_tokens: IntArray
    truncated: Array
    block_pair: IntArray
    block_start: IntArray
    block_end: IntArray

    @property
    def block_length(self) -> IntArray:
        """(B,) int64, tokens of each block with question, title and special tokens."""
        frame = self.frame
        fixed = len(frame.head) + len(frame.middle) + len(frame.tail)
        around = np.array(
            [len(q) + len(t) for q, t in zip(self.question_ids, self.title_ids, strict=True)],
            np.int64,
        )
        if not len(self.block_pair):
            return np.zeros(0, np.int64)
        return np.asarray(
            fixed + around[self.block_pair] + self.block_end - self.block_start, np.int64
        )

    def write_block(self, block: int, ids: Array, types: Array) -> int:
        """Fill one row of ids and token types (T,), both already padded; return its length."""
        pair = int(self.block_pair[block])
        body = self.ids[self.block_start[block] : self.block_end[block]]
        question, title = self.question_ids[pair], self.title_ids[pair]
        at = 0
        for piece in (self.frame.head, question, self.frame.middle, title, body, self.frame.tail):
            ids[at : at + len(piece)] = piece
            at += len(piece)
        if self.frame.token_types:
            types[self.question_end(pair) : at] = 1
        return at

    def question_end(self, pair: int) -> int:
        """Place in a block's row where the title or the first sentence stands."""
        frame = self.frame
        return len(frame.head) + len(self.question_ids[pair]) + len(frame.middle)

    def body_start(self, pair: int) -> int:
        """Place in a block's row where the sentences start."""
        return self.question_end(pair) + len(self.title_ids[pair])


def pack(pairs: Sequence[Pair], source: TokenSource, frame: Frame) -> Packed:
    """Cut, tokenise and pack pairs; a passage without a token has no block.

    Sentences fill a block greedily; one that does not fit opens the next, and one longer than a
    whole block's room is cut into pieces of that room. The concatenated blocks of a pair are its
    passage's tokens, each exactly once.

    Raises
    ------
    InputError
        Given sentence borders do not cover their passage in order.
    """
    split: dict[str, tuple[Span, ...]] = {}
    spans: list[tuple[Span, ...]] = []
    for number, pair in enumerate(pairs):
        if pair.sentences is not None:
            spans.append(_checked(pair.sentences, len(pair.passage), number))
            continue
        if pair.passage not in split:
            split[pair.passage] = tuple(split_sentences(pair.passage))
        spans.append(split[pair.passage])
    known = _encode_all(pairs, spans, source, frame)
    return _assemble(pairs, spans, known, frame)


def _checked(spans: tuple[Span, ...], length: int, number: int) -> tuple[Span, ...]:
    at = 0
    for start, end in spans:
        if start != at or end <= start:
            raise InputError(
                f"sentence borders of passage {number}: expected spans that cover it in order,"
                f" found ({start}, {end}) after {at}. Give (start, end) pairs without gaps."
            )
        at = end
    if at != length:
        raise InputError(
            f"sentence borders of passage {number} end at {at}; its text has {length} characters."
        )
    return spans


def _sentence_texts(passage: str, spans: Iterable[Span]) -> list[str]:
    """Texts as the tokenizer sees them: the first bare, later ones with the one space before
    them that stood between (byte-level tokenizers see a difference), none in scripts without."""
    texts = []
    spaced = False
    for start, end in spans:
        raw = passage[start:end]
        bare = raw.strip()
        texts.append(" " + bare if spaced and bare else bare)
        spaced = raw[-1:].isspace()
    return texts


def _question_text(question: str, frame: Frame) -> str:
    if not frame.normalise_question:
        return question
    return " ".join(question.lower().translate(_PUNCTUATION).split())


@dataclass(frozen=True, slots=True)
class _Known:
    ids: dict[str, IntArray]
    texts: dict[tuple[str, tuple[Span, ...]], list[str]]


def _encode_all(
    pairs: Sequence[Pair], spans: Sequence[tuple[Span, ...]], source: TokenSource, frame: Frame
) -> _Known:
    texts: dict[tuple[str, tuple[Span, ...]], list[str]] = {}
    distinct: dict[str, None] = {}
    for pair, found in zip(pairs, spans, strict=True):
        key = (pair.passage, found)
        if key not in texts:
            texts[key] = _sentence_texts(*key)
            distinct.update(dict.fromkeys(texts[key]))
        distinct[_question_text(pair.question, frame)] = None
        if pair.title:
            distinct[pair.title.strip()] = None
    listed = list(distinct)
    return _Known(dict(zip(listed, source.encode(listed), strict=True)), texts)


def _assemble(
    pairs: Sequence[Pair], spans: Sequence[tuple[Span, ...]], known: _Known, frame: Frame
) -> Packed:
    none = np.zeros(0, np.int64)
    pieces: list[IntArray] = []
    lengths: list[int] = []
    questions, titles, title_tokens, truncated = [], [], [], []
    blocks: list[tuple[int, int, int]] = []
    at = 0
    for number, (pair, found) in enumerate(zip(pairs, spans, strict=True)):
        question = known.ids[_question_text(pair.question, frame)]
        title = known.ids[pair.title.strip()] if pair.title else none
        cut_question = question[: frame.question_cap]
        cut_title = title[: frame.title_cap(len(cut_question))]
        ids = [known.ids[text] for text in known.texts[pair.passage, found]]
        sizes = [len(one) for one in ids]
        room = frame.room - len(cut_question) - len(cut_title)
        blocks += [(number, at + a, at + b) for a, b in _blocks(sizes, room)]
        at += sum(sizes)
        pieces += ids
        lengths += sizes
        questions.append(cut_question)
        titles.append(cut_title)
        title_tokens.append(len(title))
        truncated.append(len(cut_question) < len(question) or len(cut_title) < len(title))
    counts = [len(found) for found in spans]
    table = np.array(blocks, np.int64).reshape(-1, 3)
    flat = [span for found in spans for span in found]
    return Packed(
        frame=frame,
        spans=np.array(flat, np.int64).reshape(-1, 2),
        sentence_offset=_offsets(counts),
        token_offset=_offsets(lengths),
        ids=np.concatenate(pieces) if pieces else none,
        question_ids=questions,
        title_ids=titles,
        title_tokens=np.array(title_tokens, np.int64),
        truncated=np.array(truncated, np.bool_),
        block_pair=table[:, 0],
        block_start=table[:, 1],
        block_end=table[:, 2],
    )


def _offsets(counts: Sequence[int]) -> IntArray:
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)


def _blocks(sizes: Sequence[int], room: int) -> list[Span]:
    """Ranges of at most `room` tokens over sentences of these sizes."""
    total = sum(sizes)
    if total <= room:
        return [(0, total)] if total else []
    made: list[Span] = []
    start = at = 0
    for size in sizes:
        if at + size - start > room:
            if at > start:
                made.append((start, at))
                start = at
            while at + size - start > room:
                made.append((start, start + room))
                start += room
        at += size
    if at > start:
        made.append((start, at))
    return made
