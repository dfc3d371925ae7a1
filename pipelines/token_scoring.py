"""Token signals of a few samples: batches of like length through one model after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from ..pruners.models.causal import LoadedCausal
from ..pruners.signals.tokens import PromptAttention, TokenScores, answer_alone, score_tokens

Array = npt.NDArray[Any]
# Columns that the scoring model gives for each target, by the names that `TokenScores` has.
_SCORES = ("loss", "entropy", "log_sum_exp", "target_rank", "prompt_attention")
_OTHER_MODELS = {"reference_loss": "reference", "history_loss": "history"}


@dataclass(frozen=True)
class Samples:
    """The N tokenised samples of a shard; lists of arrays, one a sample, (L,) each."""

    ids: list[int]
    domain: list[str]
    input_ids: list[Array]
    trainable: list[Array]
    turn: list[Array]
    protected: list[Array]

    @classmethod
    def of(cls, rows: pa.Table) -> Samples:
        """Read them from rows of the TOKENS schema."""
        lists = {
            name: [np.array(row) for row in rows.column(name).to_pylist()]
            for name in ("input_ids", "trainable", "turn", "protected")
        }
        return cls(
            rows.column("id").to_pylist(),
            rows.column("domain").to_pylist(),
            [row.astype(np.int64) for row in lists["input_ids"]],
            [row.astype(np.bool_) for row in lists["trainable"]],
            [row.astype(np.int32) for row in lists["turn"]],
            [row.astype(np.bool_) for row in lists["protected"]],
        )


@dataclass
class Scored:
    """Columns by name, a value for each of the N samples; `bad` says which to leave out."""

    samples: Samples
    columns: dict[str, dict[int, Any]] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)

    @property
    def good(self) -> list[int]:
        """Places of the samples without a fault, ascending."""
        return [place for place in range(len(self.samples.ids)) if place not in self.bad]

    def rejected(self) -> list[tuple[dict[str, Any], str]]:
        """Row and reason of each sample that was put aside."""
        found = self.samples
        return [
            ({"id": found.ids[place], "domain": found.domain[place]}, reason)
            for place, reason in sorted(self.bad.items())
        ]

    def table(self, schema: pa.Schema) -> pa.Table:
        """The good samples as rows of the step's schema."""
        found, good = self.samples, self.good
        targets = {place: np.flatnonzero(found.trainable[place]) for place in good}
        base: dict[str, Callable[[int], Any]] = {
            "id": lambda place: found.ids[place],
            "domain": lambda place: found.domain[place],
            "token_position": lambda place: targets[place].astype(np.int32),
            "turn": lambda place: found.turn[place][targets[place]],
            "protected": lambda place: found.protected[place][targets[place]],
        }
        arrays = []
        for column in schema:
            value = base.get(column.name) or self.columns[column.name].__getitem__
            arrays.append(pa.array([value(place) for place in good], column.type))
        return pa.Table.from_arrays(arrays, schema=schema)


def score_samples(
    rows: pa.Table,
    sources: Mapping[str, str],
    load: Callable[[str], LoadedCausal],
    columns: Sequence[str],
    *,
    tokens_a_batch: int,
    attention: PromptAttention,
) -> Scored:
    """All signals that `columns` names, of some rows of the TOKENS schema.

    `sources` maps roles (model, reference, history, trajectory_0 and on) to what `load` takes;
    a model that has two roles runs once. Samples without a target, with an id that a model does
    not know, or with a number that is not finite end in `bad`, with the reason.
    """
    made = Scored(Samples.of(rows))
    _refuse_untrainable(made)
    roles = {source: [r for r, s in sources.items() if s == source] for source in sources.values()}
    for source, named in roles.items():
        loaded = load(source)
        _refuse_unknown_ids(made, loaded)
        main = "model" in named
        found = _score(
            made.samples.input_ids,
            made.samples.trainable,
            made.good,
            loaded,
            tokens_a_batch,
            rank=main and "target_rank" in columns,
            attention=attention if main and "prompt_attention" in columns else None,
        )
        _refuse_non_finite(made, found, source)
        if main:
            for name in set(_SCORES) & set(columns):
                made.columns[name] = {p: scores[name] for p, scores in found.items()}
            if "answer_loss_alone" in columns:
                made.columns["answer_loss_alone"] = _alone(made, loaded, tokens_a_batch)
        for column, role in _OTHER_MODELS.items():
            if role in named:
                made.columns[column] = {p: scores["loss"] for p, scores in found.items()}
        for role in named:
            if role.startswith("trajectory_"):
                made.columns[role] = {p: _mean(scores["loss"]) for p, scores in found.items()}
    numbers = sorted(int(r.removeprefix("trajectory_")) for r in sources if r.startswith("traj"))
    made.columns["loss_trajectory"] = {
        place: np.array([made.columns[f"trajectory_{n}"][place] for n in numbers], np.float32)
        for place in made.good
    }
    return made


