"""The morning page: what it says, what it keeps to itself, and how it works in a real browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from running import Workplace

from gxr_batch.errors import RunError
from gxr_batch.ledger import RunReader
from gxr_batch.records import DISCLAIMER
from gxr_batch.report import aggregate, charts, report
from gxr_batch.report import cases as case_room
from gxr_batch.report.aggregate import Chooser, Tally
from gxr_batch.report.cases import columns_of, held
from gxr_batch.report.page import disclaimer_for

ROWS = 130
SCRIPT = "<script>window.broken = 1</script> effusion"
IMAGE = "</script><img src=x onerror='window.broken = 2'> & <b>bold</b>"
RIGHT_TO_LEFT = "انصباب جنبي في الجانب الأيمن"
JOB = """[engine]
kind = "echo"
slots = 8
[echo]
tokens_per_second = 1200
[prompt]
too_long = "truncate"
[sampling]
max_new_tokens = 120
[model]
max_seq_length = 420
"""


def rows() -> list[tuple[str, str, str]]:
    special = [SCRIPT, IMAGE, RIGHT_TO_LEFT, "told to fail", "word " * 900]
    usual = [f"small pleural effusion number {number}" for number in range(len(special), ROWS)]
    return [(f"C{number}", cell, f"site {number % 3} </td>") for number, cell in enumerate([*special, *usual])]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Workplace:
    """A workplace with a run, and its page."""
    work = Workplace(tmp_path_factory.mktemp("report"))
    work.table(rows(), header=("case_id", "findings", "<i>site</i>"))
    work.job(JOB)
    work.faults = {"fail_containing": "told to fail"}
    work.run(expect=3)
    work.gxr("report", "outputs/j")
    return work


@pytest.fixture(scope="module")
def html(made) -> str:
    return (made.folder / "outputs/j/report.html").read_text(encoding="utf-8")


def page_of(work: Workplace, run: str = "outputs/j", against: str | None = None, **options: bool) -> str:
    """Make a page in this process, which is faster than to start the command, and return it."""
    target = work.folder / "page-of-a-test.html"
    other = RunReader(work.folder / against) if against else None
    report(RunReader(work.folder / run), other, target, include_held=options.get("include_held", False))
    return target.read_text(encoding="utf-8")


def packed(html: str) -> dict:
    """Undo what cases.py does to the cases of a page."""
    found = re.search(r'id="packed-cases">([^<]*)</script>', html)
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1], validate=True)))


def unpacked(html: str) -> list[dict[str, object]]:
    """Return the cases of a page as a script of another language reads them."""
    head = packed(html)
    columns = {
        column["name"]: column["values"] if "values" in column else [column["constant"]] * head["rows"]
        for column in head["columns"]
    }
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def test_the_command_says_where_the_page_is(made):
    done = made.gxr("report", "outputs/j", "--to", "page.html")
    assert "pleural" not in done.stdout + done.stderr
    assert re.match(rf"page.html: {ROWS} rows, {ROWS} to read, 0.\d MB", done.stdout)
    assert (made.folder / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_page_says_first_what_the_texts_are(html):
    body = html[html.index("<body>") :]
    assert body.index(DISCLAIMER) < body.index("<h1>")
    assert "<strong>AI-generated, unreviewed.</strong>" in body


@pytest.mark.parametrize(
    ("reviewed", "told"),
    [
        (0, DISCLAIMER),
        (3, "AI-generated teaching material, 45 of 48 texts not reviewed by a radiologist. Research"),
        (48, "AI-generated teaching material, reviewed: each case says by whom. Research and education only; not for"),
    ],
)
def test_the_disclaimer_says_how_much_is_reviewed(reviewed, told):
    assert disclaimer_for(reviewed, 48).startswith(told)


def test_the_page_holds_every_case_whole(made, html):
    cases, results = unpacked(html), made.results()
    assert [case["gxr_row_id"] for case in cases] == [row["gxr_row_id"] for row in results]
    for case, row in zip(cases, results, strict=True):
        for name in ("findings", "<i>site</i>", "gxr_text", "gxr_error", "gxr_flags", "gxr_new_tokens", "gxr_status"):
            assert case[name] == row[name], name
        assert set(row) <= set(case)
        assert case["gxr_started_at"] == round(row["gxr_started_at"].timestamp() * 1000)
        assert case["gxr_prompt_sha256"] in (None, f"{(row['gxr_prompt_sha256'] or '')[:8]}…")


def test_no_text_of_a_row_stands_outside_the_packed_cases(html):
    outside = re.sub(r'<script type="text/plain".*?</script>', "", html, flags=re.DOTALL)
    for text in ("window.broken", "pleural", RIGHT_TO_LEFT, "</td> site"):
        assert text not in outside


def test_the_page_may_load_nothing(html):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1]
    outside = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"""\s(src|href)=["'](?!#)""", outside)
    assert "url(" not in html
    assert not re.search(r"\son\w+=", outside)


