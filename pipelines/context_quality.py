"""From scores to figures: how well each method keeps what a question needs.

`measure` takes the sentences and the scores that the methods gave them, and makes every figure
of the report; no model runs here, so another threshold or budget costs nothing.

Three rules decide what is kept:

``equal``      one threshold for all passages, set so that exactly a given share of all
               characters is removed; the rule to compare methods by, since nothing but the
               order of the sentences over the whole set matters.
``best``       the best k sentences of each passage; only the order inside a passage matters.
``threshold``  score > threshold; for the model, whose scores are probabilities.

Shares of characters are over all passages together; ``removed_mean`` is the mean of the
passages' own shares. Evidence is kept for a question when all its evidence sentences are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from .context_metrics import (
    Bools,
    Floats,
    Interval,
    Ints,
    Labelled,
    Sweep,
    answer_level,
    bootstrap_weights,
    evidence_level,
    interval,
    question_mean,
    rank_in_passage,
)
from .sentence_metrics import (
    Reliability,
    auroc,
    auroc_within,
    by_position,
    confusion,
    ndcg,
    reciprocal_rank,
    reliability,
)

#: Shares removed at which curves are written down.
GRID = tuple(round(0.05 * i, 2) for i in range(20))


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number: a method, a rule and its setting, what was measured, and how sure."""

    method: str
    rule: str
    at: float | None
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Scores:
    """What each method gave: higher = kept longer, or ranked earlier.

    Attributes
    ----------
    sentence
        Method to (N,) float.
    passage
        Method to (P,) float; methods that do not rank passages are absent.
    other
        Method to (M,) float: the sentences of passages paired with a question that they do not
        belong to. `other_chars` (M,) are their lengths, `other_passage` (M,) their passages.
    """

    sentence: Mapping[str, Floats]
    passage: Mapping[str, Floats] = field(default_factory=dict)
    other: Mapping[str, Floats] = field(default_factory=dict)
    other_chars: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    other_passage: Ints = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure at: see `EvaluateContextOptions` for each."""

    main: str
    threshold: float
    thresholds: tuple[float, ...]
    targets: tuple[float, ...]
    best_k: tuple[int, ...]
    resamples: int
    seed: int
    probabilities: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Quality:
    """All figures of one set of rows, the curves and the calibration behind them."""

    figures: tuple[Figure, ...]
    curves: Mapping[str, Mapping[str, list[float | None]]]
    calibration: Mapping[str, Reliability]

    def find(self, method: str, rule: str, metric: str, at: float | None = None) -> Figure | None:
        """The one figure asked for; None if it was not measured."""
        for figure in self.figures:
            asked = (figure.method, figure.rule, figure.metric) == (method, rule, metric)
            if asked and (at is None or figure.at == at):
                return figure
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain values; a figure that could not be measured is null, never 0."""
        return {
            "figures": [asdict(figure) for figure in self.figures],
            "curves": {name: dict(curve) for name, curve in self.curves.items()},
            "calibration": {name: _plain(value) for name, value in self.calibration.items()},
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Quality:
        """Back from `to_json`; calibration comes back as lists with NaN for null."""
        figures = tuple(Figure(**figure) for figure in told["figures"])
        calibration = {name: _reliability(item) for name, item in told["calibration"].items()}
        return cls(figures, told["curves"], calibration)


def _reliability(told: Mapping[str, Any]) -> Reliability:
    arrays = {
        name: np.array(told[name], dtype=np.float64) for name in ("edges", "stated", "observed")
    }
    return Reliability(
        **arrays, count=np.array(told["count"], np.int64), ece=told["ece"], brier=told["brier"]
    )


def _plain(value: Reliability) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, item in asdict(value).items():
        listed = item.tolist() if isinstance(item, np.ndarray) else item
        made[name] = [_number(x) for x in listed] if isinstance(listed, list) else _number(listed)
    return made


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def measure(data: Labelled, scores: Scores, settings: Settings) -> Quality:
    """Every figure that the labels allow. A figure without anything to count is left out."""
    return _Measuring(data, scores, settings).run()


class _Measuring:
    """One run of `measure`; the resamples are shared by all methods, so differences are paired."""

    def __init__(self, data: Labelled, scores: Scores, settings: Settings) -> None:
        self.data, self.settings = data, settings
        # float64 throughout: float32 scores would meet a threshold rounded to float32.
        self.scores = replace(
            scores,
            sentence=_doubles(scores.sentence),
            passage=_doubles(scores.passage),
            other=_doubles(scores.other),
        )
        self.weights = bootstrap_weights(data.questions, settings.resamples, settings.seed)
        self.figures: list[Figure] = []
        self.curves: dict[str, dict[str, list[float | None]]] = {}
        self.calibration: dict[str, Reliability] = {}
        self.levels = {"evidence_kept": evidence_level, "answer_kept": answer_level}

    def run(self) -> Quality:
        for method, score in self.scores.sentence.items():
            rank = -rank_in_passage(self.data, score).astype(np.float64)
            self._decisions(method, score, rank)
            self._alone(method, score)
        for metric in self.levels:
            self._kept_for_questions(metric)
        self._rerank()
        self._other_question()
        return Quality(tuple(self.figures), self.curves, self.calibration)

    def _add(self, method: str, rule: str, at: float | None, metric: str, got: Interval) -> None:
        if got.value is not None:
            self.figures.append(
                Figure(method, rule, at, metric, got.value, got.low, got.high, got.n)
            )

    def _kept_for_questions(self, metric: str) -> None:
        """Share of questions kept, all methods and rules, and the main method's lead over each."""
        draws: dict[str, dict[tuple[str, float], tuple[float, Floats, int]]] = {}
        for method, score in self.scores.sentence.items():
            sweep = Sweep(self.data, score, self.levels[metric](self.data, score))
            if not sweep.counted:
                return
            self._curve(method, metric, sweep)
            draws[method] = self._equal(sweep) | self._best(method, score, metric)
            if method in self.settings.probabilities:
                self._thresholds(method, sweep, metric)
        for method, points in draws.items():
            for (rule, at), (value, resampled, n) in points.items():
                self._add(method, rule, at, metric, interval(value, resampled, n))
                if method == self.settings.main or self.settings.main not in draws:
                    continue
                best, drawn, _ = draws[self.settings.main][rule, at]
                lead = interval(best - value, drawn - resampled, n)
                self._add(method, rule, at, f"{metric}_lead", lead)

    def _curve(self, method: str, metric: str, sweep: Sweep) -> None:
        values = sweep.at_removed(GRID)[0]
        self.curves.setdefault(method, {"removed": list(GRID)})[metric] = values.tolist()

    def _equal(self, sweep: Sweep) -> dict[tuple[str, float], tuple[float, Floats, int]]:
        targets = self.settings.targets
        exact, drawn = sweep.at_removed(targets)[0], sweep.at_removed(targets, self.weights)
        return {
            ("equal", target): (float(exact[i]), drawn[:, i], sweep.counted)
            for i, target in enumerate(targets)
        }

    def _best(
        self, method: str, score: Floats, metric: str
    ) -> dict[tuple[str, float], tuple[float, Floats, int]]:
        rank = -rank_in_passage(self.data, score).astype(np.float64)
        sweep = Sweep(self.data, rank, self.levels[metric](self.data, rank))
        wanted = [1.0 - k for k in self.settings.best_k]  # the best k have ranks 0..k-1
        exact, drawn = sweep.at_levels(wanted)[1][0], sweep.at_levels(wanted, self.weights)[1]
        return {
            ("best", float(k)): (float(exact[i]), drawn[:, i], sweep.counted)
            for i, k in enumerate(self.settings.best_k)
        }

    def _thresholds(self, method: str, sweep: Sweep, metric: str) -> None:
        wanted = sorted({*self.settings.thresholds, self.settings.threshold})
        # "score > t" is "score reaches the next number above t".
        levels = [float(np.nextafter(t, np.inf)) for t in wanted]
        exact, drawn = sweep.at_levels(levels)[1][0], sweep.at_levels(levels, self.weights)[1]
        for i, threshold in enumerate(wanted):
            got = interval(float(exact[i]), drawn[:, i], sweep.counted)
            self._add(method, "threshold", threshold, metric, got)

    def _decisions(self, method: str, score: Floats, rank: Floats) -> None:
        """Characters removed and sentence counts, for every fixed decision."""
        nothing = np.full(self.data.questions, np.nan)
        sweep = Sweep(self.data, score, nothing)
        for target in self.settings.targets:
            keep = score >= sweep.level_at(target)
            self._one_decision(method, "equal", target, keep, positions=True)
        for k in self.settings.best_k:
            self._one_decision(method, "best", float(k), rank >= 1 - k, positions=True)
        if method in self.settings.probabilities:
            for threshold in sorted({*self.settings.thresholds, self.settings.threshold}):
                main = threshold == self.settings.threshold
                keep = score > threshold
                self._one_decision(method, "threshold", threshold, keep, positions=main)

    def _one_decision(
        self, method: str, rule: str, at: float, keep: Bools, *, positions: bool
    ) -> None:
        data, q = self.data, self.data.questions
        total = np.bincount(data.owner, weights=data.chars, minlength=q)
        kept = np.bincount(data.owner, weights=data.chars * keep, minlength=q)
        drawn = 1 - (self.weights @ kept) / np.maximum(self.weights @ total, 1)
        removed = interval(float(1 - kept.sum() / total.sum()), drawn, int((total > 0).sum()))
        self._add(method, rule, at, "removed", removed)
        self._add(method, rule, at, "removed_mean", Interval(_mean_removed(data, keep), n=q))
        if not (data.label == 1).any():
            return
        for name, got in confusion(data, keep).f_beta(self.weights).items():
            self._add(method, rule, at, name, got)
        if positions:
            for place, got in by_position(data, keep, self.weights).items():
                self._add(method, rule, at, f"kept_{place}", got)

    def _alone(self, method: str, score: Floats) -> None:
        """Figures of the scores themselves: order and calibration."""
        known = self.data.label >= 0
        truth = self.data.label[known] == 1
        n = int(known.sum())
        if not truth.any():
            return
        for name, value in (
            ("auroc", auroc(score[known], truth)),
            ("auroc_within", auroc_within(self.data, score)),
        ):
            self._add(method, "scores", None, name, interval(value, [], n))
        if method in self.settings.probabilities:
            found = reliability(score[known], truth)
            self.calibration[method] = found
            self._add(method, "scores", None, "ece", Interval(found.ece, n=n))
            self._add(method, "scores", None, "brier", Interval(found.brier, n=n))

    def _rerank(self) -> None:
        """MRR and nDCG@10 over each question's candidates, where it has more than one."""
        data = self.data
        candidates = np.bincount(data.question, minlength=data.questions)
        several = candidates > 1
        judged = np.bincount(data.question[data.relevant < 0], minlength=data.questions) == 0
        if not (several & judged).any():
            return
        found: dict[str, dict[str, Floats]] = {}
        for method, score in self.scores.passage.items():
            arguments = (data.question, score, data.relevant, data.questions)
            figures = {"mrr": reciprocal_rank(*arguments), "ndcg@10": ndcg(*arguments)}
            kept = {name: np.where(several & judged, v, np.nan) for name, v in figures.items()}
            found[method] = kept
        main = found.get(self.settings.main)
        for method, figures in found.items():
            for name, values in figures.items():
                self._add(method, "rerank", None, name, question_mean(values, self.weights))
                if main is not None and method != self.settings.main:
                    lead = question_mean(main[name] - values, self.weights)
                    self._add(method, "rerank", None, f"{name}_lead", lead)

    def _other_question(self) -> None:
        """How much goes of passages that belong to another question; all of it should."""
        chars, passage = self.scores.other_chars, self.scores.other_passage
        for method, score in self.scores.other.items():
            levels: list[tuple[str, float, Bools]] = []
            if method in self.settings.probabilities:
                wanted = sorted({*self.settings.thresholds, self.settings.threshold})
                levels += [("other_threshold", t, score > t) for t in wanted]
            own = self.scores.sentence[method]
            sweep = Sweep(self.data, own, np.full(self.data.questions, np.nan))
            for target in self.settings.targets:
                levels.append(("other_equal", target, score >= sweep.level_at(target)))
            for rule, at, keep in levels:
                self._add(method, rule, at, "removed", _removed(chars, keep, passage, self))
                emptied = np.bincount(passage, weights=keep) == 0
                share = Interval(float(emptied.mean()), n=len(emptied))
                self._add(method, rule, at, "emptied", share)

    def resampled_passages(self, passages: int) -> Ints:
        """Resamples over passages, for figures that no labelled question stands behind."""
        return bootstrap_weights(passages, self.settings.resamples, self.settings.seed + 1)


def _doubles(scores: Mapping[str, Floats]) -> dict[str, Floats]:
    return {name: np.asarray(score, np.float64) for name, score in scores.items()}


def _removed(chars: Ints, keep: Bools, passage: Ints, run: _Measuring) -> Interval:
    total = np.bincount(passage, weights=chars)
    kept = np.bincount(passage, weights=chars * keep)
    weights = run.resampled_passages(len(total))
    drawn = 1 - (weights @ kept) / (weights @ total)
    return interval(float(1 - kept.sum() / total.sum()), drawn, len(total))


def _mean_removed(data: Labelled, keep: Bools) -> float:
    total = np.bincount(data.passage, weights=data.chars)
    kept = np.bincount(data.passage, weights=data.chars * keep)
    return float(np.mean(1 - kept / total))


def pick(figures: Sequence[Figure], **wanted: Any) -> list[Figure]:
    """The figures whose fields have the wanted values, in order."""
    return [f for f in figures if all(getattr(f, name) == v for name, v in wanted.items())]
