import math

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pipelines.student_figures import (
    FULL_LINE,
    Grid,
    Line,
    caution,
    comparisons,
    figure,
    fraction_of,
    percent,
    summary,
    summary_lines,
    verdict,
)

from .dataset_pages import grid_rows, student

CHOSEN_KD, RANDOM_KD = Line("chosen", True), Line("random", True)


def test_the_interval_is_students_t():
    found = figure([0.90, 0.92, 0.97])
    assert found.mean == pytest.approx(0.93)
    # t(0.975, 2) = 4.302653; the sum of squares is 0.0026, over n - 1 = 2.
    assert found.half == pytest.approx(4.302653 * math.sqrt(0.0026 / 2 / 3), rel=1e-5)
    assert str(found) == "0.930 ± 0.090"
    assert found.percent == "93.0 ± 9.0%"


def test_one_seed_has_no_interval_and_none_no_mean():
    one, none = figure([0.5]), figure([])
    assert (one.mean, one.n, str(one), one.percent) == (0.5, 1, "0.500", "50.0%")
    assert math.isnan(one.half)
    assert math.isnan(none.mean)
    assert none.n == 0


def test_differences_are_paired_by_seed():
    rows = [student(0.5, "chosen", True, seed, 0.8 + 0.1 * seed) for seed in (0, 1, 2)]
    rows += [student(0.5, "random", True, seed, 0.7 + 0.1 * seed) for seed in (2, 1, 3)]
    grid = Grid(rows)
    found = grid.difference(0.5, CHOSEN_KD, RANDOM_KD)
    assert found.n == 2, "only the seeds that both have"
    assert found.mean == pytest.approx(0.1)
    assert found.half == pytest.approx(0.0, abs=1e-9), "what the seeds share is gone"
    assert grid.difference(0.5, RANDOM_KD, CHOSEN_KD).mean == pytest.approx(-0.1)
    assert grid.difference(0.5, CHOSEN_KD, FULL_LINE).n == 0


def test_fractions_are_read_as_they_were_meant():
    stored = float(np.float32(0.1))
    assert stored != 0.1
    grid = Grid([student(stored, "random", False, 0, 0.5), student(1.0, "full", False, 0, 0.9)])
    assert grid.fractions == [fraction_of(stored)] == [0.1]
    assert grid.accuracy(0.1, Line("random", False)).mean == 0.5
    assert [percent(f) for f in (stored, 0.005, 1 / 3)] == ["10%", "0.5%", "33.33%"]
    assert grid.full().mean == 0.9
    assert grid.accuracy(0.1, FULL_LINE).mean == 0.9, "full data whatever the fraction"


def test_two_students_of_one_seed_are_refused():
    with pytest.raises(InputError, match=r"chosen \+ distilled at 50% with seed 3"):
        Grid([student(0.5, "chosen", True, 3, 0.5), student(0.5, "chosen", True, 3, 0.6)])


def test_the_best_line():
    grid = Grid(grid_rows())
    assert grid.best(0.25)[0] == CHOSEN_KD
    assert grid.best(0.9) is None


def test_what_differs_is_said_and_what_cannot_be_told_is_too():
    said = [comparison.sentence() for comparison in comparisons(Grid(grid_rows()))]
    assert said[0] == (
        "Chosen against random rows, both distilled: higher at 25%; no difference that the seeds"
        " can tell at 50%."
    )
    assert said[2] == "Distilled against labels alone, random rows: higher at 25%, 50%."
    assert said[4].endswith("labels alone: lower at 25%, 50%.")
    assert len(said) == 6
    for line in [comparison.sentence() for comparison in comparisons(Grid(grid_rows(seeds=2)))]:
        assert line.endswith(": too few seeds to tell at 25%, 50%.")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.01, 0.02, 0.03], "no difference that the seeds can tell at"),  # 0.02 ± 0.025
        ([-0.01, -0.02, -0.03], "no difference that the seeds can tell at"),
        ([0.02, 0.025, 0.03], "higher at"),  # 0.025 ± 0.012
        ([-0.02, -0.025, -0.03], "lower at"),
        ([0.5, 0.5], "too few seeds to tell at"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(values, said):
    assert verdict(figure(values)) == said


def test_comparisons_without_partners_are_left_out():
    rows = [row for row in grid_rows() if row["selection"] == "random"]
    names = [comparison.name for comparison in comparisons(Grid(rows))]
    assert names == ["Distilled against labels alone, random rows"]
    assert comparisons(Grid([])) == []


def test_the_caution_names_what_the_test_rows_allow():
    grid = Grid([student(1.0, "full", False, 0, 0.9)])
    # 1.96 * sqrt(0.9 * 0.1 / 400) = 0.0294
    assert "400 test rows" in caution(grid, 400)
    assert "an accuracy of 90.0% by about ± 2.9 points" in caution(grid, 400)
    assert "test rows:" not in caution(Grid([]), 400)


def test_a_summary_in_rows_and_in_words():
    rows = summary(Grid(grid_rows(fractions=(0.5,))))
    assert [(r["fraction"], r["selection"], r["distilled"]) for r in rows] == [
        (0.5, "random", False),
        (0.5, "random", True),
        (0.5, "chosen", False),
        (0.5, "chosen", True),
        (1.0, "full", False),
    ]
    assert rows[0]["accuracy"] == pytest.approx(0.76)
    assert rows[0]["interval"] == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-4)
    (line,) = summary_lines(rows)
    assert line == (
        "50% chosen + distilled 0.811 ± 0.037, random + distilled 0.811 ± 0.027, full 0.910 ± 0.025"
    )


def test_a_summary_of_one_seed_without_distillation():
    rows = summary(Grid([student(0.1, "random", False, 0, 0.5)]))
    assert rows[0]["interval"] is None
    assert summary_lines(rows) == ["10% random 0.500"]
    assert summary_lines(summary(Grid([student(1.0, "full", False, 0, 0.5)]))) == []
