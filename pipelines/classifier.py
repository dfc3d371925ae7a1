"""Training a classifier on the rows of a labelled data set, to the same numbers every time."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from ..errors import InputError, ModelError, RecipeError, StoreError
from ..pruners.models.classifiers import Classifier, ModelSpec, load_classifier, make_model
from ..storage import Table
from .dataset_tables import TRAIN
from .distillation import check_distillation, distillation_loss
from .tables import flat, vectors_of

__all__ = [
    "Classifier",
    "Examples",
    "ModelSpec",
    "Trainer",
    "check_inputs",
    "classifier_from_table",
    "fit",
    "load_examples",
    "make_model",
    "predict",
]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

# Attachments of a train_classifier table.
DESCRIPTION = "classifier.json"
WEIGHTS = "weights-{}.safetensors"

_WARMUP = 0.1  # share of the steps over which the learning rate rises
_DECAY = 5e-4
_LONGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Examples:
    """Rows of a labelled data set in memory.

    Attributes
    ----------
    ids
        (N,) int64.
    x
        (N, ...) float32 features, or (N, C, H, W) uint8 pixels.
    label
        (N,) int64, code of the class.
    clean_label
        (N,) int64, before noise was planted; -1 where none was.
    split
        (N,) str, "train" or "test".
    classes
        How many; codes are below it.
    kind
        "image", "text" or "features".
    """

    ids: IntArray
    x: Tensor
    label: IntArray
    clean_label: IntArray
    split: npt.NDArray[np.str_]
    classes: int
    kind: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row's x."""
        return tuple(self.x.shape[1:])

    def take(self, rows: npt.ArrayLike) -> Examples:
        """Those rows, in the order given: positions, or a mask of (N,) bool."""
        index = np.asarray(rows)
        index = np.flatnonzero(index) if index.dtype == np.bool_ else index.astype(np.int64)
        return Examples(
            self.ids[index],
            self.x[torch.from_numpy(index)],
            self.label[index],
            self.clean_label[index],
            self.split[index],
            self.classes,
            self.kind,
        )

    def of_split(self, name: str) -> Examples:
        """The rows of one split."""
        return self.take(self.split == name)

    def check_labels(self) -> None:
        """Raise InputError where a label is no class."""
        wrong = np.flatnonzero((self.label < 0) | (self.label >= self.classes))
        if len(wrong):
            raise InputError(
                f"row {self.ids[wrong[0]]}: expected a label from 0 to {self.classes - 1}, found"
                f" {self.label[wrong[0]]} ({len(wrong)} such rows). Read the data again."
            )


def load_examples(
    data: Table,
    embeddings: Table | None = None,
    *,
    shard: int | None = None,
    rows: pa.Table | None = None,
) -> Examples:
    """The rows of a `read_dataset` table, in its order, or those of one of its shards.

    `rows`, where given, are some of them that were read already, with `example_columns`.

    Images are decoded to the shape in the manifest's notes: grey or RGB by its channels, resized
    where an image has another size. Where `embeddings` (id, embedding) are given they are the
    features, whatever the kind; text cannot do without.

    Raises
    ------
    RecipeError
        Text without embeddings.
    InputError
        An image that cannot be decoded, features of another length or not finite, a label
        outside the classes, a row without embedding; the row is named.
    StoreError
        The table's notes do not say what it holds.
    """
    check_inputs(data, embeddings)
    kind, classes, shape = _notes(data)
    column = {"image": "image", "features": "features"}.get(kind) if embeddings is None else None
    columns = example_columns(data, embeddings)
    if rows is not None:
        batches, n = iter(rows.select(columns).to_batches()), rows.num_rows
    else:
        batches = data.batches(columns) if shard is None else data.shard_batches(shard, columns)
        parts = [part for part in data.manifest.parts if shard is None or part["shard"] == shard]
        n = sum(part["rows"] for part in parts)
    x: Tensor | None = torch.empty((n, *shape), dtype=torch.uint8) if column == "image" else None
    meta: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in columns[:1] + columns[2:5]}
    start = 0
    for batch in (batch for batch in batches if batch.num_rows):
        for name, found in meta.items():
            found.append(batch.column(name).to_numpy(zero_copy_only=False))
        if column == "image" and x is not None:
            _images(batch, x[start : start + batch.num_rows])
        elif column == "features":
            values = torch.from_numpy(_features(batch, None if x is None else x.shape[1]))
            x = torch.empty((n, values.shape[1])) if x is None else x
            x[start : start + batch.num_rows] = values
        start += batch.num_rows
    joined = {name: np.concatenate(found) if found else np.zeros(0) for name, found in meta.items()}
    ids = joined["id"].astype(np.int64)
    if embeddings is not None:
        x = _embedded(embeddings, ids)
    examples = Examples(
        ids,
        torch.empty((n, 1)) if x is None else x,
        joined["label"].astype(np.int64),
        joined["clean_label"].astype(np.int64),
        joined["split"].astype(np.str_),
        classes,
        kind,
    )
    examples.check_labels()
    return examples


