import dataclasses
import functools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prunery
from prunery.errors import BudgetError, InputError, ModelError
from prunery.pruners.context import ContextPruner, PrunedPassage, rethreshold
from prunery.pruners.context.pruner import pick_device, pick_dtype
from prunery.pruners.signals.context import Batching

from .scripted import scripted
from .standin import small_provence

# "yes" is kept, "maybe" half, other words dropped; relevance counts "yes" and "good".
WORDS = {"yes": 0.95, "maybe": 0.5}
RANK = {"yes": 1.0, "good": 2.0}


def pruner(**options):
    loaded, forward = scripted(WORDS, rank=RANK, **options)
    made = ContextPruner(loaded, forward=forward)
    return made, forward


@functools.lru_cache
def ready(config):
    return pruner(**dict(config))[0]


def prune(passages, *, question="what?", config=None, **options):
    return ready(tuple((config or {}).items())).prune(question, passages, **options)


def test_public_names():
    assert prunery.ContextPruner is ContextPruner
    assert prunery.PrunedPassage is PrunedPassage


def test_a_passage_by_hand():
    text = "Yes yes. No words here. Maybe yes yes yes.  "
    (made,) = prune([text])
    # Means: (0.95 + 0.95 + 0.05) / 3 = 0.65; 0.05; (0.5 + 3 * 0.95 + 0.05) / 5 = 0.68.
    assert [s.kept for s in made.sentences] == [True, False, True]
    np.testing.assert_allclose([s.score for s in made.sentences], [0.65, 0.05, 0.68], atol=1e-6)
    assert [(s.start, s.end) for s in made.sentences] == [(0, 9), (9, 24), (24, 44)]
    assert made.text == "Yes yes. Maybe yes yes yes.  "
    assert (made.chars_in, made.chars_out) == (44, 29)
    assert (made.tokens_in, made.tokens_out) == (12, 8)
    assert made.compression == pytest.approx(15 / 44)
    assert (made.index, made.blocks, made.truncated, made.title_kept) == (0, 1, False, False)
    assert made.relevance_logit == 5.0
    assert made.relevance == pytest.approx(1 / (1 + np.exp(-5)))
    assert [s.reason for s in made.sentences][1] == "below_threshold"


def test_order_is_by_relevance_and_index_says_where_from():
    made = prune(["No.", "Yes yes.", "Yes.", "Also no.", "Good yes."])
    assert [one.index for one in made] == [4, 1, 2, 0, 3]
    assert [one.index for one in prune(["No.", "Yes yes.", "Yes."], top_k=2)] == [1, 2]


def test_threshold_is_the_checkpoints_unless_given():
    text = "Maybe maybe maybe. No."
    assert prune([text], config={"threshold": 0.3})[0].text == "Maybe maybe maybe. "
    assert prune([text], config={"threshold": 0.4})[0].text == ""
    assert prune([text], threshold=0.02)[0].text == text


def test_vote_drops_exactly_half():
    # "yes no" is half above; the full stop makes it one in three.
    text = "Yes no\n\nYes yes no"
    (made,) = prune([text], aggregation="vote", threshold=0.5)
    assert made.text == "Yes yes no"
    assert made.sentences[0].score == pytest.approx(0.5)
    assert prune([text], config={"aggregation": "vote"})[0].text == "Yes yes no"


def test_titles_are_read_and_kept_apart():
    (made,) = prune(["Yes yes. No."], titles=["Good yes"])
    assert made.text == "Yes yes. "
    assert made.title_kept
    assert made.relevance_logit == 2 + 1 + 2
    (alone,) = prune(["No words. None."], titles=["Yes yes yes"])
    assert (alone.text, alone.title_kept) == ("", False)
    (own,) = prune(["No words. None."], titles=["Yes yes yes"], keep_title=False)
    assert (own.text, own.title_kept) == ("", True)


def test_the_first_sentence_as_title():
    passages = ["The title. Yes yes. No.", "The yes yes. No."]
    made = {one.index: one for one in prune(passages, titles="first_sentence")}
    assert made[0].text == "The title. Yes yes. "
    assert made[0].title_kept
    assert made[0].sentences[0].reason == "title"
    assert made[1].text == ""
    assert made[1].sentences[0].reason == "title_alone"


