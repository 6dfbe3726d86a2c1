"""The main job as a user runs it: real processes, real files, documented exit codes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import SUPPORT
from running import Workplace, without_times

import gxr_batch
from gxr_batch.records import DISCLAIMER, result_schema

# A row takes a third of a second: `table(60)` about five, and `LONG` longer than any test could stall.
LONG = 600
SLOW = "[engine]\nkind = 'echo'\nslots = 4\n[echo]\ntokens_per_second = 60\n[run]\ncheckpoint_seconds = 0.2\n"


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def wait_for_parts(work: Workplace, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(work.parts()) < count:
        assert time.monotonic() < deadline, "no parts were written"
        time.sleep(0.02)


def wait_for_text(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} never contained {text}"
        time.sleep(0.02)


def test_a_table_becomes_results_with_every_documented_column(work):
    done = work.run()
    assert "j: finished" in done.stdout
    assert "60 generated, 0 failed" in done.stdout
    assert DISCLAIMER in " ".join(done.stdout.split())
    rows = work.results()
    assert [row["case_id"] for row in rows] == [f"C{number}" for number in range(60)]
    assert list(rows[0]) == ["case_id", "findings", *result_schema().names]
    for row in rows:
        assert row["gxr_status"] == "ok"
        assert row["findings"] in row["gxr_text"]
        assert row["gxr_ai_generated"] is True
        assert row["gxr_review_status"] == "unreviewed"
        assert row["gxr_disclaimer"] == DISCLAIMER
        # The echo engine's text is its prompt: no case, of which nobody expects findings.
        may_be_null = {"gxr_error", "gxr_adapter", "gxr_reasoning", "gxr_findings_kept", "gxr_findings_lost"}
        missing = [name for name, value in row.items() if value is None and name not in may_be_null]
        assert missing == []
    marks = pq.read_schema(work.folder / "outputs/j/results.parquet").metadata
    assert marks[b"gxr_disclaimer"].decode() == DISCLAIMER
    assert json.loads(marks[b"gxr_counts"]) == {"ok": 60, "failed": 0, "held": 0, "left": 0}


def test_a_finished_run_has_nothing_left_to_do(work):
    work.run()
    before = work.results()
    done = work.run()
    assert "nothing left to do" in done.stdout
    assert work.results() == before
    assert len(work.parts()) == 1


def test_an_arbitrary_table_with_empty_findings_and_repeats_is_accounted_for(work):
    texts = ["The lungs are clear.", "Large right effusion.", "Heart size normal."]
    rows = [
        (f"u{n}", "normal", "dyspnea", "None", "" if n % 7 == 3 and n < 3500 else texts[n % 3], "NA")
        for n in range(3800)
    ]
    work.table(rows, ("uid", "MeSH", "indication", "comparison", "findings", "impression"))
    work.job("[engine]\nkind = 'echo'\n", head="path = 'f.csv'\ncolumns = { history = 'indication' }\n")
    work.run(expect=3)
    found = work.results()
    assert [tuple(row[name] or "" for name in list(row)[:6]) for row in found] == rows
    failed = [row for row in found if row["gxr_status"] == "failed"]
    assert len(failed) == 500
    assert {row["gxr_error"] for row in failed} == {
        "the template clinical_case needs findings, which this row does not have"
    }
    assert len({row["gxr_row_id"] for row in found}) == 3800
    assert pq.read_metadata(work.folder / "outputs/j/failed.parquet").num_rows == 500
    work.run(expect=3)


def test_a_run_killed_at_random_moments_loses_and_repeats_no_row(work, tmp_path_factory):
    other = Workplace(tmp_path_factory.mktemp("whole"))
    other.table(LONG)
    other.run()
    work.table(LONG)  # so long that no invocation reaches its suspects, one of which a kill would condemn
    work.job(SLOW)
    rng = random.Random(4)
    for round_ in range(4):
        child = work.start("run", "j.toml", "--quiet")
        wait_for_parts(work, len(work.parts()) + 1)
        time.sleep(rng.random() * 0.4)
        child.kill()
        child.communicate()
        assert not (work.folder / "outputs/j/results.parquet").exists(), f"round {round_} finished too early"
    work.job("[engine]\nkind = 'echo'\nslots = 4\n")
    work.run()
    assert without_times(work.results()) == without_times(other.results())
    keys = [row for path in work.parts() for row in pq.read_table(path)["gxr_row_id"].to_pylist()]
    assert sorted(keys) == sorted(set(keys))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=str
)
def test_a_signal_stops_the_run_cleanly_and_a_rerun_resumes(work, number, code):
    work.table(LONG)
    work.job(SLOW)
    child = work.start("run", "j.toml")
    wait_for_parts(work, 1)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    assert "Traceback" not in err
    assert "run the same command again" in out
    manifest = work.manifest()["invocations"][-1]
    assert manifest["outcome"] in {"terminate", "interrupt"}
    in_parts = sum(pq.read_metadata(path).num_rows for path in work.parts())
    assert manifest["counts"]["ok"] == in_parts > 0
    done = work.run("--set", "echo.tokens_per_second=0")
    assert f"0 new, 0 edited, 0 removed, {LONG} kept" in done.stderr
    assert len(work.results()) == LONG


def test_a_second_ctrl_c_ends_at_once(work):
    work.job(
        SLOW.replace("60", "0.1") + "grace_seconds = 200\n"
    )  # neither rows nor the grace period end within the test
    child = work.start("run", "j.toml")
    wait_for_text(work.folder / "outputs/j/inflight.json", '"C0"')
    child.send_signal(signal.SIGINT)
    wait_for_text(work.folder / "outputs/j/log.jsonl", '"stop_requested"')
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err


def test_a_time_limit_stops_in_time(work):
    work.table(LONG)
    work.job(SLOW)
    began = time.monotonic()
    done = work.run("--time-limit", "5s", expect=75)
    assert time.monotonic() - began < 40, "it would take 52 s without the limit"
    assert "stopped at its time limit" in done.stdout
    entry = work.manifest()["invocations"][-1]
    assert entry["outcome"] == "time_limit"
    assert 0 < entry["counts"]["ok"] < LONG


@pytest.mark.parametrize("faults", [{"opens_after": 2}, {"never_opens": True}], ids=["late", "never"])
def test_no_row_begins_if_the_engine_is_not_open_when_the_run_must_stop(work, faults):
    done = work.run("--time-limit", "1s", expect=75, faults=faults)
    assert "stopped at its time limit" in done.stdout
    assert "the engine was not ready in time" in done.stdout
    assert "Error" not in done.stderr
    entry = work.manifest()["invocations"][-1]
    assert (entry["outcome"], entry["counts"]["ok"]) == ("time_limit", 0)
    assert work.run_json()["ok"] == 60


def test_too_many_failures_stop_the_run(work):
    work.job("[engine]\nkind = 'echo'\n[run]\nmax_failed = 5\n")
    done = work.run(expect=5, faults={"fail_containing": "finding"})
    assert "max_failed" in done.stdout
    counts = work.manifest()["invocations"][-1]["counts"]
    assert counts["failed"] > 5
    assert counts["left"] > 0


def test_an_engine_that_cannot_continue_is_exit_4_and_its_rows_are_kept(work):
    done = work.run(expect=4, faults={"crash_after": 20})
    assert done.stderr.count("Error:") == 1
    assert "Traceback" not in done.stderr
    assert work.manifest()["invocations"][-1]["counts"]["ok"] == 20
    work.run()
    assert len(work.results()) == 60


def test_retry_is_a_new_attempt_with_a_new_seed_up_to_the_limit(work):
    work.faults = {"fail_every": 3}
    work.run(expect=3)
    first = {row["case_id"]: row for row in work.results()}
    assert any(row["gxr_status"] == "failed" for row in first.values())
    work.run("--retry", "failed", expect=None)
    for case, row in {row["case_id"]: row for row in work.results()}.items():
        again = first[case]["gxr_status"] == "failed"
        assert row["gxr_attempt"] == (2 if again else 1)
        assert (row["gxr_seed"] != first[case]["gxr_seed"]) == again
    for _ in range(3):
        last = work.run("--retry", "failed", expect=None)
    assert max(row["gxr_attempt"] for row in work.results()) == 3
    if last.returncode == 3:
        assert "run.max_attempts = 3 is reached" in last.stderr


def test_retry_of_some_rows_names_ids_that_do_not_exist(work):
    work.run()
    done = work.run("--retry", "failed", "--row", "C999", expect=2)
    assert "C999" in done.stderr


def test_changed_settings_never_mix_into_a_run(work):
    work.run()
    done = work.run("--set", "sampling.temperature=0.4", expect=2)
    assert "sampling.temperature (0.7 -> 0.4)" in done.stderr
    assert "--fresh" in done.stderr
    assert len(work.results()) == 60
    work.run("--set", "sampling.temperature=0.4", "--fresh")
    assert len(list((work.folder / "outputs").glob("j.before-*"))) == 1


def test_a_template_edited_by_one_space_is_another_template(work):
    (work.folder / "own.md.j2").write_text("Look: {{ findings }}")
    work.job("[prompt]\ntemplate = 'own.md.j2'\n[engine]\nkind = 'echo'\n")
    work.run()
    (work.folder / "own.md.j2").write_text("Look:  {{ findings }}")
    assert "template" in work.run(expect=2).stderr


def test_what_is_not_in_the_fingerprint_may_change(work):
    work.run()
    work.run("--set", "engine.slots=2", "--set", "run.checkpoint_seconds=1", "--set", "engine.window=10")


def test_new_edited_and_removed_rows_are_named_and_only_they_are_generated(work):
    work.run()
    rows = [(f"C{number}", f"finding number {number}") for number in range(60)]
    rows[5] = ("C5", "edited")
    work.table([*rows[1:][::-1], ("C60", "new"), ("C61", "new")])
    done = work.run()
    assert "2 new, 1 edited, 1 removed, 58 kept; 3 to generate" in done.stderr
    found = work.results()
    assert [row["case_id"] for row in found[:2]] == ["C59", "C58"]
    assert len(found) == 61


def test_whole_numbers_that_become_floats_are_no_edited_rows(work):
    """As when pandas writes a column of numbers, and one night a row lacks its number."""
    nights = [
        pa.array([65, 70, 81]),
        pa.array([65.0, None, 81.0, 90.5]),
        pa.array([65, 70, 81, 90], pa.int16()),
        pa.array([65.0, 70.0, None], pa.float32()),
    ]
    work.job(
        "[engine]\nkind = 'echo'\n[prompt]\ntemplate = 'own.md.j2'\n", head="path = 'f.parquet'\nid_column = 'id'\n"
    )
    (work.folder / "own.md.j2").write_text("Age {{ age | default('unknown') }}.")
    generated = []
    for ages in nights:
        pq.write_table(pa.table({"id": pa.array(range(len(ages))), "age": ages}), work.folder / "f.parquet")
        generated.append(work.run_json()["generated_now"])
    assert generated == [3, 2, 1, 1]
    assert [row["gxr_text"].split("Age ")[1][:4] for row in work.results()] == ["65.", "70.", "unkn"]


def test_another_column_may_change_freely(work):
    work.run()
    work.table([(f"C{n}", f"finding number {n}", "seen") for n in range(60)], ("case_id", "findings", "note"))
    summary = work.run_json()
    assert summary["generated_now"] == 0
    assert work.results()[0]["note"] == "seen"


def test_limit_generates_the_first_rows_and_a_later_run_the_rest(work):
    assert work.run_json("--limit", "7")["ok"] == 7
    assert len(work.results()) == 7
    summary = work.run_json()
    assert (summary["ok"], summary["generated_now"]) == (60, 53)


def test_samples_per_row_may_grow(work):
    work.run()
    summary = work.run_json("--set", "sampling.samples_per_row=3")
    assert summary["generated_now"] == 120
    found = work.results()
    assert [row["gxr_sample"] for row in found[:3]] == [1, 2, 3]
    assert len({row["gxr_seed"] for row in found}) == 180


def test_a_seed_of_new_is_drawn_once_and_kept(work):
    work.run("--set", "sampling.seed=new", "--limit", "5")
    seeds = [row["gxr_seed"] for row in work.results()]
    work.run("--set", "sampling.seed=new")
    assert [row["gxr_seed"] for row in work.results()][:5] == seeds


def test_a_table_with_only_a_header_gives_empty_results(work):
    work.table([])
    work.run()
    assert work.results() == []
    work.table(3)
    assert work.run_json()["ok"] == 3


def test_a_lost_manifest_loses_no_row_and_the_settings_are_still_checked(work):
    work.run()
    (work.folder / "outputs/j/run.json").rename(work.folder / "outputs/j/run.json.damaged")
    assert "sampling.top_k" in work.run("--set", "sampling.top_k=20", expect=2).stderr
    assert work.run_json()["generated_now"] == 0


def test_a_dated_run_whose_manifest_is_lost_is_resumed_in_its_folder(work):
    work.job("[engine]\nkind = 'echo'\n[run]\noutput = 'outputs/{name}-{date}'\n")
    work.run()
    (made,) = (work.folder / "outputs").glob("j-2*")
    folder = made.rename(made.with_name("j-2020-01-31"))
    (folder / "run.json").rename(folder / "run.json.damaged")
    assert work.run_json()["generated_now"] == 0
    assert work.manifest("outputs/j-2020-01-31")["name"] == "j"
    assert work.run_json()["generated_now"] == 60, "a finished run is not resumed on another day"


def test_a_lost_manifest_is_replaced_by_the_settings_of_the_run_not_of_a_retry(work):
    work.job("[engine]\nkind = 'echo'\n[sampling]\nmax_new_tokens = 4\n")
    work.run("--limit", "30")
    work.run("--limit", "30", "--retry", "truncated", "--set", "sampling.max_new_tokens=60")
    assert {row["gxr_max_new_tokens"] for row in work.results()} == {60}
    (work.folder / "outputs/j/run.json").unlink()
    work.run()
    assert [row["gxr_max_new_tokens"] for row in work.results()] == [60] * 30 + [4] * 30


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ("[sampling]\ntemprature = 1\n", "did you mean sampling.temperature?"),
        ("[prompt]\ntemplate = 'comparative'\n", "condition_a"),
        ("[prompt]\ntemplate = 'none.j2'\n", "none.j2"),
    ],
)
def test_wrong_input_is_exit_2_with_one_message(work, sections, part):
    work.job(sections)
    for verb in ("run", "check"):
        done = work.gxr(verb, "j.toml", expect=2)
        assert part in done.stderr
        assert "Traceback" not in done.stderr
        assert not (work.folder / "outputs").exists()


def test_a_missing_table_is_exit_2_with_its_absolute_path(work):
    (work.folder / "f.csv").unlink()
    done = work.run(expect=2)
    assert str(work.folder / "f.csv") in done.stderr


def test_a_second_run_names_the_holder_of_the_folder(work):
    work.table(LONG)
    work.job(SLOW)
    child = work.start("run", "j.toml")
    wait_for_parts(work, 1)
    done = work.run(expect=4)
    assert f"process {child.pid} on" in done.stderr
    child.kill()
    child.communicate()


def test_status_follows_a_run_without_disturbing_it(work):
    work.table(LONG)
    work.job(SLOW)
    child = work.start("run", "j.toml")
    wait_for_parts(work, 2)
    (seen,) = json.loads(work.gxr("status", "j.toml", "--json").stdout)
    assert seen["state"] == "running"
    assert 0 < seen["ok"] < LONG
    assert seen["ok"] + seen["left"] == LONG
    frame = gxr_batch.read_results(work.folder / "outputs/j")
    assert 0 < len(frame) < LONG
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 75
    work.run("--set", "echo.tokens_per_second=0")
    assert f"finished, {LONG} generated" in work.gxr("status", "outputs").stdout


def test_text_of_cells_appears_in_no_message_and_no_json(work):
    canary = "zebrafish"
    work.table([(f"C{n}", f"{canary} {n}" if n else "") for n in range(60)])
    work.job("[engine]\nkind = 'echo'\n[prompt]\nsystem = 'zebrafish'\n")
    work.faults = {"fail_every": 4, "crash_after": 30}
    outputs = [work.run(expect=4), work.run("--json", expect=None), work.gxr("status", "outputs", "--json")]
    outputs += [work.gxr("check", "j.toml", "--json"), work.run("--set", "prompt.system=zebrafish2", expect=2)]
    for done in outputs:
        assert canary not in done.stdout + done.stderr
    manifest = work.folder / "outputs/j/run.json"
    assert "zebrafish 1" not in manifest.read_text()


def test_check_shows_three_prompts_and_writes_nothing(work):
    work.table([("A", "clear lungs"), ("B", ""), ("C", "effusion"), ("D", "nodule"), ("E", "mass")])
    done = work.gxr("check", "j.toml")
    assert done.stdout.count("--- prompt of row") == 3
    assert "The X-ray shows clear lungs." in done.stdout
    assert "5 rows, 4 usable, 1 not" in done.stdout
    assert "e.g. B" in done.stdout
    assert not (work.folder / "outputs").exists()


def test_a_date_in_the_output_is_the_day_of_the_first_invocation(work):
    work.job(SLOW + "output = 'outputs/{name}-{date}'\n")
    child = work.start("run", "j.toml")
    today = time.strftime("%Y-%m-%d")
    wait_for = work.folder / f"outputs/j-{today}"
    deadline = time.monotonic() + 30
    while not list(wait_for.glob("parts/*.parquet")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    wait_for.rename(work.folder / "outputs/j-2020-01-31")
    work.run("--set", "echo.tokens_per_second=0")
    assert len(work.results("outputs/j-2020-01-31")) == 60
    assert [path.name for path in (work.folder / "outputs").iterdir()] == ["j-2020-01-31"]


def test_a_csv_for_excel_contains_no_formulas(work):
    work.table([("A", "=1+1"), ("B", 'clear, "normal"\nlungs'), ("C", "\uff1dSUM(A1)"), ("D", " -2")])
    work.run()
    done = work.gxr("export", "outputs/j", "--format", "csv")
    assert "4 rows" in done.stdout
    assert "findings" in done.stdout
    raw = (work.folder / "outputs/j/results.csv").read_bytes()
    assert raw.startswith(b'\xef\xbb\xbf"case_id","findings"')
    assert raw.count(b"\r\n") == 5
    lines = raw.decode("utf-8-sig")
    assert '"\'=1+1"' in lines
    assert '"\'\uff1dSUM(A1)"' in lines
    assert '"\' -2"' in lines
    assert '"clear, ""normal""\nlungs"' in lines


def test_an_unfinished_run_exports_only_when_asked(work):
    work.run(expect=4, faults={"crash_after": 20})
    assert "--partial" in work.gxr("export", "outputs/j", expect=2).stderr
    assert "20 rows, of an unfinished run" in work.gxr("export", "outputs/j", "--partial").stdout


def test_a_rerun_that_was_interrupted_is_unfinished_though_earlier_results_are_there(work):
    work.run()
    work.table([(row["case_id"], f"edited finding {row['case_id']}") for row in work.results()])
    work.run(expect=4, faults={"crash_after": 20})
    assert "This run is unfinished: 40 rows left" in work.gxr("export", "outputs/j", expect=2).stderr
    work.gxr("export", "outputs/j", "--partial", "--format", "jsonl")
    lines = (work.folder / "outputs/j/results.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert all("edited finding" in json.loads(line)["gxr_text"] for line in lines)


def test_a_retry_that_was_killed_exports_the_newer_texts(work):
    work.run("--set", "sampling.max_new_tokens=1", expect=None)
    before = {row["gxr_row_id"]: row["gxr_text"] for row in work.results()}
    work.run("--retry", "truncated", "--set", "sampling.max_new_tokens=60", expect=4, faults={"crash_after": 20})
    work.gxr("export", "outputs/j", "--format", "jsonl")
    rows = map(json.loads, (work.folder / "outputs/j/results.jsonl").read_text().splitlines())
    assert sum(row["gxr_text"] != before[row["gxr_row_id"]] for row in rows) == 20


def test_parquet_columns_keep_their_types(work):
    table = pa.table(
        {
            "case_id": pa.array([1, 2], pa.int64()),
            "findings": ["clear", "effusion"],
            "age": pa.array([65.0, None]),
            "tags": pa.array([["a"], []], pa.list_(pa.string())),
        }
    )
    pq.write_table(table, work.folder / "f.parquet")
    work.job("[engine]\nkind = 'echo'\n", head="path = 'f.parquet'\nid_column = 'case_id'\n")
    work.run()
    made = pq.read_table(work.folder / "outputs/j/results.parquet")
    assert made.schema.field("case_id").type == pa.int64()
    assert made.schema.field("tags").type == pa.list_(pa.string())
    assert made["gxr_row_id"].to_pylist() == ["1", "2"]
    assert "a 65-year-old patient" in made["gxr_text"][0].as_py()
    work.gxr("export", "outputs/j", "--format", "csv")


def test_templates_can_be_listed_shown_and_tried(work):
    assert "  requires findings\n  optional age, sex" in work.gxr("templates", "list").stdout
    assert "{{ topic" in work.gxr("templates", "show", "educational").stdout
    shown = work.gxr("templates", "render", "j.toml", "--rows", "2", "--template", "basic").stdout
    assert "Analyze this chest X-ray showing finding number 1." in shown


def test_progress_is_a_line_if_stderr_is_not_a_terminal(work):
    code = (
        "import time\nfrom gxr_batch.cli import progress\nprogress._LINE_SECONDS = 0.2\n"
        "from gxr_batch.cli import main\nmain(['run', 'j.toml'])"
    )
    work.job(SLOW)
    work.table(20)
    done = subprocess.run([sys.executable, "-c", code], cwd=work.folder, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "rows/min" in line]
    assert lines
    assert all("tok/s" in line and "left" in line and "failed" in line for line in lines)


def test_a_full_disk_is_exit_4_and_sealed_rows_are_kept(work):
    work.job("[engine]\nkind = 'echo'\n")
    work.table([(f"C{n}", f"finding {n} " + os.urandom(400).hex()) for n in range(400)])
    limited = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\nimport signal\n"
    limited += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nfrom gxr_batch.cli import main\nmain(['run', 'j.toml'])"
    done = subprocess.run(
        [sys.executable, "-c", limited], cwd=work.folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert work.run_json()["ok"] == 400


CRASH_BEFORE_RESULTS = """
import os
from gxr_batch.ledger import run_writer
run_writer.write_results = lambda *_: os._exit(9)
from faulty_cli import main
main(['--faults', '{"fail_every": 3}', 'run', 'j.toml', '--retry', 'failed'])
"""


def test_a_crash_just_before_the_results_are_written_leaves_no_stale_results(work):
    work.faults = {"fail_every": 3}
    work.run(expect=3)
    stale = [row["gxr_attempt"] for row in work.results()]
    command = [sys.executable, "-c", CRASH_BEFORE_RESULTS]
    here = {"PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=work.folder, env=os.environ | here, capture_output=True, check=False)
    assert done.returncode == 9
    work.run(expect=None)
    assert [row["gxr_attempt"] for row in work.results()] != stale


def test_a_retry_that_is_stopped_is_not_finished(work):
    work.job("[engine]\nkind = 'echo'\n[run]\nmax_failed = 'off'\n")
    work.run(expect=3, faults={"fail_containing": "finding"})
    slow = ["--set", "engine.slots=1", "--set", "echo.tokens_per_second=60", "--set", "run.checkpoint_seconds=0.1"]
    child = work.start("run", "j.toml", "--retry", "failed", *slow)
    wait_for_parts(work, len(work.parts()) + 1)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 75
    assert work.manifest()["invocations"][-1]["outcome"] == "terminate"
    assert 0 < work.run_json("--retry", "failed")["generated_now"] < 60


def test_a_retry_of_named_rows_affects_only_these_rows(work):
    work.run(expect=4, faults={"crash_after": 20, "fail_every": 2})
    failed = next(
        row["gxr_row_id"]
        for path in work.parts()
        for row in pq.read_table(path).to_pylist()
        if row["gxr_status"] == "failed"
    )
    summary = json.loads(work.run("--retry", "failed", "--row", failed, "--json", expect=75).stdout)
    assert summary["generated_now"] == 1


def test_the_header_of_an_export_matches_its_rows(work):
    work.run()
    work.table([(f"C{n}", "x", f"finding number {n}") for n in range(61)], ("case_id", "extra", "findings"))
    work.job("[engine]\nkind = 'echo'\n[run]\nmax_failed = 1\n")
    (work.folder / "crash.toml").write_text((work.folder / "j.toml").read_text() + "")
    work.run("--set", "run.max_failed=1", expect=None, faults={"fail_containing": "finding"})
    work.gxr("export", "outputs/j", "--format", "csv")
    header, first = (work.folder / "outputs/j/results.csv").read_text("utf-8-sig").splitlines()[:2]
    assert header.count('","') == first.count('","')


@pytest.mark.parametrize("target", ["outputs/j/run.json", "outputs/j/input.parquet", "f.csv", "/dev/full", "no/x.csv"])
def test_an_export_never_replaces_a_file_that_is_not_an_export(work, target):
    work.run()
    path = work.folder / target
    before = path.read_bytes() if path.is_file() else None
    assert "--to" in work.gxr("export", "outputs/j", "--to", target, expect=2).stderr
    assert before is None or path.read_bytes() == before


def test_a_changed_default_template_with_a_template_column_is_detected(work):
    work.table([("A", "clear", "basic"), ("B", "clear", "")], ("case_id", "findings", "kind"))
    work.job("[prompt]\ntemplate = 'basic'\ntemplate_column = 'kind'\n[engine]\nkind = 'echo'\n")
    work.run()
    summary = work.run_json("--set", "prompt.template=clinical_case")
    assert summary["drift"] == {"new": 0, "edited": 1, "removed": 0, "kept": 1}
    assert [row["gxr_template"] for row in work.results()] == ["basic", "clinical_case"]


def test_fresh_works_if_the_lock_file_was_not_copied(work):
    work.run()
    (work.folder / "outputs/j/run.lock").unlink()
    assert work.run_json("--fresh")["generated_now"] == 60
    assert len(list((work.folder / "outputs").glob("j.before-*"))) == 1


def test_one_unreadable_run_does_not_hide_the_others(work):
    work.run()
    broken = work.folder / "outputs" / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    shown = work.gxr("status", "outputs").stdout
    header, broken, sound = shown.splitlines()
    assert header.split() == ["run", "date", "done", "left", "size", "state"]
    assert broken.startswith("outputs/broken")
    assert "unreadable: The run's manifest is damaged." in broken
    assert sound.split()[:3] == ["outputs/j", work.manifest()["created_at"][:10], "60"]
    assert sound.endswith("finished")


def test_many_runs_are_shown_in_an_aligned_table(work):
    work.run()
    work.run("--output", "outputs/a-much-longer-name", "--limit", "2")
    lines = work.gxr("status", "outputs").stdout.splitlines()
    ends = [line.index(cell) + len(cell) for line, cell in zip(lines, ("done", " 2 ", " 60 "), strict=True)]
    assert ends[1] - 1 == ends[2] - 1 == ends[0]


def test_a_stop_is_announced_when_it_begins(work):
    work.table(LONG)
    work.job(SLOW)
    process = work.start("run", "j.toml", "--set", "run.grace_seconds=3")
    wait_for_parts(work, 1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopping after Ctrl-C" in stderr
    assert "may finish within 3 s; Ctrl-C again stops at once" in stderr


def test_a_stop_before_any_row_finished_reports_that_rows_need_more_time(work):
    work.job("[engine]\nkind = 'echo'\n[echo]\ntokens_per_second = 1\n")
    done = work.run("--time-limit", "2s", expect=75)
    assert "no row was finished" in done.stdout


def test_a_folder_that_cannot_be_created_is_not_reported_as_missing(work):
    message = work.run("--output", "/proc/x", expect=4).stderr
    assert "cannot be created there" in message
    assert "choose another --output" in message


def test_a_key_in_the_wrong_section_names_the_right_one(work):
    assert "did you mean engine.memory_limit?" in work.run("--set", "run.memory_limit=20GiB", expect=2).stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_while_the_program_loads_stops_it_cleanly(work, number):
    process = work.start("run", "j.toml")
    time.sleep(0.35)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    # On a fast machine the run may have finished by then; on a slow one Python itself may still be starting.
    assert process.returncode in {75, 0, -number}
    assert "Traceback" not in stderr
