"""What a contrastive loss says about each weight of an embedding model, and which of them stay.

Pairs of texts that belong together are told apart from the other pairs of their batch (InfoNCE).
The whole model is in memory: embedding models are small beside language models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import InputError, ModelError
from ...pruners import rules
from ...pruners.models.block_layouts import ATTENTION_ROLES, layout_of
from ...pruners.weight.gaprune import GaPrune

Pair = tuple[str, str]
Parts = Literal["mlp", "attention", "both"]
Arrays = dict[str, npt.NDArray[np.float32]]
Masks = dict[str, npt.NDArray[np.bool_]]
_EPSILON = 1e-8


def encoder_matrices(network: nn.Module, parts: Parts = "mlp") -> dict[str, int]:
    """Paths of the prunable matrices in a transformer without a head, each with its layer.

    Raises ModelError for an architecture whose blocks are not known.
    """
    config: Any = network.config
    layout = layout_of(config)
    prefix = f"{getattr(network, 'base_model_prefix', '')}."
    found: dict[str, int] = {}
    path = layout.blocks.removeprefix(prefix)
    try:
        blocks: Any = network.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"expected the blocks of a {config.model_type} at {path!r}; found none. Give the"
            " folder of a sentence-transformers model whose first module is a transformer."
        ) from error
    for layer, block in enumerate(blocks):
        for matrix in layout.matrices(block):
            attention = matrix.role in ATTENTION_ROLES
            if parts == "both" or attention == (parts == "attention"):
                found[f"{path}.{layer}.{matrix.name}"] = layer
    return found


def embed(model: Any, texts: Sequence[str]) -> Tensor:
    """Unit vectors (N, d) of texts by a sentence-transformers model; gradients flow."""
    prepare = getattr(model, "preprocess", None) or model.tokenize
    device = next(model.parameters()).device
    given = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in prepare(list(texts)).items()
    }
    return functional.normalize(model(given)["sentence_embedding"].float(), dim=1)


def contrastive_loss(questions: Tensor, passages: Tensor, scale: float) -> Tensor:
    """Mean over pairs of -log softmax(scale cos(q_i, p_j))_i: InfoNCE, the batch as negatives.

    Both (B, d) of unit length; B at least 2.
    """
    scores = scale * questions @ passages.T
    return functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


@dataclass(frozen=True, slots=True)
class PairGradients:
    """Over the batches of one set: mean and mean square of the loss's gradient, by matrix path.

    `loss` is the mean of the batches' losses.
    """

    mean: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]
    loss: float


def pair_gradients(
    model: Any,
    network: nn.Module,
    paths: Sequence[str],
    pairs: Sequence[Pair],
    *,
    batch_pairs: int,
    scale: float = 20.0,
) -> PairGradients:
    """Gradients of the contrastive loss at some matrices, without dropout.

    Departures from the published program: it divides the sum of the batches' squares by the
    pairs and adds 1e-8, trains through dropout, and adds a hard negative to each pair.

    Parameters
    ----------
    network
        The transformer inside `model`, which `paths` are in.
    pairs
        In batches of `batch_pairs` in their order; a last batch of one pair is left out, since
        it has nothing to be told apart from.

    Raises InputError for fewer than 2 pairs, or a loss that is not finite.
    """
    model.eval().requires_grad_(False)
    weights = {path: network.get_submodule(path).get_parameter("weight") for path in paths}
    for weight in weights.values():
        weight.requires_grad_(True)
    total = {path: torch.zeros_like(weight) for path, weight in weights.items()}
    squares = {path: torch.zeros_like(weight) for path, weight in weights.items()}
    losses: list[float] = []
    try:
        for batch in _batches(pairs, batch_pairs):
            loss = contrastive_loss(
                embed(model, [first for first, _ in batch]),
                embed(model, [second for _, second in batch]),
                scale,
            )
            if not bool(torch.isfinite(loss.detach())):
                raise InputError(
                    f"expected a finite loss of pairs; found {float(loss.detach())} in the batch"
                    f" that starts with {batch[0][0][:60]!r}."
                )
            found = torch.autograd.grad(loss, list(weights.values()))
            for path, gradient in zip(weights, found, strict=True):
                total[path] += gradient
                squares[path] += gradient.square()
            losses.append(float(loss.detach()))
    finally:
        model.requires_grad_(False)
    if not losses:
        raise InputError(f"expected at least 2 pairs of texts; found {len(pairs)}.")
    count = len(losses)
    return PairGradients(
        {path: (value / count).cpu() for path, value in total.items()},
        {path: (value / count).cpu() for path, value in squares.items()},
        sum(losses) / count,
    )


def _batches(pairs: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
    for start in range(0, len(pairs), size):
        batch = pairs[start : start + size]
        if len(batch) > 1:
            yield batch


def alignment(
    domain: Tensor, general: Tensor, *, by: Literal["product", "cosine"] = "product"
) -> Tensor:
    """How two mean gradients (out, in) agree around each weight, (out, in) in [-1, 1].

    product, as published: both are divided by their lengths, multiplied number by number and
    averaged over 3 x 3 neighbours (0 beyond the border). Each number is then of the order of one
    over the number of weights. cosine: the same sum over each neighbourhood divided by the two
    gradients' lengths there, so that it reaches 1 and -1; 0 where one of them is 0.
    """
    first = domain.double() / (domain.double().norm() + _EPSILON)
    second = general.double() / (general.double().norm() + _EPSILON)
    together = _around(first * second)
    if by == "product":
        return (together / 9).float()
    length = (_around(first.square()) * _around(second.square())).sqrt()
    return torch.where(length > 0, together / length, 0.0).clamp(-1, 1).float()


def _around(values: Tensor) -> Tensor:
    """Sum over 3 x 3 neighbours."""
    kernel = torch.ones(1, 1, 3, 3, dtype=values.dtype)
    return functional.conv2d(values[None, None], kernel, padding=1)[0, 0]


def balanced(fisher: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fisher numbers scaled so that the mean of F |w| over all matrices is that of sqrt(|w|).

    A departure that makes the two terms of the importance comparable; a Fisher of 0 stays 0.
    """
    gain = sum(
        float((fisher[path].double() * w.double().abs()).sum()) for path, w in weights.items()
    )
    root = sum(float(w.double().abs().sqrt().sum()) for w in weights.values())
    factor = root / gain if gain > 0 else 0.0
    return {path: value * factor for path, value in fisher.items()}


