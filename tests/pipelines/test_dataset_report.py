import base64
import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prunery.pipelines import dataset_report as page
from prunery.pipelines.dataset_report import Decided, Spread
from prunery.pipelines.engine import StepContext
from prunery.pipelines.report import MAX_BYTES
from prunery.pipelines.steps.report_dataset import SPEC, ReportDatasetOptions
from prunery.pipelines.student_figures import Grid, comparisons
from prunery.storage import Store

from . import dataset_pages as made
from .dataset_pages import CLASSES, IDS, KEEP, LABEL, SCORE

NOISE = [
    {"score": "el2n", "higher_is": "harder", "auc": 0.5, "found": 0, "planted": 1, "looked": 1},
    {"score": "aum", "higher_is": "harder", "auc": 0.875, "found": 1, "planted": 1, "looked": 1},
    {"score": "none", "higher_is": "harder", "auc": np.nan, "found": 0, "planted": 0, "looked": 0},
]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def report(store, inputs, **options):
    context = StepContext(store=store, name="report")
    manifest = SPEC(ReportDatasetOptions(**options), inputs, context)
    return store.table(manifest.key).attachment("report.html").read_text()


def everything(store, **options):
    data = made.data(store, **options)
    decision = made.decision(store, data)
    return {
        "data": data,
        "decision": decision,
        "dynamics": made.dynamics(store, data, np.full((1, 2, 8), 0.5)),
        "students": made.students(store, decision),
        "alphas": made.alphas(store, decision),
        "noise": made.noise(store, data, NOISE),
        "outputs": made.teacher(store, data),
    }


def rows(**changes):
    fields = {
        "ids": np.array(IDS[:8]),
        "keep": np.array(KEEP),
        "score": np.array(SCORE, np.float32),
        "reason": np.array(made.REASON),
        "label": np.array(LABEL[:8]),
        "clean_label": np.array(made.CLEAN[:8]),
        "group": np.array([""] * 8),
        "classes": CLASSES,
    }
    return Decided(**(fields | changes))


def test_the_whole_page(store):
    shown = report(store, everything(store), title="A <b>title</b>")
    assert "<b>title</b>" not in shown
    assert "A &lt;b&gt;title&lt;/b&gt;" in shown
    assert "<dog>" not in shown
    assert "&lt;dog&gt;" in shown
    assert (
        "<code>best</code> with <code>keep=0.5, difficulty=aum, balance=class, floor=0.5</code>"
        in shown
    )
    assert "8 → 4" in shown
    assert "2 of 3" in shown
    assert "1 → 0" in shown, "wrong labels"
    assert "91.0%" in shown, "full data"
    assert "teacher: eel (0.80)" in shown
    for title in (
        "Accuracy against the kept share",
        "Held-out accuracy against alpha, chosen rows",
        "Data map",
        "Which of them differ",
        "Balance of the classes",
        "Wrong labels found",
        "Why rows stayed or went",
        "The most valued",
        "Where it came from",
    ):
        assert title in shown
    assert "Balance of the groups" not in shown
    assert "higher at 25%; no difference that the seeds can tell at 50%" in shown
    assert "There are 2 test rows" in shown


def test_pictures_are_the_only_thing_that_the_page_may_load(store):
    shown = report(store, everything(store))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', shown).group(1)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline';")
    sources = re.findall(r'<img src="([^"]*)"', shown)
    assert len(sources) == 8
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in shown
    assert not re.search(r"(src|href)=\"(?!data:)", shown)


@pytest.mark.parametrize("kind", ["text", "features"])
def test_a_page_without_pictures(store, kind):
    data = made.data(store, kind=kind, groups=True, clean=[-1] * 10)
    shown = report(store, {"data": data, "decision": made.decision(store, data)}, examples=1)
    assert "img-src" not in shown
    assert "<img" not in shown
    assert "<script>" not in shown
    expected = (
        "&lt;script&gt;0&lt;/script&gt;" if kind == "text" else "0, 1, 2, 3, 4, 5, 6, 7 and 2"
    )
    assert expected in shown
    assert "Balance of the groups" in shown
    assert "Wrong labels" not in shown
    assert "Accuracy" not in shown
    assert "Data map" not in shown


def test_a_page_about_nothing(store):
    data = made.data(store)
    shown = report(store, {"data": data, "decision": made.decision(store, data, [])})
    assert "0 → 0" in shown


