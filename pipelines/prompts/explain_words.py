"""What became of a word on its way into a prompt, from the tables that have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...storage import Table

#: Tables of a family by the names of their steps.
Of = Callable[..., Iterator[Table]]
WORD_TABLES = ("prompt_vocabulary", "cluster_tokens", "prompt_influence")


def describe_word(of: Of, row_id: int) -> tuple[str, str] | None:
    """(what a word is, its text); None where no table has such a word."""
    for step in WORD_TABLES:
        for _, row in _rows(of, row_id, step):
            if not row["text"]:
                return "the empty prompt, which words are held against", ""
            token = f", token {row['token']!r}" if row.get("token") else ""
            number = f" ({row['token_id']})" if row.get("token_id", -1) >= 0 else ""
            return f"a word of the vocabulary{token}{number}", row["text"]
    return None


def word_lines(of: Of, row_id: int) -> list[str]:
    """Stage by stage: the filter, the cluster, the influence, the prompts that have it."""
    made = [_kept(t, row) + row["reason"] for t, row in _rows(of, row_id, "prompt_vocabulary")]
    made += [_clustered(table, row) for table, row in _rows(of, row_id, "cluster_tokens")]
    for table, row in _rows(of, row_id, "prompt_influence"):
        if row["text"]:
            made.append(_measured(table, row))
    if made:
        for table in of("search_prompts"):
            made += _searched(table, row_id)
    return made


def _rows(of: Of, row_id: int, step: str) -> Iterator[tuple[Table, dict[str, Any]]]:
    for table in of(step):
        for row in table.lookup([row_id], missing="skip").to_pylist():
            yield table, row


def _kept(table: Table, row: Mapping[str, Any]) -> str:
    return f"{table.manifest.name}: {'kept' if row['keep'] else 'dropped'}, "


def _clustered(table: Table, row: Mapping[str, Any]) -> str:
    said = f"{_kept(table, row)}{row['reason']} {row['cluster']}"
    said += f", {row['centroid_distance']:.4g} from its centroid"
    if row["keep"]:
        return said
    clusters = table.to_table(["text", "cluster", "keep"]).to_pylist()
    for other in clusters:
        if other["keep"] and other["cluster"] == row["cluster"]:
            return f"{said}; {other['text']!r} stands for it"
    return said


def _measured(table: Table, row: Mapping[str, Any]) -> str:
    part = "" if row["finalist"] else ", dropped by halving before it was asked on all rows"
    return (
        f"{table.manifest.name}: log likelihood {row['log_likelihood']:+.4g}, accuracy"
        f" {100 * row['accuracy']:+.1f} points against the empty prompt, on"
        f" {row['rows_seen']} rows{part}"
    )


def _searched(table: Table, row_id: int) -> list[str]:
    asked = table.to_table(["prompt", "words", "reward"]).to_pylist()
    having = [row for row in asked if row_id in row["words"]]
    if not having:
        return []
    best = max(asked, key=lambda row: row["reward"])
    said = f"{table.manifest.name}: in {len(having):,} of {len(asked):,} prompts asked about"
    if row_id in best["words"]:
        said += f", the best of them too: {best['prompt']!r}"
    return [said]
