import gc
import gzip
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.pruners.context.sentences import HARD_CAP, split_sentences


def pieces(text):
    return [text[start:end] for start, end in split_sentences(text)]


# Each case is a text cut where the borders belong.
CASES = {
    "titles, initials, decimals, acronyms": [
        "Dr. Smith met J. K. Rowling at 3.14 p.m. in the U.S. ",
        "The end. ",
        "See Fig. 3 and No. 5. ",
        "No. I won't!",
    ],
    "one-letter names end a sentence": ["World War I. ", "The war. ", "Vitamin K. ", "It is."],
    "ellipses": ["OK... well. ", "Yes... ", "No. ", "Wait… what?"],
    "urls, mail, files": [
        "See https://example.com/a.b?c=d. ",
        "Then mail a.b@c.de and read x.txt.",
    ],
    "quotes, brackets, footnotes": [
        'He said "Stop." ',
        "Then left. ",
        "(See below.) ",
        "Next.[12] ",
        "And so on.",
    ],
    "a question inside a sentence": ['"Why?" he asked. ', "Nobody knew."],
    "no capitals": ["it is ok? ", "yes it is. ", "no caps here"],
    "enumerations": ["1. First item. ", "2. Second item. ", "3) Third"],
    "tokenised": [
        "he came . ",
        "She left . '' ",
        "The end '' . ",
        "Born ca . 1818 in Rome . ",
        "It cost $ 3.5 .",
    ],
    "German": [
        "Am 3. Mai kam Dr. Müller, z.B. mit Hrn. Schmidt, nach Berlin. ",
        "Er war im 19. Jahrhundert König Ludwig XIV. von Frankreich. ",
        "Es waren 25. ",
        "Das war es.",
    ],
    "Spanish": ["¡Hola! ", "¿Qué tal? ", "El Sr. García vive en EE.UU. desde 1990. ", "Muy bien."],
    "French": ["M. Dupont est là, cf. p. 12. ", "« Oui ! » ", "Il part."],
    "Arabic": ["كيف حالك؟ ", "أنا بخير؛ ", "شكرا. ", "د. أحمد هنا۔ ", "نعم."],
    "Chinese": ["他说：“你好。”", "然后走了。", "真的吗？", "是的！"],
    "Japanese": ["「行く。」と言った。", "本当ですか?", "はい。", "「やめろ!」", "彼は叫んだ。"],
    "Thai": [
        "ผมชอบกินข้าวมากๆทุกวันเลยครับ ",
        "เขาไปโรงเรียนตอนเช้าทุกวันจันทร์ ",
        "แล้วกลับบ้าน",
    ],
    "Hindi": ["यह एक वाक्य है। ", "यह दूसरा है॥ ", "तीसरा।"],
    "Russian": ["Это было в 1945 г. в Москве, т.е. давно. ", "Потом пришёл мир."],
    "bullets and numbers": [
        "Intro:\n",
        "- first point. ",
        "It has two.\n",
        "- second\n  continued here\n",
        "1. one\n",
        "2. two",
    ],
    "table rows": ["| a | b |\n|---|---|\n", "| 1 | 2. Or 3 |\n", "x\ty\tz\n", "1. A\t2\t3"],
    "fenced code": ["Run:\n", "```python\nx = 1. \n\n# No. Stop.\ny = 2\n```\n", "Done. ", "End"],
    "tilde fence with backticks inside": ["~~~\n```\nA. B.\n~~~\n", "After."],
    "indented code": [
        "Text.\n\n",
        "    def f(x):\n        return x\n\n    y = f(1)\n",
        "after",
    ],
    "indented prose is prose": ["    One sentence here. ", "Another one."],
    "headings": ["# Heading one. Two\n", "Text here. ", "More.\n\n", "Title\n=====\n", "Body."],
    "lines broken on purpose": ["Name: Bob\n", "Age: 12\n", "City: Rome"],
    "lines wrapped to a width": [
        "It was a long line of text which has been wrapped at about sixty\n"
        "columns by its author or by some program, and so the line ends\n"
        "are no borders. ",
        "But stops are.\n",
    ],
    "blank lines": ["One para without stop\n\n", "Second para"],
    "wordless pieces join": ["...Hello. !!!"],
    "emoji": ["👩\u200d👩\u200d👧 Hi! ", "👍🏽 Ok."],
    "control characters": ["a\x00b. ", "C\ud800d. ", "E"],
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    assert pieces("".join(CASES[name])) == CASES[name]


def test_texts_without_words():
    assert split_sentences("") == []
    assert pieces("  \n ") == ["  \n "]
    assert pieces("...!?\n---") == ["...!?\n---"]


def test_unclosed_fence_is_no_block():
    assert pieces("```\nOne. Two.\n") == ["```\nOne. ", "Two.\n"]


alphabet = st.one_of(
    st.text(),
    st.text(alphabet=" .!?\n\t|`~#-*1aAbB\"'“”。？「」؟।ก"),
    st.lists(
        st.sampled_from(
            [
                *["A. ", "e.g. ", "word ", ". ", "\n", "\n\n", "    x=1\n", "```\n", "- b\n"],
                *["3. ", "你好。", "ไทยไทย ", "؟ ", "\u0301", "\ud800", " . ''", "# h\n"],
                *["| a |\n", "===\n", "\r\n"],
            ]
        ),
        max_size=60,
    ).map("".join),
)


@given(alphabet)
@settings(max_examples=400, deadline=None)
def test_slices_cover_the_text(text):
    spans = split_sentences(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(start < end for start, end in spans)
    assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]


@given(alphabet)
@settings(max_examples=200, deadline=None)
def test_every_sentence_has_a_word_if_the_text_has(text):
    if any(map(str.isalnum, text)):
        assert all(any(map(str.isalnum, text[a:b])) for a, b in split_sentences(text))


def test_unpunctuated_runs_are_capped():
    text = "word " * 1000
    made = pieces(text)
    assert max(map(len, made)) <= HARD_CAP
    assert all(piece.endswith(" ") for piece in made)
    assert max(map(len, pieces("x" * 5000))) == HARD_CAP


def test_a_cap_never_splits_a_character_from_its_marks():
    text = "e\u0301" * 3000
    assert all(not piece.startswith("\u0301") for piece in pieces(text))


HOSTILE = {
    "stops": ". ",
    "abbreviations": "e.g. ",
    "initials": "A. ",
    "dots": ".",
    "spaces after a stop": None,
    "blank lines": "\n",
    "carriage returns": "\r",
    "quotes": '. " a',
    "tokenised quotes": " . ''",
    "fences never closed": "```a\n",
    "almost code": "    (\n\n",
    "code": "    x\n",
    "bars": "| ",
    "tabs": "a\t",
    "footnotes": ".[1",
    "closers": '"',
    "openers": '. ("',
    "thai": "ก ",
    "ordinals": "am 3. Mai ",
    "joiners": "\u200d",
    "bullets": "- \n",
    "underscores": "_",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_takes_linear_time(name):
    """Sixteen times the text takes about sixteen times as long; a quadratic rule takes 256."""
    unit = HOSTILE[name]

    def seconds(size):
        text = "a." + " " * size + "b" if unit is None else unit * (size // len(unit))
        best = float("inf")
        # The collector walks whatever other tests have loaded: not the splitter's time.
        gc.disable()
        try:
            for _ in range(2):
                start = time.process_time()
                split_sentences(text)
                best = min(best, time.process_time() - start)
        finally:
            gc.enable()
        return best

    # Small times are all overhead and noise: a floor keeps them from looking steep.
    assert seconds(40_000) < 70 * max(seconds(2_500), 0.003)


def test_a_megabyte_of_anything_is_quick():
    text = ("Some words here. " * 40 + "\n") * 1500
    start = time.process_time()
    assert "".join(pieces(text)) == text
    assert time.process_time() - start < 20


def test_agreement_with_labelled_borders(shared_data):
    """QED's borders of Wikipedia paragraphs in tokenised spelling, flattened tables included."""
    exact = total = hit = found = wanted = 0
    with gzip.open(shared_data / "rag_qed" / "qed-dev.jsonlines.gz", "rt") as lines:
        for line in lines:
            row = json.loads(line)
            gold = set(row["sentence_starts"][1:])
            made = {start for start, _ in split_sentences(row["paragraph_text"])[1:]}
            total += 1
            exact += gold == made
            if len(gold) < 12:  # longer ones are tables and lists without stops
                hit += len(gold & made)
                found += len(made)
                wanted += len(gold)
    assert exact / total > 0.88
    assert 2 * hit / (found + wanted) > 0.95
