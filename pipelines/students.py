"""Students of kept rows: the grid {random, chosen} x {no teacher, teacher} beside full data.

All are trained for the same number of optimiser steps, whatever the fraction: with equal epochs
a smaller fraction would be trained less, and the comparison would measure that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from ..errors import InputError, RecipeError
from ..pruners import rules
from ..storage import Table, row_id
from .alpha import POINTS, choose_alpha, doubted, nearest_alpha, prior_alpha
from .classifier import Examples, ModelSpec, fit, load_examples, make_model, predict
from .dataset_decide import SHARES, DecideOptions, Decider
from .dataset_signals import DECIDE_INPUTS, Rows, training_rows
from .dataset_tables import TEST, TRAIN
from .dynamics import trajectories
from .engine import Job, Slot, StepOptions
from .tables import vectors_of

if TYPE_CHECKING:
    from ..storage import Store

CHOSEN, RANDOM, FULL = "chosen", "random", "full"
_TEACHER_COLUMN = "log_probability"
_FEWEST_JUDGED = 10  # held-out rows that choose a weight
Floats = npt.NDArray[np.float32]

STUDENT_INPUTS = {
    "data": Slot(("read_dataset",)),
    "decision": Slot(("prune_dataset",)),
    "teacher": Slot(("teacher_outputs",)),
    "embeddings": Slot(("embed",), optional=True),
}


class StudentOptions(StepOptions):
    """Options of the steps that train students.

    Attributes
    ----------
    fractions
        Shares of the training rows to keep, each above 0 and below 1; full data stands beside
        them. The method, and what else holds for it, is that of the input `decision`.
    model, hidden
        The student's network, as for train_classifier.
    steps, batch_size, learning_rate
        Of each student.
    temperature
        Softens the teacher's and the student's probabilities in the distillation loss.
    device
        cpu, cuda …; None takes what there is.
    """

    fractions: list[float] = Field(default=[0.1, 0.2, 0.3, 0.5, 0.7], min_length=1)
    model: str = "auto"
    hidden: int = Field(default=256, ge=1)
    steps: int = Field(default=1500, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=0.05, gt=0)
    temperature: float = Field(default=2.0, gt=0)
    device: str | None = None

    @model_validator(mode="after")
    def _are_shares(self) -> StudentOptions:
        for fraction in self.fractions:
            if not 0.0 < fraction < 1.0:
                raise ValueError(
                    f"`fractions` lie above 0 and below 1 (full data is always there); found"
                    f" {fraction}"
                )
        if len(set(self.fractions)) < len(self.fractions):
            raise ValueError(f"`fractions` names one twice; found {self.fractions}")
        return self

    @property
    def spec(self) -> ModelSpec:
        """The network of a student."""
        return ModelSpec(name=self.model, hidden=self.hidden)

    def lines(self) -> list[tuple[str, float]]:
        """Selection and fraction of each line of the grid, full data last."""
        made = [(name, f) for f in sorted(self.fractions) for name in (RANDOM, CHOSEN)]
        return [*made, (FULL, 1.0)]


def decision_inputs(store: Store, decision: Table) -> dict[str, Table]:
    """The tables that a decision was made from, by the role they had."""
    tables = [store.table(key) for key in decision.manifest.parents]
    return {
        role: table
        for role, slot in DECIDE_INPUTS.items()
        for table in tables
        if table.manifest.step in slot.steps
    }


def decision_options(decision: Table) -> DecideOptions:
    """The options that a decision was made with, from its manifest.

    Raises
    ------
    RecipeError
        Its budget is a threshold, so no fraction can be asked of it.
    """
    made = decision.manifest.options
    limits: Mapping[str, Any] = {}
    if made["balance"]:
        limits = dict(zip(("balance", "floor", "cap"), made["balance"], strict=True))
    options = DecideOptions.model_validate(
        {
            "method": made["method"],
            "options": made["options"],
            "by": made["by"],
            **({"difficulty": made["difficulty"]} if made["difficulty"] else {}),
            **limits,
        }
    )
    if options.pruner().budget.kind not in SHARES:
        raise RecipeError(
            f"students are compared at fractions of the rows; `{decision.manifest.name}` was made"
            f" by `{options.method}`, which keeps what is above a threshold. Choose a method whose"
            " budget is a share."
        )
    return options


@dataclass(frozen=True)
class Classroom:
    """All that the students of one table share.

    Attributes
    ----------
    train, test
        Examples of the two splits.
    teacher
        (N, classes) float32 log probabilities of the training rows.
    decider
        The method, with its signals.
    doubted
        (N,) bool, rows that the teacher took for another class over training as a whole; none
        without dynamics.
    """

    rows: Rows
    train: Examples
    test: Examples
    teacher: Floats
    decider: Decider
    doubted: npt.NDArray[np.bool_]

    def mask(self, selection: str, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
        """(N,) bool, the training rows of a line of the grid."""
        if selection == FULL:
            return np.ones(len(self.rows.ids), np.bool_)
        if selection == RANDOM:
            return self.decider.random(seed=seed, keep=fraction).keep
        return self.decider.select(seed=seed, keep=fraction).keep

    def part(self, mask: npt.NDArray[np.bool_]) -> tuple[Examples, Floats]:
        """Examples and teacher's log probabilities of the rows of a mask."""
        return self.train.take(mask), self.teacher[mask]


