"""Documents cut into chunks: sections first, then whole sentences up to a number of tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from ..pruners.context.sentences import split_sentences
from .sources import Document

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ATX = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$")
_UNDERLINE = re.compile(r"([=\-*~^\"'+#_`.:])\1{2,}[ \t]*$")
_JOIN = " > "


class TokenCounter(Protocol):
    """What chunking needs of a tokenizer."""

    def offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Character spans of the tokens of each text, without special tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Section:
    """Text under one heading: `start:end` of the document, and the headings above, outermost
    first, joined by " > "."""

    start: int
    end: int
    title: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """`start:end` of the document's text (white space trimmed), its title and its tokens.

    `sentence_ends` are the ends of its sentences, relative to `start`; the last is its length.
    They are the borders found in the whole document: a chunk cut from it would be split in
    other places where it starts or ends within a line.
    """

    start: int
    end: int
    title: str
    tokens: int
    sentence_ends: tuple[int, ...]


class FastTokenCounter:
    """Token spans by the `tokenizer.json` in a model folder."""

    def __init__(self, folder: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        # Packaged files carry the truncation and padding of their own training.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Character spans of the tokens of each text, without special tokens."""
        made = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.offsets for encoding in made]


@lru_cache(maxsize=2)
def token_counter(folder: str) -> FastTokenCounter:
    """The counter of a model folder, read once a process."""
    return FastTokenCounter(folder)


def sections(document: Document) -> list[Section]:
    """Sections in order, empty ones left out; heading lines belong to no section's text.

    Headings are ATX (`#`) and underlined ones in Markdown, underlined ones in text, h1..h6 in
    HTML. A line of code inside a fence is no heading. In text, the rank of an underline is
    the order in which its character first appears, as in reStructuredText.
    """
    text = document.text
    if document.format == "html":
        marks = [(s, e, level, _line(text[s:e])) for s, e, level in document.headings]
    else:
        marks = list(_headings(text, markdown=document.format == "markdown"))
    made: list[Section] = []
    stack: list[tuple[int, str]] = [(0, document.title)] if document.title else []
    start = 0
    for mark_start, mark_end, level, title in [*marks, (len(text), len(text), 0, "")]:
        if text[start:mark_start].strip():
            made.append(Section(start, mark_start, _path(stack)))
        if level:
            stack = [entry for entry in stack if entry[0] < level]
            stack.append((level, title))
        start = mark_end
    return made


def _path(stack: Sequence[tuple[int, str]]) -> str:
    names: list[str] = []
    for _, name in stack:
        # A page's title element and its first heading are often the same words.
        if name and (not names or names[-1] != name):
            names.append(name)
    return _JOIN.join(names)


def _line(text: str) -> str:
    return " ".join(text.split())


def _headings(text: str, *, markdown: bool) -> Iterator[tuple[int, int, int, str]]:
    """(start, end, level from 1, words) of each heading's lines."""
    ranks: dict[str, int] = {"=": 1, "-": 2} if markdown else {}
    fence = ""
    before_blank = True
    start = 0
    lines = text.splitlines(keepends=True)
    for index, line in enumerate(lines):
        end = start + len(line)
        body = line.rstrip("\r\n")
        opened = _FENCE.match(body) if markdown else None
        if opened and (not fence or opened[1].startswith(fence)):
            fence = "" if fence else opened[1]
        elif not fence and (found := _ATX.match(body) if markdown else None):
            if found[2].strip():
                yield start, end, len(found[1]), _line(found[2])
        elif not fence and before_blank and index + 1 < len(lines):
            under = lines[index + 1].rstrip("\r\n")
            mark = _UNDERLINE.match(under)
            if mark and _underlines(body, under.rstrip(), markdown, mark[1]):
                level = ranks.setdefault(mark[1], len(ranks) + 1)
                yield start, end + len(lines[index + 1]), level, _line(body)
        before_blank = not body.strip()
        start = end


