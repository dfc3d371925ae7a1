"""The report: one file, no outside host, no script, everything from data shown as text."""

import re
from html.parser import HTMLParser

import pytest

from prunery.pipelines import report, svg
from prunery.pipelines.run import run_recipe
from prunery.pipelines.run_totals import fate, totals

from ..small_run import EVIL


class Page(HTMLParser):
    """Elements and texts of a page, checking that every element is closed in order."""

    VOID = frozenset({"meta", "circle", "line", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.attributes, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))


@pytest.fixture(scope="module")
def text(finished):
    return finished.report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_page_is_small_and_needs_no_other_host(text, page):
    assert len(text.encode()) < report.MAX_BYTES
    policy = dict(page.attributes)["meta"]
    csp = next(a["content"] for t, a in page.attributes if a.get("http-equiv"))
    assert csp.startswith("default-src 'none'")
    assert policy is not None
    assert "script" not in page.tags
    assert "link" not in page.tags
    for tag, attributes in page.attributes:
        assert not {"src", "href", "srcset", "data", "action"} & attributes.keys(), tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert not re.search(r"url\(|@import", text)


def test_markup_of_a_passage_is_shown_as_text(text, page):
    assert EVIL not in text
    assert "<script>alert" not in text
    shown = "".join(data for tag, data in page.texts if tag in ("span", "del", "mark"))
    assert "<script>alert('kiwi')</script> The kiwi is" in shown
    assert "<b>It is green.</b>" in shown
    assert "img" not in page.tags
    assert any("Kiwi <img src=x>" in data for _, data in page.texts)


def test_page_shows_totals_questions_curves_lineage_and_struck_sentences(finished, page):
    total = finished.totals()
    words = " ".join(" ".join(data for _, data in page.texts).split())
    assert f"{total['tokens_in']:,} → {total['tokens_out']:,}" in words
    assert f"{total['answer_kept']} of {total['answer_retrieved']}" in words
    for row in finished.store.table("evaluation").to_table().to_pylist():
        assert row["question"] in words
        assert fate(row) in words
    assert page.tags.count("svg") == 3
    assert page.tags.count("polyline") == 4 + 2
    for name, manifest in finished.manifests.items():
        if name not in ("report",):
            assert manifest.key[:12] in words, name
    struck = [data for tag, data in page.texts if tag == "del"]
    kept = [
        a for t, a in page.attributes if t == "span" and "above_threshold" in a.get("title", "")
    ]
    assert struck
    assert kept
    dropped = [a for t, a in page.attributes if t == "del"]
    assert all("below_threshold: score" in a["title"] for a in dropped)


def test_answers_are_marked_where_they_stand(page):
    marked = {data for tag, data in page.texts if tag == "mark"}
    assert marked <= {"fruit", "near the sea", "berry"}
    assert marked


def test_a_report_that_would_be_too_large_shows_less(finished, monkeypatch, text):
    from prunery.pipelines.steps import report as step

    captured = []
    real = report.render
    monkeypatch.setattr(step.report, "render", lambda data: captured.append(data) or real(data))

    class Writer:
        def attach(self, name, content):
            self.content = content

    from prunery.pipelines.engine import Job

    manifest = finished.manifests["report"]
    inputs = dict(zip(manifest.options["inputs"], manifest.parents, strict=True))
    options = step.ReportOptions()
    plan = step.plan(options, {}, None)
    job = Job(finished.store, "report", "report", manifest.key, options, inputs, plan, 1, False, 1)
    step.finish(job, Writer())
    (data,) = captured
    monkeypatch.setattr(report, "MAX_BYTES", len(text.encode()) // 2 + 9000)
    smaller = real(data)
    assert len(smaller.encode()) < report.MAX_BYTES
    assert smaller.count("<details") < text.count("<details")
    Page(smaller)


def test_totals_by_hand():
    rows = [
        {"answer_retrieved": True, "answer_kept": True, "answer_kept_random": False},
        {"answer_retrieved": True, "answer_kept": False, "answer_kept_random": True},
        {"answer_retrieved": False, "answer_kept": False, "answer_kept_random": False},
        {"answer_retrieved": None, "answer_kept": None, "answer_kept_random": None},
    ]
    for i, row in enumerate(rows):
        row.update(tokens_in=10 * (i + 1), tokens_out=i, chars_in=100, chars_out=25)
    assert totals(rows) == {
        "questions": 4,
        "with_answers": 3,
        "answer_retrieved": 2,
        "answer_kept": 1,
        "tokens_in": 100,
        "tokens_out": 6,
        "chars_in": 400,
        "chars_out": 100,
        "removed": 0.75,
        "baselines": {"random": 1},
    }
    assert [fate(row) for row in rows] == ["kept", "lost", "not retrieved", "none given"]


def test_result_in_words_and_as_json(finished):
    lines = finished.lines()
    assert any(line.startswith("distinct: 11 rows (10 kept; 1 near_dup") for line in lines) or any(
        line.startswith("distinct: ") and "1 near_duplicate" in line for line in lines
    )
    assert lines[-1] == f"report: {finished.report}"
    made = finished.as_json()
    assert made["totals"]["questions"] == 5
    assert made["steps"]["prune"]["key"] == finished.manifests["prune"].key
    import json

    json.dumps(made)


def test_line_chart_places_points_and_escapes_names():
    chart = str(
        svg.line_chart(
            [svg.Series("<b>", [(0.0, 0.0), (1.0, 1.0), (0.5, float("nan"))], 0, (0.5, 0.5))],
            x_label="x",
            y_label="y",
            label='says "so"',
        )
    )
    assert 'points="70.0,254.0 456.0,14.0"' in chart
    assert 'cx="263.0" cy="134.0"' in chart
    assert "<b>" not in chart
    assert "&lt;b&gt;" in chart
    assert 'aria-label="says &#34;so&#34;"' in chart


def test_histogram_draws_only_bins_that_hold_something():
    chart = str(
        svg.histogram(
            [0, 0.5, 1], [9, 0], [0, 99], x_label="s", y_label="r", label="l", threshold=0.5
        )
    )
    assert chart.count("<rect") == 2
    assert "9 kept, score 0 to 0.5" in chart
    assert "99 dropped, score 0.5 to 1" in chart
    assert chart.count('class="rule"') == 1


def test_a_run_without_answers_still_reports(small, finished, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "What is a tomato?"}\n')
    result = run_recipe(small(f"questions.path={path}"), finished.store, threads=1)
    text = result.report.read_text(encoding="utf-8")
    assert "none given" in text
    assert "NaN" not in text
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", text)
    for name, manifest in finished.manifests.items():
        finished.store.point(name, manifest.key)
