"""What selection of samples and tokens is worth: held-out loss at equal trained tokens.

    python benchmarks/sft_quality.py --data ../shared/data --work build/sft

A small Llama is trained on general text (TinyStories, WikiText-2 validation, tiny Shakespeare),
then on whole rows of both data sets that are set aside for it, so that fine-tuning starts from a
model that has seen such text. For each data set and seed a pool, a held-out set and a reference
set are drawn from the rows left; the base model is warmed up on a fifth of the pool, and signals
are taken once (loss and entropy of the warmed model, loss of the base as history, loss of a model
trained on the reference set, attention on the prompt, loss of the answer alone). Then each method
chooses, and the base model is trained on what it chose: same loop, same loss, same epochs and
batch size. An interrupted run goes on where it was. Writes
`benchmarks/results/sft_quality.json` and the section between the `sft_quality` markers of
`benchmarks/RESULTS.md`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from sft_lm import Sample, held_out, make_model, make_tokenizer, train
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from prunery.pruners.catalogue import METHODS
from prunery.pruners.contract import Selection, Signals
from prunery.pruners.ragged import token_ids
from prunery.pruners.signals.tokens import PromptAttention, score_tokens

HERE = Path(__file__).resolve().parent
DATASETS = ("gsm8k", "alpaca")
#: Share of the pool's trained tokens -> (share of samples, share of their tokens) of joint ones.
BUDGETS = {0.125: (0.25, 0.5), 0.25: (0.5, 0.5), 0.5: (0.7, 0.7142857)}
CORPORA = (
    "lm_tinystories/tinystories_sample.first80pct.txt.gz",
    "lm_wikitext2/valid.txt.gz",
    "lm_tinyshakespeare/tinyshakespeare.txt.gz",
)


BASE = (
    "vocabulary",
    "hidden",
    "layers",
    "length",
    "pretrain_epochs",
    "pretrain_rate",
    "seen",
    "seen_rate",
)


@dataclass(frozen=True)
class Size:
    """How large the comparison is; all of it stands in the results."""

    vocabulary: int = 4096
    hidden: int = 128
    layers: int = 4
    length: int = 320
    pretrain_epochs: int = 2
    pretrain_rate: float = 3e-3
    seen: int = 2500
    seen_rate: float = 1e-3
    pool: int = 1000
    held: int = 400
    reference: int = 1000
    rows: int = 8
    epochs: int = 1
    rate: float = 3e-4


def lines(path: Path) -> list[dict[str, str]]:
    """The rows of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def rows_of(data: Path, name: str) -> list[tuple[str, str]]:
    """(prompt, answer) of every row."""
    if name == "gsm8k":
        found = lines(data / "sft_gsm8k" / "train.jsonl.gz")
        return [(f"Question: {r['question']}\nAnswer:", f" {r['answer']}") for r in found]
    found = lines(data / "derived_alpaca_union" / "alpaca_union.jsonl.gz")
    return [
        (
            f"Instruction: {r['instruction']}\n"
            + (f"Input: {r['input']}\n" if r["input"] else "")
            + "Response:",
            f" {r['output']}",
        )
        for r in found
        if r["output"].strip()
    ]


