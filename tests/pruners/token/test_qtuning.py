"""Golden case: five samples on the plane and the four tokens of one, worked by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pruners.contract import Signals
from prunery.pruners.token import plane
from prunery.pruners.token.qtuning import QTuning

from .samples import of_sample, random_tokens_of, tokens

# Error and uncertainty of the samples; places 0 to 4 on both axes.
#   1: error 3.0, place 4; uncertainty 0.2, place 0 -> quadrant 2 at alpha 0
#   2: error 0.1, place 0; uncertainty 2.0, place 4 -> quadrant 4 at alpha 0
#   3: 1.0 and 1.0, place 2 and 2; 4: 2.0 and 1.5, place 3 and 3; 5: 0.5 and 0.5, place 1 and 1:
#   all three need alpha >= 0.5, so they are beyond the search.
FIVE = {
    1: {"loss": [1.0, 5.0, 2.0, 4.0], "entropy": [0.2] * 4},
    2: {"loss": [0.1, 0.1], "entropy": [1.0, 3.0]},
    3: {"loss": [1.0], "entropy": [1.0]},
    4: {"loss": [2.0, 2.0], "entropy": [1.5, 1.5]},
    5: {"loss": [0.25, 0.75], "entropy": [0.5, 0.5]},
}


def one(losses, **options):
    """What is kept of a sample in quadrant 2; its only fellow stands in the other corner."""
    given = {"loss": losses, "entropy": [0.0] * len(losses)}
    made = {name: options.pop(name) for name in ("turn", "protected") if name in options}
    position = options.pop("token_position", None)
    if position is not None:
        made["token_position"] = position
    rest = {"loss": [0.0], "entropy": [9.0]}
    if "protected" in made:
        rest["protected"] = [False]
    signals = tokens({1: {**given, **made}, 2: rest})
    return of_sample(signals, QTuning(samples=1.0, **options)(signals, seed=0), 1)


class TestGolden:
    def test_plane(self):
        # Perplexities 20.0855, 1.1052, 2.7183, 7.3891, 1.6487, normalised x:
        #   1, 0, 1.61311 / 18.98037 = 0.08499, 6.28389 / 18.98037 = 0.33107, 0.02864;
        # normalised entropies y: 0, 1, 0.44444, 0.72222, 0.16667. |x - y| of samples 3 to 5:
        # 0.35945, 0.39115, 0.13803: the third place goes to sample 4, as quadrant 4 (x < y).
        # Ranks 2 + 2 of 4 make sample 3 noise, 1 + 1 sample 5 redundant.
        found = QTuning(samples=0.6).plane(tokens(FIVE), seed=0)
        assert found.sample.tolist() == [1, 2, 3, 4, 5]
        np.testing.assert_allclose(found.error, [3.0, 0.1, 1.0, 2.0, 0.5], atol=1e-7)
        np.testing.assert_allclose(found.uncertainty, [0.2, 2.0, 1.0, 1.5, 0.5], atol=1e-7)
        assert found.kept.tolist() == [True, True, False, True, False]
        assert found.topped_up.tolist() == [False, False, False, True, False]
        assert found.quadrant.tolist() == [2, 4, 1, 4, 3]
        np.testing.assert_allclose(
            found.score, [1.0, 1.0, 0.35945 / 2, 0.39115 / 2, 0.13803 / 2], atol=1e-5
        )
        assert found.topped_up_share == pytest.approx(1 / 3)
        assert found.correlation == pytest.approx(
            np.corrcoef([3.0, 0.1, 1.0, 2.0, 0.5], [0.2, 2.0, 1.0, 1.5, 0.5])[0, 1], abs=1e-6
        )

    def test_tokens(self):
        # Perplexities of sample 1: 2.718, 148.413, 7.389, 54.598; s_i = half of
        #   2.718 + 148.413 = 151.1, 148.413 + 2.718 + 7.389 = 158.5,
        #   7.389 + 148.413 + 54.598 = 210.4, 54.598 + 7.389 = 62.0: the two highest go.
        signals = tokens(FIVE)
        selection = QTuning(samples=0.6, tokens=0.5)(signals, seed=0)
        assert of_sample(signals, selection, 1) == [True, False, False, True]
        assert selection.reason_names() == [
            *("misconception", "high_local_perplexity", "high_local_perplexity", "misconception"),
            *("calibration", "calibration"),
            "noise",
            *("calibration", "calibration"),
            *("redundant", "redundant"),
        ]
        expected = np.array([255.5, 255.25, 255.0, 255.75]) / 256
        np.testing.assert_allclose(selection.score[:4], expected, atol=1e-7)
        # Sample 4 stands at 0.19557: 49 whole steps of 1/255.
        np.testing.assert_allclose(selection.score[7:9], np.array([49.5, 49.0]) / 256, atol=1e-7)

    def test_corners_that_the_budget_does_not_reach_say_so(self):
        signals = tokens(FIVE)
        selection = QTuning(samples=0.2)(signals, seed=0)
        assert of_sample(signals, selection, 1) == [True, False, False, True]
        assert selection.reason_names()[4:6] == ["over_budget", "over_budget"]

    def test_rank_normalisation(self):
        # x = y for samples 3 to 5: the smaller id tops up, as quadrant 2 (x >= y), and the
        # sums 1.0, 1.5, 0.5 name the others: 4 is noise, 5 redundant.
        found = QTuning(samples=0.6, normalise="rank").plane(tokens(FIVE), seed=0)
        assert found.kept.tolist() == [True, True, True, False, False]
        assert found.quadrant.tolist() == [2, 4, 2, 1, 3]

    def test_a_sum_of_exactly_1_is_noise(self):
        found = QTuning(samples=0.4, normalise="rank").plane(tokens(FIVE), seed=0)
        assert found.quadrant.tolist() == [2, 4, 1, 1, 3]

    def test_log_normalisation(self):
        # x = (error - 0.1) / 2.9: 0.31034, 0.65517, 0.13793 for samples 3 to 5.
        found = QTuning(samples=0.6, normalise="log").plane(tokens(FIVE), seed=0)
        np.testing.assert_allclose(
            found.score[2:] * 2,
            [0.44444 - 0.31034, 0.72222 - 0.65517, 0.16667 - 0.13793],
            atol=1e-4,
        )
        assert found.quadrant.tolist() == [2, 4, 4, 1, 3]


class TestTokenRule:
    def test_neighbours_do_not_cross_a_turn_and_ties_go_to_the_earlier_token(self):
        # s = half of (151.1, 151.1 | 62.0, 62.0): of the tied pair the earlier one stays.
        losses = [1.0, 5.0, 2.0, 4.0]
        kept = one(losses, turn=[0, 0, 1, 1], tokens=0.75)
        assert kept == [True, False, True, True]

    def test_neighbours_are_adjacent_positions(self):
        losses = [1.0, 5.0, 2.0, 4.0]
        kept = one(losses, token_position=[10, 11, 13, 14], tokens=0.75)
        assert kept == [True, False, True, True]
        assert one(losses, tokens=0.75) == [True, True, False, True]

    def test_neighbours_do_not_cross_a_sample(self):
        # Sample 8 ends at 12, 9 starts at 13, next to it in the order of rows.
        loud = {"loss": [0.5, 0.6, 9.0], "entropy": [0.0] * 3, "token_position": [10, 11, 12]}
        other = {"loss": [5.0, 1.0, 5.5], "entropy": [0.0] * 3, "token_position": [13, 14, 15]}
        signals = tokens({8: loud, 9: other})
        selection = QTuning(samples=1.0, tokens=0.7)(signals, seed=0)
        # s of sample 9, doubled: 151.1, 395.8, 247.4. With 8's last token in front the first
        # would be 8,254 and the one to keep the last.
        rank = np.argsort(-selection.score[3:])
        assert rank.tolist() == [0, 2, 1]

    def test_mix(self):
        losses = [1.0, 5.0, 2.0, 4.0]
        assert one(losses, mix=0.0) == [True, False, True, False]
        # Neighbours alone: 148.4, 10.1, 203.0, 7.4.
        assert one(losses, mix=1.0) == [False, True, False, True]

    def test_other_direction(self):
        assert one([1.0, 5.0, 2.0, 4.0], direction="drop_lowest") == [False, True, True, False]

    def test_share_is_rounded_down_exactly(self):
        losses = np.linspace(0.1, 3.0, 100).tolist()
        assert sum(one(losses, tokens=0.29)) == 29
        assert sum(one(losses, tokens=0.299)) == 29

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
    def test_a_kept_sample_keeps_a_token(self, share):
        assert one([1.0], tokens=share) == [True]
        assert sum(one([1.0, 2.0, 3.0], tokens=share)) == max(1, math.floor(share * 3))

    def test_extreme_losses_do_not_overflow(self):
        with np.errstate(all="raise", under="ignore"):
            # The loudest token drowns its neighbours: a tie, in which the first one stays.
            assert one([1e4, 3e38, 0.0, 1.0], tokens=0.5) == [True, False, False, True]
            assert one([1e4, 1.0, 2e4, 0.0], tokens=0.5, mix=0.0) == [False, True, False, True]

    def test_matches_the_formula(self):
        rng = np.random.default_rng(3)
        losses = rng.exponential(2.0, 30)
        ppl = [0.0, *np.exp(losses.astype(np.float32).astype(float)), 0.0]
        s = [0.3 * ppl[i] + 0.7 * (ppl[i - 1] + ppl[i + 1]) for i in range(1, 31)]
        kept = one(losses.tolist(), mix=0.7, tokens=0.4)
        assert np.flatnonzero(kept).tolist() == sorted(np.argsort(s)[:12].tolist())


class TestProtected:
    LOSSES = (1.0, 2.0, 9.0)

    def test_protected_token_stays_and_counts(self):
        flags = [False, False, True]
        # floor(0.67 * 3) = 2: the protected one and the best of the others. Doubled s without
        # protection: 10.1, 8113, 8110.
        assert one(list(self.LOSSES), tokens=0.67, protected=flags) == [True, False, True]
        assert one(list(self.LOSSES), tokens=0.67, protected=flags, keep_protected=False) == [
            True,
            False,
            True,
        ]
        assert one(list(self.LOSSES), tokens=0.34, protected=flags) == [False, False, True]
        assert one(list(self.LOSSES), tokens=0.34, protected=flags, keep_protected=False) == [
            True,
            False,
            False,
        ]

    def test_more_protected_tokens_than_the_share(self):
        assert one(list(self.LOSSES), tokens=0.34, protected=[True] * 3) == [True] * 3

    def test_protected_token_of_a_dropped_sample_goes(self):
        signals = tokens({k: {**v, "protected": [True] * len(v["loss"])} for k, v in FIVE.items()})
        selection = QTuning(samples=0.4)(signals, seed=0)
        assert selection.keep.tolist() == [True] * 6 + [False] * 5
        assert selection.reason_names()[0] == "protected"


class TestTokenBudgetOfThePool:
    def test_worst_tokens_of_quadrant_2_are_cut(self):
        # 11 tokens, 3 of 5 samples kept: target = round(11 * 0.6 * 0.9) = round(5.94) = 6 of
        # the 8 tokens that are left, so the 2 worst of sample 1 go.
        signals = tokens(FIVE)
        selection = QTuning(samples=0.6, tokens=0.9, token_budget="pool")(signals, seed=0)
        assert selection.kept == 6
        assert of_sample(signals, selection, 1) == [True, False, False, True]
        # round(11 * 0.6 * 0.1) = 1: all that quadrant 2 may lose, its best token stays.
        selection = QTuning(samples=0.6, tokens=0.1, token_budget="pool")(signals, seed=0)
        assert selection.kept == 5
        assert of_sample(signals, selection, 1) == [False, False, False, True]

    def test_dropped_samples_alone_may_meet_it(self):
        signals = tokens(FIVE)
        selection = QTuning(samples=0.6, tokens=1.0, token_budget="pool")(signals, seed=0)
        # round(6.6) = 7 of 8: one goes, the worst.
        assert of_sample(signals, selection, 1) == [True, True, False, True]

    def test_each_pool_meets_its_own(self):
        signals = random_tokens_of(np.random.default_rng(2), 40)
        method = QTuning(samples=0.5, tokens=0.6, token_budget="pool", pool=10)
        selection = method(signals, seed=3)
        found = method.plane(signals, seed=3)
        pool = plane.pools(found.sample, 10, 3)
        for number in range(4):
            inside = np.isin(signals["sample"], found.sample[pool == number])
            size = dict.fromkeys((2, 4), 0)
            fewest = 0
            for at in np.flatnonzero(found.kept & (pool == number)):
                length = (signals["sample"] == found.sample[at]).sum()
                size[found.quadrant[at]] += length
                fewest += length if found.quadrant[at] == 4 else 1
            target = round(inside.sum() * 0.3)
            left = (selection.keep & inside).sum()
            assert left == min(max(target, fewest), size[2] + size[4])
            assert len(np.unique(signals["sample"][selection.keep & inside])) == 5


def published(error, entropy, share):
    """Algorithm 1 by loops over raw perplexities; kept by the thresholds, and with top-up."""
    n = len(error)
    ppl = [math.exp(e) for e in error]

    def quantile(values, q):
        ordered, at = sorted(values), q * (n - 1)
        low = min(int(at), n - 2) if n > 1 else 0
        high = min(low + 1, n - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    low, high = 0.0, 0.49
    for _ in range(10):
        alpha = (low + high) / 2
        p_low, p_high = quantile(ppl, alpha), quantile(ppl, 1 - alpha)
        e_low, e_high = quantile(entropy, alpha), quantile(entropy, 1 - alpha)
        inside = {
            i
            for i in range(n)
            if (ppl[i] > p_high and entropy[i] <= e_low)
            or (ppl[i] <= p_low and entropy[i] > e_high)
        }
        if abs(len(inside) / n - share) < 0.01:
            break
        if len(inside) / n < share:
            low = alpha
        else:
            high = alpha
    p = (np.array(ppl) - min(ppl)) / (max(ppl) - min(ppl))
    e = (np.array(entropy) - min(entropy)) / (max(entropy) - min(entropy))
    rest = sorted(set(range(n)) - inside, key=lambda i: -abs(p[i] - e[i]))
    return inside, inside | set(rest[: max(max(1, round(share * n)) - len(inside), 0)])


class TestSearch:
    @pytest.mark.parametrize("seed", range(12))
    @pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
    def test_published_is_algorithm_1(self, seed, share):
        signals = random_tokens_of(np.random.default_rng(seed), 50, correlated=0.3 * (seed % 3))
        found = QTuning(samples=share, search="published").plane(signals, seed=0)
        inside, kept = published(found.error.tolist(), found.uncertainty.tolist(), share)
        assert set(np.flatnonzero(found.kept)) == kept
        assert set(np.flatnonzero(found.kept & ~found.topped_up)) == inside

    def test_published_borders(self):
        # 201 rows: the first alpha, 0.245, falls on places 49 and 151. Uncertainty at the
        # border is in (<=), error at the border is out (>).
        entropy = np.arange(201.0)
        error = (entropy + 120) % 201
        inside = plane.published_search(error, entropy, 0.09)
        assert np.flatnonzero(inside).tolist() == list(range(32, 50))
        inside = plane.published_search(entropy, error, 0.09)
        # Now quadrant 4: error at the border is in, uncertainty out.
        assert np.flatnonzero(inside).tolist() == list(range(32, 50))

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10**6), st.integers(5, 80), st.sampled_from([0.1, 0.2, 0.3, 0.4]))
    def test_exact_is_its_limit(self, seed, samples, share):
        """Where the published search ends with the exact count by thresholds, so it is."""
        rng = np.random.default_rng(seed)
        error, entropy = rng.exponential(size=(2, samples))
        inside, _ = published(error.tolist(), entropy.tolist(), share)
        exact = plane.decide(
            error,
            entropy,
            np.arange(samples),
            share=len(inside) / samples,
            normalise="minmax",
            search="exact",
        )
        assert set(np.flatnonzero(exact.kept)) == inside
        assert not exact.topped_up.any()

    @pytest.mark.parametrize("ties", [False, True])
    def test_reach_is_where_a_sample_enters(self, ties):
        rng = np.random.default_rng(5)
        error, entropy = rng.exponential(size=(2, 23))
        if ties:
            error, entropy = np.round(error, 1), np.round(entropy, 1)
        step, second = plane.reach(error, entropy)

        def inside(alpha):
            low, high = np.quantile(error, [alpha, 1 - alpha])
            sure, unsure = np.quantile(entropy, [alpha, 1 - alpha])
            return (error > high) & (entropy <= sure), (error <= low) & (entropy > unsure)

        for row in np.flatnonzero(step < 11):
            before, after = step[row] / 22 - 1e-6, step[row] / 22 + 1e-6
            if before > 0:
                assert not inside(before)[0][row] and not inside(before)[1][row]
            assert inside(after)[0 if second[row] else 1][row]

    def test_correlated_axes_leave_nothing_to_the_thresholds(self):
        rows = {k: {"loss": [float(k)], "entropy": [k / 10]} for k in range(1, 9)}
        found = QTuning(samples=0.25, normalise="log").plane(tokens(rows), seed=0)
        assert found.correlation == pytest.approx(1.0)
        assert found.topped_up_share == 1.0
        assert found.kept.sum() == 2

    @pytest.mark.parametrize(("rho", "share"), [(0.0, 0.48), (0.5, 0.31), (0.8, 0.19)])
    def test_what_the_loosest_threshold_holds(self, rho, share):
        """Of a bivariate normal: the more the axes correlate, the less it reaches."""
        error, other = np.random.default_rng(0).standard_normal((2, 20000))
        uncertainty = rho * error + math.sqrt(1 - rho**2) * other
        verdict = plane.decide(
            error, uncertainty, np.arange(20000), share=1.0, normalise="rank", search="exact"
        )
        assert 1 - verdict.topped_up.mean() == pytest.approx(share, abs=0.015)

    def test_loosest_threshold(self):
        # 101 samples: places 49 and 51 enter at alpha 0.49, one step further none does.
        error = np.arange(101.0)
        entropy = 100.0 - error
        verdict = plane.decide(
            error, entropy, np.arange(101), share=1.0, normalise="log", search="exact"
        )
        assert np.flatnonzero(verdict.topped_up).tolist() == [50]


class TestPools:
    def test_sizes_differ_by_one_at_most(self):
        ids = np.random.default_rng(0).choice(2**60, 103, replace=False)
        sizes = np.bincount(plane.pools(ids, 10, 7))
        assert len(sizes) == 11
        assert set(sizes) == {9, 10}
        assert not np.array_equal(plane.pools(ids, 10, 7), plane.pools(ids, 10, 8))
        assert np.bincount(plane.pools(ids, 1000, 7)).tolist() == [103]

    def test_each_pool_is_decided_alone(self):
        signals = random_tokens_of(np.random.default_rng(1), 60)
        method = QTuning(samples=0.3, pool=16)
        whole, found = method(signals, seed=5), method.plane(signals, seed=5)
        pool = plane.pools(found.sample, 16, 5)
        for number in range(4):
            rows = np.flatnonzero(np.isin(signals["sample"], found.sample[pool == number]))
            alone = QTuning(samples=0.3)(signals.take(rows), seed=5)
            assert np.array_equal(whole.keep[rows], alone.keep)
            assert np.array_equal(whole.score[rows], alone.score)
            assert found.kept[pool == number].sum() == math.ceil(0.3 * 15)

    @pytest.mark.parametrize("search", ["exact", "published"])
    def test_pool_of_one_sample(self, search):
        signals = tokens({k: v for k, v in FIVE.items() if k < 4})
        selection = QTuning(samples=0.1, pool=1, search=search)(signals, seed=0)
        # Nothing to compare with: every sample stays, as quadrant 2.
        assert selection.keep.tolist() == [True, False, False, True, True, False, True]


class TestEdges:
    def test_nothing(self):
        found = QTuning().plane(tokens({1: FIVE[1]}).take([]), seed=0)
        assert len(found.sample) == 0
        assert math.isnan(found.correlation)
        assert found.topped_up_share == 0.0

    def test_constant_axes_go_by_id(self):
        rows = {k: {"loss": [1.0, 1.0], "entropy": [2.0, 2.0]} for k in (5, 3, 9, 7)}
        found = QTuning(samples=0.5).plane(tokens(rows), seed=0)
        assert found.kept.tolist() == [True, True, False, False]
        assert math.isnan(found.correlation)
        assert np.isfinite(found.score).all()

    def test_score_does_not_hang_on_the_budget(self):
        signals = random_tokens_of(np.random.default_rng(4), 30)
        a, b = QTuning(samples=0.1, tokens=0.2), QTuning(samples=0.9, tokens=0.7)
        assert np.array_equal(a(signals, seed=0).score, b(signals, seed=0).score)

    def test_monotone_in_the_share_of_tokens(self):
        signals = random_tokens_of(np.random.default_rng(6), 40)
        masks = [QTuning(tokens=t)(signals, seed=0).keep for t in (0.0, 0.3, 0.5, 0.8, 1.0)]
        for smaller, larger in itertools.pairwise(masks):
            assert not (smaller & ~larger).any()

    def test_whole_samples_are_those_of_quadrant_4(self):
        signals = random_tokens_of(np.random.default_rng(8), 60)
        method = QTuning(samples=0.6, tokens=0.4)
        selection, found = method(signals, seed=0), method.plane(signals, seed=0)
        for sample, quadrant, kept in zip(found.sample, found.quadrant, found.kept, strict=True):
            mask = of_sample(signals, selection, sample)
            expected = 0 if not kept else len(mask)
            if kept and quadrant == 2:
                expected = max(1, math.floor(round(0.4 * len(mask), 9)))
            assert sum(mask) == expected

    @pytest.mark.parametrize(
        "options",
        [
            {"mix": 1.5},
            {"tokens": -0.1},
            {"pool": 0},
            {"normalise": "z"},
            {"search": "grid"},
            {"token_budget": "all"},
            {"direction": "up"},
        ],
    )
    def test_unknown_options_are_refused(self, options):
        with pytest.raises(InputError, match=next(iter(options))):
            QTuning(**options)

    def test_missing_turn_is_named(self):
        arrays = {name: tokens(FIVE)[name] for name in tokens(FIVE) if name != "turn"}
        with pytest.raises(InputError, match="`turn`"):
            QTuning()(Signals(arrays), seed=0)
