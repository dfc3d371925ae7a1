"""How well a compressed model does on held-out rows: perplexity, and how far it is from the dense.

A causal model is scored on every target given what stands before it. A masked one (an encoder) is
scored on places that are masked together, drawn from (seed, row, place): a pseudo-perplexity in
one pass a row (after Salazar et al. 2020, arXiv:1910.14659, who mask one place a pass), which
compares models over the same places and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor

from ...errors import InputError, ModelError
from ...pruners.models.block_layouts import layout_of
from ...pruners.models.streamed_model import read_config
from ...pruners.rules import mix, uniform
from .walk import Batch, batches_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_PLACES = 512  # whose distributions over the vocabulary are held at once, in float64


@dataclass(frozen=True, slots=True)
class Rows:
    """N rows to judge models on.

    Attributes
    ----------
    ids
        (N,) int64, for messages and for what is drawn.
    tokens, targets
        For each row its token ids (L,) int64, and (L,) bool: which of them are scored.
    """

    ids: Ints
    tokens: Sequence[Ints]
    targets: Sequence[Bools]


@dataclass(frozen=True, slots=True)
class RowScores:
    """What a model made of N rows, each a sum over the row's targets.

    Attributes
    ----------
    count
        (N,) int64 targets.
    nll
        (N,) float64, -log p of the targets, nats; lower is better.
    kl
        (N,) float64, KL(dense ‖ this), nats; 0 for the dense model itself.
    same
        (N,) int64 targets where both models would say the same first.
    """

    count: Ints
    nll: Floats
    kl: Floats
    same: Ints

    @property
    def mean_nll(self) -> float:
        """Over all targets, nats a token."""
        return float(self.nll.sum() / self.count.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean over all targets."""
        return float(np.exp(self.mean_nll))

    @property
    def mean_kl(self) -> float:
        """Nats a token."""
        return float(self.kl.sum() / self.count.sum())

    @property
    def agreement(self) -> float:
        """Share of targets where both models' first choices are the same."""
        return float(self.same.sum() / self.count.sum())


