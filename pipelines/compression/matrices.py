"""Single weights of a layer's matrices: pruned, put on a grid, or both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...pruners.catalogue import METHODS
from ...pruners.contract import check_choice
from ...pruners.finite import all_finite
from ...pruners.models.block_layouts import Matrix, weight_of
from ...pruners.weight.gblm import Gblm
from ...pruners.weight.inverse_factor import InverseFactor, inverse_factor
from ...pruners.weight.magnitude import Magnitude
from ...pruners.weight.masks import keep_count, keep_count_by_row, keep_pattern, keep_wanda
from ...pruners.weight.output_error import output_error
from ...pruners.weight.quantisers import Grid, Quantised, round_to_nearest
from ...pruners.weight.random_weights import RandomWeights
from ...pruners.weight.second_order import Chosen, solve
from ...pruners.weight.sparsegpt import SparseGpt
from ...pruners.weight.wanda import Wanda
from .compressor import CODES, LayerStatistics, block_tensors
from .walk import LayerVisit, Made

METHOD_NAMES = ("none", "magnitude", "wanda", "sparsegpt", "gblm", "random_weights")
QUANTISERS = ("none", "rtn", "gptq", "rsq")


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixOptions:
    """What is done to matrices; how much, the plan says.

    Attributes
    ----------
    method
        A catalogued method over single weights, or "none".
    method_options
        Of it, without `keep`.
    quantiser
        rtn, gptq, rsq (gptq on the token-weighted gram matrix), or "none". Rotating the model
        first, which RSQ also does, is `rotated_model`'s.
    update
        Weights that stay make up for those that a method other than sparsegpt removed, by the
        walk of sparsegpt under the method's mask.
    measure
        Measure the relative error of each matrix's outputs: gram matrices are collected for it
        even where the method needs none, and multiplied with, which takes about as long as running
        as many tokens as there are inputs.
    damping, block, act_order, symmetric, clip
        See `inverse_factor`, `solve` and `Grid`.
    together
        Of sparsegpt, see `Chosen`; `block` is the published way.
    double
        Solve in float64.
    seed
        Of random_weights.
    """

    method: str = "none"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    quantiser: Literal["none", "rtn", "gptq", "rsq"] = "none"
    update: bool = False
    measure: bool = False
    damping: float = 0.01
    block: int = 128
    together: int | None = None
    act_order: bool = False
    symmetric: bool = True
    clip: bool = True
    double: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHOD_NAMES)
        check_choice("quantiser", self.quantiser, QUANTISERS)
        if not 0.0 < self.damping < float("inf"):
            raise InputError(f"`damping` must be above 0 and finite; found {self.damping}.")

    @property
    def solves(self) -> bool:
        """Whether weights make up for one another."""
        masks = self.method != "none" and (self.update or self.method == "sparsegpt")
        return masks or self.quantiser in ("gptq", "rsq")

    @property
    def gram(self) -> str:
        """The gram matrix that is solved with."""
        return "weighted_gram" if self.quantiser == "rsq" else "gram"


class MatrixCompressor:
    """A `Compressor` for plan rows of unit "weight", one a matrix.

    A row's `keep` of `total` weights stay, or n of each m inputs where the row says so; what stays
    is put on a grid of `bits` where the row says so. Methods that compare within rows of a matrix
    keep as many in every row, and one more in the first rows where they do not divide.

    Pruning and rounding are one walk where the quantiser is gptq or rsq: sparsegpt chooses as it
    goes, the mask of other methods is given. An expert that no token reached is pruned by
    magnitude and rounded to the nearest, and its row says so.
    """

    def __init__(self, options: MatrixOptions) -> None:
        self.options = options
        self.method: Any = None
        if options.method != "none":
            self.method = METHODS[options.method](**dict(options.method_options))
        self.wanted = self._wanted()

    def config(self) -> Mapping[str, Any]:
        """No key of config.json changes."""
        return {}

    def __call__(
        self, visit: LayerVisit, statistics: LayerStatistics, plan: Sequence[Mapping[str, Any]]
    ) -> Made:
        """Change the matrices that the plan names.

        Raises InputError, which names layer and matrix, for a row about no matrix of the block, of
        another size or unit, or that the options cannot carry out; for a pattern or group size
        that does not divide the inputs; and for statistics that are missing or not finite.
        """
        matrices = {matrix.name: matrix for matrix in visit.layout.matrices(visit.block)}
        codes: dict[str, Tensor] = {}
        rows = []
        shared: dict[str, InverseFactor] = {}
        for row in plan:
            where = f"layer {visit.layer}, {row['module'] or 'the whole layer'}"
            try:
                matrix = _matrix(row, matrices)
                here = _Inputs(visit, matrix, statistics)
                quantised, made = self._matrix(visit, matrix, here, row, shared)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
            rows.append(made)
            if quantised is not None:
                codes |= _codes(matrix.name, quantised)
        return {**block_tensors(visit), **codes}, rows

    def _wanted(self) -> frozenset[str]:
        options, names = self.options, set()
        if isinstance(self.method, Wanda | Gblm):
            names.add("sum_squares")
        if isinstance(self.method, Gblm):
            names |= {_gradient(self.method), "gradient_rows"}
        if options.solves:
            names.add(options.gram)
        if options.measure:
            names.add("gram")
        return frozenset(names | {"count"}) if names else frozenset()

    def _matrix(
        self,
        visit: LayerVisit,
        matrix: Matrix,
        here: _Inputs,
        row: Mapping[str, Any],
        shared: dict[str, InverseFactor],
    ) -> tuple[Quantised | None, dict[str, Any]]:
        weight = weight_of(visit.block.get_submodule(matrix.name), visit.layout)
        work = _Work(self.options, self.method, weight, here, row, shared)
        made, mask, quantised = work.run()
        error = work.error(made)
        weight.copy_(made.to(weight.dtype))
        return quantised, {
            "module": matrix.name,
            "unit": "weight",
            "total": weight.numel(),
            "kept": weight.numel() if mask is None else int(mask.sum()),
            "bits": row["bits"],
            "group_size": row["group_size"] if row["bits"] is not None else None,
            "error": error,
            "positions": None,
            "note": "; ".join(work.notes),
        }


@dataclass
class _Inputs:
    """The statistics of one matrix's inputs, checked where they are read."""

    visit: LayerVisit
    matrix: Matrix
    statistics: LayerStatistics

    @property
    def module(self) -> str:
        return self.visit.layout.input_of(self.matrix)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A statistic, on the weights' device."""
        module = self.matrix.name if name.startswith("gradient") else self.module
        found = self.statistics.get((module, name))
        if found is None:
            held = sorted({kind for at, kind in self.statistics if at == module})
            raise InputError(
                f"statistic {name!r} of {module!r} is needed and missing; found {held}. Collect it"
                " with weight_statistics."
            )
        if tuple(found.shape) != shape:
            raise InputError(
                f"statistic {name!r} of {module!r} must be {shape}; found {tuple(found.shape)}."
                " Are the statistics of this model?"
            )
        if found.is_floating_point() and not all_finite(found):
            raise InputError(
                f"statistic {name!r} of {module!r} must be finite; found a NaN or an infinity. Use"
                " a wider dtype for the calibration, or look at its rows."
            )
        return found.to(self.visit.model.device)

    def has(self, name: str) -> bool:
        return (self.module, name) in self.statistics

    def tokens(self) -> int:
        return int(self.read("count", ()))


