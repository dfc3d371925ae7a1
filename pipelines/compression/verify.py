"""Hold a compressed model, as it will be exported, against the dense one and a control."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...pruners.models.block_layouts import layout_of
from ...pruners.models.streamed_model import read_config
from ...storage import row_id
from .gate import TaskScore, Verdict, judge, perplexity_ratio
from .harness import task_scores
from .measure_process import Speed, measure
from .model_sizes import Sizes, sizes_of
from .packing import PackOptions, SizeReport, pack_model
from .quality import Rows, RowScores, compare, load_packed, masked_rows
from .verify_tables import COMPRESSED_MODEL, CONTROL, DENSE


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyPlan:
    """How models are judged; see the options of `verify_compression` for what each means."""

    tolerance: float = 0.1
    task_tolerance: float = 0.02
    tasks: Sequence[str] = ()
    task_limit: int | None = None
    task_folder: str | None = None
    resamples: int = 200
    mask_share: float = 0.15
    mask_token: int | None = None
    batch_tokens: int = 2048
    speed: bool = True
    prompt: int = 128
    new: int = 32
    repeats: int = 3
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to judge: its name for people, its folder as stored, and how it is packed."""

    name: str
    folder: Path
    pack: PackOptions


@dataclass(frozen=True, slots=True)
class Judged:
    """What was found.

    Attributes
    ----------
    rows
        Of `verify_tables.VERIFY`: the same for the same models, rows and seed.
    sizes
        What packing the compressed model did to its size.
    speeds
        By role, what was measured: another thing in every run.
    """

    rows: list[dict[str, Any]]
    sizes: SizeReport
    speeds: dict[str, Speed]


