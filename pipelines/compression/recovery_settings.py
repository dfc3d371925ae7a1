"""How a model is recovered, and how the learning rate goes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Method = Literal["bias_norm", "mask_lora", "lora", "distil", "layerwise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is recovered; see the options of the step `recover_weights`."""

    method: Method
    steps: int = 200
    batch_tokens: int = 2048
    learning_rate: float = 1e-3
    rank: int = 16
    alpha: float = 32.0
    keep_zeros: bool = True
    norms: bool = True
    temperature: float = 1.0
    distil_weight: float = 0.5
    evaluations: int = 8
    held_out: float = 0.1
    bfloat16: bool = False


def rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step from 1: up over a twentieth, then a cosine to 0."""
    warm = max(1, steps // 20)
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
