"""A job that reads the run of another one: columns, ids, which rows, and that no row is lost or generated twice."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from datetime import date
from pathlib import Path

import openpyxl
import pytest
from places import DATA
from running import Workplace, without_times

from gxr_batch import read_results
from gxr_batch.errors import TableError
from gxr_batch.job import InputSection
from gxr_batch.ledger.reviews import add_reviews, judged_sha256, one_import
from gxr_batch.records import Key, Review, result_schema, review_schema
from gxr_batch.rows.columns import FieldMap
from gxr_batch.rows.ingest import ingest
from gxr_batch.rows.survey import survey
from gxr_batch.run.run_source import run_source

FIRST = "outputs/j"
SECOND = "outputs/second"


class TwoJobs(Workplace):
    """A workplace with a second job, which reads the run of the first."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.table(40)
        (folder / "t.md.j2").write_text("Shorten: {{ source_review_text or source_text }}")
        self.second_job()

    def second_job(self, keys: str = "", *, path: str = FIRST, name: str = "second", template: str = "t.md.j2") -> None:
        (self.folder / f"{name}.toml").write_text(
            f"name = '{name}'\n[input]\npath = '{path}'\n{keys}\n[prompt]\ntemplate = '{template}'\n"
            "[engine]\nkind = 'echo'\n"
        )

    def second(self, *arguments: str, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        return self.gxr("run", "second.toml", *arguments, expect=expect)

    def review(self, status: str, numbers: range, *, text: str | None = None, reviewer: str = "Ada") -> None:
        of_id = {row["gxr_row_id"]: row for row in self.results()}
        rows = [of_id[f"C{number}"] for number in numbers]
        reviews = [
            Review(
                key=Key(row["gxr_row_id"], 1),
                judged_sha256=judged_sha256(row["gxr_text"], row["gxr_prompt_sha256"]),
                status=status,
                reviewer=reviewer,
                reviewed_at=date(2026, 5, 4),
                quality=None,
                errors=(None,) * 12,
                text=text,
                comment=None,
            )
            for row in rows
        ]
        with one_import(self.folder / FIRST):
            add_reviews(self.folder / FIRST, reviews, {})


@pytest.fixture
def jobs(tmp_path) -> TwoJobs:
    return TwoJobs(tmp_path)


def done_again(jobs: TwoJobs) -> int:
    """Run the second job and return how many rows it generated."""
    before = len(jobs.manifest(SECOND)["invocations"]) if (jobs.folder / SECOND).exists() else 0
    jobs.second()
    new = jobs.manifest(SECOND)["invocations"][before:]
    return sum(entry["done"] for entry in new)


def test_the_columns_of_table_and_results_and_the_ids_are_there(jobs):
    jobs.run()
    jobs.second()
    first, second = jobs.results(), jobs.results(SECOND)
    assert [row["gxr_row_id"] for row in second] == [row["gxr_row_id"] for row in first]
    for before, after in zip(first, second, strict=True):
        assert after["findings"] == before["findings"]
        for name in result_schema().names:
            assert after["source_" + name.removeprefix("gxr_")] == before[name], name
        assert before["gxr_text"] in after["gxr_text"], "the echo engine repeats its prompt"
    assert {"source_" + name.removeprefix("gxr_") for name in review_schema().names} <= second[0].keys()
    assert "nothing left to do" in jobs.second().stdout


def test_several_samples_are_rows_with_their_numbers_in_the_ids(jobs):
    jobs.job("[engine]\nkind = 'echo'\n[sampling]\nsamples_per_row = 3\n")
    jobs.table([("A", "Clear lungs."), ("A/1", "Small effusion.")])
    jobs.run()
    jobs.second()
    rows = jobs.results(SECOND)
    assert [row["gxr_row_id"] for row in rows] == ["A/1", "A/2", "A/3", "A/1/1", "A/1/2", "A/1/3"]
    assert [row["source_sample"] for row in rows] == [1, 2, 3] * 2
    assert [row["source_text"] for row in rows] == [row["gxr_text"] for row in jobs.results()]


def test_another_id_column_can_be_named(jobs):
    jobs.table([("A", "x1", "Clear lungs."), ("B", "x2", "Effusion.")], ("case_id", "other", "findings"))
    jobs.run()
    for keys, ids in (("id_column = 'case_id'", ["A", "B"]), ("id_column = 'other'", ["x1", "x2"])):
        jobs.second_job(keys)
        jobs.second("--fresh")
        assert [row["gxr_row_id"] for row in jobs.results(SECOND)] == ids
    jobs.second_job("id_column = 'othre'")
    assert "did you mean other?" in jobs.second("--fresh", expect=2).stderr


def test_failed_rows_are_read_unless_only_generated_ones_are_wanted(jobs):
    jobs.run(expect=3, faults={"fail_containing": "number 7"})
    done = jobs.second(expect=3)
    assert "1 row failed and have no source_text" not in done.stderr, "one row has"
    assert "1 row failed and has no source_text" in done.stderr
    failed = [row for row in jobs.results(SECOND) if row["gxr_status"] == "failed"]
    assert [(row["gxr_row_id"], row["source_status"]) for row in failed] == [("C7", "failed")]
    jobs.second_job("only = 'ok'")
    done = jobs.second("--fresh")
    assert "39 rows read, 1 not generated and left out" in done.stderr
    assert "C7" not in {row["gxr_row_id"] for row in jobs.results(SECOND)}


def test_only_approved_rows_with_the_corrected_text(jobs):
    jobs.run()
    jobs.review("approved", range(5))
    jobs.review("rejected", range(5, 8))
    jobs.review("approved_with_edits", range(8, 10), text="A better text.")
    jobs.review("rejected", range(4, 5), reviewer="Bob")
    jobs.second_job("only = 'approved'")
    done = jobs.second()
    assert "6 rows read, 34 not approved and left out" in done.stderr
    rows = {row["gxr_row_id"]: row for row in jobs.results(SECOND)}
    assert list(rows) == ["C0", "C1", "C2", "C3", "C8", "C9"]
    assert rows["C8"]["source_review_status"] == "approved_with_edits"
    assert "Shorten: A better text." in rows["C8"]["gxr_text"]
    assert rows["C0"]["source_text"] in rows["C0"]["gxr_text"]


def test_a_review_that_changes_a_prompt_runs_its_row_again_and_no_other(jobs):
    jobs.run()
    assert done_again(jobs) == 40
    jobs.review("approved", range(5))
    assert done_again(jobs) == 0, "no prompt uses the status"
    assert jobs.results(SECOND)[0]["source_review_status"] == "approved"
    jobs.review("approved_with_edits", range(8, 10), text="A better text.")
    assert done_again(jobs) == 2
    assert "Shorten: A better text." in jobs.results(SECOND)[8]["gxr_text"]


def test_held_rows_are_never_read(jobs):
    jobs.job("[engine]\nkind = 'echo'\n[privacy]\nidentifiers = 'hold'\n")
    jobs.table([("A", "Clear lungs."), ("B", "MRN: 12345678. Effusion."), ("C", "Nodule.")])
    jobs.run(expect=3)
    done = jobs.second()
    assert "1 row held by identifier screening: left out" in done.stderr
    assert [row["gxr_row_id"] for row in jobs.results(SECOND)] == ["A", "C"]
    everything = b"".join(path.read_bytes() for path in (jobs.folder / SECOND).rglob("*") if path.is_file())
    assert "12345678" not in str(read_results(jobs.folder / SECOND).to_dict())
    assert b"12345678" not in everything


def test_an_unfinished_run_is_read_as_far_as_it_is(jobs):
    jobs.run("--limit", "10")
    jobs.table(10)
    jobs.run()
    jobs.table(40)
    jobs.run(expect=None, faults={"crash_after": 12})
    ready = len(read_results(jobs.folder / FIRST))
    assert 10 <= ready < 40
    done = jobs.second()
    assert f"this run is unfinished: {ready} of 40 rows so far" in done.stderr
    assert len(jobs.results(SECOND)) == ready
    jobs.run()
    assert done_again(jobs) == 40 - ready
    assert [row["gxr_row_id"] for row in jobs.results(SECOND)] == [f"C{number}" for number in range(40)]


def test_a_third_job_reads_the_second(jobs):
    jobs.run()
    jobs.second()
    (jobs.folder / "u.md.j2").write_text("Shorter: {{ source_text }} / {{ source_source_text }}")
    jobs.second_job(path=SECOND, name="third", template="u.md.j2")
    jobs.gxr("run", "third.toml")
    first, second, third = jobs.results(), jobs.results(SECOND), jobs.results("outputs/third")
    assert [row["source_text"] for row in third] == [row["gxr_text"] for row in second]
    assert [row["source_source_text"] for row in third] == [row["gxr_text"] for row in first]
    assert [row["gxr_row_id"] for row in third] == [row["gxr_row_id"] for row in first]


def test_a_column_of_the_table_with_the_name_of_a_result_gets_one_more_prefix(jobs):
    jobs.table([("A", "Clear lungs.", "the hospital")], ("case_id", "findings", "source_model"))
    jobs.run()
    done = jobs.second()
    assert "source_model is called source_source_model here" in done.stderr
    (row,) = jobs.results(SECOND)
    assert (row["source_model"], row["source_source_model"]) == ("echo", "the hospital")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("sheet = 'Cases'", "input.sheet has no effect on this run"),
        ("skip_lines = 2", "input.skip_lines has no effect on this run"),
        ("only = 'aproved'", "input.only"),
    ],
)
def test_a_key_without_effect_is_refused(jobs, keys, message):
    jobs.run()
    jobs.second_job(keys)
    assert message in jobs.second(expect=2).stderr


