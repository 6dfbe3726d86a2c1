"""`gxr-batch init`: from a table to a job file that `check` and `run` accept."""

from __future__ import annotations

import gzip
import tomllib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openpyxl import Workbook
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
    assert "This file exists already, and init never overwrites a file." in done.stderr
    assert (tmp_path / "j.toml").read_text() == before


def test_a_table_with_findings_alone_gets_the_basic_template(folder):
    (folder / "t.csv").write_text("report\nclear lungs\neffusion\n")
    made = guess_job("t.csv", {})
    assert made.template.value == "basic"
    assert made.columns["findings"].value == "report"
    assert made.id_column.value == ""


def test_without_a_known_name_the_column_with_the_longest_texts_is_the_findings(folder):
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
    assert "study_id repeats: 1 value in 3 rows" in made.id_column.reason


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
def test_an_invalid_choice_is_one_message(folder, chosen, said):
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


def test_a_table_without_a_header_gets_its_names_from_the_command_line(tmp_path, demo_model_dir):
    work = Workplace(tmp_path)
    (tmp_path / "captions.txt").write_text("R_1\tChest film with an effusion.\nR_2\tCTO of RCA (2nd segment)\n")
    done = work.gxr("init", "captions.txt", expect=2)
    assert "next:  name its 2 columns with --names findings,age; if the first line is the header" in done.stderr
    done = work.gxr("init", "captions.txt", "--names", "id,findings")
    assert "Chest film with an effusion." in done.stdout
    job = tomllib.loads((tmp_path / "captions.toml").read_text())
    assert (job["input"]["column_names"], job["input"]["id_column"]) == (["id", "findings"], "id")
    work.gxr("run", "captions.toml", "--set", "engine.kind=echo")


@pytest.mark.parametrize("names", ["", "id,", "id,id"])
def test_names_that_are_not_one_for_each_column_are_refused(tmp_path, names):
    done = Workplace(tmp_path).gxr("init", "f.csv", "--names", names, expect=2)
    assert "--names takes a different name for each column" in done.stderr


def test_numbers_are_never_taken_for_findings_by_their_length(folder):
    (folder / "t.csv").write_text("ImageId,Pixels,note\n1,514175 10 1008 29 994 30,left\n2,407576 2 1021 7 3 1,right\n")
    with pytest.raises(UserError, match="No column looks like the findings"):
        guess_job("t.csv", {})


def test_topics_and_pairs_of_conditions_get_their_templates(folder):
    (folder / "t.csv").write_text("id,topic\n1,Pneumothorax\n")
    assert guess_job("t.csv", {}).template.value == "educational"
    (folder / "p.csv").write_text("condition_1,condition_2\nedema,pneumonia\n")
    made = guess_job("p.csv", {})
    assert made.template.value == "comparative"
    assert made.columns["condition_b"].value == "condition_2"


def test_a_column_with_hardly_a_filled_cell_is_never_taken_for_findings(folder):
    rare = ["The one comment of this export is long as comments are.\n", *"\n" * 19]
    lines = [f"{number},left lung base,{cell}" for number, cell in enumerate(rare)]
    (folder / "t.csv").write_text("nr,place,remark\n" + "".join(lines))
    assert guess_job("t.csv", {}).columns["findings"].value == "place"


def test_questions_are_neither_findings_nor_topics(folder):
    path = folder / "t.csv"
    path.write_text("qid,question,answer\n1,Is there an effusion here?,yes\n2,Which side is it on?,left\n")
    with pytest.raises(UserError, match="No column looks like the findings"):
        guess_job("t.csv", {})
    path.write_text("qid,question,answer\n1,Is there an effusion here?,There is a small left effusion\n")
    assert guess_job("t.csv", {}).columns["findings"].value == "answer"
    path.write_text("id,question\n1,Pneumothorax\n")
    assert guess_job("t.csv", {}).columns["topic"].value == "question"


@pytest.mark.parametrize(
    "name", ['a "quoted" name', "back\\slash", "tab\tname", "ümlaut", "hash # name", "del\x7fname"]
)
def test_any_column_name_is_written_correctly_to_the_job_file(folder, name):
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


def test_another_encoding_is_recorded(folder):
    (folder / "t.csv").write_bytes("id,findings\n1,Erguß\n".encode("cp1252"))
    assert guess_job("t.csv", {}).encoding.value == "cp1252"


def test_a_folder_is_one_table_and_names_the_job(folder):
    for number in (1, 2):
        (folder / "exports" / f"sex={'FM'[number - 1]}").mkdir(parents=True)
        (folder / "exports" / f"sex={'FM'[number - 1]}" / "part.csv.gz").write_bytes(
            gzip.compress(f"case_id,findings\n{number},clear\n".encode())
        )
    made = guess_job("exports/", {})
    assert (made.name, made.rows, made.id_column.value, made.columns["sex"].value) == ("exports", 2, "case_id", "sex")


def test_how_a_file_is_laid_out_is_recorded(folder):
    (folder / "t.csv").write_text('A title of 2024\n\nid,findings\n1,"the \\"left\\" lung"\n2,clear\n')
    (folder / "j.toml").write_text(guess_job("t.csv", {}).text())
    section = load_job(folder / "j.toml").input
    assert (section.skip_lines, section.escape) == (2, "\\")
    assert prepare(load_job(folder / "j.toml")).survey.schema.names == ["id", "findings"]