def test_a_page_of_large_pictures_stays_small(store):
    rng = np.random.default_rng(0)

    def noise():
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(out, "PNG")
        return out.getvalue()

    n = 220
    row = made.data_rows()[0]
    rows_ = [row | {"id": i, "image": noise(), "source": f"s{i}"} for i in range(n)]
    notes = {"kind": "image", "classes": CLASSES, "shape": [3, 64, 96]}
    data = made.write(store, "data", "read_dataset", made.DATASET, rows_, notes=notes)
    decided = made.decision_rows()[0]
    decision = made.decision(store, data, [decided | {"id": i, "score": -i} for i in range(n)])
    shown = report(store, {"data": data, "decision": decision}, examples=100)
    assert len(shown.encode()) < MAX_BYTES
    sides = [part.count("<img") for part in shown.split("The least valued")]
    assert sides[0] == sides[1] > 10, "both sides are cut alike"
    uri = re.search(r'<img src="data:image/png;base64,([^"]*)"', shown).group(1)
    with Image.open(io.BytesIO(base64.b64decode(uri))) as small:
        assert small.size == (64, 43)
    assert '<code title="row 0">s0</code>' in shown
    assert f'<code title="row {n - 1}">' in shown.split("The least valued")[1]


def test_thumbnails():
    def size_and_pixel(image):
        with Image.open(io.BytesIO(base64.b64decode(page.thumbnail(image).split(",")[1]))) as shown:
            return shown.size, shown.mode, shown.getpixel((0, 0))

    assert size_and_pixel(made.png(77)) == ((8, 8), "L", 77)
    assert size_and_pixel(made.png((9, 8, 7), (128, 64), "RGB")) == ((64, 32), "RGB", (9, 8, 7))
    assert size_and_pixel(made.png((9, 8, 7, 255), (4, 4), "RGBA"))[1:] == ("RGB", (9, 8, 7))
    assert page.thumbnail(b"no picture") == ""


def test_a_picture_that_cannot_be_read_is_said(store):
    decided = rows()
    row = {"source": "s", "image": b"no picture", "text": "", "features": []}
    shown = page.example(decided, 1, "least", row, None)
    assert shown["text"] == "the picture cannot be read"
    assert (shown["label"], shown["clean"], shown["predicted"]) == ("<dog>", "cat", "")
    assert shown["fate"] == "dropped"
    long = page.example(decided, 0, "most", row | {"image": b"", "text": "a" * 500}, None)
    assert len(long["text"]) == 400
    assert long["clean"] == ""


def test_most_and_least_valued():
    assert page.valued(rows(), 2) == [("most", 0), ("least", 1), ("most", 3), ("least", 4)]
    assert len(page.valued(rows(), 50)) == 8, "no row stands on both sides"
    ties = rows(score=np.zeros(8, np.float32), ids=np.arange(8)[::-1].copy())
    assert page.valued(ties, 1) == [("most", 7), ("least", 0)]


def test_balance_is_counted_in_rows_and_in_shares():
    cat, dog, eel = page.class_rows(rows())
    assert (cat["rows"], cat["kept"], cat["of_it"]) == ("3", "3", "100%")
    assert (dog["rows"], dog["kept"], dog["before"], dog["after"]) == ("4", "1", "50.0%", "25.0%")
    assert (dog["wrong"], dog["wrong_kept"]) == ("1", "0")
    assert (eel["kept"], eel["cls"]) == ("0", "lost")
    assert cat["cls"] == dog["cls"] == ""
    a, b = page.group_rows(rows(group=np.array(["b", "", "b", "b", "b", "", "", "b"])))
    assert (a["name"], a["rows"], a["kept"]) == ("b", "5", "3")
    assert (b["name"], b["rows"], b["kept"]) == ("not named", "3", "1")
    assert page.group_rows(rows()) == []


def test_classes_beyond_the_names_keep_their_code():
    assert [row["name"] for row in page.class_rows(rows(classes=["cat"]))] == ["cat", "1", "2"]
    without_eel = rows(label=np.array([0, 1, 1, 0, 1, 0, 1, 1]))
    assert [row["rows"] for row in page.class_rows(without_eel)] == ["3", "5", "0"]
    assert page.class_rows(without_eel)[2]["cls"] == "", "what was never there is not lost"


def test_reasons_are_counted():
    assert page.reason_rows(rows(reason=np.array(["a"] * 5 + ["b"] * 3))) == [
        {"reason": "a", "kept": "3", "dropped": "2"},
        {"reason": "b", "kept": "1", "dropped": "2"},
    ]


def test_wrong_labels_need_a_clean_one():
    assert rows().flipped.tolist() == [False, True] + [False] * 6
    unknown = rows(clean_label=np.full(8, -1))
    assert not unknown.clean_known
    assert not unknown.flipped.any()
    assert len(page.cards(unknown, None)) == 2