def example_columns(data: Table, embeddings: Table | None = None) -> list[str]:
    """Columns of a `read_dataset` table that its examples are made from."""
    column = {"image": "image", "features": "features"}.get(_notes(data)[0])
    more = [column] if column is not None and embeddings is None else []
    return ["id", "source", "split", "label", "clean_label", *more]


def check_inputs(data: Table, embeddings: Table | None) -> None:
    """Refuse text without embeddings, and embeddings of other rows, before anything is read.

    Raises RecipeError; StoreError where the data's notes do not say what it holds.
    """
    kind = _notes(data)[0]
    if kind == "text" and embeddings is None:
        raise RecipeError(
            f"data set `{data.manifest.name}` holds text: expected its vectors as input"
            " `embeddings`, found none. Add an `embed` step over the data and name it there."
        )
    if embeddings is not None and data.key not in embeddings.manifest.parents:
        raise RecipeError(
            f"expected embeddings made from `{data.manifest.name}` ({data.key[:12]}); found"
            f" `{embeddings.manifest.name}`, made from others. Name the `embed` step that reads"
            " this data set."
        )


def _notes(data: Table) -> tuple[str, int, tuple[int, ...]]:
    notes = data.manifest.notes
    kind, classes, shape = str(notes.get("kind")), notes.get("classes"), notes.get("shape")
    fits = kind in ("text", "features") or (kind == "image" and shape and len(shape) == 3)
    if not fits or not isinstance(classes, list):
        raise StoreError(
            f"table `{data.manifest.name}`: expected notes with kind (image, text or features),"
            f" classes, and the shape of images; found kind={kind!r}, shape={shape!r}. Make it"
            " with the step `read_dataset`."
        )
    return kind, len(classes), tuple(shape or ())


