"""What the page of a compressed model shows, from the tables' columns alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .. import svg
from ..report import Chart
from .verify_tables import COMPRESSED_MODEL, CONTROL, DENSE

Row = Mapping[str, Any]
_PARTS = ("attention", "feed-forward", "experts", "layer")
_TEXT = 400  # characters of a dropped example
_LABELS = {DENSE: "dense", COMPRESSED_MODEL: "compressed", CONTROL: "random, same budget"}


# -- the head ------------------------------------------------------------------------------------


def cards(rows: Mapping[str, Row], packed: int) -> list[dict[str, str]]:
    """Size, perplexity, control, divergence, speed, memory and verdict."""
    dense, model = rows[DENSE], rows[COMPRESSED_MODEL]
    made = [
        _card(
            "Verdict",
            model["verdict"],
            f"{model['ratio'] - 1:+.1%} perplexity, noise floor {model['noise']:.1%}",
        ),
        _card(
            "Size on disk",
            f"{size(dense['file_bytes'])} → {size(model['file_bytes'])}",
            f"{_change(dense['file_bytes'], model['file_bytes'])}; {packed} matrices packed",
        ),
        _card(
            "Perplexity",
            f"{dense['perplexity']:.3f} → {model['perplexity']:.3f}",
            f"over {model['tokens']:,} held-out tokens, lower is better",
        ),
    ]
    control = rows.get(CONTROL)
    if control is None:
        made.append(_card("Control", "none", "the run says `control: none`"))
    else:
        made.append(
            _card(
                "Random, same budget",
                f"{control['perplexity']:.3f}",
                f"perplexity, {control['ratio']:.2f} times the dense model's",
            )
        )
    made.append(
        _card(
            "KL to the dense model",
            f"{model['kl']:.3g}",
            f"nats a token; the same first choice {model['agreement']:.1%} of the time",
        )
    )
    return made + _speed_cards(dense, model)


def _speed_cards(dense: Row, model: Row) -> list[dict[str, str]]:
    if model["prefill"] is None or dense["prefill"] is None:
        return []
    made = [
        _card(
            "Tokens a second",
            f"{dense['prefill']:,.0f} → {model['prefill']:,.0f}",
            "reading a prompt, in a fresh process",
        )
    ]
    if model["decode"] is not None and dense["decode"] is not None:
        made.append(
            _card(
                "Decoding",
                f"{dense['decode']:,.0f} → {model['decode']:,.0f}",
                "tokens a second, one row, with a cache",
            )
        )
    made.append(
        _card(
            "Peak memory",
            f"{size(_own(dense))} → {size(_own(model))}",
            f"beyond the libraries' {size(model['base_memory'])}",
        )
    )
    return made


def _own(row: Row) -> int:
    return max(0, int(row["peak_memory"]) - int(row["base_memory"]))


def _card(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else "nothing before"


# -- tables --------------------------------------------------------------------------------------


def model_names(rows: Mapping[str, Row]) -> list[dict[str, str]]:
    """The models that stand side by side, dense first."""
    return [{"name": _LABELS[role], "model": row["model"]} for role, row in rows.items()]


def measure_rows(rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """A line a measure with a cell for each model; what was not measured has none."""
    measures: list[tuple[str, str, Callable[[Row], str]]] = [
        ("Perplexity", "perplexity", lambda row: f"{row['perplexity']:.4f}"),
        ("Perplexity to the dense model's", "ratio", lambda row: f"{row['ratio']:.4f}"),
        (
            "95 % interval of it",
            "ratio_low",
            lambda row: f"{row['ratio_low']:.4f} to {row['ratio_high']:.4f}",
        ),
        ("KL from the dense model, nats a token", "kl", lambda row: f"{row['kl']:.4g}"),
        ("Same first choice", "agreement", lambda row: f"{row['agreement']:.1%}"),
        ("Parameters", "parameters", lambda row: f"{row['parameters']:,}"),
        ("Of the layers' weights, zeros", "zero_share", lambda row: f"{row['zero_share']:.1%}"),
        ("Files", "file_bytes", lambda row: size(row["file_bytes"])),
        ("Prefill, tokens a second", "prefill", lambda row: f"{row['prefill']:,.0f}"),
        ("Decoding, tokens a second", "decode", lambda row: f"{row['decode']:,.0f}"),
        ("Peak memory beyond the libraries'", "peak_memory", lambda row: size(_own(row))),
    ]
    return [
        {
            "name": name,
            "cells": ["" if row[key] is None else words(row) for row in rows.values()],
        }
        for name, key, words in measures
        if any(row[key] is not None for row in rows.values())
    ]


def task_rows(rows: Mapping[str, Row]) -> list[dict[str, str]]:
    """A line a task of the harness: dense and compressed side by side."""
    before = {task["task"]: task for task in rows[DENSE]["tasks"]}
    return [
        {
            "name": task["task"],
            "metric": task["metric"],
            "dense": _scored(before[task["task"]]),
            "compressed": _scored(task),
        }
        for task in rows[COMPRESSED_MODEL]["tasks"]
        if task["task"] in before
    ]


def _scored(task: Row) -> str:
    error = task["stderr"]
    return f"{task['value']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def size_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """A line a part of the model, from the report of packing."""
    before, after = report["before"], report["after"]
    return [
        {
            "name": part,
            "parameters": f"{before['parts'][part]['parameters']:,}",
            "parameters_after": f"{own['parameters']:,}",
            "zeros": f"{own['zeros'] / own['weights']:.1%}" if own["weights"] else "",
            "bytes": size(before["parts"][part]["bytes"]),
            "bytes_after": size(own["bytes"]),
            "change": _change(before["parts"][part]["bytes"], own["bytes"]),
        }
        for part, own in after["parts"].items()
    ]


def plan_rows(rows: Iterable[Row]) -> list[dict[str, str]]:
    """A line a kind of part and grid: what the plan asked of all layers together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        pattern = f"{row['n']}:{row['m']}" if row.get("n") else ""
        key = (part_of(row["module"], row["unit"]), row["unit"], pattern, row["bits"])
        groups.setdefault((*key, row["group_size"]), []).append(row)
    return [
        {
            "part": part,
            "unit": unit,
            "count": f"{len(found):,}",
            "kept": _of(found, "keep"),
            "pattern": pattern,
            "bits": "" if bits is None else str(bits),
            "group": "" if bits is None else ("a row" if not group else str(group)),
        }
        for (part, unit, pattern, bits, group), found in groups.items()
    ]


