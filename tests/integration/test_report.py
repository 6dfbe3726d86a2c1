"""The HTML report: its content, what it withholds, and how it works in a real browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from datetime import UTC, date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from form_runs import TEXT, run_with_form
from running import Workplace

from gxr_batch.errors import RunError
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.reviews import add_reviews, judged_sha256, one_import
from gxr_batch.records import DISCLAIMER, ERROR_COUNTS, Key, Review
from gxr_batch.report import aggregate, charts, report
from gxr_batch.report import cases as case_module
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
    special = [SCRIPT, IMAGE, RIGHT_TO_LEFT, "set to fail", "word " * 900]
    usual = [f"small pleural effusion number {number}" for number in range(len(special), ROWS)]
    return [(f"C{number}", cell, f"site {number % 3} </td>") for number, cell in enumerate([*special, *usual])]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Workplace:
    """A workplace with a run and its report."""
    work = Workplace(tmp_path_factory.mktemp("report"))
    work.table(rows(), header=("case_id", "findings", "<i>site</i>"))
    work.job(JOB)
    work.faults = {"fail_containing": "set to fail"}
    work.run(expect=3)
    work.gxr("report", "outputs/j")
    return work


@pytest.fixture(scope="module")
def html(made) -> str:
    return (made.folder / "outputs/j/report.html").read_text(encoding="utf-8")


def page_of(work: Workplace, run: str = "outputs/j", against: str | None = None, **options: bool) -> str:
    """Write a report in this process, which is faster than running the command, and return it."""
    target = work.folder / "page-of-a-test.html"
    target.unlink(missing_ok=True)  # perhaps of another run, which no report replaces
    other = RunReader(work.folder / against) if against else None
    report(RunReader(work.folder / run), other, target, include_held=options.get("include_held", False))
    return target.read_text(encoding="utf-8")


def packed(html: str) -> dict:
    """Decode the cases that cases.py packed into a report."""
    found = re.search(r'id="packed-cases">([^<]*)</script>', html)
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1], validate=True)))


def unpacked(html: str) -> list[dict[str, object]]:
    """Return the cases of a report as rows."""
    head = packed(html)
    columns = {
        column["name"]: column["values"] if "values" in column else [column["constant"]] * head["rows"]
        for column in head["columns"]
    }
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def test_the_command_prints_the_path_of_the_report(made):
    done = made.gxr("report", "outputs/j", "--to", "page.html")
    assert "pleural" not in done.stdout + done.stderr
    assert re.match(rf"page.html: {ROWS} rows, {ROWS} to read, 0.\d MB", done.stdout)
    assert (made.folder / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_report_starts_with_the_disclaimer(html):
    body = html[html.index("<body>") :]
    assert body.index(DISCLAIMER) < body.index("<h1>")
    assert "<strong>AI-generated, unreviewed.</strong>" in body


@pytest.mark.parametrize(
    ("reviewed", "text"),
    [
        (0, DISCLAIMER),
        (3, "AI-generated teaching material, 45 of 48 texts not reviewed by a radiologist. Research"),
        (48, "AI-generated teaching material, reviewed by the reviewer named in each case. Research and education"),
    ],
)
def test_the_disclaimer_counts_the_reviewed_texts(reviewed, text):
    assert disclaimer_for(reviewed, 48).startswith(text)


def test_the_report_holds_every_case_in_full(made, html):
    cases, results = unpacked(html), made.results()
    assert [case["gxr_row_id"] for case in cases] == [row["gxr_row_id"] for row in results]
    for case, row in zip(cases, results, strict=True):
        for name in ("findings", "<i>site</i>", "gxr_text", "gxr_error", "gxr_flags", "gxr_new_tokens", "gxr_status"):
            assert case[name] == row[name], name
        assert set(row) <= set(case)
        assert case["gxr_started_at"] == round(row["gxr_started_at"].timestamp() * 1000)
        assert case["gxr_prompt_sha256"] in (None, f"{(row['gxr_prompt_sha256'] or '')[:8]}…")


def test_no_text_of_a_row_is_outside_the_packed_cases(html):
    outside = re.sub(r'<script type="text/plain".*?</script>', "", html, flags=re.DOTALL)
    for text in ("window.broken", "pleural", RIGHT_TO_LEFT, "</td> site"):
        assert text not in outside


def test_the_report_loads_nothing(html):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1]
    outside = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"""\s(src|href)=["'](?!#)""", outside)
    assert "url(" not in html
    assert not re.search(r"\son\w+=", outside)