def test_only_is_refused_for_a_file(jobs):
    jobs.job("[engine]\nkind = 'echo'\n", head="path = 'f.csv'\nonly = 'ok'\n")
    assert "input.only has no effect on this file" in jobs.run(expect=2).stderr


def test_a_job_never_reads_the_run_that_it_writes(jobs):
    jobs.run()
    before = {path: path.read_bytes() for path in (jobs.folder / FIRST).rglob("*") if path.is_file()}
    (jobs.folder / "link").symlink_to(FIRST)
    for path in (FIRST, "link"):
        jobs.job("[engine]\nkind = 'echo'\n", head=f"path = '{path}'\n")
        for verb in ("run", "check"):
            assert "would read the run that it writes" in jobs.gxr(verb, "j.toml", expect=2).stderr
    assert before == {path: path.read_bytes() for path in (jobs.folder / FIRST).rglob("*") if path.is_file()}


def test_check_and_render_show_the_prompts(jobs):
    jobs.run()
    text = jobs.results()[0]["gxr_text"]
    assert f"Shorten: {text}" in jobs.gxr("check", "second.toml").stdout
    assert f"Shorten: {text}" in jobs.gxr("templates", "render", "second.toml").stdout
    assert not (jobs.folder / SECOND).exists()


def test_a_results_file_and_its_folder_say_how_to_read_the_run(jobs):
    jobs.run()
    jobs.second_job("[input.columns]\nsource_text = 'gxr_text'", path=f"{FIRST}/results.parquet")
    message = jobs.second(expect=2).stderr
    assert "set input.path to the folder of a run" in message
    assert "source_text" in message
    jobs.second_job(path="outputs")
    assert f'to read the run, set input.path = "{FIRST}"' in jobs.second(expect=2).stderr
    message = jobs.gxr("init", FIRST, expect=2).stderr
    assert "This is the folder of a run" in message
    assert f'input.path = "{FIRST}"' in message


