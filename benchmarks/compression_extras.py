"""Four parts of the compression stage, each small and each beside a control.

    python benchmarks/compression_extras.py
    python benchmarks/compression_extras.py --only recovery --seeds 5

- activation: CATS, CHESS and TEAL at 30, 50 and 70 %, and PPL-1%; the same shares of the same
  numbers left out by lot stand beside.
- encoder: GAPrune on all-MiniLM-L6-v2 (domain PubMedQA, general Alpaca), retrieval on pairs held
  out, beside magnitude and random weights; how many of the kept weights magnitude keeps too.
- search: Wanda 50 % and FLAP 20 % with a refit; uniform budgets, evolution, and a random search
  that looks as often at as many tokens.
- recovery: what each method of `recover_weights` makes of magnitude 50 % and Wanda 50 %, with the
  same rows and steps; the dense model trained alike stands beside.

`--model stories` is the checkpoint stories260K; a path is a folder of another causal language
model. Texts are TinyStories (the shared data are needed). Seeds choose calibration rows, pairs and
draws. A step's table is kept in `--work`, so that a stopped run goes on. Writes
`results/compression_extras.json` and a section of `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import torch
from compression_extras_report import section
from compression_runs import (
    HERE,
    SHARED,
    judged,
    lines_file,
    rows_of,
    run,
    stories,
    stories_model,
)
from sections import write_section
from torch import nn

from prunery.pipelines.compression import embedding_gradients as gradients
from prunery.pipelines.compression.encoder_folders import encoder_folder, load_encoder
from prunery.pipelines.compression.model_tables import model_folder
from prunery.pipelines.compression.quality import compare, load_packed
from prunery.pipelines.models import encoder, without_bars
from prunery.pruners import rules
from prunery.pruners.models.block_layouts import layout_of
from prunery.pruners.models.sparse_activation import Site, readers
from prunery.pruners.weight.gaprune import GaPrune
from prunery.storage import Manifest, Store

Cell = dict[str, Any]
LEVELS = (0.3, 0.5, 0.7)
ACTIVATION: dict[str, dict[str, Any]] = {
    "CATS": {"method": "cats"},
    "CHESS": {"method": "chess"},
    "TEAL": {"method": "teal"},
}
GREEDY = {"method": "teal", "levels": "greedy", "sparsity": 0.5}
ROWS_OF_THRESHOLDS = 16  # of 256 tokens: greedy looks at all of them for each place and step
# GAPrune: options of the method, then of the signals.
ENCODER: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "GAPrune, as published": ({}, {}),
    "GAPrune, terms balanced": ({}, {"fisher": "balanced", "align": "cosine"}),
    "GAPrune, balanced, beta 0": ({"beta": 0.0}, {"fisher": "balanced", "align": "cosine"}),
    "domain term alone": ({"beta": 0.0, "regularisation": 0.0}, {}),
}
KEEP = (0.5, 0.3)
PAIRS, HELD, WORDS = 96, 0.5, 48  # of a set to score with, share held out, words of a text
# Plan, what the model is compressed with, statistics that a search needs.
SEARCHED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "Wanda 50 %": ({"method": "wanda", "sparsity": 0.5}, {}, ["sum_squares"]),
    "FLAP 20 %, refit": (
        {"method": "flap", "sparsity": 0.2},
        {"compensate": "refit"},
        ["mean", "m2", "gram"],
    ),
}
EVOLUTION: dict[str, Any] = {"rounds": 3, "generations": 5, "offspring": 16, "survivors": [6, 3, 2]}
# One generation with as many genomes in each stage as evolution has in all of its generations.
AT_ONCE: dict[str, Any] = {"rounds": 1, "generations": 1, "swaps": 16}
AT_ONCE |= {"offspring": 240, "survivors": [90, 45, 2]}
SEARCHES: dict[str, dict[str, Any]] = {
    "evolution": EVOLUTION,
    "random search": AT_ONCE,
}
PRUNED: dict[str, dict[str, Any]] = {
    "dense": {"method": "magnitude", "sparsity": 0.0},
    "magnitude 50 %": {"method": "magnitude", "sparsity": 0.5},
    "Wanda 50 %": {"method": "wanda", "sparsity": 0.5},
}
RECOVERED: dict[str, dict[str, Any]] = {
    "biases and norms": {"method": "bias_norm"},
    "layerwise": {"method": "layerwise"},
    "MaskLoRA": {"method": "mask_lora"},
    "LoRA, zeros not kept": {"method": "lora", "keep_zeros": False},
    "distillation, zeros kept": {"method": "distil"},
}
ROWS_TRAINED = 128
TRAINED = {"steps": 40, "batch_tokens": 1024, "evaluations": 4}


class Bench:
    """A model, rows to calibrate on and rows to judge on, in a store."""

    def __init__(self, model: str, work: Path) -> None:
        self.store, self.work = Store(work / "store"), work
        self.model = str(stories_model(work)) if model == "stories" else model
        path = lines_file(work / "stories.jsonl", [{"text": text} for text in stories()])
        chats = run(self.store, "read_chats", "chats", {}, path=str(path), format="text")
        self.tokens = run(
            self.store, "tokenize_chats", "tokens", {"chats": chats.key},
            tokenizer=self.model, max_length=512, train_on="all",
        ).key  # fmt: skip
        self.judge = self.rows(0, part="evaluation")
        self.held = rows_of(self.store, self.judge)
        self.dense = load_packed(self.model)

    def rows(self, seed: int, count: int = 64, part: str = "calibration") -> str:
        """Key of windows of 256 tokens."""
        return run(
            self.store, "calibration_rows", f"{part}_{seed}", {"tokens": self.tokens}, seed,
            rows=count, length=256, part=part,
        ).key  # fmt: skip

    def compressed(
        self, plan: Manifest, seed: int, options: Mapping[str, Any], rows: str | None = None
    ) -> Manifest:
        """A plan carried out."""
        return run(
            self.store, "compress_weights", "small",
            {"plan": plan.key, "rows": rows or self.rows(seed)}, seed,
            model=self.model, measure=False, **options,
        )  # fmt: skip

    def planned(self, seed: int, options: Mapping[str, Any], **inputs: str) -> Manifest:
        """A plan for the model."""
        return run(
            self.store, "plan_compression", "plan", inputs, seed, model=self.model, **options
        )

    def perplexity(self, key: str) -> float:
        """Of the model of a table, on the rows held out."""
        return judged(self.store, self.dense, key, self.held).perplexity


# -- activation ----------------------------------------------------------------------------------


def activation(bench: Bench, seeds: int) -> list[Cell]:
    """Thresholds by method and level."""
    grid = [
        (name, level, {**options, "sparsity": level})
        for name, options in ACTIVATION.items()
        for level in LEVELS
    ]
    grid.append(("TEAL, greedy", 0.5, GREEDY))
    grid.append(("PPL-1%", None, {"method": "ppl_p", "p": 1.0}))
    cells = []
    for name, level, options in grid:
        made = [thresholds(bench, options, seed) for seed in range(seeds)]
        cells.append({"name": name, "level": level, "seeds": made})
        print(name, level, [round(one["perplexity"], 2) for one in made], flush=True)
    return cells


def thresholds(bench: Bench, options: Mapping[str, Any], seed: int) -> Cell:
    """Perplexity under the thresholds, and with as many numbers left out by lot."""
    made = run(
        bench.store, "activation_thresholds", "thresholds",
        {"rows": bench.rows(seed, ROWS_OF_THRESHOLDS), "evaluation": bench.judge}, seed,
        model=bench.model, **options,
    )  # fmt: skip
    rows = bench.store.table(made.key).to_table().to_pylist()
    whole = next(row for row in rows if row["layer"] < 0)
    dead = {
        (row["layer"], Site(row["module"], row["kind"])): 1 - row["live"]
        for row in rows
        if row["layer"] >= 0
    }
    model = load_packed(bench.model)
    unread = share_unread(model, dead)
    drop_at_random(model, dead, seed)
    return {
        "dead": 1 - whole["live"],
        "unread": unread,
        "dense": float(np.exp(whole["dense_loss"])),
        "perplexity": float(np.exp(whole["sparse_loss"])),
        "random": compare(bench.dense, model, bench.held, batch_tokens=4096)[1].perplexity,
        "seconds": made.seconds,
    }


def share_unread(model: Any, dead: Mapping[tuple[int, Site], float]) -> float:
    """Share of the blocks' matrix weights that need not be read for a token, in the mean."""
    layout: Any = layout_of(model.config)
    blocks = model.get_submodule(layout.blocks)
    total = sum(
        block.get_submodule(matrix.name).weight.numel()
        for block in blocks
        for matrix in layout.matrices(block)
    )
    saved = sum(
        share * module.weight.numel()
        for (layer, site), share in dead.items()
        for module in spared(blocks[layer], layout, site)
    )
    return float(saved / total)


