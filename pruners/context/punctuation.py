"""Sentence borders inside one paragraph: which full stop ends a sentence and which does not.

Candidates are found by one scan for terminators; each is judged by its near neighbourhood
(the token before, closing quotes and brackets, the first character after), so the cost is
linear in the text whatever it holds.
"""

from __future__ import annotations

import re
from functools import cached_property

# Terminators that need no space after them (CJK, Devanagari, Khmer, Burmese, Ethiopic, ...).
_FULL = "。！？｡．︒\u0964\u0965\u17d4\u17d5\u104b\u1362\u1367\u1368\u0589"
_ARABIC = "\u061f\u06d4\u061b"
_SCAN = re.compile(
    rf"(?P<full>[{_FULL}]+)"
    r"|(?P<dots>\.(?:[ \u00a0]?\.)+|\u2026[.\u2026]*)"
    r"|(?P<dot>\.)"
    rf"|(?P<mark>[!?\u203d\u2047-\u2049{_ARABIC}]+(?: ?[.!?])*)"
    r"|(?P<gap>(?<=[\u0e00-\u0eff])[ \t\u00a0\r\n]+(?=[\u0e00-\u0eff]))"
)
_CLOSERS = re.compile(
    r"(?:''|[\"'”’»›)\]}」』）】》〉〕＂]|\[(?:\d{1,4}|[a-z]|note \d{1,3}|citation needed)\])*"
)
_CLOSER_AFTER_SPACE = re.compile(r"[ \u00a0](?:''|[”’»)\]])(?=\s|$)")
_SPACE = re.compile(r"\s*")
_OPENERS = "\"'“‘„‚«‹([{「『（【《〈〔¿¡`"
_JAPANESE_QUOTED = re.compile("(?:って|と|という|など|の|は|が|を|に|も)[^\\s]")
_CJK = re.compile(
    "[\u2e80-\u303f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]"
)
_THAI_CLAUSE = 24
"""Shortest piece in characters, in Thai and Lao, that a space may end: they write clauses
without a stop, and also put spaces around numbers and names."""

_DOTTED = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}$")
_ROMAN = re.compile(r"[IVXL]{1,6}$")
_ENUMERATOR = re.compile(r"\W{0,3}(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,5})$")
_GERMAN = re.compile(r"\b(?:der|die|das|und|ist|von|den|dem|ein|eine|im|nicht|mit)\b")
_ENGLISH = re.compile(r"\b(?:the|of|and|is|to|was|in|an|that|for)\b")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never end a sentence: something always follows them.
_NEVER = _words(
    "dr mr mrs ms mx prof rev fr gen col maj capt cpt lt sgt cmdr adm gov sen rep hon pres st ste"
    " mt ft messrs supt det insp amb e.g i.e eg ie vs v cf viz ca approx resp esp incl"
    " z.b d.h u.a bzw vgl bspw evtl ggf inkl sog geb gest dipl ing hr fr frl hrn hrsg u.u"
    " i.d.r o.ä zzgl abzgl allg bes"
    " sr sra srta srs dra dña ud uds d.ª lic aprox mme mlle mm p.ex env"
    " sig dott avv bijv d.w.z t.e т.е т.к г-н г-жа им ул напр см"
)
# End no sentence when a number (or a lone letter, or a Roman number) follows.
_BEFORE_NUMBER = _words(
    "no nos nr nrs num núm n.º art arts abs sec secs ch chap fig figs eq eqs tab abb bd ref refs"
    " p pp pg pág págs s vol vols jan feb mar apr jun jul aug sep sept oct nov dec kap ziff rn"
    " line l ll op pt ed eds stat u.s.c cap ص م с стр т рис табл гл"
)
# May end a sentence: they do where a usual sentence opener follows.
_MAYBE = _words(
    "etc inc ltd co corp jr sr bros dept univ assn est al u.s u.k u.n u.s.a d.c a.m p.m ph.d b.a"
    " m.a b.sc m.sc m.d b.c a.d usw etw str mio mrd jh jhd z.t u.ä ecc enz ee.uu ss.aa av avda"
    " blvd rd ave sq hwy jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat"
    " sun min max avg h hrs sec ft in lb lbs oz kg km cm mm yr yrs т.д т.п др гг г руб млн млрд"
)
_OPENING_WORDS = _words(
    "The This That These Those It Its He She They We You I In On At As By For From With When While"
    " After Before During Since Although However But And Or So Then There Here What Who Which Why"
    " How If Is Was Are Were Do Does Did Has Have Had An His Her Their Our My Some Many Most All"
    " Both Each One Two Another Other Such Also Thus Therefore Today Now Later Under Over Not No"
    " Der Die Das Er Sie Es Wir Ihr Ein Eine Im In Am Auf Aus Bei Mit Nach Seit Von Vor Zu Dies"
    " Diese Dieser Dieses Seine Ihre Auch Aber Und Oder Doch Wenn Als Während Heute Danach Damit"
    " El La Los Las Un Una En Es Su Sus Por Para Con Sin Pero Y Este Esta Estos Estas Esto Ese"
    " Le Les Des Du Il Elle Ils Elles On Ce Cette Ces Dans Avec Pour Mais Et Lo Gli Nel Della"
    " De Het Een Он Она Оно Они Это В На С По И Но А"
)
_GERMAN_OPENERS = _words(
    "Der Die Das Er Sie Es Wir Ihr Ein Eine Einer Im In Am An Auf Aus Bei Mit Nach Seit Von Vor Zu"
    " Zum Zur Dies Diese Dieser Dieses Seine Ihre Auch Aber Und Oder Doch Wenn Als Während Heute"
    " Danach Damit Dabei Dazu Durch Für Unter Über Zwischen Man Nicht So Dann Daher Deshalb Hier"
)


