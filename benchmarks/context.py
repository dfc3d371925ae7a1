"""Speed of context pruning against a plain implementation and the bare network, in one run.

    python benchmarks/context.py --data ../shared/data

Same weights, same inputs: the first `--questions` questions of derived_nq_multidoc with
`--passages` passages each. Measured, interleaved in `--repeats` rounds:

(a) `plain`: as one would write it with transformers: pairs in order, batches of 32 padded to the
    longest, a Python loop over tokens; float32. Text beyond 512 tokens is cut off.
(b) `cross_encoder`: sentence-transformers' CrossEncoder with the same encoder and ranking head,
    float32, batches of 32, its own sorting; ranking alone, no pruning. Cut off as well.
(c) `ours`: `ContextPruner.prune_batch`, once a dtype; long passages in several blocks, nothing cut.
(d) `bare`: the encoder alone on the very blocks of (c), grouped by exact length, so that there is
    no padding and no mask; once a dtype.

Then the latency of one question at a time, and how far bfloat16 and ONNX Runtime agree with
float32. Writes `results/context.json` and a section of `RESULTS.md` beside this file.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import faiss  # noqa: F401  before torch: two OpenMP runtimes the other way round can crash
import numpy as np
import torch
from sections import write_section

from prunery.errors import ModelError
from prunery.pruners.context import ContextPruner, PrunedPassage
from prunery.pruners.context.packing import Packed, pack
from prunery.pruners.context.pruner import pick_dtype
from prunery.pruners.context.sentences import split_sentences
from prunery.pruners.models.provence import LoadedProvence, load_provence
from prunery.pruners.signals.context import (
    CPU_BATCHING,
    Scorer,
    TorchForward,
    make_pairs,
)
from prunery.pruners.signals.context_blocks import batch_arrays
from prunery.pruners.signals.onnx_forward import onnx_forward

HERE = Path(__file__).resolve().parent
DATA = "derived_nq_multidoc/nq-open-30_docs_bm25_gold_first.jsonl.gz"

Texts = tuple[list[str], list[list[str]]]


def load(folder: Path, questions: int, passages: int) -> Texts:
    """Questions and their passages; exits with a message where the data are missing."""
    path = folder / DATA
    if not path.is_file():
        sys.exit(
            f"{path} is not there. Give the folder of derived_nq_multidoc with --data"
            " (PRUNERY_SHARED_DATA); nothing was measured."
        )
    asked, found = [], []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            asked.append(row["question"])
            found.append([context["text"] for context in row["ctxs"][:passages]])
            if len(asked) == questions:
                break
    if len(asked) < questions:
        sys.exit(f"{path} holds {len(asked)} questions; {questions} were asked for.")
    return asked, found


# (a)


def plain(loaded: LoadedProvence, questions: list[str], passages: list[list[str]]) -> list[Any]:
    """What a user would write with transformers: (logit, kept text) of every pair."""
    pairs = [(q, p) for q, own in zip(questions, passages, strict=True) for p in own]
    results = []
    for start in range(0, len(pairs), 32):
        batch = pairs[start : start + 32]
        encoded = loaded.tokenizer(
            [q for q, _ in batch],
            [p for _, p in batch],
            padding=True,
            truncation="only_second",
            max_length=loaded.config.max_length,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            return_tensors="pt",
        )
        offsets = encoded.pop("offset_mapping")
        with torch.no_grad():
            out = loaded.model(**encoded)
        probabilities = torch.sigmoid(out.keep_logit)
        for row, (_, passage) in enumerate(batch):
            sums: dict[tuple[int, int], float] = {}
            counts: dict[tuple[int, int], int] = {}
            spans = split_sentences(passage)
            for position in range(len(offsets[row])):
                begin, end = offsets[row][position].tolist()
                if encoded["token_type_ids"][row][position] != 1 or begin == end:
                    continue
                for span in spans:
                    if span[0] <= begin < span[1]:
                        sums[span] = sums.get(span, 0.0) + probabilities[row][position].item()
                        counts[span] = counts.get(span, 0) + 1
                        break
            kept = [s for s in spans if s in sums and sums[s] / counts[s] > loaded.config.threshold]
            text = "".join(passage[begin:end] for begin, end in kept)
            results.append((out.rank_logit[row].item(), text))
    return results


# (b)


def cross_encoder(loaded: LoadedProvence, folder: str) -> Any:
    """The same encoder and ranking head as a sentence-transformers CrossEncoder; None where the
    checkpoint has no BERT layout with a dense tanh pooler."""
    from sentence_transformers import CrossEncoder
    from transformers import BertForSequenceClassification

    head = loaded.model.rank_head
    config = loaded.model.encoder.config
    pooled = head.dense is not None and head.norm is None and head.config.activation == "tanh"
    if config.model_type != "bert" or not pooled or head.config.pooling != "first":
        return None
    config = type(config).from_dict({**config.to_dict(), "num_labels": 1})
    model = BertForSequenceClassification(config)
    missing, unexpected = model.bert.load_state_dict(
        loaded.model.encoder.state_dict(), strict=False
    )
    if unexpected or any(not name.startswith("pooler.") for name in missing):
        raise ModelError(f"the encoder does not fit BERT: {missing}, {unexpected}")
    model.bert.pooler.dense.load_state_dict(head.dense.state_dict())
    model.classifier.load_state_dict(head.out.state_dict())
    model.eval().save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return CrossEncoder(
        folder,
        device="cpu",
        max_length=loaded.config.max_length,
        activation_fn=torch.nn.Identity(),
        local_files_only=True,
    )


# (d)


def exact_groups(packed: Packed) -> Iterator[np.ndarray[Any, Any]]:
    """Blocks of one length each, as many together as ours."""
    lengths = packed.block_length
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        rows = max(1, CPU_BATCHING.tokens // int(length))
        for start in range(0, len(same), rows):
            yield same[start : start + rows]


def bare(loaded: LoadedProvence, packed: Packed) -> float:
    """Seconds of the encoder alone, arrays made beforehand."""
    made = []
    for group in exact_groups(packed):
        ids, _, types = batch_arrays(
            [(packed, int(block)) for block in group], int(packed.block_length[group[0]])
        )
        made.append((torch.from_numpy(ids), torch.from_numpy(types)))
    extra = loaded.config.token_types
    start = time.perf_counter()
    with torch.inference_mode():
        for ids, types in made:
            loaded.model.encoder(
                input_ids=ids, attention_mask=None, **({"token_type_ids": types} if extra else {})
            )
    return time.perf_counter() - start


# (c)


class Timed:
    """A forward pass that adds up its own seconds and the cells it was given."""

    def __init__(self, forward: Any) -> None:
        self.forward, self.seconds, self.cells = forward, 0.0, 0

    def __call__(self, ids: Any, mask: Any, types: Any) -> Any:
        start = time.perf_counter()
        made = self.forward(ids, mask, types)
        self.seconds += time.perf_counter() - start
        self.cells += ids.size
        return made


class Ours:
    """One back end of the pruner, its parts timed."""

    def __init__(self, loaded: LoadedProvence, forward: Any | None = None) -> None:
        self.timed = Timed(forward or TorchForward(loaded.model))
        self.pruner = ContextPruner(loaded, forward=self.timed)
        self.network: list[float] = []

    def run(self, questions: list[str], passages: list[list[str]]) -> list[list[PrunedPassage]]:
        self.timed.seconds, self.timed.cells = 0.0, 0
        made = self.pruner.prune_batch(questions, passages)
        self.network.append(self.timed.seconds)
        return made


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, garbage collected before it, and what it gave."""
    gc.collect()
    start = time.perf_counter()
    made = call()
    return time.perf_counter() - start, made


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest, highest and all of some seconds."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "all": list(values),
    }