def test_the_report_describes_the_run(made, html):
    manifest = made.manifest()
    for part in (
        "clinical_case",
        ">echo<",
        manifest["invocations"][0]["started_at"][11:19],
        "129</span>",
        "fail rows like this one",
        "findings_truncated",
        "<strong>Progress</strong>",
        "Slots in use",
        "How texts ended",
        "There is no earlier invocation of this job",
    ):
        assert part in html, part
    assert html.count("<svg") == 8
    assert html.count("<summary>Figures</summary>") == 8


def test_the_previous_invocation_and_changed_settings_are_shown(made):
    made.run("--output", "outputs/later", "--set", "engine.slots=4", expect=3)
    html = page_of(made, "outputs/later")
    assert "compared with the run j." in html
    assert '<th scope="row">engine.slots</th><td dir="auto">8</td><td dir="auto">4</td>' in html
    made.table([*rows(), ("C999", "one more", "x")], header=("case_id", "findings", "<i>site</i>"))
    made.run("--output", "outputs/later", "--set", "engine.slots=4", expect=3)
    html = page_of(made, "outputs/later")
    assert "compared with invocation 1 of this run." in html
    assert '<th scope="row">rows generated</th><td>130</td><td>1</td><td>-99.2%</td>' in html
    made.table(rows(), header=("case_id", "findings", "<i>site</i>"))


def test_two_runs_are_compared(made):
    made.run("--output", "outputs/other", "--set", "prompt.template=basic", "--limit", "100", expect=3)
    made.gxr("report", "outputs/j", "--against", "outputs/other", "--to", "both.html")
    html = (made.folder / "both.html").read_text(encoding="utf-8")
    assert (
        "100 rows are in both runs: 0 have the same text, 99 have different texts, 1 have no text in one run." in html
    )
    assert "100 have different prompts. 30 rows are only in this run, 0 only in other." in html
    assert packed(html)["other"] == "other"
    verdicts = [case["comparison"] for case in unpacked(html)]
    assert verdicts.count("different text") == 99
    assert verdicts.count("only in this run") == 30


def test_a_text_that_is_the_same_in_both_runs_is_stored_once(made):
    html = page_of(made, against="outputs/j")
    assert (
        f"{ROWS} rows are in both runs: {ROWS - 1} have the same text, 0 have different texts, 1 have no text" in html
    )
    assert all(case["gxr_text"] is None for case in unpacked(html)), "the other run's column comes last"


@pytest.mark.parametrize("target", ["outputs/j/results.parquet", "outputs/j/parts/x", "f.csv", "no/such/x.html", "."])
def test_a_report_never_replaces_another_kind_of_file(made, monkeypatch, target):
    monkeypatch.chdir(made.folder)
    with pytest.raises(RunError, match="--to"):
        report(RunReader(Path("outputs/j")), None, Path(target), include_held=False)


def test_a_folder_without_a_run_is_refused(made):
    assert "There is no run here." in made.gxr("report", "outputs/j", "--against", "outputs/no", expect=2).stderr


def test_an_unfinished_run_has_a_report(made):
    made.run("--output", "outputs/half", expect=4, faults={**made.faults, "crash_after": 50})
    html = page_of(made, "outputs/half")
    assert "All 50 finished rows" in html
    assert '<span class="number">80</span><span class="what">still to do</span>' in html


