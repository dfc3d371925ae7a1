"""The figures of context pruning as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .context_quality import Figure, Quality, pick

#: What a reader sees for each method.
TITLES = {
    "provence": "Prunery (Provence)",
    "cosine": "embedding cosine",
    "lexrank": "LexRank, continuous",
    "lexrank_threshold": "LexRank, threshold 0.1",
    "dslr": "DSLR, our ranking head a sentence",
    "first_k": "first k sentences",
    "random": "random",
}


#: Settings shown in a brief report: the share removed, the sentences kept, beside the threshold.
BRIEF_TARGET, BRIEF_K = 0.59, 2.0


def to_markdown(
    name: str, summary: Mapping[str, Any], quality: Quality, *, brief: bool = False
) -> str:
    """All tables of one set of rows; a table without a figure is left out.

    `brief` shows one share removed, one k and the default threshold alone, and neither curves,
    positions nor calibration; all figures stand in the JSON either way.
    """
    default = float(summary["threshold"])
    shown = _only(quality, default) if brief else quality
    tables = [
        _equal(shown),
        _best(shown),
        _thresholds(shown, default),
        "" if brief else _curve(shown),
        "" if brief else _positions(shown, default),
        _scores(shown),
        _rerank(shown),
        _other(shown),
        "" if brief else _calibration(shown),
    ]
    return "\n\n".join([_head(name, summary), *filter(None, tables)]) + "\n"


def _only(quality: Quality, default: float) -> Quality:
    wanted = {
        "equal": BRIEF_TARGET,
        "other_equal": BRIEF_TARGET,
        "best": BRIEF_K,
        "threshold": default,
        "other_threshold": default,
    }
    kept = tuple(f for f in quality.figures if f.at == wanted.get(f.rule, f.at))
    return replace(quality, figures=kept)


def _head(name: str, summary: Mapping[str, Any]) -> str:
    return (
        f"### {name}\n\n{summary['questions']} questions, {summary['passages']} passages,"
        f" {summary['sentences']} sentences; evidence is labelled for"
        f" {summary['labelled_questions']} questions, an answer string occurs for"
        f" {summary['answerable_questions']}. Brackets: 95 % intervals, {summary['resamples']}"
        f" bootstrap resamples by question, seed {summary['seed']}, the same for all methods."
    )


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [row for row in rows if any(cell != "-" for cell in row[1:])]
    if not body:
        return ""
    filled = [i for i in range(len(head)) if i == 0 or any(row[i] != "-" for row in body)]
    head, body = [head[i] for i in filled], [[row[i] for i in filled] for row in body]
    ruled = "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"
    lines = ["| " + " | ".join(row) + " |" for row in [head, *body]]
    return f"{caption}\n\n" + "\n".join([lines[0], ruled, *lines[1:]])


def cell(figure: Figure | None, *, signed: bool = False) -> str:
    """A figure with its interval; `-` where it was not measured."""
    if figure is None or figure.value is None:
        return "-"
    shown = f"{figure.value:+.3f}" if signed else f"{figure.value:.3f}"
    if figure.low is None or figure.high is None:
        return shown
    if signed:
        return f"{shown} [{figure.low:+.3f}, {figure.high:+.3f}]"
    return f"{shown} [{figure.low:.3f}, {figure.high:.3f}]"


def _methods(quality: Quality) -> list[str]:
    return list(dict.fromkeys(figure.method for figure in quality.figures))


def _settings(quality: Quality, rule: str) -> list[float]:
    return sorted({f.at for f in pick(quality.figures, rule=rule) if f.at is not None})


def _rows(
    quality: Quality, rule: str, at: float, columns: Sequence[tuple[str, bool]]
) -> list[list[str]]:
    return [
        [
            TITLES.get(method, method),
            *(cell(quality.find(method, rule, metric, at), signed=s) for metric, s in columns),
        ]
        for method in _methods(quality)
    ]


def _equal(quality: Quality) -> str:
    tables = []
    for at in _settings(quality, "equal"):
        columns = [
            ("evidence_kept", False),
            ("evidence_kept_lead", True),
            ("answer_kept", False),
            ("answer_kept_lead", True),
            ("f2", False),
            ("removed", False),
        ]
        tables.append(
            _table(
                f"One threshold for all, {at:.0%} of the characters removed (F2 of whole"
                " sentences, at the nearest share that a threshold reaches):",
                [
                    "method",
                    "evidence kept",
                    "our lead",
                    "answer kept",
                    "our lead",
                    "F2",
                    "removed there",
                ],
                _rows(quality, "equal", at, columns),
            )
        )
    return "\n\n".join(filter(None, tables))


def _best(quality: Quality) -> str:
    tables = []
    for at in _settings(quality, "best"):
        columns = [
            ("removed", False),
            ("removed_mean", False),
            ("evidence_kept", False),
            ("evidence_kept_lead", True),
            ("answer_kept", False),
        ]
        tables.append(
            _table(
                f"The best {at:.0f} of each passage:",
                [
                    "method",
                    "removed",
                    "removed, mean of passages",
                    "evidence kept",
                    "our lead",
                    "answer kept",
                ],
                _rows(quality, "best", at, columns),
            )
        )
    return "\n\n".join(filter(None, tables))


def _thresholds(quality: Quality, default: float) -> str:
    metrics = ["removed", "evidence_kept", "answer_kept", "precision", "recall", "f2"]
    rows = []
    for method in _methods(quality):
        if not pick(quality.figures, method=method, rule="threshold"):
            continue
        for at in _settings(quality, "threshold"):
            found = [cell(quality.find(method, "threshold", m, at)) for m in metrics]
            mark = " (default)" if at == default else ""
            rows.append([f"{TITLES.get(method, method)} > {at:g}{mark}", *found])
    head = ["kept where", "removed", "evidence kept", "answer kept", "precision", "recall", "F2"]
    return _table("Thresholds on the model's probability:", head, rows)


def _curve(quality: Quality) -> str:
    tables = []
    for metric, caption in (("evidence_kept", "Evidence"), ("answer_kept", "Answers")):
        curves = {m: c for m, c in quality.curves.items() if metric in c}
        if not curves:
            continue
        grid = next(iter(curves.values()))["removed"]
        rows = []
        for i, removed in enumerate(grid):
            values = [curve[metric][i] for curve in curves.values()]
            rows.append([f"{removed:.2f}", *("-" if v is None else f"{v:.3f}" for v in values)])
        head = ["removed", *(TITLES.get(method, method) for method in curves)]
        tables.append(_table(f"{caption} kept against characters removed:", head, rows))
    return "\n\n".join(tables)


def _positions(quality: Quality, default: float) -> str:
    """For methods with probabilities; of the others the JSON tells."""
    rows = []
    for method in _methods(quality):
        if not pick(quality.figures, method=method, rule="threshold"):
            continue
        settings = [
            ("threshold", default, f"> {default:g}"),
            *(("equal", at, f"{at:.0%} removed") for at in _settings(quality, "equal")),
            *(("best", at, f"best {at:.0f}") for at in _settings(quality, "best")),
        ]
        for rule, at, words in settings:
            places = ("first", "middle", "last")
            found = [quality.find(method, rule, f"kept_{place}", at) for place in places]
            rows.append([f"{TITLES.get(method, method)}, {words}", *map(cell, found)])
    return _table(
        "Evidence kept by its place in the passage:",
        ["method", "first sentence", "between", "last sentence"],
        rows,
    )


def _scores(quality: Quality) -> str:
    columns = ["auroc", "auroc_within", "ece", "brier"]
    return _plain_rows(
        quality,
        "scores",
        "Scores alone (AUROC over all sentences, and inside passages):",
        ["method", "AUROC", "AUROC inside", "ECE", "Brier"],
        columns,
        lambda column: False,
    )


def _rerank(quality: Quality) -> str:
    return _plain_rows(
        quality,
        "rerank",
        "Passages ranked by each method (ties count against it):",
        ["method", "MRR", "our lead", "nDCG@10", "our lead"],
        ["mrr", "mrr_lead", "ndcg@10", "ndcg@10_lead"],
        lambda column: column.endswith("_lead"),
    )


def _plain_rows(
    quality: Quality,
    rule: str,
    caption: str,
    head: Sequence[str],
    columns: Sequence[str],
    signed: Callable[[str], bool],
) -> str:
    rows = [
        [
            TITLES.get(method, method),
            *(cell(quality.find(method, rule, c), signed=signed(c)) for c in columns),
        ]
        for method in _methods(quality)
    ]
    return _table(caption, head, rows)


def _other(quality: Quality) -> str:
    rows = []
    for method in _methods(quality):
        for rule, words in (("other_threshold", "> {:g}"), ("other_equal", "level of {:.0%}")):
            for at in _settings(quality, rule):
                found = [quality.find(method, rule, m, at) for m in ("removed", "emptied")]
                label = f"{TITLES.get(method, method)}, {words.format(at)}"
                rows.append([label, *map(cell, found)])
    return _table(
        "Passages of another question (level: what removes that share of its own passages):",
        ["method", "removed", "passages emptied"],
        rows,
    )


def _calibration(quality: Quality) -> str:
    tables = []
    for method, bins in quality.calibration.items():
        rows = [
            [f"{low:.1f} to {high:.1f}", str(int(n)), f"{stated:.3f}", f"{observed:.3f}"]
            for low, high, n, stated, observed in zip(
                bins.edges, bins.edges[1:], bins.count, bins.stated, bins.observed, strict=False
            )
            if n
        ]
        head = ["stated probability", "sentences", "mean stated", "share that is evidence"]
        tables.append(_table(f"Calibration of {TITLES.get(method, method)}:", head, rows))
    return "\n\n".join(tables)