class _Style:
    """What one paragraph looks like as a whole, found out when first asked for."""

    def __init__(self, text: str, start: int, end: int) -> None:
        self._sample = (text, start, min(end, start + 2000))
        self.end = end

    @cached_property
    def german(self) -> bool:
        """Whether German function words outnumber English ones."""
        text, start, stop = self._sample
        sample = text[start:stop]
        return len(_GERMAN.findall(sample)) > len(_ENGLISH.findall(sample))

    @cached_property
    def lower(self) -> bool:
        """Whether it is written without capitals."""
        text, start, stop = self._sample
        return text[start:stop].islower()


def prose_borders(text: str, start: int, end: int) -> list[int]:
    """Ends of the sentences of text[start:end], in order; the last one is `end`.

    A border stands after the terminator, its closing quotes and brackets, footnote marks and
    the whitespace that follows.
    """
    borders: list[int] = []
    piece = start  # where the open sentence starts
    style = _Style(text, start, end)
    quotes = _QuoteCount(text, start)
    for found in _SCAN.finditer(text, start, end):
        if found.start() < piece:
            continue
        if found.lastgroup == "gap":
            if found.end() - piece >= _THAI_CLAUSE and found.end() < end:
                piece = found.end()
                borders.append(piece)
            continue
        after = text[found.end() : found.end() + 1]
        if found.lastgroup == "dot" and after.isalnum() and not _CJK.match(after):
            continue  # 3.14, example.org, file.txt
        border = _border(text, found, piece, style, quotes)
        if border is not None and border < end:
            piece = border
            borders.append(border)
            quotes.reset(border)
    borders.append(end)
    return borders


class _QuoteCount:
    """Parity of the straight double quotes in the open sentence, each character read once."""

    def __init__(self, text: str, start: int) -> None:
        self._text, self._read, self._count = text, start, 0

    def reset(self, start: int) -> None:
        self._read, self._count = start, 0

    def open_at(self, stop: int) -> bool:
        if stop > self._read:
            self._count += self._text.count('"', self._read, stop)
            self._read = stop
        return self._count % 2 == 1


