"""`gxr-batch init`: from a table that nobody has described to a job file that `check` and `run` accept."""

from __future__ import annotations

import tomllib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from running import Workplace

from gxr_batch.errors import TableError, UserError
from gxr_batch.job import load_job
from gxr_batch.run.new_job import guess_job
from gxr_batch.run.prepare import prepare

OPEN_I = (
    "uid;Indication;FINDINGS;Patient Age;image\n"
    'CXR1;"positive TB test";"The cardiac silhouette is normal; lungs are clear.";XXXX;a.png\n'
    'CXR2;NA;"Small left effusion.";XXXX;b.png\n'
    "CXR3;N/A;No acute disease.;XXXX;c.png\n"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_that_another_tool_exported_becomes_a_job_that_runs(tmp_path, demo_model_dir):
    work = Workplace(tmp_path)
    (tmp_path / "open_i.csv").write_bytes(OPEN_I.encode("cp1252"))
    done = work.gxr("init", "open_i.csv")
    job = tomllib.loads((tmp_path / "open_i.toml").read_text())
    assert job["input"] == {
        "path": "open_i.csv",
        "id_column": "uid",
        "delimiter": ";",
        "encoding": "auto",
        "null_values": "common",
        "columns": {"findings": "FINDINGS", "age": "Patient Age", "presentation": "Indication"},
    }
    assert job["prompt"] == {"template": "clinical_case"}
    assert "# Not used in prompts, but kept in the results: image" in (tmp_path / "open_i.toml").read_text()
    assert "open_i: 3 rows, 3 usable, 0 not" in done.stdout
    assert done.stdout.endswith("  gxr-batch run open_i.toml --limit 5\n")
    assert "presenting with NA" not in done.stdout
    work.gxr("run", "open_i.toml", "--limit", "5", "--set", "engine.kind=echo")


def test_an_existing_file_is_never_overwritten(tmp_path):
    work = Workplace(tmp_path)
    before = (tmp_path / "j.toml").read_text()
    done = work.gxr("init", "f.csv", "--to", "j.toml", expect=2)
    assert "This file exists, and init never overwrites one." in done.stderr
    assert (tmp_path / "j.toml").read_text() == before


def test_a_table_with_findings_alone_gets_the_basic_template(folder):
    (folder / "t.csv").write_text("report\nclear lungs\neffusion\n")
    made = guess_job("t.csv", {})
    assert made.template.value == "basic"
    assert made.columns["findings"].value == "report"
    assert made.id_column.value == ""


def test_without_a_telling_name_the_column_with_the_longest_texts_is_the_findings(folder):
    (folder / "t.csv").write_text(
        "nr,a,befund\n1,x,Kleiner Pleuraerguss links ohne Pneumothorax\n2,x,Unauffällige Lunge beidseits\n"
    )
    made = guess_job("t.csv", {})
    assert made.columns["findings"].value == "befund"
    assert "longest texts" in made.columns["findings"].reason
    assert made.id_column.value == "nr"


def test_an_id_column_has_no_repeats_and_no_empty_cell(folder):
    (folder / "t.csv").write_text("study_id,patient_id,findings\n1,7,clear\n1,8,clear\n")
    assert guess_job("t.csv", {}).id_column.value == "patient_id"
    (folder / "t.csv").write_text("study_id,findings\n1,clear\n1,clear\n,clear\n")
    made = guess_job("t.csv", {})
    assert made.id_column.value == ""
    assert "study_id names 1 of 3 rows" in made.id_column.reason


def test_a_chosen_column_overrides_the_guess(folder):
    (folder / "t.csv").write_text("id,findings,impression\n1,a,b\n")
    assert guess_job("t.csv", {"findings": "impression"}).columns["findings"].value == "impression"


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"findings": "nope"}, "The table has no column nope."),
        ({"finding": "findings"}, "No built-in template has a field finding."),
    ],
)
def test_a_choice_that_cannot_be_is_one_message(folder, chosen, said):
    (folder / "t.csv").write_text("id,findings\n1,a\n")
    with pytest.raises(UserError, match=said):
        guess_job("t.csv", chosen)


def test_a_table_without_findings_is_one_message_with_the_columns(folder):
    (folder / "t.csv").write_text("id,ward\n1,A3\n2,B4\n")
    with pytest.raises(UserError, match="No column looks like the findings") as caught:
        guess_job("t.csv", {})
    assert "--column findings=COLUMN; its columns: id, ward" in caught.value.next_step


def test_a_table_without_a_header_is_one_message_without_a_cell(folder):
    (folder / "t.csv").write_text("1,The lungs are clear. No pleural effusion is seen on this film.\n2,x\n")
    with pytest.raises(TableError, match="no header line") as caught:
        guess_job("t.csv", {})
    assert "lungs" not in str(caught.value)


def test_topics_and_pairs_of_conditions_get_their_templates(folder):
    (folder / "t.csv").write_text("id,topic\n1,Pneumothorax\n")
    assert guess_job("t.csv", {}).template.value == "educational"
    (folder / "p.csv").write_text("condition_1,condition_2\nedema,pneumonia\n")
    made = guess_job("p.csv", {})
    assert made.template.value == "comparative"
    assert made.columns["condition_b"].value == "condition_2"


@pytest.mark.parametrize(
    "name", ['a "quoted" name', "back\\slash", "tab\tname", "ümlaut", "hash # name", "del\x7fname"]
)
def test_any_column_name_survives_the_way_into_the_job_file(folder, name):
    table = pa.table({name: ["a", "b"], "findings": ["clear lungs", "effusion"]})
    pq.write_table(table, folder / "my table.parquet")
    made = guess_job("my table.parquet", {"history": name})
    (folder / "j.toml").write_text(made.text())
    job = load_job(folder / "j.toml")
    assert job.input.columns["history"] == name
    assert prepare(job).fields.columns["history"] == name
    assert job.name == "my-table"


def test_a_glob_is_one_table(folder):
    for number in (1, 2):
        (folder / f"part{number}.tsv").write_text(f"case_id\tfindings\n{number}\tclear\n")
    made = guess_job("part*.tsv", {})
    assert (made.rows, made.id_column.value, made.delimiter.value) == (2, "case_id", "\t")


def test_another_encoding_is_written_down(folder):
    (folder / "t.csv").write_bytes("id,findings\n1,Erguß\n".encode("cp1252"))
    assert guess_job("t.csv", {}).encoding.value == "cp1252"
