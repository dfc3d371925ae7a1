"""The contract that every method keeps: signals in, a selection out.

A method is a frozen dataclass of options whose call is a pure function of named arrays.
It never shortens an array: it returns a mask, a score and a reason for each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..errors import InputError

Unit = Literal[
    "sentence", "passage", "sample", "token", "prompt", "weight", "group", "expert", "layer"
]
Scope = Literal["row", "group", "table"]
BudgetKind = Literal[
    "fraction",
    "fraction_per_group",
    "fraction_of_groups",
    "fraction_of_cost",
    "count_per_group",
    "threshold",
]

_CHECKED_AT_ONCE = 1 << 20  # values

Array = npt.NDArray[Any]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SignalSpec:
    """What one named array holds.

    `shape` is "N" (one value a row), "N,d" (one vector a row), "N+1" (row borders of a
    ragged signal) or "nnz" (the values between those borders; `ragged_by` names them).
    `low` and `high` bound the legal values, both inclusive.
    """

    dtype: str
    unit: str
    direction: str
    shape: Literal["N", "N,d", "N+1", "nnz"] = "N"
    low: float = -np.inf
    high: float = np.inf
    ragged_by: str | None = None
    doc: str = ""


# The table of signal names. A method's `needs` may name only these; a test holds it.
SIGNALS: dict[str, SignalSpec] = {
    "id": SignalSpec("int64", "content hash", "none", low=0, doc="Row id, unique in a table."),
    "passage": SignalSpec(
        "int64", "content hash", "none", low=0, doc="Id of the passage that a sentence stands in."
    ),
    "question": SignalSpec(
        "int64", "content hash", "none", low=0, doc="Id of the question a passage was found for."
    ),
    "position": SignalSpec(
        "int64", "sentences", "none", low=0, doc="Place of the sentence in its passage, from 0."
    ),
    "tokens": SignalSpec("int64", "tokens", "lower is cheaper", low=0, doc="Length of the row."),
    "title": SignalSpec("bool", "flag", "none", doc="The sentence is the title of its passage."),
    "protected": SignalSpec("bool", "flag", "true is kept", doc="The user forbade dropping it."),
    "keep_probability": SignalSpec(
        "float32",
        "probability",
        "higher is kept",
        low=0,
        high=1,
        doc="Provence: mean over the sentence's tokens of the probability to keep the token.",
    ),
    "token_offset": SignalSpec(
        "int64", "tokens", "none", shape="N+1", low=0, doc="Borders of each row's tokens."
    ),
    "token_keep_probability": SignalSpec(
        "float32",
        "probability",
        "higher is kept",
        shape="nnz",
        low=0,
        high=1,
        ragged_by="token_offset",
        doc="Provence: probability to keep each token; the vote at any threshold comes from it.",
    ),
    "keep_vote": SignalSpec(
        "float32",
        "share of tokens",
        "higher is kept",
        low=0,
        high=1,
        doc="Provence: share of the sentence's tokens whose keep probability exceeds the"
        " threshold; depends on the threshold, so it is derived, never stored.",
    ),
    "relevance_logit": SignalSpec(
        "float32",
        "logit",
        "higher is more relevant",
        doc="Ranking head: raw score of (question, passage), repeated on each of its rows.",
    ),
    "question_similarity": SignalSpec(
        "float32",
        "cosine",
        "higher is kept",
        low=-1.0001,
        high=1.0001,
        doc="Cosine between the embeddings of the question and of the row.",
    ),
    "cross_encoder_logit": SignalSpec(
        "float32",
        "logit",
        "higher is kept",
        doc="A cross-encoder's raw score of (question, sentence alone).",
    ),
    "embedding": SignalSpec(
        "float32", "unit vector", "none", shape="N,d", doc="L2-normalised embedding of the row."
    ),
    "term_offset": SignalSpec(
        "int64", "terms", "none", shape="N+1", low=0, doc="Borders of each row's terms."
    ),
    "term": SignalSpec(
        "int64",
        "vocabulary index",
        "none",
        shape="nnz",
        low=0,
        ragged_by="term_offset",
        doc="Distinct terms of each row.",
    ),
    "term_weight": SignalSpec(
        "float32",
        "tf * idf",
        "none",
        shape="nnz",
        low=0,
        ragged_by="term_offset",
        doc="Weight of each term in its row.",
    ),
    # Tokens of a fine-tuning sample: a row is one trainable (answer) token.
    "sample": SignalSpec(
        "int64", "content hash", "none", low=0, doc="Id of the sample that a token stands in."
    ),
    "token_position": SignalSpec(
        "int64", "tokens", "none", low=0, doc="Place of the token in its sample's input, from 0."
    ),
    "turn": SignalSpec(
        "int64",
        "count",
        "none",
        doc="Turn, or document of a packed sample, that the token stands in; neighbours never"
        " cross its border.",
    ),
    "loss": SignalSpec(
        "float32",
        "nats",
        "lower is easier",
        low=0,
        doc="-log p(token | what stands before it) under the model that scores.",
    ),
    "entropy": SignalSpec(
        "float32",
        "nats",
        "lower is surer",
        low=0,
        doc="Entropy of the model's whole distribution at the token, before it is seen.",
    ),
    "log_sum_exp": SignalSpec(
        "float32", "nats", "none", doc="Log of the sum of exp(logit) over the vocabulary."
    ),
    "target_rank": SignalSpec(
        "int64", "tokens", "lower is easier", low=0, doc="Vocabulary entries with a higher logit."
    ),
    "reference_loss": SignalSpec(
        "float32", "nats", "none", low=0, doc="Loss of the token under a reference model."
    ),
    "history_loss": SignalSpec(
        "float32", "nats", "none", low=0, doc="Loss of the token under the model's earlier self."
    ),
    "prompt_attention": SignalSpec(
        "float32",
        "probability mass",
        "higher is kept",
        low=0,
        high=1.0001,
        doc="Attention of the token's own query on the prompt, one layer, mean over heads.",
    ),
    # Fine-tuning samples: a row is one sample; means are over its trainable tokens.
    "answer_tokens": SignalSpec("int64", "tokens", "none", low=0, doc="Trainable tokens."),
    "answer_loss": SignalSpec(
        "float32", "nats", "lower is easier", low=0, doc="Mean loss; exp of it is the perplexity."
    ),
    "answer_entropy": SignalSpec("float32", "nats", "lower is surer", low=0, doc="Mean entropy."),
    "answer_loss_alone": SignalSpec(
        "float32",
        "nats",
        "lower is easier",
        low=0,
        doc="Mean loss of the answer where the model does not see the prompt.",
    ),
    "loss_trajectory": SignalSpec(
        "float32",
        "nats",
        "none",
        shape="N,d",
        low=0,
        doc="Mean loss under d checkpoints of one training run, first to last.",
    ),
    "quality": SignalSpec("float32", "given", "higher is kept", doc="A quality score, given."),
    "complexity": SignalSpec(
        "float32", "given", "higher is kept", doc="A complexity score, given."
    ),
    "rating": SignalSpec("float32", "given", "higher is kept", doc="A rater's score, given."),
    # Rows of a labelled data set. Trajectories are (N, runs * epochs): the epochs of the first
    # run in order, then those of the next; all are taken after each epoch, in evaluation mode.
    "label": SignalSpec("int64", "class", "none", low=0, doc="Code of the class, as labelled."),
    "group": SignalSpec("int64", "group", "none", low=0, doc="Code of the row's group."),
    "true_probability": SignalSpec(
        "float32",
        "probability",
        "higher is easier",
        shape="N,d",
        low=0,
        high=1.0001,
        doc="Probability of the labelled class after each epoch.",
    ),
    "margin": SignalSpec(
        "float32",
        "logit",
        "higher is easier",
        shape="N,d",
        doc="Logit of the labelled class minus the highest other, after each epoch.",
    ),
    "correct": SignalSpec(
        "bool", "flag", "true is easier", shape="N,d", doc="The labelled class was predicted."
    ),
    "el2n": SignalSpec(
        "float32",
        "probability",
        "higher is harder",
        shape="N,d",
        low=0,
        high=1.4144,
        doc="Euclidean length of (probabilities - one-hot label) after each epoch.",
    ),
    "gradient_norm": SignalSpec(
        "float32",
        "nats a parameter",
        "higher is harder",
        shape="N,d",
        low=0,
        doc="Euclidean length of the loss's gradient at this row alone, after each epoch.",
    ),
    "probability_change": SignalSpec(
        "float32",
        "nats",
        "higher is less settled",
        shape="N,d",
        low=0,
        doc="Sum over classes of |p' log(p' / p)| from an epoch (p) to the next (p'); one value"
        " fewer a run than epochs.",
    ),
    "difficulty": SignalSpec(
        "float32", "given", "higher is harder", doc="One number of how hard a row is."
    ),
    "cluster": SignalSpec(
        "int64", "cluster", "none", low=0, doc="k-means cluster of the row's embedding."
    ),
    "centroid_distance": SignalSpec(
        "float32",
        "cosine distance",
        "higher is less typical",
        low=0,
        high=2.0001,
        doc="1 - cosine of the row's embedding and the centre of its cluster.",
    ),
    "neighbour": SignalSpec(
        "int64",
        "content hash",
        "none",
        shape="N,d",
        doc="Ids of the k nearest other rows, nearest first; -1 where there are fewer.",
    ),
    "neighbour_distance": SignalSpec(
        "float32",
        "Euclidean distance",
        "lower is nearer",
        shape="N,d",
        low=0,
        doc="Distance to each of them; 0 where there is none.",
    ),
    "shapley": SignalSpec(
        "float32",
        "accuracy",
        "higher is kept",
        doc="KNN-Shapley: the row's share of a k-nearest-neighbour classifier's accuracy.",
    ),
    "memorisation": SignalSpec(
        "float32",
        "probability",
        "higher is harder",
        low=-1.0001,
        high=1.0001,
        doc="Feldman and Zhang's memorisation of the row, estimated elsewhere and imported.",
    ),
    "influence": SignalSpec(
        "float32", "given", "higher is kept", doc="Influence on held-out rows, imported."
    ),
    # Candidate words of a prompt: a row is one word of the vocabulary.
    "prompt_influence": SignalSpec(
        "float32",
        "nats",
        "higher is kept",
        doc="ClaPS: mean reward over labelled rows with the word alone as the prompt, minus that"
        " with the empty prompt; or, without labels, the divergence between the two.",
    ),
    # Weights: a row is one number of a matrix.
    "weight": SignalSpec("float32", "weight", "none", doc="Value of the weight."),
    # Weights of an embedding model (GAPrune), gradients of a contrastive loss on two sets of texts.
    "domain_fisher": SignalSpec(
        "float32",
        "squared gradient",
        "higher is kept",
        low=0,
        doc="Mean squared gradient at the weight over texts of the domain.",
    ),
    "general_fisher": SignalSpec(
        "float32",
        "squared gradient",
        "higher is dropped",
        low=0,
        doc="The same over general texts.",
    ),
    "gradient_alignment": SignalSpec(
        "float32",
        "cosine",
        "higher is kept",
        low=-1.0001,
        high=1.0001,
        doc="How far the two mean gradients agree around the weight.",
    ),
    # Weights of a model's matrix: a row is one weight.
    "output": SignalSpec(
        "int64", "position", "none", low=0, doc="Row of the matrix (out, in) that it stands in."
    ),
    "input_norm": SignalSpec(
        "float32",
        "given",
        "higher is kept",
        low=0,
        doc="Euclidean norm of the weight's input over the calibration tokens.",
    ),
    "hessian_diagonal": SignalSpec(
        "float32",
        "given",
        "lower is kept",
        low=1e-30,
        doc="Square of U's diagonal at the weight's input, U the upper Cholesky factor of the"
        " damped inverse Hessian: the inverse Hessian's diagonal once the inputs before are done.",
    ),
    "weight_gradient": SignalSpec(
        "float32",
        "nats a weight",
        "higher is kept",
        low=0,
        doc="The loss's gradient at the weight over calibration rows: sqrt of the sum of squares,"
        " or sum of magnitudes.",
    ),
    # Groups of a model's weights that stay or go together: a row is the query heads of one
    # key-value head, a neuron, an expert, or a layer. A channel is one input of the matrix that
    # brings a group's work back to the residual stream (attention output, down projection).
    "part": SignalSpec(
        "int64",
        "half a layer",
        "none",
        low=0,
        doc="What a group is compared within: 2 * layer for attention, 2 * layer + 1 for the"
        " feed-forward half (neurons, experts).",
    ),
    "cost": SignalSpec(
        "int64", "parameters", "lower is cheaper", low=1, doc="Weights that go with the group."
    ),
    "channel_offset": SignalSpec(
        "int64", "channels", "none", shape="N+1", low=0, doc="Borders of each group's channels."
    ),
    "channel_variance": SignalSpec(
        "float32",
        "activation squared",
        "higher is kept",
        shape="nnz",
        low=0,
        ragged_by="channel_offset",
        doc="Variance of each channel over the calibration tokens.",
    ),
    "channel_square": SignalSpec(
        "float32",
        "weight squared",
        "higher is kept",
        shape="nnz",
        low=0,
        ragged_by="channel_offset",
        doc="Sum of the squares of the weights that read the channel.",
    ),
    "channel_norm": SignalSpec(
        "float32",
        "activation",
        "higher is kept",
        shape="nnz",
        low=0,
        ragged_by="channel_offset",
        doc="Root mean square of each channel over the calibration tokens.",
    ),
    "channel_mass": SignalSpec(
        "float32",
        "weight",
        "higher is kept",
        shape="nnz",
        low=0,
        ragged_by="channel_offset",
        doc="Mean of the absolute weights that read the channel.",
    ),
    "tensor_offset": SignalSpec(
        "int64", "matrices", "none", shape="N+1", low=0, doc="Borders of each group's matrices."
    ),
    "tensor_salience": SignalSpec(
        "float32",
        "nats",
        "higher is kept",
        shape="nnz",
        low=0,
        ragged_by="tensor_offset",
        doc="LLM-Pruner: Taylor salience of the group's share of each coupled matrix; depends on"
        " the method's order, so it is derived, never stored.",
    ),
    "down_mass": SignalSpec(
        "float32",
        "weight",
        "higher is kept",
        low=0,
        doc="Sum of the absolute weights of the neuron's column of the down projection.",
    ),
    "up_mass": SignalSpec(
        "float32",
        "weight",
        "higher is kept",
        low=0,
        doc="Sum of the absolute weights of the neuron's row of the up projection.",
    ),
    "gate_mass": SignalSpec(
        "float32",
        "weight",
        "higher is kept",
        low=0,
        doc="Sum of the absolute weights of the neuron's row of the gate projection.",
    ),
    "neuron_norm": SignalSpec(
        "float32",
        "activation",
        "higher is kept",
        low=0,
        doc="Root mean square of what the neuron gives, over the calibration tokens.",
    ),
    "weight_square": SignalSpec(
        "float32",
        "weight squared",
        "higher is kept",
        low=0,
        doc="Sum of the squares of all weights that go with the group.",
    ),
    "block_cosine": SignalSpec(
        "float32",
        "cosine",
        "lower is kept",
        low=-1.0001,
        high=1.0001,
        doc="Mean over tokens of the cosine between what a layer takes and what it gives.",
    ),
    "expert_tokens": SignalSpec(
        "int64", "tokens", "higher is kept", low=0, doc="Tokens that were routed to the expert."
    ),
    "expert_gate": SignalSpec(
        "float32",
        "probability",
        "higher is kept",
        low=0,
        doc="Sum over the expert's tokens of its gate g.",
    ),
    "expert_norm": SignalSpec(
        "float32",
        "activation",
        "higher is kept",
        low=0,
        doc="Sum over the expert's tokens of the length of its output.",
    ),
    "expert_reap": SignalSpec(
        "float32",
        "activation",
        "higher is kept",
        low=0,
        doc="Sum over the expert's tokens of g times the length of its output.",
    ),
    "expert_easy": SignalSpec(
        "float32",
        "activation",
        "higher is kept",
        low=0,
        doc="Sum over the expert's tokens of g times the length of its output times"
        " max(0, 1 - cosine of the token before and after the routed experts).",
    ),
}


class Signals(Mapping[str, Array]):
    """Named arrays about the same N rows, aligned by position.

    Parameters
    ----------
    arrays
        Name to array; `id` (N,) int64 is always among them. Names outside `SIGNALS` are
        allowed (a user's own score) and are taken to be one value a row.

    Raises
    ------
    InputError
        `id` is missing or repeats, or an array is not aligned with it. The first offending
        name and row are in the message.
    """

    __slots__ = ("_arrays",)

    def __init__(self, arrays: Mapping[str, npt.ArrayLike]) -> None:
        if "id" not in arrays:
            raise InputError(
                f"signals need an `id` column; found {sorted(arrays)}. Add the row ids, int64."
            )
        made = {name: _as_signal(name, value) for name, value in arrays.items()}
        n = len(made["id"])
        for name, array in made.items():
            _check_alignment(name, array, n, made)
        ids = made["id"]
        if n > 1:
            order = np.argsort(ids, kind="stable")
            same = np.flatnonzero(np.diff(ids[order]) == 0)
            if same.size:
                a, b = order[same[0]], order[same[0] + 1]
                raise InputError(
                    f"row ids must be unique; rows {min(a, b)} and {max(a, b)} both have id"
                    f" {ids[a]}. Hash more fields into the id, or drop the exact duplicate."
                )
        self._arrays = made

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self._arrays["id"])

    def require(self, needs: Iterable[str]) -> Signals:
        """Check that the named signals are here, finite and in range; return self.

        Raises
        ------
        InputError
            A signal is missing, holds a NaN or an infinity, or leaves its legal range.
        """
        for name in sorted(needs):
            if name not in self._arrays:
                raise InputError(
                    f"signal `{name}` is needed and missing; found {sorted(self._arrays)}."
                    " Compute it first (see SIGNALS for what it holds)."
                )
            _check_values(name, self._arrays[name])
        return self

    def take(self, rows: npt.ArrayLike) -> Signals:
        """The signals of some rows, in the order given (ragged signals are gathered)."""
        index = np.asarray(rows, dtype=np.int64)
        taken: dict[str, Array] = {}
        for name, array in self._arrays.items():
            spec = SIGNALS.get(name)
            if spec is None or spec.shape in ("N", "N,d"):
                taken[name] = array[index]
            elif spec.shape == "N+1":
                lengths = np.diff(array)[index]
                taken[name] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            elif spec.ragged_by is not None:
                taken[name] = array[_ragged_index(self._arrays[spec.ragged_by], index)]
        return Signals(taken)


def _ragged_index(offset: IntArray, rows: IntArray) -> IntArray:
    lengths = np.diff(offset)[rows]
    if not lengths.sum():
        return np.zeros(0, np.int64)
    starts = np.repeat(offset[rows] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return np.asarray(starts + np.arange(lengths.sum()), dtype=np.int64)


def _as_signal(name: str, value: npt.ArrayLike) -> Array:
    array = np.asarray(value)
    spec = SIGNALS.get(name)
    if spec is None:
        return array
    if array.size == 0:
        array = array.astype(spec.dtype)
    kind, wanted = array.dtype.kind, np.dtype(spec.dtype).kind
    allowed = {"f": "fiub", "i": "iu", "b": "b"}[wanted]
    if kind not in allowed:
        raise InputError(
            f"signal `{name}` must be {spec.dtype}; found dtype {array.dtype}. Convert it first."
        )
    return array.astype(spec.dtype, copy=False)


def _check_alignment(name: str, array: Array, n: int, arrays: Mapping[str, Array]) -> None:
    spec = SIGNALS.get(name)
    shape = spec.shape if spec else "N"
    if array.ndim != (2 if shape == "N,d" else 1):
        raise InputError(f"signal `{name}` must have shape ({shape}); found {array.shape}.")
    if shape in ("N", "N,d"):
        expected = n
    elif shape == "N+1":
        expected = n + 1
    else:
        border = spec.ragged_by if spec else None
        if border is None or border not in arrays:
            raise InputError(f"signal `{name}` needs its borders `{border}` beside it.")
        expected = int(arrays[border][-1]) if len(arrays[border]) else 0
    if len(array) != expected:
        raise InputError(
            f"signal `{name}` has {len(array)} entries; {expected} were expected for the {n} rows"
            " of `id`. Compute all signals over the same rows, in the same order."
        )
    if shape == "N+1" and (array[0] != 0 or np.any(np.diff(array) < 0)):
        raise InputError(f"signal `{name}` must start at 0 and never decrease.")


def _check_values(name: str, array: Array) -> None:
    if array.dtype.kind == "f":
        _check_finite(name, array)
    spec = SIGNALS.get(name)
    if spec is None or array.size == 0 or array.dtype.kind == "b":
        return
    if array.min() < spec.low or array.max() > spec.high:
        bad = np.argwhere((array < spec.low) | (array > spec.high))[0]
        raise InputError(
            f"signal `{name}` must lie in [{spec.low:g}, {spec.high:g}]; row {bad[0]} holds"
            f" {array[tuple(bad)]}."
        )


def _check_finite(name: str, array: Array) -> None:
    """By blocks: a mask of a million vectors would take a quarter of what they take."""
    size = max(1, _CHECKED_AT_ONCE // max(1, array[:1].size))
    for start in range(0, len(array), size):
        finite = np.isfinite(array[start : start + size])
        if not finite.all():
            row, *rest = np.argwhere(~finite)[0]
            raise InputError(
                f"signal `{name}` must be finite; row {start + row} holds"
                f" {array[(start + row, *rest)]}. Repair or reject that row before pruning."
            )


@dataclass(frozen=True, slots=True)
class Selection:
    """What a method decided for each of N rows. Nothing is dropped silently.

    Attributes
    ----------
    keep
        (N,) bool, True = kept.
    score
        (N,) float32, higher = kept longer.
    reason
        (N,) uint8, index into `reasons`.
    reasons
        The reasons in words; a row's reason says why it was kept or dropped.
    threshold
        (N,) float32, the score that the row was held against; NaN where no threshold applied.
    rival
        (N,) int64, position of the kept row that this row lost to; -1 where there is none.
    weight
        (N,) float32, what a kept row's loss is multiplied by in training; 1 unless a method
        rescales (InfoBatch), 0 where dropped.
    """

    keep: BoolArray
    score: FloatArray
    reason: npt.NDArray[np.uint8]
    reasons: tuple[str, ...]
    threshold: FloatArray = field(default_factory=lambda: np.zeros(0, np.float32))
    rival: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    weight: FloatArray = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        n = len(self.keep)
        if n and not len(self.threshold):
            object.__setattr__(self, "threshold", np.full(n, np.nan, np.float32))
        if n and not len(self.rival):
            object.__setattr__(self, "rival", np.full(n, -1, np.int64))
        if n and not len(self.weight):
            object.__setattr__(self, "weight", self.keep.astype(np.float32))
        wanted = {
            "keep": np.bool_,
            "score": np.float32,
            "reason": np.uint8,
            "threshold": np.float32,
            "rival": np.int64,
            "weight": np.float32,
        }
        for name, dtype in wanted.items():
            array = getattr(self, name)
            if array.shape != (n,) or array.dtype != dtype:
                raise InputError(
                    f"selection field `{name}` must be ({n},) {np.dtype(dtype)}; found"
                    f" {array.shape} {array.dtype}."
                )

    @property
    def kept(self) -> int:
        """Number of rows kept."""
        return int(self.keep.sum())

    def reason_names(self) -> list[str]:
        """The reason of each row in words, length N."""
        return [self.reasons[code] for code in self.reason]

    def dropped(self) -> dict[str, int]:
        """Number of dropped rows by reason; reasons that dropped nothing are left out."""
        counts = np.bincount(self.reason[~self.keep], minlength=len(self.reasons))
        return {name: int(count) for name, count in zip(self.reasons, counts, strict=True) if count}


@dataclass(frozen=True, slots=True)
class Budget:
    """How a method is told how much to keep.

    `field` is the option's name. "fraction": exactly ceil(option * N) rows are kept.
    "fraction_per_group": exactly ceil(option * size) rows of every group. "fraction_of_groups":
    exactly ceil(option * groups) groups keep at least one row. "count_per_group": exactly
    min(option, size) rows of every group. "fraction_of_cost": the best rows until what they cost
    together (the signal `cost`) reaches option * the cost of all. "threshold": a row is kept
    when its score exceeds the option, so a higher value keeps less.
    """

    field: str
    kind: BudgetKind


@runtime_checkable
class Pruner(Protocol):
    """A method: options in the constructor, arrays in the call.

    `needs` are names of `SIGNALS`; `optional` ones are used where they are there. `scope` says
    which rows a row's decision depends on: itself, the rows of its group ("group", the signal
    named by `group`), or the whole table. A table may be cut into shards wherever the scope
    allows it without changing one decision.
    """

    unit: ClassVar[Unit]
    needs: ClassVar[frozenset[str]]
    optional: ClassVar[frozenset[str]]
    budget: ClassVar[Budget]
    scope: ClassVar[Scope]
    group: ClassVar[str | None]

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for each row of `signals`. Pure: same arrays and seed, same selection."""
        ...


def empty_selection(reasons: tuple[str, ...]) -> Selection:
    """The selection over no rows."""
    return Selection(np.zeros(0, np.bool_), np.zeros(0, np.float32), np.zeros(0, np.uint8), reasons)


def check_fraction(name: str, value: float) -> None:
    """Refuse a fraction outside [0, 1] (NaN included)."""
    if not 0.0 <= value <= 1.0:
        raise InputError(f"`{name}` must lie in [0, 1]; found {value}.")


def check_count(name: str, value: int, *, low: int = 0) -> None:
    """Refuse a count below `low`."""
    if value < low:
        raise InputError(f"`{name}` must be at least {low}; found {value}.")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among the allowed ones."""
    if value not in allowed:
        raise InputError(f"`{name}` must be one of {', '.join(allowed)}; found {value!r}.")
