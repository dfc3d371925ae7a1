"""Silver labels: the prompt, the reading of replies, and the step against a local endpoint."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from prunery.errors import InputError, ModelError
from prunery.pipelines.evaluation_rows import parse_row, read_rows
from prunery.pipelines.openai_client import Endpoint
from prunery.pipelines.provence_rows import read_rows as read_training_rows
from prunery.pipelines.recipe import load_recipe
from prunery.pipelines.run import run_recipe
from prunery.pipelines.silver_labels import (
    REASONS,
    SilverOptions,
    Verdict,
    label_silver,
    parse_reply,
    prompt,
    silver_costs,
)
from prunery.storage import Store

from .chat_server import Said, reply, serving


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def record(i: int, **more):
    passage = f"Ann number {i} met Bob [4]. Bob left\nin May. Nobody knows why."
    borders = [0, passage.index("Bob left"), passage.index("Nobody"), len(passage)]
    return {
        "question": f"When did Bob leave Ann {i}?",
        "passage": passage,
        "title": f"Ann {i}",
        "sentences": [list(pair) for pair in itertools.pairwise(borders)],
        "answers": ["May"],
        "group": f"g{i}",
        "teacher_score": 1.5,
    } | more


def test_prompt_numbers_sentences_and_hides_reference_marks():
    system, user = prompt(parse_row(record(1), where="x"))
    assert system["role"] == "system"
    assert "No answer" in system["content"]
    assert user["content"] == (
        "Question: When did Bob leave Ann 1?\n\nContext:\n[0] Ann 1\n"
        "[1] Ann number 1 met Bob (4).\n[2] Bob left in May.\n[3] Nobody knows why."
    )
    untitled = prompt(parse_row(record(1, title=None), where="x"))[1]["content"]
    assert "[0]" not in untitled
    assert "[1] Ann number" in untitled


@pytest.mark.parametrize(
    ("text", "finish", "title", "verdict"),
    [
        ("In May [2].", "stop", True, Verdict((1,))),
        ("A [1, 3]. B [3][2].", "stop", True, Verdict((0, 1, 2))),
        ("By title and text [0,2]", "stop", True, Verdict((1,))),
        ("cited [2;3] [sic]", "stop", True, Verdict((1, 2))),
        ("全角【2】", "stop", True, Verdict((1,))),
        ("No answer", "stop", True, Verdict()),
        ("no answer.", "stop", True, Verdict()),
        ("  \n", "stop", True, Verdict(reason="empty")),
        ("In May [2].", "length", True, Verdict(reason="truncated")),
        ("", "length", True, Verdict(reason="truncated")),
        ("", "content_filter", True, Verdict(reason="filtered")),
        ("No answer [2]", "stop", True, Verdict(reason="contradictory")),
        ("In May.", "stop", True, Verdict(reason="uncited")),
        ("In May [a].", "stop", True, Verdict(reason="uncited")),
        ("In May [1-3].", "stop", True, Verdict(reason="unparsable")),
        ("In May [2] and [sentence 3].", "stop", True, Verdict(reason="unparsable")),
        ("In May [2,].", "stop", True, Verdict(reason="unparsable")),
        ("In May [4].", "stop", True, Verdict(reason="out_of_range")),
        ("In [2010] [2].", "stop", True, Verdict(reason="out_of_range")),
        ("In May [0].", "stop", True, Verdict(reason="title_only")),
        ("In May [0] [2].", "stop", False, Verdict(reason="out_of_range")),
    ],
)
def test_replies(text, finish, title, verdict):
    assert parse_reply(text, finish, sentences=3, title=title) == verdict
    assert verdict.reason is None or verdict.reason in REASONS


def options(tmp_path, server, rows, **more) -> SilverOptions:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {"backoff_seconds": 0.01, "retries": 1, "timeout_seconds": 5.0}
    return SilverOptions(
        rows=[str(path)],
        endpoint=Endpoint(base_url=server.url, model="m", **where),
        **{"shard_rows": 2} | more,
    )


def number(asked) -> int:
    return int(asked.user.split("leave Ann ")[1].split("?")[0])


SAYS = {
    0: reply("In May [2]."),
    1: reply("No answer"),
    2: reply("In May."),
    3: reply("In May [2", finish="length"),
    4: reply("See [0]."),
    5: reply("See [9]."),
    6: Said(b"too long", status=413),
    7: Said(b"<html>"),
    8: reply("Because [1, 2, 3].", usage=None),
}


def test_the_step_writes_rows_that_training_reads_and_rejects_by_name(tmp_path):
    store = Store(tmp_path / "store")
    rows = [record(i) for i in range(9)] + [record(0)]  # the last repeats the first
    with serving(lambda a, n: SAYS[number(a)]) as server:
        manifest = label_silver(options(tmp_path, server, rows), store, bad_rows=0.9)
        assert len(server.asked) == 10  # nine rows, the malformed one twice, no duplicate
    assert manifest.name == "silver"
    assert manifest.kept == 3
    assert manifest.dropped == {
        "uncited": 1,
        "truncated": 1,
        "title_only": 1,
        "out_of_range": 1,
        "refused": 1,
        "malformed": 1,
        "duplicate": 1,
    }
    table = store.table("silver")
    got = table.to_table().to_pylist()
    assert [row["labels"] for row in got] == [[0, 1, 0], [0, 0, 0], [1, 1, 1]]
    assert [row["group"] for row in got] == ["g0", "g1", "g8"]
    # The rows are rows of the labelled format, as they stand.
    for row in got:
        again = parse_row(row, where="x")
        assert list(again.labels or ()) == row["labels"]
        assert again.answers == ("May",)
    rejects = {
        json.loads(text)["group"]: (reason.split(":")[0], json.loads(text)["response"])
        for reason, text in zip(
            table.rejects().column("reason").to_pylist(),
            table.rejects().column("row").to_pylist(),
            strict=True,
        )
    }
    assert rejects["g2"] == ("uncited", "In May.")
    assert rejects["g6"] == ("refused", "HTTP 413: too long")
    assert len(rejects) == 6
    costs = silver_costs(table)
    assert (costs.requests, costs.retries) == (10, 1)
    assert costs.prompt_tokens == 6 * 100
    assert costs.unpriced == 3  # no usage in one reply, none at all in two failures
    assert not store.verify("silver")


def test_the_parquet_files_of_the_table_are_read_by_the_row_reader(tmp_path):
    store = Store(tmp_path / "store")
    with serving(lambda a, n: SAYS[0]) as server:
        label_silver(options(tmp_path, server, [record(i) for i in range(3)]), store)
    parts = sorted((tmp_path / "store").rglob("part-*.parquet"))
    rows = read_rows(parts)
    assert [row.labels for row in rows] == [(0, 1, 0)] * 3
    trained = [row for part in parts for row in read_training_rows(part)]
    assert [(row.labels, row.group, row.teacher_score) for row in trained] == [
        ((0, 1, 0), f"g{i}", 1.5) for i in range(3)
    ]


def test_a_finished_table_is_never_asked_for_again(tmp_path):
    store = Store(tmp_path / "store")
    with serving(lambda a, n: SAYS[0]) as server:
        asked = options(tmp_path, server, [record(i) for i in range(4)])
        first = label_silver(asked, store)
        assert label_silver(asked, store).key == first.key
        assert len(server.asked) == 4
        # Concurrency and patience change no row, hence not the key; the model does.
        patient = asked.endpoint.model_copy(update={"concurrency": 2, "retries": 9})
        again = label_silver(asked.model_copy(update={"endpoint": patient}), store)
        assert (again.key, len(server.asked)) == (first.key, 4)
        other = asked.endpoint.model_copy(update={"model": "n"})
        assert label_silver(asked.model_copy(update={"endpoint": other}), store).key != first.key
        assert len(server.asked) == 8


def test_over_grown_files_only_new_changed_and_rejected_rows_are_asked(tmp_path):
    store = Store(tmp_path / "store")
    rejected = {1}

    def answer(asked, before):
        return reply("uncited") if number(asked) in rejected else SAYS[0]

    with serving(answer) as server:
        first = label_silver(options(tmp_path, server, [record(i) for i in range(5)]), store)
        assert (first.rows, first.rejected, len(server.asked)) == (4, 1, 5)
        before = store.table(first.key).to_table().to_pylist()
        rejected.clear()
        grown = [record(7), *(record(i) for i in range(4)), record(4, group="other"), record(0)]
        second = label_silver(options(tmp_path, server, grown), store)
        assert sorted(number(asked) for asked in server.asked[5:]) == [1, 4, 7]
        assert second.notes["reused"] == {first.key: 3}
        assert (second.rows, second.dropped) == (6, {"duplicate": 1})
        made = store.table(second.key).to_table().to_pylist()
        assert [row["group"] for row in made] == ["g7", "g0", "g1", "g2", "g3", "other"]
        old = {row["id"]: row for row in before}
        assert [row for row in made if row["group"] in ("g0", "g2", "g3")] == [
            old[row["id"]] for row in made if row["group"] in ("g0", "g2", "g3")
        ]
        # Another model's replies are others.
        asked = options(tmp_path, server, grown)
        other = asked.endpoint.model_copy(update={"model": "n"})
        label_silver(asked.model_copy(update={"endpoint": other}), store)
        assert len(server.asked) == 8 + 6


def test_an_outage_keeps_what_was_paid_for(tmp_path):
    store, down = Store(tmp_path / "store"), {"yes": True}

    def answer(asked, before):
        return Said(b"", status=500) if down["yes"] and number(asked) == 4 else SAYS[0]

    with serving(answer) as server:
        asked = options(tmp_path, server, [record(i) for i in range(6)])
        with pytest.raises(ModelError, match="HTTP 500"):
            label_silver(asked, store)
        assert "silver" not in store.names()
        paid = len(server.asked)
        down["yes"] = False
        manifest = label_silver(asked, store)
        assert manifest.rows == 6
        # Rows 0..3 stood in finished shards; only 4 and 5 are asked for again.
        assert sorted(number(a) for a in server.asked[paid:]) == [4, 5]


def test_too_many_bad_replies_stop_the_run(tmp_path):
    with serving(lambda a, n: reply("uncited")) as server:
        asked = options(tmp_path, server, [record(0), record(1)])
        with pytest.raises(InputError, match="rejected 2 of 2"):
            label_silver(asked, Store(tmp_path / "store"))


def test_a_run_killed_at_any_moment_pays_twice_for_one_shard_at_most(tmp_path):
    """SIGKILL between replies, then run again: same rows as an undisturbed run."""
    rows = [record(i) for i in range(12)]
    with serving(lambda a, n: reply(f"In May [{1 + number(a) % 3}].", delay=0.05)) as server:
        asked = options(tmp_path, server, rows, shard_rows=3)
        calm = label_silver(asked, Store(tmp_path / "calm"))
        server.asked.clear()
        code = textwrap.dedent(
            """
            import sys
            from prunery.pipelines.silver_labels import SilverOptions, label_silver
            from prunery.storage import Store
            label_silver(SilverOptions.model_validate_json(sys.argv[1]), Store(sys.argv[2]))
            """
        )
        command = [sys.executable, "-c", code, asked.model_dump_json(), str(tmp_path / "killed")]
        child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 60
        while len(server.asked) < 7 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        before = len(server.asked)
        assert before < 12
        again = label_silver(asked, Store(tmp_path / "killed"))
        assert again.logical_digest == calm.logical_digest
        assert len(server.asked) <= 12 + 3  # one shard of three twice, at the most


def test_it_is_a_step_of_recipes(tmp_path):
    """Relative paths, a nested endpoint, a share of bad rows: as a user writes it."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(record(0)) + "\n" + json.dumps(record(2)))
    with serving(lambda a, n: SAYS[number(a)]) as server:
        (tmp_path / "silver.yaml").write_text(
            textwrap.dedent(
                f"""
                name: silver
                bad_rows: 0.5
                steps:
                  labels:
                    step: label_silver
                    rows: [rows.jsonl]
                    endpoint:
                      base_url: {server.url}
                      model: m
                      retries: 0
                """
            )
        )
        run = run_recipe(load_recipe(tmp_path / "silver.yaml"), Store(tmp_path / "store"))
    assert run.manifests["labels"].kept == 1
    assert run.manifests["labels"].dropped == {"uncited": 1}