def split(data: Path, name: str, seen: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The rows that the base model may see, and the others."""
    rows = rows_of(data, name)
    order = np.random.default_rng(7).permutation(len(rows))
    return [rows[i] for i in order[:seen]], [rows[i] for i in order[seen:]]


def corpus(data: Path) -> list[str]:
    """The general text, a string a file."""
    return [gzip.open(data / name, "rt", encoding="utf-8").read() for name in CORPORA]


def base_model(
    data: Path, work: Path, size: Size
) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """The tokenizer and the model that every run starts from; made once, kept in `work`."""
    mark = hashlib.sha256(json.dumps([getattr(size, k) for k in BASE]).encode()).hexdigest()[:12]
    folder = work / f"base-{mark}"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts = corpus(data)
        seen = [row for name in DATASETS for row in split(data, name, size.seen)[0]]
        tokenizer = make_tokenizer([*texts, *(a + b for a, b in seen)], size.vocabulary)
        ids = np.concatenate(
            [np.array(tokenizer(text, verbose=False)["input_ids"], np.int64) for text in texts]
        )
        width = 256
        parts = ids[: len(ids) // width * width].reshape(-1, width)
        trained = np.arange(width) > 0
        samples = [Sample(part, trained) for part in parts]
        model = make_model(
            len(tokenizer), hidden=size.hidden, layers=size.layers, length=512, seed=0
        )
        train(
            model,
            samples,
            epochs=size.pretrain_epochs,
            rows=8,
            rate=size.pretrain_rate,
            seed=0,
            report=folder / "progress.txt",
        )
        rows = [
            Sample(s.ids, np.arange(len(s.ids)) > 0) for s in tokenise(tokenizer, seen, size.length)
        ]
        train(model, rows, epochs=1, rows=8, rate=size.seen_rate, seed=1)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        (folder / "done").touch()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer, LlamaForCausalLM.from_pretrained(folder).eval()


def tokenise(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str]], length: int
) -> list[Sample]:
    """Prompt and answer with its end token; rows whose answer is cut are left out."""
    made = []
    for prompt, answer in rows:
        head = tokenizer(prompt)["input_ids"]
        tail = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        if len(head) + len(tail) <= length:
            ids = np.array([*head, *tail], np.int64)
            made.append(Sample(ids, np.arange(len(ids)) >= len(head)))
    return made


@torch.no_grad()
def token_arrays(
    model: LlamaForCausalLM, samples: Sequence[Sample], *, attention: bool = False
) -> dict[str, np.ndarray]:
    """Flat (T,) signals of all trained tokens, in the order of samples and positions."""
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, len(samples), 16):
        part = samples[start : start + 16]
        width = max(len(s.ids) for s in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        trained = torch.zeros(len(part), width, dtype=torch.bool)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for row, sample in enumerate(part):
            n = len(sample.ids)
            ids[row, :n] = torch.from_numpy(sample.ids)
            trained[row, :n] = torch.from_numpy(sample.trained)
            mask[row, :n] = 1
        found = score_tokens(
            model,
            ids,
            trained,
            attention_mask=mask,
            attention=PromptAttention() if attention else None,
        )
        made = {
            "row": found.row.numpy() + start,
            "token_position": found.position.numpy(),
            "loss": found.loss.numpy(),
            "entropy": found.entropy.numpy(),
        }
        if attention:
            made["prompt_attention"] = found.prompt_attention.numpy()
        parts.append(made)
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def signals_of(
    base: LlamaForCausalLM,
    warmed: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    samples: Sequence[Sample],
) -> tuple[Signals, Signals]:
    """Token signals (T rows) and sample signals (N rows)."""
    now = token_arrays(warmed, samples)
    ids = np.arange(1, len(samples) + 1, dtype=np.int64)
    sample = ids[now["row"]]
    tokens = Signals(
        {
            "id": token_ids(sample, now["token_position"]),
            "sample": sample,
            "token_position": now["token_position"],
            "turn": np.zeros(len(sample), np.int64),
            "protected": np.concatenate([np.arange(s.tokens) == s.tokens - 1 for s in samples]),
            "loss": now["loss"],
            "entropy": now["entropy"],
            "history_loss": token_arrays(base, samples)["loss"],
            "reference_loss": token_arrays(reference, samples)["loss"],
            "prompt_attention": token_arrays(warmed, samples, attention=True)["prompt_attention"],
        }
    )
    counts = np.array([s.tokens for s in samples])
    alone = [
        Sample(
            np.concatenate([s.ids[~s.trained][-1:], s.ids[s.trained]]),
            np.arange(s.tokens + 1) > 0,
        )
        for s in samples
    ]
    mean = np.bincount(now["row"], now["loss"], len(samples)) / counts
    alone_loss = token_arrays(warmed, alone)
    per_sample = Signals(
        {
            "id": ids,
            "answer_tokens": counts,
            "answer_loss": mean.astype(np.float32),
            "answer_loss_alone": (
                np.bincount(alone_loss["row"], alone_loss["loss"], len(samples)) / counts
            ).astype(np.float32),
        }
    )
    return tokens, per_sample


def by_samples(samples: Sequence[Sample], selection: Selection, budget: float) -> list[np.ndarray]:
    """Whole samples from the best score down until the budget of trained tokens is reached.

    The last one is cut short, so that every method trains on as many tokens.
    """
    left = round(budget * sum(s.tokens for s in samples))
    chosen = [np.zeros(len(s.ids), bool) for s in samples]
    for i in np.lexsort((np.arange(len(samples)), -selection.score)):
        places = np.flatnonzero(samples[i].trained)[: max(0, left)]
        chosen[i][places] = True
        left -= len(places)
    return chosen


def by_tokens(samples: Sequence[Sample], keep: np.ndarray, signals: Signals) -> list[np.ndarray]:
    """The mask over flat tokens as masks over the samples' ids."""
    chosen = [np.zeros(len(s.ids), bool) for s in samples]
    for row, position, kept in zip(
        signals["sample"] - 1, signals["token_position"], keep, strict=True
    ):
        chosen[row][position] = kept
    return chosen


def qtuning_within(tokens: Signals, budget: float, of_tokens: float, seed: int) -> np.ndarray:
    """Q-Tuning with the largest share of samples whose kept tokens stay within the budget.

    Its quadrant 4 is kept whole, so the product of its two shares is not what it trains.
    """
    keep = np.zeros(tokens.n, bool)
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        found = METHODS["qtuning"](samples=middle, tokens=of_tokens)(tokens, seed=seed).keep
        if found.sum() <= budget * tokens.n:
            keep, low = found, middle
        else:
            high = middle
    return keep


def choose(
    name: str,
    samples: Sequence[Sample],
    tokens: Signals,
    rows: Signals,
    budget: float,
    seed: int,
) -> list[np.ndarray]:
    """For each sample, (L,) bool: the tokens that a method trains at this budget."""
    of_samples, of_tokens = BUDGETS[budget]
    if name in ("random_samples", "ifd", "longest"):
        method = METHODS["random" if name == "random_samples" else name]()
        return by_samples(samples, method(rows, seed=seed), budget)
    if name == "qtuning":
        return by_tokens(samples, qtuning_within(tokens, budget, of_tokens, seed), tokens)
    if name == "random_both":
        drawn = METHODS["random"](keep=of_samples)(rows, seed=seed).keep
        part = drawn[tokens["sample"] - 1]
        keep = METHODS["random_tokens"](tokens=of_tokens)(tokens, seed=seed).keep & part
        return by_tokens(samples, keep, tokens)
    method = METHODS[name](tokens=budget)
    return by_tokens(samples, method(tokens, seed=seed).keep, tokens)


PLAN = ("random_samples", "ifd", "longest", "random_tokens", "excess_loss", "sstoken")
JOINT = ("random_both", "qtuning")


def one_seed(
    args: argparse.Namespace, size: Size, name: str, seed: int, done: dict[str, dict[str, object]]
) -> None:
    """All runs of one data set and seed that are not in `done` yet."""
    wanted = [(method, budget) for budget in BUDGETS for method in (*JOINT, *PLAN)]
    keys = {(m, b): f"{name}/{seed}/{m}/{b}" for m, b in [("none", 0.0), ("full", 1.0), *wanted]}
    if all(key in done for key in keys.values()):
        return
    tokenizer, _ = base_model(args.data, args.work, size)
    fresh = lambda: base_model(args.data, args.work, size)[1]  # noqa: E731
    samples = tokenise(tokenizer, split(args.data, name, size.seen)[1], size.length)
    order = np.random.default_rng(1000 + seed).permutation(len(samples))
    held = [samples[i] for i in order[: size.held]]
    pool = [samples[i] for i in order[size.held : size.held + size.pool]]
    last = size.held + size.pool
    clean = [samples[i] for i in order[last : last + size.reference]]
    base, warmed, reference = fresh(), fresh(), fresh()
    fit = {"epochs": size.epochs, "rows": size.rows, "rate": size.rate, "seed": seed}
    train(warmed, pool[: len(pool) // 5], **fit)
    train(reference, clean, **fit)
    tokens, rows = signals_of(base, warmed, reference, pool)
    for (method, budget), key in keys.items():
        if key in done:
            continue
        model = fresh()
        steps = took = 0.0
        trained = 0
        if method != "none":
            masks = (
                [s.trained for s in pool]
                if method == "full"
                else choose(method, pool, tokens, rows, budget, seed)
            )
            chosen = [Sample(s.ids, mask) for s, mask in zip(pool, masks, strict=True)]
            trained = sum(s.tokens for s in chosen)
            steps, took = train(model, chosen, **fit)
        losses = held_out(model, held)
        row = {
            "key": key,
            "data": name,
            "seed": seed,
            "method": method,
            "budget": budget,
            "trained_tokens": trained,
            "pool_tokens": sum(s.tokens for s in pool),
            "steps": steps,
            "seconds": round(took, 2),
            "loss_sum": losses[:, 0].round(4).tolist(),
            "loss_count": losses[:, 1].astype(int).tolist(),
        }
        done[key] = row
        with (args.work / "runs.jsonl").open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(key, trained, f"{losses[:, 0].sum() / losses[:, 1].sum():.4f}", f"{took:.0f} s")


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build/sft"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--base-only", action="store_true", help="train the base model and stop")
    parser.add_argument("--report-only", action="store_true", help="write what there is")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = Size()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.base_only:
        base_model(args.data, args.work, size)
        return
    log = args.work / "runs.jsonl"
    done = {}
    if log.exists():
        done = {row["key"]: row for row in map(json.loads, log.read_text().splitlines())}
    if not args.report_only:
        for name in args.datasets:
            for seed in range(args.seeds):
                one_seed(args, size, name, seed, done)
    from sft_quality_report import write_report

    write_report(list(done.values()), asdict(size), HERE)


if __name__ == "__main__":
    main()
