import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError, ModelError
from prunery.pruners.context.packing import Frame, Pair, TokenSource, _blocks, pack

from .standin import small_provence, tokenizer


@pytest.fixture(scope="module")
def made():
    return tokenizer()


def frame_of(made, max_length=64, **config):
    return Frame.of(made, small_provence(max_length=max_length, **config).config)


def packed(made, pairs, max_length=64):
    return pack(pairs, TokenSource(made), frame_of(made, max_length))


def rows(packing):
    out = []
    for block, length in enumerate(packing.block_length):
        ids, types = np.zeros(length, np.int64), np.zeros(length, np.int64)
        assert packing.write_block(block, ids, types) == length
        out.append((ids, types))
    return out


def test_one_block_is_the_pair_as_the_tokenizer_makes_it(made):
    question, passage = "Who wrote Émile?", "It was written by Rousseau. He lived in Geneva, then."
    ((ids, types),) = rows(packed(made, [Pair(question, passage)]))
    expected = made(question, passage)
    assert ids.tolist() == expected["input_ids"]
    assert types.tolist() == expected["token_type_ids"]


def test_title_stands_before_the_sentences_of_every_block(made):
    pairs = [Pair("Who?", "One two three four. " * 40, "The title")]
    made_packing = packed(made, pairs)
    title = made("The title", add_special_tokens=False)["input_ids"]
    assert len(made_packing.block_pair) > 1
    for ids, types in rows(made_packing):
        start = made_packing.question_end(0)
        assert ids[start : start + len(title)].tolist() == title
        assert types[start] == 1
        assert types[start - 1] == 0


def test_blocks_cover_the_passage_once_and_fit_the_window(made):
    text = "Some sentence of words, number one. Another! " * 30 + "word " * 400 + "Last one."
    packing = packed(made, [Pair("What is it about?", text, "T")])
    assert packing.block_length.max() <= 64
    assert packing.block_start[0] == 0
    assert packing.block_end[-1] == len(packing.ids)
    assert (packing.block_start[1:] == packing.block_end[:-1]).all()
    whole = made(text, add_special_tokens=False)["input_ids"]
    assert packing.ids.tolist() == whole


def test_long_question_and_title_leave_the_passage_half_the_window(made):
    packing = packed(made, [Pair("why " * 10_000, "word " * 300, "title " * 500)])
    assert packing.truncated.tolist() == [True]
    body = packing.block_end - packing.block_start
    title = len(packing.title_ids[0])
    assert body[0] + title >= 32
    assert title <= (body[0] + title) // 4
    assert packing.block_length.max() <= 64
    assert packing.title_tokens.tolist() == [500]
    assert int(body.sum()) == 300


def test_a_hundred_thousand_characters(made):
    text = "The quick brown fox jumps over it. " * 2900
    packing = packed(made, [Pair("Which animal?", text)], max_length=512)
    assert len(text) > 100_000
    assert packing.block_length.max() <= 512
    assert int((packing.block_end - packing.block_start).sum()) == len(packing.ids)
    assert len(packing.ids) == 2900 * 8
    assert np.diff(packing.token_offset).tolist() == [8] * 2900


def test_equal_sentences_are_tokenised_once(made):
    source = TokenSource(made)
    seen = []
    encode = source.encode
    source.encode = lambda texts: seen.extend(texts) or encode(texts)
    pack([Pair("q?", "A b. A b. A b."), Pair("q?", "A b. C d.")], source, frame_of(made))
    assert len(seen) == len(set(seen))


def test_lone_surrogates_nul_and_whitespace(made):
    packing = packed(made, [Pair("q", "\ud800 x. \x00"), Pair("q", " \n"), Pair("q", "")])
    assert np.diff(packing.sentence_offset).tolist() == [1, 1, 0]
    assert set(packing.block_pair.tolist()) == {0}


def test_given_borders_are_checked(made):
    spans = ((0, 3), (3, 6))
    assert packed(made, [Pair("q", "ab cd ", None, spans)]).spans.tolist() == [[0, 3], [3, 6]]
    for wrong in [((0, 3),), ((0, 3), (4, 6)), ((1, 6),), ((0, 3), (3, 9)), ((0, 6), (6, 6))]:
        with pytest.raises(InputError, match="borders of passage 0"):
            packed(made, [Pair("q", "ab cd ", None, wrong)])


def test_two_separators_and_no_token_types(made):
    loaded = small_provence(max_length=64)
    loaded.config.pair = "cls_q_sep_sep_p_sep"
    loaded.config.token_types = False
    packing = pack([Pair("Who?", "Ann.")], TokenSource(made), Frame.of(made, loaded.config))
    ((ids, types),) = rows(packing)
    sep = made.sep_token_id
    who = made("Who?", add_special_tokens=False)["input_ids"]
    ann = made("Ann.", add_special_tokens=False)["input_ids"]
    assert ids.tolist() == [made.cls_token_id, *who, sep, sep, *ann, sep]
    assert not types.any()


def test_questions_can_be_normalised(made):
    loaded = small_provence(max_length=64)
    loaded.config.normalise_question = True
    packing = pack([Pair("Who, THEN?", "A.")], TokenSource(made), Frame.of(made, loaded.config))
    expected = made("who then", add_special_tokens=False)["input_ids"]
    assert packing.question_ids[0].tolist() == expected


def test_a_tokenizer_without_separators_is_refused(made):
    class Bare:
        cls_token_id = bos_token_id = 1
        sep_token_id = eos_token_id = None
        pad_token_id = 0

    with pytest.raises(ModelError, match="sep or eos"):
        Frame.of(Bare(), small_provence().config)


@given(st.lists(st.integers(0, 40), max_size=40), st.integers(1, 30))
@settings(deadline=None)
def test_blocks_never_lose_or_repeat_a_token(sizes, room):
    blocks = _blocks(sizes, room)
    covered = [token for start, end in blocks for token in range(start, end)]
    assert covered == list(range(sum(sizes)))
    assert all(0 < end - start <= room for start, end in blocks)
    # A sentence is cut only if it is longer than a block's room.
    borders = np.cumsum([0, *sizes])
    for start, _ in blocks[1:]:
        inside = np.flatnonzero((borders[:-1] < start) & (start < borders[1:]))
        assert all(sizes[i] > room for i in inside)
