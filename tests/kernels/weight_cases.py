"""Inputs for the kernels over weights, and what they should give, straight from the words."""

import math

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


def act_of(value, name):
    """Activations by their formulas, float64."""
    if name == "silu":
        return value * torch.special.expit(value)
    if name == "relu":
        return value.clamp(min=0)
    if name == "gelu":
        return value * 0.5 * torch.special.erfc(-value / math.sqrt(2))
    inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
    return 0.5 * value * (1 + torch.tanh(inner))


def mlp(seed, rows, size, neurons, columns, dtype=torch.float32):
    """x, gate, up, down_t of about unit results."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=made)
    gate, up = (torch.randn(neurons, size, generator=made) / size**0.5 for _ in range(2))
    down_t = torch.randn(neurons, columns, generator=made) / neurons**0.5
    return [one.to(dtype) for one in (x, gate, up, down_t)]


def mlp_of(x, gate, up, down_t, threshold, activation="silu", rule="gate"):
    """(B, d_out) float64, neuron by neuron; and the least distance of any value to its border."""
    out = torch.zeros(len(x), down_t.shape[1], dtype=torch.float64)
    limits = torch.as_tensor(threshold).double().expand(len(gate))
    nearest = math.inf
    for b, row in enumerate(x.double()):
        for i, limit in enumerate(limits):
            acted = act_of(gate[i].double() @ row, activation)
            inner = acted * (up[i].double() @ row)
            tested = abs(inner if rule == "product" else acted)
            nearest = min(nearest, float(abs(tested - limit)))
            if tested > limit:
                out[b] += inner * down_t[i].double()
    return out, nearest


def quantised(seed, rows, outputs, size, group_size, dtype=torch.float32, shifted=False):
    """x (rows, size), 4-bit values, scales, and zero points or None."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=made).to(dtype)
    values = torch.randint(-8, 8, (outputs, size), generator=made).to(torch.int8)
    groups = -(-size // group_size)
    scale = (torch.rand(outputs, groups, generator=made) + 0.5) / (5 * size**0.5)
    zero = torch.randint(-8, 8, (outputs, groups), generator=made).to(torch.int8)
    return x, values, scale.to(torch.bfloat16), zero if shifted else None


def quantised_product(x, values, scale, zero, group_size):
    """x times the transpose of (value - zero) * scale, weight by weight, float64."""
    group = torch.arange(values.shape[1]) // group_size
    weight = values.double()
    if zero is not None:
        weight = weight - zero.double()[:, group]
    return x.double() @ (weight * scale.double()[:, group]).T
