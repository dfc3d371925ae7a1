"""What the page of a pruned data set shows, from the tables' columns alone."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..pruners import rules
from . import svg
from .report import Chart, before_after
from .student_figures import (
    CHOSEN,
    FULL,
    LINES,
    RANDOM,
    VERDICTS,
    Comparison,
    Figure,
    Grid,
    Line,
    figure,
    fraction_of,
    verdict,
)
from .student_figures import percent as share

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

_POINTS = 5000  # of the data map; more make the page heavy and the picture no clearer
_THUMBNAIL = 64  # pixels a side at most
_TEXT = 400  # characters of a text
_VALUES = 8  # of a feature vector
_COLOURS = 6


@dataclass(frozen=True, slots=True)
class Decided:
    """The decided rows, aligned: what the method said, and what the data say of the same rows.

    Attributes
    ----------
    ids, label, clean_label
        (N,) int64; `clean_label` -1 where it is not known.
    keep
        (N,) bool.
    score
        (N,) float32, higher = kept longer.
    reason, group
        (N,) words.
    classes
        Names of the classes by their codes.
    """

    ids: Ints
    keep: Bools
    score: npt.NDArray[np.float32]
    reason: npt.NDArray[np.str_]
    label: Ints
    clean_label: Ints
    group: npt.NDArray[np.str_]
    classes: Sequence[str]

    @classmethod
    def of(cls, decision: pa.Table, data: pa.Table, classes: Sequence[str]) -> Decided:
        """From the rows of a decision and the rows of the data with the same ids."""
        return cls(
            ids=decision.column("id").to_numpy().astype(np.int64),
            keep=np.asarray(decision.column("keep").to_numpy(zero_copy_only=False), np.bool_),
            score=decision.column("score").to_numpy().astype(np.float32),
            reason=np.array(decision.column("reason").to_pylist(), str),
            label=data.column("label").to_numpy().astype(np.int64),
            clean_label=data.column("clean_label").to_numpy().astype(np.int64),
            group=np.array(data.column("group").to_pylist(), str),
            classes=classes,
        )

    @property
    def clean_known(self) -> bool:
        """Whether right labels are known, so that flipped ones can be counted."""
        return bool((self.clean_label >= 0).any())

    @property
    def flipped(self) -> Bools:
        """(N,) bool: the label is known to be wrong."""
        return np.asarray((self.clean_label >= 0) & (self.clean_label != self.label), np.bool_)

    def class_name(self, code: int) -> str:
        """The name of a class, or its code where it has none."""
        return self.classes[code] if 0 <= code < len(self.classes) else str(code)


def cards(rows: Decided, grid: Grid | None) -> list[dict[str, str]]:
    """Rows, classes and wrong labels before and after, and what the students reach."""
    there, left = np.unique(rows.label), np.unique(rows.label[rows.keep])
    made = [
        before_after("Rows", len(rows.keep), int(rows.keep.sum()), "kept"),
        {
            "label": "Classes",
            "value": f"{len(left)} of {len(there)}",
            "note": "have a row left",
        },
    ]
    if rows.clean_known:
        wrong = rows.flipped
        card = before_after("Wrong labels", int(wrong.sum()), int((wrong & rows.keep).sum()), "")
        if rows.keep.any():
            card["note"] = (
                f"{wrong.mean():.1%} of the rows, {wrong[rows.keep].mean():.1%} of the kept"
            )
        made.append(card)
    if grid is None:
        return made
    full = grid.full()
    if full.n:
        made.append(_accuracy_card("Accuracy on full data", full, "labels alone"))
    for fraction in grid.fractions[:1]:
        best = grid.best(fraction)
        if best is not None:
            words = f"best line: {best[0].name}"
            made.append(_accuracy_card(f"Accuracy at {share(fraction)}", best[1], words))
    return made


def _accuracy_card(label: str, found: Figure, words: str) -> dict[str, str]:
    spread = f", ± {100 * found.half:.1f}" if math.isfinite(found.half) else ""
    seeds = "1 seed" if found.n == 1 else f"{found.n} seeds"
    note = f"{words}{spread}, {seeds}"
    return {"label": label, "value": f"{100 * found.mean:.1f}%", "note": note}


def accuracy_chart(grid: Grid) -> Chart:
    """Accuracy of the four lines against the kept fraction, full data beside them."""
    series, legend = [], []
    for slot, line in enumerate(LINES):
        found = [(f, grid.accuracy(f, line)) for f in grid.fractions]
        found = [(f, accuracy) for f, accuracy in found if accuracy.n]
        if found:
            points = [(f, accuracy.mean) for f, accuracy in found]
            spread = [accuracy.half for _, accuracy in found]
            series.append(svg.Series(line.name, points, slot, spread=spread))
            legend.append({"cls": f"s{slot}", "name": line.name})
    full = grid.full()
    level = None
    if full.n:
        level = svg.Level(f"full data, {full.percent}", full.mean, full.half)
        legend.append({"cls": "rule", "name": level.name})
    ends = [*_ends(series), *([full.mean - _zero(full.half), full.mean + _zero(full.half)])]
    picture = svg.line_chart(
        series,
        x_label="share of the training rows kept",
        y_label="accuracy on the test rows",
        label="Test accuracy against the kept share of the rows, random and chosen rows, with and"
        " without distillation",
        x_range=(0.0, min(1.0, 1.08 * max(grid.fractions, default=1.0))),
        y_range=svg.around(ends),
        level=level,
    )
    note = (
        "Mean over seeds with its 95 % t interval; the lines of one share stand side by side so"
        " that their bars can be read."
    )
    return Chart("Accuracy against the kept share", picture, legend, note)


def _ends(series: Iterable[svg.Series]) -> list[float]:
    """The lowest and highest y of all intervals."""
    return [
        y + side * _zero(half)
        for line in series
        for (_, y), half in zip(line.points, line.spread, strict=True)
        for side in (-1, 1)
    ]


def _zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def alpha_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Held-out accuracy against alpha, a chart a selection and a line a kept fraction.

    Full data is a line of each.
    """
    full = [row for row in rows if row["selection"] == FULL]
    made = []
    for selection in (RANDOM, CHOSEN):
        of_selection = [row for row in rows if row["selection"] == selection]
        if of_selection:
            made.append(_alpha_chart(selection, [*of_selection, *full]))
    return made


