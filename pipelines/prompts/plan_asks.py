"""How much a step will ask its black box, counted before anything is asked.

Prompts and queries are closed forms of the steps' own schedules. A query is charged whether it is
sent or found in the log of answers; `sent` leaves out what an earlier step of the run will have
asked, and what the log has already. Answers that other runs left there can only make it fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from . import halving
from .asking import AnswerLog, AskOptions
from .plan_bounds import Asks, BoolMatrix, Bound
from .search import asks, start
from .searching import text_of
from .words import Shots

if TYPE_CHECKING:
    from ...pruners.contract import FloatArray
    from ..steps.prompt_influence import InfluenceOptions
    from ..steps.search_prompts import SearchPromptsOptions

_AT_ONCE = 512  # prompts that the log is asked about together


@dataclass(frozen=True, slots=True)
class Pool:
    """The words that a search moves among.

    Attributes
    ----------
    count
        How many, at most where not `exact`.
    candidates
        The words themselves in the order searched, or what they will be chosen from.
    decided
        Which of the two `candidates` are.
    """

    count: int
    candidates: Sequence[str]
    decided: bool
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Passed:
    """An influence pass of the same run: what the log will know once it is done.

    Attributes
    ----------
    seen
        Word to the rows that it is surely asked on: the first so many.
    queries
        Of all words together.
    finalists
        Words that are asked on every row.
    full
        Every word is asked on every row.
    """

    seen: Mapping[str, int]
    queries: int
    finalists: int
    full: bool


def influence_asks(
    options: InfluenceOptions,
    rows: Shots,
    words: Sequence[str],
    least: int,
    log: AnswerLog | None,
    bound: Bound,
) -> tuple[Asks, Passed]:
    """The influence pass: the empty prompt, and every word on the rows that halving gives it."""
    most = int(rows.shot.max()) + 1
    rungs = halving.schedule(len(words), most, options.halving or most, least=least)
    reach = [len(halving.rows_of(rows.shot, rung.shots)) for rung in rungs]
    queries = halving.queries(rungs, lambda shots: len(halving.rows_of(rows.shot, shots)))
    prompts = 1 + len(words)
    first = reach[0]
    known, later = 0, 0
    if log is not None:
        found = _known(log, words, rows.texts)
        known = bound.spared(_known(log, [""], rows.texts)) + bound.spared(found[:, :first])
        later = int(found[:, first:].sum())
    read = bound.tokens([""], rows.texts)
    for rung, start_row, stop_row in zip(rungs, [0, *reach], reach, strict=False):
        each = bound.tokens(words, rows.texts[start_row:stop_row])
        if read is not None and each is not None:
            read = np.array([read.sum() + np.sort(each)[::-1][: rung.candidates].sum()])
        else:
            read = None
    made = Asks(prompts, queries, queries - known, sent_exact=not later)
    if len(rungs) > 1:
        made = replace(
            made, note=" -> ".join(f"{r.candidates} words, {r.shots} shots" for r in rungs)
        )
    seen = {"": len(rows.texts), **dict.fromkeys(words, first)}
    passed = Passed(seen, queries - len(rows.texts), rungs[-1].candidates, len(rungs) == 1)
    made = _within(
        bound.charge(made, None if read is None else float(read.sum()), options), options
    )
    return made, passed


def search_asks(
    options: SearchPromptsOptions,
    rows: Shots,
    pool: Pool,
    passed: Passed | None,
    log: AnswerLog | None,
    bound: Bound,
    *,
    seed: int,
    others: bool,
    rungs: int = 1,
) -> Asks:
    """A search: its closed form, and what of it is known.

    Parameters
    ----------
    passed
        An influence pass to be done before, whose answers are remembered.
    others
        Whether another search of the run may have asked the same prompts before.
    rungs
        Of the halving by which words alone were, or will be, asked.
    """
    n = len(rows.texts)
    base = n if options.reward == "kl" else 0  # the empty prompt, which is compared with
    total = asks(
        options.method,
        options.options,
        vocabulary=pool.count,
        length=options.length,
        prompts=options.prompts,
    )
    note = ""
    if options.max_queries is not None and options.max_queries < total * n + base:
        total = max(0, (options.max_queries - base) // n)
        note = f"`max_queries` ends it after {total:,} prompts"
    if not total:
        return Asks(0, 0, 0, note="`max_queries` does not reach for one prompt: it fails")
    queries = total * n + base
    known, exact = 0, True
    if options.remember:
        known, exact = _known_to_search(options, rows, pool, passed, log, bound, total, seed)
        repeats = bool(options.options.get("published")) or others
        phrases = any(" " in word for word in pool.candidates)
        exact = exact and (not (repeats or phrases) or known == total * n)
        if base:
            known += bound.spared(_pairs([""], rows.texts, passed, log))
    made = Asks(total, queries, queries - known, exact=pool.exact, sent_exact=exact and pool.exact)
    read = None
    longest = bound.longest(pool.candidates, options.length)
    if longest is not None:
        each = bound.tokens([longest, ""], rows.texts)
        if each is not None:
            read = float(each[0] * total + (each[1] if base else 0))
            if not bound.remote:
                # An encoder reads the labels once for all rows of a call: halving made several.
                read += float(each[0]) * (rungs - 1) * _alone(options, pool, total)
    return bound.charge(replace(made, note=note), read, options)


def _known_to_search(
    options: SearchPromptsOptions,
    rows: Shots,
    pool: Pool,
    passed: Passed | None,
    log: AnswerLog | None,
    bound: Bound,
    total: int,
    seed: int,
) -> tuple[int, bool]:
    """Pairs of a search that will be known before it asks, and whether they are all of them."""
    n = len(rows.texts)
    first = _alone(options, pool, total)
    if not pool.decided:
        # What pruning keeps was asked on all rows: halving drops whatever was not.
        return (first * n if passed is not None else 0), True
    words = list(pool.candidates)
    if options.length == 1 and options.method != "greedy":
        return _known_alone(words, rows.texts, passed, log, bound, total)
    if log is None and passed is None:
        return 0, True
    return _replay(options, rows, words, passed, log, bound, total, seed)


def _alone(options: SearchPromptsOptions, pool: Pool, total: int) -> int:
    """Prompts of one word that it asks about, at most."""
    if options.length > 1 and options.method != "greedy":
        return 0
    return min(total, pool.count)


def _known_alone(
    words: list[str],
    rows: Sequence[str],
    passed: Passed | None,
    log: AnswerLog | None,
    bound: Bound,
    total: int,
) -> tuple[int, bool]:
    """As `_known_to_search`, for prompts of one word in an order that hangs on the answers."""
    found = _pairs(words, rows, passed, log)
    order = np.argsort(found.sum(axis=1), kind="stable")  # the least known may be all it asks
    exact = total == len(words) or bool((found == found[0]).all())
    return bound.spared(found[order[:total]]), exact and (passed is None or passed.full)


def _replay(
    options: SearchPromptsOptions,
    rows: Shots,
    words: list[str],
    passed: Passed | None,
    log: AnswerLog | None,
    bound: Bound,
    total: int,
    seed: int,
) -> tuple[int, bool]:
    """Run a search on what the log has, as far as that goes: one that was killed goes on there."""
    from ...pruners.signals.prompt_rewards import rewards

    search = start(
        options.method,
        options.options,
        vocabulary=len(words),
        length=options.length,
        prompts=total,
        seed=seed,
    )
    known, exact = 0, True
    empty = _answers(log, [""], rows.texts) if options.reward == "kl" else None
    batch = next(search, None)
    while batch:
        texts = [text_of(words, prompt) for prompt in batch]
        known += bound.spared(_pairs(texts, rows.texts, passed, log))
        if passed is not None and not passed.full:
            # How far halving goes with a word is not known, but what it asks of all of them is.
            inside = [text for text in texts if text in passed.seen]
            if len(inside) + 1 == len(passed.seen) == len(texts) + 1:
                known = passed.queries if bound.remote else passed.finalists * len(rows.texts)
            else:
                exact = not inside
        answers = _answers(log, texts, rows.texts)
        if answers is None or (options.reward == "kl" and empty is None):
            break
        base = empty[0] if empty is not None else np.zeros(answers.shape[1:], np.float32)
        try:
            batch = search.send(rewards(answers, rows.labels, base)[options.reward])
        except StopIteration:
            break
    return known, exact


def contest_asks(
    how: AskOptions,
    parts: Sequence[Shots],
    known: Mapping[str, str | None],
    finalists: Sequence[str] | int,
    coincide: bool,
    log: AnswerLog | None,
    bound: Bound,
    costliest: Sequence[str | None],
) -> Asks:
    """The contest of a few prompts on the validation rows and the test rows.

    Parameters
    ----------
    parts
        The rows of both.
    known
        Contender to its prompt; None where a search will find it.
    finalists
        Prompts among which the validation rows pick, or how many they will be.
    coincide
        Whether two contenders may turn out to be the same prompt.
    costliest
        For each search a prompt that costs as much as any that it can find; None for no bound.
    """
    sizes = [len(part.texts) for part in parts]
    count = finalists if isinstance(finalists, int) else len(finalists)
    extra = count if count > 1 else 0
    prompts = extra + len(known)
    queries = extra * sizes[0] + len(known) * sum(sizes)
    spared = 0
    if how.remember:
        spared = sizes[0] if extra else 0  # the one picked was asked there
        if log is not None:
            named = [text for text in known.values() if text is not None]
            spared += sum(bound.spared(_known(log, named, part.texts)) for part in parts)
    made = Asks(prompts, queries, queries - spared, sent_exact=not (coincide and how.remember))
    read = _contest_tokens(parts, list(known.values()), extra, costliest, bound)
    return _within(bound.charge(made, read, how), how)


def _contest_tokens(
    parts: Sequence[Shots],
    prompts: Sequence[str | None],
    extra: int,
    costliest: Sequence[str | None],
    bound: Bound,
) -> float | None:
    """Tokens of the contest, at most: a prompt not known yet costs as much as any that can be."""
    named = [text for text in prompts if text is not None]
    unknown = len(prompts) - len(named)
    total = 0.0
    for part, more in zip(parts, (extra, 0), strict=True):
        if not part.texts:
            continue
        each = bound.tokens(named, part.texts) if named else np.zeros(0, np.int64)
        if each is None:
            return None
        total += float(each.sum())
        if unknown + more:
            if None in costliest:
                return None
            worst = bound.tokens([text for text in costliest if text is not None], part.texts)
            if worst is None:
                return None
            total += (unknown + more) * float(worst.max())
    return total


def _within(made: Asks, how: AskOptions) -> Asks:
    """A step that needs all of its answers: say so where the queries do not reach."""
    if how.max_queries is None or how.max_queries >= made.queries:
        return made
    note = f"`max_queries` of {how.max_queries:,} does not reach: it fails"
    return replace(made, note="; ".join(filter(None, (made.note, note))))


def _pairs(
    prompts: Sequence[str], rows: Sequence[str], passed: Passed | None, log: AnswerLog | None
) -> BoolMatrix:
    """(P, N) bool: what the log has, or will have once the influence pass is done."""
    made = (
        np.zeros((len(prompts), len(rows)), np.bool_) if log is None else _known(log, prompts, rows)
    )
    if passed is not None:
        for place, prompt in enumerate(prompts):
            made[place, : passed.seen.get(prompt, 0)] = True
    return made


def _known(log: AnswerLog, prompts: Sequence[str], rows: Sequence[str]) -> BoolMatrix:
    """(P, N) bool: what the log has."""
    made = np.zeros((len(prompts), len(rows)), np.bool_)
    for at in range(0, len(prompts), _AT_ONCE):
        for place, line in enumerate(log.find(prompts[at : at + _AT_ONCE], rows), at):
            made[place] = [answer is not None for answer in line]
    return made


def _answers(
    log: AnswerLog | None, prompts: Sequence[str], rows: Sequence[str]
) -> FloatArray | None:
    """(P, N, C) log probabilities; None where the log does not have all of them."""
    if log is None:
        return None
    made = []
    for line in log.find(prompts, rows):
        values = [answer[0] for answer in line if answer is not None]
        if len(values) < len(rows):
            return None
        made.append(values)
    return np.asarray(made, np.float32)
