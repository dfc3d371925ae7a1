"""Step `cluster_tokens`: one word to stand for a cluster of like words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from ...errors import RecipeError
from ...pruners.contract import FloatArray
from ...pruners.models.encoders import PACKAGED_NAME
from ...storage import Table
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec, use_threads
from ..prompts import clusters as clustering
from ..prompts.tables import TOKEN_CLUSTERS
from ..prompts.task import PromptTaskOptions, task_of


class ClusterTokensOptions(StepOptions):
    """Options of `cluster_tokens`.

    Attributes
    ----------
    clusters
        How many, at most as many as words. None takes the published 2000 where there are more
        than twice as many words, else every word stands for itself.
    algorithm
        `kmeans`, as published, or `minibatch`, which looks at some words at a time.
    vectors
        `input_embeddings`: mean row of the pieces of a word in the task's model, as published;
        of an encoder without such rows what it makes of the word alone. `encoder`: what the
        sentence encoder named in `encoder` makes of the word.
    encoder
        Folder, hub id, or the packaged one.
    iterations
        Rounds of k-means, at most.
    """

    clusters: int | None = Field(default=None, ge=1, le=1_000_000)
    algorithm: clustering.Algorithm = "kmeans"
    vectors: Literal["input_embeddings", "encoder"] = "input_embeddings"
    encoder: str = PACKAGED_NAME
    iterations: int = Field(default=300, ge=1, le=10_000)


def plan(options: ClusterTokensOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard; what the vectors are made with in the key, unless nothing is clustered.

    Raises
    ------
    RecipeError
        Input embeddings of a model behind an endpoint, which are not here.
    ModelError
        The model is not there.
    """
    words = int(inputs["vocabulary"].manifest.kept)
    wanted = clustering.clusters_wanted(words, options.clusters)
    if wanted is None:
        return Plan(TOKEN_CLUSTERS, 1, {"clusters": None}, notes={"words": words})
    kind, folder, digests = _source(options, task_of(inputs["task"]))
    identity = {
        "clusters": wanted,
        "algorithm": options.algorithm,
        "vectors": kind,
        "iterations": options.iterations,
    }
    return Plan(
        TOKEN_CLUSTERS,
        1,
        identity,
        models=digests,
        payload=(kind, str(folder), wanted),
        notes={"words": words},
    )


def _source(
    options: ClusterTokensOptions, task: PromptTaskOptions
) -> tuple[str, Path, dict[str, str]]:
    """What the vectors are, the folder of the model that has them, and its digests."""
    from .. import models

    if options.vectors == "encoder":
        found = models.encoder(options.encoder)
        return "encoder", found.path, {"vectors": found.sha256}
    if task.black_box == "endpoint":
        raise RecipeError(
            "`vectors: input_embeddings`: those of a model behind an endpoint are not here. Set"
            " `vectors: encoder`, or `clusters: null` and at most"
            f" {2 * clustering.PUBLISHED_CLUSTERS} words (`most` of `prompt_vocabulary`)."
        )
    from ...pruners.models.token_rows import has_token_rows, transformer_home
    from ...pruners.models.tokenizers import load_tokenizer, tokenizer_sha256

    found = models.encoder(task.model)
    if task.black_box == "encoder" and not has_token_rows(found.path):
        return "encoder", found.path, {"vectors": found.sha256}
    tokenizer = tokenizer_sha256(load_tokenizer(transformer_home(found.path)))
    digests = {"vectors": found.sha256, "tokenizer": tokenizer}
    return "input_embeddings", found.path, digests


def shard(job: Job, index: int, out: Rows) -> None:
    """Cluster the words that the vocabulary keeps; rows in the order of their ids."""
    options: ClusterTokensOptions = job.options  # type: ignore[assignment]
    rows = job.input("vocabulary").to_table(["id", "text", "keep"])
    rows = rows.filter(rows.column("keep")).sort_by("id")
    ids = rows.column("id").to_numpy().astype(np.int64)
    texts = rows.column("text").to_pylist()
    if job.plan.payload is None:
        made = clustering.unclustered(ids)
    else:
        kind, folder, wanted = job.plan.payload
        use_threads(job.threads)
        vectors = _vectors(kind, Path(folder), texts)
        made = clustering.cluster_words(
            ids,
            vectors,
            wanted,
            algorithm=options.algorithm,
            iterations=options.iterations,
            seed=job.seed,
        )
    reasons = np.where(made.keep, clustering.REPRESENTATIVE, clustering.IN_CLUSTER)
    columns = [ids, texts, made.cluster, made.distance, made.keep, reasons]
    out.write(
        pa.table(
            [pa.array(c, f.type) for c, f in zip(columns, TOKEN_CLUSTERS, strict=True)],
            schema=TOKEN_CLUSTERS,
        )
    )
    kept = int(made.keep.sum())
    out.count(kept, {clustering.IN_CLUSTER: len(ids) - kept} if kept < len(ids) else {})


def _vectors(kind: str, folder: Path, texts: list[str]) -> FloatArray:
    if kind == "encoder":
        from ..models import sentence_encoder

        return sentence_encoder(str(folder)).encode(texts)
    from ...pruners.models.token_rows import token_vectors

    return token_vectors(folder, texts)


SPEC = StepSpec(
    name="cluster_tokens",
    version=1,
    options=ClusterTokensOptions,
    inputs={"vocabulary": Slot(("prompt_vocabulary",)), "task": Slot(("prompt_task",))},
    plan=plan,
    shard=shard,
    about="Clusters of like words, and the word of each that stands for it.",
)
