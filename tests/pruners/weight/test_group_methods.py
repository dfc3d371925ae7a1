"""Methods over groups, experts and layers against values worked out by hand."""

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pruners import rules
from prunery.pruners.contract import Signals
from prunery.pruners.weight.block_influence import BlockInfluence
from prunery.pruners.weight.cfsp import Cfsp
from prunery.pruners.weight.easy_ep import EasyEp
from prunery.pruners.weight.expert_frequency import ExpertFrequency
from prunery.pruners.weight.flap import Flap
from prunery.pruners.weight.llm_pruner import LlmPruner
from prunery.pruners.weight.magnitude_groups import MagnitudeGroups
from prunery.pruners.weight.random_groups import RandomExperts, RandomGroups, RandomLayers
from prunery.pruners.weight.reap import Reap
from prunery.pruners.weight.wanda_sp import WandaSp


def signals(n, **arrays):
    ints = ("part", "cost", "channel_offset", "tensor_offset", "expert_tokens")
    made = {
        name: np.array(values, np.int64 if name in ints else np.float32)
        for name, values in arrays.items()
    }
    return Signals({"id": np.arange(n), **made})


def flap_case(**changes):
    """Layer 0: two heads of two channels, then three neurons."""
    given = dict(  # noqa: C408
        part=[0, 0, 1, 1, 1],
        cost=[8, 8, 3, 3, 3],
        channel_offset=[0, 2, 4, 5, 6, 7],
        channel_variance=[1, 2, 1, 1, 1, 2, 3],
        channel_square=[1, 1, 3, 4, 2, 2, 2],
    )
    return signals(5, **given | changes)


def test_flap_golden():
    # Attention: (V * W)^2 = 1, 4, 9, 16: mean 7.5, unbiased deviation sqrt(129 / 3).
    # Neurons: V * W = 2, 4, 6: z = -1, 0, 1.
    spread = np.sqrt(129 / 3)
    heads = [(-6.5 - 3.5) / 2 / spread, (1.5 + 8.5) / 2 / spread]
    found = Flap(keep=0.4)(flap_case(), seed=0)
    np.testing.assert_allclose(found.score, [*heads, -1, 0, 1], rtol=1e-6)
    # Order: neuron 2 (3), head 1 (11 >= 0.4 * 25 = 10). All others go.
    assert found.keep.tolist() == [False, True, False, False, True]
    assert found.threshold[0] == pytest.approx(heads[1])


def test_flap_counts_parameters_not_groups():
    case = flap_case()
    for keep in np.linspace(0, 1, 21):
        mask = Flap(keep=keep)(case, seed=0).keep
        held, wanted = int(case["cost"][mask].sum()), round(keep * 25, 9)
        assert held >= wanted
        assert held - 8 < wanted or not mask.any()


def test_flap_gives_a_constant_part_no_say():
    case = flap_case(channel_variance=[1, 2, 1, 1, 3, 3, 3])
    assert Flap()(case, seed=0).score[2:].tolist() == [0, 0, 0]
    alone = signals(
        1, part=[1], cost=[3], channel_offset=[0, 1], channel_variance=[2], channel_square=[2]
    )
    assert Flap()(alone, seed=0).score.tolist() == [0]


def test_wanda_sp_golden():
    case = signals(
        3,
        part=[0, 0, 0],
        channel_offset=[0, 2, 4, 5],
        channel_norm=[1, 2, 3, 1, 0.5],
        channel_mass=[2, 1, 1, 0.5, 20],
    )
    found = WandaSp(keep=0.3)(case, seed=0)
    assert found.score.tolist() == [4, 3.5, 10]
    assert found.keep.tolist() == [False, False, True]


def test_cfsp_golden():
    case = signals(
        2, part=[1, 1], down_mass=[1, 2], up_mass=[3, 1], gate_mass=[1, 4], neuron_norm=[2, 1]
    )
    # b = 1: down * norm = 2, 2: halves. up: 3/4, 1/4. gate: 1/5, 4/5. c = 1: times 2 and 1.
    found = Cfsp(keep=0.5)(case, seed=0)
    np.testing.assert_allclose(found.score, [1.45 * 2, 1.55], rtol=1e-6)
    assert found.keep.tolist() == [True, False]
    found = Cfsp(keep=0.5, inner=0, outer=0)(case, seed=0)
    np.testing.assert_allclose(found.score, [1 / 3 + 0.95, 2 / 3 + 1.05], rtol=1e-6)
    assert found.keep.tolist() == [False, True]