def test_min_sentences_protect_and_on_empty():
    text = "Order 66-B here. No words. Maybe some."
    assert prune([text])[0].text == ""
    assert prune([text], min_sentences=1)[0].text == "Maybe some."
    (made,) = prune([text], protect=[r"\d+-[A-Z]", re.compile("words")])
    assert made.text == "Order 66-B here. No words. "
    assert made.sentences[0].reason == "protected"
    assert prune([text], on_empty="top1")[0].text == "Maybe some."
    assert prune([text], on_empty="original")[0].text == text


def test_max_tokens_holds_over_the_passages_of_a_question():
    passages = ["Yes yes yes. Yes yes maybe.", "Yes yes. No."]
    free = prune(passages)
    assert sum(one.tokens_out for one in free) == 4 + 4 + 3
    for limit in range(12):
        made = prune(passages, max_tokens=limit)
        assert sum(one.tokens_out for one in made) <= limit
    made = prune(passages, max_tokens=7)
    assert [one.text for one in made] == ["Yes yes yes. ", "Yes yes. "]
    assert made[0].sentences[1].reason == "over_budget"
    assert sum(one.tokens_out for one in prune(passages, titles=["t", "t"], max_tokens=8)) == 4
    with pytest.raises(BudgetError):
        prune(passages, protect=["No"], max_tokens=1)


@pytest.mark.parametrize("aggregation", ["mean", "vote"])
def test_rethreshold_is_prune_again_without_the_model(aggregation):
    made, forward = pruner()
    passages = ["Yes maybe. No yes no. Maybe maybe yes!", "Maybe. Yes.", "No.", ""]
    first = made.prune("what?", passages, titles=["a", None, "yes", "b"])
    calls = forward.calls
    for options in [
        {"threshold": 0.2, "aggregation": aggregation},
        {"threshold": 0.6, "max_tokens": 4, "aggregation": aggregation},
        {"min_sentences": 1, "keep_title": False, "aggregation": aggregation},
        {"protect": ["No"], "on_empty": "top1", "top_k": 2, "aggregation": aggregation},
    ]:
        again = made.rethreshold(first, **options)
        assert forward.calls == calls
        assert again == made.prune("what?", passages, titles=["a", None, "yes", "b"], **options)
        calls = forward.calls
    assert first[0].rethreshold(threshold=0.99).text == ""
    # Options that are not named stay.
    strict = rethreshold(first, threshold=0.99)
    assert [one.text for one in rethreshold(strict, keep_title=False)] == [""] * 4


def test_rethreshold_refuses_what_it_does_not_know():
    made = prune(["Yes."])
    with pytest.raises(InputError, match="known: \\['aggregation'"):
        made[0].rethreshold(treshold=0.5)
    batch = pruner()[0].prune_batch(["a?", "b?"], [["Yes."], ["Yes."]])
    with pytest.raises(InputError, match="more than one question"):
        rethreshold([batch[0][0], batch[1][0]], threshold=0.1)
    assert rethreshold([], threshold=0.1) == []


def test_batch_is_each_question_by_itself():
    made, _ = pruner()
    questions = ["what?", "who yes?", "which?"]
    passages = [["Yes. No.", "Maybe."], [], ["Good. Yes yes."]]
    titles = [["t", None], [], None]
    batch = made.prune_batch(questions, passages, titles=titles, top_k=1)
    assert [len(one) for one in batch] == [1, 0, 1]
    for question, own, named, result in zip(questions, passages, titles, batch, strict=True):
        assert result == made.prune(question, own, titles=named, top_k=1)


def test_duplicates_are_scored_once_and_alike():
    made, forward = pruner()
    first, second, other = made.prune("what?", ["Yes. No.", "Yes. No.", "No."])
    assert len(forward.rows) == 2
    assert dataclasses.replace(first, index=1) == second
    assert (first.index, second.index, other.index) == (0, 1, 2)


# Edge inputs: each has a decided outcome.


def test_no_passages():
    assert prune([]) == []
    assert pruner()[0].prune_batch([], []) == []


@pytest.mark.parametrize("text", ["", "   ", "\n\t\n", "\x00", "\u200b"])
def test_passages_without_a_token_rank_last_unread(text):
    made, forward = pruner()
    result = made.prune("what?", [text, "No."])
    assert [one.index for one in result] == [1, 0]
    assert (result[1].relevance, result[1].relevance_logit) == (0.0, -100.0)
    assert (result[1].blocks, result[1].tokens_in, result[1].text) == (0, 0, "")
    assert result[1].compression == (1.0 if text else 0.0)
    assert len(forward.rows) == 1


def test_one_sentence():
    assert prune(["Yes yes"])[0].text == "Yes yes"
    assert prune(["No"])[0].text == ""


