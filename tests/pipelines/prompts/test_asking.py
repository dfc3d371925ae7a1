"""Asking within a hard budget, never twice, and on from where a killed process stopped."""

from __future__ import annotations

import hashlib
import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prunery.errors import BudgetError, ModelError
from prunery.pipelines.prompts.answer_log import SqliteLog
from prunery.pipelines.prompts.asking import Asker, AskOptions, Limits, RemoteBox

from ..chat_server import classic, serving


def logprobs(prompt: str, row: str) -> np.ndarray:
    p = 0.05 + hashlib.sha256(f"{prompt}|{row}".encode()).digest()[0] / 320
    return np.log(np.array([p, 1 - p], np.float32))


def real_tokens(prompt: str, row: str) -> int:
    return 1 + len(prompt) + 2 * len(row)


class Killed(Exception):
    """The process ends here."""


@dataclass
class Local:
    """A model on this machine: exact tokens, whole batches."""

    classes: int = 2
    asked: Counter = field(default_factory=Counter)

    def label_logprobs(self, prompts, rows):
        self.asked.update((p, r) for p in prompts for r in rows)
        made = [[logprobs(p, r) for r in rows] for p in prompts]
        return np.array(made, np.float32).reshape(len(prompts), len(rows), 2)

    def input_tokens(self, prompts, rows):
        made = [[real_tokens(p, r) for r in rows] for p in prompts]
        return np.array(made, np.int64).reshape(len(prompts), len(rows))


@dataclass
class Remote:
    """One behind an endpoint: a bound above what it reads, answers in odd order, maybe killed."""

    classes: int = 2
    written_tokens: int = 2
    dies_after: float = math.inf
    asked: Counter = field(default_factory=Counter)

    def input_tokens(self, prompts, rows):
        return Local().input_tokens(prompts, rows) * 3

    def answer_all(self, pairs, done):
        for place in sorted(range(len(pairs)), key=lambda place: (place % 3, -place)):
            if self.asked.total() >= self.dies_after:
                raise Killed
            self.asked[pairs[place]] += 1
            done(place, (logprobs(*pairs[place]), real_tokens(*pairs[place]), 1))


class Memory:
    """A log of answers without a disk."""

    def __init__(self):
        self.known = {}

    def find(self, prompts, rows):
        return [[self.known.get((p, r)) for r in rows] for p in prompts]

    def keep(self, pairs, answers):
        for pair, answer in zip(pairs, answers, strict=True):
            self.known.setdefault(pair, answer)


def within(limits, queries, read, written) -> bool:
    cost = (read * (limits.input_price or 0) + written * (limits.output_price or 0)) / 1e6
    return (
        (limits.queries is None or queries <= limits.queries)
        and (limits.tokens is None or read + written <= limits.tokens)
        and (limits.cost is None or cost <= limits.cost)
    )


def one_by_one(remote, rows, limits, calls) -> tuple[list[int], tuple[int, int, int]]:
    """How many prompts of each call fit where prompts are weighed one after the other."""
    spent, counts = (0, 0, 0), []
    for prompts, places in calls:
        texts = [rows[place] for place in places]
        count = 0
        for prompt in prompts:
            real = sum(real_tokens(prompt, text) for text in texts)
            most = (3 * real, 2 * len(texts)) if remote else (real, 0)
            more = (real, len(texts)) if remote else (real, 0)
            queries = spent[0] + len(texts)
            if not within(limits, queries, spent[1] + most[0], spent[2] + most[1]):
                break
            spent = (queries, spent[1] + more[0], spent[2] + more[1])
            count += 1
        counts.append(count)
    return counts, spent


def play(box, rows, limits, log, batch, calls):
    asker = Asker(box, rows, limits, log, batch)
    answers, tokens = [], []
    for prompts, places in calls:
        got, read = asker.ask(prompts, np.array(places, np.int64))
        assert within(limits, asker.spent.queries, asker.spent.read, asker.spent.written)
        answers.append(got)
        tokens.append(read)
    return asker, answers, tokens


WORD = st.text("abc", max_size=3)
MAYBE = st.one_of(st.none(), st.integers(0, 150))


@st.composite
def plays(draw):
    rows = draw(st.lists(WORD, min_size=1, max_size=4, unique=True))
    places = st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4, unique=True)
    calls = draw(st.lists(st.tuples(st.lists(WORD, max_size=6), places), max_size=3))
    cost = draw(st.one_of(st.none(), st.floats(0, 400).map(lambda c: c / 1e6)))
    prices = (1.0, 3.0) if cost is not None else (None, None)
    return rows, Limits(draw(MAYBE), draw(MAYBE), cost, *prices), draw(st.integers(1, 12)), calls


