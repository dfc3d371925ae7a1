import math

import pytest
import torch

from prunery.pipelines.provence_batches import Batch
from prunery.pipelines.provence_loss import LossWeights, provence_loss, segment_mean
from prunery.pruners.models.provence import ProvenceOutput

ONLY = {
    "token": 0.0,
    "sentence": 0.0,
    "listwise": 0.0,
    "teacher": 0.0,
    "relevance": 0.0,
    "answer": 0.0,
}
NAN = math.nan


def batch(
    segment: list[list[int]],
    labels: list[list[float]],
    answer: list[list[float]] | None = None,
    teacher: list[float] | None = None,
) -> Batch:
    seg = torch.tensor(segment)
    lab = torch.tensor(labels)
    return Batch(
        input_ids=torch.zeros_like(seg),
        attention_mask=torch.ones_like(seg),
        token_type_ids=torch.zeros_like(seg),
        segment=seg,
        answer=torch.full(seg.shape, -1.0) if answer is None else torch.tensor(answer),
        labels=lab,
        relevant=(lab == 1).any(1).float(),
        teacher=torch.full((len(lab),), NAN) if teacher is None else torch.tensor(teacher),
    )


def term(name: str, keep: list[list[float]], b: Batch, rank: list[float] | None = None) -> float:
    logits = torch.tensor(keep)
    output = ProvenceOutput(torch.tensor(rank or [0.0] * len(keep)), logits)
    terms = provence_loss(output, torch.zeros_like(logits), b, LossWeights(**(ONLY | {name: 1.0})))
    assert float(terms.total) == pytest.approx(float(getattr(terms, name)))
    return float(terms.total)


def test_segment_mean_by_hand() -> None:
    values = torch.tensor([[9.0, 1.0, 3.0, 5.0]])
    mean, size = segment_mean(values, torch.tensor([[-1, 0, 0, 2]]), 3)
    assert mean.tolist() == [[2.0, 0.0, 5.0]]
    assert size.tolist() == [[2.0, 0.0, 1.0]]


def test_token_term_counts_sentences_alike_and_ignores_the_rest() -> None:
    # Sentence 0 (label 1, one token at logit 2), sentence 1 (label 0, three tokens at logit 0).
    keep = [[7.0, 2.0, 0.0, 0.0, 0.0, -7.0]]
    b = batch([[-1, 0, 1, 1, 1, -1]], [[1.0, 0.0]])
    want = (math.log(1 + math.exp(-2.0)) + math.log(2.0)) / 2
    assert term("token", keep, b) == pytest.approx(want, rel=1e-6)
    ignored = batch([[-1, 0, 1, 1, 1, -1]], [[1.0, -1.0]])
    assert term("token", keep, ignored) == pytest.approx(math.log(1 + math.exp(-2.0)), rel=1e-6)


def test_sentence_term_is_that_of_the_mean_probability() -> None:
    keep = [[math.log(3.0), -math.log(3.0), 0.0]]  # probabilities 0.75, 0.25 | 0.5
    b = batch([[0, 0, 1]], [[1.0, 0.0]])
    assert term("sentence", keep, b) == pytest.approx(math.log(2.0), rel=1e-6)


def test_listwise_term_by_hand() -> None:
    keep = [[1.0, 3.0, 0.0], [5.0, 5.0, 5.0]]
    b = batch([[0, 0, 1], [0, 1, 2]], [[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    # Row 0: means 2 and 0, the first wanted; row 1 has nothing to keep and does not count.
    assert term("listwise", keep, b) == pytest.approx(math.log(1 + math.exp(-2.0)), rel=1e-6)


def test_ranking_terms_take_the_teacher_where_there_is_one() -> None:
    b = batch([[0], [0]], [[1.0], [0.0]], teacher=[3.0, NAN])
    keep = [[0.0], [0.0]]
    assert term("teacher", keep, b, rank=[1.0, 9.0]) == pytest.approx(4.0)
    want = math.log(1 + math.exp(2.0))
    assert term("relevance", keep, b, rank=[9.0, 2.0]) == pytest.approx(want, rel=1e-5)


def test_answer_term_weighs_answer_tokens() -> None:
    b = batch([[0, 0, 0]], [[1.0]], answer=[[1.0, 0.0, -1.0]])
    assert term("answer", [[0.0, 0.0, 0.0]], b) == pytest.approx((3 + 1) * math.log(2.0) / 2)


def test_empty_targets_give_zero_and_finite_gradients() -> None:
    b = batch([[-1, -1]], [[-1.0]], teacher=[NAN])
    keep = torch.zeros(1, 2, requires_grad=True)
    rank = torch.zeros(1, requires_grad=True)
    terms = provence_loss(ProvenceOutput(rank, keep), torch.zeros(1, 2), b, LossWeights())
    for name in ("token", "sentence", "listwise", "teacher", "answer"):
        assert float(getattr(terms, name).detach()) == 0.0
    terms.total.backward()
    assert keep.grad is not None
    assert torch.isfinite(keep.grad).all()
    assert rank.grad is not None
    assert torch.isfinite(rank.grad).all()