def test_cfsp_without_a_gate_has_two_terms():
    case = signals(2, part=[1, 1], down_mass=[1, 1], up_mass=[3, 1], neuron_norm=[1, 1])
    np.testing.assert_allclose(Cfsp()(case, seed=0).score, [1.25, 0.75])


def test_cfsp_is_more_than_a_power_of_the_norm():
    """The published column sum leaves nothing of the down projection in the score."""
    quiet = {"part": [1, 1], "up_mass": [1, 1], "gate_mass": [1, 1], "neuron_norm": [1, 1]}
    found = Cfsp()(signals(2, down_mass=[1, 3], **quiet), seed=0)
    assert found.score[1] > found.score[0]


@pytest.mark.parametrize("value", [-0.1, 9.0, float("nan")])
def test_cfsp_refuses_exponents_out_of_range(value):
    with pytest.raises(InputError, match="inner"):
        Cfsp(inner=value)


WEIGHT = np.array([[1.0, -2.0], [3.0, 1.0]])
GRADIENT = np.array([[1.0, 1.0], [-1.0, 2.0]])
SQUARE = np.array([[2.0, 1.0], [1.0, 4.0]])


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("vector", [1, 1]),  # |1 - 2|, |-3 + 2|
        ("element1", [3, 5]),
        ("element2", [2 + 4, 9 + 4]),
        ("mix", [abs(1 - 1) + abs(-2 - 2), abs(-3 - 4.5) + abs(2 - 2)]),
    ],
)
def test_llm_pruner_salience_golden(order, expected):
    found = LlmPruner(order=order).channel_salience(
        weight=WEIGHT, gradient=GRADIENT, gradient_square=SQUARE
    )
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [("sum", [5, 6, 0]), ("mean", [2.5, 2, 0]), ("max", [3, 4, 0]), ("prod", [6, 4, 0])],
)
def test_llm_pruner_reduces_coupled_matrices_golden(reduce, expected):
    case = signals(3, part=[0] * 3, tensor_offset=[0, 2, 5, 5], tensor_salience=[2, 3, 1, 4, 1])
    assert LlmPruner(reduce=reduce)(case, seed=0).score.tolist() == expected


def test_magnitude_groups_golden():
    case = signals(3, part=[0, 0, 1], weight_square=[9, 16, 4])
    found = MagnitudeGroups(keep=0.5)(case, seed=0)
    assert found.score.tolist() == [3, 4, 2]
    assert found.keep.tolist() == [False, True, True]


def test_random_groups_experts_and_layers_are_the_drawn_numbers():
    ids = np.arange(50, dtype=np.int64)
    drawn = rules.uniform(5, ids).astype(np.float32)
    case = signals(50, part=[0] * 20 + [1] * 30)
    for method in (RandomGroups(keep=0.1), RandomExperts(keep=0.1), RandomLayers(keep=0.1)):
        found = method(case, seed=5)
        assert np.array_equal(found.score, drawn)
        assert found.kept == 5
    assert RandomGroups(keep=0.1)(case, seed=5).keep[:20].sum() == 2
    assert RandomExperts.unit == "expert"
    assert RandomLayers.unit == "layer"


def test_block_influence_golden():
    case = signals(3, block_cosine=[0.5, 0.9, -0.5])
    found = BlockInfluence(keep=0.5)(case, seed=0)
    np.testing.assert_allclose(found.score, [0.5, 0.1, 1.5], rtol=1e-6)
    assert found.keep.tolist() == [True, False, True]


def test_expert_methods_golden():
    case = signals(
        3,
        part=[1, 1, 1],
        expert_tokens=[10, 2, 0],
        expert_gate=[2, 1.5, 0],
        expert_norm=[20, 2, 0],
        expert_reap=[5, 1.5, 0],
        expert_easy=[0.25, 1, 0],
    )
    assert Reap()(case, seed=0).score.tolist() == [0.5, 0.75, 0]
    assert Reap(gated=False)(case, seed=0).score.tolist() == [2, 1, 0]
    assert EasyEp()(case, seed=0).score.tolist() == [0.25, 1, 0]
    assert ExpertFrequency()(case, seed=0).score.tolist() == [10, 2, 0]
    assert ExpertFrequency(count="gate")(case, seed=0).score.tolist() == [2, 1.5, 0]
    assert Reap(keep=0.3)(case, seed=0).keep.tolist() == [False, True, False]
    assert EasyEp(keep=0.5)(case, seed=0).keep.tolist() == [True, True, False]
