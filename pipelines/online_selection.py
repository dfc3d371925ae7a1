"""Selection inside training: what is chosen, as pure functions of scores.

The trainer (`pruning_trainer`) scores the samples of one accumulation window with the model as it
is; this module turns the scores into a decision about every sample and token of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import InputError, ModelError
from ..pruners import rules
from ..pruners.contract import Pruner, Selection, Signals
from ..pruners.sample.infobatch import InfoBatch
from ..storage.ids import row_id
from .sft_signals import TOKEN_LISTS, SftRows, known_signals

if TYPE_CHECKING:
    from torch import nn

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

# What the scoring pass of the model in training gives; the rest comes from other models or columns.
_SCORED = frozenset({"loss", "entropy", "log_sum_exp", "target_rank", "prompt_attention"})
_OF_SAMPLES = frozenset({"answer_loss", "answer_entropy"})
_OTHER_MODELS = {"history_loss": "history", "reference_loss": "reference"}
_FULL_LAST = 0.125


@dataclass(frozen=True, kw_only=True)
class OnlineSelection:
    """How `PruningTrainer` selects while it trains.

    Attributes
    ----------
    method
        A method of unit "token" (`QTuning`, `SsToken`, `ExcessLoss`, ...) or "sample" (`Random`,
        `InfoBatch`, ...). Signals that it needs come from one pass of the model without
        gradients over each window; per-sample signals that no pass gives (`quality`, `rating`,
        `embedding`, ...) from columns of that name of the training set.
    pool
        What one call of the method sees: "window" = all micro-batches of an accumulation window
        on one device, "batch" = each micro-batch for itself, as Q-Tuning was published.
        Quantiles are better over a window.
    warmup_samples
        Until so many rows of the loader were seen (over all devices), a method with an option
        `gamma` runs with gamma = 0 (ssToken's code: attention alone while the excess loss is
        noise; 10,000 of 50,000 samples there), and any other method keeps everything.
    history
        Where `history_loss` comes from: "base" = the weights that training began with (with
        PEFT: its adapters switched off), "ema" = their exponential moving average, a model of
        its own, or None = the column `history_loss` of the training set (one list a sample, a
        value for each trainable token, as `token_signals` writes it) and, where there is none,
        as "base". "base" and "ema" hold a second copy of the trained weights, without PEFT.
    ema
        Decay of the average, once an optimiser step: history = ema * history + (1 - ema) * now.
    refresh
        With "base": take the present weights as the new base every so many optimiser steps.
    reference
        Model for `reference_loss`, or None = a column of that name as for `history`.
    layer, exclude_sink
        Of the attention on the prompt (see `PromptAttention`).
    full_last
        Last share of training that uses all data, unscored; None = 0.125 for InfoBatch (its
        1 - delta, arXiv 2303.04947), 0 for any other method.
    protect
        Token ids that are `protected`; None = the end-of-sequence ids of model and tokenizer.
    decisions
        A file for one JSON line a sample and step (id, kept tokens, weight, reasons), or None.
        With several devices each writes its own, numbered. Steps that keep everything unscored
        (`warmup_samples`, `full_last`) write nothing.
    log
        Report counts, seconds and the plane of Q-Tuning through `Trainer.log`.
    """

    method: Pruner
    pool: Literal["window", "batch"] = "window"
    warmup_samples: int = 0
    history: Literal["base", "ema"] | nn.Module | None = None
    ema: float = 0.999
    refresh: int | None = None
    reference: nn.Module | None = None
    layer: int = -1
    exclude_sink: int = 0
    full_last: float | None = None
    protect: tuple[int, ...] | None = None
    decisions: str | Path | None = None
    log: bool = True

    def __post_init__(self) -> None:
        if self.method.unit not in ("token", "sample"):
            raise InputError(
                "selection inside training takes a method over samples or tokens; found"
                f" {type(self.method).__name__} over {self.method.unit}s."
            )
        if self.pool not in ("window", "batch"):
            raise InputError(f"`pool` must be 'window' or 'batch'; found {self.pool!r}.")
        if isinstance(self.history, str) and self.history not in ("base", "ema"):
            raise InputError(
                f"`history` must be 'base', 'ema', a model or None; found {self.history!r}."
            )
        if self.warmup_samples < 0:
            raise InputError(f"`warmup_samples` must be at least 0; found {self.warmup_samples}.")
        if not 0.0 <= self.ema < 1.0:
            raise InputError(f"`ema` must lie in [0, 1); found {self.ema}.")
        if self.refresh is not None and (self.refresh < 1 or self.history not in ("base", None)):
            raise InputError(
                "`refresh` must be at least 1 and goes with history='base'; found"
                f" {self.refresh} with history={self.history!r}."
            )
        if self.full_last is not None and not 0.0 <= self.full_last <= 1.0:
            raise InputError(f"`full_last` must lie in [0, 1]; found {self.full_last}.")

    def needs(self, name: str) -> bool:
        """Does the method need that signal?"""
        return name in self.method.needs

    @property
    def scores(self) -> bool:
        """Does the method need a pass of the model, or does it decide blindly?"""
        return bool(self.method.needs & (_SCORED | _OF_SAMPLES))

    def column_names(self, found: Sequence[str]) -> tuple[str, ...]:
        """Columns of the training set (among `found`) that the decision reads, besides `id`.

        Raises
        ------
        InputError
            The method needs a signal that neither a pass of a model nor a column gives.
        """
        wanted: list[str] = []
        from_pass = known_signals(_SCORED) | {"id", "tokens"}
        for name in sorted(self.method.needs - from_pass):
            option = _OTHER_MODELS.get(name)
            given = option is not None and getattr(self, option) is not None
            if not given and name in found:
                wanted.append(name)
            elif not given and name != "history_loss":
                raise InputError(
                    f"{type(self.method).__name__} needs the signal `{name}`; found the columns"
                    f" {sorted(found)} in the training set. Add a column `{name}`"
                    + (f", or give a model as `{option}`." if option else ".")
                )
        return tuple(wanted)

    def keeps_all(self, seen: int, progress: float) -> bool:
        """Is everything kept, unscored, after `seen` samples and that share of the steps?"""
        last = self.full_last
        if last is None:
            last = _FULL_LAST if isinstance(self.method, InfoBatch) else 0.0
        return progress >= 1.0 - last or (seen < self.warmup_samples and not self.has_gamma)

    @property
    def has_gamma(self) -> bool:
        """Does the method weigh two signals by an option `gamma`, as ssToken does?"""
        return "gamma" in _options(self.method)

    def method_now(self, seen: int) -> Pruner:
        """The method after `seen` samples: without its first signal while warming up."""
        if seen < self.warmup_samples and self.has_gamma:
            warm: Pruner = replace(self.method, gamma=0.0)  # type: ignore[type-var]
            return warm
        return self.method


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about the S samples of a window and their T trainable tokens.

    Attributes
    ----------
    keep
        (T,) bool.
    weight
        (T,) float32, what a kept token's loss is multiplied by; 1 unless the method rescales.
    reasons
        For each sample, its reasons and how many of its tokens (of a method over samples: 1)
        each was given to.
    plane
        Mean over the pools of `correlation` (loss and entropy) and `topped_up` (share of kept
        samples that the top-up filled in); empty for methods without a plane.
    """

    keep: Bools
    weight: Floats
    reasons: list[dict[str, int]]
    plane: dict[str, float]


