"""The page in a real browser: pruning end to end, the same decisions, and nothing but text."""

import json
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from starlette.testclient import TestClient

from prunery.pruners.context import ContextPruner
from prunery.pruners.context.options import PruneOptions
from prunery.pruners.context.result import ScoredPassage, decide

from ..pruners.context.scripted import scripted
from .browser import Browser, find_browser
from .live import PASSAGES, QUESTION, Poisoned, application, live
from .test_runs import RUN, Scripted, scripted_prefect, stamped

needs_browser = pytest.mark.skipif(
    find_browser() is None, reason="no chromium here; install the system's package to test the page"
)
EVIL = "The <script>alert(1)</script><img src=x onerror=alert(2)> harbour was painted."
READY = "document.querySelector('#totals .card')"


def pruner():
    """Keeps the sentence with the painter alone; a passage with `uranium` has no score."""
    words = {"harbour": 0.9, "painted": 0.9, "turner": 0.9}
    rank = {"harbour": 0.5, "painted": 1.5}
    loaded, forward = scripted(words, other=0.1, rank=rank, threshold=0.3, licence="none")
    token = loaded.tokenizer.convert_tokens_to_ids("uranium")
    return ContextPruner(loaded, forward=Poisoned(forward, token))


@pytest.fixture(scope="module")
def base(small_store):
    with live(application(pruner(), store=str(small_store.uri))) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    made = Browser()
    yield made
    made.close()


@pytest.fixture
def tab(browser, base):
    made = browser.tab()
    yield made
    errors = made.errors
    made.close()
    assert errors == []


def ask(tab, base, passages=PASSAGES, view=""):
    tab.go(f"{base}/{view}")
    tab.wait("document.querySelector('#question')")
    tab.set("#question", QUESTION)
    tab.set("#passages", "\n\n".join(passages))
    tab.click("#run")
    tab.wait(READY)


def sentences(tab):
    """(text, struck through) of every sentence, in the order shown."""
    return [
        tuple(one)
        for one in tab.js(
            "[...document.querySelectorAll('.passages .s')].map((e) => [e.textContent.trim(),"
            " getComputedStyle(e).textDecorationLine.includes('line-through')])"
        )
    ]


# What needs no browser.


def test_files_of_the_page_and_no_others():
    client = TestClient(application(), base_url="http://127.0.0.1")
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy
    assert "default-src 'none'" in policy
    script = client.get("/page/decide.js")
    assert script.headers["content-type"].startswith("text/javascript")
    same = client.get("/page/decide.js", headers={"If-None-Match": script.headers["etag"]})
    assert same.status_code == 304 and not same.content
    for wrong in ("..%2fpage.py", "..%2f..%2fsettings.py", "a%00", "nothing.js"):
        assert client.get(f"/page/{wrong}").status_code == 404


def test_the_page_asks_no_other_host_and_writes_no_markup():
    from importlib import resources

    folder = resources.files("prunery.api").joinpath("static")
    texts = {one.name: one.read_text("utf-8") for one in folder.iterdir()}
    for name, text in texts.items():
        plain = text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in plain and "https://" not in plain, name
        for risky in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert risky not in text, (name, risky)
        assert "localStorage" not in text and "sessionStorage" not in text, name
    assert " style=" not in texts["index.html"] and "onclick=" not in texts["index.html"]


# The decision.


def scored_passages(count, seed):
    """Random passages of one question, with ties, titles of both kinds and empty ones."""
    draw = np.random.default_rng(seed)
    made = []
    for index in range(count):
        n = int(draw.integers(0, 6))
        sizes = draw.integers(1, 9, n)
        keep = np.round(draw.random(n), 1 if seed % 2 else 3).astype(np.float32)
        apart, first = draw.random() < 0.4, seed % 3 == 0
        made.append(
            ScoredPassage(
                question=0,
                index=index,
                passage="x" * n,
                starts=np.arange(n),
                ends=np.arange(1, n + 1),
                keep_probability=keep,
                token_offset=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
                token_keep_probability=np.repeat(keep, sizes),
                relevance_logit=float(np.float32(round(draw.normal(), 1))),
                blocks=1,
                truncated=False,
                title="t" if apart and not first else None,
                title_tokens=int(draw.integers(1, 5)) if apart and not first else 0,
                title_keep_probability=float(np.float32(draw.random())),
                title_first=first,
                threshold=0.5,
                aggregation="mean",
            )
        )
    return made