def test_the_workbook_shows_the_source_text_and_keeps_the_other_results_at_the_end(jobs):
    jobs.run()
    jobs.second()
    jobs.gxr("export", SECOND, "--format", "xlsx", "--to", "s.xlsx")
    sheet = openpyxl.load_workbook(jobs.folder / "s.xlsx")["Cases"]
    names = next([cell.value for cell in row] for row in sheet if row[0].value == "gxr_row_id")
    assert names.index("source_text") < names.index("gxr_text") < names.index("gxr_model") < names.index("source_seed")
    jobs.gxr("report", SECOND)


def test_an_emptied_selection_is_not_taken_for_the_end_of_the_rows(jobs):
    jobs.run()
    jobs.review("approved", range(5))
    jobs.second_job("only = 'approved'")
    jobs.second()
    shutil.rmtree(jobs.folder / FIRST / "reviews")
    assert "The table has no rows; the last time this ran it had 5" in jobs.second(expect=2).stderr
    assert len(jobs.results(SECOND)) == 5


def test_a_table_replaced_during_the_reading_is_noticed(jobs, tmp_path):
    jobs.run()
    section = InputSection(path=str(jobs.folder / FIRST))
    source = run_source(section)
    assert not source.changed()
    jobs.run("--retry", "truncated")  # reads the same table again
    assert not source.changed()
    jobs.table(20)
    jobs.run()
    assert source.changed()
    fields = FieldMap(templates={"t": ()}, default="t", columns={})
    with pytest.raises(TableError, match="changed while it was being read"):
        ingest(survey(section, [source]), fields, tmp_path / "copy", id_column="", prior=None, limit=None)