def _images(batch: pa.RecordBatch, out: Tensor) -> None:
    """Decode the images of a batch into (n, C, H, W) uint8."""
    from PIL import Image

    channels, height, width = out.shape[1:]
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise InputError(f"expected images of 1 or 3 channels; found a shape with {channels}.")
    names = batch.column("source").to_pylist()
    for row, content in enumerate(batch.column("image").to_pylist()):
        try:
            with Image.open(io.BytesIO(content)) as opened:
                image = opened.convert(mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(
                f"{names[row]}: expected a PNG or JPEG image, found one that cannot be decoded:"
                f" {error}. Mend or remove it and read the data again."
            ) from error
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.array(image, np.uint8).reshape(height, width, channels)
        out[row] = torch.from_numpy(pixels).permute(2, 0, 1)


def _features(batch: pa.RecordBatch, width: int | None) -> FloatArray:
    offset, values = flat(batch.column("features"))
    lengths = np.diff(offset)
    wanted = int(lengths[0]) if width is None else width
    values = values.astype(np.float32)
    finite = np.isfinite(values)
    wrong = lengths != wanted
    if wrong.any() or not wanted:
        row = int(np.argmax(wrong))
        raise InputError(
            f"{batch.column('source')[row]}: expected {wanted or 'some'} features as in the first"
            f" row, found {lengths[row]}. Give every row the same columns."
        )
    if not finite.all():
        place = int(np.argmin(finite))
        raise InputError(
            f"{batch.column('source')[place // wanted]}: expected finite features, found"
            f" {values[place]} in column {place % wanted}. Mend or remove the row."
        )
    return values.reshape(-1, wanted)


def _embedded(embeddings: Table, ids: IntArray) -> Tensor:
    values = vectors_of(embeddings.lookup(ids, columns=["embedding"]).column("embedding"))
    if len(values) != len(ids) or not np.isfinite(values).all():
        raise InputError(
            f"table `{embeddings.manifest.name}`: expected one finite vector for each of the"
            f" {len(ids)} rows; found {len(values)} vectors,"
            f" {int((~np.isfinite(values).all(axis=1)).sum())} of them not finite. Embed this"
            " data set again."
        )
    return torch.from_numpy(np.array(values))  # Arrow's memory cannot be written to


def description_of(table: Table) -> dict[str, Any]:
    """What a `train_classifier` table says of its network: name, sizes, shape, classes."""
    made: dict[str, Any] = json.loads(table.attachment(DESCRIPTION).read_text(encoding="utf-8"))
    return made


def runs_of(table: Table) -> int:
    """How many runs a `train_classifier` table holds the weights of."""
    names = {item["name"] for item in table.manifest.attachments}
    return sum(WEIGHTS.format(run) in names for run in range(len(names)))


def classifier_from_table(table: Table, run: int = 0) -> Classifier:
    """The network of a `train_classifier` table after one of its runs, in evaluation mode.

    Raises RecipeError where there is no such run.
    """
    if not 0 <= run < runs_of(table):
        raise RecipeError(
            f"expected a run of `{table.manifest.name}` from 0 to {runs_of(table) - 1}; found"
            f" {run}. Raise `runs` of its train_classifier step."
        )
    description = table.attachment(DESCRIPTION).read_text(encoding="utf-8")
    return load_classifier(description, table.attachment(WEIGHTS.format(run)))


# -- training ----------------------------------------------------------------------------------


class Trainer:
    """A training run that can be stopped after any step, saved, and taken up again.

    What a step draws is a function of (seed, step), so a run that was taken up gives the same
    weights as one that was not stopped. `fit` is the whole of it in one call.

    Parameters are those of `fit`. Raises InputError where rows, labels, weights or the teacher
    do not fit together.
    """

    def __init__(
        self,
        model: Classifier,
        examples: Examples,
        *,
        steps: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        weight: npt.ArrayLike | None = None,
        teacher: npt.ArrayLike | None = None,
        alpha: float = 0.0,
        temperature: float = 1.0,
        device: str | torch.device | None = None,
    ) -> None:
        _check_run(examples, steps, batch_size, learning_rate)
        check_distillation(alpha, temperature)
        if alpha > 0 and teacher is None:
            raise InputError(f"alpha {alpha} needs a teacher's log probabilities; found none.")
        self.device = pick_device(device)
        self.steps, self.learning_rate, self.seed = steps, learning_rate, seed
        self.alpha, self.temperature = alpha, temperature
        self.done = 0
        self._x, self._label = examples.x, torch.from_numpy(examples.label)
        self._weight = _aligned("weight", weight, (len(examples),))
        self._teacher = _aligned("teacher", teacher, (len(examples), examples.classes))
        # Batches of nearly equal size, so that no step of a pass sees a few rows alone.
        self.steps_a_pass = math.ceil(len(examples) / batch_size)
        self._pass: tuple[int, list[IntArray]] = (-1, [])
        model.fit_input(examples.x)
        self.model = model.to(self.device)
        self._optimiser = torch.optim.SGD(
            model.parameters(),
            lr=learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=_DECAY,
            fused=True,
        )

    def run(self, until: int, on_step: Callable[[int, float], None] | None = None) -> None:
        """Go on to step `until`; `on_step(step, loss)` follows each, steps counted from 1.

        Raises ModelError where the loss is no longer a number.
        """
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            self.model.train()
            while self.done < min(until, self.steps):
                loss = self._step()
                self.done += 1
                if on_step is not None:
                    on_step(self.done, loss)

    def _step(self) -> float:
        for group in self._optimiser.param_groups:
            group["lr"] = self.learning_rate * _rate(self.done, self.steps)
        torch.manual_seed(hash((self.seed, self.done)))  # for a network with dropout
        rows = torch.from_numpy(self._batch(self.done))
        logits = self.model(self._rows(self._x, rows))
        loss = distillation_loss(
            logits,
            self._rows(self._label, rows),
            None if self._teacher is None else self._rows(self._teacher, rows),
            alpha=self.alpha,
            temperature=self.temperature,
            weight=None if self._weight is None else self._rows(self._weight, rows),
        )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"expected a finite loss, found {value} at step {self.done + 1} (epoch"
                f" {self.done // self.steps_a_pass}, from 0). Lower `learning_rate`, or look for"
                " features of a huge scale."
            )
        self._optimiser.zero_grad()
        torch.autograd.backward(loss)
        # Without it every second run on MNIST lost its hidden units to one long step.
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _LONGEST_GRADIENT)
        self._optimiser.step()
        return value

    def _rows(self, values: Tensor, rows: Tensor) -> Tensor:
        return values[rows].to(self.device, non_blocking=True)

    def _batch(self, step: int) -> IntArray:
        number, place = divmod(step, self.steps_a_pass)
        if self._pass[0] != number:
            order = np.random.default_rng((self.seed, number)).permutation(len(self._label))
            self._pass = number, np.array_split(order, self.steps_a_pass)
        return self._pass[1][place]

    def state(self) -> dict[str, Tensor]:
        """Weights, optimiser and step as named tensors."""
        tensors = {f"model.{k}": v.detach().cpu() for k, v in self.model.state_dict().items()}
        for number, values in self._optimiser.state_dict()["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser.{number}.{key}"] = value.detach().cpu()
        return {**tensors, "step": torch.tensor([self.done])}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up a run where `state` was taken. Raises ModelError for another network's."""
        weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise ModelError(
                f"expected the state of this network, found another: {error}"
            ) from error
        full = self._optimiser.state_dict()
        full["state"] = {}
        for name, value in state.items():
            head, _, rest = name.partition(".")
            if head == "optimiser":
                number, _, key = rest.partition(".")
                full["state"].setdefault(int(number), {})[key] = value
        self._optimiser.load_state_dict(full)
        self.done = int(state["step"][0])


