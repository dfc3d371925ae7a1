"""Tables of a small prompt search, written by hand into a store."""

import numpy as np

from prunery.pipelines.prompts.tables import (
    INFLUENCE,
    REWARDS,
    SEARCH,
    TASK,
    TOKEN_CLUSTERS,
    VERDICT,
    VOCABULARY,
)
from prunery.pipelines.prompts.task import PromptTaskOptions
from prunery.pipelines.steps.prune_prompts import PROMPT_DECISION
from prunery.storage import row_id

from .. import dataset_pages

CLASSES = ["bad", "<good>"]
# Influence by log likelihood of six words; the first two are kept.
WORDS = ["great", "<b>bold</b>", "awful", "tree", "grass", "noise"]
INFLUENCES = [0.5, 0.25, -0.5, 0.0, 0.125, -0.25]
KEPT = 2
ROWS = 4


def write(store, name, step, schema, rows, *, options=None, **more):
    """As for any made table; other rows give another key."""
    options = {**(options or {}), "made_of": row_id(repr(rows))}
    return dataset_pages.write(store, name, step, schema, rows, options=options, **more)


def word_id(text):
    return row_id("prompt_word", text)


def task(store, **options):
    made = PromptTaskOptions(**{"manual": "It was", **options})
    rows = [
        {"id": 10 * p + n, "part": part, "shot": n // 2, "label": n % 2, "text": f"{part} {n}"}
        for p, part in enumerate(("train", "validation", "test"))
        for n in range(ROWS)
    ]
    notes = {"classes": CLASSES, "data": "data"}
    return write(store, "task", "prompt_task", TASK, rows, notes=notes, options=made.identity())


def vocabulary(store, task_key, words=WORDS):
    kept = [
        {
            "id": word_id(text),
            "token": f"▁{text}",
            "token_id": number,
            "text": text,
            "keep": True,
            "reason": "word",
        }
        for number, text in enumerate(words)
    ]
    gone = [
        {
            "id": row_id("prompt_word", text, number),
            "token": text,
            "token_id": 1000 + number,
            "text": text,
            "keep": False,
            "reason": reason,
        }
        for number, (text, reason) in enumerate(
            [("</s>", "special"), ("ing", "not_word_start"), ("ed", "not_word_start")]
        )
    ]
    return write(
        store, "vocabulary", "prompt_vocabulary", VOCABULARY, kept + gone, inputs=[task_key]
    )


def clusters(store, vocabulary_key, task_key, groups=(WORDS[:3], WORDS[3:4], WORDS[4:])):
    rows = [
        {
            "id": word_id(text),
            "text": text,
            "cluster": number,
            "centroid_distance": 0.1 * place,
            "keep": place == 0,
            "reason": "representative" if place == 0 else "in_cluster",
        }
        for number, group in enumerate(groups)
        for place, text in enumerate(group)
    ]
    keys = [vocabulary_key, task_key]
    return write(store, "clusters", "cluster_tokens", TOKEN_CLUSTERS, rows, inputs=keys)


def influence(store, parents, words=WORDS, values=INFLUENCES, early=()):
    """`early` names words that halving dropped after half of the rows."""
    rows = [
        {
            "id": word_id(text),
            "text": text,
            "rows_seen": ROWS // 2 if text in early else ROWS,
            "finalist": text not in early,
            **dict.fromkeys(REWARDS, float(value)),
            "gap": 100 * float(value),
            "accuracy": float(value) / 2,
            "tokens": 7 * ROWS,
            "log_probability": [-0.5, -1.0] * ROWS,
        }
        for text, value in [("", 0.0), *zip(words, values, strict=True)]
    ]
    return write(store, "influence", "prompt_influence", INFLUENCE, rows, inputs=parents)


def decision(store, influence_key, words=WORDS, values=INFLUENCES, kept=KEPT, early=(), **options):
    final = [text for text in words if text not in early]
    best = sorted(final, key=lambda text: (-values[words.index(text)], word_id(text)))[:kept]
    border = min((values[words.index(text)] for text in best), default=None)
    rows = [
        {
            "id": word_id(text),
            "keep": text in best,
            "score": 0.0 if text in early else value,
            "reason": "influential"
            if text in best
            else "eliminated_early"
            if text in early
            else "less_influential",
            "threshold": None if text in early else border,
            "rival": None,
            "text": text,
        }
        for text, value in zip(words, values, strict=True)
    ]
    made = {
        "method": "claps",
        "options": {"keep": 0.3},
        "reward": "log_likelihood",
        "count": None,
        "rule": "top",
    }
    return write(
        store,
        "prune",
        "prune_prompts",
        PROMPT_DECISION,
        rows,
        inputs=[influence_key],
        options=made | options,
    )


def search_rows(prompts, rewards, stop="finished"):
    best = np.maximum.accumulate(np.asarray(rewards, float)) if len(rewards) else []
    return [
        {
            "id": row_id("prompt", prompt, number),
            "round": number // 2,
            "prompt": prompt,
            "words": [word_id(word) for word in prompt.split()],
            "reward": reward,
            "accuracy": 0.5 + reward / 10,
            "best": best[number],
            "queries": ROWS * (number + 1),
            "tokens": 9 * ROWS * (number + 1),
            "stop": stop if number == len(prompts) - 1 else "",
        }
        for number, (prompt, reward) in enumerate(zip(prompts, rewards, strict=True))
    ]


PROMPTS = ["great", "<b>bold</b>", "great great", "great <b>bold</b>"]
FOUND = "great <b>bold</b>"


def search(store, parents, rows=None, name="search", **options):
    rows = search_rows(PROMPTS, [-0.5, -0.75, -0.25, -0.125]) if rows is None else rows
    made = {"method": "greedy", "length": 2, **options}
    return write(store, name, "search_prompts", SEARCH, rows, inputs=parents, options=made)


def verdict_row(contender, prompt, part, accuracy, lead, *, chosen=False, reason="", error=0.02):
    return {
        "id": row_id("verdict", contender, part),
        "contender": contender,
        "prompt": prompt,
        "part": part,
        "rows": ROWS,
        "accuracy": accuracy,
        "accuracy_error": error,
        "log_likelihood": -0.5,
        "lead_of_found": lead,
        "lead_error": 0.015,
        "tokens": 11 * ROWS,
        "chosen": chosen,
        "reason": reason,
    }


WINS = "beats the empty and the manual prompt by over 1 s.e."


def verdict_rows(chosen="found", reason=WINS):
    rows = []
    for part, shift in (("validation", 0.0), ("test", 0.01)):
        for name, prompt, accuracy in (
            ("found", FOUND, 0.875),
            ("empty", "", 0.75),
            ("manual", "It was", 0.8),
            ("control", "noise noise", 0.7),
        ):
            lead = 0.0 if name == "found" else 0.875 - accuracy
            rows.append(
                verdict_row(
                    name,
                    prompt,
                    part,
                    accuracy - shift,
                    lead,
                    chosen=name == chosen,
                    reason=reason if name == chosen else "",
                )
            )
    return rows


def verdict(store, parents, rows=None, judge="accuracy"):
    rows = verdict_rows() if rows is None else rows
    made = {"judge": judge}
    return write(store, "verdict", "test_prompts", VERDICT, rows, inputs=parents, options=made)


def everything(store, **task_options):
    """Keys by the role that they have in `report_prompts`."""
    made = {"task": task(store, **task_options)}
    made["vocabulary"] = vocabulary(store, made["task"])
    made["clusters"] = clusters(store, made["vocabulary"], made["task"])
    # Word 3 and 5 stand in clusters whose representative is another.
    made["influence"] = influence(store, [made["task"], made["clusters"]])
    made["decision"] = decision(store, made["influence"])
    made["search"] = search(store, [made["task"], made["decision"]])
    made["control"] = search(
        store,
        [made["task"], made["decision"]],
        search_rows(["noise", "noise noise"], [-1.0, -0.5], "queries"),
        "control",
        control=True,
    )
    made["verdict"] = verdict(store, [made["task"], made["search"], made["control"]])
    return made
