"""Step `prune_encoder`: an embedding model with the weights at 0 that a domain needs least.

The table's attachments are the model's folder (`compression.encoder_folders.encoder_folder` gives
it back); its rows say how many weights of each matrix stay, and what became of retrieval on pairs
that were held out, beside magnitude and random weights at the same budget.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from ...errors import InputError, RecipeError
from ...pruners import rules
from ...storage import Table, TableWriter, row_id
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec, use_threads, write_whole
from ..models import encoder

if TYPE_CHECKING:
    from torch import Tensor

    from ..compression.embedding_gradients import Masks

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # matrix, or quality
        pa.field("method", pa.string(), nullable=False),  # dense, gaprune, magnitude, random
        pa.field("set", pa.string(), nullable=False),  # of quality: domain or general; else ""
        pa.field("layer", pa.int32(), nullable=False),  # of a matrix; else -1
        pa.field("module", pa.string(), nullable=False),  # path in the transformer; else ""
        pa.field("total", pa.int64(), nullable=False),  # weights, or pairs held out
        pa.field("kept", pa.int64(), nullable=False),  # weights; of quality all that were pruned
        pa.field("mrr", pa.float32()),
        pa.field("recall_at_10", pa.float32()),
        pa.field("cosine", pa.float32()),  # mean, with the dense model's vectors
    ]
)
_COLUMNS = {"chunk": ["title", "text"], "read_chats": ["messages"], "read_dataset": ["text"]}
_SETS = ("domain", "general")
_SPLIT, _ORDER = 0, 1  # added to the seed, so that the two draws have nothing to do with another
_EMBEDDED_AT_ONCE = 32


class PruneEncoderOptions(StepOptions):
    """Options of `prune_encoder`.

    A row gives a pair of texts that belong together: of `chunk` the title and the text, of
    `read_chats` the first question and its answer, else the two halves of the text. Rows that
    have none are passed over.

    Attributes
    ----------
    encoder
        A sentence-transformers model: folder, hub id, or the packaged all-MiniLM-L6-v2.
    keep
        Share of the weights of all chosen matrices together.
    parts
        mlp, attention, or both.
    beta, regularisation
        Of the method `gaprune`.
    fisher, alignment
        published and product, or balanced and cosine: see `compression.embedding_gradients`.
        As published, the score is almost that of magnitude alone.
    pairs, batch_pairs
        Pairs of each set at most, and in a batch, whose other pairs are the negatives.
    scale
        Of the cosines in the contrastive loss: 1/temperature.
    held_out
        Share of each set's rows that are judged on and nothing else.
    device
        cpu, cuda …; None is a GPU where there is one.
    """

    encoder: str = "all-MiniLM-L6-v2"
    keep: float = Field(default=0.5, ge=0, le=1)
    parts: Literal["mlp", "attention", "both"] = "mlp"
    beta: float = Field(default=1.0, ge=0)
    regularisation: float = Field(default=0.3, ge=0)
    fisher: Literal["published", "balanced"] = "published"
    alignment: Literal["product", "cosine"] = "product"
    pairs: int = Field(default=512, ge=2, le=1_000_000)
    batch_pairs: int = Field(default=16, ge=2, le=4096)
    scale: float = Field(default=20.0, gt=0, le=1000)
    held_out: float = Field(default=0.2, gt=0, lt=1)
    device: str | None = None


def plan(options: PruneEncoderOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No shards: the model is one piece."""
    for role in _SETS:
        source = inputs[role].manifest
        if source.step == "read_dataset" and source.notes["kind"] != "text":
            raise RecipeError(
                f"prune_encoder needs rows of text; `{source.name}` holds rows of kind"
                f" {source.notes['kind']}."
            )
    resolved = encoder(options.encoder)
    return Plan(
        SCHEMA,
        None,
        options.model_dump(exclude={"encoder", "device"}),
        {"encoder": resolved.sha256},
        payload=str(resolved.path),
        notes={"encoder": options.encoder},
    )


def finish(job: Job, writer: TableWriter) -> None:
    """Score, prune, judge, attach and write."""
    from ...pruners.weight.gaprune import GaPrune
    from ..compression import embedding_gradients as gradients
    from ..compression.encoder_folders import attachments, load_encoder, write_pruned

    options: PruneEncoderOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    source = Path(job.plan.payload)
    model, network = load_encoder(source, options.device)
    layers = gradients.encoder_matrices(network, options.parts)
    sets = {role: _pairs(job.input(role), options, job.seed) for role in _SETS}
    found = {
        role: gradients.pair_gradients(
            model,
            network,
            list(layers),
            train,
            batch_pairs=options.batch_pairs,
            scale=options.scale,
        )
        for role, (train, _) in sets.items()
    }
    weights = {path: network.get_submodule(path).weight.detach().cpu().clone() for path in layers}
    method = GaPrune(keep=options.keep, beta=options.beta, regularisation=options.regularisation)
    scores = {
        "gaprune": gradients.gaprune_scores(
            method,
            weights,
            found["domain"],
            found["general"],
            fisher=options.fisher,
            align=options.alignment,
        ),
        "magnitude": gradients.magnitude_scores(weights),
        "random": gradients.random_scores(weights, job.seed),
    }
    masks = {name: gradients.keep_over_all(made, options.keep) for name, made in scores.items()}
    held = {role: rows for role, (_, rows) in sets.items()}
    quality = _judged(model, network, weights, masks, held)
    with tempfile.TemporaryDirectory(prefix="prunery-encoder-") as folder:
        write_pruned(source, Path(folder), masks["gaprune"], network.base_model_prefix)
        for name, path in attachments(Path(folder)).items():
            writer.attach(name, path)
    rows = [*_matrix_rows(masks["gaprune"], layers), *quality]
    for row in rows:
        row["id"] = row_id(
            "prune_encoder", *(row[name] for name in SCHEMA.names[1:5]), row["module"]
        )
    write_whole(writer, pa.Table.from_pylist(rows, SCHEMA))


