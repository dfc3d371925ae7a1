"""The page of a prompt search: figures by hand from made tables, and that any of them renders."""

import re
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunery.pipelines.engine import StepContext
from prunery.pipelines.prompts import report as page
from prunery.pipelines.prompts import report_words
from prunery.pipelines.prompts.tables import SEARCH, TOKEN_CLUSTERS
from prunery.pipelines.report import MAX_BYTES
from prunery.pipelines.steps.report_prompts import SPEC, ReportPromptsOptions
from prunery.storage import Store

from . import pages as made

Cost, Prices = page.Cost, page.Prices


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def report(store, inputs, **options):
    context = StepContext(store=store, name="report")
    manifest = SPEC(ReportPromptsOptions(**options), inputs, context)
    return store.table(manifest.key).attachment("report.html").read_text()


def plain(shown):
    """The words of a page."""
    return " ".join(re.sub(r"<[^>]*>", " ", shown).split())


def words(keep=(True, True, False, False), values=(0.5, 0.25, 0.0, -0.5), final=None):
    n = len(keep)
    return report_words.Words(
        ids=np.arange(n),
        text=[f"w{i}" for i in range(n)],
        reason=["influential" if k else "less_influential" for k in keep],
        influence={"log_likelihood": np.array(values, float)},
        accuracy=np.linspace(0.25, -0.25, n),
        rows_seen=np.full(n, 4),
        finalist=np.ones(n, bool) if final is None else np.array(final),
        keep=np.array(keep, bool),
        reward="log_likelihood",
    )


def test_the_whole_page(store):
    shown = report(
        store,
        made.everything(store),
        title="A <i>title</i>",
        input_price=1000.0,
        output_price=2000.0,
    )
    said = plain(shown)
    assert "<i>" not in shown
    assert "<b>bold" not in shown
    assert "great &lt;b&gt;bold&lt;/b&gt;" in shown
    assert "9 → 6 → 3 → 2" in said
    assert "vocabulary → filtered → representatives → kept" in said
    # 7 prompts x 4 rows of the influence, 4 x 4 and 2 x 4 of the searches, 4 x 4 x 2 of the verdict
    assert "Queries 84 influence 28, search 16, control 8, verdict 32" in said
    # 7 x 28 + 4 x 36 + 2 x 36 + 8 x 44 tokens, at a thousandth each
    assert "Tokens 764 influence 196, search 144, control 72, verdict 352" in said
    assert "Money 0.764 influence 0.196, search 0.144, control 0.072, verdict 0.352" in said
    assert "86.5% ± 2.0 s.e., empty 74.0% ± 2.0, manual 79.0% ± 2.0" in said
    assert (
        "The found prompt is taken: beats the empty and the manual prompt by over 1 s.e. Lead of"
        " the found prompt on the validation rows: +7.5 ± 1.5 points over the manual one, +12.5 ±"
        " 1.5 points over the empty one."
    ) in said
    assert "claps with keep=0.3, reward=log_likelihood, rule=top" in said
    for title in (
        "What came of it",
        "Influence of words",
        "Best reward against queries",
        "The best prompts asked about",
        "What it cost",
        "Highest influence",
        "Lowest influence",
        "Clusters",
        "Why words stayed or went",
        "Where it came from",
    ):
        assert title in said
    assert '<line class="zero"' in shown
    assert "threshold 0.25" in said
    assert "search: 4 prompts, best after 4, ended by having nothing more to ask." in said
    assert "control: 2 prompts, best after 2, ended by max_queries." in said
    assert "6 words in 3 clusters" in said


def test_the_page_loads_nothing(store):
    shown = report(store, made.everything(store))
    assert re.search(r'Content-Security-Policy" content="default-src \'none\';', shown)
    assert not re.search(r"(src|href)=", shown)
    assert "<script" not in shown
    assert "Money" not in shown, "no price was given"


def test_of_an_endpoint_every_answer_is_one_written_token(store):
    inputs = made.everything(
        store, black_box="endpoint", base_url="http://127.0.0.1:1/v1", model="m"
    )
    said = plain(report(store, inputs, input_price=0.0, output_price=1_000_000.0))
    assert "Money 84.00 influence 28.00" in said
    assert "one written token an answer" in said