def latency(run: Ours, questions: list[str], passages: list[list[str]]) -> dict[str, float]:
    """p50 and p95 seconds of one question with its passages, after a warm-up."""
    for question, own in list(zip(questions, passages, strict=True))[:3]:
        run.pruner.prune(question, own)
    taken = [
        timed(lambda q=question, own=own: run.pruner.prune(q, own))[0]
        for question, own in zip(questions, passages, strict=True)
    ]
    return {"p50": float(np.quantile(taken, 0.5)), "p95": float(np.quantile(taken, 0.95))}


def agreement(
    exact: list[list[PrunedPassage]], other: list[list[PrunedPassage]]
) -> dict[str, float]:
    """How far another arithmetic agrees with float32.

    Rank correlation (Spearman, mean over questions), the share of questions with the same first
    passage, the share of sentences decided otherwise, and the largest difference of a score.
    """
    correlations, first, changed, total, worst = [], 0, 0, 0, 0.0
    for left, right in zip(exact, other, strict=True):
        a = {one.index: one for one in left}
        b = {one.index: one for one in right}
        ranks = [_ranks([one[i].relevance_logit for i in sorted(one)]) for one in (a, b)]
        if len(left) > 2:
            correlations.append(float(np.corrcoef(*ranks)[0, 1]))
        first += left[0].index == right[0].index
        for index, one in a.items():
            for s, t in zip(one.sentences, b[index].sentences, strict=True):
                total += 1
                changed += s.kept != t.kept
                worst = max(worst, abs(s.score - t.score))
    return {
        "rank_correlation": float(np.mean(correlations)),
        "lowest_rank_correlation": float(np.min(correlations)),
        "same_first": first / len(exact),
        "sentences": total,
        "changed_decisions": changed / total,
        "largest_score_difference": worst,
    }


