"""Charts as inline SVG, without script; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]
_WIDTH, _HEIGHT = 480.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 24.0, 14.0, 46.0
_BESIDE = 5.0  # pixels between lines that share an x


@dataclass(frozen=True, slots=True)
class Series:
    """A named line; `slot` (0 to 5) picks its colour, `mark` is one point shown large.

    `spread` has for each point half the length of an interval around its y, NaN for none; then
    each point has a dot too. Where a chart has such intervals, its lines stand beside each other
    at an x that they share.
    """

    name: str
    points: Sequence[Point]
    slot: int
    mark: Point | None = None
    spread: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Level:
    """A y that lines are held against, drawn across the chart; `spread` as in `Series`."""

    name: str
    y: float
    spread: float = math.nan


def around(values: Iterable[float], limits: Point = (0.0, 1.0), *, least: float = 0.04) -> Point:
    """The range of the finite values and a little more, within `limits`.

    It is `least` wide where the limits allow, so that a trifle does not look like a cliff.
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=limits[0]), max(finite, default=limits[1])
    room = max(0.06 * (high - low), (least - (high - low)) / 2)
    return max(limits[0], low - room), min(limits[1], high + room)


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    label: str,
    x_range: tuple[float, float] = (0.0, 1.0),
    y_range: tuple[float, float] = (0.0, 1.0),
    percent_x: bool = True,
    percent_y: bool = True,
    level: Level | None = None,
) -> Markup:
    """Lines over a grid; `label` says in words what the chart shows."""
    frame = _Frame(x_range, y_range)
    x_name, y_name = (_percent if wanted else _number for wanted in (percent_x, percent_y))
    parts = [_open(label), _grid(frame, x_label, y_label, x_name, y_name)]
    if level is not None:
        parts.append(_level(frame, level))
    beside = _BESIDE if any(math.isfinite(half) for s in series for half in s.spread) else 0.0
    for number, line in enumerate(series):
        aside = beside * (number - (len(series) - 1) / 2)
        shown = [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
        path = " ".join(f"{frame.x(x) + aside:.1f},{frame.y(y):.1f}" for x, y in shown)
        parts.append(
            Markup('<polyline class="line s{}" points="{}"><title>{}</title></polyline>').format(
                line.slot, path, line.name
            )
        )
        if len(line.spread):
            parts.append(_intervals(frame, line, aside))
        if line.mark is not None and all(map(math.isfinite, line.mark)):
            parts.append(_dot(frame, line, line.mark, 5, aside, line.name))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _intervals(frame: _Frame, line: Series, aside: float) -> Markup:
    """A dot for each point, and a bar over its interval."""
    parts: list[Markup] = []
    for (x, y), half in zip(line.points, line.spread, strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        words = f"{line.name}: {y:.1%}"
        if math.isfinite(half):
            words += f" ± {half:.1%}"
            low, high = (frame.y(_within(end, frame.y_range)) for end in (y - half, y + half))
            parts.append(
                Markup('<path class="whisker s{}" d="M{:.1f},{:.1f}V{:.1f}"/>').format(
                    line.slot, frame.x(x) + aside, low, high
                )
            )
        parts.append(_dot(frame, line, (x, y), 3.5, aside, words))
    return Markup("").join(parts)


def _dot(
    frame: _Frame, line: Series, place: Point, radius: float, aside: float, words: str
) -> Markup:
    return Markup(
        '<circle class="dot s{}" r="{:g}" cx="{:.1f}" cy="{:.1f}"><title>{}</title></circle>'
    ).format(line.slot, radius, frame.x(place[0]) + aside, frame.y(place[1]), words)


def _level(frame: _Frame, level: Level) -> Markup:
    left, right = frame.x(frame.x_range[0]), frame.x(frame.x_range[1])
    y = frame.y(level.y)
    parts: list[Markup] = []
    if math.isfinite(level.spread):
        ends = (level.y + level.spread, level.y - level.spread)
        top, bottom = (frame.y(_within(end, frame.y_range)) for end in ends)
        parts.append(
            Markup(
                '<rect class="band" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
            ).format(left, top, right - left, bottom - top)
        )
    parts.append(
        Markup(
            '<line class="rule" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}">'
            "<title>{}</title></line>"
        ).format(left, right, y, y, level.name)
    )
    return Markup("").join(parts)


def histogram(
    edges: Sequence[float],
    kept: Sequence[int],
    dropped: Sequence[int],
    *,
    x_label: str,
    y_label: str,
    label: str,
    threshold: float | None = None,
    zero: bool = False,
) -> Markup:
    """Kept and dropped counts side by side in each bin, on a log scale from 1.

    `zero` draws a line at x = 0.
    """
    most = max([1, *kept, *dropped])
    top = math.ceil(math.log10(most + 1) * 10) / 10 or 1.0
    frame = _Frame((edges[0], edges[-1]), (0.0, top))
    parts = [_open(label)]
    ticks = [0.0, *[math.log10(10.0**power + 1) for power in range(int(top) + 1)]]
    names = ["0", *[f"{10**power:,}" for power in range(int(top) + 1)]]
    parts.append(_axes(frame, x_label, f"{y_label} (log scale)", _number, ticks, names))
    for left, right, yes, no in zip(edges[:-1], edges[1:], kept, dropped, strict=True):
        half = (frame.x(right) - frame.x(left)) / 2
        for index, (count, kind) in enumerate(((no, "dropped"), (yes, "kept"))):
            if not count:
                continue
            y = frame.y(math.log10(count + 1))
            parts.append(
                Markup(
                    '<rect class="bar {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
                    "<title>{} {}, score {:.3g} to {:.3g}</title></rect>"
                ).format(
                    kind,
                    frame.x(left) + index * half + 0.5,
                    y,
                    max(half - 1, 1.0),
                    frame.y(0.0) - y,
                    count,
                    kind,
                    left,
                    right,
                )
            )
    if zero:
        parts.append(_upright(frame, 0.0, "zero", ""))
    if threshold is not None:
        parts.append(_upright(frame, threshold, "rule", f"threshold {threshold:.3g}"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _upright(frame: _Frame, x: float, kind: str, words: str) -> Markup:
    """A line from top to bottom with words beside it; nothing where x is off the chart."""
    if not frame.x_range[0] <= x <= frame.x_range[1]:
        return Markup("")
    place, top, bottom = frame.x(x), *(frame.y(y) for y in reversed(frame.y_range))
    made = Markup('<line class="{0}" x1="{1:.1f}" x2="{1:.1f}" y1="{2:.1f}" y2="{3:.1f}"/>').format(
        kind, place, top, bottom
    )
    if not words:
        return made
    anchor, aside = ("end", -6) if place > 0.7 * _WIDTH else ("start", 6)
    return made + Markup(
        '<text class="tick over" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
    ).format(place + aside, top + 12, anchor, words)


def scatter(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    cross: Point | None = None,
) -> Markup:
    """Points, one colour a series; those beyond a range are drawn at its edge.

    `cross` draws a line through each axis at that point, which cuts the plane into quadrants.
    """
    frame = _Frame(x_range, y_range)
    parts = [_open(label), _grid(frame, x_label, y_label, _number, _number)]
    for cloud in series:
        places = [
            f"M{frame.x(_within(x, x_range)):.0f},{frame.y(_within(y, y_range)):.0f}h0"
            for x, y in cloud.points
        ]
        parts.append(
            Markup('<path class="cloud s{}" d="{}"><title>{}</title></path>').format(
                cloud.slot, "".join(places), cloud.name
            )
        )
    if cross is not None:
        x, y = frame.x(_within(cross[0], x_range)), frame.y(_within(cross[1], y_range))
        rule = Markup('<line class="rule" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
        parts.append(rule.format(x, x, frame.y(y_range[0]), frame.y(y_range[1])))
        parts.append(rule.format(frame.x(x_range[0]), frame.x(x_range[1]), y, y))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _within(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


@dataclass(frozen=True, slots=True)
class _Frame:
    """Data to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        share = (value - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = (value - low) / (high - low) if high > low else 0.5
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _open(label: str) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">'
    ).format(_WIDTH, _HEIGHT, label)


def _grid(
    frame: _Frame,
    x_label: str,
    y_label: str,
    x_name: Callable[[float], str],
    y_name: Callable[[float], str],
) -> Markup:
    ticks = _steps(*frame.y_range)
    return _axes(frame, x_label, y_label, x_name, ticks, [y_name(tick) for tick in ticks])


def _axes(
    frame: _Frame,
    x_label: str,
    y_label: str,
    x_name: Callable[[float], str],
    y_ticks: Sequence[float],
    y_names: Sequence[str],
) -> Markup:
    parts: list[Markup] = []
    left, right = frame.x(frame.x_range[0]), frame.x(frame.x_range[1])
    bottom, top = frame.y(frame.y_range[0]), frame.y(frame.y_range[1])
    for tick, name in zip(y_ticks, y_names, strict=True):
        y = frame.y(tick)
        parts.append(
            Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
                left, right, y, y
            )
        )
        parts.append(_text(left - 8, y + 4, "end", name))
    parts += [
        _text(frame.x(tick), bottom + 18, "middle", x_name(tick)) for tick in _steps(*frame.x_range)
    ]
    parts.append(_text((left + right) / 2, _HEIGHT - 8, "middle", x_label))
    parts.append(
        Markup(
            '<text class="tick" text-anchor="middle" transform="translate(14 {:.1f}) rotate(-90)">'
            "{}</text>"
        ).format((bottom + top) / 2, y_label)
    )
    return Markup("").join(parts)


def _text(x: float, y: float, anchor: str, words: str) -> Markup:
    return Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, escape(words)
    )


def _steps(low: float, high: float) -> list[float]:
    """Five or so round values that span [low, high]."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    size = 10.0 ** math.floor(math.log10(span / 4))
    size *= min((1, 2, 2.5, 5, 10), key=lambda m: abs(span / (size * m) - 4.5))
    first = math.ceil(low / size - 1e-9)
    last = math.floor(high / size + 1e-9)
    return [round(step * size, 10) for step in range(first, last + 1)]


def _percent(value: float) -> str:
    return f"{value * 100:g} %"


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e5 else f"{value:,.0f}"