def test_spread_by_hand():
    spread = Spread(np.array([5, 9]))
    probability = {5: [0.2, 0.4, 0.9], 9: [0.5, 0.5, 0.5], 7: [0.1, 0.1, 0.1]}
    for epoch in range(3):
        sample = np.array([9, 7, 5])
        value = np.array([probability[i][epoch] for i in sample], np.float32)
        spread.add(sample, np.zeros(3, np.int32), value)
    mean, deviation = spread.result()
    assert mean == pytest.approx([0.5, 0.5], abs=1e-6)
    assert deviation == pytest.approx([np.std([0.2, 0.4, 0.9]), 0.0], abs=1e-6)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_spread_of_several_runs_in_any_order(runs, epochs, n, random):
    values = np.random.default_rng(random.randrange(10**6)).random((runs, epochs, n))
    values = values.astype(np.float32)
    ids = np.arange(n) * 3 + 1
    cells = [(r, e, i) for r in range(runs) for e in range(epochs) for i in range(n)]
    random.shuffle(cells)
    spread = Spread(ids)
    for start in range(0, len(cells), 4):
        part = cells[start : start + 4]
        spread.add(
            np.array([ids[i] for *_, i in part]),
            np.array([r for r, *_ in part]),
            np.array([values[cell] for cell in part]),
        )
    mean, deviation = spread.result()
    assert mean == pytest.approx(values.mean(axis=(0, 1)), abs=1e-6)
    assert deviation == pytest.approx(values.std(axis=1).mean(axis=0), abs=1e-6)


def test_spread_without_rows():
    for ids in (np.zeros(0, np.int64), np.array([1, 2])):
        spread = Spread(ids)
        spread.add(np.array([7]), np.array([0]), np.array([0.5]))
        mean, _ = spread.result()
        assert mean.shape == ids.shape
        assert np.isnan(mean).all()


def clouds(chart):
    found = re.findall(r'class="cloud (s\d)" d="([^"]*)"', str(chart.svg))
    return {slot: re.findall(r"M(\d+),(\d+)h0", path) for slot, path in found}


def test_the_data_map_draws_each_row_once():
    # Rows of the decision in another order than their ids.
    decided = rows(ids=np.array(IDS[:8])[::-1].copy())
    ids = page.map_ids(decided.ids)
    spread = Spread(ids)
    first = int(decided.ids[1])  # the wrong label
    for epoch in (0, 1):
        value = np.where(ids == first, [0.0, 1.0][epoch], 0.75)
        spread.add(ids, np.zeros(8, np.int64), value)
    chart = page.data_map(decided, ids, spread)
    drawn = clouds(chart)
    assert {slot: len(places) for slot, places in drawn.items()} == {"s0": 4, "s1": 3, "s4": 1}
    ((x, y),) = drawn["s4"]
    assert int(x) > int(drawn["s0"][0][0]), "more variable: further right"
    assert int(y) > int(drawn["s0"][0][1]), "less sure: further down"
    names = [item["name"] for item in chart.legend]
    assert names == ["kept (4)", "dropped (3)", "wrong label (1, 0 of them kept)"]


def test_a_large_map_draws_some_rows_by_a_hash():
    ids = np.arange(20_000)
    some = page.map_ids(ids)
    assert len(some) == 5000
    assert (np.diff(some) > 0).all()
    assert np.array_equal(some, page.map_ids(ids[::-1]))
    assert 9_000 < some.mean() < 11_000


def test_the_accuracy_chart_has_four_lines_and_full_data():
    chart = page.accuracy_chart(Grid(made.grid_rows()))
    shown = str(chart.svg)
    assert shown.count("<polyline") == 4
    assert shown.count('class="whisker') == 8
    assert shown.count('class="rule"') == 1
    assert [item["name"] for item in chart.legend] == [
        "random", "random + distilled", "chosen", "chosen + distilled", "full data, 91.0 ± 2.5%",
    ]  # fmt: skip
    tops = {
        name: float(y)
        for y, name in re.findall(r'cy="([\d.]+)"><title>(.*?): [\d.]+% ±', shown)[::2]
    }
    assert tops["chosen + distilled"] < tops["chosen"] < tops["random + distilled"] < tops["random"]


def test_the_accuracy_chart_of_one_seed():
    chart = page.accuracy_chart(Grid(made.grid_rows(seeds=1)[:2]))
    assert 'class="whisker' not in str(chart.svg)
    assert str(chart.svg).count("<polyline") == 2
    assert "nan" not in str(chart.svg)