def _ranks(values: Sequence[float]) -> np.ndarray[Any, Any]:
    """Ranks from 0, ties by mean."""
    array = np.asarray(values)
    return (array[:, None] > array[None, :]).sum(1) + 0.5 * (
        (array[:, None] == array[None, :]).sum(1) - 1
    )


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one JSON value."""
    questions, passages = load(given.data, given.questions, given.passages)
    torch.set_num_threads(given.threads)
    exact = load_provence(given.model, device="cpu", dtype="float32")
    fast_dtype = pick_dtype("cpu", None)
    networks = {"float32": exact}
    if fast_dtype != "float32":
        networks[fast_dtype] = load_provence(given.model, device="cpu", dtype=fast_dtype)
    runs = {f"ours {name}": Ours(loaded) for name, loaded in networks.items()}
    notes = []
    try:
        runs["ours onnx float32"] = Ours(exact, onnx_forward(exact, threads=given.threads))
    except ModelError as error:
        notes.append(f"ONNX Runtime was not measured: {error}")
    scorer = Scorer.of(exact)
    packed = pack(make_pairs(questions, passages)[0], scorer.source, scorer.frame)
    jobs: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "plain" not in given.skip:
            jobs["plain"] = lambda: plain(exact, questions, passages)
        if "cross_encoder" not in given.skip:
            model = cross_encoder(exact, folder)
            if model is None:
                notes.append("(b) was not measured: the checkpoint is no BERT with a tanh pooler.")
            else:
                pairs = [(q, p) for q, own in zip(questions, passages, strict=True) for p in own]
                jobs["cross_encoder"] = lambda: model.predict(
                    pairs, batch_size=32, show_progress_bar=False
                )
        for name, run in runs.items():
            jobs[name] = lambda run=run: run.run(questions, passages)
        _warm_up(runs, networks, packed, questions, passages)
        taken: dict[str, list[float]] = {}
        last: dict[str, Any] = {}
        for round_number in range(given.repeats):
            for name, job in jobs.items():
                one, last[name] = timed(job)
                taken.setdefault(name, []).append(one)
                _say(given, round_number, name, one)
            for name, loaded in networks.items():
                gc.collect()
                taken.setdefault(f"bare {name}", []).append(bare(loaded, packed))
                _say(given, round_number, f"bare {name}", taken[f"bare {name}"][-1])
    results = {name: last[name] for name in runs}
    base = results["ours float32"]
    outside = {
        name: [1 - inside / whole for inside, whole in zip(run.network, taken[name], strict=False)]
        for name, run in runs.items()
    }
    return {
        "command": shlex.join(["python", "benchmarks/context.py", *sys.argv[1:]]),
        "machine": machine(given),
        "model": {"name": given.model, "digest": exact.digest},
        "questions": len(questions),
        "pairs": sum(map(len, passages)),
        "blocks": len(packed.block_pair),
        "tokens": int(packed.block_length.sum()),
        "padding": {n: r.timed.cells / int(packed.block_length.sum()) - 1 for n, r in runs.items()},
        "seconds": {name: spread(values) for name, values in taken.items()},
        "outside_network": {name: statistics.median(values) for name, values in outside.items()},
        "latency": {name: latency(run, questions, passages) for name, run in runs.items()},
        "agreement": {n: agreement(base, r) for n, r in results.items() if n != "ours float32"},
        "same_weights": _same_weights(last, base),
        "fast": f"ours {fast_dtype}",
        "notes": notes,
    }


def _warm_up(runs: Any, networks: Any, packed: Packed, questions: Any, passages: Any) -> None:
    for run in runs.values():
        run.run(questions[:2], passages[:2])
        run.network.clear()
    few = np.flatnonzero(packed.block_pair < 4)
    blocks = [(packed, int(block)) for block in few]
    for loaded in networks.values():
        TorchForward(loaded.model)(*batch_arrays(blocks, int(packed.block_length[few].max())))


def _same_weights(last: dict[str, Any], ours: list[list[PrunedPassage]]) -> dict[str, float]:
    """Largest difference of the ranking logit where the others did not cut the passage."""
    flat = [one for own in ours for one in sorted(own, key=lambda o: o.index)]
    logits = np.array([one.relevance_logit for one in flat])
    whole = np.array([one.blocks for one in flat]) == 1
    made: dict[str, float] = {}
    if "cross_encoder" in last:
        other = np.asarray(last["cross_encoder"]).reshape(-1)
        made["cross_encoder"] = float(np.abs(other - logits)[whole].max())
    if "plain" in last:
        other = np.array([logit for logit, _ in last["plain"]])
        made["plain"] = float(np.abs(other - logits)[whole].max())
    return made


def _say(given: argparse.Namespace, round_number: int, name: str, taken: float) -> None:
    print(f"round {round_number + 1}/{given.repeats}  {name:22s} {taken:8.2f} s", flush=True)


def machine(given: argparse.Namespace) -> dict[str, Any]:
    """Processor, threads and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for name in ("torch", "transformers", "sentence-transformers", "onnxruntime", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "processor": names[0] if names else platform.processor(),
        "logical_cores": os.cpu_count(),
        "threads": given.threads,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
    }


