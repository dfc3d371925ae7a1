"""How a plan is carried out: the options of `compress_weights`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..engine import StepOptions


class CompressWeightsOptions(StepOptions):
    """Options of `compress_weights`; what is done to which layer stands in the plan.

    Attributes
    ----------
    model
        Folder or hub id; the input `model` where not given. The plan must be about it.
    propagate
        compressed: a layer is calibrated on what the compressed layers before it give; dense: on
        what the source model gives.
    damping
        Share of the mean diagonal that is added to a Hessian's diagonal.
    block
        Columns that SparseGPT and GPTQ solve together.
    act_order
        GPTQ takes columns by the size of their inputs, largest first.
    symmetric, clip
        Of quantisation grids: no zero points; the clip of each group searched for the least
        squared error.
    update
        Weights that stay make up for those that a method other than sparsegpt removed.
    measure
        The relative error of each matrix's or half's outputs is measured, by the gram matrix of
        its inputs.
    tokens
        all, or trained: statistics look only at tokens that have a label, those that a method
        over tokens kept. The others are read all the same.
    compensate
        What is done for parts that are removed: none, bias, refit, or auto (bias where the
        architecture carries one, else refit). The step compensate_weights does it afterwards.
    rotate, rotation_seed
        Of RSQ: the residual stream is rotated before anything is quantised.
    token_minimum, token_power
        Of RSQ: the least weight of a token before scaling, and the power of the weights in the
        Hessian (1 as in the code, 2 as in the figure of the paper).
    tokens_a_batch
        Padded tokens in a batch at most: a block's activations of so many are in memory. It decides
        shapes of matrix products and so last bits.
    autocast
        Forward passes over the rows multiply in bfloat16: faster where the processor does that
        natively. Weights, sums over inputs and solves stay in `dtype`.
    device, dtype
        Where, and in what numbers it is computed. Files keep the dtype of the source.
    """

    model: str | None = None
    propagate: Literal["compressed", "dense"] = "compressed"
    damping: float = Field(default=0.01, gt=0, le=1)
    block: int = Field(default=128, ge=1, le=4096)
    act_order: bool = False
    symmetric: bool = True
    clip: bool = True
    update: bool = False
    measure: bool = True
    tokens: Literal["all", "trained"] = "all"
    compensate: Literal["none", "bias", "refit", "auto"] = "none"
    rotate: bool = True
    rotation_seed: int = 0
    token_minimum: float = Field(default=0.005, gt=0, le=1)
    token_power: Literal[1, 2] = 1
    tokens_a_batch: int = Field(default=1024, ge=1)
    autocast: bool = False
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