def test_the_page_says_what_ran(made, html):
    manifest = made.manifest()
    for part in (
        "clinical_case",
        ">echo<",
        manifest["invocations"][0]["started_at"][11:19],
        "129</span>",
        "the echo engine was asked to fail rows like this one",
        "findings_truncated",
        "Progress over the night",
        "Slots in use",
        "How texts ended",
        "There is no earlier start of this job",
    ):
        assert part in html, part
    assert html.count("<svg") == 8
    assert html.count("<summary>Figures</summary>") == 8


def test_the_start_before_and_what_changed_is_named(made):
    made.run("--output", "outputs/later", "--set", "engine.slots=4", expect=3)
    html = page_of(made, "outputs/later")
    assert "beside the run j." in html
    assert '<th scope="row">engine.slots</th><td dir="auto">8</td><td dir="auto">4</td>' in html
    made.table([*rows(), ("C999", "one more", "x")], header=("case_id", "findings", "<i>site</i>"))
    made.run("--output", "outputs/later", "--set", "engine.slots=4", expect=3)
    html = page_of(made, "outputs/later")
    assert "beside start 1 of this run." in html
    assert '<th scope="row">rows generated</th><td>130</td><td>1</td><td>-99.2%</td>' in html
    made.table(rows(), header=("case_id", "findings", "<i>site</i>"))


def test_two_runs_stand_side_by_side(made):
    made.run("--output", "outputs/other", "--set", "prompt.template=basic", "--limit", "100", expect=3)
    made.gxr("report", "outputs/j", "--against", "outputs/other", "--to", "both.html")
    html = (made.folder / "both.html").read_text(encoding="utf-8")
    assert "100 rows are in both runs: 0 have the same text, 99 another one, 1 have no text in one of them." in html
    assert "100 were asked with another prompt. 30 rows are only in this run, 0 only in other." in html
    assert packed(html)["other"] == "other"
    verdicts = [case["comparison"] for case in unpacked(html)]
    assert verdicts.count("different text") == 99
    assert verdicts.count("only in this run") == 30


def test_a_text_that_both_runs_have_is_held_once(made):
    html = page_of(made, against="outputs/j")
    assert f"{ROWS} rows are in both runs: {ROWS - 1} have the same text, 0 another one, 1 have no text" in html
    assert all(case["gxr_text"] is None for case in unpacked(html)), "the other run's column comes last"


@pytest.mark.parametrize("target", ["outputs/j/results.parquet", "outputs/j/parts/x", "f.csv", "no/such/x.html", "."])
def test_no_page_replaces_what_is_not_one(made, monkeypatch, target):
    monkeypatch.chdir(made.folder)
    with pytest.raises(RunError, match="--to"):
        report(RunReader(Path("outputs/j")), None, Path(target), include_held=False)


def test_a_run_that_is_none_is_named(made):
    assert "There is no run here." in made.gxr("report", "outputs/j", "--against", "outputs/no", expect=2).stderr


def test_an_unfinished_run_has_a_page(made):
    made.run("--output", "outputs/half", expect=4, faults={**made.faults, "crash_after": 50})
    html = page_of(made, "outputs/half")
    assert "All 50 finished rows" in html
    assert '<span class="number">80</span><span class="what">still to do</span>' in html


def test_a_damaged_part_is_named(made):
    made.run("--output", "outputs/hurt", "--limit", "20", "--set", "run.checkpoint_seconds=0.01", faults={})
    path = made.parts("outputs/hurt")[0]
    path.write_bytes(path.read_bytes()[:100])
    assert "1 damaged part is passed over here" in page_of(made, "outputs/hurt")


def test_a_run_without_rows_has_a_page(tmp_path):
    work = Workplace(tmp_path)
    work.table([])
    work.run()
    assert "All 0 finished rows" in page_of(work)


