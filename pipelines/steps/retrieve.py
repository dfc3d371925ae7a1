"""Step `retrieve`: the nearest passages of each question."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from pydantic import Field

from ...errors import RecipeError
from ...storage import Table, row_ids
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec, use_threads
from ..models import encoder, sentence_encoder
from ..tables import shard_ranges
from .index import open_index

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("question", pa.int64(), nullable=False),
        pa.field("passage", pa.int64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
_QUESTIONS_A_SHARD = 256


class RetrieveOptions(StepOptions):
    """Options of `retrieve`.

    Attributes
    ----------
    top_k
        Passages a question; fewer where the index holds fewer.
    encoder
        The model that made the vectors; another one is refused.
    batch_size
        Questions a forward pass.
    """

    top_k: int = Field(default=20, ge=1, le=1000)
    encoder: str = "all-MiniLM-L6-v2"
    batch_size: int = Field(default=32, ge=1, le=4096)
    device: str | None = None


def plan(options: RetrieveOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard for each 256 questions."""
    resolved = encoder(options.encoder)
    made_with = inputs["index"].manifest.models.get("encoder")
    if made_with != resolved.sha256:
        raise RecipeError(
            f"the index was made with an encoder of digest {str(made_with)[:12]}, and"
            f" `{options.encoder}` has {resolved.sha256[:12]}. Use one encoder in the embed and"
            " retrieve steps."
        )
    ranges = shard_ranges(inputs["questions"].num_rows, _QUESTIONS_A_SHARD)
    identity = options.model_dump(exclude={"device", "encoder"})
    return Plan(SCHEMA, len(ranges), identity, {"encoder": resolved.sha256}, payload=ranges)


def shard(job: Job, index: int, out: Rows) -> None:
    """Search for some questions; `rank` is 0 for the nearest, `score` the cosine."""
    options: RetrieveOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    model = sentence_encoder(str(encoder(options.encoder).path), options.device)
    start, stop = job.plan.payload[index]
    questions = (
        job.input("questions").to_table(columns=["id", "question"]).slice(start, stop - start)
    )
    vectors = model.encode(questions.column("question").to_pylist(), batch_size=options.batch_size)
    found, scores = open_index(job.input("index")).search(vectors, options.top_k)
    asked = np.repeat(questions.column("id").to_numpy(), found.shape[1])
    rank = np.tile(np.arange(found.shape[1], dtype=np.int32), len(found))
    passages, score = found.ravel(), scores.ravel()
    real = passages >= 0
    asked, passages, rank, score = asked[real], passages[real], rank[real], score[real]
    ids = row_ids(asked.tolist(), passages.tolist())
    out.write(pa.table([ids, asked, passages, rank, score], schema=SCHEMA))
    out.count(len(ids), {})


SPEC = StepSpec(
    name="retrieve",
    version=1,
    options=RetrieveOptions,
    inputs={"questions": Slot(("questions",)), "index": Slot(("index",))},
    plan=plan,
    shard=shard,
    about="The nearest passages of each question.",
)