def fit(
    model: Classifier,
    examples: Examples,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    weight: npt.ArrayLike | None = None,
    teacher: npt.ArrayLike | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
    on_step: Callable[[int, float], None] | None = None,
    device: str | torch.device | None = None,
) -> None:
    """Train a model in place, for exactly `steps` optimiser steps whatever N.

    Each pass takes every row once, in an order drawn from (seed, pass), in batches of nearly
    equal size of at most `batch_size` rows; N may be smaller than that. SGD with Nesterov
    momentum 0.9 and weight decay 5e-4; a gradient longer than 1 is cut to that length; the
    learning rate rises over the first tenth of the steps and falls to zero by a cosine.

    Parameters
    ----------
    model
        A `Classifier`; left on the device it was trained on.
    examples
        All rows are trained on, whatever their split.
    learning_rate
        The peak.
    weight
        (N,) float32 that each row's loss is multiplied by; the mean stays over the batch.
    teacher
        (N, classes) float32 log probabilities, needed where alpha > 0.
    alpha, temperature
        See `distillation_loss`.
    on_step
        Called with (step from 1, loss in nats) after each.
    device
        cpu, cuda …; None takes what there is.

    Raises
    ------
    InputError
        No rows, a label outside the classes, arrays that are not aligned or not finite.
    ModelError
        The loss is no longer a number.
    """
    trainer = Trainer(
        model,
        examples,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        weight=weight,
        teacher=teacher,
        alpha=alpha,
        temperature=temperature,
        device=device,
    )
    trainer.run(steps, on_step)


def predict(model: Classifier, x: Tensor, batch_size: int = 512) -> tuple[FloatArray, FloatArray]:
    """Logits (N, C) and last features (N, d), float32, in evaluation mode.

    The model's mode and device stay as they were. Raises ModelError where a logit is not finite.
    """
    was, device = model.training, next(model.parameters()).device
    model.eval()
    logits, features = [], []
    try:
        with torch.no_grad():
            for part in _parts(x, batch_size):
                found = model.features(part.to(device))
                features.append(found.float().cpu())
                logits.append(model.head(found).float().cpu())
    finally:
        model.train(was)
    joined, deep = torch.cat(logits).numpy(), torch.cat(features).numpy()
    if not np.isfinite(joined).all():
        row = int(np.argmin(np.isfinite(joined).all(axis=1)))
        raise ModelError(
            f"expected finite logits, found {joined[row].tolist()[:5]} for row {row} (from 0)."
            " Train with a lower `learning_rate`."
        )
    return joined, deep


def _parts(x: Tensor, size: int) -> Iterator[Tensor]:
    """Slices of at most `size` rows; one empty slice where there are no rows."""
    for start in range(0, max(len(x), 1), size):
        yield x[start : start + size]


def pick_device(device: str | torch.device | None) -> torch.device:
    """That device; None is CUDA where there is one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear up, then a cosine down to zero."""
    rise = max(1, round(_WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - rise) / max(1, steps + 1 - rise)))


def _check_run(examples: Examples, steps: int, batch_size: int, learning_rate: float) -> None:
    if not len(examples):
        raise InputError(
            f"expected rows to train on, found none. Look at the split `{TRAIN}` of the data."
        )
    if steps < 1 or batch_size < 1 or not 0 < learning_rate < math.inf:
        raise InputError(
            "expected at least one step, one row a batch and a learning rate above 0; found"
            f" steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}."
        )
    examples.check_labels()


def _aligned(name: str, value: npt.ArrayLike | None, shape: tuple[int, ...]) -> Tensor | None:
    if value is None:
        return None
    array = np.asarray(value, np.float32)
    if array.shape != shape or not np.isfinite(array).all():
        raise InputError(
            f"`{name}` must be finite and of shape {shape}, aligned with the examples; found"
            f" {array.shape}{'' if np.isfinite(array).all() else ' with values not finite'}."
        )
    return torch.from_numpy(array)
