"""The log of answers: what is kept stays, whoever writes, and damage is named."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from prunery.errors import StoreError
from prunery.pipelines.prompts.answer_log import SqliteLog, log_path
from prunery.pipelines.prompts.task import PromptTaskOptions


def answer(number, read=3, written=1):
    return np.array([-0.5 * number, -0.25], np.float32), read, written


def same(found, wanted) -> bool:
    return np.array_equal(found[0], wanted[0]) and found[1:] == wanted[1:]


def kept(path) -> SqliteLog:
    """A log with answers for two prompts on two rows, all but one pair."""
    log = SqliteLog(path)
    log.keep([("p", "x"), ("p", "y"), ("q", "x")], [answer(1), answer(2), answer(3, 9, 0)])
    return log


def test_what_is_kept_is_found_by_another(tmp_path):
    kept(tmp_path / "deep" / "a.sqlite").close()
    log = SqliteLog(tmp_path / "deep" / "a.sqlite")
    found = log.find(["q", "p", "new", "q"], ["x", "y", "z"])
    holes = [[got is None for got in line] for line in found]
    assert holes == [
        [False, True, True],
        [False, False, True],
        [True, True, True],
        [False, True, True],
    ]
    assert same(found[0][0], answer(3, 9, 0)) and same(found[3][0], answer(3, 9, 0))
    assert same(found[1][0], answer(1)) and same(found[1][1], answer(2))
    assert found[0][0][0].dtype == np.float32


def test_the_first_answer_stays(tmp_path):
    log = kept(tmp_path / "a")
    log.keep([("p", "x"), ("p", "z"), ("p", "z")], [answer(7), answer(8), answer(9)])
    found = log.find(["p"], ["x", "z"])[0]
    assert same(found[0], answer(1)) and same(found[1], answer(8))


def test_nothing_asked_makes_no_file(tmp_path):
    log = SqliteLog(tmp_path / "new" / "a")
    assert log.find(["p"], ["x", "y"]) == [[None, None]]
    assert log.find([], ["x"]) == []
    assert log.find(["p", "q"], []) == [[], []]
    log.keep([], [])
    assert not (tmp_path / "new").exists()


def test_odd_texts_are_keys_too_and_none_is_stored(tmp_path):
    log = SqliteLog(tmp_path / "a")
    texts = ["", " ", "\x00", "naïve", "nai\u0308ve", "\ud800", "Secret words of a customer"]
    pairs = [(p, r) for p in texts for r in texts]
    log.keep(pairs, [answer(number) for number in range(len(pairs))])
    found = log.find(texts, texts)
    assert all(
        same(found[p][n], answer(p * len(texts) + n))
        for p in range(len(texts))
        for n in range(len(texts))
    )
    log.close()
    assert b"Secret words" not in (tmp_path / "a").read_bytes()


def test_writes_are_durable_before_keep_returns(tmp_path):
    log = kept(tmp_path / "a")
    with log._connection() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert not connection.in_transaction
    other = sqlite3.connect(tmp_path / "a")  # sees it while the writer still has it open
    assert other.execute("SELECT count(*) FROM answers").fetchone() == (3,)
    other.close()


WRITER = """
import sys
from pathlib import Path
import numpy as np
from prunery.pipelines.prompts.answer_log import SqliteLog
log, me = SqliteLog(Path(sys.argv[1])), int(sys.argv[2])
"""
TOGETHER = (
    WRITER
    + """
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    log.keep([("p", str(i))], [(np.full(2, -me, np.float32), me, 0)])
    mine = log.find(["p"], [str(i)])[0][0]
    print(i, mine[1], float(mine[0][0]), flush=True)
"""
)
ENDLESS = (
    WRITER
    + """
i = 0
while True:
    log.keep([("p", str(i))], [(np.array([-i, -me], np.float32), i, 0)])
    print(i, flush=True)
    i += 1
