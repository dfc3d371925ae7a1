"""SparseGPT and GPTQ against a plain loop: one input at a time, in float64, the inverse Hessian
reduced by Gaussian elimination after each."""

import itertools

import numpy as np
import pytest
import torch

from prunery.errors import InputError
from prunery.pruners.weight.inverse_factor import inverse_factor
from prunery.pruners.weight.masks import keep_count, keep_count_by_row
from prunery.pruners.weight.output_error import output_error
from prunery.pruners.weight.quantisers import Grid, round_to_nearest
from prunery.pruners.weight.second_order import Chosen, solve
from prunery.pruners.weight.sparsegpt import SparseGpt

OUT, IN, TOKENS = 12, 48, 400


def score(weight, diagonal):
    return SparseGpt().importance(weight=weight, hessian_diagonal=diagonal)


def problem(seed=0, outs=OUT, inputs=IN, tokens=TOKENS):
    """A weight matrix and correlated inputs of unlike size."""
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(outs, inputs, generator=made)
    mixed = torch.randn(tokens, inputs, generator=made) @ (
        torch.eye(inputs) + 0.5 * torch.randn(inputs, inputs, generator=made)
    )
    x = mixed * torch.logspace(-0.7, 0.7, inputs)
    return weight, x


def gram_of(x):
    return (x.double().T @ x.double()).float()


def plain_inverse(x, damping=0.01):
    """(H + damping * mean diagonal)^-1 with H = 2/n X'X, float64; dead inputs as documented."""
    x = x.double().numpy()
    hessian = 2 / len(x) * x.T @ x
    diagonal = np.diag(hessian).copy()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if (~dead).any() else 1.0
    hessian[dead, dead] = mean
    return np.linalg.inv(hessian + damping * mean * np.eye(len(hessian))), dead


def pivots(inverse):
    """The diagonal entry of the inverse at each input once those before it are eliminated."""
    inverse, found = inverse.copy(), []
    for i in range(len(inverse)):
        found.append(inverse[i, i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return np.array(found)


def smallest_out(values, keep):
    """True but at the lowest, exactly `keep` of a block, the first of equals kept."""
    flat = values.reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-flat[i], i))
    mask = np.zeros(flat.size, bool)
    mask[order[:keep]] = True
    return mask.reshape(values.shape)


def plain_walk(
    weight,
    x,
    *,
    block=16,
    together=16,
    keep=None,
    pattern=None,
    mask=None,
    bits=None,
    group=None,
    symmetric=True,
    damping=0.01,
):
    """One input at a time."""
    w = weight.double().numpy().copy()
    inverse, dead = plain_inverse(x, damping)
    w[:, dead] = 0
    d = pivots(inverse)
    outs, inputs = w.shape
    chosen = np.ones_like(w, bool) if mask is None else mask.numpy().copy()
    scales = np.ones((outs, inputs)), np.zeros((outs, inputs))
    made = np.zeros_like(w)
    for i in range(inputs):
        if keep is not None and i % block == 0:
            end = min(i + block, inputs)
            left = keep * end // inputs - keep * i // inputs
        if keep is not None and i % block % together == 0:
            rest = smallest_out(w[:, i:end] ** 2 / d[i:end], left)
            stop = min(i + together, end)
            chosen[:, i:stop] = rest[:, : stop - i]
            left -= chosen[:, i:stop].sum()
        if pattern is not None and i % pattern[1] == 0:
            part = slice(i, i + pattern[1])
            for row in range(outs):
                chosen[row, part] = smallest_out(w[row, part] ** 2 / d[part], pattern[0])
        if bits is not None and i % (group or inputs) == 0:
            part = slice(i, i + (group or inputs))
            known = w[:, part] * chosen[:, part]
            top = np.maximum(known.max(1), 0)
            bottom = np.minimum(known.min(1), 0)
            if symmetric:
                top = np.maximum(top, -bottom)
                bottom = -top
            # Kept as float32, or else the largest weight stands right between two codes.
            scale = ((top - bottom) / (2**bits - 1)).astype(np.float32).astype(np.float64)
            scale[scale == 0] = 1
            low = -(2 ** (bits - 1))
            zero = np.zeros(outs) if symmetric else np.round(low - bottom / scale)
            scales[0][:, part], scales[1][:, part] = scale[:, None], zero[:, None]
        q = w[:, i] * chosen[:, i]
        if bits is not None:
            scale, zero = scales[0][:, i], scales[1][:, i]
            low = -(2 ** (bits - 1))
            q = (np.clip(np.round(q / scale + zero), low, -low - 1) - zero) * scale
        made[:, i] = q
        error = (w[:, i] - q) / inverse[i, i]
        w -= np.outer(error, inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return torch.from_numpy(made), torch.from_numpy(chosen)


def factor_of(x, **options):
    return inverse_factor(gram_of(x), len(x), **options)


DOUBLE = {"dtype": torch.float64}


def test_the_factor_is_the_cholesky_of_the_inverse():
    _, x = problem()
    gram = x.double().T @ x.double()
    factor = inverse_factor(gram, len(x), **DOUBLE)
    inverse, _ = plain_inverse(x)
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.from_numpy(inverse))
    assert not factor.upper.tril(-1).any()
    np.testing.assert_allclose(factor.upper.diagonal().square(), pivots(inverse), rtol=1e-8)
    # Larger than the base of the recursion, and of odd size.
    _, x = problem(inputs=301, tokens=700)
    upper = inverse_factor(x.double().T @ x.double(), 700, **DOUBLE).upper
    torch.testing.assert_close(upper.T @ upper, torch.from_numpy(plain_inverse(x)[0]))