def gaprune_scores(
    method: GaPrune,
    weights: Mapping[str, Tensor],
    domain: PairGradients,
    general: PairGradients,
    *,
    fisher: Literal["published", "balanced"] = "published",
    align: Literal["product", "cosine"] = "product",
) -> Arrays:
    """The method's importance of every weight, float32 in the shapes of the matrices."""
    dom, gen = dict(domain.fisher), dict(general.fisher)
    if fisher == "balanced":
        dom, gen = balanced(dom, weights), balanced(gen, weights)
    return {
        path: method.importance(
            weight.numpy(),
            dom[path].numpy(),
            gen[path].numpy(),
            alignment(domain.mean[path], general.mean[path], by=align).numpy(),
        )
        for path, weight in weights.items()
    }


def magnitude_scores(weights: Mapping[str, Tensor]) -> Arrays:
    """|w|, float32."""
    return {path: weight.abs().float().numpy() for path, weight in weights.items()}


def random_scores(weights: Mapping[str, Tensor], seed: int) -> Arrays:
    """A number drawn for each weight from (seed, its place among all of them), float32."""
    made: Arrays = {}
    start = 0
    for path, weight in weights.items():
        place = np.arange(start, start + weight.numel(), dtype=np.int64)
        made[path] = rules.uniform(seed, place).astype(np.float32).reshape(weight.shape)
        start += weight.numel()
    return made


def keep_over_all(scores: Mapping[str, npt.NDArray[np.float32]], keep: float) -> Masks:
    """Exactly ceil(keep N) of the weights of all matrices; ties to the earlier place.

    Raises InputError where a score is not finite, with the matrix's path.
    """
    for path, score in scores.items():
        if not np.isfinite(score).all():
            raise InputError(
                f"{path}: expected finite scores; found a NaN or an infinity. Copy the model"
                " again, or lower `scale`."
            )
    flat = np.concatenate([score.ravel() for score in scores.values()])
    kept, _ = rules.top_fraction(flat, np.arange(len(flat), dtype=np.int64), keep)
    made: Masks = {}
    start = 0
    for path, score in scores.items():
        made[path] = kept[start : start + score.size].reshape(score.shape)
        start += score.size
    return made


@dataclass(frozen=True, slots=True)
class RetrievalQuality:
    """How well questions find their passages among all passages of the set.

    Attributes
    ----------
    mrr
        Mean of 1/rank of a question's own passage; passages as similar come before it.
    recall
        Share of questions whose own passage is among the first 10.
    cosine
        Mean cosine of the vectors with those of the dense model, over all texts.
    """

    mrr: float
    recall: float
    cosine: float


def retrieval_quality(
    vectors: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]],
    dense: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]],
) -> RetrievalQuality:
    """Of the unit vectors (N, d) of questions and of passages."""
    questions, passages = vectors
    scores = questions @ passages.T
    own = np.diagonal(scores)[:, None]
    # A passage that is as similar counts against the question: equal vectors find nothing. So
    # does a NaN.
    rank = (~(scores < own)).sum(axis=1)
    cosines = [(mine * theirs).sum(axis=1) for mine, theirs in zip(vectors, dense, strict=True)]
    return RetrievalQuality(
        float((1.0 / rank).mean()),
        float((rank <= 10).mean()),
        float(np.concatenate(cosines).mean()),
    )
