"""Methods over embeddings and clusters: golden cases by hand, and the traps of reference code."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pruners.contract import Signals
from prunery.pruners.sample import semdedup
from prunery.pruners.sample.herding import Herding, herd
from prunery.pruners.sample.moderate import Moderate
from prunery.pruners.sample.near_duplicate import NearDuplicate
from prunery.pruners.sample.prototypes import Prototypes
from prunery.pruners.sample.semdedup import SemDeDup


def rows(**columns):
    size = len(next(iter(columns.values())))
    return Signals({"id": np.arange(size), **columns})


def unit(*angles_in_degrees):
    radians = np.deg2rad(angles_in_degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def unit_rows(n, d, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((n, d)) + 0.5
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class TestHerding:
    def test_golden(self):
        # On a line: 0, 1, 2, 9, mean 3. Distances to 3: 3, 2, 1, 6: row 2 comes first. To
        # 2 * 3 - 2 = 4: 4, 3, 5: row 1. To 9 - 3 = 6: 6 and 3: row 3. Then row 0.
        vectors = np.array([[0.0], [1.0], [2.0], [9.0]], np.float32)
        assert herd(vectors, np.arange(4), 4).tolist() == [2, 1, 3, 0]
        selection = Herding(keep=0.5)(rows(embedding=vectors), seed=0)
        assert selection.keep.tolist() == [False, True, True, False]
        assert selection.score.tolist() == [-2.0, -1.0, 0.0, -2.0]
        assert selection.reason_names()[0] == "not_needed"
        assert selection.reason_names()[1] == "matches_mean"

    @pytest.mark.parametrize("unit_length", [True, False])
    def test_it_is_the_definition(self, unit_length):
        vectors = unit_rows(60, 5)
        if not unit_length:
            vectors *= np.linspace(0.5, 2, 60, dtype=np.float32)[:, None]
        wide = vectors.astype(np.float64)
        picked = []
        for t in range(25):
            target = (t + 1) * wide.mean(axis=0) - wide[picked].sum(axis=0)
            far = np.square(target - wide).sum(axis=1)
            far[picked] = np.inf
            picked.append(int(far.argmin()))
        assert herd(vectors, np.arange(60), 25).tolist() == picked

    def test_the_mean_is_matched_far_better_than_by_chance(self):
        vectors = unit_rows(2000, 32)
        mean = vectors.mean(axis=0)

        def error(chosen):
            return np.linalg.norm(vectors[chosen].mean(axis=0) - mean)

        rng = np.random.default_rng(1)
        random = np.mean([error(rng.choice(2000, 100, replace=False)) for _ in range(20)])
        left, total, worst = np.ones(2000, bool), np.zeros(32), []
        for t in range(100):  # the furthest in place of the nearest
            far = np.square((t + 1) * mean - total - vectors).sum(axis=1)
            worst.append(int(np.where(left, far, -1).argmax()))
            left[worst[-1]] = False
            total += vectors[worst[-1]]
        kept = np.flatnonzero(Herding(keep=0.05)(rows(embedding=vectors), seed=0).keep)
        assert error(kept) < random / 5
        assert error(worst) > random

    def test_equal_rows_go_by_smaller_id(self):
        vectors = np.repeat(unit_rows(3, 7), 40, axis=0)
        ids = np.random.default_rng(3).permutation(120)
        picks = herd(vectors, ids, 30)
        for kind in range(3):
            mine = [int(ids[row]) for row in picks if row // 40 == kind]
            assert mine == sorted(ids[kind * 40 : kind * 40 + 40])[: len(mine)]

    def test_a_tie_between_rows_of_unlike_length_goes_by_smaller_id(self):
        # 1 and 3 are both 1 away from their mean, 2.
        vectors = np.array([[3.0], [1.0]], np.float32)
        assert herd(vectors, np.array([0, 1]), 1).tolist() == [0]
        assert herd(vectors, np.array([1, 0]), 1).tolist() == [1]

    @pytest.mark.parametrize(("n", "count"), [(0, 0), (1, 1), (5, 0), (5, 5)])
    def test_borders(self, n, count):
        assert sorted(herd(unit_rows(5, 3)[:n], np.arange(n), count)) == list(range(count))


class TestModerate:
    def test_golden(self):
        # Class 0 on a line: 0, 1, 2, 4, 9, median 2, distances 2, 1, 0, 2, 7. Ranks 2.5, 1, 0,
        # 2.5, 4 (the tie shares its places): places .6, .3, .1, .6, .9.
        # Class 1 has one row: place 0.5.
        signals = rows(
            embedding=np.array([[0], [1], [2], [4], [9], [100]], np.float32),
            label=[0, 0, 0, 0, 0, 1],
        )
        selection = Moderate(keep=0.5)(signals, seed=0)
        np.testing.assert_allclose(selection.score, [-0.1, -0.2, -0.4, -0.1, -0.4, 0], atol=1e-6)
        assert selection.keep.tolist() == [True, False, False, True, False, True]
        near, far, kept = "near_class_median", "far_from_class_median", "moderate"
        assert selection.reason_names() == [kept, near, near, kept, far, kept]

    def test_the_centre_is_the_median_and_not_the_mean(self):
        # Median 1, distances 1, 0, 0, 99; mean 25.5 would put row 0 and row 1 at 25.5 and 24.5.
        signals = rows(embedding=np.array([[0], [1], [1], [100]], np.float32), label=[0] * 4)
        selection = Moderate(keep=0.25)(signals, seed=0)
        np.testing.assert_allclose(selection.score, [-0.125, -0.25, -0.25, -0.375])
        assert selection.keep.tolist() == [True, False, False, False]

    def test_classes_of_any_spread_keep_equal_shares(self):
        vectors = np.concatenate([unit_rows(100, 4), 50 * unit_rows(100, 4, 1)])
        label = np.repeat([0, 1], 100)
        selection = Moderate(keep=0.3)(rows(embedding=vectors, label=label), seed=0)
        assert selection.keep[label == 0].sum() == 30
        assert selection.keep[label == 1].sum() == 30

    def test_two_rows_of_a_class_are_kept_from_a_half_on(self):
        label = np.array([0] * 40 + [1, 1])
        signals = rows(embedding=unit_rows(42, 3), label=label)
        assert not Moderate(keep=0.3)(signals, seed=0).keep[-2:].any()
        assert Moderate(keep=0.6)(signals, seed=0).keep[-2:].all()


class TestPrototypes:
    def test_golden(self):
        signals = rows(centroid_distance=[0.1, 0.4, 0.2, 0.4, 0.0])
        hard = Prototypes(keep=0.4)(signals, seed=0)
        assert hard.keep.tolist() == [False, True, False, True, False]
        np.testing.assert_allclose(hard.score, [0.1, 0.4, 0.2, 0.4, 0.0])
        easy = Prototypes(keep=0.4, order="easy")(signals, seed=0)
        assert easy.keep.tolist() == [True, False, False, False, True]
        assert hard.reason_names()[1] == easy.reason_names()[1] == "atypical"

    def test_an_unknown_order_is_refused(self):
        with pytest.raises(InputError, match="`order` must be one of hard, easy"):
            Prototypes(order="medium")


class TestSemDeDup:
    # Six rows 10 degrees apart, the last the furthest from the centre; ids run against that.
    EPS = 1 - np.cos(np.deg2rad(11))
    CHAIN = Signals(
        {
            "id": [6, 5, 4, 3, 2, 1],
            "embedding": unit(0, 10, 20, 30, 40, 50),
            "cluster": [0] * 6,
            "centroid_distance": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5],
        }
    )

    def test_a_chain_collapses_as_published(self):
        selection = SemDeDup(distance=self.EPS)(self.CHAIN, seed=0)
        assert selection.keep.tolist() == [False] * 5 + [True]
        assert selection.rival.tolist() == [5] * 5 + [-1]
        near = 1 - np.cos(np.deg2rad(10))
        np.testing.assert_allclose(selection.score, [near] * 5 + [2.0], rtol=1e-5)

    def test_a_chain_keeps_every_other_row_in_greedy_mode(self):
        selection = SemDeDup(distance=self.EPS, mode="greedy")(self.CHAIN, seed=0)
        assert selection.keep.tolist() == [False, True, False, True, False, True]
        assert selection.rival.tolist() == [1, -1, 3, -1, 5, -1]
        far, near = 1 - np.cos(np.deg2rad(20)), 1 - np.cos(np.deg2rad(10))
        np.testing.assert_allclose(selection.score, [near, far, near, far, near, 2.0], rtol=1e-5)

    def test_the_furthest_from_the_centre_is_kept_and_ties_go_to_the_smaller_id(self):
        signals = Signals(
            {
                "id": [1, 2, 3, 9, 8],
                "embedding": unit(0, 1, 2, 90, 91),
                "cluster": [0, 0, 0, 1, 1],
                "centroid_distance": [0.1, 0.3, 0.2, 0.5, 0.5],
            }
        )
        for mode in ("published", "greedy"):
            selection = SemDeDup(distance=0.01, mode=mode)(signals, seed=0)
            assert selection.keep.tolist() == [False, True, False, False, True]
            assert selection.rival.tolist() == [1, -1, 1, 4, -1]

    @pytest.mark.parametrize("mode", ["published", "greedy"])
    def test_an_exact_copy_goes_even_at_distance_zero(self, mode):
        vectors = np.repeat(unit_rows(2, 384), 3, axis=0)
        signals = rows(embedding=vectors, cluster=[0] * 6, centroid_distance=[0.1] * 6)
        selection = SemDeDup(distance=0.0, mode=mode)(signals, seed=0)
        assert selection.keep.tolist() == [True, False, False] * 2
        assert selection.rival.tolist() == [-1, 0, 0, -1, 3, 3]

    def test_a_row_at_the_border_is_dropped_and_hides_nobody_in_greedy_mode(self):
        signals = rows(
            embedding=unit(0, 10, 20), cluster=[0] * 3, centroid_distance=[0.3, 0.2, 0.1]
        )
        border = float(SemDeDup()(signals, seed=0).score[1])
        selection = SemDeDup(distance=border, mode="greedy")(signals, seed=0)
        assert selection.keep.tolist() == [True, False, True]

    @pytest.mark.parametrize("block", [1, 2, 8])
    def test_of_two_kept_rows_as_near_the_earlier_is_the_rival(self, monkeypatch, block):
        monkeypatch.setattr(semdedup, "_BLOCK", block)
        signals = rows(
            embedding=[[1, 0], [0, 1], [0.5**0.5, 0.5**0.5]],
            cluster=[0] * 3,
            centroid_distance=[0.3, 0.2, 0.1],
        )
        selection = SemDeDup(distance=0.3, mode="greedy")(signals, seed=0)
        assert selection.rival.tolist() == [-1, -1, 0]

    def test_clusters_do_not_see_each_other(self):
        signals = rows(
            embedding=unit(0, 0, 0, 0), cluster=[0, 1, 0, 1], centroid_distance=[0.0] * 4
        )
        selection = SemDeDup(distance=0.0)(signals, seed=0)
        assert selection.keep.tolist() == [True, True, False, False]
        assert selection.score[2:].tolist() == [0.0, 0.0]

    def test_one_cluster_in_the_order_of_ids_is_near_duplicate(self):
        vectors = unit_rows(300, 4)
        signals = rows(
            embedding=vectors, cluster=np.zeros(300, int), centroid_distance=np.zeros(300)
        )
        mine = SemDeDup(distance=0.02)(signals, seed=0)
        other = NearDuplicate(distance=0.02)(signals, seed=0)
        assert mine.keep.tolist() == other.keep.tolist()
        np.testing.assert_allclose(mine.score, other.score, atol=1e-6)
        assert 0 < mine.kept < 300

    @settings(max_examples=40, deadline=None)
    @given(
        n=st.integers(0, 60),
        clusters=st.integers(1, 4),
        block=st.integers(1, 9),
        distance=st.sampled_from([0.0, 0.02, 0.1, 0.5]),
        mode=st.sampled_from(["published", "greedy"]),
        seed=st.integers(0, 1000),
    )
    def test_it_is_the_definition_in_blocks_of_any_size(
        self, n, clusters, block, distance, mode, seed
    ):
        rng = np.random.default_rng(seed)
        vectors = unit_rows(n, 3, seed)
        if n > 4:
            vectors[n // 2] = vectors[0]
        cluster = rng.integers(0, clusters, n)
        away = rng.choice([0.1, 0.2, 0.3], n).astype(np.float32)
        signals = Signals(
            {
                "id": rng.permutation(n),
                "embedding": vectors,
                "cluster": cluster,
                "centroid_distance": away,
            }
        )
        keep = np.zeros(n, bool)
        seen = []
        for row in sorted(range(n), key=lambda r: (-away[r], signals["id"][r])):
            others = [r for r in seen if cluster[r] == cluster[row]]
            cosine = [float(vectors[row].astype(float) @ vectors[r]) for r in others]
            apart = 2.0 if not others else max(0.0, 1 - max(cosine))
            if abs(apart - distance) < 1e-5 and apart > 1e-6:
                return  # too near to the border for float32
            keep[row] = apart > max(distance, 1e-6)
            if mode == "published" or keep[row]:
                seen.append(row)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(semdedup, "_BLOCK", block)
            selection = SemDeDup(distance=distance, mode=mode)(signals, seed=0)
        assert selection.keep.tolist() == keep.tolist()
        lost = selection.rival[~keep]
        assert keep[lost].all()
        assert (cluster[lost] == cluster[~keep]).all()

    def test_greedy_covers_and_parts(self):
        vectors = unit_rows(400, 3)
        signals = rows(
            embedding=vectors,
            cluster=np.arange(400) % 2,
            centroid_distance=np.random.default_rng(0).random(400),
        )
        selection = SemDeDup(distance=0.05, mode="greedy")(signals, seed=0)
        cosine = vectors @ vectors.T
        kept = np.flatnonzero(selection.keep)
        same = (kept[:, None] % 2 == kept % 2) & ~np.eye(len(kept), dtype=bool)
        assert cosine[np.ix_(kept, kept)][same].max() < 0.95
        dropped = np.flatnonzero(~selection.keep)
        assert len(dropped) > 50
        assert cosine[dropped, selection.rival[dropped]].min() >= 0.95 - 1e-6

    def test_laws_in_greedy_mode(self):
        """What the laws ask, except to be nested in `distance`."""
        rng = np.random.default_rng(2)
        signals = rows(
            embedding=unit_rows(257, 3),
            cluster=rng.integers(0, 5, 257),
            centroid_distance=rng.random(257),
        )
        order = rng.permutation(257)
        for distance in (0.0, 0.05, 0.5, 1.0):
            method = SemDeDup(distance=distance, mode="greedy")
            selection = method(signals, seed=0)
            assert np.array_equal(selection.keep, selection.score > np.float32(distance))
            shuffled = method(signals.take(order), seed=1)
            assert np.array_equal(selection.keep[order], shuffled.keep)
            assert selection.keep[selection.rival[~selection.keep]].all()
        assert not len(method(signals.take([]), seed=0).keep)

    def test_an_unknown_mode_is_refused(self):
        with pytest.raises(InputError, match="`mode` must be one of published, greedy"):
            SemDeDup(mode="hard")