_OPEN: OrderedDict[tuple[str, str], Classroom] = OrderedDict()


def open_classroom(job: Job) -> Classroom:
    """Read the tables of a job once a process. Raises as `classroom`."""
    key = (job.store.uri, job.key)
    found = _OPEN.pop(key, None)
    if found is None:
        decision = job.input("decision")
        inputs = decision_inputs(job.store, decision)
        if inputs["data"].key != job.inputs["data"]:
            raise InputError(
                f"`{decision.manifest.name}` decided about `{inputs['data'].manifest.name}`, not"
                f" about `{job.input('data').manifest.name}`. Give this step the decision's data."
            )
        embeddings = job.input("embeddings") if job.has("embeddings") else None
        options = decision_options(decision)
        found = classroom(options, inputs, job.input("teacher"), embeddings)
    _OPEN[key] = found
    while len(_OPEN) > 1:
        _OPEN.popitem(last=False)
    return found


def classroom(
    options: DecideOptions,
    inputs: Mapping[str, Table],
    teacher: Table,
    embeddings: Table | None = None,
) -> Classroom:
    """Put together what students need.

    Parameters
    ----------
    options
        The method whose rows are compared with random ones.
    inputs
        Tables by role, as of `dataset_signals.DECIDE_INPUTS`.
    teacher
        A teacher_outputs table over the same data.
    embeddings
        Vectors of the rows, where the data are text.

    Raises
    ------
    InputError
        The data have no row in the split `test`, or the teacher lacks a row.
    """
    data = inputs["data"]
    rows = training_rows(data)
    examples = load_examples(data, embeddings)
    test = examples.of_split(TEST)
    if not len(test):
        raise InputError(
            f"`{data.manifest.name}` has no row in the split `{TEST}`, on which students are"
            " judged. Set `holdout` above 0, or name a `split_field` or `test_path`."
        )
    column = teacher.lookup(rows.ids, columns=["id", _TEACHER_COLUMN]).column(_TEACHER_COLUMN)
    doubt = np.zeros(len(rows.ids), np.bool_)
    if "dynamics" in inputs:
        doubt = doubted(trajectories(inputs["dynamics"], ["margin"], rows.ids)[0]["margin"])
    return Classroom(
        rows,
        examples.of_split(TRAIN),
        test,
        vectors_of(column),
        Decider.of(options, inputs, rows),
        doubt,
    )


@dataclass(frozen=True)
class Score:
    """Accuracy of a student on some rows, 0 to 1, and on the class where it is lowest."""

    accuracy: float
    worst_class: float