def as_json(one):
    return {
        "index": one.index, "relevance_logit": one.relevance_logit,
        "title_tokens": one.title_tokens, "title_score": one.title_keep_probability,
        "title_first": one.title_first,
        "sentences": [
            {"score": float(score), "tokens": int(tokens)}
            for score, tokens in zip(
                one.keep_probability, np.diff(one.token_offset), strict=True
            )
        ],
    }  # fmt: skip


def grid():
    """Options of all kinds, each with passages of its own seed."""
    draw = random.Random(7)
    for seed in range(500):
        options = PruneOptions(
            threshold=draw.choice([0.0, 0.1, 0.3, 0.5, 0.7, 1.0, draw.random()]),
            max_tokens=draw.choice([None, None, 0, 1, 5, 12, 25, 1000]),
            min_sentences=draw.choice([0, 0, 1, 2, 9]),
            keep_title=draw.random() < 0.7,
            top_k=draw.choice([None, None, 1, 3]),
            on_empty=draw.choice(["empty", "top1", "original"]),
        )
        yield seed, options


@needs_browser
def test_the_browser_decides_as_the_library(tab, base):
    tab.go(f"{base}/")
    cases, wanted = [], []
    for seed, options in grid():
        scored = scored_passages(1 + seed % 7, seed)
        names = ("threshold", "max_tokens", "min_sentences", "keep_title", "top_k", "on_empty")
        cases.append([[as_json(p) for p in scored], {n: getattr(options, n) for n in names}])
        result = decide(scored, replace(options, aggregation="mean"))[0]
        wanted.append(
            [
                [p.index, p.tokens_out, p.title_kept, [[s.kept, s.reason] for s in p.sentences]]
                for p in result
            ]
        )
    found = tab.js(
        "import('/page/decide.js').then(({decide}) => "
        f"{json.dumps(cases)}.map(([passages, options]) => decide(passages, options).map((one) =>"
        " [one.passage.index, one.tokens_out, one.title_kept,"
        " one.sentences.map((s) => [s.kept, s.reason])])))"
    )
    for case, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert got == want, cases[case]
    reasons = {reason for case in wanted for one in case for _, reason in one[3]}
    assert reasons >= {"over_budget", "title_alone", "title", "among_best", "best_of_empty"}


@needs_browser
def test_pasted_passages(tab, base):
    tab.go(f"{base}/")
    cases = {
        "One.\n\nTwo.\nStill two.\n \nThree.\n": ["One.", "Two.\nStill two.", "Three."],
        '"One."\n{"text": "Two.", "title": "T"}\n': ["One.", {"text": "Two.", "title": "T"}],
        '"One.\nTwo.': ['"One.\nTwo.'],
        "One.\r\n\r\nTwo.": ["One.", "Two."],
        "  \n ": [],
    }
    for text, wanted in cases.items():
        got = tab.js(f"import('/page/decide.js').then((m) => m.parsePassages({json.dumps(text)}))")
        assert got == wanted
    # Offsets count characters as Python does, not UTF-16 units.
    spans = [{"start": 0, "end": 2}, {"start": 2, "end": 4}]
    got = tab.js(f"import('/page/decide.js').then((m) => m.pieces('😀a😀b', {json.dumps(spans)}))")
    assert got == ["😀a", "😀b"]


# The views.