def load_packed(folder: str | Path, device: str = "cpu") -> Any:
    """A model as its folder stores it (dtype, packed codes), in eval mode and without gradients.

    Raises ModelError where it cannot be loaded, or weights are missing.
    """
    import transformers

    place = Path(folder)
    causal = layout_of(read_config(place)).head == "causal"
    auto: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    try:
        model, info = auto.from_pretrained(
            str(place),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype="auto",
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        more = (
            " Packed codes need compressed-tensors: pip install 'prunery[quant]'."
            if isinstance(error, ImportError)
            else ""
        )
        raise ModelError(
            f"{place}: expected a model that transformers loads; found {type(error).__name__}:"
            f" {error}.{more}"
        ) from error
    missing = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
    if missing:
        raise ModelError(
            f"{place}: expected weights for every part of the model; missing or of another shape:"
            f" {', '.join(missing[:5])}. Compress the model again."
        )
    return model.to(device).eval().requires_grad_(False)


def masked_rows(rows: Rows, mask: int, share: float, seed: int) -> tuple[Rows, Rows]:
    """Rows with `share` of their targets masked, at least one, and those to read them against.

    Returns the masked rows (targets are the masked places) and the rows as they were, with the
    same targets. Places are the smallest of a number drawn from (seed, row id, place).
    """
    tokens, targets = [], []
    for id_, row, target in zip(rows.ids, rows.tokens, rows.targets, strict=True):
        places = np.flatnonzero(target)
        with np.errstate(over="ignore"):  # whole numbers of 64 bits wrap
            stream = int(mix(np.uint64((int(id_) + seed) & 0xFFFFFFFFFFFFFFFF)))
        order = np.argsort(uniform(stream, places), kind="stable")
        chosen = places[order[: max(1, round(share * len(places)))]]
        hidden = np.zeros(len(row), np.bool_)
        hidden[chosen] = True
        tokens.append(np.where(hidden, mask, row))
        targets.append(hidden)
    return Rows(rows.ids, tokens, targets), Rows(rows.ids, rows.tokens, targets)


def compare(
    dense: Any,
    other: Any,
    rows: Rows,
    *,
    read: Rows | None = None,
    causal: bool = True,
    batch_tokens: int = 2048,
) -> tuple[RowScores, RowScores]:
    """Score two models on the same rows; the second is held against the first.

    Parameters
    ----------
    rows
        What is scored. A causal model's first token of a row is never a target.
    read
        What the models are given instead (masked rows); None gives them `rows`.

    Raises
    ------
    InputError
        No target, or the models have other vocabularies.
    ModelError
        A model's output is not finite; the message names the row.
    """
    targets = [_scored(target, causal) for target in rows.targets]
    count = np.array([int(target.sum()) for target in targets], np.int64)
    if not count.sum():
        raise InputError(
            "expected rows with tokens to score, found none: all labels are -100, or every row"
            " has one token. Give other evaluation rows."
        )
    batches = batches_of((read or rows).tokens, tokens=batch_tokens)
    made = [(np.zeros(len(count)), np.zeros(len(count)), np.zeros(len(count), np.int64))]
    made.append((np.zeros(len(count)), np.zeros(len(count)), count.copy()))
    (nll, kl, same), (dense_nll, dense_kl, dense_same) = made
    for batch in batches:
        first, second = _logits(dense, batch, rows), _logits(other, batch, rows)
        if first.shape[-1] != second.shape[-1]:
            raise InputError(
                "expected two models of one vocabulary, found"
                f" {first.shape[-1]} and {second.shape[-1]} entries. Give the model that was"
                " compressed as `dense`."
            )
        for place, row in enumerate(batch.rows.tolist()):
            at = np.flatnonzero(targets[row])
            says = torch.from_numpy(at - 1 if causal else at)
            wanted = torch.from_numpy(rows.tokens[row][at].astype(np.int64))
            for start in range(0, len(at), _PLACES):
                part = slice(start, start + _PLACES)
                found = _pair(first[place][says[part]], second[place][says[part]], wanted[part])
                dense_nll[row] += found[0]
                nll[row] += found[1]
                kl[row] += found[2]
                same[row] += int(found[3])
    return (
        RowScores(count, dense_nll, dense_kl, dense_same),
        RowScores(count, nll, kl, same),
    )


def _scored(target: Bools, causal: bool) -> Bools:
    made = target.copy()
    if causal and len(made):
        made[0] = False
    return made


def _logits(model: Any, batch: Batch, rows: Rows) -> Tensor:
    device = next(model.parameters()).device
    given: dict[str, Any] = {"input_ids": batch.input_ids.to(device)}
    if not bool(batch.valid.all()):
        given["attention_mask"] = batch.valid.to(device, torch.int64)
    with torch.no_grad():
        logits: Tensor = model(**given).logits
    finite = torch.isfinite(logits).all(-1).cpu() | ~batch.valid
    if not bool(finite.all()):
        bad = int(torch.nonzero(~finite.all(1))[0])
        raise ModelError(
            f"row {int(rows.ids[batch.rows[bad]])}: expected finite logits, found a NaN or an"
            " infinity. Store the model in a wider dtype (bfloat16 or float32), or compress less."
        )
    return logits.cpu()


def _pair(dense: Tensor, other: Tensor, wanted: Tensor) -> tuple[float, float, float, float]:
    """Sums over K places of -log p of both, KL(dense ‖ other), and equal first choices."""
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (dense, other))
    at = wanted[:, None]
    kl = (p.exp() * (p - q)).sum()
    same = (p.argmax(-1) == q.argmax(-1)).sum()
    return float(-p.gather(1, at).sum()), float(-q.gather(1, at).sum()), float(kl), float(same)