def train_and_score(
    options: StudentOptions,
    examples: Examples,
    teacher: Floats,
    judged: Examples,
    *,
    alpha: float,
    seed: int,
    steps: int | None = None,
) -> Score:
    """Train one student and judge it; `steps` replaces those of the options."""
    model = make_model(options.spec, examples.shape, examples.classes, seed)
    fit(
        model,
        examples,
        steps=steps or options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=seed,
        teacher=teacher if alpha > 0 else None,
        alpha=alpha,
        temperature=options.temperature,
        device=options.device,
    )
    right = predict(model, judged.x)[0].argmax(axis=1) == judged.label
    return Score(float(right.mean()), worst_class(right, judged.label))


def worst_class(right: npt.NDArray[np.bool_], label: npt.NDArray[np.int64]) -> float:
    """Lowest accuracy of any class that has rows, of (N,) verdicts and labels."""
    counts = np.bincount(label)
    hits = np.bincount(label[right], minlength=len(counts))
    return float((hits[counts > 0] / counts[counts > 0]).min())


def held_out(
    examples: Examples, teacher: Floats, *, share: float, seed: int
) -> tuple[Examples, Floats, Examples]:
    """Kept rows cut in two by a hash of their ids: to train on, and to choose a weight by.

    One row at least on either side; a single kept row stands on both.
    """
    n = len(examples)
    count = min(max(rules.count_of(n, share), 1), max(n - 1, 1))
    aside, _ = rules.top_count(rules.uniform(seed, examples.ids), examples.ids, count)
    rest = ~aside if n > 1 else aside
    return examples.take(rest), teacher[rest], examples.take(aside)


@dataclass(frozen=True)
class AlphaSweep:
    """Held-out accuracy of short trainings: `accuracy` maps (alpha, seed) to it."""

    accuracy: Mapping[tuple[float, int], float]
    used: float


def sweep_alpha(
    room: Classroom,
    options: StudentOptions,
    selection: str,
    fraction: float,
    *,
    share: float,
    steps: int,
    seeds: Sequence[int],
) -> AlphaSweep:
    """Judge five weights of the teacher on a held-out `share` of a line's kept rows; choose one.

    Held-out rows whose label the teacher's training doubts (mean margin below 0) judge nothing:
    where the selection kept wrong labels, they would favour the student that repeats them. With
    fewer than ten rows left to judge by, the weight is the one nearest to the prior.

    The first of `seeds` draws the selection and the held-out rows.
    """
    mask = room.mask(selection, fraction, seeds[0])
    train, teacher, aside = held_out(*room.part(mask), share=share, seed=seeds[0])
    trusted = aside.take(~np.isin(aside.ids, room.rows.ids[room.doubted]))
    judged = trusted if len(trusted) >= _FEWEST_JUDGED else aside
    accuracy = {
        (alpha, seed): train_and_score(
            options, train, teacher, judged, alpha=alpha, seed=seed, steps=steps
        ).accuracy
        for alpha in POINTS
        for seed in seeds
    }
    curve = {alpha: float(np.mean([accuracy[alpha, seed] for seed in seeds])) for alpha in POINTS}
    noise = float(room.doubted[mask].mean()), float(room.doubted.mean())
    prior = prior_alpha(fraction, *noise)
    if judged is trusted:
        used = choose_alpha(curve, len(judged) * len(seeds), prior)
    else:
        used = nearest_alpha(POINTS, prior)
    return AlphaSweep(accuracy, used)


def line_id(*parts: object) -> int:
    """Id of a row of the tables of students."""
    return row_id("student", *(repr(part) for part in parts))


def chosen_alphas(table: Table) -> dict[tuple[str, float], float]:
    """The weight in use for each line, of a sweep_alpha table; fractions as float32 writes them."""
    return {
        (row["selection"], round(row["fraction"], 6)): row["alpha"]
        for row in table.to_table().to_pylist()
        if row["used"]
    }


def seeds_of(job_seed: int, count: int) -> Sequence[int]:
    """Seeds of repeated runs."""
    return [job_seed + number for number in range(count)]
