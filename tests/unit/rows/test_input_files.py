"""Folders and globs: which files are tables, which columns come from folder names, and which tables are refused."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import look, refused, take


def write(path, text="x\n1\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def names(seen, folder):
    return [str(file.path.relative_to(folder)) for file in seen.files]


def test_a_folder_is_its_tables_in_path_order(tmp_path):
    for name in ("b/2.csv", "a/3.csv", "1.csv", "b/a/9.csv"):
        write(tmp_path / "t" / name, f"x\n{name}\n")
    assert names(look(tmp_path / "t"), tmp_path / "t") == ["1.csv", "a/3.csv", "b/2.csv", "b/a/9.csv"]
    assert take(f"{tmp_path / 't'}/")[0]["x"].to_pylist() == ["1.csv", "a/3.csv", "b/2.csv", "b/a/9.csv"]


def test_a_folder_as_spark_writes_it_is_a_table(tmp_path):
    out = tmp_path / "cases.csv"
    write(out / "part-00000-a.csv", "id,findings\n1,Clear\n")
    write(out / "part-00001-a.csv", "")
    write(out / "part-00002-a.csv", "id,findings\n2,Effusion\n")
    for name in ("_SUCCESS", "._SUCCESS.crc", ".part-00000-a.csv.crc", "_committed_77", "_temporary/0/part-9.csv"):
        write(out / name, "noise\n")
    seen = look(out)
    assert names(seen, out) == ["part-00000-a.csv", "part-00002-a.csv"]
    assert seen.notices == (f"1 empty file passed over: {out}/part-00001-a.csv",)
    assert names(look(out / "*"), out) == ["part-00000-a.csv", "part-00002-a.csv"]
    assert names(look(tmp_path / "*.csv"), out) == ["part-00000-a.csv", "part-00002-a.csv"]


def test_a_compressed_part_without_content_is_passed_over_too(tmp_path):
    for name, text in (("1.csv.gz", b""), ("2.csv.gz", b"x\n1\n")):
        (tmp_path / name).write_bytes(gzip.compress(text))
    assert take(tmp_path / "*.gz")[0]["x"].to_pylist() == ["1"]


def test_a_glob_passes_over_what_a_failed_job_left(tmp_path):
    write(tmp_path / "out/_temporary/0/part-1.csv")
    write(tmp_path / "out/day=1/part-0.csv")
    assert names(look(tmp_path / "out/**/*.csv"), tmp_path) == ["out/day=1/part-0.csv"]
    assert names(look(tmp_path / "out/_temporary/**/*.csv"), tmp_path) == ["out/_temporary/0/part-1.csv"]


def test_only_empty_files_are_an_error(tmp_path):
    write(tmp_path / "t" / "1.csv", "")
    write(tmp_path / "t" / "2.csv", "")
    assert refused(tmp_path / "t").what == "The file is empty."


def test_key_value_folders_become_text_columns(tmp_path):
    for folder, row in (("sex=F/site=St%20Mary", "1"), ("sex=M/site=__HIVE_DEFAULT_PARTITION__", "2")):
        write(tmp_path / "t" / folder / "part.csv", f"id\n{row}\n")
    for path in (tmp_path / "t", tmp_path / "t" / "**" / "*.csv"):
        seen = look(path)
        assert seen.schema.names == ["id", "sex", "site"]
        assert any(notice.endswith("columns sex, site from the names of folders") for notice in seen.notices)
    table, _ = take(tmp_path / "t")
    assert table.select(["id", "sex", "site"]).to_pylist() == [
        {"id": "1", "sex": "F", "site": "St Mary"},
        {"id": "2", "sex": "M", "site": None},
    ]
    assert take(tmp_path / "t", null_values=("M",))[0]["sex"].to_pylist() == ["F", None]
    assert take(tmp_path / "t" / "sex=M" / "*" / "*.csv", id_column="sex")[0]["gxr_row_id"].to_pylist() == ["M"]


def test_a_column_of_the_file_wins_over_the_name_of_its_folder(tmp_path):
    write(tmp_path / "sex=F" / "t.csv", "id,sex\n1,female\n")
    table, _ = take(tmp_path / "sex=F" / "t.csv")
    assert table["sex"].to_pylist() == ["female"]
    assert any("the file's, not the one" in notice for notice in look(tmp_path / "sex=F" / "t.csv").notices)


def test_a_moved_file_in_another_key_value_folder_is_another_table(tmp_path):
    write(tmp_path / "sex=F" / "t.csv")
    before = look(tmp_path / "sex=F" / "t.csv").sha256
    (tmp_path / "sex=F").rename(tmp_path / "sex=M")
    assert look(tmp_path / "sex=M" / "t.csv").sha256 != before


def test_files_of_other_kinds_in_a_folder_are_passed_over_with_a_notice(tmp_path):
    for name in ("cases.csv", "README.md", "LICENSE.txt", "_old.csv", "scan.png", "~$cases.xlsx"):
        write(tmp_path / "t" / name)
    seen = look(tmp_path / "t")
    assert names(seen, tmp_path / "t") == ["cases.csv"]
    assert seen.notices == (f"{tmp_path / 't'}: 4 files passed over: LICENSE.txt, README.md, _old.csv, ...",)


def test_a_folder_with_tables_of_several_kinds_is_refused_with_a_glob(tmp_path):
    write(tmp_path / "t" / "a.csv")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "t" / "a.parquet")
    error = refused(tmp_path / "t")
    assert error.what == "The folder has tables of several kinds: 1 .csv, 1 .parquet."
    assert f'"{tmp_path}/t/**/*.csv"' in error.next_step


def test_a_folder_without_a_table_is_refused(tmp_path):
    write(tmp_path / "t" / "README.md")
    assert refused(tmp_path / "t").what == "The folder has no table."


@pytest.mark.parametrize(
    ("marker", "file", "called"),
    [
        ("_delta_log/00000.json", "part-0.parquet", "Delta Lake"),
        ("_delta_log/00000.json", "day=1/part-0.parquet", "Delta Lake"),
        (".hoodie/hoodie.properties", "day=1/part-0.parquet", "Hudi"),
        ("metadata/v1.metadata.json", "data/part-0.parquet", "Iceberg"),
        ("metadata/version-hint.text", "data/day=1/part-0.parquet", "Iceberg"),
    ],
)
def test_the_files_of_a_lake_are_refused_however_they_are_named(tmp_path, marker, file, called):
    lake = tmp_path / "lake"
    write(lake / marker)
    (lake / file).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"x": [1]}), lake / file)
    for path in (lake, tmp_path, lake / file, lake / "**" / "*.parquet", (lake / file).parent / "*.parquet"):
        error = refused(path)
        assert called in error.what
        assert error.where == str(lake)
        assert "export" in error.next_step


def test_the_folder_of_a_run_among_others_is_refused_with_its_name(tmp_path):
    write(tmp_path / "outputs" / "j" / "run.json")
    write(tmp_path / "outputs" / "j" / "results.jsonl", '{"x": 1}\n')
    (tmp_path / "outputs" / "j" / "parts").mkdir()
    assert f'to read the run, set input.path = "{tmp_path}/outputs/j"; ' in refused(tmp_path / "outputs").next_step


def test_a_table_and_its_compressed_copy_are_not_both_read(tmp_path):
    write(tmp_path / "t" / "cases.csv")
    (tmp_path / "t" / "cases.csv.gz").write_bytes(gzip.compress(b"x\n1\n"))
    assert "compressed copy" in refused(tmp_path / "t" / "cases.csv*").what


def test_a_link_to_a_folder_above_ends(tmp_path):
    write(tmp_path / "t" / "a.csv")
    (tmp_path / "t" / "loop").symlink_to(tmp_path / "t", target_is_directory=True)
    assert len(look(tmp_path / "t").files) == 1


def test_files_with_the_same_content_and_missing_columns_are_named(tmp_path):
    write(tmp_path / "a.csv", "x,y\n1,2\n")
    write(tmp_path / "b.csv", "x,y\n1,2\n")
    write(tmp_path / "c.csv", "x\n3\n")
    assert look(tmp_path / "*.csv").notices == (
        f"{tmp_path}/c.csv: no column y; its cells are empty there",
        f"{tmp_path}/b.csv: the same content as {tmp_path}/a.csv; its rows are read again",
    )


def test_tables_in_a_folder_that_begins_with_an_underscore_are_passed_over_like_such_files(tmp_path):
    for name in ("1.csv", "_old/2.csv", "a/_3.csv", "__MACOSX/1.csv", "_year=2024/4.csv"):
        write(tmp_path / "t" / name)
    seen = look(tmp_path / "t")
    assert names(seen, tmp_path / "t") == ["1.csv", "_year=2024/4.csv"]
    assert seen.notices[0] == f"{tmp_path / 't'}: 3 files passed over: __MACOSX/1.csv, _old/2.csv, a/_3.csv"


def test_several_files_of_one_run_are_refused_and_one_file_of_each_run_is_read(tmp_path):
    for run in ("a", "b"):
        write(tmp_path / run / "run.json", "{}")
        (tmp_path / run / "parts").mkdir()
        for name in ("input.parquet", "results.parquet"):
            pq.write_table(pa.table({"x": ["1"]}), tmp_path / run / name)
    error = refused(tmp_path / "*" / "*.parquet")
    assert error.what == "The input path names several files of a run, which hold the same rows."
    assert error.where == f"{tmp_path / 'a' / 'input.parquet'}, {tmp_path / 'a' / 'results.parquet'}"
    assert error.next_step == f'a job reads a run by its folder: input.path = "{tmp_path / "a"}"'
    assert len(look(tmp_path / "*" / "results.parquet").files) == 2