# What an earlier run found out made a prompt affordable that it could not afford itself.
@example((["aaa", ""], Limits(None, 23), 1, [([""], [0, 1]), ([""], [0])]), True, 0)
@settings(max_examples=200, deadline=None)
@given(plays(), st.booleans(), st.integers(0, 40))
def test_no_limit_is_ever_overrun_and_a_log_changes_nothing(play_, remote, dies_after):
    rows, limits, batch, calls = play_
    kind = Remote if remote else Local
    asker, answers, tokens = play(kind(), rows, limits, None, batch, calls)
    counts, spent = one_by_one(remote, rows, limits, calls)
    assert [len(got) for got in answers] == counts
    assert (asker.spent.queries, asker.spent.read, asker.spent.written) == spent
    for (prompts, places), got, read in zip(calls, answers, tokens, strict=True):
        assert got.shape == (len(got), len(places), 2) and got.dtype == np.float32
        for p, line in enumerate(got):
            want = [logprobs(prompts[p], rows[place]) for place in places]
            assert np.array_equal(line, want)
            real = sum(real_tokens(prompts[p], rows[place]) for place in places)
            assert read[p] == real + (len(places) if remote else 0)

    log = Memory()
    fresh, answers, tokens = play(kind(), rows, limits, log, batch, calls)
    pairs = [(prompt, place) for prompts, places in calls for prompt in prompts for place in places]
    if not remote or len(set(pairs)) == len(pairs):  # else what is known is charged below its bound
        assert (fresh.spent.queries, fresh.spent.read, fresh.spent.written) == spent
    _goes_on(kind, dies_after, fresh, answers, tokens, batch, calls)
    quiet, _, _ = play(kind(), rows, limits, log, batch, calls)
    assert quiet.spent.sent == 0 and not quiet.box.asked


def _goes_on(kind, dies_after, fresh, answers, tokens, batch, calls) -> None:
    """Killed after some answers and run again: everything as in the run that was not."""
    log = Memory()
    first, again = kind(), kind()
    first.dies_after = dies_after
    try:
        play(first, fresh.rows, fresh.limits, log, batch, calls)
    except Killed:
        assert kind is Remote
    resumed, same, same_tokens = play(again, fresh.rows, fresh.limits, log, batch, calls)
    assert (resumed.spent.queries, resumed.spent.tokens) == (
        fresh.spent.queries,
        fresh.spent.tokens,
    )
    assert all(map(np.array_equal, same, answers)) and all(map(np.array_equal, same_tokens, tokens))
    if kind is Remote:
        assert max((first.asked + again.asked).values(), default=1) == 1


def test_what_stops_is_named():
    rows = ["a", "bb"]
    cases = [
        (Limits(queries=3), "queries", "max_queries"),
        (Limits(tokens=18), "tokens", "max_tokens"),
        (Limits(cost=18e-6, input_price=1.0, output_price=0.0), "cost", "max_cost"),
    ]
    for limits, name, option in cases:
        asker = Asker(Local(), rows, limits)
        assert asker.exhausted("p") is None
        with pytest.raises(BudgetError, match=f"`{option}` is reached.*1 prompts left"):
            asker.must_ask(["p", "q"])
        assert asker.exhausted("q") == name
        assert asker.spent.queries == 2
    assert len(Asker(Local(), rows, Limits(queries=4)).must_ask(["p", "q"])[0]) == 2


def test_nothing_to_ask_costs_nothing():
    for box in (Local(), Remote()):
        asker = Asker(box, ["a"], Limits(0, 0))
        assert asker.ask([])[0].shape == (0, 1, 2)
        assert asker.ask(["p"])[0].shape == (0, 1, 2)
        assert asker.spent.queries == asker.spent.sent == 0 and not box.asked
    assert Asker(Local(), [], Limits(0)).ask(["p"])[0].shape == (1, 0, 2)


def test_the_same_pair_is_asked_of_an_endpoint_once_a_batch():
    box = Remote()
    asker = Asker(box, ["a", "b", "a"], batch=100)
    got, tokens = asker.ask(["p", "q", "p"])
    assert max(box.asked.values()) == 1 and len(box.asked) == 4
    assert np.array_equal(got[0], got[2]) and np.array_equal(got[:, 0], got[:, 2])
    assert asker.spent.queries == 9 and tokens[0] == tokens[2]  # all are charged


