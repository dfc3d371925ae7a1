"""Golden cases of the methods that keep a share of tokens, worked by hand."""

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pruners import rules
from prunery.pruners.token.excess_loss import ExcessLoss
from prunery.pruners.token.perplexity_tokens import PerplexityTokens
from prunery.pruners.token.random_tokens import RandomTokens
from prunery.pruners.token.sstoken import SsToken
from prunery.pruners.token.token_cleaning import TokenCleaning

from .samples import of_sample, tokens

SS = {
    # REL = history - loss: 2, 0, 1, -2; stretched: 1, 0.5, 0.75, 0.
    7: {
        "loss": [1.0, 1.0, 1.0, 3.0],
        "history_loss": [3.0, 1.0, 2.0, 1.0],
        "prompt_attention": [0.1, 0.9, 0.2, 0.3],
    },
    # REL: 0.5, 0.1; stretched: 1, 0.
    3: {
        "loss": [0.5, 0.5],
        "history_loss": [1.0, 0.6],
        "prompt_attention": [0.0, 0.8],
    },
}


class TestSsToken:
    def test_golden(self):
        # Halves of the sums: 0.55, 0.70, 0.475, 0.15 | 0.5, 0.4. ceil(0.5 * 4) = 2, and 1.
        signals = tokens(SS)
        selection = SsToken(tokens=0.5)(signals, seed=0)
        np.testing.assert_allclose(selection.score, [0.55, 0.7, 0.475, 0.15, 0.5, 0.4], atol=1e-6)
        assert of_sample(signals, selection, 7) == [True, True, False, False]
        assert of_sample(signals, selection, 3) == [True, False]
        assert selection.reason_names()[:3] == ["high_score", "high_score", "low_score"]

    def test_gamma(self):
        signals = tokens(SS)
        alone = SsToken(tokens=0.25, gamma=1.0)(signals, seed=0)
        assert of_sample(signals, alone, 7) == [True, False, False, False]
        attention = SsToken(tokens=0.25, gamma=0.0)(signals, seed=0)
        assert of_sample(signals, attention, 7) == [False, True, False, False]
        assert of_sample(signals, attention, 3) == [False, True]
        tilted = SsToken(tokens=0.5, gamma=0.25)(signals, seed=0)
        np.testing.assert_allclose(tilted.score[0], 0.25 * 1 + 0.75 * 0.1, atol=1e-6)

    def test_share_is_rounded_up_exactly(self):
        rng = np.random.default_rng(0)
        given = {name: rng.random(100).tolist() for name in SS[7]}
        # 0.55 * 100 is 55.00000000000001 in floats.
        assert SsToken(tokens=0.55)(tokens({1: given}), seed=0).kept == 55
        assert SsToken(tokens=0.551)(tokens({1: given}), seed=0).kept == 56

    def test_constant_excess_loss_leaves_the_choice_to_attention(self):
        # Before the first update both models are one; rounding of 1e-8 must not decide.
        loss = np.array([0.5, 0.5 + 6e-8, 0.5], np.float32)
        given = {
            "loss": loss.tolist(),
            "history_loss": [0.5] * 3,
            "prompt_attention": [0.5, 0.2, 0.4],
        }
        selection = SsToken(tokens=0.6)(tokens({1: given}), seed=0)
        np.testing.assert_allclose(selection.score, [0.5, 0.35, 0.45], atol=1e-6)
        assert selection.keep.tolist() == [True, False, True]

    def test_detrend_takes_off_what_the_place_explains(self):
        # Uniform attention over all keys up to its own: 6 prompt tokens of position + 1 keys.
        position = np.arange(6, 26)
        given = {
            "loss": [1.0] * 20,
            "history_loss": [1.0] * 20,
            "prompt_attention": (6 / (position + 1)).tolist(),
            "token_position": position.tolist(),
        }
        given["prompt_attention"][13] += 0.05
        signals = tokens({1: given})
        plain = SsToken(tokens=0.05)(signals, seed=0)
        assert np.flatnonzero(plain.keep).tolist() == [0]
        detrended = SsToken(tokens=0.05, detrend=True)(signals, seed=0)
        assert np.flatnonzero(detrended.keep).tolist() == [13]

    def test_detrend_is_least_squares(self):
        rng = np.random.default_rng(2)
        attention = rng.random(9)
        given = {
            "loss": [1.0] * 9,
            "history_loss": [1.0] * 9,
            "prompt_attention": attention.tolist(),
        }
        place = 1.0 / (np.arange(10, 19) + 1.0)
        slope, _ = np.polyfit(place, attention.astype(np.float32), 1)
        expected = attention - slope * (place - place.mean())
        score = SsToken(gamma=0.0, detrend=True)(tokens({4: given}), seed=0).score
        np.testing.assert_allclose(score, expected, atol=1e-5)

    def test_detrend_of_one_token(self):
        given = {"loss": [1.0], "history_loss": [2.0], "prompt_attention": [0.3]}
        selection = SsToken(detrend=True)(tokens({4: given}), seed=0)
        np.testing.assert_allclose(selection.score, [0.5 * 0.5 + 0.5 * 0.3], atol=1e-6)
        assert selection.keep.tolist() == [True]

    def test_order_of_rows(self):
        signals = tokens(SS)
        order = [4, 0, 3, 5, 1, 2]
        shuffled = SsToken(detrend=True)(signals.take(order), seed=0)
        assert np.array_equal(shuffled.score, SsToken(detrend=True)(signals, seed=0).score[order])

    def test_gamma_out_of_range(self):
        with pytest.raises(InputError, match="gamma"):
            SsToken(gamma=1.1)


