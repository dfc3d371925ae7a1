"""The section of `RESULTS.md` that `compression_extras.py` writes; every word hangs on a figure."""

from __future__ import annotations

from typing import Any

from compression_runs import interval

Cell = dict[str, Any]


def section(result: dict[str, Any]) -> str:
    """Tables and sentences of the parts that were run."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        "## Compression: activations, encoders, searched budgets, recovery",
        "",
        f"`{result['command']}`",
        "",
        f"{machine['processor']}, {machine['threads']} thread(s), Python {machine['python']},"
        f" {versions}; load average at the start {machine['load_before']:.1f}."
        f" {result['model']}: dense perplexity {result['dense']:.3f} over"
        f" {result['tokens']} tokens held out. Means of {result['seeds']} seeds,"
        " ± half of the 95 % interval; differences are paired by seed.",
    ]
    for part, make in _PARTS.items():
        if part in result:
            lines += ["", *make(result[part], result)]
    return "\n".join(lines)


# -- activation ----------------------------------------------------------------------------------


def _activation(cells: list[Cell], result: dict[str, Any]) -> list[str]:
    lines = [
        "### Activation sparsity",
        "",
        "Thresholds found on 16 rows of 256 tokens. Left out: the share of the numbers at the"
        " method's places that was at or under its threshold on the held-out rows; unread: the"
        " share of the blocks' matrix weights that this leaves unread, which is what methods are"
        " to be held against one another by. By lot: as many numbers at the same places, drawn"
        " anew for each token.",
        "",
        "| method | asked | left out | unread | perplexity | by lot |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for cell in cells:
        asked = "" if cell["level"] is None else f"{cell['level']:.0%}"
        lines.append(
            f"| {cell['name']} | {asked} | {_percent(cell, 'dead')} | {_percent(cell, 'unread')} |"
            f" {_shown(cell, 'perplexity')} | {_shown(cell, 'random')} |"
        )
    best = sum(_mean(cell, "perplexity") < _mean(cell, "random") for cell in cells)
    off = max(
        (abs(_mean(cell, "dead") - cell["level"]), f"{cell['name']} at {cell['level']:.0%}")
        for cell in cells
        if cell["level"] is not None
    )
    lines += [
        "",
        f"Thresholds beat the lot in {best} of {len(cells)} cells. The share reached on held-out"
        f" rows is furthest from the one asked for in {off[1]}: {100 * off[0]:.1f} points.",
    ]
    own = [cell for cell in cells if cell["level"] is None]
    if own:
        lines[-1] += (
            f" PPL-1%: {_percent(own[0], 'dead')} of the neurons of a token can be left out for a"
            " rise of the perplexity of 1 % at most."
        )
    return lines


# -- encoder -------------------------------------------------------------------------------------


def _encoder(cells: list[Cell], result: dict[str, Any]) -> list[str]:
    lines = [
        "### GAPrune on an embedding model",
        "",
        "all-MiniLM-L6-v2, weights of the MLP at 0. Domain: questions and abstracts of PubMedQA;"
        " general: instructions and answers of Alpaca; of each up to 96 pairs to score with and"
        " 96 to judge on, first 48 words. MRR of a text's partner among all partners held out;"
        " cosine to the dense model's vectors.",
        "",
        "| weights that stay | share | MRR, domain | MRR, general | cosine, domain |"
        " cosine, general | magnitude keeps too |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in cells:
        sets = [
            _shown({"seeds": [one[role] for one in cell["seeds"]]}, name, 3)
            for name in ("mrr", "cosine")
            for role in ("domain", "general")
        ]
        also = "" if cell["name"] == "dense" else f"{_mean(cell, 'overlap'):.4%}"
        lines.append(f"| {cell['name']} | {cell['keep']:.0%} | {' | '.join(sets)} | {also} |")
    return [*lines, "", *_encoder_words(cells)]


def _encoder_words(cells: list[Cell]) -> list[str]:
    named = {(cell["name"], cell["keep"]): cell for cell in cells}
    words = []
    for keep in sorted({cell["keep"] for cell in cells if cell["name"] == "magnitude"})[::-1]:
        plain = named["magnitude", keep]
        for name in dict.fromkeys(cell["name"] for cell in cells):
            if name in ("dense", "magnitude", "random") or (name, keep) not in named:
                continue
            cell = named[name, keep]
            found = _paired(_of(cell, "domain"), _of(plain, "domain"), "mrr")
            words.append(
                f"- {name}, {keep:.0%} kept: MRR on the domain {_signed(found, 3)} against"
                f" magnitude ({_verdict(found, higher=True)});"
                f" {1 - _mean(cell, 'overlap'):.4%} of its weights are others."
            )
    for cell in cells:
        if "step_agrees" in cell:
            same = "leaves" if cell["step_agrees"] else "does NOT leave"
            words.append(f"- The step `prune_encoder` {same} the same weights at 0 (seed 0).")
    return words


def _of(cell: Cell, role: str) -> Cell:
    return {"seeds": [one[role] for one in cell["seeds"]]}


# -- search --------------------------------------------------------------------------------------


def _search(cells: list[Cell], result: dict[str, Any]) -> list[str]:
    lines = [
        "### Searched budgets",
        "",
        "Calibrated and searched on 64 rows of 256 tokens. Fitness: KL to the dense model on the"
        " first 8,192 of these tokens, at the start and for the best. The random search draws all"
        " its genomes around the start, 1 to 16 swaps away, and looks as often at as many tokens as"
        " evolution (5 generations in each of 3 rounds).",
        "",
        "| | budgets | perplexity | to uniform | fitness | looks | seconds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for plan in dict.fromkeys(cell["plan"] for cell in cells):
        ways = {cell["name"]: cell for cell in cells if cell["plan"] == plan}
        for name, cell in ways.items():
            apart = _signed(_paired(cell, ways["uniform"], "perplexity"), 2)
            lines.append(
                f"| {plan} | {name} | {_shown(cell, 'perplexity')} |"
                f" {'' if name == 'uniform' else apart} | {_looked(cell)} |"
            )
    lines.append("")
    for plan in dict.fromkeys(cell["plan"] for cell in cells):
        ways = {cell["name"]: cell for cell in cells if cell["plan"] == plan}
        found = _paired(ways["evolution"], ways["random search"], "perplexity")
        lines.append(
            f"- {plan}: evolution {_signed(found, 2)} against the random search"
            f" ({_verdict(found, higher=False)})."
        )
    return lines


def _looked(cell: Cell) -> str:
    if "best" not in cell["seeds"][0]:
        return " | | "
    return (
        f"{_mean(cell, 'start'):.3f} to {_mean(cell, 'best'):.3f} |"
        f" {_mean(cell, 'evaluations'):.0f} | {_mean(cell, 'seconds'):.0f}"
    )


# -- recovery ------------------------------------------------------------------------------------


def _recovery(cells: list[Cell], result: dict[str, Any]) -> list[str]:
    lines = [
        "### Recovery",
        "",
        "`recover_weights` on 128 rows of 256 tokens, 40 steps of 1,024 tokens (of layerwise, for"
        " each layer), learning rates as they come. Trained: share of the parameters, the factors"
        " of low rank counted; zeros: of the blocks' matrices, afterwards. Seconds are those of"
        " the step, with the teacher's for distillation.",
        "",
        "| model | recovery | perplexity | zeros | trained | seconds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for cell in cells:
        trained = "share_trained" in cell["seeds"][0]
        more = "| "
        if trained:
            more = f"{_mean(cell, 'share_trained'):.2%} | {_mean(cell, 'seconds'):.0f}"
        lines.append(
            f"| {cell['base']} | {cell['name']} | {_shown(cell, 'perplexity')} |"
            f" {_mean(cell, 'zeros'):.1%} | {more} |"
        )
    lines.append("")
    named = {(cell["base"], cell["name"]): cell for cell in cells}
    apart = _paired(named["dense", "MaskLoRA"], named["dense", "nothing"], "perplexity")
    lines.append(
        f"- The dense model gains {_signed(apart, 2)} from the same training: so much is not"
        " recovery."
    )
    for base in dict.fromkeys(cell["base"] for cell in cells if cell["base"] != "dense"):
        kept = [c for c in cells if c["base"] == base and "zeros not kept" not in c["name"]]
        best = min(kept, key=lambda cell: _mean(cell, "perplexity"))
        free = _paired(named[base, "LoRA, zeros not kept"], named[base, "MaskLoRA"], "perplexity")
        lines.append(
            f"- {base}: of those that keep zeros, {best['name']} is lowest"
            f" ({_mean(best, 'perplexity'):.2f}). Zeros given up, LoRA is at"
            f" {_signed(free, 2)} against MaskLoRA ({_verdict(free, higher=False)})."
        )
    back = [c for c in cells if any(one.get("given_back") for one in c["seeds"])]
    lines += [
        f"- {c['base']}, {c['name']}: given back as it was in"
        f" {sum(bool(one.get('given_back')) for one in c['seeds'])} seed(s)."
        for c in back
    ]
    return lines


# -- figures -------------------------------------------------------------------------------------


def _values(cell: Cell, name: str) -> list[float]:
    return [float(one[name]) for one in cell["seeds"]]


def _mean(cell: Cell, name: str) -> float:
    return interval(_values(cell, name))[0]


def _shown(cell: Cell, name: str, digits: int = 2) -> str:
    mean, half = interval(_values(cell, name))
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if mean < 1000 else f"{mean:.0f}"


def _percent(cell: Cell, name: str) -> str:
    return f"{_mean(cell, name):.1%}"


def _paired(one: Cell, other: Cell, name: str) -> tuple[float, float]:
    """Mean difference over seeds and half of its 95 % interval."""
    pairs = zip(_values(one, name), _values(other, name), strict=True)
    return interval([first - second for first, second in pairs])


def _signed(found: tuple[float, float], digits: int) -> str:
    return f"{found[0]:+.{digits}f} ± {found[1]:.{digits}f}"


def _verdict(found: tuple[float, float], *, higher: bool) -> str:
    """Whether a difference is a gain, a loss, or neither."""
    mean, half = found
    if mean == 0 and half == 0:
        return "the same"
    if not abs(mean) > half:  # of one seed the interval is not a number
        return "a tie"
    return "better" if (mean > 0) == higher else "worse"


_PARTS = {
    "activation": _activation,
    "encoder": _encoder,
    "search": _search,
    "recovery": _recovery,
}