def test_answers_that_are_not_finite_are_refused_with_their_place():
    class Bad(Local):
        def label_logprobs(self, prompts, rows):
            made = super().label_logprobs(prompts, rows)
            made[1, 1] = np.nan
            return made

    with pytest.raises(ModelError, match="prompt 'q' on row 'bb'"):
        Asker(Bad(), ["a", "bb"]).ask(["p", "q"])


def test_money_needs_prices():
    with pytest.raises(ValidationError, match="input_price"):
        AskOptions(max_cost=1.0)
    limits = AskOptions(max_cost=1.0, input_price=2.0, output_price=0.0).limits()
    assert limits.price(500_000, 10) == 1.0
    assert not isinstance(Local(), RemoteBox) and isinstance(Remote(), RemoteBox)


# -- killed ------------------------------------------------------------------------------------

PROMPTS = [f"prompt{number}" for number in range(6)]
ROWS = [f"row{number}" for number in range(10)]
CONCURRENCY = 4
DRIVER = f"""
import sys
from pathlib import Path
from prunery.pipelines.prompts.answer_log import SqliteLog
from prunery.pipelines.prompts.asking import Asker, AskOptions
from prunery.pipelines.prompts.endpoint import EndpointLabels
from prunery.pipelines.prompts.task import PromptTaskOptions

task = PromptTaskOptions(black_box="endpoint", model="m", base_url=sys.argv[1])
how = AskOptions(concurrency={CONCURRENCY}, max_queries=45, retries=0)
asker = Asker(
    EndpointLabels(task, ["yes", "no"], how),
    {ROWS!r},
    how.limits(),
    SqliteLog(Path(sys.argv[2])),
    batch=20,
)
found, tokens = asker.ask({PROMPTS!r})
print(found.tobytes().hex(), tokens.tolist(), asker.spent.queries, asker.spent.tokens)
"""


class Counting:
    """A server's answers, counted; kills the process it serves after so many requests."""

    def __init__(self):
        self.asked, self.lock = Counter(), threading.Lock()
        self.kill_at, self.process = math.inf, None

    def __call__(self, asked, before):
        with self.lock:
            self.asked[asked.user] += 1
            if sum(self.asked.values()) == self.kill_at:
                os.kill(self.process.pid, signal.SIGKILL)
        values = logprobs("", asked.user)
        top = {" yes": float(values[0]), " no": float(values[1])}
        delay = hashlib.sha256(asked.user.encode()).digest()[1] / 255 * 0.02
        return classic(top, usage=(len(asked.user), 1), delay=delay)

    def run(self, url, path, kill_after=math.inf) -> str | None:
        """What the driver prints, or None if it was killed."""
        with self.lock:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, url, str(path)], stdout=subprocess.PIPE, text=True
            )
            self.kill_at = sum(self.asked.values()) + kill_after
        said = self.process.communicate(timeout=120)[0]
        if self.process.returncode == -signal.SIGKILL:
            return None
        assert self.process.returncode == 0
        return said


def test_a_killed_search_goes_on_where_it_was(tmp_path):
    whole, broken = Counting(), Counting()
    with serving(whole, keep_alive=True) as server:
        want = whole.run(server.url, tmp_path / "whole")
    assert sum(whole.asked.values()) == len(whole.asked) == 40  # 4 prompts of the 45 queries
    chance = random.Random(7)
    path, kept, kills = tmp_path / "broken", set(), 0
    with serving(broken, keep_alive=True) as server:
        for _ in range(3):
            before = Counter(broken.asked)
            got = broken.run(server.url, path, chance.randint(2, 14))
            _none_again(broken.asked - before, kept)
            if got is not None:
                break
            kills += 1
            kept = _stored(path)
        else:
            before = Counter(broken.asked)
            got = broken.run(server.url, path)
            _none_again(broken.asked - before, kept)
    assert kills == 3
    assert got == want
    assert set(broken.asked) == set(whole.asked)
    assert sum(broken.asked.values()) - 40 <= CONCURRENCY * kills


def _stored(path) -> set[str]:
    log = SqliteLog(path)
    found = log.find(PROMPTS, ROWS)
    log.close()
    return {
        f"{row} {prompt}"
        for prompt, line in zip(PROMPTS, found, strict=True)
        for row, answer in zip(ROWS, line, strict=True)
        if answer is not None
    }


def _none_again(asked, kept) -> None:
    assert not set(asked) & kept, "an answer that was kept was asked again"
