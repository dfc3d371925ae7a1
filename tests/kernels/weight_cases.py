"""Inputs for the kernels over weights, and what they should give, straight from the words."""

import torch


def layer(seed, rows, size, dtype=torch.float32, *, levels=None):
    """(weight, norm); with `levels`, of few small whole numbers, so that many scores are equal."""
    made = torch.Generator().manual_seed(seed)
    if levels:
        weight = torch.randint(-levels, levels + 1, (rows, size), generator=made).to(dtype)
        return weight, torch.randint(0, 3, (size,), generator=made).float()
    norm = torch.randn(size, generator=made).mul(2).exp()
    norm[torch.rand(size, generator=made) < 0.1] = 0.0
    return torch.randn(rows, size, generator=made).to(dtype), norm


def kept_of(weight, norm, group, count):
    """Rows of True and False: `count` of each `group` columns by (score, smaller column)."""
    made = []
    for row in weight.float():
        # The scores are float32 by definition.
        score = (row.abs() * norm).double().tolist()
        chosen = [False] * len(score)
        for start in range(0, len(score), group):
            places = range(start, min(start + group, len(score)))
            for place in sorted(places, key=lambda one: (-score[one], one))[:count]:
                chosen[place] = True
        made.append(chosen)
    return torch.tensor(made, dtype=torch.bool).reshape(weight.shape)


def rotation_of(x, block, signs, inverse):
    """x times the block-diagonal matrix, its entries by the bits that row and column share."""
    size = x.shape[-1]
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(i // block * block, i // block * block + block):
            shared = bin((i % block) & (j % block)).count("1")
            matrix[i, j] = (-1) ** shared / block**0.5
            if signs is not None:
                matrix[i, j] *= float(signs[i])
    return x.double() @ (matrix.T if inverse else matrix)