@needs_browser
def test_prune_then_move_the_sliders(tab, base):
    ask(tab, base)
    shown = sentences(tab)
    assert shown[0] == ("The harbour was painted by Turner.", False)  # the most relevant first
    assert ("Nobody went out.", True) in shown
    requests = tab.js("performance.getEntriesByType('resource').length")
    kept = sum(not struck for _, struck in shown)
    tab.set("#threshold", "0.05")
    assert sum(not struck for _, struck in sentences(tab)) == len(shown) > kept
    tab.set("#threshold-number", "1")
    assert all(struck for _, struck in sentences(tab))
    assert "0 of 6" in tab.text("#total-sentences") and "100 %" in tab.text("#total-tokens")
    tab.set("#min-sentences", "1")
    assert sum(not struck for _, struck in sentences(tab)) == len(PASSAGES)
    tab.set("#budget", "0")
    assert all(struck for _, struck in sentences(tab))
    # The model was asked once.
    assert tab.js("performance.getEntriesByType('resource').length") == requests
    tab.set("#price", "10")
    assert "$10 a million" in tab.text("#total-money")
    tab.wait("document.getElementById('live').textContent.includes('sentences kept')")
    # A struck sentence is told to a screen reader, too.
    assert tab.js("document.querySelectorAll('.passages .s.pruned[role=deletion]').length") == 6


@needs_browser
def test_copy_and_link(tab, base):
    ask(tab, base)
    tab.set("#threshold", "0.2")
    tab.js(
        "navigator.clipboard.writeText ="
        " (text) => { window.copied = text; return Promise.resolve(); }"
    )
    tab.click("#copy")
    tab.wait("window.copied")
    kept = [text for text, struck in sentences(tab) if not struck]
    assert all(text in tab.js("window.copied") for text in kept)
    assert "Nobody" not in tab.js("window.copied")
    tab.click("#link")
    address = tab.js("location.href")
    assert "threshold=0.2" in address and "painted" not in address
    ask(tab, base, view=address.removeprefix(base + "/"))
    assert tab.js("document.querySelector('#threshold').value") == "0.2"


@needs_browser
def test_markup_in_a_passage_stays_text(tab, base):
    ask(tab, base, [EVIL, "The <b>weather</b> was cold."])
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in tab.text("#result")
    assert (
        tab.js("document.querySelectorAll('main img, main script, main b:not(.card b)').length")
        == 0
    )


@needs_browser
def test_what_has_no_score_shows_its_error(tab, base):
    ask(tab, base, [*PASSAGES, "The harbour holds uranium."])
    assert "Passage 4:" in tab.text(".failed")
    assert len(sentences(tab)) == 6


@needs_browser
def test_an_error_is_shown_and_can_be_mended(browser, base):
    tab = browser.tab()
    tab.go(f"{base}/#/tables/nothing")
    tab.wait("document.querySelector('.problem')")
    assert "no table `nothing`" in tab.text()
    tab.js("location.hash = '#/tables'")
    tab.wait("document.querySelector('main table')")
    tab.close()


@needs_browser
def test_a_stored_question(tab, base, small_store):
    tab.go(f"{base}/")
    tab.click("#stored summary")
    tab.wait("document.querySelectorAll('#stored-question option').length === 5")
    tab.click("#stored-show")
    tab.wait(READY)
    assert "Stored question: What is a tomato?" in tab.text()
    kept = {r["id"]: r["keep"] for r in small_store.table("prune").to_table().to_pylist()}
    signals = small_store.table("signals").to_table().to_pylist()
    asked = {r["id"]: r["name"] for r in small_store.table("questions").to_table().to_pylist()}
    mine = [kept[row["id"]] for row in signals if asked[row["question"]] == "a"]
    shown = sentences(tab)
    assert sum(not struck for _, struck in shown) == sum(mine) and len(shown) == len(mine)
    assert "decided otherwise" not in tab.text("#result")
    tab.set("#threshold", "1")
    assert all(struck for _, struck in sentences(tab))


