"""Step `train_classifier`: train on the train split, and write what each row does meanwhile.

The table is the training dynamics, one shard an epoch; the final weights of every run are
attached, so the same table is the teacher.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...errors import InputError, ModelError
from ...storage import Table, TableWriter, file_digest, row_id
from ..dataset_tables import DYNAMICS, TRAIN
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec, use_threads

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ...pruners.models.classifiers import Classifier, ModelSpec
    from ..classifier import Examples
    from ..dynamics import EpochWriter


class TrainClassifierOptions(StepOptions):
    """Options of `train_classifier`.

    Attributes
    ----------
    model
        auto, mlp, cnn, resnet20, or package.module:factory for a network of one's own.
    hidden, depth
        Sizes of mlp and cnn; see `ModelSpec`.
    epochs
        Passes over the train split. Dyn-Unc and DUAL need enough of them to memorise.
    batch_size, learning_rate
        Rows a step, and the peak of the learning rate.
    runs
        Trainings with other weights and orders; scores average over them.
    gradient_norm
        Record the norm of each row's gradient: of the last layer, or of all parameters (slow).
    keep_logits
        Store the logits too: 4 bytes a class, row, epoch and run.
    device
        cpu, cuda …; None takes what there is.
    """

    model: str = "auto"
    hidden: int = Field(default=256, ge=16, le=65_536)
    depth: int = Field(default=2, ge=1, le=64)
    epochs: int = Field(default=30, ge=1, le=100_000)
    batch_size: int = Field(default=64, ge=1, le=1_048_576)
    learning_rate: float = Field(default=0.05, gt=0, le=100)
    runs: int = Field(default=1, ge=1, le=1000)
    gradient_norm: Literal["last_layer", "all"] | None = None
    keep_logits: bool = False
    device: str | None = None


def plan(
    options: TrainClassifierOptions, inputs: Mapping[str, Table], context: StepContext
) -> Plan:
    """No shards of its own: `finish` trains, and writes one after every epoch."""
    from ...pruners.models.classifiers import ModelSpec, factory_file
    from ..classifier import check_inputs

    data = inputs["data"]
    check_inputs(data, inputs.get("embeddings"))
    spec = ModelSpec(options.model, options.hidden, options.depth)
    source = factory_file(spec.name) if spec.own else None
    return Plan(
        DYNAMICS,
        None,
        options.model_dump(exclude={"device"}),
        {"factory": file_digest(source)} if source else {},
        notes={
            "data": data.manifest.name,
            "classes": data.manifest.notes["classes"],
            "runs": options.runs,
            "epochs": options.epochs,
        },
    )


def finish(job: Job, writer: TableWriter) -> None:
    """Train every run, write its epochs, attach its weights.

    A run that is stopped leaves its finished epochs in the table's journal and its state in the
    cache; the next one goes on from there, to the same rows.
    """
    from ...pruners.models.classifiers import ModelSpec, describe, save_classifier
    from ..classifier import DESCRIPTION, WEIGHTS, load_examples
    from ..classifier_state import forget_states
    from ..dynamics import EpochWriter

    options: TrainClassifierOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    embeddings = job.input("embeddings") if job.has("embeddings") else None
    examples = load_examples(job.input("data"), embeddings).of_split(TRAIN)
    if not len(examples):
        raise InputError(
            f"data set `{job.input('data').manifest.name}`: expected rows in the split {TRAIN},"
            " found none. Lower `holdout` of read_dataset, or look at its split field."
        )
    spec = ModelSpec(options.model, options.hidden, options.depth)
    epochs = EpochWriter(
        writer,
        examples,
        options.runs,
        options.epochs,
        gradient_norm=options.gradient_norm is not None,
        keep_logits=options.keep_logits,
    )
    writer.attach(DESCRIPTION, describe(spec, examples.shape, examples.classes).encode())
    with tempfile.TemporaryDirectory(prefix="prunery-classifier-") as folder:
        for run in range(options.runs):
            model = _train(job, options, spec, examples, epochs, run)
            path = Path(folder, WEIGHTS.format(run))
            save_classifier(model.cpu(), path)
            writer.attach(path.name, path)
    forget_states(job.key)


def _train(
    job: Job,
    options: TrainClassifierOptions,
    spec: ModelSpec,
    examples: Examples,
    epochs: EpochWriter,
    run: int,
) -> Classifier:
    """One run from its last saved epoch to its end."""
    from ..classifier import Trainer, make_model, predict
    from ..classifier_state import load_state, save_state, state_file

    seed = row_id("train_classifier", job.seed, run)
    trainer = Trainer(
        make_model(spec, examples.shape, examples.classes, seed),
        examples,
        steps=options.epochs * math.ceil(len(examples) / options.batch_size),
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=seed,
        device=options.device,
    )
    path = state_file(job.key, run)
    saved = load_state(path)
    if saved is not None and int(saved["step"][0]) // trainer.steps_a_pass <= epochs.written(run):
        trainer.load(saved)  # else it is of another store, which has more epochs
    done = trainer.done // trainer.steps_a_pass
    if 0 < done < options.epochs:  # what the next epoch is compared with
        epochs.epoch(run, done - 1, predict(trainer.model, examples.x)[0])
    for epoch in range(done, options.epochs):
        try:
            trainer.run((epoch + 1) * trainer.steps_a_pass)
            logits, features = predict(trainer.model, examples.x)
        except ModelError as error:
            raise ModelError(f"train_classifier, run {run}, epoch {epoch}: {error}") from error
        norms = None
        if epochs.is_pending(run, epoch):
            norms = _gradient_norms(options, trainer.model, examples, logits, features)
        epochs.epoch(run, epoch, logits, gradient_norm=norms)
        save_state(path, trainer.state())
    return trainer.model


def _gradient_norms(
    options: TrainClassifierOptions,
    model: Classifier,
    examples: Examples,
    logits: npt.NDArray[np.float32],
    features: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32] | None:
    """As the option says; the last layer's come from the pass that was made anyway."""
    from ..dynamics import gradient_norms, last_layer_norms

    if options.gradient_norm is None:
        return None
    if options.gradient_norm == "all":
        return gradient_norms(model, examples.x, examples.label, "all")
    return last_layer_norms(logits, features, examples.label, bias=model.head.bias is not None)


SPEC = StepSpec(
    name="train_classifier",
    version=1,
    options=TrainClassifierOptions,
    inputs={"data": Slot(("read_dataset",)), "embeddings": Slot(("embed",), optional=True)},
    plan=plan,
    finish=finish,
    about="A classifier of the train split, and what each row did while it was trained.",
)