def section(made: dict[str, Any]) -> str:
    """The table for RESULTS.md."""
    taken = {name: one["median"] for name, one in made["seconds"].items()}
    fast = made["fast"]
    where = made["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [
        "## Speed of context pruning",
        "",
        f"`{made['command']}`",
        "",
        f"{made['questions']} questions, {made['pairs']} passages, {made['blocks']} blocks,"
        f" {made['tokens']} tokens. {where['processor']}, {where['threads']} threads, Python"
        f" {where['python']}, {versions}. Load average at the start"
        f" {where['load_before']:.1f}. Model `{made['model']['name']}`"
        f" ({made['model']['digest'][:12]}). No randomness but the order of the machine's own"
        " scheduling: inputs and weights are the same in every round.",
        "",
        "| | seconds (median; low to high) | times (c) | passages/s |",
        "|---|---|---|---|",
    ]
    label = {"plain": "(a) plain transformers", "cross_encoder": "(b) CrossEncoder, ranking alone"}
    for name, one in made["seconds"].items():
        mark = "(d) " if name.startswith("bare") else "(c) " if name.startswith("ours") else ""
        lines.append(
            f"| {label.get(name, mark + name)} | {one['median']:.2f};"
            f" {one['low']:.2f} to {one['high']:.2f} | {one['median'] / taken[fast]:.2f} |"
            f" {made['pairs'] / one['median']:.0f} |"
        )
    bare_fast = taken[fast.replace("ours", "bare")]
    lines += [
        "",
        f"(c) is `{fast}`: {taken[fast] / bare_fast:.2f} times the bare forward pass;"
        f" {100 * made['outside_network'][fast]:.1f} % of its time is spent outside the network;"
        f" {100 * made['padding'][fast]:.1f} % of its cells are padding.",
        "",
        "| back end | p50, one question | p95 | rank correlation with float32 (mean; lowest)"
        " | same first passage | sentences decided otherwise | largest score difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in made["latency"].items():
        close = made["agreement"].get(name)
        rest = (
            f"{close['rank_correlation']:.4f}; {close['lowest_rank_correlation']:.4f} |"
            f" {100 * close['same_first']:.0f} % | {100 * close['changed_decisions']:.2f} %"
            f" of {close['sentences']} | {close['largest_score_difference']:.4f}"
            if close
            else "1; 1 | 100 % | 0 % | 0"
        )
        lines.append(
            f"| {name} | {1000 * one['p50']:.0f} ms | {1000 * one['p95']:.0f} ms | {rest} |"
        )
    same = ", ".join(f"{name} {value:.1e}" for name, value in made["same_weights"].items())
    lines += ["", f"Largest difference of ranking logits from ours in float32: {same or 'none'}."]
    lines += [f"\n{note}" for note in made["notes"]]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = os.environ.get("PRUNERY_SHARED_DATA", HERE.parent.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--model", default="default")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--passages", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip", nargs="*", default=[], choices=["plain", "cross_encoder"])
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md")
    given = parser.parse_args()
    made = measure(given)
    folder = given.results / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "context.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    text = section(made)
    write_section(given.results / "RESULTS.md", "context-speed", text)
    print(text)


if __name__ == "__main__":
    main()
