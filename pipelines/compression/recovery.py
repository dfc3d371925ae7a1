"""Recovery of a compressed model: a short training that leaves its zeros and its shape alone.

- bias_norm: biases and norms alone (PERP, arXiv:2312.15230: a share of 0.01 to 0.05 %).
- mask_lora: besides, low-rank updates of the matrices, masked by W ≠ 0 and folded in (PERP).
- lora: the same, masked where `keep_zeros` says so (arXiv:2106.09685).
- distil: as lora, towards a dense model's stored targets (see `teacher`).
- layerwise: as mask_lora, block by block towards the dense block's outputs (see `layerwise`).

Departures: PERP trains the output layer in some settings, and has ScaleLoRA; neither is here. The
best state on held-out rows is kept, judged after folding and rounding to the dtype of the files;
where nothing is better than the input, the input is given back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ModelError
from ...pruners.models.streamed_model import StreamedModel
from .layerwise import train_layers
from .low_rank import LowRank, add_low_rank, fold_low_rank
from .recovery_rows import RowBatch, Rows, fixed_batches, split_rows, training_batches
from .recovery_settings import Settings, rate
from .teacher import TeacherTable, target_divergence
from .whole_model import WholeModel


@dataclass(frozen=True, slots=True)
class Loss:
    """Means over the targets of held-out rows, nats: of the labels, and to the teacher."""

    nll: float
    divergence: float | None
    judged: float


@dataclass(frozen=True)
class Recovery:
    """What came out.

    Attributes
    ----------
    changed
        Name in the files to the tensor that takes its place, in the dtype of the files; empty
        where the input is given back.
    figures
        For the notes of a table; JSON-able.
    """

    changed: Mapping[str, Tensor]
    figures: Mapping[str, Any]


@dataclass
class Trained:
    """What is trained: parameters by layer (-1: outside the blocks), and the tensors they change.

    `files` maps the path of a changed parameter in the model (without factors) to its file name.
    """

    parameters: dict[int, dict[str, nn.Parameter]]
    files: dict[str, str]

    def all(self) -> dict[str, nn.Parameter]:
        """Every parameter by its layer and name."""
        return {
            f"{layer}.{name}": parameter
            for layer, found in self.parameters.items()
            for name, parameter in found.items()
        }

    def state(self) -> dict[str, Tensor]:
        """A copy on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.all().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a copy back."""
        with torch.no_grad():
            for name, parameter in self.all().items():
                parameter.copy_(state[name])


def recover(
    model: WholeModel,
    rows: Rows,
    settings: Settings,
    *,
    seed: int,
    work: Path,
    frozen: frozenset[str] = frozenset(),
    teacher: TeacherTable | None = None,
    dense: StreamedModel | None = None,
    pad: int = 0,
    mask: int | None = None,
) -> Recovery:
    """Train, keep the best state on held-out rows, fold it in.

    Parameters
    ----------
    model
        Changed in place; do not use it afterwards.
    work
        Folder for hidden states, of layerwise.
    frozen
        Names in the files of matrices that do not change (quantised ones).
    teacher, dense
        Of distil and of layerwise.
    pad, mask
        Ids of the tokens that fill up a batch, and that hide a word from a masked model.

    Raises
    ------
    ModelError
        A loss is not finite, or there is nothing to train.
    """
    trained_rows, held = split_rows(rows, settings.held_out, seed)
    how: dict[str, Any] = {"tokens": settings.batch_tokens, "pad": pad, "seed": seed, "mask": mask}
    judge = fixed_batches(held, **how)
    before = evaluate(model, judge, settings, teacher)
    total = model.parameters()
    trained = prepare(model, settings, seed, frozen)
    if settings.method == "layerwise":
        assert dense is not None
        batches = fixed_batches(trained_rows, **how)
        layers = train_layers(
            model, dense, batches, judge, settings, trained.parameters, seed=seed, work=work
        )
        best: dict[str, Any] = {"layers": layers}
    else:
        stream = training_batches(trained_rows, **how)
        best = _train(model, stream, judge, settings, trained, teacher, before)
    changed = _folded(model, trained)
    after = evaluate(model, judge, settings, teacher)
    better = after.judged < before.judged
    figures = {
        "method": settings.method,
        "steps": settings.steps,
        **best,
        "trained_parameters": sum(p.numel() for p in trained.all().values()),
        "parameters": total,
        "rows_trained": len(trained_rows.ids),
        "rows_held_out": len(held.ids),
        "held_out_before": _loss_figures(before),
        "held_out_after": _loss_figures(after if better else before),
        "given_back": not better,
    }
    figures["share_trained"] = figures["trained_parameters"] / total
    return Recovery(changed if better else {}, figures)


def _loss_figures(loss: Loss) -> dict[str, float]:
    made = {"nll": loss.nll, "perplexity": math.exp(min(loss.nll, 700.0))}
    return made if loss.divergence is None else {**made, "divergence": loss.divergence}


# -- what is trained -----------------------------------------------------------------------------


def prepare(model: WholeModel, settings: Settings, seed: int, frozen: frozenset[str]) -> Trained:
    """Mark biases and norms as trained, and put factors around the matrices, in place."""
    names = model.file_names()
    made = Trained({}, {})
    small = settings.norms or settings.method == "bias_norm"
    if small and settings.method != "layerwise":
        prefix = f"{model.layout.blocks}."
        outside = {n: p for n, p in model.model.named_parameters() if not n.startswith(prefix)}
        _add_small(made, -1, "", outside, names)
    for layer, block in enumerate(model.blocks):
        path = f"{model.layout.blocks}.{layer}."
        if small:
            _add_small(made, layer, path, dict(block.named_parameters()), names)
        if settings.method == "bias_norm":
            continue
        matrices = [
            matrix.name
            for matrix in model.layout.matrices(block)
            if names[f"{path}{matrix.name}.weight"] not in frozen
        ]
        add_low_rank(
            block,
            matrices,
            rank=settings.rank,
            alpha=settings.alpha,
            keep_zeros=settings.keep_zeros,
            transposed=model.layout.transposed,
            generator=torch.Generator().manual_seed(_layer_seed(seed, layer)),
        )
        _add_factors(made, layer, path, block, names)
    if not made.all():
        raise ModelError(
            f"{model.source.folder}: expected something to train; every matrix is quantised and"
            " `norms` is false. Set `norms: true`, or leave the model as it is."
        )
    for parameter in made.all().values():
        parameter.requires_grad_(True)
    return made


def _layer_seed(seed: int, layer: int) -> int:
    return (seed * 1_000_003 + layer) % (1 << 63)


def _add_small(
    made: Trained,
    layer: int,
    path: str,
    found: Mapping[str, nn.Parameter],
    names: Mapping[str, str],
) -> None:
    """Biases and norms: the parameters that are vectors, where the files hold them."""
    for name, parameter in found.items():
        if parameter.dim() == 1 and path + name in names:
            made.parameters.setdefault(layer, {})[name] = parameter
            made.files[path + name] = names[path + name]


def _add_factors(
    made: Trained, layer: int, path: str, block: nn.Module, names: Mapping[str, str]
) -> None:
    for name, part in block.named_modules():
        if isinstance(part, LowRank):
            found = made.parameters.setdefault(layer, {})
            found[f"{name}.lora_A"], found[f"{name}.lora_B"] = part.lora_A, part.lora_B
            made.files[f"{path}{name}.weight"] = names[f"{path}{name}.weight"]


def _folded(model: WholeModel, trained: Trained) -> dict[str, Tensor]:
    """Fold the factors in and round what changed as the files will hold it, in place."""
    for block in model.blocks:
        fold_low_rank(block)
    changed = {}
    for path, stored in trained.files.items():
        parameter = model.model.get_parameter(path).requires_grad_(False)
        rounded = parameter.detach().to(model.stored_dtype(stored))
        if not bool(torch.isfinite(rounded).all()):
            raise ModelError(
                f"{stored}: expected finite weights after the recovery; found others in"
                f" {rounded.dtype}. Lower `learning_rate`."
            )
        with torch.no_grad():
            parameter.copy_(rounded)
        changed[stored] = rounded
    return changed


# -- losses --------------------------------------------------------------------------------------


def _parts(
    model: WholeModel, batch: RowBatch, settings: Settings, teacher: TeacherTable | None
) -> tuple[Tensor, Tensor | None]:
    """Negative log likelihood of each target and divergence from the teacher, (N,) each."""
    device = torch.device(model.device).type
    with torch.autocast(device, torch.bfloat16, enabled=settings.bfloat16):
        logits = model.logits(batch.input_ids, batch.valid)
    row, position = batch.targets(causal=model.causal)
    seen = position - 1 if model.causal else position
    at = logits[row.to(logits.device), seen.to(logits.device)].float()
    wanted = batch.labels[row, position].to(at.device)
    nll = F.cross_entropy(at, wanted, reduction="none")
    if teacher is None:
        return nll, None
    asked = [position[row == number].numpy() for number in range(len(batch.ids))]
    targets = teacher.targets(batch.ids.tolist(), asked).to(at.device)
    if int(targets.indices.max()) >= at.shape[1]:
        raise ModelError(
            f"expected a teacher with the {at.shape[1]} tokens of the model; found token"
            f" {int(targets.indices.max())}. Take the dense model that was compressed as teacher."
        )
    return nll, target_divergence(at, targets, settings.temperature)


def _mix(nll: Any, divergence: Any, settings: Settings) -> Any:
    """(1 - w) NLL + w t² KL; t² keeps the gradient's size (arXiv:1503.02531)."""
    if divergence is None:
        return nll
    weight = settings.distil_weight
    return (1 - weight) * nll + weight * settings.temperature**2 * divergence


