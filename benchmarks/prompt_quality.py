"""What pruning a prompt's search space is worth: ClaPS against random and whole vocabularies.

    python benchmarks/prompt_quality.py
    python benchmarks/prompt_quality.py --judge
    python benchmarks/prompt_quality.py --report

Black box: all-MiniLM-L6-v2 as `EncoderLabels`, the prompt before the word of each class, so that
a prompt costs one short text a class however many rows there are. Tasks and seeds: see
`prompt_quality_data`. The vocabulary's words are clustered once; the words that stand for the
clusters are measured by `measure_influence` on the training rows of each task and seed.

Spaces: `pruned` (the best tenth by influence), `random` (as many by `random_prompts`), `full`
(all, in an order shuffled by the seed). Every search may ask about `--prompts` prompts; those of
`--longer` go on, in the spaces that needed no influence pass, until they have asked about as many
prompts as the pass and the search of the pruned space together. A search is the same function of
its rewards whatever it may still ask, so its best at any earlier count is read from the same run.

`--judge` scores the best prompts again in float32, and asks the guard about them. Cells that are
done stand in `--out`; a run that was stopped goes on. `--report` renders all that was measured
into `results/prompt_quality.json` and a section of `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from prompt_quality_data import (
    SEEDS,
    SHARED,
    TASKS,
    Encoder,
    Vocabulary,
    open_boxes,
    parts_of,
    vocabulary,
)
from prompt_quality_report import machine, write_report

from prunery.pipelines.prompts.asking import Asker
from prunery.pipelines.prompts.halving import queries, rows_of, schedule
from prunery.pipelines.prompts.influence import Measured, measure_influence
from prunery.pipelines.prompts.searching import Asked, run_search
from prunery.pipelines.prompts.verdict import Judge, Score, best_of, judge_prompts
from prunery.pipelines.prompts.words import Shots
from prunery.pruners import rules
from prunery.pruners.catalogue import METHODS
from prunery.pruners.contract import BoolArray, IntArray, Signals
from prunery.pruners.prompt.published import published_rule

HERE = Path(__file__).resolve().parent
SEARCHES = ("greedy", "genetic", "particle_swarm", "random")
SPACES = ("pruned", "random", "full")
REWARD = "log_likelihood"
JUDGES: tuple[Judge, ...] = ("accuracy", "log_likelihood")
MARKS = (100, 250, 500, 1000, 2000)
HALVING = 4


@dataclass(frozen=True, slots=True)
class Cell:
    """One search. `more`: it goes on for as many prompts as the influence pass asked about."""

    space: str
    search: str
    length: int
    more: bool = False

    @property
    def name(self) -> str:
        """What tells it from others of one task and seed."""
        return f"{self.space}/{self.search}/{self.length}"


class Cells:
    """Results by name, appended to a file one line each, so that a stopped run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._done = {self._name(row) for row in self.rows}

    @staticmethod
    def _name(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["task"], row["seed"], row["name"]

    def has(self, task: str, seed: int, name: str) -> bool:
        """Whether a cell is done."""
        return (task, seed, name) in self._done

    def add(self, row: dict[str, Any]) -> None:
        """Keep a cell."""
        if self._name(row) in self._done:
            return
        self._done.add(self._name(row))
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Pair:
    """One task with one seed: its rows, its box, and what each word is worth there."""

    def __init__(self, task: str, seed: int, parts: dict[str, Shots], box: Any) -> None:
        self.task, self.seed, self.parts, self.box = task, seed, parts, box
        self.manual = TASKS[task].manual
        self.scores = {
            part: dict(zip(("empty", "manual"), self.score(["", self.manual], part), strict=True))
            for part in parts
        }

    def score(self, prompts: Sequence[str], part: str) -> list[Score]:
        """How prompts do on a part."""
        rows = self.parts[part]
        return [
            Score.of(one, rows.labels) for one in self.box.label_logprobs(list(prompts), rows.texts)
        ]

    def asker(self) -> Asker:
        """A fresh way to ask about the training rows."""
        return Asker(self.box, self.parts["train"].texts, batch=16_384)

    def measure(self, words: Vocabulary, keep: float, halving: int | None) -> tuple[Measured, int]:
        """Influences, and the queries that they took."""
        rows, asker = self.parts["train"], self.asker()
        made = measure_influence(
            asker,
            rows.labels,
            rows.shot,
            words.words,
            words.ids,
            start_shots=halving,
            least=rules.count_of(len(words.words), keep),
        )
        return made, asker.spent.queries


def claps(ids: IntArray, influence: npt.NDArray[Any], keep: float, seed: int) -> BoolArray:
    """The words that `claps` keeps, (V,)."""
    signals = Signals({"id": ids, "prompt_influence": influence.astype(np.float32)})
    return METHODS["claps"](keep=keep)(signals, seed=seed).keep


def spaces(
    words: Vocabulary, full: Measured, halved: Measured, keep: float, seed: int
) -> dict[str, IntArray]:
    """Places of the words of each space, the best first where there is a best."""
    ids, n = words.ids, len(words.ids)
    order = np.lexsort((ids, rules.uniform(seed, ids)))
    drawn = METHODS["random_prompts"](keep=keep)(Signals({"id": ids}), seed=seed).keep
    made = {"full": order, "random": order[drawn[order]]}
    for name, influence in full.influence.items():
        kept = claps(ids, influence, keep, seed)
        made[f"pruned:{name}"] = ranked(kept, influence, ids)
    made["pruned"] = made.pop(f"pruned:{REWARD}")
    last = np.flatnonzero(halved.finalist)
    score = halved.influence[REWARD][last]
    at = last[claps(ids[last], score, rules.count_of(n, keep) / len(last), seed)]
    made["halving"] = at[rules.best_first(halved.influence[REWARD][at], ids[at])]
    squeezed = full.influence["double_softmax"]
    made["published"] = ranked(published_rule(squeezed, 100 * (1 - keep)), squeezed, ids)
    return made


def ranked(keep: BoolArray, score: npt.NDArray[Any], ids: IntArray) -> IntArray:
    """Places of the kept words, best first."""
    at = np.flatnonzero(keep)
    return at[rules.best_first(score[at], ids[at])]


def plan(given: argparse.Namespace) -> list[list[Cell]]:
    """Cells of each pass over the tasks and seeds: what matters most first."""
    first = [
        Cell(space, search, given.length, more=space != "pruned" and search in given.longer)
        for space in SPACES
        for search in given.searches
    ]
    extras = [*(f"pruned:{kind}" for kind in ("gap", "negative_entropy", "kl")), "halving"]
    second = [Cell(space, "genetic", given.length) for space in (*extras, "published")]
    return [first, second] if given.extras else [first]


def influence_cell(
    pair: Pair, words: Vocabulary, full: Measured, halved: Measured, spent: tuple[int, int],
    kept: dict[str, IntArray], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """What is known before any search: the handmade prompts, the influences, the kept sets."""
    base = set(kept["pruned"].tolist())
    shot = pair.parts["train"].shot
    rungs = schedule(len(words.words), int(shot.max()) + 1, HALVING, least=len(kept["halving"]))
    ranks = {
        name: float(np.corrcoef(_ranks(full.influence[REWARD]), _ranks(value))[0, 1])
        for name, value in full.influence.items()
    }
    return {
        "task": pair.task, "seed": pair.seed, "name": "influence", "seconds": round(seconds, 1),
        "rows": {part: len(rows.texts) for part, rows in pair.parts.items()},
        "words": len(words.words), "kept": len(kept["pruned"]), "queries": spent[0],
        "queries_halved": spent[1],
        "queries_halved_planned": queries(rungs, lambda s: len(rows_of(shot, s))),
        "accuracy": {part: {name: round(score.accuracy, 5) for name, score in scores.items()}
                     for part, scores in pair.scores.items()},
        "empty_reward": pair.scores["train"]["empty"].log_likelihood,
        "positive": float((full.influence[REWARD] > 0).mean()),
        "rank_correlation": {name: round(value, 4) for name, value in ranks.items()},
        "shared": {name: len(base & set(at.tolist())) / max(1, len(base))
                   for name, at in kept.items() if name not in ("full", "pruned")},
        "published_kept": len(kept["published"]),
        "best_words": [words.words[place] for place in kept["pruned"][:10]],
    }  # fmt: skip


def _ranks(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return rules.mean_rank(values)


def search_cell(
    pair: Pair, cell: Cell, words: Vocabulary, places: IntArray, prompts: int
) -> dict[str, Any]:
    """Run one search, and say how its best prompt did after `prompts` prompts and others."""
    began = time.perf_counter()
    published = cell.space == "published"
    asker = pair.asker()
    made = run_search(
        asker,
        pair.parts["train"].labels,
        [words.words[place] for place in places],
        method=cell.search,
        length=cell.length,
        prompts=prompts + (len(words.words) + 1 if cell.more else 0),
        reward="double_softmax" if published else REWARD,
        options={"published": True} if published else {},
        seed=pair.seed,
    )
    rises = [
        place
        for place, one in enumerate(made.asked)
        if place == 0 or one.best > made.asked[place - 1].best
    ]
    return {
        "task": pair.task, "seed": pair.seed, "name": cell.name, "space": cell.space,
        "search": cell.search, "length": cell.length, "asked": len(made.asked),
        "distinct": len({one.prompt for one in made.asked}), "queries": asker.spent.queries,
        "tokens": asker.spent.tokens, "seconds": round(time.perf_counter() - began, 1),
        "trace": [[place + 1, round(made.asked[place].best, 6)] for place in rises],
        "marks": [marked(pair, at, made.asked[[p for p in rises if p < at][-1]])
                  for at in marks(len(made.asked), prompts)],
    }  # fmt: skip


def marks(asked: int, prompts: int) -> Iterator[int]:
    """Numbers of prompts at which a search is looked at: `prompts` and others, and its end."""
    yield from (at for at in sorted({*MARKS, prompts}) if at < asked)
    yield asked


def marked(pair: Pair, at: int, best: Asked) -> dict[str, Any]:
    """The best of the first `at` prompts on every part, and what the guard makes of it."""
    found = {part: pair.score([best.prompt], part)[0] for part in ("validation", "test")}
    verdict = judge_prompts(
        {"found": found["validation"], **pair.scores["validation"]}, "accuracy", seed=pair.seed
    )
    test = {"found": found["test"], **pair.scores["test"]}
    return {
        "prompts": at, "prompt": best.prompt, "reward": round(best.reward, 6),
        "train": round(best.accuracy, 5), "validation": round(found["validation"].accuracy, 5),
        "test": round(found["test"].accuracy, 5), "chosen": verdict.chosen,
        "test_chosen": round(test[verdict.chosen].accuracy, 5),
    }  # fmt: skip


def judged(pair: Pair, name: str, mark: dict[str, Any]) -> dict[str, Any]:
    """What the guard makes of a prompt by either measure, and all contenders' test accuracy."""
    held, test = (
        {"found": pair.score([mark["prompt"]], part)[0], **pair.scores[part]}
        for part in ("validation", "test")
    )
    rivals = ("empty", "manual")
    return {
        "task": pair.task, "seed": pair.seed, "name": name, "prompts": mark["prompts"],
        "chosen": {judge: judge_prompts(held, judge, seed=pair.seed).chosen for judge in JUDGES},
        "rival": rivals[best_of([held[name] for name in rivals], "accuracy")],
        "validation": {name: round(score.accuracy, 5) for name, score in held.items()},
        "test": {name: round(score.accuracy, 5) for name, score in test.items()},
        "bfloat16": mark["test"],
    }  # fmt: skip


def judge_all(given: argparse.Namespace, encoder: Any) -> None:
    """Ask the guard about the best of `--prompts` prompts of every cell."""
    cells, done = Cells(given.out / "cells.jsonl"), Cells(given.out / "judged.jsonl")
    boxes = open_boxes(given.tasks, encoder)
    for task in given.tasks:
        for seed in given.seeds:
            own = [
                row
                for row in cells.rows
                if (row["task"], row["seed"]) == (task, seed)
                and "marks" in row
                and not done.has(task, seed, row["name"])
            ]
            if own:
                pair = Pair(task, seed, parts_of(task, seed, given.data), boxes[task])
            for row in own:
                mark = [mark for mark in row["marks"] if mark["prompts"] <= given.prompts][-1]
                done.add(judged(pair, row["name"], mark))


def run(given: argparse.Namespace, encoder: Any, words: Vocabulary) -> None:
    """Measure every cell that is not there yet."""
    settings = ("prompts", "length", "keep", "longer", "dtype")
    told = {name: getattr(given, name) for name in settings} | machine()
    (given.out / "settings.json").write_text(json.dumps(told))
    cells = Cells(given.out / "cells.jsonl")
    boxes = open_boxes(given.tasks, encoder)
    for wanted in plan(given):
        for seed in given.seeds:
            for task in given.tasks:
                missing = [cell for cell in wanted if not cells.has(task, seed, cell.name)]
                if missing or not cells.has(task, seed, "influence"):
                    pair = Pair(task, seed, parts_of(task, seed, given.data), boxes[task])
                    run_pair(given, pair, words, missing, cells)


def run_pair(
    given: argparse.Namespace, pair: Pair, words: Vocabulary, wanted: list[Cell], cells: Cells
) -> None:
    """Measure influences, and run searches."""
    began = time.perf_counter()
    full, spent = pair.measure(words, given.keep, None)
    seconds = time.perf_counter() - began
    halved, spent_halved = pair.measure(words, given.keep, HALVING)
    kept = spaces(words, full, halved, given.keep, pair.seed)
    row = influence_cell(pair, words, full, halved, (spent, spent_halved), kept, seconds)
    cells.add(row)
    for cell in wanted:
        made = search_cell(pair, cell, words, kept[cell.space], given.prompts)
        cells.add(made)
        last = made["marks"][-1]
        print(
            f"{pair.task:7} {pair.seed:3} {cell.name:28} {made['seconds']:6.1f} s"
            f"  reward {last['reward']:.4f}  test {last['test']:.3f}",
            flush=True,
        )


def main() -> None:
    """Measure, or report what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--longer", nargs="*", choices=SEARCHES, default=["genetic"])
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--length", type=int, default=5)
    parser.add_argument("--extras", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir(), "prompt_quality"))
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        write_report(given.out, HERE)
        return
    import torch

    torch.set_num_threads(given.threads)
    if given.judge:
        judge_all(given, Encoder("float32"))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(given.dtype)
    words = vocabulary(encoder, given.clusters, given.out / "vocabulary.json")
    run(given, encoder, words)


if __name__ == "__main__":
    main()