def test_a_damaged_part_is_reported(made):
    made.run("--output", "outputs/hurt", "--limit", "20", "--set", "run.checkpoint_seconds=0.01", faults={})
    path = made.parts("outputs/hurt")[0]
    path.write_bytes(path.read_bytes()[:100])
    assert "1 damaged part is left out" in page_of(made, "outputs/hurt")


def test_a_run_without_rows_has_a_report(tmp_path):
    work = Workplace(tmp_path)
    work.table([])
    work.run()
    assert "All 0 finished rows" in page_of(work)


def test_unexpected_values_in_the_manifest_are_ignored(tmp_path):
    work = Workplace(tmp_path)
    work.run()
    path = work.folder / "outputs/j/run.json"
    manifest = json.loads(path.read_text())
    entry = manifest["invocations"][0]
    entry |= {"engine": "x", "packages": 3, "new_tokens": "many", "finished_at": None, "splits": [], "outcome": "<b>"}
    manifest["job"] |= {"prompt": "x", "model": None, "input": {"path": 1, "columns": []}}
    path.write_text(json.dumps(manifest))
    assert "<td>&lt;b&gt;</td>" in page_of(work)


def test_the_workers_engine_and_lost_workers_of_a_ray_run_are_shown(tmp_path):
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


def test_a_report_that_would_be_too_large_shows_fewer_cases_and_names_which(made, monkeypatch):
    monkeypatch.setattr(case_module, "MOST_PACKED_BYTES", 6_000)
    done = report(RunReader(made.folder / "outputs/j"), None, made.folder / "small.html", include_held=False)
    html = (made.folder / "small.html").read_text(encoding="utf-8")
    assert 2 < done.shown < ROWS
    # The echo engine copies prompts into texts, so that nearly every row has a flag.
    assert f"{done.shown} of {ROWS} finished rows: the first ones that failed, are held or have a flag" in html
    ids = [case["gxr_row_id"] for case in unpacked(html)]
    assert {"C3", "C4"} <= set(ids), "the failed row and the flagged one"
    assert ids == sorted(ids, key=lambda name: int(name[1:]))


def test_marked_cases_of_a_large_run_are_chosen_first():
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


def test_held_cells_and_texts_are_withheld():
    table = pa.table(
        {
            "name": ["Ann", "Bob"],
            "gxr_status": ["held", "ok"],
            "gxr_text": ["t1", "t2"],
            "gxr_error": ["rule mrn", None],
            "gxr_findings_lost": [["nodule"], ["mass"]],
        }
    )
    made, _ = columns_of(table, held(table))
    values = {column.name: column.values for column in made}
    assert values["name"] == [None, "Bob"]
    assert values["gxr_text"] == [None, "t2"]
    assert values["gxr_error"] == ["rule mrn", None]
    assert values["gxr_findings_lost"] == [None, ["mass"]]


def test_a_row_held_in_one_run_is_withheld_in_the_other(made, monkeypatch):
    # No row of this run is held, so the failed row takes that role.
    monkeypatch.setattr(case_module, "held", lambda table: [one == "failed" for one in table["gxr_status"].to_pylist()])
    html = page_of(made, against="outputs/j")
    case = unpacked(html)[3]
    assert [case["findings"], case["<i>site</i>"], case["gxr_text"]] == [None, None, None]
    assert "Cells and texts of 1 held row are withheld; gxr-batch report --include-held shows them." in html
    assert unpacked(page_of(made, against="outputs/j", include_held=True))[3]["findings"] == "set to fail"


def test_very_long_cells_are_shortened_and_counted():
    table = pa.table({"x": ["a" * 30_000, "b"], "gxr_status": ["ok", "ok"]})
    made, shortened = columns_of(table, [False, False])
    assert shortened == 1
    assert made[0].values[0].endswith("[shortened in this report]")


def test_numbers_that_json_lacks_are_written_as_text():
    table = pa.table({"a": [float("nan"), 1.5], "b": [2**60, 3], "c": [b"\x00", b"x"], "gxr_status": ["ok", "ok"]})
    made, _ = columns_of(table, [False, False])
    json.dumps([column.as_dict() for column in made], allow_nan=False)