TWO = {
    # Excess: 1.0, -0.5, 0.25, 0.25 | 3.0, 2.0.
    5: {"loss": [2.0, 1.0, 0.5, 1.25], "reference_loss": [1.0, 1.5, 0.25, 1.0]},
    9: {"loss": [3.5, 2.5], "reference_loss": [0.5, 0.5]},
}


class TestExcessLoss:
    def test_golden(self):
        signals = tokens(TWO)
        selection = ExcessLoss(tokens=0.5)(signals, seed=0)
        np.testing.assert_allclose(selection.score, [1.0, -0.5, 0.25, 0.25, 3.0, 2.0])
        # Of the tie the earlier one stays.
        assert of_sample(signals, selection, 5) == [True, False, True, False]
        assert of_sample(signals, selection, 9) == [True, False]
        assert selection.dropped() == {"low_excess_loss": 3}

    def test_over_the_table(self):
        selection = ExcessLoss(tokens=0.5, over="table")(tokens(TWO), seed=0)
        assert selection.keep.tolist() == [True, False, False, False, True, True]

    def test_unknown_place_of_ranking(self):
        with pytest.raises(InputError, match="`over`"):
            ExcessLoss(over="batch")


class TestTokenCleaning:
    def test_golden(self):
        selection = TokenCleaning(tokens=0.6)(tokens(TWO), seed=0)
        # ceil(3.6) = 4 of 6: 3.0, 2.0, 1.0 and one of the two at 0.25, the earlier.
        assert selection.keep.tolist() == [True, False, True, False, True, True]

    def test_a_sample_may_lose_all(self):
        signals = tokens({k: {**v, "protected": [False] * len(v["loss"])} for k, v in TWO.items()})
        selection = TokenCleaning(tokens=0.3)(signals, seed=0)
        assert of_sample(signals, selection, 5) == [False] * 4

    def test_protected_tokens_follow_their_sample_and_count(self):
        flags = {5: [False, True, False, False], 9: [False, True]}
        signals = tokens({k: {**v, "protected": flags[k]} for k, v in TWO.items()})
        # Order: 3.0, its sample's protected one, 1.0, its protected one, 0.25, 0.25.
        for count, expected in [
            (2, [False, False, False, False, True, True]),
            (4, [True, True, False, False, True, True]),
            (5, [True, True, True, False, True, True]),
        ]:
            selection = TokenCleaning(tokens=count / 6)(signals, seed=0)
            assert selection.keep.tolist() == expected
        # The border falls between 3.0 and its protected one: that one is kept on top.
        assert TokenCleaning(tokens=1 / 6)(signals, seed=0).keep.tolist() == [
            *[False] * 4,
            *[True] * 2,
        ]
        free = TokenCleaning(tokens=0.5, keep_protected=False)(signals, seed=0)
        assert free.keep.tolist() == [True, False, False, False, True, True]

    def test_a_protected_token_stands_behind_its_sample_s_best(self):
        given = {"loss": [0.0, 2.0, 1.0], "reference_loss": [0.0] * 3}
        signals = tokens({5: {**given, "protected": [True, False, False]}})
        selection = TokenCleaning(tokens=1 / 3)(signals, seed=0)
        assert selection.keep.tolist() == [True, True, False]

    def test_nothing_but_protected_tokens(self):
        signals = tokens({k: {**v, "protected": [True] * len(v["loss"])} for k, v in TWO.items()})
        selection = TokenCleaning(tokens=1 / 6)(signals, seed=0)
        assert of_sample(signals, selection, 9) == [True, True]
        assert of_sample(signals, selection, 5) == [False] * 4


class TestPerplexityTokens:
    def test_golden(self):
        signals = tokens({2: {"loss": [0.5, 3.0, 0.5, 1.0]}, 1: {"loss": [2.0]}})
        selection = PerplexityTokens(tokens=0.25)(signals, seed=0)
        assert selection.keep.tolist() == [True, False, False, False, True]
        assert selection.score.tolist() == [-0.5, -3.0, -0.5, -1.0, -2.0]
        assert selection.reason_names()[:2] == ["low_loss", "high_loss"]

    def test_other_direction(self):
        signals = tokens({2: {"loss": [0.5, 3.0, 0.5, 1.0]}})
        selection = PerplexityTokens(tokens=0.5, direction="drop_lowest")(signals, seed=0)
        assert selection.keep.tolist() == [False, True, False, True]
        assert selection.reason_names()[:2] == ["low_loss", "high_loss"]

    def test_unknown_direction(self):
        with pytest.raises(InputError, match="direction"):
            PerplexityTokens(direction="drop_all")


class TestRandomTokens:
    def test_golden(self):
        signals = tokens({2: {"loss": [0.0] * 5}, 1: {"loss": [0.0] * 2}})
        drawn = rules.uniform(11, signals["id"])
        selection = RandomTokens(tokens=0.5)(signals, seed=11)
        assert set(np.flatnonzero(selection.keep)) == {
            *np.argsort(-drawn[:5])[:3],
            5 + np.argmax(drawn[5:]),
        }
        np.testing.assert_allclose(selection.score, drawn, rtol=1e-6)

    def test_protected_tokens_stay_and_count(self):
        flags = [False, False, False, True]
        signals = tokens({k: {"loss": [0.0] * 4, "protected": flags} for k in range(1, 200)})
        selection = RandomTokens(tokens=0.5)(signals, seed=1)
        protected = signals["protected"]
        assert selection.keep[protected].all()
        assert selection.kept == 2 * 199
        assert selection.reason_names()[3] == "protected"
        free = RandomTokens(tokens=0.5, keep_protected=False)(signals, seed=1)
        assert 60 < free.keep[protected].sum() < 140
        assert not RandomTokens(tokens=0.0)(signals, seed=1).keep.any()