def evaluate(
    model: WholeModel,
    batches: Sequence[RowBatch],
    settings: Settings,
    teacher: TeacherTable | None = None,
) -> Loss:
    """Mean losses over all targets. Raises ModelError where one is not finite."""
    nll = divergence = 0.0
    count = 0
    with torch.no_grad():
        for batch in batches:
            one, other = _parts(model, batch, settings, teacher)
            nll += float(one.double().sum())
            divergence += float(other.double().sum()) if other is not None else 0.0
            count += len(one)
    apart = None if teacher is None else divergence / count
    made = Loss(nll / count, apart, _mix(nll / count, apart, settings))
    if not math.isfinite(made.judged):
        raise ModelError(
            f"{model.source.folder}: expected a finite loss on the held-out rows; found"
            f" {made.judged}. Lower `learning_rate`, or look at the model before its recovery."
        )
    return made


# -- training ------------------------------------------------------------------------------------


def _train(
    model: WholeModel,
    batches: Iterator[RowBatch],
    judge: Sequence[RowBatch],
    settings: Settings,
    trained: Trained,
    teacher: TeacherTable | None,
    before: Loss,
) -> dict[str, Any]:
    """AdamW for a number of steps; the best state is put back. Its step and the last loss."""
    parameters = list(trained.all().values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    marks = {
        math.ceil(settings.steps * part / settings.evaluations)
        for part in range(1, settings.evaluations + 1)
    }
    best, best_loss, best_step, value = trained.state(), before.judged, 0, math.nan
    for step, batch in enumerate(islice(batches, settings.steps), 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step, settings.steps)
        nll, divergence = _parts(model, batch, settings, teacher)
        loss = _mix(nll.mean(), None if divergence is None else divergence.mean(), settings)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"recovery: expected a finite loss, found {value} at step {step}. Lower"
                f" `learning_rate` (it is {settings.learning_rate:g})."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step in marks:
            found = evaluate(model, judge, settings, teacher).judged
            if found < best_loss:
                best, best_loss, best_step = trained.state(), found, step
    trained.load(best)
    return {"best_step": best_step, "last_training_loss": value}