@pytest.mark.parametrize("name", ["</text><script>window.broken = 3</script>", "a & b", '"quoted" <i>'])
def test_charts_escape_the_names_that_they_draw(name):
    svg = charts.bar_chart("t", "rows", {name: 3, "usual": 2}, 5).svg
    assert "<script" not in svg
    assert "<i>" not in svg
    assert "&amp;" in svg or "&lt;" in svg or "quoted" in svg


def test_charts_use_the_colours_of_the_page(html):
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert 'fill="var(--ok)"' in drawn
    assert not re.search(r'(fill|stroke)="#', drawn)
    assert "style=" not in drawn, "the page's policy forbids style attributes"


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
    period = aggregate.newest_period(filled([0, 0], [100_000, 100_000], [1000, 1000]))
    assert period is not None
    assert np.allclose(period.tokens_a_second, 20)
    assert np.allclose(period.rows_in_progress, 2)
    assert period.rows_a_minute[-1] > 0
    assert not period.rows_a_minute[:-1].any()


def test_only_the_latest_period_is_drawn_and_earlier_rows_are_counted():
    day = 86_400_000
    period = aggregate.newest_period(filled([0, day, day + 1000], [5000, day + 5000, day + 60_000], [10, 10, 10]))
    assert period is not None
    assert period.earlier_rows == 1
    assert period.edges[0] == day
    assert period.finished["ok"].tolist()[0] == 1
    assert period.finished["ok"].tolist()[-1] == 3


@pytest.mark.parametrize("milliseconds", [1, 20, 140, 150, 280, 560, 1120, 7200])
def test_no_step_of_a_period_is_empty(milliseconds):
    # In floating point, 0.14 s has a little more than seven steps of 0.02 s; the eighth would have no length.
    period = aggregate.newest_period(filled([0], [milliseconds], [10]))
    assert period is not None
    assert (np.diff(period.edges) > 0).all()
    assert period.edges[-1] == milliseconds
    assert np.isfinite(period.tokens_a_second).all()


@pytest.mark.parametrize("years", [0.1, 1, 56, 8000])
def test_a_clock_that_jumps_makes_no_more_steps(years):
    end = int(years * 365.25 * 86_400_000)
    period = aggregate.newest_period(filled([0, 0], [end, end - 5000], [10, 10]))
    assert period is not None
    assert len(period.edges) <= 74
    assert period.edges[-1] == end
    assert sum(len(chart.svg) for chart in charts.period_charts(period, 0, 2, UTC)) < 200_000


def test_times_that_no_calendar_has_are_left_out():
    assert aggregate.newest_period(filled([-(10**15), 0], [1000, 10**15], [10, 10])) is None


def test_a_short_remainder_of_a_period_is_merged_into_the_last_step():
    # With 100.1 s in steps of 2 s, a row in the last 0.1 s would count as 600 rows per minute.
    period = aggregate.newest_period(filled([0, 0], [50_000, 100_100], [10, 10]))
    assert period is not None
    assert period.step_seconds == 2
    assert period.edges[-2:].tolist() == [98_000, 100_100]
    assert period.rows_a_minute.max() <= 30
    assert (period.rows_a_minute * np.diff(period.edges) / 60_000).sum() == pytest.approx(2)


@pytest.mark.parametrize(("most", "labels"), [(2, ["0", "1", "2"]), (2000, ["0", "500", "1,000", "1,500", "2,000"])])
def test_axis_labels_of_row_counts_are_whole_numbers(most, labels):
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
    """The report in a browser; the console must stay empty, and the file must be the only request."""
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
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    yield page
    assert page.evaluate("window.broken") is None
    assert messages == []
    assert set(requests) == {path.as_uri()}
    context.close()


def count(page) -> str:
    return page.inner_text("#count")


def first_ids(page, most: int = 3) -> list[str]:
    return page.locator("#rows .open").all_inner_texts()[:most]