def _of(rows: Sequence[Row], name: str) -> str:
    whole, kept = (sum(int(row[key]) for row in rows) for key in ("total", name))
    return f"{kept:,} of {whole:,}" + (f" ({kept / whole:.1%})" if whole else "")


def part_of(module: str, unit: str) -> str:
    """The half of a block that a row is about."""
    if unit == "layer":
        return "layer"
    if unit == "expert" or "experts" in module:
        return "experts"
    attention = unit == "head" or "attn" in module or "attention" in module
    # BERT's feed-forward output has a path of its own beside attention.output.
    return "attention" if attention else "feed-forward"


# -- charts --------------------------------------------------------------------------------------


def charts(rows: Mapping[str, Row], compressed: Sequence[Row]) -> list[Chart]:
    """Kept share and error by layer, and each evaluation row's loss before and after."""
    found = [_kept_chart(compressed), _error_chart(compressed), _row_chart(rows)]
    return [chart for chart in found if chart is not None]


def _by_layer(rows: Sequence[Row]) -> dict[str, dict[int, list[Row]]]:
    made: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        part = part_of(row["module"], row["unit"])
        made.setdefault(part, {}).setdefault(int(row["layer"]), []).append(row)
    return {part: made[part] for part in _PARTS if part in made}


def _kept_chart(rows: Sequence[Row]) -> Chart | None:
    series = []
    for slot, (part, layers) in enumerate(_by_layer(rows).items()):
        points = []
        for layer, found in sorted(layers.items()):
            total = sum(int(row["total"]) for row in found)
            kept = sum(int(row["kept"]) for row in found)
            points.append((float(layer), kept / total if total else math.nan))
        series.append(svg.Series(part, points, slot))
    if not series:
        return None
    return Chart(
        "What each layer kept",
        svg.line_chart(
            series,
            x_label="layer",
            y_label="share kept",
            label="Share of weights, heads, neurons or experts that each layer kept",
            x_range=_layers(rows),
            percent_x=False,
        ),
        _legend(series),
        "Of the units that the plan is about: weights, heads, neurons, experts or layers.",
    )


def _error_chart(rows: Sequence[Row]) -> Chart | None:
    told = [row for row in rows if row["error"] is not None and math.isfinite(row["error"])]
    series = []
    for part, layers in _by_layer(told).items():
        points = [
            (float(layer), sum(row["error"] for row in found) / len(found))
            for layer, found in sorted(layers.items())
        ]
        series.append(svg.Series(part, points, _PARTS.index(part)))
    if not series:
        return None
    top = max(y for line in series for _, y in line.points) or 1.0
    return Chart(
        "Error of each layer's outputs",
        svg.line_chart(
            series,
            x_label="layer",
            y_label="relative error",
            label="Relative error of each layer's outputs over the calibration rows",
            x_range=_layers(rows),
            y_range=(0.0, 1.05 * top),
            percent_x=False,
        ),
        _legend(series),
        "Norm of the change over the norm of the outputs, on calibration rows; the mean over a"
        " layer's matrices.",
    )


