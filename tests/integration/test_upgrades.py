"""A run begun by one version can be read, resumed, exported and reviewed by the next."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import DATA
from running import Workplace, without_times

from gxr_batch import read_results
from gxr_batch.audit.comparison import as_json, compare_runs
from gxr_batch.audit.summary import summarise
from gxr_batch.errors import FingerprintError, LaterVersion, RunError
from gxr_batch.export import FORMATS, Choice, export
from gxr_batch.export.audit_workbooks import AuditChoice, export_audit
from gxr_batch.job import FORM_VERSION, job_file, recorded_job
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.manifest import load_manifest
from gxr_batch.ledger.parts import KEY_COLUMNS
from gxr_batch.ledger.run_format import FORMAT
from gxr_batch.records import PRIVATE_COLUMNS, part_schema
from gxr_batch.report import report
from gxr_batch.run.fingerprint import MODEL_FILES, NEUTRAL, refuse_other_texts

RUNS = DATA / "runs"
SETS = sorted(folder.name for folder in RUNS.iterdir() if folder.is_dir() and not folder.name.startswith("_"))
RETIRED = ("fail_every = 7\n",)  # lines of the old job files whose keys are gone


@pytest.fixture(params=SETS)
def old(request, tmp_path):
    """Return a function that copies one folder of a set of fixtures to a workplace."""

    def copy_out(name: str) -> Workplace:
        place = Workplace(tmp_path)
        shutil.copytree(RUNS / request.param / name, tmp_path, dirs_exist_ok=True)
        job = (tmp_path / "j.toml").read_text()
        for line in RETIRED:
            job = job.replace(line, "")
        (tmp_path / "j.toml").write_text(job)
        return place

    return copy_out


def texts(folder: Path) -> dict[tuple[str, int], str]:
    frame = read_results(folder, include_held=True)
    keys = zip(frame["gxr_row_id"], frame["gxr_sample"], strict=True)
    found = dict(zip(keys, frame["gxr_text"], strict=True))
    assert len(found) == len(frame)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_is_a_set_of_fixtures_of_every_format():
    formats = {json.loads((RUNS / name / "finished/outputs/j/run.json").read_text())["format"] for name in SETS}
    assert formats >= set(range(1, FORMAT)), "a format change needs fixtures of the version before"


def test_a_finished_run_of_an_earlier_version_is_read_with_its_reviews_and_has_nothing_left(old):
    place = old("finished")
    run = place.folder / "outputs/j"
    before = texts(run)
    status = Counter(read_results(run)["gxr_review_status"])
    assert (len(before), status["approved"], status["rejected"], status["approved_with_edits"]) == (48, 14, 2, 4)
    assert read_results(run)[["gxr_findings_kept", "gxr_findings_lost"]].isna().all(axis=None)
    assert place.run_json()["generated_now"] == 0
    assert texts(run) == before
    assert json.loads(place.gxr("status", "outputs/j", "--json").stdout)[0]["state"] == "finished"


@pytest.mark.parametrize(
    ("form", "rows"),
    [("xlsx", 48), ("csv", 48), ("jsonl", 48), ("parquet", 48), ("chat-jsonl", 16), ("openai-batch", 48)],
)
def test_a_finished_run_of_an_earlier_version_is_exported(old, form, rows):
    place = old("finished")
    place.gxr("export", "outputs/j", "--format", form, "--to", "made")
    made = place.folder / "made"
    if form == "csv":
        with made.open(newline="", encoding="utf-8-sig") as file:
            assert len(list(csv.reader(file))) == rows + 1
    elif form == "parquet":
        assert pq.read_table(made).num_rows == rows
    elif form == "xlsx":
        assert made.stat().st_size > 10_000
    else:
        assert len(made.read_text().splitlines()) == rows


def test_a_finished_run_of_an_earlier_version_is_reviewed_and_shown(old):
    place = old("finished")
    place.gxr("export", "outputs/j", "--format", "csv", "--to", "sheet.csv")
    with (place.folder / "sheet.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for row in rows[30:40]:
        row |= {"gxr_review_status": "approved", "gxr_reviewer": "Cy", "gxr_reviewed_at": "2026-11-30"}
    with (place.folder / "sheet.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    place.gxr("review", "import", "outputs/j", "sheet.csv")
    assert Counter(read_results(place.folder / "outputs/j")["gxr_review_status"])["approved"] == 24
    place.gxr("report", "outputs/j")
    assert (place.folder / "outputs/j/report.html").stat().st_size > 10_000


def test_a_killed_run_of_an_earlier_version_is_resumed_without_losing_or_repeating_a_row(old, tmp_path_factory):
    place = old("unfinished")
    run = place.folder / "outputs/j"
    before = texts(run)
    assert 0 < len(before) < 60
    place.run("--take-over", "--set", "echo.tokens_per_second=0")
    after = texts(run)
    assert len(after) == 60
    assert before.items() <= after.items()
    again = Workplace(tmp_path_factory.mktemp("again"))
    for name in ("j.toml", "f.csv"):
        shutil.copy(place.folder / name, again.folder / name)
    again.run("--set", "echo.tokens_per_second=0")
    assert without_times(place.results()) == without_times(again.results())


def test_failed_held_released_and_retried_rows_of_an_earlier_version_are_unchanged(old):
    place = old("retried")
    run = place.folder / "outputs/j"
    before = read_results(run, include_held=True)
    counts = Counter(before["gxr_status"])
    assert counts["failed"] >= 2
    assert counts["held"] == 2
    place.run(expect=3)
    after = read_results(run, include_held=True)
    assert before.equals(after)
    place.run("--retry", "held", expect=3)
    assert Counter(read_results(run)["gxr_status"])["held"] == 0
    place.run("--retry", "failed", "--set", "model.max_seq_length=2048", "--set", "run.max_attempts=9", expect=3)
    last = read_results(run).set_index("gxr_row_id")
    assert last.index[last["gxr_status"] == "failed"].tolist() == ["C007"]  # an empty cell stays empty
    assert last.loc["C011", "gxr_attempt"] > 1


def test_of_a_table_that_grew_since_an_earlier_version_only_new_rows_are_generated(old):
    place = old("grown")
    before = texts(place.folder / "outputs/j")
    output = place.run_json()
    assert (output["generated_now"], output["drift"]["new"], output["drift"]["kept"]) == (100, 100, 40)
    after = texts(place.folder / "outputs/j")
    assert len(after) == 140
    assert before.items() <= after.items()


def with_column(path: Path, name: str, values: pa.Array) -> None:
    table = pq.read_table(path)
    pq.write_table(table.append_column(name, values), path, write_page_checksum=True)


@pytest.mark.parametrize("name", [name for name in SETS if (RUNS / name / "formed").is_dir()])
def test_a_run_with_a_form_of_an_earlier_version_keeps_its_form_its_reviews_and_its_texts(name, tmp_path):
    place = Workplace(tmp_path)
    shutil.copytree(RUNS / name / "formed", tmp_path, dirs_exist_ok=True)
    before = texts(tmp_path / "outputs/j")
    assert "other settings: form" in place.run("--set", "form.request=X {headings}", expect=2).stderr
    place.run()
    frame = read_results(tmp_path / "outputs/j")
    assert len(frame) == 30
    after = texts(tmp_path / "outputs/j")
    assert {key: after[key] for key in before} == before
    for column in ("impression", "key_findings", "grade", "size"):
        assert frame[f"gxr_section_{column}"].notna().all()
    corrected = frame[frame["gxr_review_status"] == "approved_with_edits"]
    assert len(corrected) == 2
    assert all(text.startswith("Impression: A corrected impression.\n\n") for text in corrected["gxr_review_text"])
    form = RunReader(tmp_path / "outputs/j").form
    assert form
    assert [part.heading for part in form.parts if part.hidden] == ["Grade"]
    for kind in FORMATS:
        export(RunReader(tmp_path / "outputs/j"), kind, None, Choice())


@pytest.mark.parametrize("name", [name for name in SETS if (RUNS / name / "named").is_dir()])
def test_a_run_with_a_built_in_form_of_an_earlier_version_keeps_its_words(name, tmp_path):
    place = Workplace(tmp_path)
    shutil.copytree(RUNS / name / "named", tmp_path, dirs_exist_ok=True)
    version = RunReader(tmp_path / "outputs/j").form.version
    place.run()
    asked = prompts(tmp_path / "outputs/j")
    assert len(asked) == 30
    place.run("--output", "outputs/same", "--set", f"form.version={version}")
    assert prompts(tmp_path / "outputs/same") == asked, "its own rows and the later ones"
    place.run("--fresh")
    assert prompts(tmp_path / "outputs/j").keys() == asked.keys()
    shared = prompts(tmp_path / "outputs/j").items() & asked.items()
    assert len(shared) == (30 if version == FORM_VERSION else 0)


@pytest.mark.parametrize("name", [name for name in SETS if (RUNS / name / "joined").is_dir()])
def test_a_run_keeps_the_rules_of_templates_with_which_it_began(name, tmp_path):
    place = Workplace(tmp_path)
    shutil.copytree(RUNS / name / "joined", tmp_path, dirs_exist_ok=True)
    begun = prompts(tmp_path / "outputs/j")
    place.run()
    asked = prompts(tmp_path / "outputs/j")
    assert len(asked) == 30
    assert begun.items() <= asked.items()
    place.run("--output", "outputs/same", "--set", "prompt.version=1")
    assert prompts(tmp_path / "outputs/same") == asked, "its own rows and the later ones"
    place.run("--fresh", expect=3)
    frame = read_results(tmp_path / "outputs/j")
    assert (frame["gxr_status"] == "failed").sum() == 12, "these have no view, which the prompt prints"
    made = " ".join(frame["gxr_text"].dropna())
    assert "65-year-old female" in made
    assert "None" not in made


def prompts(folder: Path) -> dict[str, str]:
    frame = read_results(folder)
    return dict(zip(frame["gxr_row_id"], frame["gxr_prompt_sha256"], strict=True))


def test_a_part_with_a_column_of_a_later_version_is_refused_and_nothing_is_changed(tmp_path):
    place = Workplace(tmp_path)
    place.run("--limit", "20")
    [part] = place.parts()
    with_column(part, "gxr_section", pa.nulls(20, pa.string()))
    before = contents(tmp_path)
    for command in (["run", "j.toml"], ["export", "outputs/j", "--to", "x.csv", "--format", "csv", "--partial"]):
        done = place.gxr(*command, expect=2)
        assert "a later version of gxr-batch: column gxr_section is unknown to this one" in done.stderr
        assert "update gxr-batch" in done.stderr
    state = json.loads(place.gxr("status", "outputs", "--json").stdout)[0]["state"]
    assert "a later version" in state
    assert contents(tmp_path) == before


def test_a_part_of_a_later_format_is_refused(tmp_path):
    place = Workplace(tmp_path)
    place.run("--limit", "20")
    [part] = place.parts()
    table = pq.read_table(part)
    marks = {**table.schema.metadata, b"gxr_format": str(FORMAT + 1).encode()}
    pq.write_table(table.replace_schema_metadata(marks), part, write_page_checksum=True)
    assert f"format {FORMAT + 1} is unknown" in place.run(expect=2).stderr
    assert place.parts() == [part]


@pytest.mark.parametrize("column", ["gxr_flags", "gxr_text", "gxr_seconds_share", "gxr_prompt_sha256"])
def test_a_part_that_lacks_a_column_reads_as_null_there(tmp_path, column):
    place = Workplace(tmp_path)
    place.run("--limit", "20")
    [part] = place.parts()
    pq.write_table(pq.read_table(part).drop_columns([column]), part, write_page_checksum=True)
    output = place.run_json()
    assert output["generated_now"] == 40
    assert len(place.parts()) == 2
    rows = read_results(tmp_path / "outputs/j").set_index("gxr_row_id")
    assert rows[column].isna().sum() == 20
    place.gxr("export", "outputs/j", "--format", "xlsx")
    place.gxr("report", "outputs/j")


def test_a_column_of_another_type_is_damage(tmp_path):
    place = Workplace(tmp_path)
    place.run("--limit", "20")
    [part] = place.parts()
    table = pq.read_table(part)
    at = table.schema.names.index("gxr_seed")
    pq.write_table(table.set_column(at, "gxr_seed", table["gxr_seed"].cast(pa.string())), part)
    assert place.run_json()["generated_now"] == 60
    assert part.with_name(f"{part.name}.damaged").exists()


def later_manifest(folder: Path, change: dict) -> None:
    path = folder / "outputs/j/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("key", ["shards", "job.shape", "job.sampling.min_p"])
def test_a_manifest_with_a_key_of_a_later_version_is_refused_and_left_unchanged(tmp_path, key):
    place = Workplace(tmp_path)
    place.run("--limit", "20")
    job = place.manifest()["job"]
    new = {"shards": 3} if key == "shards" else {"job": job | {"shape": {"sides": 3}}}
    if key == "job.sampling.min_p":
        new = {"job": job | {"sampling": job["sampling"] | {"min_p": 0.1}}}
    later_manifest(tmp_path, new)
    before = contents(tmp_path)
    done = place.run(expect=2)
    assert f"key {key.removeprefix('job.')} is unknown to this one" in done.stderr
    place.gxr("check", "j.toml", expect=2)
    place.gxr("report", "outputs/j", expect=2)
    assert contents(tmp_path) == before


def test_a_new_run_stores_its_format_in_manifest_and_parts(tmp_path):
    place = Workplace(tmp_path)
    place.run()
    assert place.manifest()["format"] == FORMAT
    assert pq.read_schema(place.parts()[0]).metadata[b"gxr_format"] == str(FORMAT).encode()


def test_an_old_manifest_is_in_the_new_format_once_the_run_is_resumed(tmp_path):
    shutil.copytree(RUNS / "2d832e8" / "grown", tmp_path, dirs_exist_ok=True)
    place = Workplace.__new__(Workplace)
    place.folder = tmp_path
    assert place.manifest()["format"] == 1
    place.run()
    assert place.manifest()["format"] == FORMAT


def test_a_finished_run_without_a_form_is_no_other_run_because_forms_have_a_version_now(tmp_path):
    place = Workplace(tmp_path)
    shutil.copytree(RUNS / "72fb5c3" / "finished", tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "outputs/j/run.json").read_bytes()
    place.run()
    assert (tmp_path / "outputs/j/run.json").read_bytes() == before


def test_retired_keys_are_ignored_and_later_keys_have_their_former_meaning(monkeypatch):
    monkeypatch.setattr(job_file, "RETIRED_KEYS", frozenset({"sampling.old", "gone.key"}))
    monkeypatch.setitem(job_file.AS_IT_WAS, "sampling.top_k", 0)
    recorded = {"name": "n", "input": {"path": "f"}, "sampling": {"old": 1, "top_p": 0.5}, "gone": {"key": 2}}
    job, unknown = recorded_job(recorded)
    assert unknown == []
    assert "gone" not in job
    assert (job["sampling"]["top_p"], job["sampling"]["top_k"]) == (0.5, 0)
    assert "old" not in job["sampling"]
    assert job["input"]["delimiter"] == "auto"
    monkeypatch.setattr(job_file, "RETIRED_KEYS", frozenset())
    assert recorded_job(recorded)[1] == ["gone", "sampling.old"]


@pytest.mark.parametrize("key", sorted(job_file.RETIRED_KEYS))
def test_a_retired_key_is_refused_in_a_job_file_like_any_unknown_one(tmp_path, key):
    place = Workplace(tmp_path)
    section, name = key.split(".")
    place.job(f"[engine]\nkind = 'echo'\n[{section}]\n{name} = 0\n")
    for refused, where in (
        (place.run(expect=2), "j.toml, line 8"),
        (place.run("--set", f"{key}=1", expect=2), f"--set {key}"),
    ):
        assert f"Unknown key: {key}." in refused.stderr
        assert f"where: {where}\n" in refused.stderr
        assert "next:  known here: tokens_per_second" in refused.stderr
    assert not (tmp_path / "outputs").exists()


def test_faults_that_an_earlier_version_recorded_are_ignored(tmp_path):
    """Covers [echo] in the 2d832e8 fixtures, and that none of their other keys was retired by mistake."""
    recorded = json.loads((RUNS / "2d832e8/retried/outputs/j/run.json").read_text())["job"]
    assert recorded["echo"]["fail_every"] == 7
    assert {f"echo.{key}" for key in recorded["echo"]} == job_file.RETIRED_KEYS | {"echo.tokens_per_second"}
    job, unknown = recorded_job(recorded)
    assert unknown == []
    assert job["echo"] == {"tokens_per_second": 0.0}


def test_a_key_of_the_fingerprint_missing_on_one_side_has_its_neutral_value(monkeypatch):
    monkeypatch.setitem(NEUTRAL, "sampling.min_p", 0.0)
    old, now = {"sampling.top_k": 50}, {"sampling.top_k": 50, "sampling.min_p": 0.0}
    refuse_other_texts(old, now, where="run")
    refuse_other_texts(now, old, where="run")
    refuse_other_texts({}, now, where="run")
    for recorded, wanted in ((old, now | {"sampling.min_p": 0.1}), (now | {"sampling.min_p": 0.1}, old)):
        with pytest.raises(FingerprintError, match=r"sampling\.min_p \("):
            refuse_other_texts(recorded, wanted, where="run")
    with pytest.raises(FingerprintError, match=r"shape \(None -> abc\)"):
        refuse_other_texts(old, old | {"shape": "abc"}, where="run")
    with pytest.raises(FingerprintError, match=r"shape \(abc -> None\)"):
        refuse_other_texts(old | {"shape": "abc"}, old, where="run")


def test_the_files_of_a_model_are_compared_where_both_sides_know_them():
    for old, now in (({"a": 1}, {"a": 1, MODEL_FILES: "x"}), ({"a": 1, MODEL_FILES: None}, {"a": 1, MODEL_FILES: "x"})):
        refuse_other_texts(old, now, where="run")
        refuse_other_texts(now, old, where="run")
    with pytest.raises(FingerprintError, match="settings: the tokenizer, chat template or configuration of the model"):
        refuse_other_texts({MODEL_FILES: "x"}, {MODEL_FILES: "y"}, where="run")


def test_a_changed_fingerprint_names_the_keys_and_the_next_steps():
    old, now = {"a": 0.7, "prompt.system": "x" * 64}, {"a": 0.4, "prompt.system": "y" * 64}
    with pytest.raises(FingerprintError) as caught:
        refuse_other_texts(old, now, where="run")
    assert "a (0.7 -> 0.4), prompt.system" in caught.value.what
    assert "x" * 12 not in caught.value.what
    assert "--fresh" in caught.value.next_step


def test_a_resumed_run_may_use_more_templates_but_no_changed_one():
    old = {"templates": {"a": "1"}}
    refuse_other_texts(old, {"templates": {"a": "1", "b": "2"}}, where="run")
    with pytest.raises(FingerprintError, match="template a"):
        refuse_other_texts(old, {"templates": {"a": "other"}}, where="run")
    with pytest.raises(FingerprintError, match="template"):
        refuse_other_texts({"template": "1"}, old, where="run")


def test_keys_that_may_be_raised_may_not_be_lowered():
    key = "sampling.max_new_tokens"
    refuse_other_texts({key: 64}, {key: 128}, where="run", raisable=frozenset({key}))
    with pytest.raises(FingerprintError):
        refuse_other_texts({key: 64}, {key: 32}, where="run", raisable=frozenset({key}))


def test_a_key_that_is_added_to_a_run_and_changes_its_texts_is_refused_by_run_and_check(tmp_path):
    place = Workplace(tmp_path)
    place.run("--limit", "20")
    manifest = place.manifest()
    later_manifest(tmp_path, {"fingerprint": manifest["fingerprint"] | {"sampling.min_p": 0.1}})
    for verb in ("run", "check"):
        assert "sampling.min_p (0.1 -> None)" in place.gxr(verb, "j.toml", expect=2).stderr


def test_a_manifest_of_a_later_format_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(LaterVersion, match=f"format {FORMAT + 1}"):
        load_manifest(tmp_path)
    with pytest.raises(RunError):
        load_manifest(tmp_path)


NULLABLE = [name for name in part_schema().names if name not in {*KEY_COLUMNS, *PRIVATE_COLUMNS}]


@pytest.mark.parametrize("column", NULLABLE)
def test_a_finished_run_without_a_column_is_exported_in_every_format_and_shown(tmp_path, finished_run, column):
    run = tmp_path / "j"
    shutil.copytree(finished_run, run)
    for path in (*run.glob("parts/part-*.parquet"), run / "results.parquet"):
        table = pq.read_table(path)  # lacks the columns of later formats anyway
        present = [column] if column in table.column_names else []
        pq.write_table(table.drop_columns(present), path, write_page_checksum=True)
    for partial in (False, True):
        for form in FORMATS:
            made = export(RunReader(run), form, tmp_path / f"made-{form}", Choice(partial=partial))
            assert made.rows == (0 if form == "chat-jsonl" and column in HIDES_PROMPTS else ROWS_OF.get(form, 48)), form
    page = report(RunReader(run), None, tmp_path / "page.html", include_held=False)
    assert page.rows == 48
    seen = read_results(run)[column].tolist()
    assert all(value is None or value != value or list(value) == ["reviewers_disagree"] for value in seen)  # noqa: PLR0124


# Without these it is unknown which prompt a text answers, or there is no text to review.
HIDES_PROMPTS = {"gxr_template", "gxr_prompt_sha256", "gxr_text"}
ROWS_OF = {"chat-jsonl": 16}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "j"
    return shutil.copytree(RUNS / "2d832e8/finished/outputs/j", folder)


@pytest.mark.parametrize("mark", ["3.1", "", "9" * 5000, "next"])
def test_a_part_whose_format_is_not_a_known_number_is_refused(tmp_path, mark):
    place = Workplace(tmp_path)
    place.run("--limit", "20")
    [part] = place.parts()
    table = pq.read_table(part).drop_columns(["gxr_finish_reason"])
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"gxr_format": mark}), part)
    (tmp_path / "outputs/j/run.json").unlink()
    before = contents(tmp_path)
    assert "is unknown" in place.run(expect=2).stderr
    assert "is unknown" in place.gxr("check", "j.toml", expect=2).stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", ["3", [3], True, -5, 2.5])
def test_a_manifest_whose_format_is_not_a_known_number_is_refused(tmp_path, number):
    (tmp_path / "run.json").write_text(json.dumps({"format": number}))
    with pytest.raises(LaterVersion):
        load_manifest(tmp_path)


def test_a_review_file_of_a_later_version_is_refused_by_every_command(tmp_path):
    shutil.copytree(RUNS / "2d832e8" / "finished", tmp_path, dirs_exist_ok=True)
    place = Workplace.__new__(Workplace)
    place.folder = tmp_path
    [path, _] = sorted((tmp_path / "outputs/j/reviews").glob("*.parquet"))
    rows = pq.read_metadata(path).num_rows
    with_column(path, "gxr_review_level", pa.nulls(rows, pa.int32()))
    before = contents(tmp_path)
    for command in (["run", "j.toml"], ["check", "j.toml"], ["report", "outputs/j"], ["status", "outputs/j"]):
        assert "gxr_review_level is unknown" in place.gxr(*command, expect=2).stderr
    assert contents(tmp_path) == before


def test_a_review_file_without_a_key_is_damaged(tmp_path):
    shutil.copytree(RUNS / "2d832e8/finished/outputs/j", tmp_path / "j")
    [path, _] = sorted((tmp_path / "j/reviews").glob("*.parquet"))
    pq.write_table(pq.read_table(path).drop_columns(["gxr_judged_sha256"]), path)
    with pytest.raises(RunError, match="damaged"):
        read_results(tmp_path / "j")


def test_a_finished_run_of_a_later_version_does_not_affect_the_date_of_the_next_days_run(tmp_path):
    place = Workplace(tmp_path)
    place.run("--output", "outputs/2026-01-02")
    later = tmp_path / "outputs/2026-01-02/run.json"
    later.write_text(json.dumps(json.loads(later.read_text()) | {"format": FORMAT + 1}))
    place.run("--output", "outputs/{date}")
    assert len(list((tmp_path / "outputs").iterdir())) == 2


def test_a_state_missing_from_counts_is_zero_and_an_unknown_state_is_of_a_later_version(tmp_path):
    shutil.copytree(RUNS / "2d832e8/finished/outputs/j", tmp_path / "j")
    path = tmp_path / "j/run.json"
    data = json.loads(path.read_text())
    del data["invocations"][0]["counts"]["held"]
    path.write_text(json.dumps(data))
    assert load_manifest(tmp_path / "j").invocations[0]["counts"]["held"] == 0
    data["invocations"][0]["counts"]["paused"] = 1
    path.write_text(json.dumps(data))
    with pytest.raises(LaterVersion, match=r"counts\.paused"):
        load_manifest(tmp_path / "j")


def test_rows_of_a_finished_run_can_be_drawn_for_an_audit(old):
    run = old("finished").folder / "outputs/j"
    drew = export_audit(RunReader(run), AuditChoice(rows=48, readers=2, overlap=8))
    assert [done.rows for done in drew.workbooks] == [28, 28]
    found = summarise(RunReader(run))
    assert (found.frame_rows, found.whole.read) == (48, 20), "what was reviewed before counts if it was drawn"


def test_a_run_of_an_earlier_version_does_not_differ_from_itself(old):
    run = old("finished").folder / "outputs/j"
    found = as_json(compare_runs(RunReader(run), RunReader(run)))
    assert found["compared"] == {"rows": 24, "texts": 48, "same_text": 48, "other_prompt": 0}
    assert set(found["left_out"].values()) == {0}
    assert all(mean["low"] == mean["difference"] == mean["high"] == 0 for mean in found["means"].values())
    tests = [*found["flags"].values(), found["erroneous"]]
    assert all((one["this"], one["only_this"], one["p"]) == (one["other"], one["only_other"], None) for one in tests)
    assert found["erroneous"]["read"] > 0