def test_odd_values_in_the_manifest_do_no_harm(tmp_path):
    work = Workplace(tmp_path)
    work.run()
    path = work.folder / "outputs/j/run.json"
    manifest = json.loads(path.read_text())
    entry = manifest["invocations"][0]
    entry |= {"engine": "x", "packages": 3, "new_tokens": "many", "finished_at": None, "splits": [], "outcome": "<b>"}
    manifest["job"] |= {"prompt": "x", "model": None, "input": {"path": 1, "columns": []}}
    path.write_text(json.dumps(manifest))
    assert "<td>&lt;b&gt;</td>" in page_of(work)


def test_a_pool_is_named_with_what_its_workers_hold_and_how_many_were_lost(tmp_path):
    work = Workplace(tmp_path)
    work.run()
    assert "workers lost" not in page_of(work)
    path = work.folder / "outputs/j/run.json"
    manifest = json.loads(path.read_text())
    manifest["resolved"] |= {"engine.kind": "ray", "ray.worker": "transformers"}
    manifest["invocations"][0]["workers"] = {"alive": 2, "lost": 3, "rows": [1, 2]}
    path.write_text(json.dumps(manifest))
    page = page_of(work)
    assert "ray, transformers in each worker" in page
    assert "workers lost" in page


def test_a_page_that_would_grow_too_large_shows_fewer_cases_and_says_which(made, monkeypatch):
    monkeypatch.setattr(case_room, "MOST_PACKED_BYTES", 6_000)
    done = report(RunReader(made.folder / "outputs/j"), None, made.folder / "small.html", include_held=False)
    html = (made.folder / "small.html").read_text(encoding="utf-8")
    assert 2 < done.shown < ROWS
    # The echo engine's texts copy their prompts, so that nearly every row has a flag.
    assert f"{done.shown} of {ROWS} finished rows: the first that failed, are held or have a flag" in html
    ids = [case["gxr_row_id"] for case in unpacked(html)]
    assert {"C3", "C4"} <= set(ids), "the failed and the flagged one"
    assert ids == sorted(ids, key=lambda name: int(name[1:]))


def test_of_a_huge_run_the_marked_cases_are_chosen_first():
    chooser = Chooser(10)
    for start in range(0, 400, 20):
        numbers = np.arange(start, start + 20)
        chooser.add(pa.table({"n": numbers}), numbers % 50 == 0)
    chosen = chooser.cases(pa.schema([("n", pa.int64())]), 10)
    assert chosen.table["n"].to_pylist() == [0, 1, 2, 50, 100, 150, 200, 250, 300, 350]
    assert chosen.places.tolist() == chosen.table["n"].to_pylist()
    assert not chosen.marked_only
    assert chooser.cases(pa.schema([("n", pa.int64())]), 4).table["n"].to_pylist() == [0, 50, 100, 150]
    assert chooser.cases(pa.schema([("n", pa.int64())]), 4).marked_only


def test_what_is_held_is_withheld():
    table = pa.table(
        {
            "name": ["Ann", "Bob"],
            "gxr_status": ["held", "ok"],
            "gxr_text": ["t1", "t2"],
            "gxr_error": ["rule mrn", None],
        }
    )
    made, _ = columns_of(table, held(table))
    values = {column.name: column.values for column in made}
    assert values["name"] == [None, "Bob"]
    assert values["gxr_text"] == [None, "t2"]
    assert values["gxr_error"] == ["rule mrn", None]


def test_what_one_run_holds_back_the_other_does_not_give_away(made, monkeypatch):
    # No engine holds rows here: the failed one stands in for a held one.
    monkeypatch.setattr(case_room, "held", lambda table: [one == "failed" for one in table["gxr_status"].to_pylist()])
    html = page_of(made, against="outputs/j")
    case = unpacked(html)[3]
    assert [case["findings"], case["<i>site</i>"], case["gxr_text"]] == [None, None, None]
    assert "Cells and text of 1 held row are withheld here; gxr-batch report --include-held shows them." in html
    assert unpacked(page_of(made, against="outputs/j", include_held=True))[3]["findings"] == "told to fail"


def test_very_long_cells_are_shortened_and_counted():
    table = pa.table({"x": ["a" * 30_000, "b"], "gxr_status": ["ok", "ok"]})
    made, shortened = columns_of(table, [False, False])
    assert shortened == 1
    assert made[0].values[0].endswith("[shortened in this page]")


