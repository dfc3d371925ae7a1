"""Charts as SVG: where points, bars and levels come to stand."""

import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunery.pipelines import svg

WORDS = {"x_label": "x", "y_label": "y", "label": "l"}


def whiskers(shown):
    found = re.findall(r'class="whisker s(\d)" d="M([\d.]+),([\d.]+)V([\d.]+)"', shown)
    return [(int(slot), *map(float, place)) for slot, *place in found]


def dots(shown):
    found = re.findall(r'class="dot s(\d)" r="([\d.]+)" cx="([\d.]+)" cy="([\d.]+)"', shown)
    return [(int(slot), *map(float, place)) for slot, *place in found]


def test_an_interval_is_as_long_as_its_spread():
    line = svg.Series("a", [(0.5, 0.6), (1.0, 0.5)], 0, spread=[0.1, 0.2])
    shown = str(svg.line_chart([line], **WORDS))
    (_, x, low, high), (_, _, low_2, high_2) = whiskers(shown)
    (_, _, cx, cy), (_, _, _, cy_2) = dots(shown)
    assert x == cx
    assert cy == pytest.approx((low + high) / 2, abs=0.06)
    assert low > high, "the lower end stands lower on the page"
    assert (low_2 - high_2) / (low - high) == pytest.approx(2, abs=0.01)
    assert cy_2 > cy, "0.5 stands below 0.6"
    assert "a: 60.0% ± 10.0%" in shown


def test_lines_with_intervals_stand_side_by_side():
    lines = [svg.Series(str(i), [(0.5, 0.5)], i, spread=[0.1]) for i in range(3)]
    places = [x for _, x, _, _ in whiskers(str(svg.line_chart(lines, **WORDS)))]
    assert places[1] - places[0] == places[2] - places[1] > 0
    alone = str(svg.line_chart(lines[:1], **WORDS))
    assert whiskers(alone)[0][1] == places[1], "the middle stands at its x"


def test_without_an_interval_there_is_a_dot_alone_at_its_x():
    lines = [
        svg.Series(str(i), [(0.5, 0.5), (1.0, math.nan)], i, spread=[math.nan] * 2) for i in (0, 1)
    ]
    shown = str(svg.line_chart(lines, **WORDS))
    assert whiskers(shown) == []
    (first, second) = dots(shown)
    assert first[2:] == second[2:]


def test_an_interval_ends_where_the_chart_does():
    line = svg.Series("a", [(0.5, 0.9)], 0, spread=[5.0])
    ((_, _, low, high),) = whiskers(str(svg.line_chart([line], **WORDS)))
    assert 0 < high < low < 300


def test_a_level_is_drawn_across_with_its_interval():
    level = svg.Level("full <b>", 0.5, 0.25)
    shown = str(svg.line_chart([], **WORDS, level=level))
    assert "<title>full &lt;b&gt;</title>" in shown
    band = re.search(
        r'class="band" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', shown
    )
    top, height = map(float, band.groups())
    (y,) = map(float, re.findall(r'class="rule" x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)"', shown))
    assert y == pytest.approx(top + height / 2, abs=0.06)
    assert 'class="band"' not in str(svg.line_chart([], **WORDS, level=svg.Level("f", 0.5)))


def test_around():
    assert svg.around([0.5, 0.6]) == pytest.approx((0.494, 0.606))
    assert svg.around([0.2, 1.0]) == pytest.approx((0.152, 1.0))
    assert svg.around([0.7, 0.7, math.nan]) == pytest.approx((0.68, 0.72))
    assert svg.around([0.7, 0.71]) == pytest.approx((0.685, 0.725)), "a trifle looks like one"
    assert svg.around([0.999]) == pytest.approx((0.979, 1.0))
    assert svg.around([]) == (0.0, 1.0)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1),
            st.one_of(st.floats(0, 1), st.just(math.nan)),
            st.one_of(st.floats(0, 2), st.just(math.nan)),
        ),
        max_size=6,
    )
)
def test_whatever_is_drawn_stays_on_the_page(rows):
    line = svg.Series(
        "a", [(x, y) for x, y, _ in rows], 0, (0.5, 0.5), spread=[half for *_, half in rows]
    )
    level = svg.Level("l", 0.5, 0.1)
    shown = str(svg.line_chart([line], **WORDS, y_range=(0.0, 1.0), level=level))
    HTMLParser().feed(shown)
    assert "nan" not in shown
    assert "inf" not in shown
    for _, x, low, high in whiskers(shown):
        assert 0 <= x <= 480 and 0 <= high <= low <= 300
    drawn = [y for _, y, _ in rows if math.isfinite(y)]
    assert len(dots(shown)) == len(drawn) + 1


def test_a_line_chart_of_plain_numbers():
    line = svg.Series("a", [(0.0, -0.5), (200_000.0, -0.25)], 0)
    shown = str(
        svg.line_chart(
            [line],
            **WORDS,
            x_range=(0.0, 200_000.0),
            y_range=(-0.5, -0.25),
            percent_x=False,
            percent_y=False,
        )
    )
    assert ">-0.25</text>" in shown
    assert ">200,000</text>" in shown
    assert "%" not in shown


def test_a_histogram_has_a_line_at_zero_where_zero_is_on_it():
    def chart(low, high, **more):
        return str(svg.histogram([low, 0.5, high], [1, 0], [0, 1], **WORDS, **more))

    shown = chart(-0.5, 1.0, zero=True)
    (x,) = re.findall(r'class="zero" x1="([\d.]+)"', shown)
    assert float(x) == pytest.approx(70 + (480 - 70 - 24) / 3, abs=0.06)
    assert 'class="zero"' not in chart(0.25, 1.0, zero=True)
    assert 'class="zero"' not in chart(-0.5, 1.0)
