"""Identifier screening of whole runs: what is flagged, what is held back, and how a person releases it."""

from __future__ import annotations

import csv
import json
import os
import pwd
from pathlib import Path

import openpyxl
import pyarrow.parquet as pq
import pytest
from running import Workplace, without_times

import gxr_batch
from gxr_batch.job import Job

ROWS = [(f"C{number}", f"finding number {number}") for number in range(10)]
ROWS[3] = ("C3", "MRN 4455667: small left effusion")
ROWS[7] = ("C7", "Seen by Dr. Okafor: call 555-201-8841, nodule of 2.6 cm")
ERRORS = {"C3": "identifier screening: mrn", "C7": "identifier screening: name, phone"}
HOLD = "[engine]\nkind = 'echo'\n[privacy]\nidentifiers = 'hold'\n"
SECRETS = ("4455667", "Okafor", "555-201-8841", "Greyson")
WORDS_OF_ITS_OWN = "Doctor Greyson asks about {{ findings }}"  # an engine that echoes it answers with a name


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    made = Workplace(tmp_path)
    made.table(ROWS)
    made.job(HOLD)
    return made


def by_case(work: Workplace) -> dict[str, dict]:
    return {row["case_id"]: row for row in work.results()}


def hits(row: dict) -> list[str]:
    """Return only the row's screening flags."""
    return [flag for flag in row["gxr_flags"] if flag.startswith(("identifier", "possible_identifier"))]


def held(work: Workplace) -> dict[str, str]:
    return {name: row["gxr_error"] for name, row in by_case(work).items() if row["gxr_status"] == "held"}


def events(work: Workplace, name: str) -> list[dict]:
    lines = (work.folder / "outputs/j/log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == name]


def own_words(work: Workplace, sections: str = HOLD) -> None:
    (work.folder / "own.j2").write_text(WORDS_OF_ITS_OWN)
    work.job(f"[prompt]\ntemplate = 'own.j2'\n{sections}")


def test_by_default_rows_run_and_are_flagged_by_rule(work):
    work.job("[engine]\nkind = 'echo'\n")
    work.run()
    rows = by_case(work)
    assert hits(rows["C3"]) == ["identifier_in_input:mrn", "identifier_in_output:mrn"]
    assert hits(rows["C7"]) == [
        "identifier_in_input:name", "identifier_in_input:phone",
        "identifier_in_output:name", "identifier_in_output:phone",
    ]  # fmt: skip
    assert all(hits(row) == [] for name, row in rows.items() if name not in ERRORS)


def test_screening_can_be_disabled(work):
    work.run("--set", "privacy.identifiers=off")
    assert all((row["gxr_status"], hits(row)) == ("ok", []) for row in work.results())


def test_a_hit_keeps_a_row_from_the_engine(work):
    done = work.run(expect=3, faults={"kill_containing": "4455667"})
    assert "8 generated, 0 failed, 2 held, 0 left" in done.stdout
    assert "--retry held" in done.stdout
    assert held(work) == ERRORS
    row = by_case(work)["C7"]
    assert (row["gxr_text"], row["gxr_finish_reason"], row["gxr_attempt"]) == (None, "error", 0)
    assert (row["gxr_new_tokens"], row["gxr_seconds_generating"]) == (0, None)
    assert hits(row) == ["identifier_in_input:name", "identifier_in_input:phone"]
    listed = pq.read_table(work.folder / "outputs/j/failed.parquet").to_pylist()
    assert {row["case_id"]: row["gxr_error"] for row in listed} == ERRORS
    assert work.manifest()["invocations"][-1]["outcome"] == "finished"


def test_a_run_with_held_rows_is_finished_and_stays_so(work):
    work.run(expect=3)
    before = work.results()
    assert "nothing left to do" in work.run(expect=3).stdout
    assert work.run_json("--retry", "failed", expect=3)["generated_now"] == 0
    assert without_times(work.results()) == without_times(before)
    assert "2 held" in work.gxr("status", "outputs").stdout


def test_text_that_only_the_prompt_contains_is_also_a_hit(work):
    work.table(
        [("A", "92", "clear lungs"), ("B", "89", "clear lungs"), ("C", "90+", "clear")], ("case_id", "age", "findings")
    )
    work.run(expect=3)
    assert held(work) == dict.fromkeys("AC", "identifier screening: age_over_89")


def test_a_column_that_the_template_does_not_use_is_not_screened(work):
    work.table([("A", "clear lungs", "Dr. Okafor, MRN 4455667")], ("case_id", "findings", "note"))
    work.run()


def test_numbers_and_dates_of_parquet_are_screened(work):
    import datetime as dt

    import pyarrow as pa

    table = {
        "case_id": ["A", "B"],
        "findings": ["x", "y"],
        "age": [4455667, 40],
        "history": [None, dt.date(2019, 3, 4)],
    }
    pq.write_table(pa.table(table), work.folder / "f.parquet")
    work.job(HOLD, head="path = 'f.parquet'\nid_column = 'case_id'\n")
    work.run(expect=3)
    assert held(work) == {"A": "identifier screening: mrn", "B": "identifier screening: date"}


def test_hits_in_the_template_and_the_system_text_are_reported_once_and_hold_no_row(work):
    own_words(work, "system = 'Write to the_office@example.org'\n[engine]\nkind = 'echo'\n")
    done = work.run()
    assert "the template own.j2 itself: name" in done.stderr
    assert "prompt.system itself: email" in done.stderr
    assert done.stderr.count("screening found something in the text of") == 2
    flags = {name: hits(row) for name, row in by_case(work).items()}
    assert flags["C0"] == ["identifier_in_output:name"]  # the echo engine repeats them
    assert flags["C7"][:2] == ["identifier_in_input:name", "identifier_in_input:phone"]  # its own name is in the cell
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS)


