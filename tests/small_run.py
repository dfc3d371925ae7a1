"""A small recipe over files of every kind, with tiny models: all steps in a few seconds."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prunery.pipelines.recipe import Recipe, apply_overrides, parse_recipe

EVIL = "<script>alert('kiwi')</script> The kiwi is a berry. <b>It is green.</b>"

RECIPE = """
name: small
about: A test.
seed: 1
steps:
  chunks: {{step: chunk, path: docs, tokenizer: "{encoder}", max_tokens: 40, shard_bytes: 300}}
  vectors: {{step: embed, inputs: {{chunks: chunks}}, encoder: "{encoder}"}}
  distinct:
    step: prune_passages
    inputs: {{vectors: vectors}}
    method: near_duplicate
    distance: 0.00001
  index: {{step: index, inputs: {{vectors: vectors, decision: distinct}}}}
  questions: {{step: questions, path: questions.jsonl}}
  retrieved:
    step: retrieve
    inputs: {{questions: questions, index: index}}
    encoder: "{encoder}"
    top_k: 5
  signals:
    step: context_signals
    inputs: {{retrieved: retrieved, questions: questions, chunks: chunks}}
    encoder: "{encoder}"
    model: "{model}"
    questions_a_shard: 2
    signals: [provence, vote, cosine, terms, cross_encoder]
  prune: {{step: prune_context, inputs: {{signals: signals}}, method: provence}}
  contexts:
    step: pack
    inputs: {{signals: signals, decision: prune, questions: questions, chunks: chunks}}
  evaluation:
    step: evaluate
    inputs: {{signals: signals, decision: prune, questions: questions, chunks: chunks}}
  curve:
    step: sweep
    inputs: {{signals: signals, decision: prune, questions: questions, chunks: chunks}}
  report:
    step: report
    inputs:
      evaluation: evaluation
      curve: curve
      signals: signals
      decision: prune
      questions: questions
      chunks: chunks
      contexts: contexts
"""

QUESTIONS = [
    {"id": "a", "question": "What is a tomato?", "answers": ["fruit"]},
    {"id": "b", "question": "Where do olives grow?", "answers": ["near the sea"]},
    {"id": "c", "question": "What is a kiwi?", "answers": ["a berry"]},
    {"id": "d", "question": "Who ate the plum?", "answers": ["nobody knows this"]},
    {"id": "e", "question": "Anything about figs?"},
]


def write_corpus(folder: Path) -> Path:
    """Documents of five kinds, one text twice, and questions."""
    docs = folder / "docs"
    docs.mkdir()
    (docs / "tomato.md").write_text(
        "# Tomato\n\nThe tomato is a fruit. Many call it a vegetable. It is red.\n\n"
        "## Use\n\nPeople eat it raw. They cook it as well. It goes into sauce.\n"
    )
    (docs / "olive.txt").write_text(
        "Olives\n******\n\nOlives grow near the sea. They need sun. Oil is pressed from them.\n"
    )
    (docs / "olive_again.txt").write_text((docs / "olive.txt").read_text())
    (docs / "plum.html").write_text(
        "<title>Plum</title><h1>Plum</h1><p>Plums are stone fruit.</p><p>Dried ones are"
        " prunes &amp; keep long.</p><script>no()</script>"
    )
    rows = [{"text": EVIL, "title": "Kiwi <img src=x>"}, {"text": "Figs hide their flowers."}]
    (docs / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(
        pa.table({"text": ["Grapes become wine. Or raisins.", "Melons are heavy."]}),
        docs / "last.parquet",
    )
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return folder


def small_recipe(folder: Path, encoder: Path, model: Path, *overrides: str) -> Recipe:
    """The recipe on a corpus written by `write_corpus`."""
    text = RECIPE.format(encoder=encoder, model=model)
    return apply_overrides(parse_recipe(text, folder=folder), overrides)
