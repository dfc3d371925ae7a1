"""Products with 2:4 sparse weights through torch.sparse, where that was measured to pay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .dispatch import check

if TYPE_CHECKING:
    import torch

MULTIPLE = 64  # of both sides of a weight: what cuSPARSELt and CUTLASS take in every dtype


@dataclass(frozen=True)
class Gate24:
    """From how many rows of x on a weight's 2:4 product is faster than its dense one.

    Attributes
    ----------
    least_rows
        (out, in) to the fewest rows; a shape that is not there is dense.
    """

    least_rows: Mapping[tuple[int, int], int]

    @classmethod
    def of_timings(cls, timings: Iterable[Mapping[str, Any]]) -> Gate24:
        """A gate of what `benchmarks/weight_kernels.py --device cuda` measured.

        Each timing has out, in, rows, and the seconds sparse and dense. The fewest rows of a
        shape are those from which on every larger measured number was faster sparse, by 5 % at
        least.
        """
        shapes: dict[tuple[int, int], list[tuple[int, bool]]] = {}
        for one in timings:
            faster = float(one["sparse"]) * 1.05 <= float(one["dense"])
            shapes.setdefault((int(one["out"]), int(one["in"])), []).append(
                (int(one["rows"]), faster)
            )
        found: dict[tuple[int, int], int] = {}
        for shape, measured in shapes.items():
            for rows, faster in sorted(measured, reverse=True):
                if not faster:
                    break
                found[shape] = rows
        return cls(found)

    def pays(self, outputs: int, inputs: int, rows: int) -> bool:
        """Whether the sparse product is the faster one."""
        least = self.least_rows.get((outputs, inputs))
        return least is not None and rows >= least


# Not measured on any GPU yet: nothing is multiplied sparsely until a table is given.
GATE = Gate24({})


@dataclass(frozen=True)
class Sparse24:
    """A 2:4 weight: dense, and compressed where the device takes it.

    Attributes
    ----------
    dense
        (out, in) floating, two of each four consecutive inputs 0.
    compressed
        torch's semi-structured form of it, or None.
    gate
        When the compressed one is used.
    """

    dense: torch.Tensor
    compressed: torch.Tensor | None
    gate: Gate24


def check_24(weight: torch.Tensor) -> None:
    """Refuse a weight or mask (out, in) with more than 2 of 4 consecutive inputs not 0.

    Raises
    ------
    InputError
        The row and the first column of such four are named; or `in` is no multiple of 4.
    """
    check(
        weight.dim() == 2 and weight.shape[1] % 4 == 0,
        f"2:4 needs (out, in) with in a multiple of 4; found {tuple(weight.shape)}",
    )
    alive = (weight != 0).reshape(len(weight), weight.shape[1] // 4, 4).sum(2)
    bad = alive > 2
    if bool(bad.any()):
        row, group = bad.nonzero()[0].tolist()
        check(
            False,
            f"2:4 leaves at most 2 of 4 inputs; found {int(alive[row, group])} at row {row},"
            f" columns {4 * group} to {4 * group + 3}. Prune with pattern=(2, 4) first",
        )


def sparse24(weight: torch.Tensor, *, gate: Gate24 = GATE) -> Sparse24:
    """A checked 2:4 weight (out, in), compressed where the device and the shape take it.

    Compressed: CUDA of compute capability 8.0 at least, float16 or bfloat16, both sides
    multiples of 64, and a gate that ever says yes to the shape.

    Raises
    ------
    InputError
        The weight is not 2:4.
    """
    import torch

    check_24(weight)
    check(weight.is_floating_point(), f"weight is of a floating dtype; found {weight.dtype}")
    compressed = None
    if (
        weight.is_cuda
        and weight.dtype in (torch.float16, torch.bfloat16)
        and weight.shape[0] % MULTIPLE == weight.shape[1] % MULTIPLE == 0
        and tuple(weight.shape) in gate.least_rows
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    ):
        compressed = torch.sparse.to_sparse_semi_structured(weight.contiguous())
    return Sparse24(weight, compressed, gate)


def sparse24_linear(
    x: torch.Tensor, weight: Sparse24, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., in) times the weight's transpose, plus bias (out,); the dtype of x.

    The compressed product where there is one and the gate says that it pays for so many rows,
    else the dense one: at one row torch.sparse took nine times as long (pytorch#111339).

    Raises
    ------
    InputError
        Shapes or dtypes that do not fit.
    """
    from torch.nn import functional

    outputs, inputs = weight.dense.shape
    check(
        x.dim() >= 1 and x.shape[-1] == inputs and x.dtype == weight.dense.dtype,
        f"x is (..., {inputs}) {weight.dense.dtype}; found {tuple(x.shape)} {x.dtype}",
    )
    rows = x.numel() // inputs if inputs else 0
    if weight.compressed is not None and weight.gate.pays(outputs, inputs, rows):
        flat = functional.linear(x.reshape(-1, inputs), weight.compressed, bias)
        return flat.reshape(*x.shape[:-1], outputs)
    return functional.linear(x, weight.dense, bias)