def test_a_held_answer_stays_in_the_part_and_goes_nowhere_else(work):
    own_words(work)
    work.run("--limit", "3", expect=3)
    rows = by_case(work)
    assert held(work) == dict.fromkeys(rows, "identifier screening of the output: name")
    assert {(row["gxr_text"], row["gxr_attempt"]) for row in rows.values()} == {(None, 1)}
    assert all("Greyson" in text for text in pq.read_table(work.parts()[0])["gxr_text"].to_pylist())
    run = work.folder / "outputs/j"
    for form in (("csv", "--partial"), ("csv-plain",), ("jsonl",), ("parquet",), ("openai-batch",), ("xlsx",)):
        done = work.gxr("export", "outputs/j", "--format", *form)
        assert "held rows: 3, without cells and texts (--include-held shows them)" in done.stdout
    assert not any("Greyson" in path.read_text("utf-8-sig") for path in run.glob("results*.[cj]s*"))
    assert "Greyson" not in str(pq.read_table(run / "results-export.parquet").to_pylist())
    cells = [
        cell for sheet in openpyxl.load_workbook(run / "results.xlsx") for cell in sheet.iter_rows(values_only=True)
    ]
    assert "Greyson" not in str(cells)
    assert "Greyson" not in str(gxr_batch.read_results(run).to_dict())


def test_a_held_answer_is_shown_on_request(work):
    own_words(work)
    work.run("--limit", "3", expect=3)
    run = work.folder / "outputs/j"
    done = work.gxr("export", "outputs/j", "--format", "csv", "--include-held")
    assert "held rows: 3, with cells and texts" in done.stdout
    with (run / "results-with-held.csv").open(encoding="utf-8-sig") as file:
        assert all("Greyson" in row["gxr_text"] and row["gxr_status"] == "held" for row in csv.DictReader(file))
    work.gxr("export", "outputs/j", "--format", "openai-batch", "--include-held")
    line = json.loads((run / "results-with-held-openai-batch.jsonl").read_text().splitlines()[0])
    assert "Greyson" in line["response"]["body"]["choices"][0]["message"]["content"]
    assert line["error"]["message"] == "identifier screening of the output: name"
    assert "Greyson" in gxr_batch.read_results(run, include_held=True)["gxr_text"][0]
    assert "Greyson" not in str(work.results())