def test_alpha_is_drawn_for_each_selection_and_fraction():
    charts = page.alpha_charts(made.alpha_rows(fractions=(0.1, 0.5)))
    assert [chart.title for chart in charts] == [
        "Held-out accuracy against alpha, random rows",
        "Held-out accuracy against alpha, chosen rows",
    ]
    shown = str(charts[0].svg)
    assert [item["name"] for item in charts[0].legend] == ["10% kept", "50% kept"]
    assert len(re.findall(r'r="5"', shown)) == 2, "the alpha in use"
    assert len(re.findall(r'r="3.5"', shown)) == 10
    unused = [row | {"used": False} for row in made.alpha_rows()]
    assert 'r="5"' not in str(page.alpha_charts(unused)[0].svg)
    many = page.alpha_charts(made.alpha_rows(fractions=np.linspace(0.1, 0.9, 9).tolist()))[0]
    assert [item["name"] for item in many.legend][0::5] == ["10% kept", "90% kept"]
    assert "6 of 9 shares are drawn" in many.note
    full = made.alpha_rows(fractions=(1.0,), selections=("full",))
    both = page.alpha_charts([*made.alpha_rows(fractions=(0.1,)), *full])
    for chart in both:
        assert [item["name"] for item in chart.legend] == ["10% kept", "100% kept"]
    assert page.alpha_charts([]) == page.alpha_charts(full) == []


def test_students_in_numbers():
    lines = page.grid_rows(Grid(made.grid_rows()))
    assert [line["name"] for line in lines] == [
        "25% random", "25% chosen", "50% random", "50% chosen", "full data",
    ]  # fmt: skip
    first, last = lines[0], lines[-1]
    assert (first["rows"], first["steps"], first["alpha"], first["seeds"]) == (
        "2",
        "50",
        "0.5",
        "3",
    )
    assert first["plain"] == "68.5 ± 2.5%"
    assert first["taught"] == "73.6 ± 2.7%"
    assert first["gain"] == "+5.1"
    assert first["plain_worst"] == "48%"
    assert (last["plain"], last["taught"], last["gain"], last["alpha"]) == (
        "91.0 ± 2.5%", "", "", "",
    )  # fmt: skip


def test_nothing_has_no_minus():
    rows_ = [
        made.student(0.5, name, False, seed, 0.5 - 1e-5 * (name == "chosen") * (seed + 1))
        for name in ("random", "chosen")
        for seed in (0, 1, 2)
    ]
    grid = Grid(rows_)
    (cell,) = page.comparison_rows(comparisons(grid), grid.fractions)[0]["cells"]
    assert (cell["value"], cell["interval"]) == ("+0.0", "+0.0 to +0.0")
    flat = rows(score=np.array([-0.0] * 8, np.float32))
    row = {"source": "s", "image": b"", "text": "t", "features": []}
    assert page.example(flat, 0, "most", row, None)["score"] == "0"


def test_spans_of_numbers():
    varied = [made.student(0.5, "random", True, s, 0.5, rows=900 + 200 * s) for s in (0, 1)]
    assert page.grid_rows(Grid(varied))[0]["rows"] == "900 to 1,100"


def test_differences_are_marked_where_zero_is_left_out():
    grid = Grid(made.grid_rows())
    chosen, *_, full = page.comparison_rows(comparisons(grid), grid.fractions)
    assert [cell["cls"] for cell in chosen["cells"]] == ["kept", ""]
    assert chosen["cells"][0] == {"value": "+10.0", "interval": "+9.0 to +11.0", "cls": "kept"}
    assert [cell["cls"] for cell in full["cells"]] == ["lost", "lost"]
    one = Grid(made.grid_rows(seeds=1))
    cells = page.comparison_rows(comparisons(one), [0.25, 0.75])[0]["cells"]
    assert [cell["cls"] for cell in cells] == ["none", ""]
    assert [cell["interval"] for cell in cells] == ["", ""]


def test_noise_is_listed_best_first():
    lines = page.noise_lines(NOISE)
    assert [line["score"] for line in lines] == ["aum", "el2n", "none"]
    assert (lines[0]["auc"], lines[0]["found"], lines[0]["share"]) == ("0.875", "1 of 1", "100%")
    assert (lines[2]["auc"], lines[2]["share"]) == ("–", "")
    two = [row | {"looked": 2} for row in NOISE[:1]]
    flags = rows(clean_label=np.array([0, 0, 0, 0, 2, 0, 1, 1]))
    assert "2 rows at random would hold about 0.5" in page.by_chance(flags, two)
    assert page.by_chance(flags, []) == ""


def test_cards_say_how_many_seeds():
    def note(seeds):
        return page.cards(rows(), Grid(made.grid_rows(seeds=seeds)))[-1]

    assert note(1)["note"] == "best line: chosen + distilled, 1 seed"
    assert note(3)["label"] == "Accuracy at 25%"
    assert note(3)["note"].endswith(", 3 seeds")