def spared(block: Any, layout: Any, site: Site) -> list[Any]:
    """The matrices whose weights a dead number at a place leaves unread."""
    if site.kind == "gate":
        return [block.get_submodule(layout.up), block.get_submodule(layout.down)]
    if site.kind == "alone":
        return [block.get_submodule(site.module)]
    return [block.get_submodule(matrix.name) for matrix in readers(block, layout, site.module)]


def drop_at_random(model: Any, dead: Mapping[tuple[int, Site], float], seed: int) -> None:
    """Hooks that put numbers at 0 by lot, anew for each token; what is left is not scaled up."""
    layout: Any = layout_of(model.config)
    draws = torch.Generator().manual_seed(seed)
    masks: dict[tuple[int, Site], torch.Tensor] = {}  # of one forward pass: readers share them
    model.register_forward_pre_hook(lambda *_: masks.clear())

    def dropper(place: tuple[int, Site], share: float) -> Callable[..., Any]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if place not in masks:
                masks[place] = torch.rand(args[0].shape, generator=draws) >= share
            return (args[0] * masks[place], *args[1:])

        return before

    blocks = model.get_submodule(layout.blocks)
    for (layer, site), share in dead.items():
        # A neuron whose gate is 0 adds nothing: its input of the down projection is 0.
        taking = spared(blocks[layer], layout, site)[1 if site.kind == "gate" else 0 :]
        for module in taking:
            module.register_forward_pre_hook(dropper((layer, site), share))