def test_an_unfinished_run_shows_held_answers_only_with_partial(work):
    own_words(work)
    work.run(expect=4, faults={"crash_after": 4})
    assert "--partial" in work.gxr("export", "outputs/j", "--include-held", expect=2).stderr
    assert "held rows: 6, with cells and texts" in work.gxr("export", "outputs/j", "--include-held", "--partial").stdout


def test_a_person_releases_one_row_and_it_is_recorded(work):
    work.run(expect=3)
    done = work.run("--retry", "held", "--row", "C3", expect=3)
    me = pwd.getpwuid(os.getuid()).pw_name
    assert f"1 held row is released by {me}" in done.stderr
    assert held(work) == {"C7": ERRORS["C7"]}
    row = by_case(work)["C3"]
    assert (row["gxr_status"], row["gxr_attempt"], row["gxr_error"]) == ("ok", 1, None)
    assert hits(row) == ["identifier_in_input:mrn", "identifier_in_output:mrn"]
    released = work.manifest()["invocations"][-1]["released"]
    assert (released["by"], list(released["rows"])) == (me, ["C3"])
    assert released["at"][:4].isdigit()
    (event,) = events(work, "released")
    assert (event["by"], event["rows"], event["row_ids"]) == (me, 1, ["C3"])


def test_released_rows_get_the_texts_that_they_would_have_had(work, tmp_path_factory):
    other = Workplace(tmp_path_factory.mktemp("open"))
    other.table(ROWS)
    other.run()
    work.run(expect=3)
    summary = work.run_json("--retry", "held", "--set", "run.max_attempts=1")
    assert (summary["generated_now"], summary["held"]) == (2, 0)
    assert without_times(work.results()) == without_times(other.results())
    assert work.run_json("--retry", "held")["generated_now"] == 0


def test_a_release_is_remembered_while_the_content_is_the_same(work):
    work.run(expect=3)
    work.run("--retry", "held", "--row", "C3", expect=3, faults={"fail_containing": "4455667"})
    assert by_case(work)["C3"]["gxr_status"] == "failed"
    work.run("--retry", "failed", expect=3)
    assert (by_case(work)["C3"]["gxr_status"], by_case(work)["C3"]["gxr_attempt"]) == ("ok", 2)
    edited = [(name, f"{cell}, new" if name == "C3" else cell) for name, cell in ROWS]
    work.table(edited)
    work.run(expect=3)
    assert held(work) == ERRORS
    work.table(ROWS)
    work.run(expect=3)
    assert held(work) == {"C7": ERRORS["C7"]}


def test_an_interrupted_release_can_be_repeated(work):
    work.run(expect=3)
    work.run("--retry", "held", expect=4, faults={"crash_after": 1})
    assert list(work.manifest()["invocations"][-1]["released"]["rows"]) == ["C3", "C7"]
    left = work.run_json(expect=3)
    assert (left["held"], left["generated_now"]) == (1, 0)
    assert work.run_json("--retry", "held")["generated_now"] == 1


def test_a_released_answer_is_flagged_and_no_longer_held(work):
    own_words(work)
    work.run("--limit", "3", expect=3)
    work.run("--limit", "3", "--retry", "held")
    rows = work.results()
    assert {(row["gxr_status"], row["gxr_attempt"]) for row in rows} == {("ok", 2)}
    assert all("Greyson" in row["gxr_text"] and hits(row) == ["identifier_in_output:name"] for row in rows)


