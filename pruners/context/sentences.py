"""Sentence borders by rule: many scripts, no download, linear time.

`split_sentences` cuts a text into spans that cover it exactly: the whitespace after a sentence
belongs to it, so the concatenated slices are the text. Two levels: lines first (blank lines,
headings, bullets, table rows, code blocks), then punctuation inside each paragraph
(`punctuation.py`). Every expression here is anchored or has one quantifier over one class, so
hostile input costs linear time (tested with megabytes).

Departures from a trained splitter (Punkt, fast-bunkai): no model and no language argument; a
handful of abbreviation lists and the case of the next letter decide. `tests` hold the rules;
agreement with the borders of QED is measured in the tests where that data set is at hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from .punctuation import prose_borders

HARD_CAP = 1200
"""Longest sentence in characters, code blocks and table rows excepted: text without punctuation
is cut at the last newline, semicolon, comma or space before it, else mid-word."""

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})([^\n\r]*)")
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]|$)")
_BULLET = re.compile(
    r"[ \t]{0,12}(?:[-*+\u2022\u2023\u25e6\u25aa\u25cf\u25cb\u25a0\u25a1\u2013\u2014\u00b7\u30fb]"
    r"|\(?\d{1,3}[.)]|\(?[A-Za-z]\)|\(?(?:[ivx]{1,5}|[IVX]{2,5})[.)])[ \t]+\S"
)
_RULE_LINE = re.compile(r"[ \t]{0,3}[-=~^*_+#]{3,}[ \t]*$")
_CODE_MARK = re.compile(
    r"[{}\[\]=<>;\\$|^]|\w\(|>>>|\.\.\.|^\s*(?:#|//|--|/\*|%)|_\w|\w_|::|:\s*$|\w\.\w+\("
    r"|^\s*(?:def|class|if|elif|else|for|while|import|from|return|raise|try|except|with|let"
    r"|const|var|fn|func|public|private|static|void|int|print|echo|select|insert|update)\b"
)
_WORD = re.compile(r"\S{1,64}")
_SOFT_SPOT = re.compile(r"[\n\r]|[;；؛:：]\s|[,，、،]\s?|\s")
_GLUED = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0900-\u0903\u093a-\u094f"
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u200c\u200d\u20d0-\u20f0\ufe00-\ufe0f"
    "\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]"
)


class _Unit(NamedTuple):
    """A run of text that no sentence crosses; an atom is never cut further."""

    start: int
    end: int
    atom: bool


@dataclass(slots=True)
class _State:
    """What has been found out about later lines, so that no line is searched twice."""

    closers: dict[str, list[int]]
    not_code_before: int = 0


class _Line(NamedTuple):
    start: int
    end: int
    body: str  # without the line end


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Cut a text into sentences, as (start, end) character offsets in order.

    The spans cover the text exactly: `"".join(text[a:b] for a, b in spans) == text`. An empty
    text has no spans; a text of whitespace or punctuation alone has one. A piece without any
    letter or digit joins the sentence before it (the first one, the sentence after it).

    Whole, whatever they hold: fenced code blocks, indented blocks that look like code, table
    rows (`|` cells or three tab-separated cells) and Markdown headings. Each bullet or numbered
    line starts a sentence. A line end inside a paragraph is a border where the next word would
    have fitted on the line (so the author broke it), not where a text was wrapped to a width.
    """
    if not text:
        return []
    borders: list[int] = []
    for unit in _units(text):
        if unit.atom:
            borders.append(unit.end)
        else:
            _add_capped(text, unit.start, prose_borders(text, unit.start, unit.end), borders)
    return _join_wordless(text, borders)


def _units(text: str) -> list[_Unit]:
    if "\n" not in text and "\r" not in text and not _may_be_structured(text):
        return [_Unit(0, len(text), False)]
    lines = _lines(text)
    state = _State(_fence_closers(lines))
    units: list[_Unit] = []
    i = 0
    while i < len(lines):
        stop, made = _one_block(text, lines, i, state)
        units.extend(made)
        i = stop
    return units


def _may_be_structured(text: str) -> bool:
    return "|" in text or "\t" in text or text.lstrip()[:1] in {"#", "`", "~"} or text[:1] == " "


def _lines(text: str) -> list[_Line]:
    lines = []
    start = 0
    for raw in text.splitlines(keepends=True):
        end = start + len(raw)
        lines.append(_Line(start, end, raw.rstrip("\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")))
        start = end
    return lines


def _fence_closers(lines: list[_Line]) -> dict[str, list[int]]:
    """For each fence character, the longest closing fence at or after each line (0 = none)."""
    longest = {"`": [0] * (len(lines) + 1), "~": [0] * (len(lines) + 1)}
    for i in range(len(lines) - 1, -1, -1):
        for mark, best in longest.items():
            best[i] = best[i + 1]
            if mark * 3 in lines[i].body and (found := _FENCE.match(lines[i].body)):
                fence, rest = found[1], found[2]
                if fence[0] == mark and not rest.strip():
                    best[i] = max(best[i], len(fence))
    return longest