# -- encoder -------------------------------------------------------------------------------------


def first_words(text: str) -> str:
    """The first words of a text."""
    return " ".join(text.split()[:WORDS])


def texts() -> dict[str, list[tuple[str, str]]]:
    """Questions with abstracts, and instructions with answers."""
    with gzip.open(SHARED / "rag_pubmedqa" / "ori_pqal.train500.json.gz", "rt") as file:
        medical = [
            (row["QUESTION"], first_words(" ".join(row["CONTEXTS"])))
            for row in json.load(file).values()
        ]
    with gzip.open(SHARED / "sft_alpaca" / "alpaca_5000.json.gz", "rt") as file:
        general = [
            (first_words(f"{row['instruction']} {row['input']}"), first_words(row["output"]))
            for row in json.load(file)
            if len(row["output"].split()) >= 10
        ]
    return {"domain": medical[: 2 * PAIRS], "general": general[: 2 * PAIRS]}


class EncoderBench:
    """An embedding model with the pairs of one seed, its gradients and its dense vectors."""

    def __init__(self, store: Store, work: Path, seed: int) -> None:
        self.store, self.seed = store, seed
        self.folder = Path(encoder("all-MiniLM-L6-v2").path)
        self.model, self.network = load_encoder(self.folder, None)
        self.paths = list(gradients.encoder_matrices(self.network))
        self.weights = {path: self.weight(path).detach().clone() for path in self.paths}
        self.keys, self.train, self.held = {}, {}, {}
        for role, pairs in texts().items():
            chats = [
                {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
                for a, b in pairs
            ]
            path = lines_file(work / f"{role}_pairs.jsonl", chats)
            self.keys[role] = run(store, "read_chats", f"{role}_pairs", {}, path=str(path)).key
            self.train[role], self.held[role] = self.split(self.keys[role])
        self.found = {
            role: gradients.pair_gradients(
                self.model, self.network, self.paths, pairs, batch_pairs=16
            )
            for role, pairs in self.train.items()
        }
        self.dense = {role: self.vectors(pairs) for role, pairs in self.held.items()}

    def weight(self, path: str) -> torch.Tensor:
        """The weight of a matrix, as it is now."""
        made: torch.Tensor = self.network.get_submodule(path).weight.data
        return made

    def split(self, key: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Pairs to score with and to judge on: those of `prune_encoder` at this seed."""
        rows = self.store.table(key).to_table(columns=["id", "messages"]).to_pylist()
        ids = np.array([row["id"] for row in rows], np.int64)
        held = rules.uniform(self.seed, ids) < HELD
        order = np.argsort(rules.uniform(self.seed + 1, ids), kind="stable")
        pairs = [tuple(message["content"] for message in row["messages"]) for row in rows]
        train, judge = ([pairs[i] for i in order if held[i] == side] for side in (False, True))
        return train[:PAIRS], judge[:PAIRS]

    def vectors(self, pairs: Sequence[tuple[str, str]]) -> tuple[Any, Any]:
        """Unit vectors of the first texts and of the second ones."""
        made = []
        with torch.no_grad():
            for side in zip(*pairs, strict=True):
                parts = [side[start : start + 32] for start in range(0, len(side), 32)]
                made.append(torch.cat([gradients.embed(self.model, p) for p in parts]).numpy())
        return made[0], made[1]

    def quality(self, masks: gradients.Masks | None) -> Cell:
        """MRR and the cosine to the dense vectors, by set."""
        for path, weight in self.weights.items():
            cut = 1.0 if masks is None else torch.from_numpy(masks[path])
            self.weight(path).copy_(weight * cut)
        made = {}
        for role, pairs in self.held.items():
            found = gradients.retrieval_quality(self.vectors(pairs), self.dense[role])
            made[role] = {"mrr": found.mrr, "cosine": found.cosine}
        self.quality_reset()
        return made

    def quality_reset(self) -> None:
        """The dense weights again."""
        for path, weight in self.weights.items():
            self.weight(path).copy_(weight)

    def scores(self, keep: float) -> dict[str, gradients.Arrays]:
        """Scores of every weight by each method."""
        return {
            "magnitude": gradients.magnitude_scores(self.weights),
            "random": gradients.random_scores(self.weights, self.seed),
            **{
                name: gradients.gaprune_scores(
                    GaPrune(keep=keep, **own),
                    self.weights,
                    self.found["domain"],
                    self.found["general"],
                    **signals,
                )
                for name, (own, signals) in ENCODER.items()
            },
        }

    def step_agrees(self, masks: gradients.Masks) -> bool:
        """Whether the step `prune_encoder`, as published, leaves the same weights at 0."""
        made = run(
            self.store, "prune_encoder", "pruned", self.keys, self.seed,
            keep=KEEP[0], pairs=PAIRS, held_out=HELD,
        )  # fmt: skip
        _, network = load_encoder(encoder_folder(self.store.table(made.key)), None)
        return all(
            torch.equal(
                network.get_submodule(path).weight.data,
                weight * torch.from_numpy(masks[path]),
            )
            for path, weight in self.weights.items()
        )


def encoder_part(bench: Bench, seeds: int) -> list[Cell]:
    """Retrieval of an embedding model whose MLP weights went, by method and share kept."""
    cells: dict[tuple[str, float], Cell] = {}
    for seed in range(seeds):
        one = EncoderBench(bench.store, bench.work, seed)
        dense = {"name": "dense", "keep": 1.0, "seeds": []}
        cells.setdefault(("dense", 1.0), dense)["seeds"].append(one.quality(None))
        for keep in KEEP:
            masks = {
                name: gradients.keep_over_all(found, keep)
                for name, found in one.scores(keep).items()
            }
            for name, mask in masks.items():
                cell = {"name": name, "keep": keep, "seeds": []}
                cell = cells.setdefault((name, keep), cell)
                made = {**one.quality(mask), "overlap": overlap(mask, masks["magnitude"])}
                cell["seeds"].append(made)
                print(seed, keep, name, made, flush=True)
                if seed == 0 and keep == KEEP[0] and name == "GAPrune, as published":
                    cell["step_agrees"] = one.step_agrees(mask)
    return list(cells.values())


def overlap(one: gradients.Masks, other: gradients.Masks) -> float:
    """Share of the weights that one keeps that the other keeps too."""
    both = sum(int((one[path] & other[path]).sum()) for path in one)
    return both / sum(int(mask.sum()) for mask in one.values())


# -- search --------------------------------------------------------------------------------------


def search(bench: Bench, seeds: int) -> list[Cell]:
    """Uniform budgets and searched ones."""
    cells = []
    for plan, (options, apply, wanted) in SEARCHED.items():
        ways: dict[str, Any] = {"uniform": None}
        if plan.startswith("FLAP"):
            ways["uniform, padded widths (where searches start)"] = {"widths": "padded"}
        ways |= SEARCHES
        for way, told in ways.items():
            made = []
            for seed in range(seeds):
                if way in SEARCHES:
                    made.append(searched(bench, options, apply, wanted, told, seed))
                else:
                    planned = bench.planned(seed, {**options, **(told or {})})
                    made.append(of_plan(bench, planned, apply, seed))
            cells.append({"plan": plan, "name": way, "seeds": made})
            print(plan, way, [round(one["perplexity"], 2) for one in made], flush=True)
    return cells


def of_plan(bench: Bench, plan: Manifest, apply: Mapping[str, Any], seed: int) -> Cell:
    """Perplexity of a plan carried out."""
    small = bench.compressed(plan, seed, apply)
    return {"perplexity": bench.perplexity(small.key)}


def searched(
    bench: Bench,
    options: Mapping[str, Any],
    apply: Mapping[str, Any],
    wanted: list[str],
    told: Mapping[str, Any],
    seed: int,
) -> Cell:
    """The same with budgets that a search found, and what the search saw."""
    statistics = run(
        bench.store, "weight_statistics", "statistics", {"rows": bench.rows(seed)},
        statistics=wanted, model=bench.model,
    )  # fmt: skip
    compensate = {"compensate": "refit"} if apply else {}
    found = run(
        bench.store, "search_budgets", "budgets",
        {"rows": bench.rows(seed), "statistics": statistics.key}, seed,
        model=bench.model, **options, **compensate, **told,
    )  # fmt: skip
    summary = json.loads(bench.store.table(found.key).attachment("search.json").read_text())
    planned = bench.planned(seed, {**options, "allocation": "search"}, budgets=found.key)
    return {
        **of_plan(bench, planned, apply, seed),
        "start": summary["start"],
        "best": summary["best"],
        "evaluations": summary["evaluations"],
        "seconds": found.seconds,
    }


# -- recovery ------------------------------------------------------------------------------------


def recovery(bench: Bench, seeds: int) -> list[Cell]:
    """What training makes of compressed models."""
    cells = []
    for base, plan in PRUNED.items():
        names = ["nothing", *RECOVERED] if base != "dense" else ["nothing", "MaskLoRA"]
        for name in names:
            made = [recovered(bench, plan, RECOVERED.get(name), seed) for seed in range(seeds)]
            cells.append({"base": base, "name": name, "seeds": made})
            print(base, name, [round(one["perplexity"], 2) for one in made], flush=True)
    return cells


def recovered(
    bench: Bench, plan: Mapping[str, Any], options: Mapping[str, Any] | None, seed: int
) -> Cell:
    """Perplexity after a recovery, trained share of the parameters, zeros and seconds."""
    made = bench.compressed(bench.planned(seed, plan), seed, {})
    if options is None:
        zeros = share_zero(bench, made.key)
        return {"perplexity": bench.perplexity(made.key), "zeros": zeros}
    rows = bench.rows(seed, ROWS_TRAINED)
    inputs, more, teaching = {"model": made.key, "rows": rows}, {}, 0.0
    if options["method"] == "distil":
        teacher = run(bench.store, "teacher_logits", "teacher", {"rows": rows}, model=bench.model)
        inputs["teacher"], teaching = teacher.key, teacher.seconds
    if options["method"] == "layerwise":
        more["dense"] = bench.model
    done = run(
        bench.store, "recover_weights", "recovered", inputs, seed,
        **TRAINED, **options, **more,
    )  # fmt: skip
    figures = done.notes["recovery"]
    return {
        "perplexity": bench.perplexity(done.key),
        "zeros": share_zero(bench, done.key),
        "share_trained": figures["share_trained"],
        "given_back": figures["given_back"],
        "seconds": done.seconds + teaching,
    }


def share_zero(bench: Bench, key: str) -> float:
    """Share of the blocks' matrix weights that are 0."""
    model = load_packed(model_folder(bench.store.table(key)))
    layout: Any = layout_of(model.config)
    weights = [
        block.get_submodule(matrix.name).weight
        for block in model.get_submodule(layout.blocks)
        for matrix in layout.matrices(block)
    ]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


PARTS: dict[str, Callable[[Bench, int], list[Cell]]] = {
    "activation": activation,
    "encoder": encoder_part,
    "search": search,
    "recovery": recovery,
}


def main() -> None:
    """Run the parts and write what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="stories", help="stories, or a folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--work", type=Path, default=Path("/tmp/prunery-compression"))
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    name = args.model if args.model == "stories" else Path(args.model).name
    machine = fresh.machine(
        "cpu", torch.get_num_threads(), ("torch", "transformers", "sentence-transformers")
    )
    with without_bars():
        measure(args, name, machine)


def measure(args: argparse.Namespace, name: str, machine: dict[str, Any]) -> None:
    """Run the parts; what is there is kept where model and seeds are the same."""
    bench = Bench(args.model, args.work / name)
    path = HERE / "results" / "compression_extras.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    if (result.get("model"), result.get("seeds")) != (name, args.seeds):
        result = {}
    # Folders are not written down: they differ from machine to machine.
    result |= {
        "command": f"python benchmarks/compression_extras.py --model {name} --seeds {args.seeds}",
        "model": name,
        "seeds": args.seeds,
        "dense": compare(bench.dense, bench.dense, bench.held, batch_tokens=4096)[0].perplexity,
        "tokens": int(sum(len(row) - 1 for row in bench.held.tokens)),
        "machine": machine,
    }
    for part in PARTS if args.only is None else [args.only]:
        started = time.process_time()
        result[part] = PARTS[part](bench, args.seeds)
        result.setdefault("seconds", {})[part] = time.process_time() - started
        print(f"{part}: {result['seconds'][part]:.0f} s of the processor", flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    write_section(HERE / "RESULTS.md", "compression_extras", section(result))


if __name__ == "__main__":
    main()
