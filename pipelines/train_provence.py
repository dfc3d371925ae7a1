"""Train a Provence network: rows in, a folder that `load_provence` reads out.

Low-rank factors (LoRA) over every linear layer of a frozen encoder, or the whole encoder, plus
the two heads. Interrupted runs resume from the last checkpoint to the same weights. The stored
weights are an exponential average over the later part of the run.

Departures from Provence (arXiv:2501.16214): AdamW with cosine decay for Adam at one rate; the
loss of `provence_loss`; windows of `train_length` tokens; bfloat16 for the encoder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import InputError, ModelError
from ..pruners.models.checkpoint import (
    encoder_source,
    load_provence,
    load_tokenizer,
    new_network,
    pretrained_encoder,
    resume_lora,
    save_provence,
)
from ..pruners.models.config import CONFIG_NAME, ProvenceConfig, read_config
from ..pruners.models.encoders import file_sha256, resolve_encoder
from ..pruners.models.lora import add_lora, lora_state
from ..pruners.models.provence import Provence, has_token_types
from .provence_batches import (
    Batch,
    Special,
    TokenRow,
    batch_by_length,
    collate,
    draw_epoch,
    tokenise_rows,
)
from .provence_loss import LossTerms, LossWeights, provence_loss
from .provence_rows import TrainRow, read_rows, split_by_group
from .provence_state import Progress, load_state, save_state, saved_states
from .provence_validation import Validation, choose_threshold, score_rows, validate

_LOG = logging.getLogger(__name__)


class TrainProvenceOptions(BaseModel):
    """What is trained, on what, and how; every unknown key is refused.

    rows, valid_rows: files as `provence_rows` describes; without `valid_rows`, `valid_share` of
    the questions is held out by a hash. output: the model folder; checkpoints lie beside it.
    encoder: name, path or hub id; init_from: a model folder to go on from instead (an adapter).
    lora_rank 0 trains the whole encoder but its embeddings. batch_tokens: padded tokens a step.
    average_from: share of the steps after which weights are averaged, with `average_decay`.
    threshold: the default threshold to store; None chooses the highest one that keeps the
    evidence of `threshold_recall` of the validation questions. stop_after: end as if interrupted
    after so many steps of this call.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Path
    output: Path
    valid_rows: Path | None = None
    valid_share: float = Field(0.05, ge=0, lt=1)
    encoder: str = "all-MiniLM-L6-v2"
    encoder_sha256: str | None = None
    init_from: Path | None = None
    lora_rank: int = Field(40, ge=0)
    lora_scale: float = Field(2.0, gt=0)
    epochs: float = Field(3.0, gt=0)
    learning_rate: float = Field(8e-4, gt=0)
    head_learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.06, ge=0, le=1)
    batch_tokens: int = Field(3072, ge=64)
    train_length: int = Field(224, ge=16)
    max_length: int = Field(512, ge=16)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    dropout: float = Field(0.0, ge=0, lt=1)
    title_dropout: float = Field(0.15, ge=0, le=1)
    token_mask: float = Field(0.05, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    token_weight: float = Field(0.5, ge=0)
    sentence_weight: float = Field(1.0, ge=0)
    listwise_weight: float = Field(0.5, ge=0)
    teacher_weight: float = Field(0.05, ge=0)
    relevance_weight: float = Field(0.2, ge=0)
    answer_weight: float = Field(0.5, ge=0)
    average_from: float = Field(0.5, ge=0, le=1)
    average_decay: float = Field(0.99, ge=0, lt=1)
    threshold: float | None = Field(None, ge=0, le=1)
    threshold_recall: float = Field(0.95, gt=0, le=1)
    aggregation: Literal["mean", "vote"] = "mean"
    licence: str = "unknown"
    languages: tuple[str, ...] = ("en",)
    device: str = "cpu"
    threads: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    checkpoint_every: int = Field(100, ge=1)
    log_every: int = Field(50, ge=1)
    stop_after: int | None = Field(None, ge=1)


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a run did. finished is False where `stop_after` ended it; the folder then lacks a model.

    loss: mean of each term over the last logged steps. seconds: of this call.
    """

    folder: str
    finished: bool
    steps: int
    total_steps: int
    seconds: float
    rows: int
    valid_rows: int
    trainable: int
    loss: dict[str, float]
    validation: Validation | None
    digest: str
    options: dict[str, Any] = field(default_factory=dict)


class _Trainee(nn.Module):
    """The network and the answer head, which training alone uses."""

    def __init__(self, network: Provence) -> None:
        super().__init__()
        self.network = network
        self.answer_head = nn.Linear(network.keep_head.in_features, 1)

    def forward(self, batch: Batch, weights: LossWeights) -> LossTerms:
        """The loss of one batch."""
        extra: dict[str, Tensor] = {}
        if self.network.token_types:
            extra["token_type_ids"] = batch.token_type_ids
        hidden = self.network.encoder(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **extra
        ).last_hidden_state
        output = self.network.heads(hidden, batch.attention_mask)
        answer = self.answer_head(hidden.to(self.answer_head.weight.dtype))[..., 0]
        return provence_loss(output, answer, batch, weights)


def train_provence(options: TrainProvenceOptions) -> TrainReport:
    """Train, validate and store a network; go on from a checkpoint where one lies there.

    Raises InputError for bad rows or a checkpoint of other options, ModelError where the loss is
    not finite.
    """
    started = time.perf_counter()
    if options.threads:
        torch.set_num_threads(options.threads)
    train, valid = _rows(options)
    source, config = _start(options)
    tokenizer = load_tokenizer(source)
    special = Special.of(tokenizer)
    trainee, config = _build(source, config, options)
    tokens = tokenise_rows(tokenizer, train)
    run = _Run(
        options, trainee.to(options.device), tokens, special, _run_digest(options, train, config)
    )
    _LOG.info(
        "training %d rows, %d parameters, %d steps", len(train), run.trainable, run.total_steps
    )
    finished = run.go()
    validation, digest = None, ""
    if finished:
        run.use_average()
        validation, digest = _finish(options, trainee.network, config, tokenizer, valid)
    report = TrainReport(
        folder=str(options.output),
        finished=finished,
        steps=run.step,
        total_steps=run.total_steps,
        seconds=round(time.perf_counter() - started, 1),
        rows=len(train),
        valid_rows=len(valid),
        trainable=run.trainable,
        loss=run.mean_loss(),
        validation=validation,
        digest=digest,
        options=options.model_dump(mode="json", exclude={"rows", "output", "valid_rows"}),
    )
    if finished:
        text = json.dumps(asdict(report), indent=2) + "\n"
        report_path(options.output).write_text(text, encoding="utf-8")
    return report


def report_path(output: Path) -> Path:
    """Where a run's report lies: beside the model folder."""
    return output.with_name(f"{output.name}.report.json")


class _Run:
    """The loop and its state: parameters, optimiser, averages, place in the plan."""

    def __init__(
        self,
        options: TrainProvenceOptions,
        trainee: _Trainee,
        tokens: list[TokenRow],
        special: Special,
        digest: str,
    ) -> None:
        self.options, self.trainee, self.special = options, trainee, special
        self.tokens, self.digest = tokens, digest
        self.parameters = {n: p for n, p in trainee.named_parameters() if p.requires_grad}
        self.trainable = sum(p.numel() for p in self.parameters.values())
        encoder = [p for n, p in self.parameters.items() if n.startswith("network.encoder.")]
        heads = [p for n, p in self.parameters.items() if not n.startswith("network.encoder.")]
        self.rates = (options.learning_rate, options.head_learning_rate)
        self.optimiser = torch.optim.AdamW(
            [{"params": encoder}, {"params": heads}],
            betas=(0.9, 0.98),
            weight_decay=options.weight_decay,
        )
        self.weights = LossWeights(
            token=options.token_weight,
            sentence=options.sentence_weight,
            listwise=options.listwise_weight,
            teacher=options.teacher_weight,
            relevance=options.relevance_weight,
            answer=options.answer_weight,
        )
        self.average: dict[str, Tensor] = {}
        self.history: list[list[float]] = []
        self.step = self.epoch = self.batch = 0
        first = self._epoch(0)
        self.total_steps = max(1, round(len(first) * options.epochs))
        self.checkpoints = options.output.with_name(f"{options.output.name}.checkpoints")
        saved = saved_states(self.checkpoints)
        if saved:
            progress, self.average = load_state(saved[-1], digest, self.parameters, self.optimiser)
            self.step, self.epoch, self.batch = progress.step, progress.epoch, progress.batch
            _LOG.info("resuming from %s", saved[-1])

    def go(self) -> bool:
        """Run to the end, or to `stop_after`; whether the end was reached."""
        options, began, first = self.options, time.perf_counter(), self.step
        self.trainee.train()
        for batch in self._batches():
            self._update(batch)
            self.step += 1
            done = self.step - first
            if done % options.log_every == 0:
                _LOG.info(
                    "step %d/%d, %.0f s, loss %s",
                    self.step,
                    self.total_steps,
                    time.perf_counter() - began,
                    {k: round(v, 4) for k, v in self.mean_loss().items()},
                )
            if self.step % options.checkpoint_every == 0 or self.step == self.total_steps:
                self.save()
            if options.stop_after == done and self.step < self.total_steps:
                return False
        return True

    def mean_loss(self) -> dict[str, float]:
        """Mean of each term over the last `log_every` steps of this call."""
        recent = self.history[-self.options.log_every :]
        if not recent:
            return {}
        return dict(zip(LossTerms._fields, np.mean(recent, axis=0).tolist(), strict=True))

    def save(self) -> None:
        """Write a checkpoint."""
        save_state(
            self.checkpoints,
            Progress(self.step, self.epoch, self.batch, self.digest),
            self.parameters,
            self.optimiser,
            self.average,
        )

    def use_average(self) -> None:
        """Put the averaged weights into the network."""
        with torch.no_grad():
            for name, value in self.average.items():
                self.parameters[name].copy_(value)

    def _epoch(self, epoch: int) -> list[Any]:
        """The batches of an epoch, as lists of windows."""
        options = self.options
        examples = draw_epoch(
            self.tokens,
            self.special,
            max_length=options.train_length,
            title_dropout=options.title_dropout,
            token_mask=options.token_mask,
            seed=options.seed,
            epoch=epoch,
        )
        if not examples:
            raise InputError("training rows: expected a row with weight > 0, found none")
        order = np.random.default_rng([options.seed, epoch, 1])
        parts = batch_by_length([len(e.ids) for e in examples], options.batch_tokens, order)
        return [[examples[i] for i in part] for part in parts]

    def _batches(self) -> Iterator[Batch]:
        """Batches from where the run stands to its end; `epoch` and `batch` name the next one."""
        while self.step < self.total_steps:
            plan = self._epoch(self.epoch)
            while self.batch < len(plan) and self.step < self.total_steps:
                made = collate(plan[self.batch], self.special)
                self.batch += 1
                if self.batch == len(plan):
                    self.epoch, self.batch, plan = self.epoch + 1, 0, []
                yield Batch._make(x.to(self.options.device) for x in made)
                if not plan:
                    break

    def _update(self, batch: Batch) -> None:
        options = self.options
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * schedule(self.step, self.total_steps, options.warmup)
        torch.manual_seed(options.seed * 1_000_003 + self.step)  # dropout, were there any
        mixed = options.precision == "bfloat16" and not options.lora_rank
        with torch.autocast(options.device, torch.bfloat16) if mixed else nullcontext():
            terms = self.trainee(batch, self.weights)
        values = torch.stack(terms).detach().tolist()
        if not math.isfinite(values[0]):
            raise ModelError(
                f"step {self.step}: expected a finite loss, found {values[0]}; lower "
                "learning_rate, or train with precision float32"
            )
        self.history.append(values)
        self.optimiser.zero_grad(set_to_none=True)
        terms.total.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), options.clip)
        self.optimiser.step()
        if self.step >= options.average_from * self.total_steps:
            self._average()

    def _average(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if name in self.average:
                    self.average[name].lerp_(parameter, 1 - self.options.average_decay)
                else:
                    self.average[name] = parameter.detach().clone()


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate: linear warm-up, then cosine to 0.05."""
    rise = min(1.0, (step + 1) / max(1.0, warmup * total))
    return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))))


def _rows(options: TrainProvenceOptions) -> tuple[list[TrainRow], list[TrainRow]]:
    rows = read_rows(options.rows)
    if options.valid_rows is None:
        return split_by_group(rows, options.valid_share, options.seed)
    valid = read_rows(options.valid_rows)
    shared = {row.group for row in rows} & {row.group for row in valid}
    if shared:
        raise InputError(
            f"{options.valid_rows}: {len(shared)} questions stand in the training rows too "
            f"(such as {sorted(shared)[0]!r}); a split must be by question"
        )
    return rows, valid


def _start(options: TrainProvenceOptions) -> tuple[Path, ProvenceConfig]:
    """Folder of the encoder and the config to begin with."""
    if options.init_from is not None:
        config = read_config(options.init_from / CONFIG_NAME)
        if config.lora_rank != options.lora_rank or not config.lora_rank:
            raise InputError(
                f"init_from: expected an adapter of rank {options.lora_rank}, found "
                f"lora_rank {config.lora_rank}; set lora_rank to that of an adapter"
            )
        return encoder_source(options.init_from, config)[0], config
    found = resolve_encoder(options.encoder, sha256=options.encoder_sha256)
    return found.path, ProvenceConfig(
        encoder=options.encoder,
        encoder_sha256=found.sha256,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_scale * options.lora_rank,
    )


def _build(
    source: Path, config: ProvenceConfig, options: TrainProvenceOptions
) -> tuple[_Trainee, ProvenceConfig]:
    torch.manual_seed(options.seed)
    # Eager attention: on a CPU faster to train at these lengths than the fused kernel.
    encoder = pretrained_encoder(source, "eager")
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = options.dropout
    positions = int(getattr(encoder.config, "max_position_embeddings", options.max_length))
    config = replace(
        config,
        max_length=min(options.max_length, positions),
        token_types=has_token_types(encoder.config),
        aggregation=options.aggregation,
        licence=options.licence,
        languages=options.languages,
    )
    network = new_network(encoder, config)
    if config.lora_rank:
        if options.precision == "bfloat16":
            network.encoder.to(torch.bfloat16)
        if options.init_from is not None:
            resume_lora(options.init_from, network, config, options.seed)
        else:
            add_lora(network.encoder, config.lora_rank, config.lora_alpha, seed=options.seed)
    else:
        for name, parameter in network.encoder.named_parameters():
            if name.startswith("embeddings."):
                parameter.requires_grad_(False)
    trainee = _Trainee(network)
    if options.init_from is None:
        _fresh_heads(trainee)
    return trainee, config


def _fresh_heads(trainee: _Trainee) -> None:
    """Small weights; the keep head begins at a probability near 0.27, that of a kept sentence."""
    heads = (trainee.network.rank_head, trainee.network.keep_head, trainee.answer_head)
    for head in heads:
        for name, parameter in head.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
    with torch.no_grad():
        trainee.network.keep_head.bias.copy_(torch.tensor([0.5, -0.5]))


def _finish(
    options: TrainProvenceOptions,
    network: Provence,
    config: ProvenceConfig,
    tokenizer: Any,
    valid: list[TrainRow],
) -> tuple[Validation | None, str]:
    """Store the network; threshold and figures are those of the weights as stored."""
    config = replace(config, threshold=options.threshold or config.threshold)
    _save(options, network, config, tokenizer)
    loaded = load_provence(str(options.output), device=options.device)
    if not valid:
        return None, loaded.digest
    scores = score_rows(
        loaded.model,
        tokenise_rows(tokenizer, valid),
        Special.of(tokenizer),
        max_length=config.max_length,
    )
    if options.threshold is None:
        chosen = choose_threshold(valid, scores, options.threshold_recall)
        config = replace(config, threshold=chosen)
        _save(options, network, config, tokenizer)
        loaded = load_provence(str(options.output), device=options.device)
    return validate(valid, scores, config.threshold), loaded.digest


def _save(
    options: TrainProvenceOptions, network: Provence, config: ProvenceConfig, tokenizer: Any
) -> None:
    heads = {n: t for n, t in network.state_dict().items() if not n.startswith("encoder.")}
    common: Mapping[str, Any] = {"config": config, "heads": heads}
    if config.lora_rank:
        # float16: the factors are of order 1e-2..1, where it holds 11 significant bits.
        save_provence(
            options.output, lora=lora_state(network.encoder), dtype=torch.float16, **common
        )
    else:
        save_provence(options.output, encoder=network.encoder, tokenizer=tokenizer, **common)


def _run_digest(options: TrainProvenceOptions, rows: list[TrainRow], config: ProvenceConfig) -> str:
    """What a checkpoint belongs to: options that change the numbers, rows, and the start."""
    skip = {
        "output",
        "rows",
        "valid_rows",
        "stop_after",
        "threads",
        "checkpoint_every",
        "log_every",
    }
    content = hashlib.sha256(options.model_dump_json(exclude=skip).encode())
    for row in rows:
        content.update(repr(asdict(row)).encode())
    content.update(repr(config).encode())
    if options.init_from is not None:
        content.update(file_sha256(options.init_from / "model.safetensors").encode())
    return content.hexdigest()
