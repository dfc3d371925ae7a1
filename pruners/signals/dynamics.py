"""What one evaluation pass of a classifier says of each row: the signals of training dynamics.

All are taken in evaluation mode after an epoch. Reference code takes some of them at the
minibatch, in training mode, where they hang on the batch and on the moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from ...errors import InputError, ModelError
from ..models.classifiers import Classifier

GradientNorm = Literal["last_layer", "all"]

_BLOCK = 1 << 21  # float64 values of a block of logits
_GRADIENTS = 1 << 25  # float32 values of the gradients that are held at once
_MOST_ROWS = 256

Columns = dict[str, npt.NDArray[Any]]


def log_probabilities(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """log softmax of (N, C) logits, natural logs, (N, C) float64; finite for finite logits."""
    wide = logits.astype(np.float64)
    rows, top = np.arange(len(wide)), wide.argmax(axis=1)
    wide -= wide[rows, top][:, None]
    rest = np.exp(wide)
    rest[rows, top] = 0.0  # log1p keeps what is left beside a probability near 1
    wide -= np.log1p(rest.sum(axis=1, keepdims=True))
    return wide


def measures(
    logits: npt.NDArray[np.floating],
    label: npt.NDArray[np.integer],
    previous_log_probability: npt.NDArray[np.floating] | None = None,
) -> Columns:
    """Columns of the dynamics table for one epoch.

    Parameters
    ----------
    logits
        (N, C), finite.
    label
        (N,) codes from 0 to C - 1.
    previous_log_probability
        (N, C) natural logs after the epoch before, of the same rows; None in the first.

    Returns
    -------
    true_probability
        (N,) float32, probability p_y of the label.
    margin
        (N,) float32, logits: z_y - max of the others (AUM, arXiv:2001.10528), not of
        probabilities. 0 where there is no other class.
    correct
        (N,) bool: the label's logit is above every other one; a tie is not correct. A single
        class is always correct.
    loss
        (N,) float32, -log p_y in nats.
    el2n
        (N,) float32, Euclidean length of p - onehot(y) (arXiv:2107.07075).
    probability_change
        (N,) float32, nats: sum over classes of |p' log(p' / p)| from the epoch before (p) to
        this one (p') (TDDS, arXiv:2311.13613), where that epoch was given. From log
        probabilities, so it stays finite where a probability underflows.

    Raises
    ------
    InputError
        A label that is no class, or arrays that are not aligned.
    ModelError
        A logit that is not finite.
    """
    _check(logits, label, previous_log_probability)
    found: list[Columns] = []
    for part in _blocks(*logits.shape):
        before = None if previous_log_probability is None else previous_log_probability[part]
        found.append(_measures(logits[part], label[part], before))
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


def _measures(
    logits: npt.NDArray[np.floating],
    label: npt.NDArray[np.integer],
    before: npt.NDArray[np.floating] | None,
) -> Columns:
    n, classes = logits.shape
    rows = np.arange(n)
    log_p = log_probabilities(logits)
    p = np.exp(log_p)
    true = log_p[rows, label]
    others = logits.astype(np.float64)
    own = others[rows, label].copy()
    others[rows, label] = -np.inf
    margin = own - others.max(axis=1) if classes > 1 else np.zeros(n)
    apart = p.copy()
    apart[rows, label] = np.expm1(true)  # p - 1 without cancellation
    columns = {
        "true_probability": np.exp(true).astype(np.float32),
        "margin": margin.astype(np.float32),
        "correct": (margin > 0) | (classes == 1),
        "loss": np.maximum(-true, 0.0).astype(np.float32),
        "el2n": np.sqrt((apart**2).sum(axis=1)).astype(np.float32),
    }
    if before is not None:
        change = (p * np.abs(log_p - before)).sum(axis=1)
        columns["probability_change"] = change.astype(np.float32)
    return columns


def gradient_norms(
    model: Classifier,
    x: Tensor,
    label: npt.NDArray[np.integer],
    kind: GradientNorm = "last_layer",
    *,
    batch_size: int = 512,
) -> npt.NDArray[np.float32]:
    """Euclidean length of the cross-entropy's gradient at each row alone (GraNd, 2107.07075).

    "last_layer" is exact for the head, its bias among it: |p - onehot(y)| sqrt(1 + |h|²) for
    features h. "all" is over every parameter that takes a gradient, through torch.func in
    chunks of bounded memory. Evaluation mode, so batch normalisation uses its running
    numbers and a row does not hang on its batch; never divided by a batch's size.

    Parameters
    ----------
    model
        Trained some way: at initialisation the score says next to nothing (arXiv:2303.14753).
    x, label
        (N, ...) and (N,).

    Returns
    -------
    (N,) float32, higher = harder. Raises ModelError where torch.func cannot follow a network.
    """
    was, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        if kind == "all":
            return _all_parameters(model, x, label, device)
        found = []
        with torch.no_grad():
            for start in range(0, len(x), batch_size):
                h = model.features(x[start : start + batch_size].to(device))
                logits = model.head(h).float().cpu().numpy()
                part = label[start : start + batch_size]
                found.append(
                    last_layer_norms(
                        logits, h.float().cpu().numpy(), part, bias=model.head.bias is not None
                    )
                )
        return np.concatenate(found) if found else np.zeros(0, np.float32)
    finally:
        model.train(was)


def last_layer_norms(
    logits: npt.NDArray[np.floating],
    features: npt.NDArray[np.floating],
    label: npt.NDArray[np.integer],
    *,
    bias: bool = True,
) -> npt.NDArray[np.float32]:
    """`gradient_norms` of the last layer from its inputs (N, d) and outputs (N, C), (N,)."""
    length = np.zeros(len(logits))
    for part in _blocks(*features.shape):
        length[part] = (features[part].astype(np.float64) ** 2).sum(axis=1)
    error = measures(logits, label)["el2n"].astype(np.float64)
    return (error * np.sqrt(length + float(bias))).astype(np.float32)


def _all_parameters(
    model: Classifier, x: Tensor, label: npt.NDArray[np.integer], device: torch.device
) -> npt.NDArray[np.float32]:
    parameters = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    fixed = {k: p.detach() for k, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())

    def loss(free: Mapping[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(model, {**free, **fixed}, (row[None],))
        return F.cross_entropy(logits, target[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    size = sum(p.numel() for p in parameters.values())
    rows = max(1, min(_MOST_ROWS, _GRADIENTS // max(size, 1)))
    targets = torch.from_numpy(np.asarray(label, np.int64))
    lengths = torch.zeros(len(x), dtype=torch.float64)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        try:
            gradients = each(parameters, x[part].to(device), targets[part].to(device))
        except RuntimeError as error:
            raise ModelError(
                f"gradient_norm: expected a network that torch.func can follow, found: {error}."
                " Use `gradient_norm: last_layer`."
            ) from error
        for value in gradients.values():
            lengths[part] += value.double().flatten(1).square().sum(dim=1).cpu()
    return lengths.sqrt().float().numpy()


def _blocks(n: int, width: int) -> Iterator[slice]:
    """Slices of rows of bounded size; one empty slice where there are no rows."""
    size = max(1, _BLOCK // max(width, 1))
    for start in range(0, max(n, 1), size):
        yield slice(start, min(start + size, n))


def _check(
    logits: npt.NDArray[np.floating],
    label: npt.NDArray[np.integer],
    before: npt.NDArray[np.floating] | None,
) -> None:
    if logits.ndim != 2 or not logits.shape[1] or label.shape != (len(logits),):
        raise InputError(
            f"expected logits (N, C) and labels (N,) of the same rows; found {logits.shape} and"
            f" {label.shape}."
        )
    if before is not None and before.shape != logits.shape:
        raise InputError(
            f"expected the log probabilities of the epoch before of shape {logits.shape}; found"
            f" {before.shape}."
        )
    wrong = np.flatnonzero((label < 0) | (label >= logits.shape[1]))
    if len(wrong):
        raise InputError(
            f"expected labels from 0 to {logits.shape[1] - 1}, one for each logit; found"
            f" {label[wrong[0]]} in row {wrong[0]} (from 0)."
        )
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise ModelError(
            f"expected finite logits; found {logits[int(np.argmin(finite))].tolist()[:5]} in row"
            f" {int(np.argmin(finite))} (from 0). Lower the learning rate."
        )
