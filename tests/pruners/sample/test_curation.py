"""Golden cases of the methods that choose fine-tuning samples, worked by hand."""

import math

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pruners import rules
from prunery.pruners.contract import Signals
from prunery.pruners.sample.deita import Deita, passed_over
from prunery.pruners.sample.ifd import Ifd
from prunery.pruners.sample.infobatch import InfoBatch
from prunery.pruners.sample.k_center import KCenter
from prunery.pruners.sample.longest import Longest
from prunery.pruners.sample.perplexity_window import PerplexityWindow
from prunery.pruners.sample.qurating import QuRating
from prunery.pruners.sample.s2l import S2L
from prunery.pruners.sample.superfiltering import Superfiltering


def rows(**columns):
    size = len(next(iter(columns.values())))
    return Signals({"id": np.arange(size), **columns})


def unit(*angles_in_degrees):
    radians = np.deg2rad(angles_in_degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


class TestIfd:
    # Ratios 0.5, 0.9, 1.0, 1.5, 1.1.
    LOSSES = rows(
        answer_loss=[1.0, 1.8, 2.0, 3.0, 2.2], answer_loss_alone=[2.0, 2.0, 2.0, 2.0, 2.0]
    )

    def test_golden(self):
        selection = Ifd(keep=0.4)(self.LOSSES, seed=0)
        np.testing.assert_allclose(selection.score, [0.5, 0.9, 1.0, -1.5, -1.1], rtol=1e-6)
        assert selection.keep.tolist() == [False, True, True, False, False]
        unhelped = "instruction_does_not_help"
        assert selection.reason_names() == ["easy", "difficult", "difficult", unhelped, unhelped]

    def test_the_budget_reaches_down_to_ratios_above_1(self):
        selection = Ifd(keep=0.8)(self.LOSSES, seed=0)
        assert selection.keep.tolist() == [True, True, True, False, True]
        assert selection.reason_names()[4] == "in_reserve"

    def test_it_is_a_ratio_of_losses(self):
        # Ratios 0.5 and 0.75; of perplexities exp(-0.5) = 0.61 and exp(-1) = 0.37.
        signals = rows(answer_loss=[0.5, 3.0], answer_loss_alone=[1.0, 4.0])
        assert Ifd(keep=0.5)(signals, seed=0).keep.tolist() == [False, True]
        assert Superfiltering(keep=0.5)(signals, seed=0).keep.tolist() == [True, False]

    def test_answers_that_cost_nothing_alone(self):
        signals = rows(answer_loss=[0.0, 1.0, 3e38, 0.1], answer_loss_alone=[0.0, 0.0, 0.0, 1.0])
        selection = Ifd(keep=0.5)(signals, seed=0)
        assert selection.keep.tolist() == [True, False, False, True]
        assert selection.score[0] == 0.0
        assert np.isfinite(selection.score).all()


class TestSuperfiltering:
    def test_golden(self):
        # Log ratios -1, 0, -0.1, 0.5, 2.
        signals = rows(
            answer_loss=[1.0, 2.0, 1.9, 2.5, 4.0], answer_loss_alone=[2.0, 2.0, 2.0, 2.0, 2.0]
        )
        selection = Superfiltering(keep=0.4)(signals, seed=0)
        expected = [math.exp(-1), 1.0, math.exp(-0.1), -0.5, -2.0]
        np.testing.assert_allclose(selection.score, expected, rtol=1e-6)
        assert selection.keep.tolist() == [False, True, True, False, False]
        more = Superfiltering(keep=0.8)(signals, seed=0)
        assert more.keep.tolist() == [True, True, True, True, False]
        assert more.reason_names()[3:] == ["in_reserve", "instruction_does_not_help"]

    def test_large_losses_do_not_overflow(self):
        signals = rows(answer_loss=[3e38, 0.0], answer_loss_alone=[0.0, 3e38])
        with np.errstate(over="raise"):
            assert np.isfinite(Superfiltering()(signals, seed=0).score).all()


class TestLongest:
    def test_golden(self):
        selection = Longest(keep=0.5)(rows(answer_tokens=[3, 90, 7, 7, 1]), seed=0)
        assert selection.keep.tolist() == [False, True, True, True, False]
        assert selection.threshold.tolist() == [7.0] * 5
        selection = Longest(keep=0.4)(rows(answer_tokens=[3, 90, 7, 7, 1]), seed=0)
        assert selection.keep.tolist() == [False, True, True, False, False]


class TestPerplexityWindow:
    LOSSES = rows(answer_loss=[5.0, 0.1, 2.0, 100.0, 1.0])

    def test_golden(self):
        # Ranks 0.75, 0, 0.5, 1, 0.25; two at distance 0.25, of which the smaller id stays.
        selection = PerplexityWindow(keep=0.4)(self.LOSSES, seed=0)
        np.testing.assert_allclose(selection.score, [-0.25, -0.5, 0.0, -0.5, -0.25])
        assert selection.keep.tolist() == [True, False, True, False, False]
        assert selection.reason_names() == [
            *("in_window", "below_window", "in_window", "above_window", "below_window"),
        ]

    @pytest.mark.parametrize(("centre", "expected"), [(0.0, [1, 4]), (1.0, [0, 3]), (0.25, [1, 4])])
    def test_centre(self, centre, expected):
        selection = PerplexityWindow(keep=0.4, centre=centre)(self.LOSSES, seed=0)
        assert np.flatnonzero(selection.keep).tolist() == expected

    def test_equal_losses_share_a_rank(self):
        # Places 0, 1 and 1, 3: the tie stands at (1 + 2) / 2 of 3.
        score = PerplexityWindow()(rows(answer_loss=[2.0, 1.0, 2.0, 3.0]), seed=0).score
        np.testing.assert_allclose(score, [0.0, -0.5, 0.0, -0.5], atol=1e-7)


class TestQuRating:
    RATING = rows(rating=[0.5, -1.0, 3.0, 3.0])

    def test_golden(self):
        selection = QuRating(keep=0.25)(self.RATING, seed=5)
        assert selection.keep.tolist() == [False, False, True, False]
        assert selection.score.tolist() == [0.5, -1.0, 3.0, 3.0]

    def test_tempered_score(self):
        drawn = rules.uniform(5, self.RATING["id"])
        expected = [
            r + 0.7 * -math.log(-math.log(u)) for r, u in zip([0.5, -1, 3, 3], drawn, strict=True)
        ]
        score = QuRating(temperature=0.7)(self.RATING, seed=5).score
        np.testing.assert_allclose(score, expected, rtol=1e-5)

    def test_draw_follows_the_ratings(self):
        # Odds exp(1 / 0.5) = 7.39 to 1: the first row is drawn with probability 0.881.
        signals = rows(rating=[1.0, 0.0])
        taken = [QuRating(keep=0.5, temperature=0.5)(signals, seed=s).keep[0] for s in range(2000)]
        assert np.mean(taken) == pytest.approx(0.881, abs=0.03)

    @pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
    def test_temperature_out_of_range(self, temperature):
        with pytest.raises(InputError, match="temperature"):
            QuRating(temperature=temperature)


class TestInfoBatch:
    def test_golden(self):
        # Mean 2: rows 0, 1 and 4 are easy, the one at the mean is not.
        signals = rows(answer_loss=[1.0, 0.5, 2.0, 5.5, 1.0])
        drawn = rules.uniform(3, signals["id"])
        selection = InfoBatch(ratio=0.6)(signals, seed=3)
        easy = [0, 1, 4]
        np.testing.assert_allclose(selection.score[easy], drawn[easy], rtol=1e-6)
        assert selection.keep[[2, 3]].all()
        assert selection.keep[easy].tolist() == (drawn[easy] > 0.6).tolist()
        expected = [2.5 if drawn[i] > 0.6 else 0.0 for i in easy]
        np.testing.assert_allclose(selection.weight[easy], expected, rtol=1e-6)
        assert selection.weight[[2, 3]].tolist() == [1.0, 1.0]

    def test_weights_hold_the_expected_sum(self):
        loss = np.random.default_rng(0).exponential(size=4000).astype(np.float32)
        signals = rows(answer_loss=loss)
        sums = [(InfoBatch(ratio=0.5)(signals, seed=s).weight * loss).sum() for s in range(40)]
        assert np.mean(sums) == pytest.approx(loss.sum(), rel=0.01)
        other = InfoBatch(ratio=0.5)(signals, seed=1).keep
        assert not np.array_equal(InfoBatch(ratio=0.5)(signals, seed=0).keep, other)
        easy = loss < loss.mean()
        assert other[easy].mean() == pytest.approx(0.5, abs=0.04)

    def test_equal_losses_are_not_easy(self):
        selection = InfoBatch(ratio=1.0)(rows(answer_loss=[0.1] * 7), seed=0)
        assert selection.keep.all()

    @pytest.mark.parametrize(("ratio", "kept"), [(0.0, 4), (1.0, 1)])
    def test_ends_of_the_range(self, ratio, kept):
        selection = InfoBatch(ratio=ratio)(rows(answer_loss=[1.0, 1.0, 1.0, 9.0]), seed=0)
        assert selection.kept == kept
        assert selection.weight[selection.keep].tolist() == [1.0] * kept


class TestS2L:
    def test_golden(self):
        # Three bundles of 2, 3 and 7 trajectories. 6 of 12: two from each; 8: the small one is
        # whole, three of each other; 10: five of the large one.
        sizes = [7, 2, 3]
        level = np.repeat([1.0, 5.0, 9.0], sizes)
        noise = 0.01 * np.random.default_rng(0).random((12, 4))
        signals = rows(loss_trajectory=level[:, None] * [4, 3, 2, 1] + noise)
        bundle = np.repeat([0, 1, 2], sizes)
        for keep, expected in [(6, [2, 2, 2]), (8, [3, 2, 3]), (10, [5, 2, 3])]:
            selection = S2L(keep=keep / 12, clusters=3)(signals, seed=1)
            assert np.bincount(bundle[selection.keep]).tolist() == expected
        # Inside a bundle rows go by the draw.
        drawn = rules.uniform(1, signals["id"])[:7]
        assert np.array_equal(np.argsort(-selection.score[:7]), np.argsort(-drawn))

    def test_fewer_trajectories_than_clusters(self):
        same = rows(loss_trajectory=np.ones((5, 2)))
        assert S2L(keep=0.4)(same, seed=0).kept == 2
        two = rows(loss_trajectory=np.repeat([[1.0, 0.0], [3.0, 2.0]], [4, 1], axis=0))
        selection = S2L(keep=0.4)(two, seed=0)
        assert selection.keep[4]
        assert selection.kept == 2

    def test_no_clusters(self):
        with pytest.raises(InputError, match="clusters"):
            S2L(clusters=0)


class TestDeita:
    # Products 6, 8, 9, 2, 1. Row 1 is 10 degrees from row 2 (cosine 0.985), row 0 is 60 from
    # it, row 3 is 15 from row 0 (0.966), row 4 stands alone.
    GIVEN = rows(
        complexity=[2, 4, 3, 2, 1],
        quality=[3, 2, 3, 1, 1],
        embedding=unit(60, 10, 0, 75, 180),
    )

    def test_golden(self):
        # Accepted: 2, 0, 4; passed over: 1 (near 2), 3 (near 0).
        selection = Deita(keep=0.6)(self.GIVEN, seed=0)
        assert selection.keep.tolist() == [True, False, True, False, True]
        np.testing.assert_allclose(selection.score, [0.8, 0.4, 1.0, 0.2, 0.6], atol=1e-6)
        assert selection.rival.tolist() == [-1, 2, -1, 0, -1]
        assert selection.reason_names() == [
            *("good_and_new", "too_near", "good_and_new", "too_near", "good_and_new"),
        ]

    def test_refilled_where_the_table_repeats_itself(self):
        selection = Deita(keep=0.8)(self.GIVEN, seed=0)
        assert selection.keep.tolist() == [True, True, True, False, True]
        assert selection.reason_names()[1] == "refilled"

    def test_a_row_does_not_lose_to_one_that_is_not_kept(self):
        selection = Deita(keep=0.2)(self.GIVEN, seed=0)
        assert selection.keep.tolist() == [False, False, True, False, False]
        assert selection.rival.tolist() == [-1, 2, -1, -1, -1]
        assert selection.reason_names()[3] == "low_score"

    def test_distance(self):
        # cos(10 degrees) = 0.9848: beyond a distance of 0.015, within one of 0.0153.
        near = Deita(keep=0.4, distance=0.0153)(self.GIVEN, seed=0)
        assert np.flatnonzero(near.keep).tolist() == [0, 2]
        apart = Deita(keep=0.4, distance=0.015)(self.GIVEN, seed=0)
        assert np.flatnonzero(apart.keep).tolist() == [1, 2]

    def test_blocks_do_not_matter(self):
        vectors = np.random.default_rng(0).standard_normal((200, 5)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        over, nearest = passed_over(vectors, 0.15, block=7)
        accepted = []
        for row in range(200):
            cosine = vectors[accepted] @ vectors[row] if accepted else np.zeros(0)
            assert over[row] == (len(accepted) > 0 and cosine.max() >= 0.85)
            if accepted:
                assert nearest[row] == accepted[int(cosine.argmax())]
            if not over[row]:
                accepted.append(row)
        assert 0 < over.sum() < 199

    @pytest.mark.parametrize("name", ["complexity", "quality"])
    def test_negative_scores_are_refused(self, name):
        arrays = {**self.GIVEN, name: np.array([1, 1, -1, 1, 1], np.float32)}
        with pytest.raises(InputError, match=f"`{name}`.*row 2 holds -1"):
            Deita()(Signals(arrays), seed=0)


class TestKCenter:
    def test_golden(self):
        # Mean direction of 0, 10, 20, 100 and 170 degrees is about 50: row 2 (at 20) is the
        # nearest. Then the furthest: 170, then 100 (80 from 20, 70 from 170), then 0, then 10.
        signals = rows(embedding=unit(0, 10, 20, 100, 170))
        selection = KCenter(keep=0.6)(signals, seed=0)
        assert selection.keep.tolist() == [False, False, True, True, True]
        expected = [1 - math.cos(math.radians(a)) for a in (20, 10, 70, 150)]
        np.testing.assert_allclose(selection.score, [*expected[:2], 3.0, *expected[2:]], atol=1e-6)
        assert selection.rival.tolist() == [2, 2, -1, -1, -1]
        assert selection.threshold[0] == pytest.approx(expected[2])
        more = KCenter(keep=0.8)(signals, seed=0)
        assert more.keep.tolist() == [True, False, True, True, True]

    def test_no_dropped_row_is_further_than_a_chosen_one(self):
        vectors = np.random.default_rng(1).standard_normal((80, 6)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        selection = KCenter(keep=0.2)(rows(embedding=vectors), seed=0)
        to_chosen = 1 - vectors @ vectors[selection.keep].T
        dropped = ~selection.keep
        np.testing.assert_allclose(
            selection.score[dropped], to_chosen[dropped].min(axis=1), atol=1e-6
        )
        assert selection.score[dropped].max() <= selection.score[selection.keep].min()
        nearest = np.flatnonzero(selection.keep)[to_chosen.argmin(axis=1)]
        assert np.array_equal(selection.rival[dropped], nearest[dropped])

    def test_copies_come_last(self):
        signals = rows(embedding=unit(0, 0, 0, 90, 90, 45))
        selection = KCenter(keep=0.5)(signals, seed=0)
        assert selection.keep.tolist() == [True, False, False, True, False, True]
        assert selection.score[[1, 2, 4]].tolist() == [0.0, 0.0, 0.0]
        # Where a float32 cosine of a vector with itself is not 1 either.
        vectors = np.random.default_rng(2).standard_normal((20, 384)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        score = KCenter(keep=0.5)(rows(embedding=np.tile(vectors, (2, 1))), seed=0).score
        assert (score == 0.0).sum() == 20

    def test_nothing_kept(self):
        selection = KCenter(keep=0.0)(rows(embedding=unit(0, 90)), seed=0)
        assert selection.kept == 0
        assert selection.rival.tolist() == [-1, -1]