def test_without_clusters_and_control(store):
    inputs = made.everything(store)
    del inputs["clusters"], inputs["control"]
    rows = [row for row in made.verdict_rows() if row["contender"] != "control"]
    inputs["verdict"] = made.verdict(store, [inputs["task"]], rows)
    shown = report(store, inputs)
    said = plain(shown)
    assert "9 → 6 → 2" in said
    assert "Clusters" not in said
    assert "control" not in said


def test_an_empty_search_is_said_to_be_one(store):
    inputs = made.everything(store)
    inputs["search"] = made.search(store, [inputs["task"]], [], "empty_search")
    inputs["control"] = made.search(store, [inputs["task"]], [], "empty_control", control=True)
    said = plain(report(store, inputs))
    assert "The search asked about no prompt." in said
    assert "Best reward against queries" not in said
    assert "empty_search 0" in said, "it cost nothing"


def test_all_words_of_one_influence(store):
    values = [0.25] * 6
    inputs = made.everything(store)
    inputs["influence"] = made.influence(store, [inputs["task"]], values=values)
    inputs["decision"] = made.decision(store, inputs["influence"], values=values)
    shown = report(store, inputs)
    assert "All words have the same influence: the smaller ids were kept." in shown
    assert "nan" not in plain(shown).lower()


def test_words_dropped_by_halving_are_not_drawn(store):
    early = ["tree", "noise"]
    inputs = made.everything(store)
    inputs["influence"] = made.influence(store, [inputs["task"]], early=early)
    inputs["decision"] = made.decision(store, inputs["influence"], early=early)
    said = plain(report(store, inputs))
    assert "2 words that were dropped on fewer rows are not drawn." in said
    assert "eliminated early 0 2" in said
    assert "influence 24, search 16" in said, "2 words were asked on 2 rows"


def test_the_page_stays_small(store):
    texts = [f"word{number:05d}" + "x" * 40 for number in range(4000)]
    values = np.round(np.random.default_rng(0).normal(size=len(texts)), 3).tolist()
    inputs = made.everything(store)
    inputs["vocabulary"] = made.vocabulary(store, inputs["task"], texts)
    inputs["influence"] = made.influence(store, [inputs["task"]], texts, values)
    inputs["decision"] = made.decision(store, inputs["influence"], texts, values, 400)
    prompts = [f"{texts[number]} " * 50 + str(number) for number in range(500)]
    inputs["search"] = made.search(
        store, [inputs["task"]], made.search_rows(prompts, np.linspace(-2, -1, 500)), "long"
    )
    shown = report(store, inputs, words=1000)
    assert len(shown.encode()) < MAX_BYTES


def test_ranked_words_are_finalists_first_then_by_influence_then_by_id():
    found = words(
        keep=[False] * 5,
        values=[0.1, 0.3, 0.3, 9.0, -1.0],
        final=[True, True, True, False, True],
    )
    assert found.ranked().tolist() == [1, 2, 0, 4, 3]


@given(st.integers(0, 12), st.integers(0, 8))
def test_no_word_is_listed_twice_and_the_lowest_come_first_in_their_list(n, count):
    found = words(keep=[False] * n, values=np.linspace(1, -1, n))
    rows = report_words.word_rows(found, count)
    high = [row["text"] for row in rows if row["side"] == "highest"]
    low = [row["text"] for row in rows if row["side"] == "lowest"]
    names = [f"w{i}" for i in range(n)]
    assert high == names[:count]
    assert low == names[::-1][: min(count, max(0, n - count))]


def test_a_border_is_drawn_only_where_the_choice_has_one():
    cut = str(report_words.influence_chart(words()).svg)
    assert cut.count('class="rule"') == cut.count('class="zero"') == 1
    mixed = str(report_words.influence_chart(words(keep=[False, True, True, False])).svg)
    assert mixed.count('class="rule"') == 0
    above = str(report_words.influence_chart(words(values=[0.5, 0.4, 0.2, 0.1])).svg)
    assert above.count('class="zero"') == 0, "0 is off the chart"
    assert report_words.influence_chart(words(keep=[], values=[])) is None


