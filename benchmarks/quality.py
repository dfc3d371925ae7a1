"""Quality of context pruning on data that training never saw.

    python benchmarks/quality.py --data ../shared/data --store build/quality

Writes `benchmarks/results/quality.json` and the section between the `quality` markers of
`benchmarks/RESULTS.md`. Scores are kept in the store: with another model only its own are
computed anew, and an interrupted run goes on where it was.

Before anything is measured, every question and passage is looked for in what the shipped model
was trained on (`default_rows.py` and the pool that its negatives and cloze questions come from).
What was seen is left out, and counted in the report; the one exception says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import quality_data as sets
from sections import write_section

from prunery.pipelines.context_scores import METHOD_NAMES
from prunery.pipelines.evaluate_context import (
    EvaluateContextOptions,
    EvaluationReport,
    evaluate_context,
)
from prunery.pipelines.evaluation_rows import ContextRow
from prunery.storage import Store

HERE = Path(__file__).resolve().parent
#: DSLR runs the network once a sentence: left out where that is tens of thousands of times.
CHEAP = [name for name in METHOD_NAMES if name != "dslr"]
LANGUAGES = ("de", "es", "zh", "ar")


@dataclass(frozen=True)
class Part:
    """One table of the report: a set of rows, which of them, and what to say about it."""

    name: str
    rows: str
    about: str
    methods: Sequence[str] = METHOD_NAMES
    options: dict[str, Any] = field(default_factory=dict)


PARTS = (
    Part(
        "qed-dev, three sentences or more",
        "qed",
        "The headline. Evidence is the sentence that QED's annotators selected; only questions"
        " that one sentence explains have one.",
        options={"min_sentences": 3, "labelled_only": True},
    ),
    Part(
        "qed-dev, all",
        "qed",
        "All passages, those of one and two sentences and those without a selected sentence"
        " included (there, answer strings alone count).",
    ),
    Part(
        "NQ, unseen candidates",
        "multidoc-unseen",
        "Ranking of the gold passage among those of its 30 BM25 candidates that training never"
        " saw, and answers kept in what is left of them.",
        CHEAP,
    ),
    Part(
        "NQ, 20 candidates",
        "multidoc",
        "The gold passage, unseen, among 19 BM25 candidates as they come. Most candidates stood"
        " in training, as evidence of other questions or as negatives: the model may know them"
        " apart from the gold one by that, so read the ranking of the table before.",
        CHEAP,
    ),
    Part(
        "NQ, 10 candidates",
        "multidoc",
        "The first ten of the same candidates.",
        CHEAP,
        {"candidates": 10},
    ),
    *(
        Part(
            f"XQuAD {language}",
            f"xquad-{language}",
            "Languages that the model was not trained for. The English text of these passages was"
            " in training: the words are new, the facts are not.",
            ["provence", "cosine", "lexrank", "first_k", "random"],
        )
        for language in LANGUAGES
    ),
)


def load(name: str, data: Path, questions: int | None) -> list[ContextRow]:
    """The rows of one set as they come; `questions` bounds how many, for a quick look."""
    if name == "qed":
        return sets.qed(data)[:questions]
    if name.startswith("multidoc"):
        # The clean set takes every question; the other shows what 20 candidates do to it.
        many, most = (30, 400) if name == "multidoc-unseen" else (20, 100)
        return sets.multidoc(data, candidates=many, questions=questions or most)
    language = name.removeprefix("xquad-")
    return sets.xquad(data, language)[::3][:questions]


def unseen(name: str, rows: list[ContextRow], seen: sets.Seen) -> list[ContextRow]:
    """The rows that are measured: without what training saw, see `PARTS` for the exception."""
    if name == "multidoc":
        gold = {row.group for row in seen.without(rows) if row.relevant == 1}
        return [row for row in rows if row.group in gold]
    left = seen.without(rows)
    return sets.golden(left) if name == "multidoc-unseen" else left


def trained_on(data: Path) -> Iterator[tuple[str, str]]:
    """(question, passage) of everything that the shipped model saw in training."""
    import default_rows

    corpus = default_rows.load(data)
    for item in (*corpus.train, *corpus.valid):
        yield item.question, item.text
    for passage in corpus.pool:
        yield "", "".join(passage.sentences)


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.is_file() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit that is checked out, or "unknown" outside a repository."""
    asked = ["git", "-C", str(HERE), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def evaluate(
    part: Part, path: Path, store: Store, given: argparse.Namespace
) -> tuple[EvaluationReport, float]:
    """One part's report, and the seconds it took (scores found in the store cost none)."""
    began = time.perf_counter()
    report = evaluate_context(
        EvaluateContextOptions(
            rows=[str(path)],
            name=part.name,
            methods=list(part.methods),
            model=given.model,
            dtype=given.dtype,
            resamples=given.resamples,
            seed=given.seed,
            **part.options,
        ),
        store,
        threads=given.threads,
    )
    return report, time.perf_counter() - began


def section(result: dict[str, Any], reports: Sequence[tuple[Part, EvaluationReport]]) -> str:
    """The Markdown between the markers."""
    box = result["machine"]
    model = result["model"]
    lines = [
        "## Quality of context pruning",
        f"Command: `{result['command']}` at commit {result['commit']}, on {box['processor']},"
        f" {box['cores']} cores, Python {box['python']}; model `{model['name']}`, digest"
        f" `{model['digest'][:16]}`, {result['dtype']}, default threshold {model['threshold']:g}."
        " Every figure, all settings and curves of all sets: `results/quality.json`.",
        "Seen in training, and left out (a passage counts when one training passage holds more"
        " than a fifth of its five-word sequences):\n\n"
        "| set | questions seen | passages seen | measured passages | of them seen |\n"
        "|---|---:|---:|---:|---:|\n"
        + "\n".join(
            f"| {name} | {o['loaded']['questions']} of {o['loaded']['of_questions']} |"
            f" {o['loaded']['passages']} of {o['loaded']['of_passages']} |"
            f" {o['measured']['of_passages']} | {o['measured']['passages']} |"
            for name, o in result["overlap"].items()
        ),
    ]
    for part, report in reports:
        text = report.to_markdown(brief=part is not PARTS[0])
        head, *rest = text.strip().split("\n\n")
        lines += [head, part.about, *rest]
    return "\n\n".join(lines)


def main() -> None:
    """Rows, overlap, scores, figures, files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--store", type=Path, default=Path("build/quality"))
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--questions", type=int, default=None, help="fewer, for a quick look")
    parser.add_argument("--sets", nargs="*", default=None, help="qed multidoc xquad-de ...")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md")
    given = parser.parse_args()
    parts = [part for part in PARTS if given.sets is None or part.rows in given.sets]
    rows = {name: load(name, given.data, given.questions) for name in {p.rows: 0 for p in parts}}
    seen = sets.seen(trained_on(given.data), [row for own in rows.values() for row in own])
    measured = {name: unseen(name, own, seen) for name, own in rows.items()}
    paths = {
        name: sets.write_rows(given.store / "rows" / f"{name}.jsonl", own)
        for name, own in measured.items()
    }
    found = {
        name: {"loaded": seen.count(own), "measured": seen.count(measured[name])}
        for name, own in rows.items()
    }
    print(json.dumps(found, indent=1), flush=True)
    store, reports, seconds = Store(given.store / "store"), [], {}
    for part in parts:
        report, seconds[part.name] = evaluate(part, paths[part.rows], store, given)
        reports.append((part, report))
        print(f"{report.to_markdown()}\n({seconds[part.name]:.0f} s)", flush=True)
    used = reports[0][1].summary
    result = {
        "command": shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "libraries": used["libraries"],
        "model": {
            "name": given.model,
            "digest": used["methods"]["provence"]["models"]["provence"],
            "threshold": used["threshold"],
        },
        "dtype": given.dtype,
        "seed": given.seed,
        "resamples": given.resamples,
        "overlap": found,
        "seconds": seconds,
        "parts": [report.to_json() for _, report in reports],
    }
    folder = given.results / "results"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
    (folder / "quality.json").write_text(text + "\n", encoding="utf-8")
    write_section(given.results / "RESULTS.md", "quality", section(result, reports))


if __name__ == "__main__":
    main()