def verify(
    dense: Path,
    model: Candidate,
    control: Candidate | None,
    rows: Rows,
    work: Path,
    plan: VerifyPlan,
) -> Judged:
    """Pack the model (and the control), and judge what was packed.

    `work` is a folder for the packed models; it is removed. At most two models are in memory,
    the dense and the one held against it.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        return _verify(dense, model, control, rows, work, plan)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _verify(
    dense: Path,
    model: Candidate,
    control: Candidate | None,
    rows: Rows,
    work: Path,
    plan: VerifyPlan,
) -> Judged:
    reports = {COMPRESSED_MODEL: pack_model(model.folder, work / COMPRESSED_MODEL, model.pack)}
    names = {DENSE: dense.name, COMPRESSED_MODEL: model.name}
    folders = {DENSE: dense, COMPRESSED_MODEL: work / COMPRESSED_MODEL}
    if control is not None:
        reports[CONTROL] = pack_model(control.folder, work / CONTROL, control.pack)
        names[CONTROL], folders[CONTROL] = control.name, work / CONTROL
    scores = _scores(folders, rows, plan)
    tasks = {role: _tasks(folder, plan) for role, folder in folders.items() if role != CONTROL}
    sizes = {role: report.after for role, report in reports.items()}
    sizes[DENSE] = sizes_of(dense, layout_of(read_config(dense)))
    made = []
    for role in folders:
        row = _quality(role, names[role], rows, scores, plan) | _size(sizes[role])
        made.append(row | {"tasks": _task_rows(tasks.get(role, {}))})
    speeds = {role: _speed(folder, plan) for role, folder in folders.items() if plan.speed}
    verdict = _judge(scores, tasks, plan)
    for row in made:
        told = row["role"] == COMPRESSED_MODEL
        row["verdict"] = verdict.word if told else ""
        row["reasons"] = [*verdict.reasons, *_beside(scores)] if told else []
    return Judged(made, reports[COMPRESSED_MODEL], speeds)


def _scores(folders: Mapping[str, Path], rows: Rows, plan: VerifyPlan) -> dict[str, RowScores]:
    layout = layout_of(read_config(folders[DENSE]))
    causal = layout.head == "causal"
    read = None
    if not causal:
        mask = plan.mask_token if plan.mask_token is not None else _mask_token(folders[DENSE])
        read, rows = masked_rows(rows, mask, plan.mask_share, plan.seed)
    dense = load_packed(folders[DENSE], plan.device)
    found: dict[str, RowScores] = {}
    for role, folder in folders.items():
        if role == DENSE:
            continue
        other = load_packed(folder, plan.device)
        found[DENSE], found[role] = compare(
            dense, other, rows, read=read, causal=causal, batch_tokens=plan.batch_tokens
        )
        del other
    return found


def _mask_token(folder: Path) -> int:
    from ...errors import InputError
    from ...pruners.models.tokenizers import load_tokenizer

    found = load_tokenizer(folder).mask_token_id
    if found is None:
        raise InputError(
            f"{folder}: expected a tokenizer with a mask token, found none. Give its id as"
            " `mask_token`."
        )
    return int(found)


def _quality(
    role: str, name: str, rows: Rows, scores: Mapping[str, RowScores], plan: VerifyPlan
) -> dict[str, Any]:
    own, dense = scores[role], scores[DENSE]
    ratio = perplexity_ratio(
        own.nll, dense.nll, own.count, seed=plan.seed, resamples=plan.resamples
    )
    return {
        "id": row_id("verify_compression", role),
        "role": role,
        "model": name,
        "perplexity": own.perplexity,
        "nll": own.mean_nll,
        "tokens": int(own.count.sum()),
        "kl": own.mean_kl,
        "agreement": own.agreement,
        "ratio": ratio.value,
        "noise": ratio.noise,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "row_ids": rows.ids.tolist(),
        "row_tokens": own.count.tolist(),
        "row_nll": own.nll.tolist(),
        "row_kl": own.kl.tolist(),
    }


def _size(sizes: Sizes) -> dict[str, Any]:
    total = sizes.total
    return {
        "file_bytes": sizes.file_bytes,
        "parameters": total.parameters,
        "zero_share": sizes.share_zero if total.weights else None,
    }


def _speed(folder: Path, plan: VerifyPlan) -> Speed:
    return measure(
        folder,
        prompt=plan.prompt,
        new=plan.new,
        repeats=plan.repeats,
        device=plan.device,
        threads=plan.threads,
    )


def _tasks(folder: Path, plan: VerifyPlan) -> dict[str, TaskScore]:
    if not plan.tasks:
        return {}
    return task_scores(
        folder,
        plan.tasks,
        limit=plan.task_limit,
        seed=plan.seed,
        device=plan.device,
        task_folder=plan.task_folder,
    )


def _task_rows(tasks: Mapping[str, TaskScore]) -> list[dict[str, Any]]:
    return [
        {
            "task": name,
            "metric": score.metric,
            "value": score.value,
            "stderr": None if score.stderr != score.stderr else score.stderr,
        }
        for name, score in tasks.items()
    ]


def _judge(
    scores: Mapping[str, RowScores],
    tasks: Mapping[str, Mapping[str, TaskScore]],
    plan: VerifyPlan,
) -> Verdict:
    own, dense = scores[COMPRESSED_MODEL], scores[DENSE]
    ratio = perplexity_ratio(
        own.nll, dense.nll, own.count, seed=plan.seed, resamples=plan.resamples
    )
    pairs = {name: (tasks[DENSE][name], score) for name, score in tasks[COMPRESSED_MODEL].items()}
    return judge(ratio, pairs, tolerance=plan.tolerance, task_tolerance=plan.task_tolerance)


def _beside(scores: Mapping[str, RowScores]) -> list[str]:
    """How the control did; it is told, and refuses nothing."""
    if CONTROL not in scores:
        return ["no control at the same budget was asked for"]
    own, control = scores[COMPRESSED_MODEL].perplexity, scores[CONTROL].perplexity
    better = "below" if own < control else "NOT below"
    return [f"perplexity {own:.4g} is {better} the control's {control:.4g} at the same budget"]
