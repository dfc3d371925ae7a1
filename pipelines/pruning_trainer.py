"""Selection inside training: a mixin for transformers' Trainer and TRL's SFTTrainer.

    class PruningSFT(PruningTrainerMixin, SFTTrainer): ...

    trainer = PruningSFT(..., selection=OnlineSelection(method=QTuning(samples=0.25, tokens=0.5)))

Before each optimiser step the micro-batches of the accumulation window are scored with the model
as it is, without gradients; the method decides; labels of dropped tokens become -100, dropped
samples leave the batches, and the trained tokens are counted again. So the loss of a step is the
sum of the losses of the trained tokens of the window (over all devices) divided by their number.
Scores are taken from the decoder's hidden states, never from the trainer's loss, so losses that
hide their logits (TRL's fused output layer) work.

One process, or several with DistributedDataParallel, each of which selects among its own samples.
Weights must be whole on each device: FSDP, DeepSpeed and parallelism within a model are refused.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from transformers import Trainer

from ..errors import InputError, ModelError
from ..pruners.signals.tokens import PromptAttention, score_tokens
from . import online_selection as online
from .online_columns import COLUMNS, SideColumns, column_values, identify
from .online_history import History
from .online_selection import Decision, OnlineSelection
from .online_window import (
    WEIGHT,
    Batch,
    Piece,
    by_length,
    candidates,
    check_batch,
    pieces_of,
    places,
    regroup,
    relabel,
    scatter,
)
from .sft_signals import SftRows

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

STATE_FILE = "prunery_selection.json"
HISTORY_FILE = "prunery_history.safetensors"
_STATE_VERSION = 1


class PruningTrainerMixin(_Base):
    """Adds the option `selection` to a Trainer; stands before it among the base classes.

    Parameters
    ----------
    selection
        What to select and how; None trains on everything, as the plain trainer does.

    Notes
    -----
    What a decision depends on is the seed of the arguments, the optimiser step, the model, the
    ids and contents of the samples, and, where asked for, the average of the weights and the
    number of samples seen; the last two are saved in every checkpoint, so a resumed run decides
    as the unbroken one.

    A sample is a row, or a document where rows are packed (`position_ids` without a mask). Its
    id is its column `id` (whole number or string), else a hash of its tokens; packing in TRL
    drops columns. Quantities that the trainer reports as means over micro-batches (TRL's
    entropy, say) count empty ones too; those of this mixin stand under `selection/`.

    Methods that rescale (InfoBatch) multiply the loss of each kept token by its sample's weight;
    the sum is divided by the sum of the weights on each device, and this loss is computed here
    from the model's full logits, label smoothing and auxiliary losses left out.

    Raises
    ------
    InputError
        The method needs a signal that is neither scored nor a column, or a batch is not text.
    ModelError
        The model or the way it is spread over devices cannot be scored, a score is not finite
        (the sample is named), or a checkpoint does not fit.
    """

    def __init__(self, *args: Any, selection: OnlineSelection | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.selection = selection
        self.last_decision: Decision | None = None
        self._samples_seen = 0
        self._sums: defaultdict[str, list[float]] = defaultdict(list)
        self._history: History | None = None
        self._columns: tuple[str, ...] = ()
        if selection is None:
            return
        self._refuse_unsupported()
        self._columns = selection.column_names(self._train_columns())
        self._protected = _end_ids(self) if selection.protect is None else set(selection.protect)
        wanted = selection.needs("history_loss") and "history_loss" not in self._columns
        kind = selection.history or "base"
        if wanted and isinstance(kind, str):
            self._history = History(
                self._whole_model(), kind, decay=selection.ema, refresh=selection.refresh
            )

    # What cannot work is refused before training.

    def _refuse_unsupported(self) -> None:
        spread = {
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "DataParallel (several GPUs in one process)": self.args.n_gpu > 1,
            "parallelism within a model": self.args.parallelism_config is not None,
        }
        for name, found in spread.items():
            if found:
                raise ModelError(
                    "selection inside training needs the model's whole weights on each device;"
                    f" found {name}. Launch one process a device (torchrun), or select before"
                    " training and export."
                )
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            raise ModelError(
                f"{type(self.model).__name__} does not take `num_items_in_batch`, so its loss"
                " cannot be divided by the number of tokens trained in a window. Give a"
                " `compute_loss_func` that does."
            )
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            raise ModelError(
                "selection inside training scores the network below the adapters' virtual tokens;"
                " prompt learning cannot be scored. Use LoRA or full fine-tuning."
            )
        # Two tokens, so that a model that cannot be scored fails here and not in the first step.
        pair = torch.zeros((1, 2), dtype=torch.int64)
        score_tokens(self._scored_model(), pair, torch.tensor([[False, True]]))

    def _train_columns(self) -> list[str]:
        data: Any = self.train_dataset
        names = getattr(data, "column_names", None)
        if names is None and hasattr(data, "__getitem__"):
            names = data[0] if isinstance(data[0], Mapping) else ()
        return list(names or ())

    def _whole_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)  # type: ignore[no-any-return]

    # Side columns travel beside the batch, as far as `get_batch_samples`.

    def get_train_dataloader(self) -> Any:
        """The training loader, with ids and the columns that the method reads."""
        names = [name for name in ("id", *self._columns) if name in self._train_columns()]
        if self.selection is None or not names:
            return super().get_train_dataloader()
        self._set_signature_columns_if_needed()
        collator, signature = self.data_collator, self._signature_columns
        self.data_collator = SideColumns(collator, names)
        self._signature_columns = cast(Any, [*(signature or ()), *names])
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator, self._signature_columns = collator, signature

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        """The next window, selected, and the number of tokens it trains, over all devices.

        As many micro-batches as were fetched, so that all devices stay in step.
        """
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.selection is None or not batches:
            return batches, count
        started = time.perf_counter()
        columns = [batch.pop(COLUMNS, {}) for batch in batches]
        if self.state.global_step == 0:
            self._begin()
        seen = self._samples_seen
        rows_fetched = sum(len(batch["input_ids"]) for batch in batches)
        self._samples_seen += rows_fetched * self.args.world_size
        if self._history is not None:
            self._history.advance(self.state.global_step)
        progress = self.state.global_step / max(self.state.max_steps, 1)
        if not self.selection.keeps_all(seen, progress):
            batches = self._select(batches, columns, seen)
            count = self._get_num_items_in_batch(batches, device)
            if isinstance(count, torch.Tensor):
                count = count.clamp(min=1)  # a window may lose every token: its loss is 0
        self._sums["seconds"].append(time.perf_counter() - started)
        return batches, count

    def _begin(self) -> None:
        """Training begins, perhaps not for the first time."""
        self._samples_seen = 0
        if self._history is not None:
            self._history.restart()

    def _select(
        self, batches: list[Batch], columns: Sequence[Mapping[str, Any]], seen: int
    ) -> list[Batch]:
        for batch in batches:
            check_batch(batch)
        pieces = pieces_of(batches)
        trainable = candidates(batches, pieces)
        rows, names = self._score(batches, pieces, trainable, columns)
        step = self.state.global_step
        online.check_finite(rows, names, step)
        selection = self._chosen
        numbers = np.arange(len(pieces))
        pools = [numbers]
        if selection.pool == "batch":
            owner = np.array([piece.batch for piece in pieces])
            pools = [numbers[owner == number] for number in range(len(batches))]
        decision = online.decide(
            selection.method_now(seen),
            rows,
            pools,
            seed=online.step_seed(self.args.seed, step),
            plane=selection.log,
        )
        self.last_decision = decision
        self._report(rows, decision)
        self._record(online.records(step, names, rows, decision))
        if decision.keep.all() and (decision.weight == 1.0).all():
            return batches
        return self._apply(batches, pieces, trainable, rows, decision)

    @property
    def _chosen(self) -> OnlineSelection:
        if self.selection is None:
            raise InputError("no `selection` was given to this trainer.")
        return self.selection

    # Scores

    def _score(
        self,
        batches: Sequence[Batch],
        pieces: Sequence[Piece],
        trainable: Sequence[torch.Tensor],
        columns: Sequence[Mapping[str, Any]],
    ) -> tuple[SftRows, list[str]]:
        """The window's samples with their signals, and what to call each sample."""
        position, owner = places(pieces, trainable)
        counts = np.bincount(owner, minlength=len(pieces))
        ids, names = identify(batches, pieces, columns)
        tokens: dict[str, Any] = {
            "token_position": position,
            "turn": online.turns(owner, position),
            "protected": self._protects(batches, trainable),
        }
        scored, order = by_length(batches, pieces, pad=_pad_id(self))
        passed = self._passes(scored, candidates(scored, pieces_of(scored)))
        # Values come sample by sample in the order of lengths; back to the window's order.
        back = np.argsort(np.repeat(order, counts[order]), kind="stable")
        tokens |= {name: values[back] for name, values in passed.items()}
        given = {name: column_values(name, batches, pieces, columns) for name in self._columns}
        more, samples = online.given_columns(given, counts, names)
        samples["tokens"] = np.array([piece.length for piece in pieces], np.int64)
        offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return SftRows(ids, [""] * len(pieces), offset, tokens | more, samples), names

    def _passes(
        self, batches: Sequence[Batch], trainable: Sequence[torch.Tensor]
    ) -> dict[str, Any]:
        """All signals of the window that models give, (T,) each."""
        selection = self._chosen
        found: dict[str, Any] = {}
        if selection.scores:
            found = self._pass(batches, trainable, self._scored_model(), full=True)
        if self._history is not None:
            with self._history.swapped_in():
                found["history_loss"] = self._loss_of(batches, trainable, self._scored_model())
        elif isinstance(selection.history, nn.Module) and selection.needs("history_loss"):
            found["history_loss"] = self._loss_of(batches, trainable, selection.history)
        if selection.reference is not None and selection.needs("reference_loss"):
            found["reference_loss"] = self._loss_of(batches, trainable, selection.reference)
        return found

    def _scored_model(self) -> nn.Module:
        model: Any = self._whole_model()
        return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[no-any-return]

    def _loss_of(
        self, batches: Sequence[Batch], trainable: Sequence[torch.Tensor], model: nn.Module
    ) -> Any:
        return self._pass(batches, trainable, model, full=False)["loss"]

    def _pass(
        self,
        batches: Sequence[Batch],
        trainable: Sequence[torch.Tensor],
        model: nn.Module,
        *,
        full: bool,
    ) -> dict[str, Any]:
        """(T,) arrays over the window; `full` = all that the method needs, else the loss."""
        selection = self._chosen
        wants_attention = full and selection.needs("prompt_attention")
        attention = (
            PromptAttention(layer=selection.layer, exclude_sink=selection.exclude_sink)
            if wants_attention
            else None
        )
        rank = full and selection.needs("target_rank")
        found: defaultdict[str, list[Any]] = defaultdict(list)
        if model is not self._scored_model() and _device(model) != self.args.device:
            model.to(self.args.device)
        for batch, mask in zip(batches, trainable, strict=True):
            # A context of its own for each pass: autocast remembers cast weights, and history
            # puts others in their place.
            with self._autocast():
                scores = score_tokens(
                    model,
                    batch["input_ids"],
                    mask,
                    attention_mask=batch.get("attention_mask"),
                    position_ids=batch.get("position_ids"),
                    rank=rank,
                    attention=attention,
                )
            found["loss"].append(scores.loss)
            if full:
                found["entropy"].append(scores.entropy)
                found["log_sum_exp"].append(scores.log_sum_exp)
            if rank:
                found["target_rank"].append(scores.target_rank)
            if wants_attention:
                found["prompt_attention"].append(scores.prompt_attention)
        return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}

    def _autocast(self) -> AbstractContextManager[None]:
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def _protects(self, batches: Sequence[Batch], trainable: Sequence[torch.Tensor]) -> Any:
        ends = torch.tensor(sorted(self._protected), dtype=torch.int64)
        parts = [
            torch.isin(batch["input_ids"][mask].cpu(), ends)
            for batch, mask in zip(batches, trainable, strict=True)
        ]
        return torch.cat(parts).numpy()

    # Batches

    def _apply(
        self,
        batches: list[Batch],
        pieces: Sequence[Piece],
        trainable: Sequence[torch.Tensor],
        rows: SftRows,
        decision: Decision,
    ) -> list[Batch]:
        keep = scatter(decision.keep, trainable)
        weight = None
        if not (decision.weight == 1.0).all():
            self._refuse_own_losses()
            kept = decision.weight[decision.keep].astype(np.float64)
            # Divided by the count of tokens later: their weights must sum to it.
            scale = len(kept) / kept.sum() if len(kept) else 1.0
            values = (decision.weight * scale).astype(np.float32)
            weight = scatter(values, trainable)
        made = relabel(batches, keep, weight)
        kept_tokens = np.bincount(rows.owner[decision.keep], minlength=len(pieces))
        stay = [piece for piece, count in zip(pieces, kept_tokens, strict=True) if count]
        if len(stay) == len(pieces):
            return made
        return regroup(
            made,
            stay,
            pad=_pad_id(self),
            multiple=getattr(self.data_collator, "pad_to_multiple_of", None) or 1,
        )

    def _refuse_own_losses(self) -> None:
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise InputError(
                f"{type(self._chosen.method).__name__} weighs samples, which neither label"
                " smoothing nor a `compute_loss_func` takes. Leave them out, or take a method"
                " without weights."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss, or the weighted one where a method rescales."""
        if WEIGHT not in inputs:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        rest = {k: v for k, v in inputs.items() if k not in (WEIGHT, "labels")}
        outputs = model(**rest)
        labels = inputs["labels"][:, 1:]
        losses = nn.functional.cross_entropy(
            outputs.logits[:, :-1].float().transpose(1, 2), labels, reduction="none"
        )
        loss = (losses * inputs[WEIGHT][:, 1:]).sum() / num_items_in_batch
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # Reports

    def _report(self, rows: SftRows, decision: Decision) -> None:
        kept = np.unique(rows.owner[decision.keep])
        self._sums["samples"].append(int((rows.counts > 0).sum()))
        self._sums["kept_samples"].append(len(kept))
        self._sums["tokens"].append(len(decision.keep))
        self._sums["kept_tokens"].append(int(decision.keep.sum()))
        for name, value in decision.plane.items():
            self._sums[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as usual; training logs carry the means a step of this device's selection."""
        if self.selection is not None and self.selection.log and "loss" in logs:
            for name, values in self._sums.items():
                if values:
                    logs[f"selection/{name}"] = float(np.mean(values))
            self._sums.clear()
        super().log(logs, start_time)

    def _decisions_file(self) -> Path | None:
        path = self._chosen.decisions
        if path is None:
            return None
        path = Path(path)
        if self.args.world_size > 1:
            path = path.with_name(f"{path.stem}-{self.args.process_index}{path.suffix}")
        return path

    def _record(self, found: Sequence[Mapping[str, Any]]) -> None:
        path = self._decisions_file()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run that starts afresh writes a fresh file.
        with path.open("a" if self.state.global_step else "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(one) + "\n" for one in found)

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before the rest: a checkpoint whose trainer state is there is complete.
        if self.selection is not None and self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            folder = Path(self._get_output_dir(trial=trial)) / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STATE_FILE).write_text(json.dumps(self._state()), encoding="utf-8")
            if self._history is not None and self._history.moves:
                self._history.save(folder / HISTORY_FILE)
        super()._save_checkpoint(model, trial)

    def _state(self) -> dict[str, Any]:
        history = self._history
        return {
            "version": _STATE_VERSION,
            "method": repr(self._chosen.method),
            "samples_seen": self._samples_seen,
            "history": None
            if history is None
            else {"kind": history.kind, "step": history.step, "base": history.base},
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.selection is not None and checkpoint is not None:
            self._load_selection(Path(checkpoint))

    def _load_selection(self, folder: Path) -> None:
        path = folder / STATE_FILE
        if not path.is_file():
            raise ModelError(
                f"{path} is missing: the checkpoint was written without selection. Resume from"
                " one that was written with it, or start anew from these weights."
            )
        found = json.loads(path.read_text(encoding="utf-8"))
        mine = self._state()
        for name in ("version", "method"):
            if found.get(name) != mine[name]:
                raise ModelError(
                    f"{path}: `{name}` was {found.get(name)}; this run has {mine[name]}. Resume"
                    " with the same selection."
                )
        theirs = found["history"]
        history = self._history
        if (theirs is None) != (history is None) or (
            history is not None and (theirs["kind"], theirs["base"]) != (history.kind, history.base)
        ):
            raise ModelError(
                f"{path}: the history of the saved run began with other weights or of another"
                " kind. Build the trainer with the model that the first run began with; the"
                " checkpoint's weights are loaded into it."
            )
        self._samples_seen = int(found["samples_seen"])
        if history is not None and history.moves:
            history.load(folder / HISTORY_FILE, int(theirs["step"]))
        self._cut_decisions()

    def _cut_decisions(self) -> None:
        """Take steps that will be taken again out of the file of decisions."""
        path = self._decisions_file()
        if path is None or not path.is_file():
            return
        with path.open(encoding="utf-8") as lines:
            kept = [one for one in lines if json.loads(one)["step"] < self.state.global_step]
        path.write_text("".join(kept), encoding="utf-8")


class PruningTrainer(PruningTrainerMixin, Trainer):
    """transformers' Trainer that selects samples and tokens while it trains."""


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _pad_id(trainer: Any) -> int:
    """Token id for padding; 0 where nothing names one, which a mask hides all the same."""
    config = trainer.model.config
    for source in (trainer.processing_class, config, config.get_text_config()):
        found = getattr(source, "pad_token_id", None)
        if isinstance(found, int) and found >= 0:
            return found
    return 0


def _end_ids(trainer: Any) -> set[int]:
    """The ids that end a sequence or a turn, by the tokenizer and the model."""
    model = trainer.model
    sources = (trainer.processing_class, model.config, getattr(model, "generation_config", None))
    found: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found |= {one for one in _listed(ids) if isinstance(one, int)}
    return found


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]