"""
)


def start(code, path, me):
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(me)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_start_together_agree_on_every_answer(tmp_path):
    path = tmp_path / "a"
    writers = [start(TOGETHER, path, me) for me in (1, 2, 3)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    told = [writer.communicate(timeout=60)[0].splitlines() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert told[0] == told[1] == told[2]
    found = SqliteLog(path).find(["p"], [str(i) for i in range(40)])[0]
    assert [f"{i} {got[1]} {got[0][0]}" for i, got in enumerate(found)] == told[0]


def test_a_killed_process_leaves_all_that_it_had_kept(tmp_path):
    path = tmp_path / "a"
    writer = start(ENDLESS, path, 5)
    lines = [writer.stdout.readline() for _ in range(30)]
    os.kill(writer.pid, signal.SIGKILL)
    lines += writer.stdout.read().splitlines()
    writer.wait()
    last = int(lines[-1])
    found = SqliteLog(path).find(["p"], [str(i) for i in range(last + 1)])[0]
    assert all(same(got, (np.array([-i, -5], np.float32), i, 0)) for i, got in enumerate(found))


FORKS = (
    WRITER
    + """
import os
def answer(number):
    return np.array([-number, -me], np.float32), number, 0
log.keep([("p", "x")], [answer(1)])
child = os.fork()
if not child:
    log.keep([("child", "x")], [answer(4)])
    os._exit(0 if log.find(["p"], ["x"])[0][0] is not None else 9)
