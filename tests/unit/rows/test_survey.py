"""Which files a path names, their kinds and encodings, and that a file which changes while being read is refused."""

from __future__ import annotations

import codecs
import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import CANARY, NO_FIELDS, look, refused, take

from gxr_batch.errors import StorageError, TableError
from gxr_batch.rows import csv_tables, parquet_tables
from gxr_batch.rows.ingest import ingest


def test_a_path_that_matches_nothing_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused("inputs/none.csv")
    assert error.what == "There is no such input file."
    assert error.where == str(tmp_path / "inputs" / "none.csv")
    assert "check input.path" in error.next_step
    error = refused("inputs/*.csv")
    assert error.what == "No file matches the input path."
    assert error.where == str(tmp_path / "inputs" / "*.csv")


def test_a_glob_is_read_in_name_order_and_skips_folders(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.csv").write_text(f"x\n{name}\n")
    (tmp_path / "folder.csv").mkdir()
    seen = look(tmp_path / "*.csv")
    assert [file.path.name for file in seen.files] == ["a.csv", "b.csv", "c.csv"]


def test_a_glob_searches_subfolders(tmp_path):
    (tmp_path / "2024" / "may").mkdir(parents=True)
    (tmp_path / "2024" / "may" / "a.csv").write_text("x\n1\n")
    assert len(look(tmp_path / "**" / "*.csv").files) == 1


def test_a_name_with_brackets_is_taken_literally(tmp_path):
    (tmp_path / "cases[1].csv").write_text("x\n1\n")
    assert look(tmp_path / "cases[1].csv").files[0].path.name == "cases[1].csv"


@pytest.mark.parametrize("ending", ["XLS", "ods", "xlsb"])
def test_a_workbook_in_another_format_is_refused_with_how_to_save_it(tmp_path, ending):
    path = tmp_path / f"cases.{ending}"
    path.write_bytes(b"PK\x03\x04")
    error = refused(path)
    assert error.what == f"A workbook in .{ending.lower()} format cannot be read."
    assert '"Excel Workbook (*.xlsx)" or "CSV UTF-8 (Comma delimited) (*.csv)"' in error.next_step


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"PK\x03\x04", "an Excel workbook or a zip archive"),
        (b"\xd0\xcf\x11\xe0", "an old Excel workbook"),
        (b"PAR1", "Parquet"),
        (b"\x1f\x8b", "compressed with gzip"),
    ],
)
def test_a_file_with_the_wrong_extension_is_recognised(tmp_path, head, what):
    path = tmp_path / "cases.csv"
    path.write_bytes(head + b"rest")
    assert refused(path).what == f"The file is {what}, despite its name."


def test_other_extensions_are_refused_with_the_supported_ones(tmp_path):
    for name, ending in (("cases.orc", ".orc"), ("cases.gz", ".gz"), ("cases.rar", ".rar")):
        (tmp_path / name).write_text("x")
        error = refused(tmp_path / name)
        assert error.what == f"Files that end in {ending} cannot be read."
        assert ".csv, .tsv, .txt, .parquet" in error.next_step
    (tmp_path / "cases.parquet.gz").write_text("x")
    assert refused(tmp_path / "cases.parquet.gz").next_step == "decompress it"
    (tmp_path / "cases").write_text("x")
    assert refused(tmp_path / "cases").what == "A file without an extension cannot be read."


