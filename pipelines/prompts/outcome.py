"""What a search for a prompt came to: the prompt taken, what it is worth, what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...storage import Manifest, Store
from .report import accuracy, cost_of
from .tables import TEST, VALIDATION

_ROLES = {"prompt_influence": "influence", "search_prompts": "search", "test_prompts": "verdict"}
_COLUMNS = {
    "influence": ["rows_seen", "tokens"],
    "search": ["queries", "tokens"],
    "verdict": ["contender", "part", "rows", "tokens"],
}


def outcome(store: Store, verdict: Manifest) -> dict[str, Any]:
    """Plain values of a `test_prompts` table and of the steps that it comes from.

    `accuracy` is by part and contender, with its standard error; `queries` and `tokens` are of
    all steps that asked for it, by their names and together.
    """
    rows = store.table(verdict.key).to_table().to_pylist()
    taken: dict[str, Any] = next((row for row in rows if row["chosen"]), {})
    parts: dict[str, dict[str, Any]] = {}
    for row in rows:
        parts.setdefault(row["part"], {})[row["contender"]] = {
            name: row[name] for name in ("prompt", "rows", "accuracy", "accuracy_error")
        }
    costs = [_cost(store, m, verdict) for m in store.lineage(verdict.key) if m.step in _ROLES]
    return {
        "prompt": taken.get("prompt"),
        "contender": taken.get("contender"),
        "reason": taken.get("reason"),
        "accuracy": parts,
        "steps": {name: {"queries": q, "tokens": t} for name, q, t in costs},
        "queries": sum(q for _, q, _ in costs),
        "tokens": sum(t for *_, t in costs),
    }


def _cost(store: Store, asked: Manifest, verdict: Manifest) -> tuple[str, int, int]:
    role = _ROLES[asked.step]
    table = store.table(asked.key).to_table(_COLUMNS[role])
    finalists = int(verdict.options.get("finalists", 1))
    made = cost_of(asked.name, role, table, 0.0, remote=False, finalists=finalists)
    return asked.name, made.queries, made.tokens


def outcome_lines(name: str, made: Mapping[str, Any]) -> list[str]:
    """The same in words."""
    if made["contender"] is None:
        return [f"{name}: no prompt was taken"]
    part = TEST if TEST in made["accuracy"] else VALIDATION
    figures = made["accuracy"][part]
    taken = figures[made["contender"]]
    others = ", ".join(
        f"{other} {accuracy(figures[other])}"
        for other in ("found", "empty", "manual", "control")
        if other in figures and other != made["contender"]
    )
    text = repr(made["prompt"]) if made["prompt"] else "no prompt at all"
    return [
        f"{name}: the {made['contender']} prompt is taken: {text}",
        f"  {made['reason']}",
        f"  {part} accuracy {accuracy(taken)} (s.e., {taken['rows']:,} rows); {others}",
        f"  {made['queries']:,} queries, {made['tokens']:,} tokens",
    ]