def test_search_finds_words_and_phrases_and_marks_them(opened):
    assert count(opened).startswith(f"{ROWS} of {ROWS} cases, showing 1 to 50")
    opened.keyboard.press("/")
    opened.keyboard.type('"effusion number 77" small')
    opened.wait_for_selector("#rows mark:text-is('small')")  # the last word is marked once all is typed
    assert count(opened).startswith("1 of")
    assert first_ids(opened) == ["C77"]
    assert opened.locator("#rows mark").all_inner_texts()[:2] == ["small", "effusion number 77"]
    opened.fill("#search", "no such words")
    opened.wait_for_selector("text=No case matches")
    opened.click("text=Clear")
    opened.wait_for_selector(f"#count:has-text('{ROWS} of')")


def test_a_text_in_the_table_keeps_its_lines_except_empty_ones(opened):
    assert (
        opened.evaluate("dense('Impression: x.\\n\\n \\nKey findings:\\n- y\\n')")
        == "Impression: x.\nKey findings:\n- y"
    )
    assert (
        opened.evaluate("getComputedStyle(document.querySelector('#rows .clamp')).whiteSpaceCollapse")
        == "preserve-breaks"
    )


@pytest.mark.parametrize("width", [390, 800])
def test_a_case_fits_in_a_narrow_window(opened, width):
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    opened.locator("#rows .open").first.click()
    assert opened.evaluate("document.querySelector('#case').scrollWidth") <= width
    assert opened.locator("#case-title").bounding_box()["height"] < 40, "the case's name is on one line"


def test_print_repeats_the_whole_header(opened):
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
    assert "set to fail" in opened.inner_text("#rows tr")
    opened.select_option("#filter-status", "")
    opened.select_option("#filter-flag", "findings_truncated")
    assert first_ids(opened) == ["C4"]
    assert "findings_truncated" in opened.locator("#rows .flag").all_inner_texts()
    opened.select_option("#filter-flag", "no flag")
    opened.select_option("#filter-review", "unreviewed")
    opened.select_option("#filter-finish", "stop")
    plain = [row for row in made.results() if not row["gxr_flags"] and row["gxr_finish_reason"] == "stop"]
    assert count(opened).startswith(f"{len(plain)} of")


def test_a_case_is_opened_and_closed_by_keyboard(opened):
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


def test_a_link_opens_its_case(opened, made):
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


def test_a_case_names_the_findings_that_its_text_lost(browser, tmp_path):
    work = Workplace(tmp_path)
    work.table(2)
    work.run()
    (part,) = work.parts()
    table = pq.read_table(part)
    lost = pa.array([["pleural effusion", "nodule"], []], pa.list_(pa.string()))
    at = table.schema.names.index("gxr_findings_lost")
    pq.write_table(table.set_column(at, table.schema.field(at), lost), part)
    work.gxr("report", "outputs/j")
    for page in in_browser(browser, tmp_path / "outputs/j/report.html"):
        page.locator("#rows .open").first.click()
        assert "Not named in the text, or denied: pleural effusion, nodule" in page.inner_text("#case-body")
        page.keyboard.press("j")
        page.locator("#case-title", has_text="C1").wait_for()
        assert "Not named" not in page.inner_text("#case-body")


def test_light_and_dark(opened):
    def ground() -> str:
        return opened.evaluate("getComputedStyle(document.body).backgroundColor")

    assert ground() == "rgb(255, 255, 255)"
    opened.click("#theme")
    assert ground() == "rgb(18, 23, 30)"
    opened.emulate_media(media="print")
    assert ground() == "rgb(255, 255, 255)", "print is light"
    opened.emulate_media(media="screen")
    opened.click("#theme")


def test_the_systems_dark_mode_is_followed(browser, made):
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto((made.folder / "outputs/j/report.html").as_uri())
    assert page.get_attribute("html", "data-theme") == "dark"
    context.close()