def test_numbers_that_json_lacks_become_text():
    table = pa.table({"a": [float("nan"), 1.5], "b": [2**60, 3], "c": [b"\x00", b"x"], "gxr_status": ["ok", "ok"]})
    made, _ = columns_of(table, [False, False])
    json.dumps([column.as_dict() for column in made], allow_nan=False)


@pytest.mark.parametrize("name", ["</text><script>window.broken = 3</script>", "a & b", '"quoted" <i>'])
def test_charts_escape_the_names_that_they_draw(name):
    svg = charts.bar_chart("t", "rows", {name: 3, "usual": 2}, 5).svg
    assert "<script" not in svg
    assert "<i>" not in svg
    assert "&amp;" in svg or "&lt;" in svg or "quoted" in svg


def test_charts_take_their_colours_from_the_page(html):
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert 'fill="var(--ok)"' in drawn
    assert not re.search(r'(fill|stroke)="#', drawn)
    assert "style=" not in drawn, "the page's policy allows no style on an element"


def filled(started: list[float], finished: list[float], tokens: list[float]) -> Tally:
    tally = Tally()
    count = len(started)
    moment = pa.timestamp("ms", tz="UTC")
    tally.add(
        pa.table(
            {
                "gxr_row_id": [str(number) for number in range(count)],
                "gxr_status": ["ok"] * count,
                "gxr_error": pa.nulls(count, pa.string()),
                "gxr_finish_reason": ["stop"] * count,
                "gxr_review_status": ["unreviewed"] * count,
                "gxr_flags": pa.array([[]] * count, pa.list_(pa.string())),
                "gxr_new_tokens": pa.array(tokens, pa.int32()),
                "gxr_seconds_generating": (np.array(finished) - started) / 1000,
                "gxr_rows_in_batch": np.ones(count),
                "gxr_started_at": pa.array(started, pa.int64()).cast(moment),
                "gxr_finished_at": pa.array(finished, pa.int64()).cast(moment),
            }
        )
    )
    return tally


def test_tokens_are_spread_over_the_time_that_a_row_took():
    night = aggregate.night_of(filled([0, 0], [100_000, 100_000], [1000, 1000]))
    assert night is not None
    assert np.allclose(night.tokens_a_second, 20)
    assert np.allclose(night.rows_in_progress, 2)
    assert night.rows_a_minute[-1] > 0
    assert not night.rows_a_minute[:-1].any()


def test_only_the_newest_night_is_drawn_and_the_earlier_rows_are_counted():
    day = 86_400_000
    night = aggregate.night_of(filled([0, day, day + 1000], [5000, day + 5000, day + 60_000], [10, 10, 10]))
    assert night is not None
    assert night.earlier_rows == 1
    assert night.edges[0] == day
    assert night.finished["ok"].tolist()[0] == 1
    assert night.finished["ok"].tolist()[-1] == 3


@pytest.mark.parametrize("milliseconds", [1, 20, 140, 150, 280, 560, 1120, 7200])
def test_a_night_of_any_length_is_cut_into_steps_that_have_one(milliseconds):
    # 0.14 s in steps of 0.02 s are a little more than seven for a computer, and the eighth would have no length.
    night = aggregate.night_of(filled([0], [milliseconds], [10]))
    assert night is not None
    assert (np.diff(night.edges) > 0).all()
    assert night.edges[-1] == milliseconds
    assert np.isfinite(night.tokens_a_second).all()


def test_a_moment_at_the_end_of_a_night_is_no_step_of_its_own():
    # Of 100.1 s in steps of 2 s, the last tenth would show a row as 600 a minute.
    night = aggregate.night_of(filled([0, 0], [50_000, 100_100], [10, 10]))
    assert night is not None
    assert night.step_seconds == 2
    assert night.edges[-2:].tolist() == [98_000, 100_100]
    assert night.rows_a_minute.max() <= 30
    assert (night.rows_a_minute * np.diff(night.edges) / 60_000).sum() == pytest.approx(2)


@pytest.mark.parametrize(("most", "labels"), [(2, ["0", "1", "2"]), (2000, ["0", "500", "1,000", "1,500", "2,000"])])
def test_rows_are_counted_in_whole_numbers_on_an_axis(most, labels):
    drawn = charts.histogram_chart("Rows", "s", aggregate.Histogram(np.array([0.0, 1.0]), np.array([most]), 0, 0.5)).svg
    axis = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", drawn) if text.replace(",", "").isdigit()]
    assert axis[-len(labels) :] == labels


