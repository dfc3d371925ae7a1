"""The words that a prompt may be made of: a tokenizer's entries, or a file's, and which are fit.

The published filter drops special tokens and those that do not start a word, and no others: that
is `letters_only: false` with `least_characters: 1`. Every entry becomes a row, kept or not, with
the first of these reasons that holds:

special         a special token of the tokenizer, or one that BERT's vocabularies hold in reserve
added           put in beside the vocabulary
not_word_start  continues a word
undecodable     not whole UTF-8 characters
control         holds an unseen character (Unicode classes C and Z, but for spaces in a phrase)
empty           is nothing, or white space
not_letters     holds something that is no letter (a phrase: in one of its words)
too_short       has too few characters
no_match        is not what `pattern` describes
duplicate       reads as an entry before it that was fit
too_many        is behind the first `most` that were fit
word            fit
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...storage import row_id

WORD = "word"
_RESERVED = re.compile(r"\[unused\d+\]")
_MARKS = ("▁", "Ġ")  # SentencePiece, byte-level BPE


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry before the filters on its text; `reason` is "" where nothing speaks against it."""

    token: str
    token_id: int
    text: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WordFilter:
    """What the text of an entry has to be like; see the module for the reasons."""

    letters_only: bool = True
    least_characters: int = 2
    pattern: str | None = None
    most: int | None = None

    def reason(self, text: str) -> str:
        """Why a text alone is not fit; "" where it is."""
        if not text.strip():
            return "empty"
        if "\ufffd" in text:
            return "undecodable"
        if any(unicodedata.category(c)[0] in "CZ" for c in text if c != " "):
            return "control"
        if self.letters_only and not all(part.isalpha() for part in text.split()):
            return "not_letters"
        if len(text) < self.least_characters:
            return "too_short"
        if self.pattern is not None and not re.fullmatch(self.pattern, text):
            return "no_match"
        return ""


def vocabulary_rows(entries: Iterable[Entry], wanted: WordFilter) -> list[dict[str, Any]]:
    """A row of `tables.VOCABULARY` for every entry, in the order given (that of token ids).

    The id of a kept row is `row_id("prompt_word", text)`, so that a word has the same id whatever
    vocabulary it comes from; that of another row has the entry's place in it too.

    Raises
    ------
    InputError
        No entry is fit; the reasons are counted.
    """
    made: list[dict[str, Any]] = []
    seen: set[str] = set()
    for place, entry in enumerate(entries):
        reason = entry.reason or wanted.reason(entry.text)
        if not reason and entry.text in seen:
            reason = "duplicate"
        elif not reason and wanted.most is not None and len(seen) >= wanted.most:
            reason = "too_many"
        keep = not reason
        if keep:
            seen.add(entry.text)
        number = row_id("prompt_word", entry.text, *(() if keep else (place,)))
        made.append(
            {
                "id": number,
                "token": entry.token,
                "token_id": entry.token_id,
                "text": entry.text,
                "keep": keep,
                "reason": reason or WORD,
            }
        )
    if not seen:
        found = Counter(row["reason"] for row in made)
        raise InputError(
            "expected words to make prompts of; found none among"
            f" {len(made)} entries ({', '.join(f'{n} {r}' for r, n in found.most_common())})."
            " Allow more with `letters_only`, `least_characters`, `word_start` or `pattern`, or"
            " give a file of words."
        )
    return made


# -- a tokenizer ---------------------------------------------------------------------------------


def tokenizer_entries(tokenizer: Any, *, word_start: bool) -> Iterator[Entry]:
    """Entries of a fast tokenizer by token id; `word_start` drops those that continue a word.

    The text is what the entry decodes to, without white space around it, and without the mark of
    a continued word.

    Raises
    ------
    InputError
        `word_start`, and the tokenizer does not mark where words start (or marks their ends).
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    names = {number: name for name, number in tokenizer.get_vocab().items()}
    starts, text_of = _style(tokenizer, state, names.values(), word_start)
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    for number in sorted(names):
        name = names[number]
        reason = ""
        if number in special or _RESERVED.fullmatch(name):
            reason = "special"
        elif number in added:
            reason = "added"
        elif word_start and not starts(name):
            reason = "not_word_start"
        yield Entry(name, number, name if reason == "special" else text_of(number, name), reason)


def _style(
    tokenizer: Any, state: dict[str, Any], names: Iterable[str], word_start: bool
) -> tuple[Callable[[str], bool], Callable[[int, str], str]]:
    """Whether a token starts a word, and the text of a token, as the kind of model has it."""
    kind = state.get("type") or ("BPE" if "merges" in state else "WordPiece")
    if kind in ("WordPiece", "WordLevel"):
        prefix = (state.get("continuing_subword_prefix") or "") if kind == "WordPiece" else ""
        return (
            lambda name: not (prefix and name.startswith(prefix)),
            lambda number, name: name.removeprefix(prefix).strip(),
        )
    backend = tokenizer.backend_tokenizer

    found = Counter(name[0] for name in names if name[:1] in _MARKS)
    if not found and word_start:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r}: expected marks where words start"
            f" ({' or '.join(_MARKS)}, or WordPiece), found none. Set `word_start: false`, or give"
            " a file of words."
        )
    mark = max(_MARKS, key=lambda one: found[one])

    def text_of(number: int, name: str) -> str:
        text = str(backend.decode([number], skip_special_tokens=False)).strip()
        return text.removeprefix(mark)  # is still there where the tokenizer has no decoder

    return (lambda name: name.startswith(mark)), text_of


# -- a file --------------------------------------------------------------------------------------


def file_entries(path: Path) -> Iterator[Entry]:
    """One entry for each line of a UTF-8 file: a word or phrase, white space around it cut off.

    Raises
    ------
    InputError
        There is no such file, or a line is not UTF-8.
    """
    for number, line in enumerate(_lines(path), 1):
        try:
            text = line.decode("utf-8").removeprefix("\ufeff").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}, line {number}: expected UTF-8, found other bytes at"
                f" {error.start}. Save the file as UTF-8."
            ) from error
        yield Entry(text, -1, " ".join(text.split()))


def _lines(path: Path) -> Sequence[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(
            f"{path}: expected a file with a word a line, found {error.strerror or error}. Look at"
            " `path`."
        ) from error
