import pytest
import torch

from prunery.pruners.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_element_is_found_anywhere(dtype, bad):
    values = torch.linspace(-5, 5, 70, dtype=dtype).reshape(7, 10)
    assert all_finite(values)
    for place in (0, 33, 69):
        spoiled = values.clone()
        spoiled.view(-1)[place] = bad
        assert not all_finite(spoiled)


def test_the_largest_numbers_and_nothing_at_all_are_finite():
    assert all_finite(torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64))
    assert all_finite(torch.empty(0, 3))
    assert not all_finite(torch.full((3,), float("nan")))