def test_histograms_have_round_steps_and_count_every_row():
    values = np.concatenate([np.random.default_rng(0).normal(200, 40, 10_000), [9_000.0]])
    found = aggregate.histogram(np.round(values))
    assert found is not None
    assert found.counts.sum() == len(values)
    assert found.beyond >= 1
    assert (found.edges[1] - found.edges[0]) in (5, 10, 20)
    assert aggregate.histogram(np.array([3.0])) is not None
    assert aggregate.histogram(np.array([np.nan])) is None


# ---- in a real browser ----


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed (apt.txt)")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def opened(browser, made):
    """The page in a browser; nothing may be said on the console, and nothing asked for but the file."""
    return_to = made.folder / "outputs/j/report.html"
    yield from in_browser(browser, return_to)


@pytest.fixture
def compared(browser, made):
    if not (made.folder / "both.html").exists():
        made.run("--output", "outputs/other", "--set", "prompt.template=basic", "--limit", "100", expect=3)
        made.gxr("report", "outputs/j", "--against", "outputs/other", "--to", "both.html")
    yield from in_browser(browser, made.folder / "both.html")


def in_browser(browser, path: Path):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(60_000)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    yield page
    assert page.evaluate("window.broken") is None
    assert said == []
    assert set(asked) == {path.as_uri()}
    context.close()


def count(page) -> str:
    return page.inner_text("#count")


def first_ids(page, most: int = 3) -> list[str]:
    return page.locator("#rows .open").all_inner_texts()[:most]


def test_search_finds_words_and_phrases_and_marks_them(opened):
    assert count(opened).startswith(f"{ROWS} of {ROWS} cases, shown here 1 to 50")
    opened.keyboard.press("/")
    opened.keyboard.type('"effusion number 77" small')
    opened.wait_for_selector("#rows mark:text-is('small')")  # the last word as a whole: all is typed
    assert count(opened).startswith("1 of")
    assert first_ids(opened) == ["C77"]
    assert opened.locator("#rows mark").all_inner_texts()[:2] == ["small", "effusion number 77"]
    opened.fill("#search", "no such words")
    opened.wait_for_selector("text=No case matches")
    opened.click("text=Clear")
    opened.wait_for_selector(f"#count:has-text('{ROWS} of')")


def test_a_text_keeps_its_lines_in_the_table_but_not_the_empty_ones(opened):
    assert (
        opened.evaluate("dense('Impression: x.\\n\\n \\nKey findings:\\n- y\\n')")
        == "Impression: x.\nKey findings:\n- y"
    )
    assert (
        opened.evaluate("getComputedStyle(document.querySelector('#rows .clamp')).whiteSpaceCollapse")
        == "preserve-breaks"
    )


@pytest.mark.parametrize("width", [390, 800])
def test_a_narrow_window_cuts_nothing_and_keeps_a_case_readable(opened, width):
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    opened.locator("#rows .open").first.click()
    assert opened.evaluate("document.querySelector('#case').scrollWidth") <= width
    assert opened.locator("#case-title").bounding_box()["height"] < 40, "the case's name stands on one line"


def test_paper_repeats_the_whole_header(opened):
    assert opened.evaluate("getComputedStyle(document.querySelector('#table thead button')).display") != "contents"
    opened.emulate_media(media="print")
    assert opened.evaluate("getComputedStyle(document.querySelector('#table thead button')).display") == "contents"


def test_sorting_and_paging(opened):
    opened.click("#table th[data-sort=tokens] button")
    tokens = [int(text) for text in opened.locator("#rows td.figure:nth-child(6)").all_inner_texts()]
    assert tokens == sorted(tokens, reverse=True)
    assert opened.get_attribute("#table th[data-sort=tokens]", "aria-sort") == "descending"
    opened.click("#table th[data-sort=id] button")
    assert first_ids(opened) == ["C0", "C1", "C2"]
    opened.click("#page-on")
    assert first_ids(opened, 1) == ["C50"]
    opened.select_option("#page-size", "500")
    assert opened.locator("#rows tr").count() == ROWS