def decide(
    method: Pruner, rows: SftRows, pools: Sequence[Ints], *, seed: int, plane: bool = True
) -> Decision:
    """Apply the method to each pool of samples.

    Parameters
    ----------
    rows
        The samples; ones without a trainable token are in no decision.
    pools
        Numbers of the samples of each pool.
    seed
        Of this step; see `step_seed`.
    plane
        Report Q-Tuning's plane.
    """
    keep = np.zeros(int(rows.offset[-1]), np.bool_)
    weight = np.ones(len(keep), np.float32)
    reasons: list[dict[str, int]] = [{} for _ in rows.ids]
    planes: list[dict[str, float]] = []
    for pool in pools:
        samples = pool[rows.counts[pool] > 0]
        if not len(samples):
            continue
        tokens = np.flatnonzero(np.isin(rows.owner, samples))
        if method.unit == "token":
            signals = rows.of_tokens(method, tokens)
            selection = method(signals, seed=seed)
            keep[tokens], weight[tokens] = selection.keep, selection.weight
            _count(reasons, rows.owner[tokens], selection)
        else:
            signals = rows.of_samples(method, samples)
            selection = method(signals, seed=seed)
            place = np.searchsorted(samples, rows.owner[tokens])
            keep[tokens], weight[tokens] = selection.keep[place], selection.weight[place]
            _count(reasons, samples, selection)
        if plane and hasattr(method, "plane"):
            planes.append(_plane(method, signals, seed))
    return Decision(keep, np.where(keep, weight, np.float32(1.0)), reasons, _means(planes))


def _count(reasons: list[dict[str, int]], samples: Ints, selection: Selection) -> None:
    for sample, code in zip(samples.tolist(), selection.reason.tolist(), strict=True):
        name = selection.reasons[code]
        reasons[sample][name] = reasons[sample].get(name, 0) + 1


