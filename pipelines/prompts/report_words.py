"""What the page of a prompt search shows of words: influence, clusters, why they stayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .. import svg
from ..report import Chart, fates
from .tables import REWARDS

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

REWARD_WORDS = {
    "log_likelihood": "mean log likelihood of the gold class, nats",
    "gap": "mean margin of the gold class, as RLPrompt weighs it",
    "negative_entropy": "mean negative entropy of the classes, nats",
    "kl": "mean KL divergence from the empty prompt, nats",
    "double_softmax": "mean log likelihood after a second softmax, as published",
}
_BINS = 48
_LONG = 200  # characters of a prompt or a word
_MEMBERS = 12  # words listed of a cluster
_CLUSTERS = 12


@dataclass(frozen=True, slots=True)
class Words:
    """The candidate words, aligned: their influence, and what was decided about them.

    Attributes
    ----------
    ids
        (N,) int64, ascending.
    text, reason
        N words.
    influence
        (N,) float64 by reward.
    accuracy
        (N,) float64, change of the share of rows that are right.
    rows_seen
        (N,) int64.
    finalist, keep
        (N,) bool.
    reward
        What the decision was taken by.
    """

    ids: Ints
    text: Sequence[str]
    reason: Sequence[str]
    influence: Mapping[str, Floats]
    accuracy: Floats
    rows_seen: Ints
    finalist: Bools
    keep: Bools
    reward: str

    @classmethod
    def of(cls, influence: pa.Table, decision: pa.Table, reward: str) -> Words:
        """From the rows of `prompt_influence` and those of its decision; "" is left out."""
        decided = dict(
            zip(
                decision.column("id").to_pylist(),
                zip(
                    decision.column("keep").to_pylist(),
                    decision.column("reason").to_pylist(),
                    strict=True,
                ),
                strict=True,
            )
        )
        rows = sorted(
            (row for row in influence.drop_columns(["log_probability"]).to_pylist() if row["text"]),
            key=lambda row: row["id"],
        )
        decisions = [decided.get(row["id"], (False, "")) for row in rows]

        def numbers(name: str) -> Floats:
            return np.array([row[name] for row in rows], np.float64)

        return cls(
            ids=np.array([row["id"] for row in rows], np.int64),
            text=[row["text"] for row in rows],
            reason=[why for _, why in decisions],
            influence={name: numbers(name) for name in REWARDS},
            accuracy=numbers("accuracy"),
            rows_seen=np.array([row["rows_seen"] for row in rows], np.int64),
            finalist=np.array([row["finalist"] for row in rows], np.bool_),
            keep=np.array([keep for keep, _ in decisions], np.bool_),
            reward=reward,
        )

    @property
    def decided_by(self) -> Floats:
        """(N,) influence in the reward of the decision."""
        return self.influence[self.reward]

    def ranked(self) -> Ints:
        """Places from the highest influence to the lowest, finalists first, ties by id."""
        return np.lexsort((self.ids, -self.decided_by, ~self.finalist))


def influence_chart(words: Words) -> Chart | None:
    """How influence is spread, kept words beside dropped ones; None without words.

    Words that halving dropped are left out: their influence is of fewer rows.
    """
    shown = words.finalist & np.isfinite(words.decided_by)
    values, keep = words.decided_by[shown], words.keep[shown]
    if not len(values):
        return None
    # All equal: numpy still gives bins around the value.
    edges = np.histogram_bin_edges(values, bins=_BINS)
    kept, dropped = (np.histogram(values[rows], edges)[0] for rows in (keep, ~keep))
    # A border is drawn where there is one: a random choice has none.
    apart = keep.any() and (~keep).any() and values[keep].min() >= values[~keep].max()
    picture = svg.histogram(
        edges.tolist(),
        kept.tolist(),
        dropped.tolist(),
        x_label=f"influence: change of {REWARD_WORDS[words.reward].split(',')[0]}",
        y_label="words",
        label="Number of kept and dropped words by their influence",
        threshold=float(values[keep].min()) if apart else None,
        zero=True,
    )
    legend = fates(int(keep.sum()), int((~keep).sum()))
    if edges[0] <= 0 <= edges[-1]:
        legend.append({"cls": "zero", "name": "the empty prompt"})
    note = f"Measured as {REWARD_WORDS[words.reward]}, against the empty prompt, which is 0."
    early = len(words.ids) - int(shown.sum())
    if early:
        note += f" {early:,} words that were dropped on fewer rows are not drawn."
    if len(values) > 1 and values.min() == values.max():
        note += " All words have the same influence: the smaller ids were kept."
    return Chart("Influence of words", picture, legend, note)


def word_rows(words: Words, count: int) -> list[dict[str, Any]]:
    """The `count` words of highest influence, then as many of the lowest, none of them twice."""
    ranked = words.ranked()
    final = ranked[words.finalist[ranked]]
    high = final[:count]
    low = final[max(len(high), len(final) - count) :][::-1] if count else final[:0]
    return [
        {
            "side": side,
            "text": clipped(words.text[place]),
            "influence": f"{words.decided_by[place]:+.4g}",
            "accuracy": f"{100 * words.accuracy[place]:+.1f}",
            "cls": "kept" if words.keep[place] else "none",
            "reason": words.reason[place].replace("_", " "),
        }
        for side, places in (("highest", high), ("lowest", low))
        for place in places
    ]


def reason_rows(vocabulary: pa.Table, words: Words) -> list[dict[str, str]]:
    """Why entries of the vocabulary, and then words, stayed or went, the most frequent first."""
    made = []
    for stage, reasons, keeps in (
        ("vocabulary", vocabulary.column("reason"), vocabulary.column("keep")),
        ("influence", pa.chunked_array([pa.array(words.reason, pa.string())]), words.keep),
    ):
        names = np.array(reasons.to_pylist(), str)
        keep = np.asarray(keeps, np.bool_)
        for name in sorted(set(names.tolist()), key=lambda n: (-int((names == n).sum()), n)):
            rows = names == name
            made.append(
                {
                    "stage": stage,
                    "reason": name.replace("_", " ") or "not said",
                    "kept": f"{int((keep & rows).sum()):,}",
                    "dropped": f"{int((~keep & rows).sum()):,}",
                }
            )
    return made


def cluster_rows(clusters: pa.Table, words: Words) -> list[dict[str, Any]]:
    """The largest clusters: the word that stands for each, what became of it, its members."""
    place = {int(id_): number for number, id_ in enumerate(words.ids)}
    members: dict[int, list[dict[str, Any]]] = {}
    for row in clusters.to_pylist():
        members.setdefault(row["cluster"], []).append(row)
    largest = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))[:_CLUSTERS]
    made = []
    for _, rows in largest:
        rows.sort(key=lambda row: (row["centroid_distance"], row["id"]))
        chosen = next((row for row in rows if row["keep"]), rows[0])
        others = [row["text"] for row in rows if row is not chosen]
        number = place.get(chosen["id"])
        kept = number is not None and bool(words.keep[number])
        made.append(
            {
                "word": clipped(chosen["text"]),
                "size": f"{len(rows):,}",
                "influence": "" if number is None else f"{words.decided_by[number]:+.4g}",
                "fate": "not measured" if number is None else "kept" if kept else "dropped",
                "cls": "kept" if kept else "none",
                "members": ", ".join(clipped(text) for text in others[:_MEMBERS])
                + (f" and {len(others) - _MEMBERS:,} more" if len(others) > _MEMBERS else ""),
            }
        )
    return made


def clustered(clusters: pa.Table) -> str:
    """How many words the clusters stand for."""
    sizes = np.bincount(clusters.column("cluster").to_numpy()) if clusters.num_rows else [0]
    count = int(np.count_nonzero(sizes))
    words = f"{clusters.num_rows:,} words in {count:,} clusters; the word nearest to each centroid"
    shown = f" The {_CLUSTERS} largest." if count > _CLUSTERS else ""
    return f"{words} goes on.{shown}"


def clipped(text: str) -> str:
    """A text that does not fill the page."""
    return text if len(text) <= _LONG else text[: _LONG - 1] + "…"