def _alpha_chart(name: str, rows: Sequence[Mapping[str, Any]]) -> Chart:
    fractions = sorted({fraction_of(row["fraction"]) for row in rows})
    spaced = np.linspace(0, len(fractions) - 1, min(len(fractions), _COLOURS)).round().astype(int)
    series = []
    for slot, fraction in enumerate(fractions[number] for number in spaced):
        curve: dict[float, list[float]] = {}
        used: Counter[float] = Counter()
        for row in rows:
            if fraction_of(row["fraction"]) == fraction:
                curve.setdefault(row["alpha"], []).append(row["accuracy"])
                used[row["alpha"]] += row["used"]
        figures = {alpha: figure(values) for alpha, values in sorted(curve.items())}
        points = [(alpha, found.mean) for alpha, found in figures.items()]
        taken, times = max(used.items(), key=lambda item: item[1])
        mark = (taken, figures[taken].mean) if times else None
        spread = [found.half for found in figures.values()]
        series.append(svg.Series(f"{share(fraction)} kept", points, slot, mark, spread))
    picture = svg.line_chart(
        series,
        x_label="alpha: weight of the teacher",
        y_label="held-out accuracy",
        label=f"Accuracy on held-out rows against alpha for {name} rows, one line a kept share",
        y_range=svg.around(_ends(series)),
        x_range=(-0.04, 1.04),
        percent_x=False,
    )
    note = (
        "Short trainings, judged on a held-out part of the kept rows with the labels they have."
        " Each line is judged on rows of its own: compare shapes, not heights."
        " The large dot is the alpha that the students are trained with: not the highest point"
        " where others are as good within chance."
    )
    if len(spaced) < len(fractions):
        note += f" {len(spaced)} of {len(fractions)} shares are drawn."
    legend = [{"cls": f"s{line.slot}", "name": line.name} for line in series]
    return Chart(f"Held-out accuracy against alpha, {name} rows", picture, legend, note)