def _one_block(text: str, lines: list[_Line], i: int, state: _State) -> tuple[int, list[_Unit]]:
    """The block that starts at line i: (next line, its units)."""
    line = lines[i]
    if fence := _FENCE.match(line.body):
        # A fence that is never closed (a chunk border cut it off) opens nothing.
        mark, length = fence[1][0], len(fence[1])
        if state.closers[mark][i + 1] >= length:
            j = i + 1
            while not _closes(lines[j].body, mark, length):
                j += 1
            return j + 1, [_Unit(line.start, lines[j].end, True)]
    if not line.body.strip():
        return i + 1, [_Unit(line.start, line.end, True)]
    if _is_row(line.body) or _HEADING.match(line.body) or _FENCE.match(line.body):
        return i + 1, [_Unit(line.start, line.end, True)]
    if (stop := _indented_code(lines, i, state)) > i:
        return stop, [_Unit(line.start, lines[stop - 1].end, True)]
    stop = i + 1
    while stop < len(lines) and not _starts_block(lines[stop].body):
        stop += 1
    return stop, _paragraph(text, lines[i:stop])


def _closes(body: str, mark: str, length: int) -> bool:
    found = _FENCE.match(body)
    return bool(found and found[1][0] == mark and len(found[1]) >= length and not found[2].strip())


def _is_row(body: str) -> bool:
    stripped = body.strip()
    bars = stripped.count("|")
    if bars and (bars > 1 or stripped.startswith("|") or stripped.endswith("|")):
        return " | " in stripped or stripped.startswith("|") or stripped.endswith("|")
    return body.count("\t") > 1 and sum(1 for cell in body.split("\t") if cell.strip()) > 2


def _starts_block(body: str) -> bool:
    return (
        not body.strip()
        or bool(_BULLET.match(body))
        or bool(_HEADING.match(body))
        or bool(_FENCE.match(body))
        or _is_row(body)
    )


def _indent(body: str) -> int:
    width = 0
    for char in body:
        if char == " ":
            width += 1
        elif char == "\t":
            width += 4
        else:
            break
        if width >= 4:
            break
    return width


def _indented_code(lines: list[_Line], i: int, state: _State) -> int:
    """Line after the indented code block that starts at line i; i where there is none.

    Four columns after a blank line (or two after a line that ends in a colon), and at least
    half of its lines with a mark that prose lacks: indented prose stays prose.
    """
    if i < state.not_code_before:
        return i
    previous = lines[i - 1].body if i else ""
    before = lines[i - 2].body if i > 1 and not previous.strip() else previous
    least = 2 if before.rstrip().endswith(":") else 4
    if previous.strip() or _indent(lines[i].body) < least or _BULLET.match(lines[i].body):
        return i
    j = last = i
    marked = filled = 0
    depth = _indent(lines[i].body)
    while j < len(lines):
        body = lines[j].body
        if body.strip():
            # After a blank line, what stands further left is the prose around the block.
            if _indent(body) < (least if lines[j - 1].body.strip() else depth):
                break
            last = j + 1
            filled += 1
            marked += bool(_CODE_MARK.search(body[:400]))
        elif j + 1 < len(lines) and not lines[j + 1].body.strip():
            break
        j += 1
    if marked * 2 >= filled:
        return last
    state.not_code_before = last
    return i


def _paragraph(text: str, lines: list[_Line]) -> list[_Unit]:
    """Units of a paragraph: one, unless its author broke lines on purpose."""
    units = []
    start = lines[0].start
    width = max(len(line.body) for line in lines)
    # A bullet's own lines hang deeper than its mark.
    hang = _indent(lines[0].body) if _BULLET.match(lines[0].body) else None
    for line, after in pairwise(lines):
        if _RULE_LINE.match(after.body) or (hang is not None and _indent(after.body) > hang):
            continue
        if _RULE_LINE.match(line.body) or _broken_on_purpose(line.body, after.body, width):
            units.append(_Unit(start, line.end, False))
            start = line.end
    units.append(_Unit(start, lines[-1].end, False))
    return units


def _broken_on_purpose(body: str, after: str, width: int) -> bool:
    head = after.lstrip()
    word = _WORD.match(head)
    first = len(word[0]) if word else 0
    if head[:1].islower() and len(body) >= 30:
        return False
    if width < 40:
        return True
    cjk = "\u3000" <= head[:1] <= "\u9fff"
    return len(body) + 1 + (1 if cjk else first) <= width


def _add_capped(text: str, start: int, found: list[int], borders: list[int]) -> None:
    for end in found:
        while end - start > HARD_CAP:
            start = _soft_cut(text, start)
            borders.append(start)
        borders.append(end)
        start = end


def _soft_cut(text: str, start: int) -> int:
    """A border in (start, start + HARD_CAP]: the best kind of gap in the second half."""
    stop = start + HARD_CAP
    best = (0, 0)
    for gap in _SOFT_SPOT.finditer(text, start + HARD_CAP // 2, stop):
        mark = gap[0][0]
        kind = 3 if mark in "\n\r" else 2 if mark in ";；؛:：" else 1
        best = max(best, (kind, gap.end()))
    if best[1]:
        return best[1]
    # Never between a character and the marks that ride on it (accents, joiners, skin tones).
    for back in range(32):
        cut = stop - back
        if not _GLUED.match(text, cut) and text[cut - 1] != "\u200d":
            return cut
    return stop


def _join_wordless(text: str, borders: list[int]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    start = 0
    words = False  # whether the open span holds a letter or digit
    for end in borders:
        has = any(map(str.isalnum, text[start:end]))
        if not has and spans:
            spans[-1] = (spans[-1][0], end)
        elif spans and not words:
            spans[-1] = (spans[-1][0], end)
            words = has
        else:
            spans.append((start, end))
            words = has
        start = end
    return spans