def _border(
    text: str, found: re.Match[str], piece: int, style: _Style, quotes: _QuoteCount
) -> int | None:
    """Where the sentence ends that this terminator may close; None where it closes none."""
    end = style.end
    closed = _after_closers(text, found.end(), end)
    quoted = closed > found.end()
    space = _space_end(text, closed, end)
    if found.lastgroup == "full":
        if quoted and _JAPANESE_QUOTED.match(text, closed, end):
            return None
        if text[found.end() - 1] == "．" and text[space : space + 1].isdigit():
            return None
        return space
    spaced = space > closed
    following = text[space : space + 1] if space < end else ""
    if not spaced:
        return space if not following or _CJK.match(following) else None
    tokenised = found.start() > piece and text[found.start() - 1].isspace()
    closed = _tokenised_closer(text, closed, end, quotes if tokenised else None)
    space = _space_end(text, closed, end)
    following = text[space : space + 1] if space < end else ""
    if following and following in ",;:)]}%/":
        return None
    if following.islower() and not style.lower:
        return None
    if found.lastgroup != "dot" or quoted:
        return space
    if tokenised:
        return None if _is_cut_off(text, found.start(), piece, following) else space
    return None if _is_abbreviation(text, found.start(), piece, space, style) else space


def _after_closers(text: str, position: int, end: int) -> int:
    found = _CLOSERS.match(text, position, end)
    return found.end() if found else position


def _space_end(text: str, position: int, end: int) -> int:
    found = _SPACE.match(text, position, end)
    return found.end() if found else position


def _tokenised_closer(text: str, position: int, end: int, quotes: _QuoteCount | None) -> int:
    """Tokenised text writes ` . '' Next`: the closing quote belongs to the sentence before."""
    if quotes is None:
        return position
    while found := _CLOSER_AFTER_SPACE.match(text, position, end):
        position = found.end()
    if text.startswith(' "', position) and quotes.open_at(position):
        return position + 2
    return position


def _is_abbreviation(text: str, dot: int, piece: int, space: int, style: _Style) -> bool:
    """Whether the full stop at `dot` belongs to its word and ends no sentence."""
    near = text[max(piece, dot - 24) : dot]
    token = near.split()[-1] if near.split() else ""
    token = token.lstrip(_OPENERS).rpartition("-")[2] if "-" in token else token.lstrip(_OPENERS)
    if not token:
        return False
    if dot - piece <= 8 and _ENUMERATOR.match(text[piece:dot].strip()):
        return True  # "2. Second point": the number opens the sentence
    following = _word_at(text, space, style.end)
    opens = following in _OPENING_WORDS or text[space : space + 1] in {"¿", "¡"}
    word = token.lower()
    if word in _NEVER:
        return True
    numbered = following[:1].isdigit() or len(following) == 1 or bool(_ROMAN.match(following))
    if word in _BEFORE_NUMBER and numbered:
        return True
    roman = len(token) > 1 and _ROMAN.match(token)
    if (roman or (token.isdigit() and len(token) <= 2)) and style.german:
        return following not in _GERMAN_OPENERS
    if word in _MAYBE or _DOTTED.match(token):
        return not opens
    if len(token) == 1 and token.isalpha() and not _CJK.match(token):
        return not opens
    return False


def _is_cut_off(text: str, dot: int, piece: int, following: str) -> bool:
    """` . ` in tokenised text that ends no sentence: "2 . Second", "ca . 1818"."""
    near = text[max(piece, dot - 24) : dot].split()
    if not near or (dot - piece <= 8 and _ENUMERATOR.match(" ".join(near))):
        return True
    return following.isdigit() and near[-1].lower() in {"ca", "approx", "no", "nos", "pp", "vol"}


def _word_at(text: str, position: int, end: int) -> str:
    word = text[position : min(end, position + 24)].lstrip(_OPENERS)
    cut = next((i for i, char in enumerate(word) if not char.isalnum()), len(word))
    return word[:cut]