@pytest.mark.parametrize(
    "text",
    [
        "a\x00b yes\x07 yes yes. Other\x1b[0m.",
        "Yes 👩\u200d👩\u200d👧 yes 👍🏽 yes! No\u0301e.",
        "نعم yes yes. لا شيء هنا؟ \u202eyes yes\u202c.",
        "yes \ud800 yes yes. Lone \udfff surrogate.",
        "yes\r\nyes\u2028yes. ﷽ \ufeff.",
    ],
)
def test_odd_characters_come_back_as_they_were(text):
    made = prune([text], threshold=0.3)[0]
    assert made.text
    assert "".join(text[s.start : s.end] for s in made.sentences) == text
    assert made.text == "".join(text[s.start : s.end] for s in made.sentences if s.kept)
    assert prune([text], threshold=0.0)[0].text == text


def test_a_question_of_ten_thousand_words():
    made, forward = pruner(max_length=64)
    (result,) = made.prune("why " * 10_000, ["Yes yes. No. " * 20])
    assert result.truncated
    assert result.text == "Yes yes. " * 20
    assert max(map(len, forward.rows)) <= 64


def test_a_passage_of_a_hundred_thousand_characters():
    filler = "The quick brown fox jumps over the lazy dog. " * 1200
    text = filler + "Yes yes yes here. " + filler
    assert len(text) > 100_000
    made, forward = pruner()
    (result,) = made.prune("what?", [text], titles=["A title"])
    assert result.text == "Yes yes yes here. "
    assert result.blocks == len(forward.rows) > 40
    assert not result.truncated
    assert result.relevance_logit == 3.0
    assert max(map(len, forward.rows)) <= 512


