"""What became of a word, from made tables: one that was kept, and one for every way out."""

import pytest

from prunery.pipelines.explain import explain
from prunery.storage import Store, row_id

from . import pages as made


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    keys = made.everything(store)
    store.point("report", keys["verdict"])
    return store


def lines(store, table, id_):
    return explain(store, table, id_).lines()


@pytest.mark.parametrize("table", ["vocabulary", "clusters", "influence", "prune"])
def test_a_kept_word_from_whichever_table(store, table):
    said = lines(store, table, made.word_id("great"))
    assert said[1:3] == ["  a word of the vocabulary, token '▁great' (0)", "  'great'"]
    assert said[3:] == [
        "  vocabulary: kept, word",
        "  clusters: kept, representative 0, 0 from its centroid",
        "  influence: log likelihood +0.5, accuracy +25.0 points against the empty prompt, on 4"
        " rows",
        "  search: in 3 of 4 prompts asked about, the best of them too: 'great <b>bold</b>'",
        "  kept by prune (claps): influential, score 0.5, threshold 0.25",
    ]


def test_a_word_that_another_stands_for(store):
    found = explain(store, "clusters", made.word_id("awful"))
    assert "clusters: dropped, in_cluster 0, 0.2 from its centroid; 'great' stands for it" in (
        found.seen
    )


def test_a_word_of_too_little_influence(store):
    found = explain(store, "prune", made.word_id("tree"))
    (verdict,) = found.verdicts
    assert not verdict.kept
    assert (verdict.reason, verdict.score, verdict.threshold) == ("less_influential", 0.0, 0.25)
    assert verdict.text == "tree"
    assert verdict.method == "claps"


def test_an_entry_that_the_filter_dropped(store):
    said = lines(store, "vocabulary", row_id("prompt_word", "ing", 1))
    assert said[-1] == "  vocabulary: dropped, not_word_start"


def test_a_word_that_halving_dropped(tmp_path):
    store = Store(tmp_path / "halved")
    task = made.task(store)
    influence = made.influence(store, [task], early=["tree"])
    made.decision(store, influence, early=["tree"])
    said = "\n".join(lines(store, "influence", made.word_id("tree")))
    assert "on 2 rows, dropped by halving before it was asked on all rows" in said
    assert "dropped by prune (claps): eliminated_early, score 0" in said
    assert "threshold" not in said


def test_the_empty_prompt(store):
    said = lines(store, "influence", made.word_id(""))
    assert said[1] == "  the empty prompt, which words are held against"
    assert not any("influence:" in line for line in said)