@pytest.mark.parametrize("together", [1, 8, 16, 48])
@pytest.mark.parametrize("block", [1, 5, 16, 48, 100])
@pytest.mark.parametrize("keep", [0, 101, OUT * IN // 2, OUT * IN])
def test_sparsegpt(together, block, keep):
    weight, x = problem()
    gram = x.double().T @ x.double()
    factor = inverse_factor(gram, len(x), **DOUBLE)
    chosen = Chosen(score=score, count=keep, together=together)
    made = solve(weight, factor, chosen=chosen, block=block)
    expected, mask = plain_walk(weight, x, block=block, together=together, keep=keep)
    assert torch.equal(made.mask, mask)
    assert int(made.mask.sum()) == keep
    torch.testing.assert_close(made.weight, expected, rtol=1e-6, atol=1e-8)
    assert not made.weight[~made.mask].any()


@pytest.mark.parametrize(
    "way", [{"together": 32}, {"together": 24}, {"together": 128}, {"pattern": (2, 4)}, {}]
)
def test_runs_inside_a_block_change_nothing(way):
    """Blocks of several runs of inputs, by the walk that updates all inputs at each step."""
    weight, x = problem(inputs=144, tokens=400)
    factor = inverse_factor(x.double().T @ x.double(), len(x), **DOUBLE)
    if "pattern" in way:
        made = solve(weight, factor, chosen=Chosen(score=score, **way), block=128)
        expected, mask = plain_walk(weight, x, **way)
    elif way:
        count = weight.numel() // 2
        chosen = Chosen(score=score, count=count, **way)
        made = solve(weight, factor, chosen=chosen, block=128)
        expected, mask = plain_walk(weight, x, block=128, keep=count, **way)
    else:
        made = solve(weight, factor, grid=Grid(bits=3, group_size=48), block=96)
        expected, mask = plain_walk(weight, x, bits=3, group=48)[0], None
    assert mask is None or torch.equal(made.mask, mask)
    torch.testing.assert_close(made.weight, expected, rtol=1e-6, atol=1e-8)


def test_masks_fixed_for_fewer_inputs_at_a_time_lose_less():
    for seed in range(3):
        weight, x = problem(seed, outs=64, inputs=128, tokens=1500)
        errors = [
            output_error(
                solve(
                    weight, factor_of(x), chosen=Chosen(score=score, count=4096, together=t)
                ).weight,
                weight,
                gram_of(x),
            )
            for t in (128, 32, None)
        ]
        assert errors[0] > 1.02 * errors[1] > errors[2]


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 3)])
@pytest.mark.parametrize("block", [10, 24])
def test_sparsegpt_n_of_m(pattern, block):
    weight, x = problem()
    factor = inverse_factor(x.double().T @ x.double(), len(x), **DOUBLE)
    made = solve(weight, factor, chosen=Chosen(score=score, pattern=pattern), block=block)
    expected, mask = plain_walk(weight, x, pattern=pattern)
    assert torch.equal(made.mask, mask)
    assert (made.mask.view(OUT, -1, pattern[1]).sum(2) == pattern[0]).all()
    torch.testing.assert_close(made.weight, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "block"), [(0, 16), (8, 16), (12, 16), (24, 16), (16, 48)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq(bits, group, block, symmetric):
    weight, x = problem()
    factor = inverse_factor(x.double().T @ x.double(), len(x), **DOUBLE)
    grid = Grid(bits=bits, group_size=group, symmetric=symmetric)
    made = solve(weight, factor, grid=grid, block=block)
    expected, _ = plain_walk(weight, x, bits=bits, group=group, symmetric=symmetric)
    torch.testing.assert_close(made.weight, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(made.quantised.dequantise().double(), made.weight, rtol=1e-6, atol=0)
    assert made.mask is None


@pytest.mark.parametrize("way", ["chosen", "pattern", "mask", "mask of the largest"])
def test_sparse_and_quantised_together(way):
    weight, x = problem()
    factor = inverse_factor(x.double().T @ x.double(), len(x), **DOUBLE)
    given, plain = {}, {}
    if way == "chosen":
        given["chosen"], plain["keep"] = Chosen(score=score, count=300), 300
    elif way == "pattern":
        given["chosen"], plain["pattern"] = Chosen(score=score, pattern=(2, 4)), (2, 4)
    else:
        # Where the largest go, a group's scale is of what stays.
        sign = -1 if "largest" in way else 1
        given["mask"] = plain["mask"] = keep_count(sign * weight.abs(), 300)
    made = solve(weight, factor, grid=Grid(bits=4, group_size=8), block=16, **given)
    expected, mask = plain_walk(weight, x, bits=4, group=8, block=16, **plain)
    assert torch.equal(made.mask, mask)
    torch.testing.assert_close(made.weight, expected, rtol=1e-4, atol=1e-5)
    assert not made.quantised.dequantise()[~made.mask].any()


def test_group_scales_come_from_the_weights_as_they_stand():
    """Groups smaller than the block: scales of the dense weights would be others."""
    weight, x = problem()
    made = solve(weight, factor_of(x), grid=Grid(bits=3, group_size=8), block=48)
    stale, _ = Grid(bits=3, group_size=8).fit_matrix(weight)
    assert torch.equal(made.quantised.scale[:, 0], stale[:, 0])
    assert not torch.allclose(made.quantised.scale[:, 1:], stale[:, 1:], rtol=1e-3)


def test_act_order_is_the_walk_over_permuted_inputs():
    weight, x = problem()
    order = x.square().sum(0).argsort(descending=True, stable=True)
    made = solve(
        weight, factor_of(x, act_order=True, **DOUBLE), grid=Grid(bits=3, group_size=0), block=16
    )
    expected, _ = plain_walk(weight[:, order], x[:, order], bits=3, group=0)
    torch.testing.assert_close(made.weight[:, order], expected, rtol=1e-4, atol=1e-5)
    grouped = solve(weight, factor_of(x, act_order=True), grid=Grid(bits=3, group_size=8), block=16)
    # Scales of consecutive inputs, of the weights before the walk.
    torch.testing.assert_close(
        grouped.quantised.scale, Grid(bits=3, group_size=8).fit_matrix(weight)[0]
    )
    torch.testing.assert_close(grouped.quantised.dequantise(), grouped.weight)


def test_float32_is_near_float64():
    weight, x = problem(inputs=192, outs=64, tokens=2000)
    gram = gram_of(x)
    errors = []
    for dtype in (torch.float32, torch.float64):
        factor = inverse_factor(gram, len(x), dtype=dtype)
        made = solve(weight, factor, chosen=Chosen(score=score, count=64 * 96))
        errors.append(output_error(made.weight, weight, gram))
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_the_order_of_methods_on_correlated_inputs():
    for seed in range(3):
        weight, x = problem(seed, outs=64, inputs=128, tokens=1500)
        gram = gram_of(x)
        norm = x.square().sum(0).sqrt()
        half = weight.numel() // 2
        magnitude = weight * keep_count(weight.abs(), half)
        wanda = weight * keep_count_by_row(weight.abs() * norm, half)
        walked = solve(weight, factor_of(x), chosen=Chosen(score=score, count=half)).weight
        mended = solve(weight, factor_of(x), mask=wanda != 0).weight
        errors = [output_error(made, weight, gram) for made in (magnitude, wanda, mended, walked)]
        assert all(a > b for a, b in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rounding_and_error_falls_with_bits(symmetric):
    weight, x = problem(outs=64, inputs=128, tokens=1500)
    # Most of the inputs' energy in a few directions, as in language models.
    made = torch.Generator().manual_seed(7)
    few = torch.randn(1500, 24, generator=made) @ torch.randn(24, 128, generator=made)
    x = few + 0.3 * x
    gram = gram_of(x)
    errors = {"gptq": [], "rtn": []}
    for bits in (2, 3, 4, 8):
        grid = Grid(bits=bits, group_size=32, symmetric=symmetric)
        solved = solve(weight, factor_of(x), grid=grid).weight
        errors["gptq"].append(output_error(solved, weight, gram))
        rounded = round_to_nearest(weight, grid).dequantise()
        errors["rtn"].append(output_error(rounded, weight, gram))
    assert all(a < 0.8 * b for a, b in zip(errors["gptq"], errors["rtn"], strict=True))
    for series in errors.values():
        assert all(a > b for a, b in itertools.pairwise(series))


def test_the_error_is_that_of_the_outputs():
    weight, x = problem(inputs=600, tokens=300)  # more inputs than a block of the sum
    made = weight * keep_count(weight.abs(), weight.numel() // 3)
    outputs = x.double() @ weight.double().T
    expected = float((x.double() @ made.double().T - outputs).norm() / outputs.norm())
    assert output_error(made, weight, gram_of(x)) == pytest.approx(expected, rel=1e-4)
    assert output_error(weight, weight, gram_of(x)) == 0.0
    assert output_error(weight, weight * 0, gram_of(x)) == float("inf")


def test_dead_inputs_are_zeroed_and_their_weights_lost_without_harm():
    weight, x = problem()
    x[:, [3, 20]] = 0
    made = solve(weight, factor_of(x, **DOUBLE), chosen=Chosen(score=score, count=300), block=16)
    assert not made.weight[:, [3, 20]].any()
    expected, _ = plain_walk(weight, x, keep=300)
    torch.testing.assert_close(made.weight, expected, rtol=1e-4, atol=1e-5)


def test_the_scale_of_the_inputs_does_not_matter_even_with_dead_ones():
    weight, x = problem()
    x[:, [3, 20]] = 0
    some = [
        solve(weight, factor_of(x * by, **DOUBLE), grid=Grid(bits=3, group_size=8)).weight
        for by in (1, 2**10)
    ]
    torch.testing.assert_close(*some, rtol=1e-6, atol=1e-8)


def test_all_inputs_dead():
    weight, x = problem()
    made = solve(weight, factor_of(x * 0), grid=Grid(bits=4, group_size=8))
    assert not made.weight.any()


def test_a_singular_hessian_is_damped_until_it_factorises():
    weight, x = problem(tokens=3)  # rank 3 of 48
    factor = inverse_factor(gram_of(x), 3, damping=1e-12)
    assert factor.damping > 1e-12
    assert solve(weight, factor, grid=Grid(bits=4, group_size=8)).weight.isfinite().all()
    assert inverse_factor(gram_of(x), 3).damping == 0.01
    never = torch.tensor([[1.0, 5e9], [5e9, 1.0]])  # no sum of squares: no damping helps
    with pytest.raises(InputError, match="cannot be factorised"):
        inverse_factor(never, 3)


def test_the_weights_given_are_not_written_to():
    weight, x = problem()
    before, gram = weight.clone(), gram_of(x)
    kept = gram.clone()
    factor = inverse_factor(gram, len(x), act_order=True)
    solve(weight, factor, mask=keep_count(weight.abs(), 200), grid=Grid(bits=4, group_size=8))
    assert torch.equal(weight, before) and torch.equal(gram, kept)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gram_that_is_no_number_is_refused(poison):
    _, x = problem()
    gram = gram_of(x)
    gram[4, 9] = poison
    with pytest.raises(InputError, match="inputs 4 and 9"):
        inverse_factor(gram, len(x))


def test_bad_input():
    weight, x = problem()
    gram, factor = gram_of(x), factor_of(x)
    with pytest.raises(InputError, match=r"\(in, in\)"):
        inverse_factor(gram[:5], 3)
    with pytest.raises(InputError, match="at least one token"):
        inverse_factor(gram, 0)
    with pytest.raises(InputError, match="negative diagonal.*input 0"):
        inverse_factor(-gram, 3)
    with pytest.raises(InputError, match="48 inputs"):
        solve(weight[:, :9], factor)
    with pytest.raises(InputError, match="given alone"):
        solve(weight, factor, mask=weight > 0, chosen=Chosen(score=score, count=3))
    with pytest.raises(InputError, match="5 must divide"):
        solve(weight, factor, grid=Grid(group_size=5))
    with pytest.raises(InputError, match="2:5.*48 inputs"):
        solve(weight, factor, chosen=Chosen(score=score, pattern=(2, 5)))
    ordered = inverse_factor(gram, 3, act_order=True)
    with pytest.raises(InputError, match="act_order"):
        solve(weight, ordered, chosen=Chosen(score=score, pattern=(2, 4)))
    with pytest.raises(InputError, match="block"):
        solve(weight, factor, block=0)
    with pytest.raises(InputError, match="together"):
        solve(weight, factor, chosen=Chosen(score=score, count=3, together=0))