@needs_browser
def test_tables_rows_explanation_and_lineage(tab, base, small_store):
    tab.go(f"{base}/#/tables")
    tab.wait("document.querySelector('main table')")
    assert "prune_context" in tab.text() and "12 of 12" in tab.text(".pager")
    tab.js(
        "[...document.querySelectorAll('main td a')].find((a) => a.textContent === 'prune').click()"
    )
    tab.wait("document.querySelector('td a[href*=explain]')")
    tab.click("td a[href*=explain]")
    tab.wait("document.querySelector('.words')")
    assert "(provence)" in tab.text(".words")
    tab.js("location.hash = '#/tables/signals/lineage'")
    tab.wait("document.querySelector('svg .node.here')")
    names = tab.js("[...document.querySelectorAll('svg .node .name')].map((e) => e.textContent)")
    assert set(names) == set(small_store.names())
    overlap = tab.js(
        "(() => { const r = [...document.querySelectorAll('svg rect')].map((e) =>"
        " e.getBoundingClientRect()); return r.some((a, i) => r.some((b, j) => i < j && a.left <"
        " b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)); })()"
    )
    assert overlap is False
    tab.click(".alternative summary")
    assert "retrieved, questions, chunks" in tab.text(".alternative") or "retrieved" in tab.text(
        ".alternative"
    )
    tab.js("location.hash = '#/reports'")
    tab.wait("document.querySelector('main td a')")
    tab.click("main td a")
    tab.wait("document.querySelector('iframe')")
    assert tab.js("document.querySelector('iframe').getAttribute('sandbox')") == ""
    tab.js("location.hash = '#/methods'")
    tab.wait("document.querySelectorAll('main table').length === 2")
    tab.set("#method-filter", "provence")
    assert "random" not in tab.text("main table:last-of-type tbody").split()