assert os.waitpid(child, 0)[1] == 0
log.keep([("p", "w")], [answer(5)])
assert None not in [got for line in log.find(["p", "child"], ["x"]) for got in line]
"""
)


def test_a_forked_process_opens_the_file_anew(tmp_path):
    forking = start(FORKS, tmp_path / "a", 3)  # in a process without the threads of other tests
    forking.communicate(timeout=60)
    assert forking.returncode == 0


def _garbage(path):
    path.write_bytes(b"not a database at all, " * 100)


def _truncated(path):
    path.write_bytes(path.read_bytes()[:4096])


def _foreign(path):
    path.unlink()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE notes (text)")
    other.commit()
    other.close()


def _newer(path):
    other = sqlite3.connect(path)
    other.execute("PRAGMA user_version = 9")
    other.close()


def _flipped(path):
    data = bytearray(path.read_bytes())
    at = data.index(np.array([-0.5, -0.25], "<f4").tobytes())
    data[at] ^= 4
    path.write_bytes(bytes(data))


def _retyped(path):
    other = sqlite3.connect(path)
    other.execute("UPDATE answers SET value = 'text'")
    other.commit()
    other.close()


@pytest.mark.parametrize("harm", [_garbage, _truncated, _foreign, _newer, _flipped, _retyped])
def test_a_damaged_or_foreign_file_is_named(tmp_path, harm):
    path = tmp_path / "a.sqlite"
    kept(path).close()
    harm(path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"a\.sqlite is damaged or no log.*Move it away"):
        SqliteLog(path).find(["p", "q"], ["x", "y"])
    if harm not in (_flipped, _retyped):  # which only reading can tell
        with pytest.raises(StoreError, match="Move it away"):
            SqliteLog(path).keep([("p", "x")], [answer(1)])
        assert path.read_bytes() == before
    path.rename(tmp_path / "away")
    assert SqliteLog(path).find(["p"], ["x"]) == [[None]]


def test_a_full_disk_is_said_and_what_was_kept_stays(tmp_path):
    log = kept(tmp_path / "a")
    with log._connection() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
    many = [("p", str(i)) for i in range(2000)]
    with pytest.raises(StoreError, match="no space left for the log of answers .*Make room"):
        log.keep(many, [answer(1)] * len(many))
    with log._connection() as connection:
        connection.execute("PRAGMA max_page_count = 100000")
    assert log.find(["p"], ["0"]) == [[None]]
    assert same(log.find(["p"], ["y"])[0][0], answer(2))
    log.keep(many, [answer(1)] * len(many))
    assert log.find(["p"], ["1999"])[0][0] is not None


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    log = SqliteLog(tmp_path / "file" / "a.sqlite")
    with pytest.raises(StoreError, match="cannot open or write.*PRUNERY_CACHE.*remember"):
        log.keep([("p", "x")], [answer(1)])
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(StoreError, match="cannot open or write"):
        SqliteLog(tmp_path / "folder.sqlite").find(["p"], ["x"])


def test_a_hundred_thousand_answers_are_found_in_few_statements(tmp_path):
    prompts, rows = [f"prompt {i}" for i in range(1000)], [f"row {i}" for i in range(100)]
    log = SqliteLog(tmp_path / "a")
    pairs = [(p, r) for p in prompts for r in rows]
    log.keep(pairs, [answer(number % 7, number) for number in range(len(pairs))])
    statements = []
    with log._connection() as connection:
        connection.set_trace_callback(statements.append)
    began = time.process_time()
    found = log.find(prompts, rows)
    taken = time.process_time() - began
    assert all(got[1] == p * 100 + n for p, line in enumerate(found) for n, got in enumerate(line))
    assert len(statements) <= 2
    assert taken < 5, taken


def options(**more):
    return PromptTaskOptions(**{"black_box": "causal", "model": "m"} | more)


REMOTE = {"black_box": "endpoint", "base_url": "http://127.0.0.1:1/v1"}


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"black_box": "masked", "template": "{text} {prompt} {mask}"}),
        ({}, {"dtype": "bfloat16"}),
        ({}, {"template": "{prompt} {text}"}),
        ({}, {"verbaliser_tokens": "first"}),
        (REMOTE, {"base_url": "http://127.0.0.1:2/v1"}),
        (REMOTE, {"protocol": "chat"}),
        (REMOTE, {"top_logprobs": 5}),
        ({"black_box": "encoder"}, {"temperature": 0.1}),
        ({"black_box": "encoder"}, {"label_template": "{label}: {prompt}"}),
    ],
)
def test_what_decides_an_answer_names_the_file(base, change):
    before = log_path(options(**base), ["a", "b"], {"model": "1"})
    assert log_path(options(**base | change), ["a", "b"], {"model": "1"}) != before
    assert log_path(options(**base), ["b", "a"], {"model": "1"}) != before
    assert log_path(options(**base), ["a", "b"], {"model": "2"}) != before


def test_a_model_that_moved_keeps_its_answers_and_an_endpoints_name_is_all_it_has():
    one, other = options(), options(model="/elsewhere/m")
    assert log_path(one, ["a", "b"], {"model": "1"}) == log_path(other, ["a", "b"], {"model": "1"})
    one, other = options(**REMOTE), options(**REMOTE, model="larger")
    assert log_path(one, ["a", "b"], {}) != log_path(other, ["a", "b"], {})


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"shots": 3, "validation_shots": 4, "test_rows": 5, "draw": "first"}),
        ({}, {"manual": "by hand"}),
        ({}, {"verbalisers": {"x": "a"}}),  # the words themselves are given
        ({}, {"template": "{text} {prompt}"}),  # the usual one, spelt out
        (REMOTE, {"base_url": "http://127.0.0.1:1/v1/"}),
    ],
)
def test_what_does_not_decide_an_answer_leaves_the_file(base, change, monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path))
    before = log_path(options(**base), ["a", "b"], {"model": "1"})
    assert log_path(options(**base | change), ["a", "b"], {"model": "1"}) == before
    assert before.parent == tmp_path / "answers" and before.suffix == ".sqlite"
    monkeypatch.delenv("PRUNERY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    elsewhere = log_path(options(**base), ["a", "b"], {"model": "1"})
    assert elsewhere == tmp_path / "home" / ".cache" / "prunery" / "answers" / before.name