def map_ids(ids: Ints) -> Ints:
    """Sorted ids of the rows that the data map draws: all, or some by a hash of the id."""
    return np.sort(ids[np.argsort(rules.uniform(0, ids), kind="stable")[:_POINTS]])


class Spread:
    """Mean and standard deviation of a value over epochs, for some samples, from a stream.

    With several runs: the mean over runs of each run's mean, and of each run's deviation.
    """

    def __init__(self, ids: Ints) -> None:
        """Of the samples with those ids, sorted."""
        self._ids = ids
        self._runs: dict[int, npt.NDArray[np.float64]] = {}

    def add(self, sample: Ints, run: Ints, value: npt.NDArray[np.floating[Any]]) -> None:
        """Take in rows; samples that are not asked for are passed over."""
        if not len(self._ids):
            return
        place = np.minimum(np.searchsorted(self._ids, sample), len(self._ids) - 1)
        asked = self._ids[place] == sample
        for number in np.unique(run[asked]):
            rows = asked & (run == number)
            sums = self._runs.setdefault(int(number), np.zeros((3, len(self._ids))))
            seen = value[rows].astype(np.float64)
            for power in range(3):
                np.add.at(sums[power], place[rows], seen**power)

    def result(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean and deviation (over epochs, not epochs - 1) of each id; NaN where none was seen."""
        n = len(self._ids)
        mean, deviation = np.full((2, max(len(self._runs), 1), n), np.nan)
        for number, (count, total, squares) in enumerate(self._runs.values()):
            with np.errstate(invalid="ignore", divide="ignore"):
                mean[number] = total / count
                deviation[number] = np.sqrt(np.maximum(squares / count - mean[number] ** 2, 0))
        return mean.mean(axis=0), deviation.mean(axis=0)


def data_map(rows: Decided, ids: Ints, spread: Spread) -> Chart:
    """Confidence against variability, as Swayamdipta et al. 2020 (arXiv:2009.10795) draw it.

    `ids` are those of `map_ids`, `spread` what it says of the probability of their labels.
    """
    confidence, variability = spread.result()
    order = np.argsort(rows.ids, kind="stable")
    place = order[np.searchsorted(rows.ids[order], ids)]
    wrong, keep = rows.flipped, rows.keep
    kept_wrong = int((wrong & keep).sum())
    groups = [
        (f"kept ({int((keep & ~wrong).sum()):,})", keep & ~wrong, 0),
        (f"dropped ({int((~keep & ~wrong).sum()):,})", ~keep & ~wrong, 1),
    ]
    if rows.clean_known:
        words = f"wrong label ({int(wrong.sum()):,}, {kept_wrong:,} of them kept)"
        groups.append((words, wrong, 4))
    finite = np.isfinite(confidence)
    series = [
        svg.Series(
            name,
            [(variability[i], confidence[i]) for i in np.flatnonzero(finite & mask[place])],
            slot,
        )
        for name, mask, slot in groups
    ]
    picture = svg.scatter(
        series,
        x_label="variability: its standard deviation",
        y_label="confidence: mean probability of the label",
        label="Each training row by the mean and the deviation over epochs of its label's"
        " probability, coloured by what became of it",
        x_range=(0.0, 0.5),
        y_range=(0.0, 1.0),
    )
    note = "Over the epochs of training. Easy rows lie at the top, ambiguous ones to the right."
    if len(ids) < len(rows.ids):
        note += f" {len(ids):,} of {len(rows.ids):,} rows are drawn."
    legend = [{"cls": f"cloud s{line.slot}", "name": line.name} for line in series]
    return Chart("Data map", picture, legend, note)


def class_rows(rows: Decided) -> list[dict[str, Any]]:
    """Balance of the classes, one line each, in the order of their codes."""
    codes = np.arange(max(len(rows.classes), int(rows.label.max(initial=-1)) + 1))
    return _balance(rows, [(rows.class_name(int(c)), rows.label == c) for c in codes])


def group_rows(rows: Decided, most: int = 100) -> list[dict[str, Any]]:
    """Balance of the groups, the largest first; none where no row has a group."""
    names, code = np.unique(rows.group, return_inverse=True)
    if not any(names.tolist()):
        return []
    largest = np.argsort(-np.bincount(code), kind="stable")[:most]
    return _balance(rows, [(str(names[g]) or "not named", code == g) for g in largest])


def _balance(rows: Decided, parts: Sequence[tuple[str, Bools]]) -> list[dict[str, Any]]:
    whole, left = max(len(rows.keep), 1), max(int(rows.keep.sum()), 1)
    made = []
    for name, part in parts:
        before, after = int(part.sum()), int((part & rows.keep).sum())
        wrong = part & rows.flipped
        made.append(
            {
                "name": name,
                "rows": f"{before:,}",
                "kept": f"{after:,}",
                "of_it": f"{after / before:.0%}" if before else "",
                "width": f"{100 * after / before:.0f}" if before else "0",
                "before": f"{before / whole:.1%}",
                "after": f"{after / left:.1%}",
                "wrong": f"{int(wrong.sum()):,}",
                "wrong_kept": f"{int((wrong & rows.keep).sum()):,}",
                "cls": "lost" if before and not after else "",
            }
        )
    return made


def reason_rows(rows: Decided) -> list[dict[str, str]]:
    """How many rows each reason kept and dropped, the most frequent first."""
    names, code = np.unique(rows.reason, return_inverse=True)
    kept = np.bincount(code[rows.keep], minlength=len(names))
    dropped = np.bincount(code[~rows.keep], minlength=len(names))
    return [
        {"reason": str(names[i]), "kept": f"{kept[i]:,}", "dropped": f"{dropped[i]:,}"}
        for i in np.argsort(-(kept + dropped), kind="stable")
    ]


def grid_rows(grid: Grid) -> list[dict[str, str]]:
    """The students in numbers: a line for each selection at each fraction, full data last."""
    made = []
    for selection, fraction in [
        *((selection, f) for f in grid.fractions for selection in (RANDOM, CHOSEN)),
        (FULL, 1.0),
    ]:
        plain, taught = Line(selection, False), Line(selection, True)
        students = [*grid.students(fraction, plain), *grid.students(fraction, taught)]
        if not students:
            continue
        gain = grid.difference(fraction, taught, plain)
        made.append(
            {
                "name": "full data" if selection == FULL else f"{share(fraction)} {selection}",
                "rows": _span(row["rows"] for row in students),
                "steps": _span(row["steps"] for row in students),
                **_cell("plain", grid, fraction, plain),
                **_cell("taught", grid, fraction, taught),
                "gain": _points(gain.mean) if gain.n else "",
                "alpha": _span(row["alpha"] for row in grid.students(fraction, taught)),
                "seeds": _span(
                    found.n
                    for found in (grid.accuracy(fraction, plain), grid.accuracy(fraction, taught))
                    if found.n
                ),
            }
        )
    return made


def _cell(name: str, grid: Grid, fraction: float, line: Line) -> dict[str, str]:
    students = grid.students(fraction, line)
    if not students:
        return {name: "", f"{name}_worst": ""}
    worst = figure(row["worst_class_accuracy"] for row in students)
    return {name: grid.accuracy(fraction, line).percent, f"{name}_worst": f"{worst.mean:.0%}"}


def comparison_rows(
    found: Sequence[Comparison], fractions: Sequence[float]
) -> list[dict[str, Any]]:
    """Differences between lines in points, one cell a fraction."""
    return [
        {"name": one.name, "cells": [_difference(one.differences.get(f)) for f in fractions]}
        for one in found
    ]


def _difference(found: Figure | None) -> dict[str, str]:
    if found is None:
        return {"value": "", "interval": "", "cls": ""}
    interval = ""
    if math.isfinite(found.half):
        interval = " to ".join(_points(found.mean + side * found.half) for side in (-1, 1))
    classes = dict(zip(VERDICTS, ("kept", "lost", "", "none"), strict=True))
    return {
        "value": _points(found.mean),
        "interval": interval,
        "cls": classes[verdict(found)],
    }


def _points(difference: float) -> str:
    """A difference of accuracies in points, with its sign; a rounded nothing has a plus."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def _span(values: Iterable[float]) -> str:
    """One number, or the lowest and the highest."""
    found = sorted({f"{value:,.6g}": value for value in values}.items(), key=lambda item: item[1])
    if not found:
        return ""
    names = [name for name, _ in found]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def noise_lines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table of noise found, the best AUC first."""
    ordered = sorted(
        rows, key=lambda row: (math.isnan(row["auc"]), -_zero(row["auc"]), row["score"])
    )
    return [
        {
            "score": row["score"],
            "auc": f"{row['auc']:.3f}" if math.isfinite(row["auc"]) else "–",
            "found": f"{row['found']:,} of {row['planted']:,}",
            "share": f"{row['found'] / row['planted']:.0%}" if row["planted"] else "",
            "width": f"{100 * row['found'] / row['planted']:.0f}" if row["planted"] else "0",
            "looked": f"{row['looked']:,}",
        }
        for row in ordered
    ]


def by_chance(rows: Decided, noise: Sequence[Mapping[str, Any]]) -> str:
    """How many wrong labels rows taken at random would hold; empty without noise."""
    looked = max((row["looked"] for row in noise), default=0)
    if not looked or not rows.clean_known or not len(rows.ids):
        return ""
    return (
        f"Each score looks at its {looked:,} hardest rows, as many as there are wrong labels;"
        f" {looked:,} rows at random would hold about {looked * rows.flipped.mean():.3g}. An AUC of"
        " 0.5 is chance; below it, wrong labels pass for easy rows."
    )


def valued(rows: Decided, count: int) -> list[tuple[str, int]]:
    """The `count` most and least valued rows by turns, ("most" or "least", row number)."""
    order = rules.best_first(rows.score, rows.ids)
    count = min(count, len(order) // 2)
    made: list[tuple[str, int]] = []
    for number in range(count):
        made += [("most", int(order[number])), ("least", int(order[-1 - number]))]
    return made


def example(
    rows: Decided,
    number: int,
    side: str,
    row: Mapping[str, Any],
    log_probability: Sequence[float] | None,
) -> dict[str, str]:
    """One valued row, in words and as a picture.

    Parameters
    ----------
    number
        Its number among the decided rows.
    row
        Its source, and its image, text or features.
    log_probability
        Of each class, nats, by the teacher; None without a teacher.
    """
    shown = {
        "side": side,
        "id": str(rows.ids[number]),
        "source": row["source"],
        "label": rows.class_name(int(rows.label[number])),
        "clean": "",
        "predicted": "",
        "fate": "kept" if rows.keep[number] else "dropped",
        "cls": "kept" if rows.keep[number] else "lost",
        "score": f"{rows.score[number] + 0.0:.4g}",  # + 0.0: not "-0"
        "reason": str(rows.reason[number]),
        "picture": "",
        "text": "",
    }
    if rows.flipped[number]:
        shown["clean"] = rows.class_name(int(rows.clean_label[number]))
    if log_probability is not None:
        best = int(np.argmax(log_probability))
        shown["predicted"] = f"{rows.class_name(best)} ({math.exp(log_probability[best]):.2f})"
    if row["image"]:
        shown["picture"] = thumbnail(row["image"])
        shown["text"] = "" if shown["picture"] else "the picture cannot be read"
    elif row["text"]:
        text = row["text"]
        shown["text"] = text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
    else:
        values = ", ".join(f"{value:.3g}" for value in row["features"][:_VALUES])
        more = len(row["features"]) - _VALUES
        shown["text"] = values + (f" and {more:,} more" if more > 0 else "")
    return shown


def thumbnail(image: bytes) -> str:
    """A `data:` URI of a small PNG; empty where the bytes are no picture."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image)) as opened:
            small = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
