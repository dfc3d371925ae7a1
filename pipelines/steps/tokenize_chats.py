"""Step `tokenize_chats`: chats to tokens, with the tokens that are targets marked."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from ...errors import InputError
from ...storage import Table
from ..bundles import shard_of
from ..causal_files import causal_source
from ..chat_tokens import ChatTokenizer, TrainOn
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec
from ..sft_tables import TOKENS
from ..tables import shard_ranges

_COLUMNS = ["id", "source", "domain", "messages", "tools", "raw"]


class TokenizeChatsOptions(StepOptions):
    """Options of `tokenize_chats`.

    Attributes
    ----------
    tokenizer
        Folder of a tokenizer or model, or an id of the hub; the tokenizer of the input `model`
        (a table of `train_lm`) where not given.
    chat_template
        File of a Jinja template; else the tokenizer's own, else a plain one of ours
        (`chat_tokens.DEFAULT_TEMPLATE`).
    template_options
        Variables for the template, such as `enable_thinking` or `date_string`.
    max_length
        Longest sample in tokens. The rest is cut off and the sample flagged `truncated`; one
        that is cut before its first trainable token is rejected.
    train_on
        assistant, last (only the last turn of the assistant), or all (every token).
    add_eos
        End plain text with the end-of-sequence token.
    rows_a_shard
        Samples in a shard at most. The rows are the same for any value, so it does not enter
        the key.
    """

    paths: ClassVar[tuple[str, ...]] = ("chat_template",)

    tokenizer: str | None = None
    chat_template: str | None = None
    template_options: dict[str, Any] = Field(default_factory=dict)
    max_length: int = Field(default=2048, ge=2, le=10_000_000)
    train_on: TrainOn = "assistant"
    add_eos: bool = True
    rows_a_shard: int = Field(default=1024, ge=1, le=1_000_000)


def plan(options: TokenizeChatsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """A shard for each few rows of the chats; the digests of tokenizer and template in the key."""
    chats = inputs["chats"]
    folder = _folder(options, inputs.get("model"))
    made = _tokenizer(folder, options.model_dump_json())
    identity = options.model_dump(
        exclude={"tokenizer", "chat_template", "rows_a_shard"}, mode="json"
    )
    if "strftime_now" in str(made.template):
        # The template writes the day it runs on: other days are other rows.
        identity["date"] = datetime.date.today().isoformat()
    ranges = [
        (number, start, stop)
        for part in chats.manifest.parts
        for number in [part["shard"]]
        for start, stop in shard_ranges(part["rows"], options.rows_a_shard)
    ]
    notes = {"tokenizer": options.tokenizer or inputs["model"].manifest.name}
    return Plan(TOKENS, len(ranges), identity, made.digests, payload=ranges, notes=notes)


def _folder(options: TokenizeChatsOptions, model: Table | None) -> str:
    from ...pruners.models.tokenizers import tokenizer_folder

    return str(tokenizer_folder(causal_source(options.tokenizer, model)))


@lru_cache(maxsize=4)
def _tokenizer(folder: str, options: str) -> ChatTokenizer:
    """Read once a process; keyed by the options as JSON, which can be hashed."""
    from ...pruners.models.tokenizers import load_tokenizer

    made = TokenizeChatsOptions.model_validate_json(options)
    return ChatTokenizer(
        load_tokenizer(folder),
        chat_template=_template(made.chat_template),
        max_length=made.max_length,
        train_on=made.train_on,
        add_eos=made.add_eos,
        template_options=made.template_options,
    )


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the chat template {path}: {error}. Give a file with a Jinja template."
        ) from error


def shard(job: Job, index: int, out: Rows) -> None:
    """Tokenise some rows; those with nothing to train, or that the template refuses, go aside."""
    options: TokenizeChatsOptions = job.options  # type: ignore[assignment]
    number, start, stop = job.plan.payload[index]
    folder = _folder(options, job.input("model") if job.has("model") else None)
    tokenizer = _tokenizer(folder, options.model_dump_json())
    rows = shard_of(job.input("chats"), number, _COLUMNS).slice(start, stop - start).to_pylist()
    made: list[dict[str, Any]] = []
    for row in rows:
        try:
            tokens = tokenizer(row["messages"], row["tools"])
        except InputError as error:
            bad = {"id": row["id"], "source": row["source"], "raw": row["raw"]}
            out.reject(bad, str(error), f"{row['source']} (id {row['id']})")
            continue
        made.append(
            {
                "id": row["id"],
                "domain": row["domain"],
                "input_ids": tokens.input_ids,
                "trainable": tokens.trainable,
                "turn": tokens.turn,
                "protected": tokens.protected,
                "truncated": tokens.truncated,
            }
        )
    if made:
        out.write(pa.Table.from_pylist(made, TOKENS))
    out.count(len(made), {})


SPEC = StepSpec(
    name="tokenize_chats",
    version=1,
    options=TokenizeChatsOptions,
    inputs={"chats": Slot(("read_chats",)), "model": Slot(("train_lm",), optional=True)},
    plan=plan,
    shard=shard,
    about="Chats to tokens, with the tokens that are targets marked.",
)