def _layers(rows: Sequence[Row]) -> tuple[float, float]:
    last = float(max((int(row["layer"]) for row in rows), default=1))
    return 0.0, last or 1.0


def _row_chart(rows: Mapping[str, Row]) -> Chart:
    dense = _row_losses(rows[DENSE])
    series = []
    for slot, role in enumerate((COMPRESSED_MODEL, CONTROL)):
        if role in rows:
            own = _row_losses(rows[role])
            points = [(x, y) for x, y in zip(dense, own, strict=True) if math.isfinite(x)]
            series.append(svg.Series(_LABELS[role], points, slot))
    x_range = svg.around(dense, (0.0, math.inf), least=0.1)
    y_range = svg.around([y for line in series for _, y in line.points], (0.0, math.inf), least=0.1)
    both = (min(x_range[0], y_range[0]), max(x_range[1], y_range[1]))
    return Chart(
        "Each evaluation row",
        svg.scatter(
            series,
            x_label="dense: nats a token",
            y_label="after: nats a token",
            label="Loss of each evaluation row before and after compression",
            x_range=both,
            y_range=both,
        ),
        [{"cls": f"cloud s{line.slot}", "name": line.name} for line in series],
        "Both axes have one scale: on the diagonal nothing was lost.",
    )


def _row_losses(row: Row) -> list[float]:
    return [
        nll / tokens if tokens else math.nan
        for nll, tokens in zip(row["row_nll"], row["row_tokens"], strict=True)
    ]


def _legend(series: Sequence[svg.Series]) -> list[dict[str, str]]:
    return [{"cls": f"s{line.slot}", "name": line.name} for line in series]


# -- where the data came from --------------------------------------------------------------------


def calibration(table: pa.Table, notes: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The calibration rows: how they were chosen, and what they are made from."""
    lengths = [len(ids) for ids in table.column("input_ids").to_pylist()]
    sources = {one for row in table.column("sources").to_pylist() for one in row}
    domains = Counter(table.column("domain").to_pylist())
    settings = {
        name: value
        for name, value in notes.items()
        if name not in ("source", "seed") and value is not None
    }
    return {
        "rows": f"{len(lengths):,}",
        "tokens": f"{sum(lengths):,}",
        "sources": f"{len(sources):,}",
        "source": notes.get("source", "a table that it does not name"),
        "seed": str(seed),
        "settings": ", ".join(f"{name}={value}" for name, value in settings.items()),
        "domains": [
            {"name": name or "not named", "rows": f"{count:,}"}
            for name, count in domains.most_common(20)
        ],
    }


def fate(title: str, decision: pa.Table, used: set[int]) -> dict[str, Any]:
    """What a decision kept and dropped, and how much of what it kept was calibrated on.

    `used` holds the ids of the rows that the calibration rows are made from.
    """
    keep = np.asarray(decision.column("keep").to_pylist(), bool)
    ids = decision.column("id").to_pylist()
    reasons = Counter(
        reason
        for reason, kept in zip(decision.column("reason").to_pylist(), keep, strict=True)
        if not kept
    )
    dropped = {id_ for id_, kept in zip(ids, keep, strict=True) if not kept}
    return {
        "title": title,
        "whole": f"{len(ids):,}",
        "kept": f"{int(keep.sum()):,}",
        "dropped": f"{len(dropped):,}",
        "used": f"{len(used & set(ids)):,}",
        "leaked": f"{len(used & dropped):,}" if used & dropped else "",
        "reasons": [{"name": name, "rows": f"{count:,}"} for name, count in reasons.most_common()],
    }


def dropped_ids(decision: pa.Table, count: int) -> list[int]:
    """Ids of the first dropped rows of each reason in turn, so that every reason is shown."""
    by_reason: dict[str, list[int]] = {}
    columns = (decision.column(name).to_pylist() for name in ("id", "keep", "reason"))
    for id_, keep, reason in zip(*columns, strict=True):
        if not keep:
            by_reason.setdefault(reason, []).append(id_)
    turns = [sorted(ids) for _, ids in sorted(by_reason.items())]
    order = [ids[turn] for turn in range(count) for ids in turns if turn < len(ids)]
    return order[:count]


def shortened(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= _TEXT else text[:_TEXT] + " …"
