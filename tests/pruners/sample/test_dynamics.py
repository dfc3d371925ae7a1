"""Golden cases of the methods over training dynamics, worked by hand."""

import math

import numpy as np
import pytest
from scipy.stats import beta

from prunery.errors import InputError
from prunery.pruners import rules
from prunery.pruners.catalogue import METHODS
from prunery.pruners.contract import Signals
from prunery.pruners.sample.aum import Aum
from prunery.pruners.sample.dual import Dual, log_weight
from prunery.pruners.sample.dyn_unc import DynUnc
from prunery.pruners.sample.el2n import El2n
from prunery.pruners.sample.forgetting import Forgetting
from prunery.pruners.sample.grand import Grand
from prunery.pruners.sample.influence import Influence
from prunery.pruners.sample.knn_shapley import KnnShapley
from prunery.pruners.sample.memorisation import Memorisation
from prunery.pruners.sample.stratified_random import StratifiedRandom
from prunery.pruners.sample.tdds import Tdds


def rows(**columns):
    size = len(next(iter(columns.values())))
    return Signals({"id": np.arange(size), **columns})


class TestStratifiedRandom:
    LABELS = rows(label=[7] * 10 + [2] * 3 + [5])

    def test_golden(self):
        # ceil of 0.3 * 10, 3 and 1: the rows of the highest draws of each class.
        selection = StratifiedRandom(keep=0.3)(self.LABELS, seed=4)
        drawn = rules.uniform(4, self.LABELS["id"])
        expected = np.zeros(14, bool)
        expected[np.argsort(-drawn[:10])[:3]] = True
        expected[10 + np.argmax(drawn[10:13])] = True
        expected[13] = True
        assert selection.keep.tolist() == expected.tolist()
        assert selection.reason_names()[13] == "drawn"

    def test_one_class_alone_is_a_plain_draw(self):
        signals = rows(label=[1] * 20)
        stratified = StratifiedRandom(keep=0.25)(signals, seed=8)
        plain = METHODS["random"](keep=0.25)(signals, seed=8)
        assert stratified.keep.tolist() == plain.keep.tolist()


@pytest.mark.parametrize(("method", "signal"), [(El2n, "el2n"), (Grand, "gradient_norm")])
class TestEpochMeans:
    # Two runs of three epochs.
    VALUES = np.array(
        [[0.1, 0.2, 0.9, 0.3, 0.4, 0.9], [0.6, 0.1, 0.0, 0.2, 0.1, 0.0], [0.4, 0.4, 0.4] * 2],
        np.float32,
    )

    def test_golden(self, method, signal):
        # Means 2.8 / 6, 1.0 / 6, 2.4 / 6.
        selection = method(keep=0.4, runs=2)(rows(**{signal: self.VALUES}), seed=0)
        np.testing.assert_allclose(selection.score, [0.466667, 0.166667, 0.4], rtol=1e-5)
        assert selection.keep.tolist() == [True, False, True]
        assert selection.threshold.tolist() == [selection.score[2]] * 3

    def test_epochs_are_counted_inside_each_run(self, method, signal):
        signals = rows(**{signal: self.VALUES})
        middle = method(runs=2, first_epoch=1, last_epoch=1)(signals, seed=0).score
        np.testing.assert_allclose(middle, [0.3, 0.1, 0.4], rtol=1e-6)
        late = method(runs=2, first_epoch=1)(signals, seed=0).score
        np.testing.assert_allclose(late, [0.6, 0.05, 0.4], rtol=1e-6)
        one_run = method(first_epoch=3, last_epoch=3)(signals, seed=0).score
        np.testing.assert_allclose(one_run, [0.3, 0.2, 0.4], rtol=1e-6)

    def test_sum_is_over_epochs_and_the_mean_over_runs(self, method, signal):
        summed = method(runs=2, last_epoch=1, reduce="sum")(rows(**{signal: self.VALUES}), seed=0)
        np.testing.assert_allclose(summed.score, [0.5, 0.5, 0.8], rtol=1e-6)
        late = method(runs=2, first_epoch=1, reduce="sum")(rows(**{signal: self.VALUES}), seed=0)
        np.testing.assert_allclose(late.score, [1.2, 0.1, 0.8], rtol=1e-6)

    def test_epochs_that_the_runs_do_not_have(self, method, signal):
        signals = rows(**{signal: self.VALUES})
        with pytest.raises(InputError, match=rf"epochs 0 to 3 of `{signal}`.*found 3 epochs"):
            method(runs=2, last_epoch=3)(signals, seed=0)
        with pytest.raises(InputError, match=rf"epochs 3 to the last of `{signal}`"):
            method(runs=2, first_epoch=3)(signals, seed=0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"first_epoch": -1}, "`first_epoch` must be at least 0"),
            ({"first_epoch": 2, "last_epoch": 1}, "`last_epoch` must be at least 2"),
            ({"reduce": "max"}, "`reduce` must be one of mean, sum"),
            ({"runs": 0}, "`runs` must be at least 1"),
        ],
    )
    def test_options_out_of_range(self, method, signal, options, message):
        with pytest.raises(InputError, match=message):
            method(**options)