class _Work:
    """One matrix under way."""

    def __init__(
        self,
        options: MatrixOptions,
        method: Any,
        weight: Tensor,
        here: _Inputs,
        row: Mapping[str, Any],
        shared: dict[str, InverseFactor],
    ) -> None:
        self.options, self.method, self.here, self.shared = options, method, here, shared
        self.weight = weight.float().contiguous()
        self.count = int(row["keep"])
        self.pattern = None if row["n"] is None else (int(row["n"]), int(row["m"]))
        self.prunes = self.pattern is not None or self.count < self.weight.numel()
        self.grid: Grid | None = None
        if row["bits"] is not None:
            self.grid = Grid(
                bits=int(row["bits"]),
                group_size=int(row["group_size"] or 0),
                symmetric=options.symmetric,
                clip=options.clip,
            )
        self.notes: list[str] = []
        self.unseen = False
        _check_row(row, self.weight, options, self.prunes)

    def run(self) -> tuple[Tensor, Tensor | None, Quantised | None]:
        """The new weight (out, in), its mask and its codes."""
        needs = self.prunes and isinstance(self.method, Wanda | Gblm | SparseGpt)
        needs = needs or (self.options.solves and (self.prunes or self.grid is not None))
        if needs and self.here.tokens() == 0:
            self.unseen = True
            self.notes.append("no token reached it: by magnitude, rounded to nearest")
        if self.grid is not None:
            self.grid.size_of(self.weight.shape[1])
        if self._walks():
            return self._walked()
        mask = self._mask() if self.prunes else None
        made = self.weight if mask is None else self.weight * mask
        if self.grid is None:
            return made, mask, None
        quantised = round_to_nearest(made, self.grid)
        return quantised.dequantise(), mask, quantised

    def _walks(self) -> bool:
        if self.unseen:
            return False
        rounds = self.grid is not None and self.options.quantiser in ("gptq", "rsq")
        mends = self.prunes and (self.options.update or isinstance(self.method, SparseGpt))
        return rounds or mends

    def _walked(self) -> tuple[Tensor, Tensor | None, Quantised | None]:
        grid = self.grid if self.options.quantiser in ("gptq", "rsq") else None
        chosen, mask = None, None
        if self.prunes and isinstance(self.method, SparseGpt):
            chosen = Chosen(
                score=self._sparsegpt,
                count=self.count,
                pattern=self.pattern,
                together=self.options.together,
            )
        elif self.prunes:
            mask = self._mask()
        factor = self._factor()
        solved = solve(
            self.weight, factor, chosen=chosen, mask=mask, grid=grid, block=self.options.block
        )
        if factor.damping > self.options.damping * 1.5:
            self.notes.append(f"damping raised to {factor.damping:g}")
        made, quantised = solved.weight.float(), solved.quantised
        if self.grid is not None and grid is None:
            quantised = round_to_nearest(made, self.grid)
            made = quantised.dequantise()
        return made, solved.mask, quantised

    def _sparsegpt(self, weight: Tensor, diagonal: Tensor) -> Tensor:
        score: Tensor = self.method.importance(weight=weight, hessian_diagonal=diagonal)
        return score

    def _factor(self) -> InverseFactor:
        """Of the matrix's inputs; matrices that read the same ones share it."""
        key = self.here.module
        if key not in self.shared:
            self.shared.clear()
            size = self.weight.shape[1]
            self.shared[key] = inverse_factor(
                self.here.read(self.options.gram, (size, size)),
                self.here.tokens(),
                damping=self.options.damping,
                act_order=self.options.act_order,
                dtype=torch.float64 if self.options.double else torch.float32,
            )
        return self.shared[key]

    def _mask(self) -> Tensor:
        """What stays, chosen on the weights as they are."""
        method = self.method
        if isinstance(method, Wanda) and not self.unseen and self.pattern is None:
            return keep_wanda(self.weight, self._norm(1), self.count)
        score = self._score()
        if self.pattern is not None:
            return keep_pattern(score, *self.pattern)
        within = method.group == "output" and not self.unseen
        return (keep_count_by_row if within else keep_count)(score, self.count)

    def _score(self) -> Tensor:
        method, weight = self.method, self.weight
        score: Tensor
        if isinstance(method, RandomWeights):
            ids = np.arange(weight.numel(), dtype=np.int64)
            drawn = method.importance(seed=self._seed(), ids=ids)
            return torch.from_numpy(drawn).to(weight.device).view(weight.shape)
        if self.unseen or isinstance(method, Magnitude):
            score = Magnitude().importance(weight=weight)
        elif isinstance(method, Wanda):
            score = method.importance(weight=weight, input_norm=self._norm(1))
        else:
            rows = max(1, int(self.here.read("gradient_rows", ())))
            gradient = self.here.read(_gradient(method), tuple(weight.shape)).float()
            score = method.importance(
                weight=weight,
                input_norm=self._norm(rows),
                weight_gradient=gradient.sqrt() if method.norm == "l2" else gradient,
            )
        return score

    def _norm(self, rows: int) -> Tensor:
        """sqrt(sum of x^2 / rows) of each input, (in,) float32."""
        sums = self.here.read("sum_squares", (self.weight.shape[1],))
        return (sums.double() / rows).sqrt().float()

    def _seed(self) -> int:
        """Of a matrix's own draws."""
        name = f"{self.options.seed}/{self.here.visit.layer}/{self.here.matrix.name}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

    def error(self, made: Tensor) -> float | None:
        """Relative change of the outputs, where a gram matrix is there."""
        if made is self.weight:
            return 0.0
        if not self.options.measure:
            return None
        name = "gram" if self.here.has("gram") else self.options.gram
        if not self.here.has(name) or self.unseen:
            return None
        size = self.weight.shape[1]
        if name == "weighted_gram":
            self.notes.append("error over weighted tokens")
        # In the dtype that is stored, so that its rounding counts.
        stored = made.to(self.here.visit.model.dtype)
        return output_error(stored, self.weight, self.here.read(name, (size, size)))


