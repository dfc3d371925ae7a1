import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pruners.weight.quantisers import BITS, CLIPS, Grid, round_to_nearest


def random_weight(rows=6, size=32, seed=0):
    made = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    return made * torch.logspace(-2, 1, rows)[:, None]


def test_symmetric_by_hand():
    # max 1.5 of 2 * 1.5 / 15 = 0.2 a step: 1.5 / 0.2 = 7.5, which rounds to 8 and is cut to 7.
    weight = torch.tensor([[1.5, -0.5, 0.1, 0.0]])
    made = round_to_nearest(weight, Grid(bits=4, group_size=0))
    assert made.codes.tolist() == [[7, -2, 0, 0]]
    assert made.scale.tolist() == [[pytest.approx(0.2)]]
    assert made.zero is None and made.group_size == 4
    torch.testing.assert_close(made.dequantise(), torch.tensor([[1.4, -0.4, 0.0, 0.0]]))


def test_asymmetric_by_hand():
    # Range -0.5 to 1, three steps of 0.5 at 2 bits: zero = -2 + 1 = -1.
    weight = torch.tensor([[1.0, -0.5, 0.3, 0.2]])
    made = round_to_nearest(weight, Grid(bits=2, group_size=0, symmetric=False))
    assert made.zero.tolist() == [[-1]]
    assert made.codes.tolist() == [[1, -2, 0, -1]]
    torch.testing.assert_close(made.dequantise(), torch.tensor([[1.0, -0.5, 0.5, 0.0]]))


@settings(deadline=None)
@given(
    st.sampled_from(BITS), st.booleans(), st.booleans(), st.sampled_from([0, 4, 16]), st.integers()
)
def test_against_the_definition(bits, symmetric, clip, group, seed):
    weight = random_weight(seed=seed % 1000)
    weight[0, :4] = 0
    weight[1] = weight[1].abs() + 1  # far from 0: the grid still holds it
    made = round_to_nearest(
        weight, Grid(bits=bits, group_size=group, symmetric=symmetric, clip=clip)
    )
    size = group or 32
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert int(made.codes.min()) >= low and int(made.codes.max()) <= high
    values = weight.double().numpy().reshape(-1, size)
    for place, row in enumerate(values):
        top, bottom = max(row.max(), 0), min(row.min(), 0)
        if symmetric:
            top = max(top, -bottom)
            bottom = -top
        options = []
        for share in CLIPS if clip else [1.0]:
            scale = (top - bottom) * share / (2**bits - 1) or 1.0
            zero = 0 if symmetric else np.clip(np.round(low - bottom * share / scale), low, high)
            codes = np.clip(np.round(row / scale + zero), low, high)
            options.append(((codes - zero) * scale, scale))
        error = [((value - row) ** 2).sum() for value, _ in options]
        ours = made.dequantise().double().numpy().reshape(-1, size)[place]
        # Halves may round either way in float32: errors must agree, not codes.
        assert ((ours - row) ** 2).sum() == pytest.approx(min(error), rel=1e-3, abs=1e-9)


def test_error_falls_with_bits_and_with_the_clip_search():
    weight = random_weight(64, 128)
    for symmetric in (True, False):
        errors = [
            float(
                (
                    round_to_nearest(
                        weight, Grid(bits=bits, group_size=32, symmetric=symmetric)
                    ).dequantise()
                    - weight
                ).norm()
            )
            for bits in BITS
        ]
        assert all(a > 1.5 * b for a, b in itertools.pairwise(errors))
        for bits, plain in zip(BITS, errors, strict=True):
            grid = Grid(bits=bits, group_size=32, symmetric=symmetric, clip=True)
            assert float((round_to_nearest(weight, grid).dequantise() - weight).norm()) <= plain


def test_what_a_mask_removed_stays_removed():
    weight = random_weight()
    weight[:, ::3] = 0
    for symmetric, bits in itertools.product((True, False), BITS):
        made = round_to_nearest(weight, Grid(bits=bits, group_size=8, symmetric=symmetric))
        assert not made.dequantise()[:, ::3].any()


def test_tiny_groups_become_zero_or_stay():
    weight = torch.full((1, 4), 1e-42)
    assert round_to_nearest(weight, Grid(group_size=0)).dequantise().isfinite().all()


def test_bad_input():
    with pytest.raises(InputError, match="bits"):
        Grid(bits=5)
    with pytest.raises(InputError, match="group_size"):
        Grid(group_size=-1)
    with pytest.raises(InputError, match="group_size` 5 must divide the matrix's 32"):
        round_to_nearest(random_weight(), Grid(group_size=5))
    weight = random_weight()
    weight[2, 7] = torch.inf
    with pytest.raises(InputError, match="row 2, column 7"):
        round_to_nearest(weight, Grid(group_size=8))