def _underlines(body: str, under: str, markdown: bool, mark: str) -> bool:
    if not body.strip() or body[0].isspace() or _UNDERLINE.match(body):
        return False
    if markdown:
        return mark in "=-" and not body.lstrip().startswith(("-", "*", "+", ">", "|", "`"))
    # Text has many rows of dashes; a heading's underline is about as long as its words.
    return len(body.strip()) <= len(under) <= len(body.strip()) + 4


def chunk_document(
    document: Document, counter: TokenCounter, *, max_tokens: int, overlap: int = 0
) -> list[Chunk]:
    """Cut a document into chunks of at most `max_tokens` tokens.

    Chunks never cross a section and end at a sentence's end; a sentence longer than the limit
    is cut between tokens. The chunks of a section are of about equal length, so no short tail
    is left over. `overlap` sentences of a chunk are repeated at the start of the next of the
    same section, where they fit.
    """
    spans: list[tuple[int, int]] = []
    owner: list[int] = []
    found = sections(document)
    for index, section in enumerate(found):
        body = document.text[section.start : section.end]
        for start, end in split_sentences(body):
            spans.append((section.start + start, section.start + end))
            owner.append(index)
    tokens = counter.offsets([document.text[start:end] for start, end in spans])
    units: list[list[tuple[int, int, int]]] = [[] for _ in found]
    for (start, end), offsets, index in zip(spans, tokens, owner, strict=True):
        units[index].extend(_units(start, end, offsets, max_tokens))
    made: list[Chunk] = []
    for section, parts in zip(found, units, strict=True):
        for first, last in _pack([n for _, _, n in parts], max_tokens, overlap):
            chunk = _chunk(document.text, parts[first:last], section.title)
            if chunk is not None:
                made.append(chunk)
    return made


def _chunk(text: str, units: Sequence[tuple[int, int, int]], title: str) -> Chunk | None:
    """Neighbouring units as one chunk without the white space around it; None if that is all."""
    body = text[units[0][0] : units[-1][1]]
    start = units[0][0] + len(body) - len(body.lstrip())
    stop = start + len(body.strip())
    if stop <= start:
        return None
    ends = [min(end, stop) - start for _, end, _ in units]
    # Units of white space alone have gone with the trimming.
    distinct = [end for end, before in zip(ends, [0, *ends], strict=False) if end > before]
    return Chunk(start, stop, title, sum(n for _, _, n in units), tuple(distinct))


def _units(
    start: int, end: int, offsets: Sequence[tuple[int, int]], limit: int
) -> Iterator[tuple[int, int, int]]:
    """(start, end, tokens) of a sentence, or of its fragments where it is too long."""
    n = len(offsets)
    if n <= limit:
        yield start, end, n
        return
    pieces = math.ceil(n / limit)
    # Cut at the first character of a token, so that fragments cover the sentence.
    cuts = [offsets[round(i * n / pieces)][0] for i in range(1, pieces)]
    counts = [round((i + 1) * n / pieces) - round(i * n / pieces) for i in range(pieces)]
    borders = [start, *(start + cut for cut in cuts), end]
    for a, b, count in zip(borders[:-1], borders[1:], counts, strict=True):
        if b > a:
            yield a, b, count


def _pack(counts: Sequence[int], limit: int, overlap: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the sentences of each chunk: greedy towards equal lengths."""
    first = 0
    while first < len(counts):
        # Of what is left, so that no short tail remains.
        left = sum(counts[first:])
        target = math.ceil(left / max(1, math.ceil(left / limit)))
        size = 0
        last = first
        while last < len(counts) and size + counts[last] <= limit:
            # Stop before a sentence that would overshoot the target by more than it lacks.
            if size and size + counts[last] - target > target - size:
                break
            size += counts[last]
            last += 1
        if last == first:  # one unit is never longer than the limit, but counts may be odd
            last = first + 1
        yield first, last
        if last >= len(counts):
            return
        back = min(overlap, last - first - 1)
        while back and sum(counts[last - back : last]) + counts[last] > limit:
            back -= 1
        first = last - back