def _means(planes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the pools in which the value is defined; left out where it is in none."""
    found: dict[str, list[float]] = {}
    for plane in planes:
        for name, value in plane.items():
            if np.isfinite(value):
                found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _plane(method: Any, signals: Signals, seed: int) -> dict[str, float]:
    found = method.plane(signals, seed=seed)
    return {
        "correlation": float(found.correlation),
        "topped_up": float(found.topped_up_share),
    }


def step_seed(seed: int, step: int) -> int:
    """Seed of one optimiser step, so that a method that draws draws anew at every step."""
    state = np.array([seed & 0xFFFFFFFF], np.uint64) << np.uint64(32)
    return int(rules.mix(state | np.uint64(step))[0])


def sample_id(value: Any, tokens: npt.NDArray[np.integer]) -> int:
    """Stable id of a sample, 63 bits: its `id` where it has one, else a hash of its tokens."""
    if value is None:
        return row_id(np.ascontiguousarray(tokens, dtype="<i8").tobytes())
    if isinstance(value, int) and value >= 0:
        return value
    if not isinstance(value, int | str):
        raise InputError(
            f"the column `id` must hold whole numbers or strings; found {value!r} of type"
            f" {type(value).__name__}. Convert it, or leave it out: ids then come from"
            " the tokens."
        )
    return row_id(value)


def unique_ids(ids: Sequence[int]) -> Ints:
    """Ids with repeats told apart: the n-th time that a sample stands in a window is its own."""
    seen: dict[int, int] = {}
    made = []
    for one in ids:
        times = seen.get(one, 0)
        seen[one] = times + 1
        made.append(one if times == 0 else row_id(one, times))
    return np.array(made, np.int64)


def turns(owner: Ints, position: Ints) -> Ints:
    """(T,) number of the run of neighbouring trainable tokens that each token stands in.

    A turn of the assistant is such a run: between two of them stands at least one token that
    is not trained. Only borders matter, so runs are numbered through.
    """
    if not len(position):
        return np.zeros(0, np.int64)
    borders = (np.diff(position) != 1) | (np.diff(owner) != 0)
    return np.concatenate([[0], np.cumsum(borders)]).astype(np.int64)


def check_finite(rows: SftRows, names: Sequence[str], step: int) -> None:
    """Refuse scores that are not finite.

    Raises
    ------
    ModelError
        Names the signal, the sample as the training set names it, the token and the step.
    """
    for signal in TOKEN_LISTS:
        values = rows.tokens.get(signal)
        if values is None or np.isfinite(values).all():
            continue
        token = int(np.flatnonzero(~np.isfinite(values))[0])
        sample = int(rows.owner[token])
        raise ModelError(
            f"step {step}: `{signal}` of sample {names[sample]} is {values[token]} at token"
            f" {int(rows.tokens['token_position'][token])}; a finite number was expected. Look at"
            " that row, at the weights and at the learning rate; nothing was trained on this"
            " window."
        )


def records(
    step: int, names: Sequence[str], rows: SftRows, decision: Decision
) -> list[dict[str, Any]]:
    """One JSON object a sample: what was decided about it at this step and why."""
    kept = np.bincount(rows.owner[decision.keep], minlength=len(rows.ids))
    found = []
    for number, name in enumerate(names):
        tokens = slice(rows.offset[number], rows.offset[number + 1])
        weights = decision.weight[tokens][decision.keep[tokens]]
        found.append(
            {
                "step": step,
                "id": name,
                "tokens": int(rows.counts[number]),
                "kept_tokens": int(kept[number]),
                "weight": float(weights[0]) if len(weights) else 0.0,
                "reasons": decision.reasons[number],
            }
        )
    return found


def given_columns(
    values: Mapping[str, Sequence[Any]], counts: Ints, names: Sequence[str]
) -> tuple[dict[str, Floats], dict[str, npt.NDArray[Any]]]:
    """Token lists and per-sample values of data set columns, as `SftRows` holds them.

    Raises
    ------
    InputError
        A list of a sample is not as long as its trainable tokens are many.
    """
    tokens: dict[str, Floats] = {}
    samples: dict[str, npt.NDArray[Any]] = {}
    for column, column_values in values.items():
        if column not in TOKEN_LISTS:
            samples[column] = np.asarray(column_values, np.float32)
            continue
        for name, count, found in zip(names, counts, column_values, strict=True):
            if len(found) != count:
                raise InputError(
                    f"column `{column}` of sample {name} holds {len(found)} values; {count} were"
                    " expected, one for each trainable token. Compute it from the same tokens,"
                    " and let the trainer cut nothing off (max_length)."
                )
        parts = [np.asarray(found, np.float32) for found in column_values]
        tokens[column] = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return tokens, samples


def _options(method: Pruner) -> set[str]:
    return {one.name for one in fields(method)}  # type: ignore[arg-type]
