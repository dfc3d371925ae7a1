"""Thresholds of activations against their definitions in float64."""

import math

import numpy as np
import pytest
import torch

from prunery.errors import InputError
from prunery.pruners.weight.activation import (
    SizeQuantiles,
    cett_sums,
    chess_level,
    greedy_shares,
    largest_cett,
    neuron_thresholds,
    size_quantile,
    threshold_under,
)

SHARES = [0.0, 0.1, 0.5, 0.7, 0.95, 1.0]


def two_passes(values, shares, parts=7):
    found = SizeQuantiles(shares)
    for part in np.array_split(values, parts):
        found.add(torch.from_numpy(part))
    found.refine()
    for part in np.array_split(values, parts):
        found.add(torch.from_numpy(part))
    return found.values()


@pytest.mark.parametrize("kind", ["skewed", "heavy", "equal", "small", "zeros", "subnormal"])
def test_quantiles_are_order_statistics_of_the_sizes(kind):
    rng = np.random.default_rng(1)
    values = {
        "skewed": rng.normal(0.5, 1, 10_001),
        "heavy": rng.standard_cauchy(5_000) * 1e4,
        "equal": np.full(300, -0.25),
        "small": np.array([3.0, -1.0, 2.0]),
        "zeros": np.where(rng.random(1_000) < 0.8, 0.0, rng.normal(size=1_000)),
        "subnormal": rng.normal(size=500) * 1e-40,
    }[kind].astype(np.float32)
    inorder = np.sort(np.abs(values))
    for share, found in zip(SHARES, two_passes(values, SHARES), strict=True):
        count = math.floor(round(share * len(values), 9))
        assert found == (inorder[count - 1] if count else 0.0)
        assert size_quantile(torch.from_numpy(values), share) == found


def test_half_of_a_skewed_sample_dies_where_a_zero_mean_guess_takes_seven_tenths():
    values = np.random.default_rng(0).normal(0.5, 1, 200_000).astype(np.float32)
    (found,) = two_passes(values, [0.5])
    assert (np.abs(values) <= found).sum() == 100_000
    guess = np.quantile(values, 0.75)  # half of a zero-mean sample lies within its quartiles
    assert (np.abs(values) <= guess).mean() > 0.65


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match="finite"):
        SizeQuantiles([0.5]).add(torch.tensor([1.0, bad]))


def test_another_second_pass_is_noticed():
    found = SizeQuantiles([0.5])
    found.add(torch.arange(10.0))
    found.refine()
    found.add(torch.arange(9.0) / 1000)
    with pytest.raises(InputError, match="both passes"):
        found.values()


def test_half_precision_and_no_values():
    values = torch.randn(1000, dtype=torch.bfloat16)
    found = two_passes(values.float().numpy(), [0.5])
    assert found == [float(values.abs().float().sort().values[499])]
    assert two_passes(np.zeros(0, np.float32), [0.5], 1) == [0.0]


def test_a_share_outside_is_refused():
    with pytest.raises(InputError, match="share"):
        SizeQuantiles([1.2])


def test_chess_by_hand():
    # importances of sample 1: 1*2, 3*1 | 2*2, 1*1 -> 1, 2, 3, 4: half at or under 2
    # of sample 2: 5*2, 2*1 -> 2, 10: half at or under 2; of a third: 8*2, 6*1 -> 6
    samples = [
        torch.tensor([[1.0, -3.0], [2.0, 1.0]]),
        torch.tensor([[-5.0, 2.0]]),
        torch.tensor([[8.0, 6.0]]),
    ]
    mean = torch.tensor([2.0, 1.0])
    levels = [chess_level(sample, mean, 0.5) for sample in samples]
    assert levels == [2, 2, 6]
    layer = sum(levels) / 3
    made = neuron_thresholds(layer, mean)
    torch.testing.assert_close(made, torch.tensor([layer / 2, layer]))


def test_a_neuron_that_gives_nothing_never_lives():
    assert neuron_thresholds(2.0, torch.tensor([4.0, 0.0])).tolist() == [0.5, math.inf]
    assert neuron_thresholds(0.0, torch.tensor([4.0, 0.0])).tolist() == [0.0, 0.0]


def test_cett_against_a_loop():
    rng = np.random.default_rng(2)
    hidden, down = rng.normal(size=(9, 6)), rng.normal(size=(4, 6))
    hidden[3] = 0
    thresholds = [0.0, 0.5, 1.0, 2.0, 100.0]
    expected = []
    for threshold in thresholds:
        total = 0.0
        for token in hidden:
            lost, whole = np.zeros(4), np.zeros(4)
            for j in range(6):
                part = token[j] * down[:, j]
                whole += part
                if np.linalg.norm(part) <= threshold:
                    lost += part
            if np.linalg.norm(whole) > 0:
                total += np.linalg.norm(lost) / np.linalg.norm(whole)
        expected.append(total)
    found = cett_sums(
        torch.tensor(hidden, dtype=torch.float32), torch.tensor(down).float(), thresholds
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found[-1] == pytest.approx(8.0)


def test_the_first_crossing_counts():
    rising, cett = [0.0, 1.0, 2.0, 3.0], [0.0, 0.2, 0.5, 0.3]
    assert threshold_under(rising, cett, 0.35) == 1
    assert threshold_under(rising, cett, 0.6) == 3
    assert threshold_under(rising, cett, -0.1) == -1


def test_greedy_spares_what_hurts():
    weights = {"a": 2.0, "b": 0.1}
    seen = []

    def error(shares):
        seen.append(dict(shares))
        return sum(weights[name] * share**2 for name, share in shares.items())

    made = greedy_shares(error, {"a": 10, "b": 10}, 0.5, 0.1)
    assert made["b"] > made["a"]
    assert sum(made.values()) * 10 >= 0.5 * 20 - 1e-9
    assert sum(made.values()) * 10 < 0.5 * 20 + 1.01
    assert all(0 <= share <= 1 for shares in seen for share in shares.values())


def test_greedy_goes_to_the_end():
    made = greedy_shares(lambda shares: 0.0, {"a": 1, "b": 2}, 1.0, 0.3)
    assert made == {"a": 1.0, "b": 1.0}


def test_the_largest_cett_is_one_that_was_measured():
    asked = []

    def ratio(cett):
        asked.append(cett)
        return 1 + cett**2 if cett < 0.6 else 1.01  # not monotone

    cett, found = largest_cett(ratio, 1.25, 10)
    assert cett in asked and found == ratio(cett) <= 1.25
    assert largest_cett(lambda cett: 1.0, 1.01, 5)[0] == 1.0
    cett, found = largest_cett(lambda cett: 1 + cett, 1.25, 20)
    assert cett == pytest.approx(0.25, abs=1e-5)
    with pytest.raises(InputError, match="larger p"):
        largest_cett(lambda cett: 2.0, 1.01, 5)
