import re

import numpy as np
import pytest

from prunery.pipelines import sft_report, svg
from prunery.pipelines.engine import StepContext
from prunery.pipelines.sft_tables import CHATS, TOKENS
from prunery.pipelines.steps.prune_sft import SPEC as PRUNE
from prunery.pipelines.steps.prune_sft import PruneSftOptions
from prunery.pipelines.steps.report_sft import SPEC as REPORT
from prunery.pipelines.steps.report_sft import ReportSftOptions
from prunery.storage import Store

from .sft_rows import DOMAINS, IDS, chat_rows, tables, token_rows, write


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<p>", "ask", "one", "two", "<script>", "end", "<eos>"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<p>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def decision(store, **options):
    keys = tables(store)
    context = StepContext(store=store, name="prune")
    inputs = {k: keys[k] for k in ("tokens", "signals")}
    made = PRUNE(PruneSftOptions.model_validate(options), inputs, context)
    return keys, store.table(made.key)


def page(store, tokenizer, **options):
    keys, decided = decision(store, **options)
    context = StepContext(store=store, name="report")
    inputs = {k: keys[k] for k in ("tokens", "signals", "chats")} | {"decision": decided.key}
    made = REPORT(ReportSftOptions(tokenizer=tokenizer, title="A <b>title</b>"), inputs, context)
    return store.table(made.key).attachment("report.html").read_text()


def test_the_page_shows_what_went_and_escapes_it(store, tokenizer):
    shown = page(store, tokenizer, samples=0.5, tokens=0.5)
    assert "<script>" not in shown
    assert "<b>title</b>" not in shown
    assert "&lt;script&gt;" in shown
    assert "4 → 2" in shown
    assert "10 → 4" in shown
    struck = re.findall(r"<del [^>]*title=\"([^\"]*)\"", shown)
    assert len(struck) == 6, "every token of the dropped samples, and two of the pruned one"
    assert sum("high_local_perplexity" in tip for tip in struck) == 2
    assert "loss 6.00 nats, high_local_perplexity" in shown
    assert "rows.jsonl#1" in shown
    for name in ("calibration", "misconception", "noise", "redundant"):
        assert f"{name} (" in shown


def test_the_page_of_a_sample_method(store, tokenizer):
    shown = page(store, tokenizer, method="longest", keep=0.5)
    assert "Scores of samples" in shown
    assert "kept (2)" in shown
    assert "Topped up" not in shown


def test_a_page_without_signals_or_samples(store, tokenizer):
    none = write(store, "none", "tokenize_chats", TOKENS, [[]])
    chats = write(store, "no_chats", "read_chats", CHATS, [[]])
    context = StepContext(store=store, name="prune")
    made = PRUNE(PruneSftOptions.model_validate({"method": "random"}), {"tokens": none}, context)
    inputs = {"decision": made.key, "tokens": none, "chats": chats}
    key = REPORT(ReportSftOptions(tokenizer=tokenizer), inputs, context).key
    assert "0 → 0" in store.table(key).attachment("report.html").read_text()


def test_domains_are_counted(store):
    _, decided = decision(store, method="longest", keep=0.5)
    rows = {row["name"]: row for row in sft_report.domain_rows(decided.to_table(), DOMAINS)}
    assert rows["a"]["samples"] == "3"
    assert rows["a"]["kept"] == "2"
    assert rows["a"]["kept_tokens"] == "7"
    assert rows["a"]["loss"] == f"{np.mean([0.15, 4.25, 2.5]):.2f}"
    assert rows["a"]["kept_loss"] == f"{np.mean([4.25, 2.5]):.2f}"
    assert rows["b"]["kept"] == "0"
    assert rows["b"]["kept_loss"] == ""


def test_every_reason_is_shown(store):
    _, decided = decision(store, samples=0.5)
    table = decided.to_table()
    reasons = table.column("reason").to_pylist()
    for count in (len(set(reasons)), len(reasons)):
        shown = {reasons[i] for i in sft_report.chosen(table, count)}
        assert shown == set(reasons)
    assert len(sft_report.chosen(table, 0)) == 0


def test_correlation():
    a = np.array([1.0, 2.0, 3.0])
    assert sft_report.correlation(a, -a) == pytest.approx(-1)
    assert sft_report.correlation(a, np.ones(3)) == 0.0
    assert sft_report.correlation(a[:1], a[:1]) == 0.0


def test_pieces_of_a_cut_character_stand_with_its_last_token():
    data = "aé漢b".encode()
    pieces = sft_report.token_pieces(lambda ids: bytes(ids).decode("utf-8", "replace"), list(data))
    assert len(pieces) == len(data)
    assert pieces == ["a", "", "é", "", "", "漢", "b"]
    assert sft_report.token_pieces(lambda ids: "", []) == []


def test_pieces_keep_a_space_that_stands_only_after_a_token():
    def decode(ids):
        return " ".join("xyz"[i] for i in ids)

    assert sft_report.token_pieces(decode, [0, 1, 2]) == ["x", " y", " z"]


def test_scatter_draws_far_points_at_the_edge():
    cloud = svg.Series("c", [(0.5, 0.5), (9.0, -9.0)], 0)
    shown = str(
        svg.scatter(
            [cloud],
            x_label="x",
            y_label="y",
            label="l",
            x_range=(0, 1),
            y_range=(0, 1),
            cross=(0.5, 0.5),
        )
    )
    places = re.findall(r"M(\d+),(\d+)h0", shown)
    assert len(places) == 2
    assert places[0] != places[1]
    assert all(0 <= int(x) <= 480 and 0 <= int(y) <= 300 for x, y in places)
    assert shown.count('class="rule"') == 2


def test_the_rows_of_the_tests_are_aligned():
    assert [row["id"] for row in token_rows()] == [row["id"] for row in chat_rows([{}] * 4)] == IDS
