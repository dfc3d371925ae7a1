"""Text of an HTML page, each character with its place in the source."""

from __future__ import annotations

import html
from array import array
from dataclasses import dataclass
from html.parser import HTMLParser

_SKIP = frozenset({"script", "style", "template", "noscript", "svg", "math", "iframe", "object"})
_BLOCK = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "br",
        "dd",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "li",
        "main",
        "nav",
        "ol",
        "option",
        "p",
        "pre",
        "section",
        "select",
        "table",
        "tbody",
        "td",
        "th",
        "thead",
        "tfoot",
        "tr",
        "ul",
    ]
)
_PARAGRAPH = frozenset(
    [
        "p",
        "pre",
        "table",
        "ul",
        "ol",
        "dl",
        "blockquote",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "section",
    ]
)
_HEADINGS = {f"h{level}": level for level in range(1, 7)}


@dataclass(frozen=True, slots=True)
class HtmlText:
    """What a page says.

    Attributes
    ----------
    text
        Visible text; runs of white space are one space outside `pre`, blocks end with a newline.
    offsets
        For each character of `text`, the character offset in the source that it comes from.
    title
        The `title` element, or "".
    headings
        (start, end, level) in `text` of each h1..h6.
    """

    text: str
    offsets: array[int]
    title: str
    headings: list[tuple[int, int, int]]


def html_text(source: str) -> HtmlText:
    """Extract the visible text of a page; broken markup is read as browsers would, roughly."""
    reader = _Reader(source)
    reader.feed(source)
    reader.close()
    return HtmlText(
        "".join(reader.out), reader.offsets, " ".join(reader.title.split()), reader.headings
    )


class _Reader(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=False)
        self._line_starts = [0]
        at = source.find("\n")
        while at >= 0:
            self._line_starts.append(at + 1)
            at = source.find("\n", at + 1)
        self.out: list[str] = []
        self.offsets: array[int] = array("q")
        self.title = ""
        self.headings: list[tuple[int, int, int]] = []
        self._skip: list[str] = []
        self._in_title = False
        self._pre = 0
        self._heading: tuple[str, int] | None = None

    def _at(self) -> int:
        line, column = self.getpos()
        return self._line_starts[line - 1] + column

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIP:
            self._skip.append(tag)
        elif tag == "title":
            self._in_title = True
        if tag in _BLOCK:
            self._break(paragraph=tag in _PARAGRAPH)
        if tag == "pre":
            self._pre += 1
        if tag in _HEADINGS:
            self._heading = (tag, len(self.out))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCK:
            self._break(paragraph=False)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skip:
            # An unclosed inner element ends with the outer one.
            while self._skip.pop() != tag:
                pass
        elif tag == "title":
            self._in_title = False
        if tag == "pre" and self._pre:
            self._pre -= 1
        if self._heading is not None and tag == self._heading[0]:
            start = self._heading[1]
            if "".join(self.out[start:]).strip():
                self.headings.append((start, len(self.out), _HEADINGS[tag]))
            self._heading = None
        if tag in _BLOCK:
            self._break(paragraph=tag in _PARAGRAPH)

    def handle_data(self, data: str) -> None:
        start = self._at()
        for index, character in enumerate(data):
            self._put(character, start + index)

    def handle_entityref(self, name: str) -> None:
        self._reference(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self._reference(f"&#{name};")

    def _reference(self, written: str) -> None:
        start = self._at()
        for character in html.unescape(written):
            self._put(character, start)

    def _put(self, character: str, offset: int) -> None:
        if self._skip:
            return
        if self._in_title:
            self.title += character
            return
        # A no-break space is content, not layout.
        if character.isspace() and character != "\xa0" and not self._pre:
            if not self.out or self.out[-1] in " \n":
                return
            character = " "
        self.out.append(character)
        self.offsets.append(offset)

    def _break(self, *, paragraph: bool) -> None:
        wanted = 2 if paragraph else 1
        if not self.out or self._skip:
            return
        if self.out[-1] == " " and not self._pre:
            self.out.pop()
            self.offsets.pop()
        have = 0
        while have < min(wanted, len(self.out)) and self.out[-1 - have] == "\n":
            have += 1
        for _ in range(wanted - have if self.out else 0):
            self.out.append("\n")
            self.offsets.append(self._at())