class TestForgetting:
    CORRECT = np.array([[1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], bool)

    def test_golden(self):
        # Forgotten 2, 0 and 1 times; the third was never learned and counts as 4.
        selection = Forgetting(keep=0.5)(rows(correct=self.CORRECT), seed=0)
        assert selection.score.tolist() == [2.0, 0.0, 4.0, 1.0]
        assert selection.keep.tolist() == [True, False, True, False]
        easy = Forgetting(keep=0.5, order="easy")(rows(correct=self.CORRECT), seed=0)
        assert easy.keep.tolist() == [False, True, False, True]

    def test_the_end_of_a_run_is_no_transition(self):
        # As two runs of two: right then wrong twice; from run 0 to run 1 nothing is forgotten.
        signals = rows(correct=self.CORRECT)
        assert Forgetting(runs=2)(signals, seed=0).score.tolist() == [1.0, 0.0, 2.0, 0.0]


class TestAum:
    # Means 2.0, 1.5, -3.0 and 30.0; after the last epoch alone the second leads the first, and
    # as probabilities the last would hardly differ from the first.
    MARGIN = np.array([[4.0, 0.0], [1.0, 2.0], [-5.0, -1.0], [30.0, 30.0]], np.float32)

    def test_golden(self):
        selection = Aum(keep=0.5)(rows(margin=self.MARGIN), seed=0)
        assert selection.score.tolist() == [2.0, 1.5, -3.0, 30.0]
        assert selection.keep.tolist() == [True, False, False, True]
        assert selection.reason_names() == ["easy", "hard", "hard", "easy"]

    def test_hard(self):
        selection = Aum(keep=0.5, order="hard")(rows(margin=self.MARGIN), seed=0)
        assert selection.keep.tolist() == [False, True, True, False]

    def test_a_bad_run_is_a_half(self):
        assert Aum(runs=2)(rows(margin=self.MARGIN), seed=0).score.tolist()[0] == 2.0


def test_memorisation_golden():
    signals = rows(memorisation=[0.2, -0.1, 0.9, 0.9])
    assert Memorisation(keep=0.25)(signals, seed=0).keep.tolist() == [False, False, True, False]
    easy = Memorisation(keep=0.25, order="easy")(signals, seed=0)
    assert easy.keep.tolist() == [False, True, False, False]


def test_knn_shapley_golden():
    selection = KnnShapley(keep=0.5)(rows(shapley=[0.1, -0.4, 0.3, 0.0]), seed=0)
    assert selection.keep.tolist() == [True, False, True, False]
    np.testing.assert_allclose(selection.score, [0.1, -0.4, 0.3, 0.0], rtol=1e-6)


class TestDynUnc:
    # Windows of two: deviations 0.1 and 0.2; 0 and 0; 0.4 and 0.4; 0.05 and 0.05.
    P = np.array([[0.2, 0.4, 0.8], [0.9, 0.9, 0.9], [0.1, 0.9, 0.1], [0.0, 0.1, 0.2]], np.float32)

    def test_golden(self):
        selection = DynUnc(keep=0.5, window=2)(rows(true_probability=self.P), seed=0)
        np.testing.assert_allclose(selection.score, [0.15, 0.0, 0.4, 0.05], atol=1e-7)
        assert selection.keep.tolist() == [True, False, True, False]

    def test_a_run_shorter_than_the_window_is_one_window(self):
        short = DynUnc(window=10)(rows(true_probability=self.P), seed=0).score
        np.testing.assert_allclose(short, self.P.std(axis=1), atol=1e-7)

    def test_the_default_window_is_of_ten_epochs(self):
        line = np.random.default_rng(0).random((1, 11), np.float32)
        expected = (line[0, :10].std() + line[0, 1:].std()) / 2
        score = DynUnc()(rows(true_probability=line), seed=0).score
        np.testing.assert_allclose(score, [expected], rtol=1e-5)

    def test_windows_stay_inside_a_run(self):
        # Two runs, each constant: only a window across their border would see a change.
        steps = np.array([[0.1] * 3 + [0.9] * 3], np.float32)
        score = DynUnc(window=2, runs=2)(rows(true_probability=steps), seed=0).score
        np.testing.assert_allclose(score, [0.0], atol=1e-7)

    @pytest.mark.parametrize(("keep", "kept"), [(0.0, 0), (0.01, 1), (0.24, 1), (0.26, 2)])
    def test_a_small_fraction_is_not_all_rows(self, keep, kept):
        assert DynUnc(keep=keep, window=2)(rows(true_probability=self.P), seed=0).kept == kept


class TestTdds:
    # Windows of two changes: deviations (-1, 1) and (-2, 2); then (3, -3) and (0, 0).
    CHANGES = np.array([[1.0, 3.0, 7.0], [8.0, 2.0, 2.0]], np.float32)

    def test_golden(self):
        selection = Tdds(keep=0.5, window=3)(rows(probability_change=self.CHANGES), seed=0)
        expected = [0.9 * math.sqrt(8) + 0.09 * math.sqrt(2), 0.09 * math.sqrt(18)]
        np.testing.assert_allclose(selection.score, expected, rtol=1e-6)
        assert selection.keep.tolist() == [True, False]

    def test_decay(self):
        score = Tdds(window=3, decay=0.4)(rows(probability_change=self.CHANGES), seed=0).score
        expected = [0.4 * math.sqrt(8) + 0.24 * math.sqrt(2), 0.24 * math.sqrt(18)]
        np.testing.assert_allclose(score, expected, rtol=1e-6)

    def test_first_epochs(self):
        # Three epochs are two changes: the first window alone.
        score = Tdds(window=3, epochs=3)(rows(probability_change=self.CHANGES), seed=0).score
        np.testing.assert_allclose(score, [0.9 * math.sqrt(2), 0.9 * math.sqrt(18)], rtol=1e-6)

    def test_runs_are_averaged(self):
        both = np.concatenate([self.CHANGES[:1], self.CHANGES[1:]], axis=1)
        alone = Tdds(window=3)(rows(probability_change=self.CHANGES), seed=0).score
        score = Tdds(window=3, runs=2)(rows(probability_change=both), seed=0).score
        np.testing.assert_allclose(score, [alone.mean()], rtol=1e-6)

    def test_the_default_window_is_of_nine_changes(self):
        changes = np.random.default_rng(0).random((4, 12))
        expected = np.zeros(4)
        for k in range(4):
            part = changes[:, k : k + 9].astype(np.float32).astype(np.float64)
            away = part - part.mean(axis=1, keepdims=True)
            expected += 0.9 * 0.1 ** (3 - k) * np.sqrt((away**2).sum(axis=1))
        score = Tdds()(rows(probability_change=changes), seed=0).score
        np.testing.assert_allclose(score, expected, rtol=1e-5)


class TestDual:
    P = TestDynUnc.P

    def test_golden(self):
        # Window means 0.3, 0.6; 0.9, 0.9; 0.5, 0.5; 0.05, 0.15.
        selection = Dual(keep=0.5, window=2, sampling="none")(rows(true_probability=self.P), seed=0)
        expected = [(0.1 * 0.7 + 0.2 * 0.4) / 2, 0.0, 0.2, (0.05 * 0.95 + 0.05 * 0.85) / 2]
        np.testing.assert_allclose(selection.score, expected, atol=1e-7)
        assert selection.keep.tolist() == [True, False, True, False]

    def test_hard_rows_lead_easy_ones_of_the_same_deviation(self):
        signals = rows(true_probability=np.array([[0.7, 0.9], [0.1, 0.3]]))
        assert Dual(keep=0.5, sampling="none")(signals, seed=0).keep.tolist() == [False, True]

    def test_later_epochs_are_not_looked_at(self):
        early = np.random.default_rng(0).random((6, 30))
        late = np.concatenate([early, np.random.default_rng(1).random((6, 20))], axis=1)
        for sampling in ("none", "beta"):
            dual = Dual(sampling=sampling)
            expected = dual(rows(true_probability=early), seed=0).score
            assert dual(rows(true_probability=late), seed=0).score.tolist() == expected.tolist()

    def test_weight_is_the_score_times_a_beta_density(self):
        # Twelve rows; the ten of highest score have mean probability 0.4.
        dual = np.array([0.1] * 10 + [0.02, 0.05], np.float32)
        p = np.array([0.4] * 8 + [0.3, 0.5, 0.99, 0.7])
        b = 15 * (1 - 0.4) * (1 - 0.8**4)
        expected = beta.logpdf(p, 16 - b, b) + np.log(dual.astype(np.float64))
        weight = log_weight(dual, p, np.arange(12), 0.8, 4.0)
        np.testing.assert_allclose(np.diff(weight), np.diff(expected), atol=1e-9)

    def test_keys_are_a_draw_by_weight(self):
        signals = rows(true_probability=np.random.default_rng(2).random((20, 12)))
        selection = Dual(keep=0.3)(signals, seed=6)
        top = Dual(sampling="none")(signals, seed=6).score
        trajectory = signals["true_probability"].astype(np.float64).mean(axis=1)
        weight = log_weight(top, trajectory, signals["id"], 0.7, 4.0)
        gumbel = [-math.log(-math.log(u)) for u in rules.uniform(6, signals["id"])]
        np.testing.assert_allclose(selection.score, weight + gumbel, rtol=1e-5)
        assert selection.kept == 6

    def test_two_rows_are_drawn_in_proportion(self):
        p = np.array([[0.3, 0.7] * 5, [0.2, 0.6] * 5])
        signals = rows(true_probability=p)
        score = Dual(sampling="none")(signals, seed=0).score.astype(np.float64)
        b = 15 * (1 - 0.45) * (1 - 0.5**4)
        weight = score * beta.pdf([0.5, 0.4], 16 - b, b)
        taken = [Dual(keep=0.5)(signals, seed=seed).keep[0] for seed in range(2000)]
        assert np.mean(taken) == pytest.approx(weight[0] / weight.sum(), abs=0.03)

    def test_the_more_is_pruned_the_easier_are_the_rows(self):
        rng = np.random.default_rng(0)
        centre = rng.uniform(0.1, 0.9, (4000, 1))
        trajectory = centre + 0.1 * rng.choice([-1.0, 1.0], (4000, 12))
        signals = rows(true_probability=trajectory.clip(0, 1))
        means = []
        for keep in (0.05, 0.2, 0.5):
            kept = Dual(keep=keep)(signals, seed=0).keep
            means.append(float(trajectory[kept].mean()))
        assert means[0] > means[1] > means[2]
        assert means[0] > 0.6

    @pytest.mark.parametrize("keep", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("level", [0.0, 1.0])
    def test_certain_rows_meet_the_budget(self, keep, level):
        signals = rows(true_probability=np.full((10, 12), level))
        selection = Dual(keep=keep)(signals, seed=0)
        assert selection.kept == round(10 * keep)
        assert np.isfinite(selection.score).all()

    @pytest.mark.parametrize("c_d", [0.0, -1.0, math.nan, math.inf])
    def test_c_d_out_of_range(self, c_d):
        with pytest.raises(InputError, match="c_d"):
            Dual(c_d=c_d)

    def test_sampling_out_of_range(self):
        with pytest.raises(InputError, match="`sampling` must be one of beta, none"):
            Dual(sampling="gamma")


@pytest.mark.parametrize("name", ["dyn_unc", "tdds", "dual"])
@pytest.mark.parametrize("window", [1, 0])
def test_windows_of_one_epoch_are_refused(name, window):
    with pytest.raises(InputError, match="`window` must be at least 2"):
        METHODS[name](window=window)


@pytest.mark.parametrize("name", ["tdds", "dual"])
def test_runs_of_one_epoch_are_refused(name):
    with pytest.raises(InputError, match="`epochs` must be at least 2"):
        METHODS[name](epochs=1)


@pytest.mark.parametrize(
    ("name", "signal"),
    [
        ("el2n", "el2n"),
        ("grand", "gradient_norm"),
        ("forgetting", "correct"),
        ("aum", "margin"),
        ("dyn_unc", "true_probability"),
        ("tdds", "probability_change"),
        ("dual", "true_probability"),
    ],
)
def test_a_width_that_is_no_multiple_of_the_runs(name, signal):
    values = np.zeros((3, 10), bool if signal == "correct" else np.float32)
    with pytest.raises(InputError, match=f"`{signal}`.*3 runs; found 10"):
        METHODS[name](runs=3)(rows(**{signal: values}), seed=0)
    with pytest.raises(InputError, match="`runs` must be at least 1"):
        METHODS[name](runs=0)


def test_influence_keeps_what_held_out_rows_depend_on():
    # 0.4 of five rows are two: the highest, and of the two at 0.5 the smaller id.
    selection = Influence(keep=0.4)(rows(influence=[-3.0, 0.5, 2.0, 0.5, 0.0]), seed=0)
    assert selection.keep.tolist() == [False, True, True, False, False]
    assert selection.reason_names()[2:4] == ["influential", "little_influence"]
    assert selection.threshold.tolist() == [0.5] * 5