def test_the_sheet_of_a_workbook_is_recorded(folder):
    book = Workbook()
    book.active.title = "Cases"
    for row in (["id", "findings"], ["A", "clear"]):
        book.active.append(row)
    book.save(folder / "t.xlsx")
    made = guess_job("t.xlsx", {})
    assert (made.layout["sheet"].value, made.delimiter, made.encoding) == ("Cases", None, None)
    (folder / "j.toml").write_text(made.text())
    assert load_job(folder / "j.toml").input.sheet == "Cases"


def test_json_lines_and_the_row_names_of_r_are_tables_too(folder):
    (folder / "t.jsonl").write_text('{"id": "A", "findings": "clear"}\n{"id": "B", "findings": "effusion"}\n')
    assert guess_job("t.jsonl", {}).id_column.value == "id"
    (folder / "t.txt").write_text('"findings"\t"age"\n"1"\t"clear"\t45\n"2"\t"clear"\t45\n')
    made = guess_job("t.txt", {})
    assert (made.id_column.value, made.columns["age"].value) == ("", "age")


def test_paths_are_no_findings_however_long_they_are(folder):
    (folder / "t.csv").write_text(
        "Path,Sex,No Finding\n" + "CheXpert-v1.0-small/train/patient00001/view1.jpg,F,1.0\n" * 2
    )
    with pytest.raises(UserError, match="No column looks like the findings"):
        guess_job("t.csv", {})


def test_every_column_may_name_the_rows(folder):
    (folder / "t.csv").write_text("report;film no;age\nClear lungs.;A1;40\nClear lungs.;A2;40\n")
    assert guess_job("t.csv", {}).id_column.value == "film no"


def test_what_a_column_lacks_is_part_of_the_reason(folder):
    (folder / "t.csv").write_text("id,findings,impression,sex,prior\n1,clear lungs,,0,\n2,,normal,1,\n3,,normal,1,\n")
    made = guess_job("t.csv", {})
    assert made.columns["findings"].reason == "same name; impression would fit too; 2 empty cells, whose rows will fail"
    assert made.columns["sex"].reason == "same name; no cell is M, F, male or female, so check the prompts"
    assert "comparison" not in made.columns, "an empty column"
    assert made.unused == ("impression", "prior")


def test_a_name_keeps_its_letters_without_their_accents(folder):
    (folder / "Befunde_Übung.csv").write_text("id,findings\n1,clear\n")
    assert guess_job("Befunde_Übung.csv", {}).name == "Befunde_Ubung"


def test_a_table_given_as_a_job_file_is_one_message(tmp_path):
    work = Workplace(tmp_path)
    done = work.gxr("run", "f.csv", expect=2)
    assert "This is a table, not a job file." in done.stderr
    assert "next:  gxr-batch init f.csv" in done.stderr


def test_tables_of_one_name_never_share_a_run_folder(tmp_path):
    work = Workplace(tmp_path)
    for year in ("2024", "2025"):
        (tmp_path / f"films.{year}.csv").write_text("id,findings\n1,clear lungs\n")
    work.gxr("init", "films.2024.csv")
    assert tomllib.loads((tmp_path / "films.2024.toml").read_text())["name"] == "films.2024"
    work.gxr("run", "films.2024.toml", "--set", "engine.kind=echo")
    (tmp_path / "films.2024.toml").unlink()
    work.gxr("init", "films.2024.csv", "--to", "other.toml")
    assert tomllib.loads((tmp_path / "other.toml").read_text())["name"] == "other"
    work.gxr("init", "films.2024.csv")
    assert tomllib.loads((tmp_path / "films.2024.toml").read_text())["name"] == "films.2024-2"


def test_a_link_counts_as_a_file_wherever_it_leads(tmp_path):
    work = Workplace(tmp_path)
    (tmp_path / "link.toml").symlink_to("nowhere.toml")
    assert "init never overwrites a file" in work.gxr("init", "f.csv", "--to", "link.toml", expect=2).stderr
    assert not (tmp_path / "nowhere.toml").exists()


@pytest.mark.parametrize("table", ["", "b\udcffd.csv", "x" * 5000])
def test_what_cannot_be_a_path_is_one_message(table):
    with pytest.raises(UserError, match="cannot be the path"):
        guess_job(table, {})


def test_nothing_is_written_for_fields_that_no_template_has_together(tmp_path):
    work = Workplace(tmp_path)
    (tmp_path / "t.csv").write_text("id,findings,topic\n1,clear lungs,pneumonia\n")
    assert (
        "No built-in template uses"
        in work.gxr("init", "t.csv", "--column", "topic=topic", "--column", "age=id", expect=2).stderr
    )
    assert not (tmp_path / "t.toml").exists()


def test_a_table_of_a_thousand_columns_takes_seconds(folder):
    names = [f"column {number}" for number in range(1000)]
    table = pa.table({"id": ["1", "2"], **{name: ["a", "b"] for name in names}, "findings": ["clear", "effusion"]})
    pq.write_table(table, folder / "wide.parquet")
    assert guess_job("wide.parquet", {}).columns["findings"].value == "findings"
    assert guess_job("wide.parquet", {}).id_column.value == "id"