def test_the_histogram_counts_every_finalist_once():
    values = np.random.default_rng(1).normal(size=300)
    keep = values > 1.0
    shown = str(report_words.influence_chart(words(keep=keep, values=values)).svg)
    counted = {"kept": 0, "dropped": 0}
    for count, kind in re.findall(r"<title>(\d+) (kept|dropped),", shown):
        counted[kind] += int(count)
    assert counted == {"kept": int(keep.sum()), "dropped": int((~keep).sum())}


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_a_climb_is_the_best_so_far_as_steps(rewards):
    best = np.maximum.accumulate(rewards)
    x = np.arange(1.0, len(rewards) + 1)
    points = page.climb(x, best)
    assert points[0] == (1.0, best[0])
    assert points[-1] == (x[-1], best[-1])
    for (x0, y0), (x1, y1) in pairwise(points):
        assert (x1 == x0) != (y1 == y0), "each piece is level or upright"
        assert x1 >= x0 and y1 >= y0
    for place, value in zip(x, best, strict=True):
        assert max(y for px, y in points if px <= place) == value


def test_a_long_climb_is_thinned_and_still_ends_at_the_best():
    best = np.linspace(0, 1, 5000)
    points = page.climb(np.arange(5000.0), best)
    assert len(points) < 1000
    assert points[-1] == (4999.0, 1.0)


def test_the_best_prompts_are_distinct_and_the_earlier_first():
    rows = made.search_rows(["a", "b", "c", "b", "d"], [0.5, 0.75, 0.75, 0.75, 0.25])
    shown = page.prompt_rows(pa.Table.from_pylist(rows, SEARCH), "c")
    assert [row["prompt"] for row in shown] == ["b", "c", "a", "d"]
    assert [row["number"] for row in shown] == ["2", "3", "1", "5"]
    assert [row["taken"] for row in shown] == [False, True, False, False]


def test_the_largest_clusters_and_what_became_of_their_word():
    groups = [["w0"], ["w9", "w1", "w2"], ["w3"]]
    rows = [
        {
            "id": int(text[1:]),
            "text": text,
            "cluster": number,
            "centroid_distance": 0.5 if text == "w2" else 0.1,
            "keep": text == group[0],
            "reason": "",
        }
        for number, group in enumerate(groups)
        for text in group
    ]
    shown = report_words.cluster_rows(pa.Table.from_pylist(rows, TOKEN_CLUSTERS), words())
    assert [row["word"] for row in shown] == ["w9", "w0", "w3"]
    assert shown[0]["members"] == "w1, w2"
    assert [row["fate"] for row in shown] == ["not measured", "kept", "dropped"]
    assert shown[1]["influence"] == "+0.5"


def test_the_verdict_of_a_prompt_that_lost():
    rows = made.verdict_rows("manual", "found does not beat the manual prompt by over 1 s.e.")
    said = page.sentence(rows, "log_likelihood")
    assert said.startswith("The manual prompt is taken: found does not beat the manual prompt")
    assert "+0.075 ± 0.015 nats over the manual one" in said
    lines = page.verdict_rows(rows, "accuracy")
    assert [line["name"] for line in lines] == ["found", "control", "manual", "empty"]
    assert [line["chosen"] for line in lines] == [False, False, True, False]
    assert lines[0]["parts"]["test"] == {"accuracy": "86.5% ± 2.0", "rows": "4", "lead": ""}
    assert page.sentence([], "accuracy").startswith("No prompt was taken")
    assert page.rows_of_parts([]) == {"validation": "0", "test": "0"}


def test_the_finalists_are_paid_for():
    table = pa.Table.from_pylist(made.verdict_rows())
    cost = page.cost_of("verdict", "verdict", table, 1.0, remote=False)
    assert cost == Cost("verdict", "verdict", 32, 8 * 44, 0, 1.0)
    cost = page.cost_of("verdict", "verdict", table, 1.0, remote=True, finalists=3)
    assert cost == Cost("verdict", "verdict", 44, 11 * 44 - 44, 44, 1.0)


def test_costs_are_summed():
    costs = [Cost("a", "influence", 10, 100, 10, 1.0), Cost("b", "search", 5, 50, 5, 2.0)]
    shown = page.cost_rows(costs, Prices(1e6, 1e7))
    assert [row["money"] for row in shown] == ["200.00", "100.00", "300.00"]
    assert shown[-1]["queries"] == "15"
    assert shown[-1]["tokens"] == "165"
    assert not Prices().known
    assert Prices(None, 2.0).of(1_000_000, 1_000_000) == 2.0