def _pairs(
    table: Table, options: PruneEncoderOptions, seed: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs to score with and pairs to judge on, each in an order drawn from (seed, id).

    Raises InputError where either has fewer than 2.
    """
    step = table.manifest.step
    ids: list[int] = []
    pairs: list[tuple[str, str]] = []
    for batch in table.batches(columns=["id", *_COLUMNS[step]]):
        for row in batch.to_pylist():
            for pair in _pair(step, row):
                ids.append(row["id"])
                pairs.append(pair)
    at = np.array(ids, np.int64)
    order = np.argsort(rules.uniform(seed + _ORDER, at), kind="stable")
    held = rules.uniform(seed + _SPLIT, at) < options.held_out
    made = tuple(
        [pairs[i] for i in order if held[i] == wanted][: options.pairs] for wanted in (False, True)
    )
    for name, part in zip(("score with", "judge on"), made, strict=True):
        if len(part) < 2:
            raise InputError(
                f"prune_encoder: expected at least 2 pairs of texts to {name} in"
                f" `{table.manifest.name}`; found {len(part)} ({len(pairs)} pairs in all, of which"
                f" a share of {options.held_out:g} is held out). Give more rows."
            )
    return made[0], made[1]


def _pair(step: str, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """At most one pair of texts that belong together."""
    if step == "read_chats":
        asked = [m["content"] for m in row["messages"] if m["role"] == "user"]
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        if asked and answers and asked[0].strip() and answers[0].strip():
            yield asked[0], answers[0]
            return
        text = "\n".join(m["content"] for m in row["messages"])
    else:
        text = row["text"]
        if row.get("title") and text.strip():
            yield row["title"], text
            return
    words = text.split()
    if len(words) >= 2:
        half = len(words) // 2
        yield " ".join(words[:half]), " ".join(words[half:])


def _judged(
    model: Any,
    network: Any,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Masks],
    held: Mapping[str, list[tuple[str, str]]],
) -> list[dict[str, Any]]:
    """A row of quality for each method and set, the dense model first."""
    from ..compression.embedding_gradients import retrieval_quality

    total = sum(weight.numel() for weight in weights.values())
    dense = {role: _vectors(model, pairs) for role, pairs in held.items()}
    rows = []
    for method, chosen in {"dense": None, **masks}.items():
        kept = total if chosen is None else sum(int(mask.sum()) for mask in chosen.values())
        _put(network, weights, chosen)
        for role, pairs in held.items():
            found = retrieval_quality(
                dense[role] if chosen is None else _vectors(model, pairs), dense[role]
            )
            rows.append(
                {
                    "kind": "quality",
                    "method": method,
                    "set": role,
                    "layer": -1,
                    "module": "",
                    "total": len(pairs),
                    "kept": kept,
                    "mrr": found.mrr,
                    "recall_at_10": found.recall,
                    "cosine": found.cosine,
                }
            )
    _put(network, weights, None)
    return rows


def _put(network: Any, weights: Mapping[str, Tensor], masks: Masks | None) -> None:
    """Give the network its dense weights, or those that a mask keeps."""
    import torch

    for path, weight in weights.items():
        to = network.get_submodule(path).weight.data
        cut = torch.from_numpy(~masks[path]) if masks is not None else None
        to.copy_(weight if cut is None else weight.masked_fill(cut, 0.0))


def _vectors(model: Any, pairs: list[tuple[str, str]]) -> tuple[Any, Any]:
    """Unit vectors of the first texts and of the second ones."""
    import torch

    from ..compression.embedding_gradients import embed

    made = []
    with torch.no_grad():
        for texts in zip(*pairs, strict=True):
            parts = [
                embed(model, texts[start : start + _EMBEDDED_AT_ONCE]).cpu()
                for start in range(0, len(texts), _EMBEDDED_AT_ONCE)
            ]
            made.append(torch.cat(parts).numpy())
    return made[0], made[1]


def _matrix_rows(masks: Masks, layers: Mapping[str, int]) -> list[dict[str, Any]]:
    return [
        {
            "kind": "matrix",
            "method": "gaprune",
            "set": "",
            "layer": layers[path],
            "module": path,
            "total": mask.size,
            "kept": int(mask.sum()),
            "mrr": None,
            "recall_at_10": None,
            "cosine": None,
        }
        for path, mask in masks.items()
    ]


SPEC = StepSpec(
    name="prune_encoder",
    version=1,
    options=PruneEncoderOptions,
    inputs={"domain": Slot(tuple(_COLUMNS)), "general": Slot(tuple(_COLUMNS))},
    plan=plan,
    finish=finish,
    about="An embedding model pruned for a domain, with what retrieval lost.",
)
