"""Small tables of fine-tuning samples, written straight into a store."""

import json

import numpy as np
import pyarrow as pa

from prunery.pipelines.sft_tables import CHATS, SIGNAL_COLUMNS, TOKEN_SIGNALS, TOKENS

LOSS = [
    [0.1, 0.2],  # easy
    [4.0, 6.0, 2.0, 5.0],  # hard
    [1.0],
    [2.0, 2.5, 3.0],
]
ENTROPY = [
    [3.0, 3.0],  # unsure
    [0.5, 0.5, 0.5, 0.5],  # sure
    [1.0],
    [2.0, 2.0, 2.0],
]
DOMAINS = ["a", "a", "b", "a"]
IDS = [11, 12, 13, 14]


def write(store, name, step, schema, parts):
    """A committed table with one shard for each list of rows."""
    with store.write(
        name=name,
        step=step,
        version=1,
        options={"rows": json.dumps(parts, sort_keys=True)},
        inputs=[],
        models={},
        seed=0,
        schema=schema,
    ) as writer:
        if not writer.committed:
            for number in writer.pending(len(parts)):
                with writer.shard(number) as out:
                    out.write(pa.Table.from_pylist(parts[number], schema))
        writer.commit()
    store.point(name, writer.key)
    return writer.key


def token_rows():
    """Prompts of two tokens, then the answers of `LOSS`, the last token of each protected."""
    rows = []
    for id_, domain, loss in zip(IDS, DOMAINS, LOSS, strict=True):
        n = len(loss) + 2
        rows.append(
            {
                "id": id_,
                "domain": domain,
                "input_ids": list(range(n)),
                "trainable": [False, False, *[True] * len(loss)],
                "turn": [0, 0, *[1] * len(loss)],
                "protected": [*[False] * (n - 1), True],
                "truncated": False,
            }
        )
    return rows


def signal_rows(**more):
    """What a model said about them; `more` adds columns."""
    rows = []
    for i, (tokens, loss, entropy) in enumerate(zip(token_rows(), LOSS, ENTROPY, strict=True)):
        row = {
            "id": tokens["id"],
            "domain": tokens["domain"],
            "token_position": list(range(2, 2 + len(loss))),
            "turn": [1] * len(loss),
            "protected": [*[False] * (len(loss) - 1), True],
            "loss": loss,
            "entropy": entropy,
            "log_sum_exp": [9.0] * len(loss),
        }
        rows.append(row | {name: column[i] for name, column in more.items()})
    return rows


def chat_rows(raws):
    """Chats whose raw rows are the given ones."""
    return [
        {
            "id": id_,
            "source": f"rows.jsonl#{i + 1}",
            "domain": domain,
            "format": "messages",
            "messages": [],
            "tools": "",
            "raw": json.dumps(raw),
        }
        for i, (id_, domain, raw) in enumerate(zip(IDS, DOMAINS, raws, strict=True))
    ]


def tables(store, *, shards=1, extra=(), raws=({}, {}, {}, {}), **more):
    """Keys of tokens, signals and chats; signals in `shards` shards."""
    rows = signal_rows(**more)
    cut = np.array_split(np.arange(len(rows)), shards)
    schema = pa.schema([*TOKEN_SIGNALS, *SIGNAL_COLUMNS["loss"], *extra])
    return {
        "tokens": write(store, "tokens", "tokenize_chats", TOKENS, [token_rows()]),
        "signals": write(
            store, "signals", "token_signals", schema, [[rows[i] for i in part] for part in cut]
        ),
        "chats": write(store, "chats", "read_chats", CHATS, [chat_rows(raws)]),
    }