@needs_browser
def test_a_key_is_asked_for_and_kept_in_memory(browser, tmp_path, small_store):
    keys = tmp_path / "keys"
    keys.write_text("a-key-that-is-long-enough-to-be-one\n")
    with live(application(store=str(small_store.uri), keys_file=keys)) as base:
        tab = browser.tab()
        tab.go(f"{base}/#/tables")
        tab.wait("!document.querySelector('#key-form').hidden")
        tab.set("#key", "a-key-that-is-long-enough-to-be-one")
        tab.click("#key-form button[type=submit]")
        tab.wait("document.querySelector('main table')")
        assert tab.js("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        tab.go(f"{base}/#/tables")
        tab.wait("!document.querySelector('#key-form').hidden")
        tab.close()


@needs_browser
def test_without_prefect_the_runs_say_what_to_do(browser, base):
    tab = browser.tab()
    tab.go(f"{base}/#/runs")
    tab.wait("document.querySelector('.problem')")
    assert "--prefect-url" in tab.text()
    tab.close()


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_is_wider_than_a_narrow_screen_and_all_is_legible(browser, base, dark):
    tab = browser.tab(width=360, height=740, mobile=True, dark=dark)
    ask(tab, base)
    tab.click(".passage details summary")
    views = ["", "#/tables", "#/tables/signals", "#/tables/signals/lineage"]
    views += ["#/tables/signals/about", "#/reports", "#/methods"]
    for view in views:
        if view:
            tab.js(f"location.hash = {json.dumps(view)}")
            tab.wait("document.querySelector('main table, main svg, main dl')")
        width = tab.js("document.documentElement.scrollWidth")
        assert width <= 360, f"{view}: {width}"
        weak = tab.js(CONTRAST)
        assert weak == [], f"{view}: {weak}"
    ground = tab.js("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 24, 27)") is dark
    assert tab.errors == []
    tab.close()


# Text of which the contrast with its ground is below 4.5 to 1 (WCAG 2.2, 1.4.3), by tag and class.
CONTRAST = """(() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const over = (a, b) => a.slice(0, 3).map((v, i) => v * a[3] + b[i] * (1 - a[3]));
  const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (e) => { const chain = []; for (; e; e = e.parentElement) chain.unshift(parse(getComputedStyle(e).backgroundColor)); return chain.reduce((under, c) => over(c, under), [255, 255, 255]); };
  const weak = new Set();
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    if (e.closest('svg, .hidden, .skip, [hidden], noscript, :disabled') || !e.getClientRects().length) continue;
    const under = ground(e);
    const ink = over(parse(getComputedStyle(e).color), under);
    const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) weak.add(`${e.tagName}.${e.className} ${ratio.toFixed(2)}`);
  }
  return [...weak];
})()"""  # noqa: E501


@needs_browser
def test_all_of_it_by_keyboard(tab, base):
    tab.go(f"{base}/")
    tab.wait("document.querySelector('#question')")
    tab.press("Tab")
    assert tab.js("document.activeElement.className") == "skip"
    tab.press("Enter")
    assert tab.js("document.activeElement.id") == "main"
    tab.press("Tab")
    assert tab.js("document.activeElement.id") == "question"
    tab.type(QUESTION)
    tab.press("Tab")
    tab.type("\n\n".join(PASSAGES))
    tab.press("Tab")
    assert tab.js("document.activeElement.id") == "run"
    tab.press("Enter")
    tab.wait(READY)
    for _ in range(12):
        tab.press("Tab")
        if tab.js("document.activeElement.id") == "threshold":
            break
    assert tab.js("document.activeElement.id") == "threshold"
    ring = tab.js("getComputedStyle(document.activeElement).outlineStyle")
    assert ring != "none"
    tab.press("End")
    assert all(struck for _, struck in sentences(tab))
    named = tab.js(
        "[...document.querySelectorAll('input, select, textarea, button')].filter((e) =>"
        " !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map((e) => e.outerHTML)"
    )
    assert named == []
    tab.js("location.hash = '#/tables/signals/lineage'")
    tab.wait("document.querySelector('svg .node')")
    tab.js("document.querySelector('svg a.node').focus()")
    here = tab.js("location.hash")
    tab.press("Enter")
    tab.wait(f"location.hash !== {json.dumps(here)}")


@needs_browser
def test_a_run_is_started_and_followed_to_its_end(browser, monkeypatch):
    monkeypatch.setattr("prunery.api.runs.POLL_SECONDS", 0.2)
    now = {"kind": "RUNNING"}
    step = {"id": "t", "name": "chunks"}
    line = {"id": RUN, "name": "brisk-otter", "parameters": {"recipe": "tiny"}}
    prefect = Scripted(**{
        "/flow_runs/filter": lambda _: [{**line, **stamped(now["kind"], 1)}],
        "/task_runs/filter": lambda _: [{**step, **stamped(now["kind"], 2)}],
        "/…create_flow_run": {**line, **stamped("SCHEDULED", 0)},
        "/…set_state": {"state": {"type": "CANCELLING", "name": "Cancelling"}},
    })  # fmt: skip
    app = application(prefect_url="http://prefect.invalid/api")
    with live(app) as base:
        app.state.following.prefect = scripted_prefect(prefect)
        tab = browser.tab()
        tab.go(f"{base}/#/runs")
        tab.wait("document.querySelector('#deployment option')")
        assert "cron 0 4 * * * (UTC)" in tab.text("#deployment-about")
        assert "brisk-otter" in tab.text("main table")
        tab.set("#settings", "chunks.max_tokens = 30\nprune.method = cosine")
        tab.click("main form.card button[type=submit]")
        tab.wait("document.querySelector('progress')")
        sent = next(body for path, body in prefect.asked if path.endswith("create_flow_run"))
        assert sent["parameters"]["overrides"][1:] == [
            "chunks.max_tokens=30", 'prune.method="cosine"',
        ]  # fmt: skip
        assert "0 of 1 steps" in tab.text()
        tab.click("main button.quiet")
        end = time.monotonic() + 20
        while not any(path.endswith("set_state") for path, _ in prefect.asked):
            assert time.monotonic() < end
            tab.js("1")
        now["kind"] = "COMPLETED"
        tab.wait("document.querySelector('main').innerText.includes('1 of 1 steps')")
        tab.wait("document.querySelector('.state.completed')")
        tab.wait("!document.querySelector('main button.quiet')")
        assert tab.errors == []
        tab.close()
