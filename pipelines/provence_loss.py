"""The loss of a Provence network.

Provence (arXiv:2501.16214, section 3.2): token cross-entropy + 0.05 * MSE(rank logit, teacher's
score). Departures, each with a weight of its own in `LossWeights`:

- Question, title, special and padding tokens are ignored (as OpenProvence does with -100; the
  paper's code trains them towards 0), and every sentence counts the same, however long, because a
  decision is made for a sentence.
- `sentence`: binary cross-entropy of the sentence score itself, the mean keep probability.
- `listwise`: softmax cross-entropy over a passage's sentences (mean keep logit), where the
  passage has one to keep: which sentence, apart from whether any.
- Without a teacher's score, the rank logit learns whether the passage answers, by binary
  cross-entropy with weight `relevance`.
- `answer`: which tokens of the passage are the answer, by a head used in training alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..pruners.models.provence import ProvenceOutput
from .provence_batches import Batch

ANSWER_POSITIVE_WEIGHT = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Factor of every term; 0 leaves it out. The paper: token 1, teacher 0.05, the others 0."""

    token: float = 0.5
    sentence: float = 1.0
    listwise: float = 0.5
    teacher: float = 0.05
    relevance: float = 0.2
    answer: float = 0.5


class LossTerms(NamedTuple):
    """Unweighted terms, scalars, and their weighted sum."""

    total: Tensor
    token: Tensor
    sentence: Tensor
    listwise: Tensor
    teacher: Tensor
    relevance: Tensor
    answer: Tensor


def segment_mean(values: Tensor, segment: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean of (B, T) values over each of `count` segments, and their sizes: (B, count) each.

    Tokens of segment -1 count nowhere; an empty segment has mean 0.
    """
    shape = (values.shape[0], count + 1)
    index = segment + 1
    total = values.new_zeros(shape).scatter_add(1, index, values)[:, 1:]
    size = values.new_zeros(shape).scatter_add(1, index, torch.ones_like(values))[:, 1:]
    return total / size.clamp(min=1), size


def provence_loss(
    output: ProvenceOutput, answer_logit: Tensor, batch: Batch, weights: LossWeights
) -> LossTerms:
    """Loss of one batch; answer_logit (B, T). A term without any target in the batch is 0."""
    keep, labels, count = output.keep_logit.float(), batch.labels, batch.labels.shape[1]
    known = labels >= 0
    target = torch.where(known, labels, torch.zeros_like(labels))
    token_target = target.gather(1, batch.segment.clamp(min=0))
    bce = functional.binary_cross_entropy_with_logits(keep, token_target, reduction="none")
    token, size = segment_mean(bce, batch.segment, count)
    known = known & (size > 0)
    score, _ = segment_mean(torch.sigmoid(keep), batch.segment, count)
    # This function stops at NaN with a bare RuntimeError; the token term carries it to the total.
    score = torch.nan_to_num(score, nan=0.5).clamp(1e-4, 1 - 1e-4)
    sentence = functional.binary_cross_entropy(score, target, reduction="none")
    has_teacher = ~torch.isnan(batch.teacher)
    rank = output.rank_logit.float()
    terms = {
        "token": _mean(token, known),
        "sentence": _mean(sentence, known),
        "listwise": _listwise(keep, batch, known, count),
        "teacher": _mean((rank - torch.nan_to_num(batch.teacher)) ** 2, has_teacher),
        "relevance": _mean(
            functional.binary_cross_entropy_with_logits(rank, batch.relevant, reduction="none"),
            ~has_teacher,
        ),
        "answer": _mean(
            functional.binary_cross_entropy_with_logits(
                answer_logit.float(),
                batch.answer.clamp(min=0),
                reduction="none",
                pos_weight=answer_logit.new_tensor(ANSWER_POSITIVE_WEIGHT, dtype=torch.float32),
            ),
            batch.answer >= 0,
        ),
    }
    total = torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()
    return LossTerms(total, **terms)


def _listwise(keep: Tensor, batch: Batch, known: Tensor, count: int) -> Tensor:
    mean, _ = segment_mean(keep, batch.segment, count)
    wanted = known & (batch.labels == 1)
    usable = wanted.any(1) & (known.sum(1) > 1)
    share = functional.log_softmax(mean.masked_fill(~known, -1e4), 1)
    found = torch.logsumexp(share.masked_fill(~wanted, -1e4), 1)
    return _mean(-found, usable)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over the chosen elements; 0 where there are none."""
    return torch.where(where, values, torch.zeros_like(values)).sum() / where.sum().clamp(min=1)