def _refuse_untrainable(made: Scored) -> None:
    for place, trainable in enumerate(made.samples.trainable):
        if not trainable.any():
            made.bad[place] = "no token of it is trainable: expected at least one."
        elif trainable[0]:
            made.bad[place] = "its first token is trainable, and nothing predicts that one."


def _refuse_unknown_ids(made: Scored, loaded: LoadedCausal) -> None:
    size = loaded.model.get_input_embeddings().weight.shape[0]
    for place in made.good:
        ids = made.samples.input_ids[place]
        outside = np.flatnonzero((ids < 0) | (ids >= size))
        if len(outside):
            made.bad[place] = (
                f"token {ids[outside[0]]} at position {outside[0]} is not among the {size} of the"
                f" model {loaded.path.name}."
            )


def _refuse_non_finite(made: Scored, found: Mapping[int, Mapping[str, Array]], source: str) -> None:
    for place, scores in found.items():
        for name, values in scores.items():
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                made.bad[place] = (
                    f"expected a finite {name} of each target; found {values[bad[0]]} at its"
                    f" target {bad[0]} (of {len(values)}) under {source}."
                )
                break


def _alone(made: Scored, loaded: LoadedCausal, tokens_a_batch: int) -> dict[int, float]:
    """Mean loss of each sample's answers without what they answer."""
    owner: list[int] = []
    ids: list[Array] = []
    for place in made.good:
        found = made.samples
        parts = answer_alone(
            found.input_ids[place], found.trainable[place], found.turn[place], loaded.start
        )
        owner += [place] * len(parts)
        ids += parts
    trainable = [np.arange(len(row)) > 0 for row in ids]
    scores = _score(ids, trainable, list(range(len(ids))), loaded, tokens_a_batch)
    losses: dict[int, list[Array]] = {}
    for part, place in enumerate(owner):
        losses.setdefault(place, []).append(scores[part]["loss"])
    means = {place: _mean(np.concatenate(parts)) for place, parts in losses.items()}
    for place, value in means.items():
        if not np.isfinite(value):
            made.bad[place] = f"expected a finite loss of its answer alone; found {value}."
    return means


def _mean(values: Array) -> float:
    return float(values.astype(np.float64).mean())


def _score(
    input_ids: Sequence[Array],
    trainable: Sequence[Array],
    places: Sequence[int],
    loaded: LoadedCausal,
    tokens_a_batch: int,
    *,
    rank: bool = False,
    attention: PromptAttention | None = None,
) -> dict[int, dict[str, Array]]:
    """Place to name to (T,) values, for the sequences at `places`."""
    made: dict[int, dict[str, Array]] = {}
    for batch in batches([len(input_ids[place]) for place in places], tokens_a_batch):
        rows = [places[number] for number in batch]
        ids, targets, mask = _padded([input_ids[r] for r in rows], [trainable[r] for r in rows])
        scores = score_tokens(
            loaded.model, ids, targets, attention_mask=mask, rank=rank, attention=attention
        )
        counts = targets.sum(1).tolist()
        for name, values in _arrays(scores).items():
            for row, part in zip(rows, np.split(values, np.cumsum(counts)[:-1]), strict=True):
                made.setdefault(row, {})[name] = part
    return made


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Numbers of the sequences of each batch: like lengths together, at most `tokens` padded.

    A sequence that is longer alone is a batch of its own.
    """
    made: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: (lengths[n], n)):
        if made and (len(made[-1]) + 1) * lengths[number] <= tokens:
            made[-1].append(number)
        else:
            made.append([number])
    return made


def _padded(
    ids: Sequence[Array], targets: Sequence[Array]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, targets, mask), each (B, S), padded on the right."""
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    made = torch.zeros(mask.shape, dtype=torch.int64)
    chosen = torch.zeros(mask.shape, dtype=torch.bool)
    made[mask] = torch.from_numpy(np.concatenate(ids))
    chosen[mask] = torch.from_numpy(np.concatenate(targets))
    return made, chosen, mask


def _arrays(scores: TokenScores) -> dict[str, Array]:
    found = {name: getattr(scores, name) for name in _SCORES}
    return {name: tensor.cpu().numpy() for name, tensor in found.items() if tensor is not None}