def test_extensions_are_case_insensitive(tmp_path):
    (tmp_path / "CASES.CSV").write_text("x\n1\n")
    assert look(tmp_path / "CASES.CSV").schema.names == ["x"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_an_empty_file_is_refused(tmp_path, ending):
    (tmp_path / f"cases.{ending}").write_bytes(b"")
    error = refused(tmp_path / f"cases.{ending}")
    assert error.what == "The file is empty."
    assert error.where.endswith(f"cases.{ending}")


@pytest.mark.parametrize("content", ["\n\n  \n", "\ufeff"])
def test_a_file_without_a_header_line_is_refused(tmp_path, content):
    (tmp_path / "cases.csv").write_text(content, encoding="utf-8")
    assert refused(tmp_path / "cases.csv").what == "The file has no header line."


def test_a_pipe_is_refused_because_it_cannot_be_read_twice(tmp_path):
    os.mkfifo(tmp_path / "cases.csv")
    assert "not a regular file" in refused(tmp_path / "cases.csv").what


def test_a_link_to_nowhere_is_named(tmp_path):
    (tmp_path / "cases.csv").symlink_to(tmp_path / "gone")
    error = refused(tmp_path / "cases.csv")
    assert error.what == "There is no such input file."
    assert "link" in error.next_step


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_cannot_be_read_for_lack_of_permission_is_named(tmp_path):
    for name in ("cases.csv", "cases.parquet"):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(0)
        assert refused(tmp_path / name).what == "Permission denied: the file cannot be read."


def test_plain_utf8_has_no_notice(tmp_path):
    (tmp_path / "cases.csv").write_text("x\nödème — ✓\n", encoding="utf-8")
    table, _ = take(tmp_path / "cases.csv")
    assert table["x"].to_pylist() == ["ödème — ✓"]
    assert look(tmp_path / "cases.csv").notices == ()


@pytest.mark.parametrize(
    ("encoding", "mark", "label"),
    [
        ("utf-8", codecs.BOM_UTF8, "UTF-8 with a byte order mark"),
        ("utf-16-le", codecs.BOM_UTF16_LE, "UTF-16"),
        ("utf-16-be", codecs.BOM_UTF16_BE, "UTF-16"),
        ("utf-32-le", codecs.BOM_UTF32_LE, "UTF-32"),
    ],
)
@pytest.mark.parametrize("header", ["x;y", '"x";"y"'])
def test_a_byte_order_mark_decides_the_encoding_and_is_not_part_of_the_first_name(
    tmp_path, encoding, mark, label, header
):
    path = tmp_path / "cases.csv"
    path.write_bytes(mark + f"{header}\r\nödème 😀;2\r\n".encode(encoding))
    table, _ = take(path)
    assert table.column_names[:2] == ["x", "y"]
    assert table["x"].to_pylist() == ["ödème 😀"]
    assert look(path).notices == (f"{path}: read as {label}",)


def test_a_file_that_is_not_utf8_is_read_as_cp1252_and_reported(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes("x\n“œdème” 5 €\n".encode("cp1252"))
    table, _ = take(path)
    assert table["x"].to_pylist() == ["“œdème” 5 €"]
    (notice,) = look(path).notices
    assert notice.startswith(f"{path}: read as cp1252")
    assert "input.encoding" in notice


def test_a_non_ascii_letter_late_in_the_file_still_decides_the_encoding(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes(b"x\n" + b"plain\n" * 200_000 + "ö\n".encode("cp1252"))
    table, _ = take(path)
    assert table["x"][-1].as_py() == "ö"


CUT = "x\nErguß\ngrößer\n".encode() + "fünf".encode()[:2] + b"\n"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (CUT, 4),
        ("x\nжидкий\n".encode() + "жидкий".encode()[:3] + b"\n", 3),
        (b"x\n" + "größer als 5 cm\n".encode() * 200_000 + b"\xc3\n", 200_002),
    ],
)
def test_a_file_of_utf8_with_a_cut_character_is_refused_with_its_line(tmp_path, content, line):
    for path in (tmp_path / "cases.csv", tmp_path / "cases.csv.gz"):
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        error = refused(path)
        assert error.what.startswith("The file is UTF-8 text, except for ")
        assert error.where == f"{path}, line {line}"
        assert 'input.encoding = "cp1252"' in error.next_step


def test_a_file_of_utf8_with_a_cut_character_is_read_in_the_encoding_that_the_job_names(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes(CUT)
    assert take(path, encoding="cp1252")[0]["x"].to_pylist()[-1] == "fÃ"


@pytest.mark.parametrize(
    "text",
    [
        "Pleuraerguß…\nErguß…\nFuß…\nkein Ödem\n",
        "CAFÉ»\nDEGRÉ\xa0:\nQUALITÉ\xa0: 5\xa0mm\n",
        "»Spaß«\n„Fuß“\n",
        "«\xa0opacité\xa0» basale\n",
        "Ã¤ and other misread letters are here: ö, ü\n",
    ],
)
def test_a_cp1252_file_with_letters_that_may_be_utf8_by_chance_is_read(tmp_path, text):
    path = tmp_path / "cases.jsonl"
    path.write_bytes("".join(f'{{"x": "{line}"}}\n' for line in text.splitlines()).encode("cp1252"))
    assert take(path)[0]["x"].to_pylist() == text.splitlines()


def test_bytes_of_no_known_encoding_name_their_line(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes(b"x\r\n" + b"fine\r\n" * 3000 + CANARY.encode() + b" \x81\x8d\r\n")
    error = refused(path)
    assert error.what == "The file is neither UTF-8 nor cp1252 text."
    assert error.where == f"{path}, line 3002"
    assert "input.encoding" in error.next_step


def test_an_explicit_encoding_wins(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes("x\nŽluč\n".encode("cp1250"))
    table, _ = take(path, encoding="cp1250")
    assert table["x"].to_pylist() == ["Žluč"]
    assert look(path, encoding="cp1250").notices == ()


def test_an_explicit_encoding_that_does_not_fit_names_the_line(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes(b"x\nfine\n" + f"{CANARY} ödème\n".encode("latin-1"))
    error = refused(path, encoding="utf-8")
    assert error.what == "The file is not utf-8 text."
    assert error.where == f"{path}, line 3"
    assert refused(path, encoding="ascii").where == f"{path}, line 3"


def test_a_truncated_character_at_the_end_names_the_last_line(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes("x\nfine\nö".encode()[:-1])
    assert refused(path, encoding="utf-8").where == f"{path}, line 3"


def test_an_explicit_encoding_with_a_byte_order_mark_in_the_file_works(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes(codecs.BOM_UTF8 + b'"x, y",z\n1,2\n')
    assert take(path, encoding="utf-8")[0].column_names[:2] == ["x, y", "z"]
    path.write_bytes("\ufeffx\n1\n".encode("utf-16-le"))
    assert take(path, encoding="utf-16-le")[0].column_names[0] == "x"


@pytest.mark.parametrize("encoding", ["klingon", "rot13", "zlib"])
def test_an_unknown_encoding_is_refused(tmp_path, encoding):
    (tmp_path / "cases.csv").write_text("x\n1\n")
    error = refused(tmp_path / "cases.csv", encoding=encoding)
    assert error.what == f"Unknown text encoding: {encoding}."
    assert error.where == "input.encoding"


def test_utf16_without_a_mark_is_recognised_by_its_nul_characters(tmp_path):
    (tmp_path / "cases.csv").write_bytes("x,y\n1,2\n".encode("utf-16-le"))
    error = refused(tmp_path / "cases.csv")
    assert error.what == "The header contains NUL characters."
    assert 'input.encoding = "utf-16-le"' in error.next_step


def test_half_a_surrogate_pair_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes(b"x\nfine\n" + CANARY.encode() + b"\\ud800\n")
    error = refused(path, encoding="raw_unicode_escape")
    assert "surrogate" in error.what
    assert error.where == f"{path}, line 3"
    path.write_bytes(b"x\\ud800\n1\n")
    assert refused(path, encoding="raw_unicode_escape").where == f"{path}, line 1"


def test_the_survey_hash_covers_contents_and_order_but_not_names(tmp_path):
    for name, text in {"a": "x\n1\n", "b": "x\n2\n"}.items():
        (tmp_path / f"{name}.csv").write_text(text)
    before = look(tmp_path / "*.csv").sha256
    (tmp_path / "a.csv").rename(tmp_path / "aa.csv")
    assert look(tmp_path / "*.csv").sha256 == before
    (tmp_path / "aa.csv").rename(tmp_path / "c.csv")
    assert look(tmp_path / "*.csv").sha256 != before


def write(path: Path, word: str, rows: int = 3) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"x": [word] * rows}), path)
    else:
        path.write_text("x\n" + f"{word}\n" * rows)


def ingest_after(seen, path):
    with pytest.raises(TableError) as caught:
        ingest(seen, NO_FIELDS, path.with_name("t.parquet"), id_column="", prior=None, limit=None)
    assert caught.value.what == "The file changed while it was being read."
    assert caught.value.where == str(path)
    assert not path.with_name("t.parquet").exists()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("word", ["b", "b,b"])
def test_a_file_that_changed_since_the_survey_is_refused(tmp_path, ending, word):
    path = tmp_path / f"cases.{ending}"
    write(path, "a")
    seen = look(path)
    write(path, word)
    ingest_after(seen, path)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_change_that_keeps_size_and_time_is_found_too(tmp_path, ending):
    path = tmp_path / f"cases.{ending}"
    write(path, "a")
    seen, before = look(path), path.stat()
    write(path, "b")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    ingest_after(seen, path)


@pytest.mark.parametrize("damage", ["truncate", "delete"])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_file_that_is_truncated_or_deleted_after_the_survey_is_reported_as_changed(tmp_path, ending, damage):
    path = tmp_path / f"cases.{ending}"
    write(path, "a", 1000)
    seen = look(path)
    os.truncate(path, 100) if damage == "truncate" else path.unlink()
    ingest_after(seen, path)


@pytest.mark.parametrize(("ending", "module"), [("csv", csv_tables), ("parquet", parquet_tables)])
def test_a_file_that_grows_while_being_read_is_refused(tmp_path, monkeypatch, ending, module):
    path = tmp_path / f"cases.{ending}"
    write(path, "a", 100)
    seen = look(path)
    whole = module.batches

    def growing(*arguments):
        for table in whole(*arguments):
            yield table
            with path.open("ab") as file:
                file.write(b"a\n")

    monkeypatch.setattr(module, "batches", growing)
    ingest_after(seen, path)


def test_a_first_file_that_changes_while_the_second_is_read_is_refused(tmp_path, monkeypatch):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    write(first, "a")
    write(second, "b")
    seen, whole = look(tmp_path / "*.csv"), csv_tables.batches

    def changing(file, *arguments):
        if file.path == second:
            write(first, "other")
        return whole(file, *arguments)

    monkeypatch.setattr(csv_tables, "batches", changing)
    ingest_after(seen, first)


def test_a_file_that_was_only_touched_counts_as_unchanged(tmp_path):
    write(tmp_path / "cases.csv", "a")
    seen = look(tmp_path / "cases.csv")
    os.utime(tmp_path / "cases.csv", (1, 1))
    assert ingest(seen, NO_FIELDS, tmp_path / "t", id_column="", prior=None, limit=None).rows == 3


def test_a_target_that_cannot_be_written_is_a_machine_error(tmp_path):
    write(tmp_path / "cases.csv", "a")
    with pytest.raises(StorageError) as caught:
        ingest(look(tmp_path / "cases.csv"), NO_FIELDS, tmp_path / "no" / "t", id_column="", prior=None, limit=None)
    assert str(tmp_path / "no" / "t") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "command"), [("t.csv.zip", "unzip"), ("t.tgz", "tar -xf"), ("t.tar.gz", "tar -xf"), ("t.7z", "7z x")]
)
def test_an_archive_is_refused_with_the_command_that_unpacks_it(tmp_path, name, command):
    path = tmp_path / name
    path.write_bytes(b"x")
    error = refused(path)
    assert error.what.startswith("The file is an archive")
    assert error.next_step == f"unpack it with {command} {path}, then name the table"