@pytest.mark.parametrize("name", sorted(path.name for path in (DATA / "runs").iterdir() if path.is_dir()))
@pytest.mark.parametrize("kind", ["finished", "unfinished", "retried"])
def test_runs_of_earlier_versions_are_inputs(tmp_path, name, kind):
    shutil.copytree(DATA / "runs" / name / kind, tmp_path, dirs_exist_ok=True)
    jobs = TwoJobs.__new__(TwoJobs)
    jobs.folder = tmp_path
    (tmp_path / "t.md.j2").write_text("Shorten: {{ source_text }}")
    jobs.second_job("only = 'ok'")
    jobs.second()
    first = read_results(tmp_path / FIRST)
    first = first[first["gxr_status"] == "ok"]
    second = jobs.results(SECOND)
    assert [row["source_text"] for row in second] == list(first["gxr_text"])
    assert len(second) == len({row["gxr_row_id"] for row in second})


def killed(jobs: TwoJobs, job: str, begun: Path, seconds: float) -> bool:
    """Start a job, kill it `seconds` after it made the file `begun`, and return whether it was still running."""
    child = jobs.start("run", job)
    while child.poll() is None and not begun.exists():
        time.sleep(0.005)
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return child.returncode == -signal.SIGKILL


@pytest.mark.parametrize("moments", [(0.0, 0.05), (0.2, 0.2), (0.5, 0.6)])
def test_kills_in_either_job_lose_no_row_and_generate_none_twice(tmp_path, moments):
    """Kill the first, kill the second, which reads the unfinished first one, then finish both."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, jobs = TwoJobs(tmp_path / "whole"), TwoJobs(tmp_path / "killed")
    whole.run()
    whole.second()
    slow = "[echo]\ntokens_per_second = 100\n[run]\ncheckpoint_seconds = 0.2\n"
    jobs.job(f"[engine]\nkind = 'echo'\nslots = 8\n{slow}")
    with (jobs.folder / "second.toml").open("a") as file:
        file.write(f"slots = 8\n{slow}")
    assert killed(jobs, "j.toml", jobs.folder / FIRST / "run.json", moments[0])
    killed(jobs, "second.toml", jobs.folder / SECOND / "run.lock", moments[1])
    known = set(read_results(jobs.folder / FIRST)["gxr_row_id"])
    assert len(known) < 40
    if (jobs.folder / SECOND / "run.json").exists():
        assert set(read_results(jobs.folder / SECOND)["gxr_row_id"]) <= known
    jobs.run()
    jobs.second()
    assert without_times(jobs.results()) == without_times(whole.results())
    ours, theirs = ([(row["gxr_row_id"], row["gxr_text"]) for row in one.results(SECOND)] for one in (jobs, whole))
    assert ours == theirs