def test_filters(opened, made):
    opened.select_option("#filter-status", "failed")
    assert first_ids(opened) == ["C3"]
    assert "told to fail" in opened.inner_text("#rows tr")
    opened.select_option("#filter-status", "")
    opened.select_option("#filter-flag", "findings_truncated")
    assert first_ids(opened) == ["C4"]
    assert "findings_truncated" in opened.locator("#rows .flag").all_inner_texts()
    opened.select_option("#filter-flag", "no flag")
    opened.select_option("#filter-review", "unreviewed")
    opened.select_option("#filter-finish", "stop")
    plain = [row for row in made.results() if not row["gxr_flags"] and row["gxr_finish_reason"] == "stop"]
    assert count(opened).startswith(f"{len(plain)} of")


def test_a_case_is_opened_and_left_by_keyboard(opened):
    opened.keyboard.press("j")
    assert opened.evaluate("document.activeElement.textContent") == "C0"
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("j")
    opened.keyboard.press("k")
    opened.keyboard.press("j")
    opened.keyboard.press("Enter")
    assert opened.is_visible("#case")
    assert opened.inner_text("#case-title") == "C2"
    assert RIGHT_TO_LEFT in opened.inner_text("#case-body")
    opened.keyboard.press("ArrowRight")
    assert opened.inner_text("#case-title") == "C3"
    opened.keyboard.press("j")
    opened.keyboard.press("ArrowLeft")
    opened.keyboard.press("k")
    assert opened.inner_text("#case-title") == "C2"
    assert opened.url.endswith("#case=C2")
    opened.keyboard.press("Escape")
    assert not opened.is_visible("#case")
    assert opened.evaluate("document.activeElement.textContent") == "C2"


def test_a_link_leads_to_its_case(opened, made):
    opened.goto("about:blank")
    opened.goto((made.folder / "outputs/j/report.html").as_uri() + "#case=C60")
    opened.wait_for_selector("#case[open]")
    assert opened.inner_text("#case-title") == "C60"
    opened.keyboard.press("Escape")
    opened.locator("#page-at", has_text="page 2 of 3").wait_for()
    opened.goto("about:blank")
    opened.goto((made.folder / "outputs/j/report.html").as_uri())
    opened.wait_for_selector("html[data-ready]", state="attached")


def test_markup_in_a_cell_is_text(opened):
    assert opened.locator("#rows tr").nth(0).locator(".clamp").first.inner_text() == SCRIPT
    assert opened.locator("#rows img, #rows script, #rows b").count() == 0
    opened.locator("#rows tr").nth(1).click()
    assert IMAGE in opened.inner_text("#case-body")
    assert opened.locator("#case img, #case b").count() == 0


def test_a_case_shows_every_column(opened, made):
    opened.locator("#rows .open").first.click()
    opened.click("#case summary")
    text = opened.inner_text("#case-body")
    row = made.results()[0]
    for name, value in row.items():
        if value not in (None, [], "") and name not in {"gxr_text"}:
            assert name in text, name
    assert row["gxr_text"].split("\n")[0] in text
    assert "site 0 </td>" in text


def test_light_and_dark(opened):
    def ground() -> str:
        return opened.evaluate("getComputedStyle(document.body).backgroundColor")

    assert ground() == "rgb(255, 255, 255)"
    opened.click("#theme")
    assert ground() == "rgb(18, 23, 30)"
    opened.emulate_media(media="print")
    assert ground() == "rgb(255, 255, 255)", "paper is light"
    opened.emulate_media(media="screen")
    opened.click("#theme")


def test_the_systems_choice_of_dark_is_followed(browser, made):
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto((made.folder / "outputs/j/report.html").as_uri())
    assert page.get_attribute("html", "data-theme") == "dark"
    context.close()


@pytest.mark.parametrize("width", [1280, 800, 400])
def test_nothing_is_wider_than_the_window(opened, width):
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_prints(opened):
    assert opened.pdf(format="A4").startswith(b"%PDF")


def test_texts_of_two_runs_are_shown_side_by_side_with_their_differences(compared):
    compared.select_option("#filter-compared", "different text")
    compared.locator("#rows .open").first.click()
    text = compared.inner_text("#case-body")
    assert "Generated text, this run" in text
    assert "Generated text, other" in text
    assert compared.locator("#case-body mark.added").count() > 0
    assert compared.locator("#case-body mark.gone").count() > 0