@pytest.mark.parametrize("width", [1280, 800, 400])
def test_nothing_is_wider_than_the_window(opened, width):
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_the_comparison_is_not_wider_than_a_small_window(compared):
    compared.set_viewport_size({"width": 400, "height": 800})
    assert compared.evaluate("document.documentElement.scrollWidth") <= 400


def test_the_report_prints(opened):
    assert opened.pdf(format="A4").startswith(b"%PDF")


def test_texts_of_two_runs_are_shown_side_by_side_with_their_differences(compared):
    compared.select_option("#filter-compared", "different text")
    compared.locator("#rows .open").first.click()
    text = compared.inner_text("#case-body")
    assert "Generated text, this run" in text
    assert "Generated text, other" in text
    assert compared.locator("#case-body mark.added").count() > 0
    assert compared.locator("#case-body mark.gone").count() > 0


# ---- texts with a form ----


@pytest.fixture
def by_section(browser, tmp_path):
    """The report of a run with a form; row b has a corrected text, row c a text that lacks the form."""
    run = run_with_form(tmp_path / "run", {"a": TEXT, "b": TEXT, "c": "A text\n\nwithout the form, with <b>."})
    review = Review(
        key=Key("b", 1),
        judged_sha256=judged_sha256(TEXT, "p"),
        status="approved_with_edits",
        reviewer="Dr A",
        reviewed_at=date(2026, 1, 31),
        quality=None,
        errors=(None,) * len(ERROR_COUNTS),
        comment=None,
        text=TEXT.replace("Right", "Left").replace("It is", "This is"),
    )
    with one_import(run):
        add_reviews(run, [review], {})
    report(RunReader(run), None, tmp_path / "report.html", include_held=False)
    yield from in_browser(browser, tmp_path / "report.html")


def case(page, name: str):
    page.locator("#rows .open", has_text=re.compile(f"^{name}$")).click()
    return page.locator("#case-body")


def test_a_case_is_shown_by_section_with_a_hidden_one_folded(by_section):
    body = case(by_section, "a")
    assert body.locator("h4").all_inner_texts() == ["Impression", "Key findings", "Difficulty", "Grade"]
    assert body.locator(".section li").all_inner_texts() == ["Consolidation", "=no effusion"]
    assert body.locator("summary").first.inner_text() == "Show Answer"
    assert not body.get_by_text("It is pneumonia").is_visible()
    by_section.keyboard.press("Tab")
    while by_section.evaluate("document.activeElement.textContent") != "Show Answer":
        by_section.keyboard.press("Tab")
    by_section.keyboard.press("Enter")
    assert body.get_by_text("It is pneumonia").is_visible()
    assert "gxr_section" not in body.text_content()
    assert "not reviewed" in by_section.inner_text(".banner")


def test_the_table_hides_a_hidden_section_and_print_shows_it(by_section):
    row = by_section.locator("#rows tr[data-row='0']")
    assert "Answer: hidden" in row.inner_text()
    assert "pneumonia" not in row.inner_text()
    assert "without the form, with <b>." in by_section.inner_text("#rows tr[data-row='2']")
    by_section.emulate_media(media="print")
    assert "Answer: It is pneumonia" in row.inner_text()
    assert "hidden" not in row.inner_text()
    by_section.emulate_media(media="screen")


def test_search_finds_the_words_of_sections_hidden_ones_too(by_section):
    by_section.fill("#search", "pneumonia")
    by_section.locator("#count", has_text="2 of 3 cases").wait_for()
    assert case(by_section, "a").locator("details.section mark").inner_text() == "pneumonia"


def test_a_corrected_text_is_shown_by_section_with_what_changed(by_section):
    corrected = case(by_section, "b").locator(".side", has_text="Corrected text")
    assert corrected.locator("h4").count() == 4
    assert corrected.locator("mark.added").first.inner_text().strip() == "Left"
    assert not corrected.get_by_text("pneumonia").is_visible()


def test_a_text_without_the_form_is_shown_whole(by_section):
    body = case(by_section, "c")
    assert "A text\n\nwithout the form, with <b>." in body.inner_text()
    assert body.locator("h4").count() == 0