@pytest.mark.parametrize("mode", ["off", "flag", "auto"])
def test_a_weaker_setting_releases_no_row(work, mode):
    work.run(expect=3)
    softer = ("--set", f"privacy.identifiers={mode}")
    work.table([*ROWS, ("C10", "MRN 112233, clear lungs")])
    summary = work.run_json(*softer, expect=3)
    assert (summary["held"], summary["generated_now"]) == (2, 1)
    summary = work.run_json(*softer, "--set", "sampling.samples_per_row=2", expect=3)
    assert (summary["held"], summary["ok"]) == (4, 18)
    summary = work.run_json(*softer, "--set", "sampling.samples_per_row=2", "--retry", "held")
    assert (summary["held"], summary["ok"]) == (0, 22)


def test_held_rows_do_not_count_as_failed(work):
    work.table([(f"C{number}", f"MRN 44556{number}") for number in range(60)])
    summary = work.run_json("--set", "run.max_failed=1", expect=3)
    assert (summary["held"], summary["withheld_now"], summary["rejected_now"]) == (60, 60, 0)
    assert work.manifest()["invocations"][-1]["withheld"] == 60
    (sealed,) = events(work, "part_sealed")
    assert (sealed["rows"], sealed["failed"], sealed["held"]) == (60, 0, 60)
    assert len(events(work, "row_held")) == 60


def test_a_run_that_crashes_holds_the_same_rows_when_resumed(work, tmp_path_factory):
    other = Workplace(tmp_path_factory.mktemp("whole"))
    other.table(ROWS)
    other.job(HOLD)
    other.run(expect=3)
    work.run(expect=4, faults={"crash_after": 3})
    work.run(expect=3)
    assert without_times(work.results()) == without_times(other.results())


def test_check_counts_rows_by_rule_and_names_ids(work):
    done = work.gxr("check", "j.toml")
    shown = " ".join(done.stdout.split())
    assert "screening (hold) found something in 2 rows: mrn 1, name 1, phone 1; e.g. C3, C7; " in shown
    assert "a run holds these rows" in shown
    done = work.gxr("check", "j.toml", "--json")
    assert json.loads(done.stdout)["identifiers"] == {
        "screening": "hold", "rows": 2, "rules": {"mrn": 1, "name": 1, "phone": 1}, "row_ids": ["C3", "C7"],
    }  # fmt: skip
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS)
    assert "screening is off" in work.gxr("check", "j.toml", "--set", "privacy.identifiers=off").stdout


def test_manifest_log_and_messages_contain_rule_names_and_no_text(work):
    own_words(work)
    said = [work.run(expect=3), work.run("--retry", "held", "--row", "C7", "--json", expect=3)]
    said += [work.gxr("status", "outputs"), work.gxr("status", "outputs", "--json")]
    written = [(work.folder / "outputs/j" / name).read_text() for name in ("run.json", "log.jsonl")]
    output = "".join(written + [done.stdout + done.stderr for done in said])
    assert "identifier screening: mrn" in output
    assert not any(secret in output for secret in SECRETS)


def test_rows_for_an_api_are_held_unless_the_job_says_otherwise():
    def screening(kind: str, **keys: str) -> str:
        return Job.model_validate({"name": "j", "input": {"path": "x"}, "privacy": keys}).privacy.screening(kind)

    assert [screening(kind) for kind in ("transformers", "generate", "echo", "vllm", "api")] == ["flag"] * 4 + ["hold"]
    assert screening("api", identifiers="flag") == "flag"
    assert screening("echo", identifiers="hold") == "hold"


def test_a_damaged_record_of_a_release_is_a_damaged_manifest(work):
    work.run(expect=3)
    work.run("--retry", "held")
    path = work.folder / "outputs/j/run.json"
    manifest = work.manifest()
    for rows in ([], None, {"C3": 7}):
        manifest["invocations"][-1]["released"] = {"rows": rows}
        path.write_text(json.dumps(manifest))
        assert "manifest is damaged" in work.run(expect=2).stderr
