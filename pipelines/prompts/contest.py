"""The last questions: a few prompts on rows that no search has seen, judged and reported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...storage import row_id
from .asking import Asker
from .tables import VALIDATION
from .verdict import (
    CONTROL,
    EMPTY,
    FOUND,
    MANUAL,
    Judge,
    Score,
    best_of,
    judge_prompts,
    lead,
    standard_error,
)
from .words import Shots


def contest(
    asker: Asker,
    parts: Mapping[str, Shots],
    *,
    finalists: list[str],
    manual: str,
    control: str | None,
    judge: Judge,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows of `VERDICT`: every contender on both parts.

    Parameters
    ----------
    asker
        With the rows of the parts one after the other.
    parts
        `validation`, which decides, and maybe `test`, which only reports.
    finalists
        Prompts of the search, best first; of several the validation rows pick one.
    manual, control
        A prompt written by hand ("" for none) and another search's find (None for none).

    Raises
    ------
    BudgetError
        The budget does not reach.
    InputError
        There are no validation rows.
    """
    scores, tokens, start = {}, {}, 0
    contenders = {FOUND: finalists[0], EMPTY: ""}
    contenders |= {MANUAL: manual} if manual else {}
    contenders |= {CONTROL: control} if control is not None else {}
    for part, rows in parts.items():
        places = np.arange(start, start + len(rows.texts))
        start += len(rows.texts)
        if part == VALIDATION and len(finalists) > 1:
            answers, _ = asker.must_ask(finalists, places)
            best = best_of([Score.of(one, rows.labels) for one in answers], judge)
            contenders[FOUND] = finalists[best]
        if not len(places):
            continue
        answers, read = asker.must_ask(list(contenders.values()), places)
        scores[part] = {
            name: Score.of(one, rows.labels) for name, one in zip(contenders, answers, strict=True)
        }
        tokens[part] = dict(zip(contenders, read.tolist(), strict=True))
    verdict = judge_prompts(scores[VALIDATION], judge, seed=seed)
    return [
        _row(name, contenders[name], part, found, score, judge, tokens[part][name], seed)
        | {"chosen": name == verdict.chosen, "reason": verdict.reason}
        for part, by_name in scores.items()
        for found in (by_name[FOUND],)
        for name, score in by_name.items()
    ]


def _row(
    name: str,
    prompt: str,
    part: str,
    found: Score,
    score: Score,
    judge: Judge,
    tokens: int,
    seed: int,
) -> dict[str, Any]:
    ahead = lead(found, score, judge, seed=seed)
    return {
        "id": row_id("verdict", name, part),
        "contender": name,
        "prompt": prompt,
        "part": part,
        "rows": len(score.hit),
        "accuracy": score.accuracy,
        "accuracy_error": standard_error(score.hit, seed=seed),
        "log_likelihood": score.log_likelihood,
        "lead_of_found": ahead.mean,
        "lead_error": ahead.error,
        "tokens": tokens,
    }