def test_a_sentence_longer_than_the_window_is_scored_over_all_its_tokens():
    # 1 "yes" in 20: blocks of this window see it or not; the mean is over all of them.
    text = ("yes " + "word " * 19) * 40
    made, _ = pruner(max_length=64)
    spans = [[[(0, len(text))]]]
    from prunery.pruners.signals.context import context_signals

    signals = context_signals(made._scorer, ["what?"], [[text]], sentences=spans)
    assert signals.blocks[0] > 10
    assert signals.keep_probability.tolist() == pytest.approx([(0.95 + 19 * 0.05) / 20], abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.prune("", ["a"]), "the question is blank"),
        (lambda p: p.prune(" \n", ["a"]), "the question is blank"),
        (lambda p: p.prune(None, ["a"]), "the question must be a string; found NoneType"),
        (lambda p: p.prune("q", "abc"), "the passages of the question must be a list"),
        (lambda p: p.prune("q", ["a", None]), "passage 1 of the question must be a string"),
        (lambda p: p.prune("q", ["a", b"b"]), "passage 1 .*found bytes"),
        (lambda p: p.prune("q", ["a"], titles=["t", "u"]), "titles of the question has 2 entries"),
        (lambda p: p.prune("q", ["a"], titles=[3]), "title 0 of the question must be a string"),
        (lambda p: p.prune("q", ["a"], titles="first"), "first_sentence"),
        (lambda p: p.prune_batch(["q", ""], [["a"], ["b"]]), "question 1 is blank"),
        (lambda p: p.prune_batch(["q"], [["a"], ["b"]]), "has 2 entries for 1 questions"),
        (lambda p: p.prune_batch(["q", "r"], [["a"], [1]]), "passage 0 of question 1"),
        (lambda p: p.prune("q", ["a"], threshold=1.5), "`threshold`"),
        (lambda p: p.prune("q", ["a"], threshold="high"), "`threshold` must be a number"),
        (lambda p: p.prune("q", ["a"], aggregation="max"), "`aggregation`"),
        (lambda p: p.prune("q", ["a"], on_empty="drop"), "`on_empty`"),
        (lambda p: p.prune("q", ["a"], top_k=0), "`top_k`"),
        (lambda p: p.prune("q", ["a"], max_tokens=-1), "`max_tokens`"),
        (lambda p: p.prune("q", ["a"], max_tokens=1.5), "`max_tokens`"),
        (lambda p: p.prune("q", ["a"], min_sentences=-1), "`min_sentences`"),
        (lambda p: p.prune("q", ["a"], protect="a+"), "`protect` must be a list"),
        (lambda p: p.prune("q", ["a"], protect=["a", "("]), r"`protect\[1\]` is no regular"),
        (lambda p: p.prune("q", ["a"], protect=[3]), r"`protect\[0\]` must be"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(pruner()[0])


def test_a_score_that_is_not_finite_is_an_error():
    loaded, _ = scripted()

    def broken(ids, mask, types):
        return np.full(len(ids), np.nan, np.float32), np.zeros(ids.shape, np.float32)

    with pytest.raises(ModelError, match="not finite"):
        ContextPruner(loaded, forward=broken).prune("what?", ["a"])


texts = st.text(alphabet=st.sampled_from("yesno .!?\n\t|#`。 ?\ud800👍\u0301"), max_size=80)


@given(
    st.lists(texts, max_size=5),
    st.floats(0, 1),
    st.sampled_from(["mean", "vote"]),
    st.one_of(st.none(), st.integers(0, 20)),
    st.integers(0, 2),
    st.sampled_from(["empty", "top1", "original"]),
)
@settings(max_examples=120, deadline=None)
def test_whatever_comes_in(passages, threshold, aggregation, max_tokens, least, on_empty):
    made = PRUNER.prune(
        "what?",
        passages,
        threshold=threshold,
        aggregation=aggregation,
        max_tokens=max_tokens,
        min_sentences=least,
        on_empty=on_empty,
    )
    assert sorted(one.index for one in made) == list(range(len(passages)))
    logits = [one.relevance_logit for one in made]
    assert logits == sorted(logits, reverse=True)
    if max_tokens is not None:
        assert sum(one.tokens_out for one in made) <= max_tokens
    for one in made:
        text = passages[one.index]
        assert "".join(text[s.start : s.end] for s in one.sentences) == text
        assert one.text == "".join(text[s.start : s.end] for s in one.sentences if s.kept)
        assert one.chars_out == len(one.text)
        assert 0.0 <= one.compression <= 1.0
        assert 0.0 <= one.relevance <= 1.0


PRUNER = pruner(max_length=32)[0]


# A real (random) network behind the same code.


def test_scores_are_those_of_a_plain_implementation():
    import torch

    loaded = small_provence()
    question = "Where did it start?"
    passages = [
        "It started in a small town. Nobody knew about it! Then, in 1969, everything changed.",
        "Short one.",
        "Another passage, with a comma; and more. Even more of it here, for good measure.",
    ]
    made = ContextPruner(loaded).prune(question, passages)
    for one in made:
        text = passages[one.index]
        encoded = loaded.tokenizer(question, text, return_tensors="pt", return_offsets_mapping=True)
        offsets = encoded.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            out = loaded.model(**encoded)
        assert one.relevance_logit == pytest.approx(float(out.rank_logit[0]), abs=1e-4)
        probability = torch.sigmoid(out.keep_logit[0]).tolist()
        body = [
            (start, p)
            for (start, end), kind, p in zip(
                offsets, encoded["token_type_ids"][0].tolist(), probability, strict=True
            )
            if kind == 1 and end > start
        ]
        for sentence in one.sentences:
            inside = [p for start, p in body if sentence.start <= start < sentence.end]
            assert sentence.score == pytest.approx(sum(inside) / len(inside), abs=1e-5)


def test_batches_do_not_change_scores():
    loaded = small_provence(max_length=96)
    passages = ["Words and words. " * n for n in (1, 3, 9, 20, 40)]
    questions = ["What is it?", "Why would it be so, after all?"]
    small = ContextPruner(loaded, batching=Batching(1, 0.0)).prune_batch(questions, [passages] * 2)
    large = ContextPruner(loaded, batching=Batching(10**6, 1.0)).prune_batch(
        questions, [passages] * 2
    )
    for a, b in zip(
        [x for one in small for x in one], [x for one in large for x in one], strict=True
    ):
        assert a.index == b.index
        assert a.relevance_logit == pytest.approx(b.relevance_logit, abs=1e-4)
        scores = [s.score for s in a.sentences]
        assert scores == pytest.approx([s.score for s in b.sentences], abs=1e-5)


def test_devices_and_dtypes(monkeypatch):
    import torch

    assert pick_device("cpu") == "cpu"
    assert pick_device(None) == pick_device("auto")
    assert pick_dtype("cpu", "float32") == "float32"
    assert pick_dtype("mps", None) == "float32"
    assert pick_dtype("cpu", None) in ("float32", "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(None) == "cuda"
    with pytest.raises(InputError, match="`dtype`"):
        pick_dtype("cpu", "int8")
    with pytest.raises(InputError, match="`backend`"):
        ContextPruner.from_pretrained("default", backend="tf")