def _gradient(method: Gblm) -> str:
    return "gradient_square" if method.norm == "l2" else "gradient_abs"


def _matrix(row: Mapping[str, Any], matrices: Mapping[str, Matrix]) -> Matrix:
    if row["unit"] != "weight" or row["module"] not in matrices:
        raise InputError(
            f"expected a plan row of unit 'weight' about one of {', '.join(matrices)}; found unit"
            f" {row['unit']!r}, module {row['module']!r}. Plan with a method over weights, for this"
            " model."
        )
    return matrices[row["module"]]


def _check_row(
    row: Mapping[str, Any], weight: Tensor, options: MatrixOptions, prunes: bool
) -> None:
    total = weight.numel()
    if row["total"] != total or not 0 <= row["keep"] <= total:
        raise InputError(
            f"expected a plan for the matrix's {total} weights; found {row['keep']} of"
            f" {row['total']} to keep. Make the plan for this model."
        )
    if prunes and options.method == "none":
        raise InputError(
            f"the plan keeps {row['keep']} of {total} weights and names no method to choose them."
            " Name one, or plan a sparsity of 0."
        )
    if row["bits"] is not None and options.quantiser == "none":
        raise InputError(
            f"the plan asks for {row['bits']} bits and names no quantiser. Use rtn, gptq or rsq."
        )


def _codes(name: str, quantised: Quantised) -> dict[str, Tensor]:
    made = {f"{CODES}{name}.codes": quantised.codes, f"{CODES}{name}.scale": quantised.scale}
    if quantised.zero is not None:
        made[f"{CODES}{name}.zero"] = quantised.zero
    return made
