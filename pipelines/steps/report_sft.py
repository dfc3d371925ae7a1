"""Step `report_sft`: what was kept of a fine-tuning set, as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from ...storage import Table, TableWriter
from .. import report, sft_report
from ..causal_files import causal_source
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec
from ..sft_signals import Bools
from ..tables import flat, rows_by_id

_TOKENS_READ = 2_000_000  # for the histogram of losses; more change no bar that can be seen
_TOKENS_AN_EXAMPLE = 1500


class ReportSftOptions(StepOptions):
    """Options of `report_sft`.

    Attributes
    ----------
    title
        Heading of the page.
    about
        A sentence below it.
    tokenizer
        Folder or hub id of the tokenizer that made the tokens; not wanted where the input
        `model` brings it.
    examples
        Samples shown token by token: of every reason some.
    """

    title: str = "Pruned fine-tuning set"
    about: str = ""
    tokenizer: str | None = None
    examples: int = Field(default=12, ge=0, le=100)


def plan(options: ReportSftOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No rows: the page is a file beside the manifest."""
    source = causal_source(options.tokenizer, inputs.get("model"))
    identity = options.model_dump(exclude={"tokenizer"})
    return Plan(pa.schema([]), 0, identity, payload=source, kind="report")


def finish(job: Job, writer: TableWriter) -> None:
    """Write the page."""
    options: ReportSftOptions = job.options  # type: ignore[assignment]
    decided = job.input("decision")
    decision = decided.to_table()
    domains = _domains(job, decision)
    rows = sft_report.domain_rows(decision, domains)
    data = report.ReportData(
        **report.frame(job, decided, options.title, options.about),
        cards=sft_report.cards(decision, domains),
        charts=sft_report.charts(decision, _losses(job)),
        rows=rows,
        row_count=len(rows),
        baselines=[],
        examples=_examples(job, decision, options.examples),
        template="sft_report.html",
    )
    writer.attach("report.html", report.render(data).encode("utf-8"))


def _domains(job: Job, decision: pa.Table) -> list[str]:
    ids = decision.column("id").to_numpy()
    found: list[str] = job.input("tokens").lookup(ids, ["domain"]).column("domain").to_pylist()
    return found


def _losses(job: Job) -> tuple[np.ndarray[Any, np.dtype[np.float32]], Bools] | None:
    """Loss and mask of the trainable tokens of the first samples; None without signals."""
    if not job.has("signals"):
        return None
    losses, keeps, read = [], [], 0
    for batch in job.input("signals").batches(columns=["id", "loss"]):
        ids = batch.column("id").to_numpy()
        _, loss = flat(batch.column("loss"))
        _, keep = flat(job.input("decision").lookup(ids, ["token_keep"]).column("token_keep"))
        losses.append(loss)
        keeps.append(keep.astype(np.bool_))
        read += len(loss)
        if read >= _TOKENS_READ:
            break
    if not losses:
        return None
    return np.concatenate(losses), np.concatenate(keeps)


def _examples(job: Job, decision: pa.Table, count: int) -> list[dict[str, Any]]:
    from ...pruners.models.tokenizers import load_tokenizer, tokenizer_folder

    rows = decision.take(pa.array(sft_report.chosen(decision, count))).to_pylist()
    if not rows:
        return []
    tokenizer = load_tokenizer(tokenizer_folder(job.plan.payload))
    ids = [row["id"] for row in rows]
    tokens = rows_by_id(job.input("tokens"), ids, ["input_ids", "trainable", "domain"])
    signals: dict[int, dict[str, Any]] = {}
    if job.has("signals"):
        signals = rows_by_id(job.input("signals"), ids, ["token_position", "loss"])
    reasons = job.input("decision").manifest.notes.get("token_reasons", [])
    made = []
    for row in rows:
        sample = tokens[row["id"]]
        trainable = [i for i, marked in enumerate(sample["trainable"]) if marked]
        pieces = sft_report.token_pieces(
            lambda part: tokenizer.decode(part, clean_up_tokenization_spaces=False),
            sample["input_ids"],
        )
        found = signals.get(row["id"], {"token_position": trainable})
        shown = sft_report.example(pieces, row, found, reasons, _where(job, row["id"], sample))
        if len(shown["tokens"]) > _TOKENS_AN_EXAMPLE:
            shown["note"] += f"; its first {_TOKENS_AN_EXAMPLE} tokens"
            shown["tokens"] = shown["tokens"][:_TOKENS_AN_EXAMPLE]
        made.append(shown)
    return made


def _where(job: Job, id_: int, sample: Mapping[str, Any]) -> str:
    where: str = sample["domain"]
    if job.has("chats"):
        source = rows_by_id(job.input("chats"), [id_], ["source"])[id_]["source"]
        where = f"{source} · {where}" if where else source
    return where


SPEC = StepSpec(
    name="report_sft",
    version=1,
    options=ReportSftOptions,
    inputs={
        "decision": Slot(("prune_sft",)),
        "tokens": Slot(("tokenize_chats",)),
        "signals": Slot(("token_signals",), optional=True),
        "chats": Slot(("read_chats",), optional=True),
        "model": Slot(("train_lm",), optional=True),
        "export": Slot(("export_sft",), optional=True),
    },
    plan=plan,
    finish=finish,
    about="What was kept of a fine-tuning set, as one HTML page.",
)
