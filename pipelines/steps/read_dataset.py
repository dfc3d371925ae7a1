"""Step `read_dataset`: labelled images, texts or rows of numbers to one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from ...errors import InputError
from ...storage import Table, digest
from .. import builtin_datasets, datasets, sources
from ..dataset_files import DataPiece, scan_files
from ..dataset_tables import DATASET
from ..engine import Job, Plan, Rows, StepContext, StepOptions, StepSpec


class ReadDatasetOptions(StepOptions):
    """Options of `read_dataset`.

    Attributes
    ----------
    path
        A file, a folder (read recursively, names starting with a dot left out), a glob pattern,
        or a list of those; see `pipelines.dataset_files` for the kinds of files.
        `builtin:digits` is scikit-learn's digits as images; `builtin:noisy-digits` the same
        with a tenth of the training labels flipped; `builtin:python-docstrings` are texts from
        Python's own docstrings, labelled by the chapter of the library reference.
    test_path
        The rows of the test split, as `path`; those of `path` are then all for training.
    holdout
        Share of the rows that are put into the test split by a hash of their content, so that
        copies of a row fall on one side. Used only where no test_path, no split_field and no
        names of files or folders (train-…, t10k-…, test/…) say the split of all rows.
    split_field
        Key of a row that says its split: train, or test, validation and the like, which are
        all held out as `test`.
    label_field, group_field, text_field, image_field
        Keys of a row, dotted where nested. An image is bytes, {bytes, path} or a path
        relative to its file.
    features
        One key that holds a list of numbers, or a list of keys that hold a number each.
    kind
        image, text or features, where a row has several of them.
    image_size
        [height, width] that images of another size are resized to; without it they are
        rejected.
    flip_labels
        Share of the training labels that are flipped to another class, by a hash of (seed,
        id): noise planted to see which scores find it. The labels before it are kept in
        `clean_label`.
    shard_bytes
        About so many bytes of sources make a shard. The rows are the same for any value, so it
        does not enter the key.
    """

    paths: ClassVar[tuple[str, ...]] = ("path", "test_path")

    path: str | list[str]
    test_path: str | list[str] | None = None
    holdout: float = Field(default=0.2, ge=0.0, le=1.0)
    split_field: str | None = None
    label_field: str = "label"
    group_field: str | None = None
    text_field: str = "text"
    features: str | Annotated[list[str], Field(min_length=1)] = "features"
    image_field: str = "image"
    kind: datasets.Kind | None = None
    image_size: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    flip_labels: float = Field(default=0.0, ge=0.0, le=1.0)
    shard_bytes: int = Field(default=sources.PIECE_BYTES, ge=1)

    @model_validator(mode="after")
    def _agree(self) -> ReadDatasetOptions:
        if self.test_path is not None and self.split_field is not None:
            raise ValueError("`test_path` and `split_field` both say the split: give one of them")
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError("`image_size` is [height, width] in pixels, each at least 1")
        if self.noisy and self.flip_labels:
            raise ValueError(
                f"{builtin_datasets.NOISY_DIGITS} has flipped labels already: use"
                f" {builtin_datasets.DIGITS} with `flip_labels`"
            )
        return self

    @property
    def noisy(self) -> bool:
        """Whether the built-in set with planted noise is read."""
        return builtin_datasets.NOISY_DIGITS in _listed(self.path)

    def columns(self) -> datasets.Columns:
        """The names of columns."""
        many = isinstance(self.features, list)
        return datasets.Columns(
            label=self.label_field,
            split=self.split_field,
            group=self.group_field,
            text=self.text_field,
            features=tuple(self.features) if many else str(self.features),
            image=self.image_field,
        )


def _listed(path: str | list[str] | None) -> list[str]:
    if path is None:
        return []
    return [path] if isinstance(path, str) else path


def _scan(options: ReadDatasetOptions) -> tuple[list[DataPiece], list[str], list[str]]:
    """The pieces, digests of what was found, and names of files left out."""
    names: dict[str, str] = {}
    pieces: list[DataPiece] = []
    digests: list[str] = []
    skipped: list[str] = []
    for paths, split in ((options.path, "train"), (options.test_path, "test")):
        for path in _listed(paths):
            found = scan_files(path, names, piece_bytes=options.shard_bytes)
            told = options.test_path is not None
            pieces += [replace(one, split=split) if told else one for one in found.pieces]
            digests.append(f"{split}:{found.digest}")
            skipped += found.skipped
    if not pieces:
        raise InputError(
            f"{', '.join(_listed(options.path))}: expected rows of a labelled data set, found none."
            " Look at `path`, or at what wrote the file."
        )
    twice = [key for key, n in Counter((p.name, p.start) for p in pieces).items() if n > 1]
    if twice:
        raise InputError(
            f"expected every file once; {twice[0][0]} is named by `path` and `test_path` twice."
            " Leave one of them out."
        )
    return pieces, digests, skipped


def plan(options: ReadDatasetOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """Pass over all rows for classes, size and splits; a shard for each `shard_bytes` or so."""
    pieces, digests, skipped = _scan(options)
    split_by: datasets.SplitBy = "content"
    if options.split_field is not None:
        split_by = "field"
    elif options.test_path is not None:
        split_by = "path"
    elif {piece.split for piece in pieces} == {"train", "test"}:
        split_by = "place"
    found = datasets.survey(
        pieces,
        options.columns(),
        kind=options.kind,
        split_by=split_by,
        holdout=options.holdout,
        image_size=(options.image_size[0], options.image_size[1]) if options.image_size else None,
        noise=builtin_datasets.NOISE if options.noisy else options.flip_labels,
    )
    identity = {
        **options.model_dump(exclude={"path", "test_path", "shard_bytes", "holdout"}),
        "holdout": options.holdout if split_by == "content" else None,
        "noisy": options.noisy,
        "source_digest": digest([*digests, found.images]),
    }
    notes = {
        "path": _listed(options.path),
        "test_path": _listed(options.test_path),
        "kind": found.layout.kind,
        "classes": list(found.layout.classes),
        "shape": found.shape,
        "rows": dict(found.rows),
        "split_by": split_by,
        "flip_labels": found.layout.noise,
        "remarks": found.remarks,
        "files_of_other_kinds": skipped,
    }
    groups = sources.group_pieces(pieces, options.shard_bytes)
    return Plan(DATASET, len(groups), identity, payload=(found.layout, groups), notes=notes)


def shard(job: Job, index: int, out: Rows) -> None:
    """Check and write the rows of one group of pieces."""
    options: ReadDatasetOptions = job.options  # type: ignore[assignment]
    layout, groups = job.plan.payload
    kept = 0
    seed = 0 if options.noisy else job.seed
    for rows in datasets.dataset_rows(groups[index], layout, out.reject, seed=seed):
        out.write(rows)
        kept += rows.num_rows
    out.count(kept, {})


SPEC = StepSpec(
    name="read_dataset",
    version=1,
    options=ReadDatasetOptions,
    inputs={},
    plan=plan,
    shard=shard,
    about="Labelled images, texts or rows of numbers to one table.",
)
