"""Text files as other tools write them: repeated headers, titles, R's row names, escapes, delimiters at line ends."""

from __future__ import annotations

import bz2
import gzip
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import CANARY, look, refused, take

HEADER = "case_id,age,findings\n"
ROWS = "K1,45,Clear\nK2,50,Small effusion\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cases.csv"


def rows(path, text=None, **keys):
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    table, _ = take(path, **keys)
    own = [name for name in table.column_names if not name.startswith("gxr_")]
    return list(zip(*(table[name].to_pylist() for name in own), strict=True))


def notices(path, **keys):
    said = (*look(path, **keys).notices, *take(path, **keys)[1].notices)
    return tuple(notice for notice in said if "the content of another row" not in notice)


EXPECTED = [("K1", "45", "Clear"), ("K2", "50", "Small effusion")]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("header", [HEADER, '"case_id","age","findings"\n', "case_id, age ,findings\n"])
def test_a_header_in_the_middle_of_concatenated_files_is_left_out_with_its_line(path, mark, header):
    assert rows(path, HEADER + ROWS + mark + header + "K3,60,x\n") == [*EXPECTED, ("K3", "60", "x")]
    assert notices(path)[-1] == f"{path}: line 4 repeats the header: left out"


def test_many_repeated_headers_are_counted_by_line(path):
    assert rows(path, (HEADER + ROWS) * 8) == EXPECTED * 8
    assert f"{path}: lines 4, 7, 10, 13, 16, ... repeat the header: left out" in notices(path)


def test_a_header_repeated_in_a_cp1252_file_is_found_behind_its_misread_mark(path):
    text = HEADER.encode() + "K1,45,Erguß\n".encode("cp1252") + b"\xef\xbb\xbf" + HEADER.encode() + b"K3,60,x\n"
    assert rows(path, text) == [("K1", "45", "Erguß"), ("K3", "60", "x")]


def test_a_row_with_only_some_of_the_names_is_a_row(path):
    assert rows(path, HEADER + "case_id,45,findings\n") == [("case_id", "45", "findings")]


def test_only_headers_are_a_table_without_rows(path):
    assert rows(path, HEADER * 3) == []


def test_a_repeated_header_that_was_converted_to_parquet_is_left_out(tmp_path):
    pq.write_table(pa.table({"id": ["1", "id", None], "b": ["x", "b", "b"]}), tmp_path / "t.parquet")
    assert rows(tmp_path / "t.parquet") == [("1", "x"), (None, "b")]
    assert "1 row with the column names as cells" in notices(tmp_path / "t.parquet")[0]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('"a"\t"b"\n"1"\t"x"\t3\n"2"\t"y"\t4\n', ("1", "2")),
        ('"a","b"\n"k","x",3\n"l","y",4\n', ("k", "l")),
        ('"a" "b"\n"1" "x" 3\n"2" "y" 4\n', ("1", "2")),
        ("a\tb\n3\tx\t3\n17\ty\t4\n", ("3", "17")),
        ('"a"\t"b"\n"1"\t"x"\t3\n"a"\t"b"\n"2"\t"y"\t4\n', ("1", "2")),
    ],
)
def test_the_row_names_of_r_become_a_column(path, text, names):
    assert rows(path, text) == [(names[0], "x", "3"), (names[1], "y", "4")]
    assert look(path).schema.names == ["row_names", "a", "b"]
    assert "R's row names" in notices(path)[0]


@pytest.mark.parametrize(
    "text",
    [
        "id,findings\n1,Small, left effusion\n2,Clear, no effusion\n",
        "id,findings\n1,Small,left effusion\n",
        "id,findings\nA,Small,left effusion\nB,Clear,no effusion\n",
        "id,findings,prior\n1,Small, left effusion,\n",
        '"id","findings"\n"1","Small",x\n"1","Clear",y\n',
        '"a","b"\n"1","x",3\n"2","y"\n',
    ],
)
def test_rows_with_a_cell_too_many_for_another_reason_are_refused(path, text):
    path.write_text(text)
    assert "cells; the header has" in refused(path).what


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_delimiter_at_the_end_of_every_row_is_ignored(path, delimiter):
    text = HEADER + "K1,45,Clear,\nK2,50,Small effusion,\n"
    assert rows(path, text.replace(",", delimiter)) == EXPECTED
    assert "ends with a delimiter" in notices(path)[0]


@pytest.mark.parametrize("separator", ["sep=;\n", '"sep=;"\n'])
def test_a_line_that_names_the_delimiter_is_neither_header_nor_title(path, separator):
    assert rows(path, separator + "id;befund;\n1;x;\n2;y;\n") == [("1", "x", None), ("2", "y", None)]
    assert rows(path, separator + "id;befund\n1;x;\n2;y;\n") == [("1", "x"), ("2", "y")]
    assert rows(path, separator + (HEADER + ROWS).replace(",", ";")) == EXPECTED
    assert notices(path) == ()
    names = ("case_id", "age", "findings")
    assert rows(path, separator + ROWS.replace(",", ";"), column_names=names) == EXPECTED
    assert notices(path, column_names=names) == ()


def test_row_names_before_a_column_without_values_are_not_taken_for_a_delimiter_at_the_end(path):
    path.write_text('"case_id","age","findings"\n"1","K1",45,""\n"3","K2",50,""\n')
    assert refused(path).what == "A row has 4 cells; the header has 3."
    names = ("number", "case_id", "age", "findings")
    assert rows(path, column_names=names, skip_lines=1) == [("1", "K1", "45", None), ("3", "K2", "50", None)]


def test_a_number_of_thousands_of_digits_is_no_row_name(path):
    path.write_text(HEADER + f"{'9' * 5000},K1,45,Clear\n")
    assert "4 cells" in refused(path).what


def test_a_delimiter_at_the_end_of_the_header_alone_makes_an_empty_column(path):
    assert rows(path, HEADER.replace("\n", ",\n") + ROWS) == [(*row, None) for row in EXPECTED]


def test_a_cell_behind_the_last_delimiter_of_one_row_is_refused(path):
    path.write_text(HEADER + "K1,45,Clear,\n" * 30 + f"K2,50,Clear,{CANARY}\n")
    assert refused(path).where == f"{path}, line 32"


@pytest.mark.parametrize(
    "title",
    [
        "Radiology export May 2024\n",
        "Radiology export\nprinted: 2024-05-31\n\n",
        '"Radiology, export"\n',
        "Ward:,7\n\n",
        "Radiology export,,\n,,\n",
        "# a comment\n# another one\n",
    ],
)
def test_a_title_above_the_header_is_skipped_with_a_notice(path, title):
    assert rows(path, title + HEADER + ROWS) == EXPECTED
    lines = title.count("\n")
    said = "the first line is" if lines == 1 else f"the first {lines} lines are"
    assert notices(path)[0] == f"{path}: {said} skipped as a title; input.skip_lines = 0 makes line 1 the header"
    path.write_text(title + HEADER + ROWS * 15 + "K3\n")
    assert refused(path).where == f"{path}, line {lines + 32}"


def test_a_title_above_a_table_with_semicolons_is_skipped(path):
    assert rows(path, "Export, of 2024\n" + (HEADER + ROWS).replace(",", ";")) == EXPECTED


@pytest.mark.parametrize(
    "text",
    [
        "findings\nClear,no effusion\nSmall effusion,left\n",
        "report text\nLungs clear,no effusion\nSmall effusion,left\n",
        "findings\nClear, no effusion\nSmall effusion, left\n",
        "a,b,c\nLung,Heart\nx,y\nz,w\n",
        "findings\n1,2\n3,4\n",
    ],
)
def test_a_header_is_never_taken_for_a_title(path, text):
    path.write_text(text)
    assert "cells; the header has" in refused(path).what


def test_lines_to_skip_can_be_named(path):
    text = "a,b,c\n1,2,3\n" + HEADER + ROWS
    assert rows(path, text, skip_lines=2) == EXPECTED
    assert look(path, skip_lines=2).notices == ()
    path.write_text("Title\n" + HEADER + ROWS)
    assert "input.skip_lines" in refused(path, skip_lines=0).next_step


def test_a_table_without_a_header_gets_its_names_from_the_job(path):
    names = ("case_id", "age", "findings")
    assert rows(path, ROWS, column_names=names) == EXPECTED
    assert rows(path, HEADER + ROWS, column_names=names) == EXPECTED
    assert rows(path, "title\n" + ROWS, column_names=names, skip_lines=1) == EXPECTED
    assert rows(path, ROWS.replace("\n", ",\n"), column_names=names) == EXPECTED
    path.write_text(ROWS)
    assert refused(path, column_names=("a", "b")).what == "The rows have 3 cells; input.column_names has 2."
    path.write_text("")
    assert refused(path, column_names=names).what == "The file is empty."


def test_quotes_after_backslashes_are_recognised(path):
    text = 'id,findings\n1,"a \\"big\\" heart, and more"\n2,"ends \\\\"\n3,C:\\temp\\new\n4,\\N\n'
    assert rows(path, text) == [
        ("1", 'a "big" heart, and more'),
        ("2", "ends \\"),
        ("3", "C:\\temp\\new"),
        ("4", "\\N"),
    ]
    assert "escaped with a backslash" in notices(path)[0]
    path.write_text(text)
    assert "input.escape" in refused(path, escape="").next_step


def test_backslashes_of_a_file_that_can_be_read_without_escapes_stay(path):
    assert rows(path, 'id,findings\n1,"path C:\\"\n2,"say ""x\\"""\n') == [("1", "path C:\\"), ("2", 'say "x\\"')]
    assert notices(path) == ()


def test_a_cell_of_one_backslash_is_no_escape(path):
    text = '"id","b","c"\n"1","","\\"\n"2","\\",""\n'
    assert rows(path, text) == [("1", None, "\\"), ("2", "\\", None)]
    assert look(path).files[0].layout.escape == ""


def test_another_escape_character_can_be_named(path):
    assert rows(path, 'id,findings\n1,a^,b\n2,"x^"y"\n', escape="^") == [("1", "a,b"), ("2", 'x"y')]


@pytest.mark.parametrize(
    ("ending", "compress"),
    [
        ("csv.gz", gzip.compress),
        ("csv.GZ", lambda text: gzip.compress(text[:30]) + gzip.compress(text[30:])),
        ("csv.zst", lambda text: pa.compress(text, "zstd", asbytes=True)),
        ("txt.bz2", bz2.compress),
        ("csv.xz", lzma.compress),
        ("csv.gz", bytes),
    ],
)
def test_compressed_text_is_read_and_damage_is_named(tmp_path, ending, compress):
    path = tmp_path / f"cases.{ending}"
    content = compress((HEADER + ROWS).encode())
    assert rows(path, content) == EXPECTED
    assert look(path).files[0].delimiter == ","
    if content[:2] == b"ca":
        assert "read as it is" in look(path).notices[0]
        path.write_bytes(b"\x96")
        assert refused(path).what == "The compressed file is damaged or truncated."
        return
    for left in (content[:-9], content[:1]):
        path.write_bytes(left)
        assert refused(path).what == "The compressed file is damaged or truncated."


def test_compressed_text_in_another_encoding_names_the_line_that_does_not_decode(tmp_path):
    path = tmp_path / "cases.tsv.gz"
    path.write_bytes(gzip.compress("x\ty\nödème\t1\n".encode("utf-16")))
    assert rows(path) == [("ödème", "1")]
    path.write_bytes(gzip.compress(b"x\ty\n" + b"a\tb\n" * 3000 + b"\x81\t1\n"))
    assert refused(path).where == f"{path}, line 3002"


def test_a_compressed_file_that_changes_is_refused(tmp_path):
    path = tmp_path / "cases.csv.gz"
    path.write_bytes(gzip.compress(HEADER.encode()))
    seen = look(path).files[0]
    assert not seen.changed()
    path.write_bytes(gzip.compress((HEADER + ROWS).encode()))
    assert seen.changed()


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("\u200bfindings", "findings"),
        ("find\u00adings", "findings"),
        ("\ufefffindings", "findings"),
        ("patient\u00a0age", "patient age"),
        ("age\u202c", "age"),
        ("Gro\u0308\u00dfe", "Gr\u00f6\u00dfe"),
        ("\u0645\u06cc\u200c\u0631\u0648", "\u0645\u06cc\u200c\u0631\u0648"),
        ("a\u200db", "ab"),
        ("\u200b", "column_1"),
    ],
)
def test_invisible_characters_in_names_are_removed_with_a_notice(path, raw, name):
    path.write_text(f"k,{raw}\n1,2\n", encoding="utf-8")
    expected = "column_2" if name == "column_1" else name
    assert look(path).schema.names == ["k", expected]
    said = [notice for notice in look(path).notices if "invisible" in notice or "no name" in notice]
    assert len(said) == (raw != name)


def test_a_job_that_names_a_column_with_its_invisible_characters_keeps_it(path):
    path.write_text("\u200bid,x\n1,2\n", encoding="utf-8")
    assert look(path, id_column="\u200bid").schema.names == ["\u200bid", "x"]


def test_a_plain_table_keeps_the_mark_that_earlier_versions_gave_it(path):
    path.write_text(HEADER + ROWS)
    file = look(path).files[0]
    assert file.mark == f"delimited utf-8 ',' {file.sha256}"
    pq.write_table(pa.table({"x": [1]}), path.with_suffix(".parquet"))
    file = look(path.with_suffix(".parquet")).files[0]
    assert file.mark == f"parquet  '' {file.sha256}"


def test_how_a_file_is_read_is_part_of_its_mark(path):
    path.write_text(HEADER + ROWS)
    marks = {
        look(path, **keys).sha256
        for keys in ({}, {"skip_lines": 1}, {"column_names": ("a", "b", "c")}, {"escape": "^"})
    }
    assert len(marks) == 4


def test_a_key_without_effect_is_refused(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text(HEADER)
    for keys in ({"skip_lines": 1}, {"column_names": ("x",)}, {"escape": "\\"}, {"sheet": "x"}):
        assert f"input.{next(iter(keys))} has no effect" in refused(tmp_path / "t.parquet", **keys).what
    assert "input.sheet has no effect" in refused(tmp_path / "t.csv", sheet="x").what


def test_comment_lines_above_the_header_are_skipped_whatever_their_width(path):
    text = f"# exported by x\n# site A, 2024, all\n{HEADER}{ROWS}"
    assert rows(path, text) == EXPECTED
    assert notices(path) == (
        f"{path}: the first 2 lines are skipped as a title; input.skip_lines = 0 makes line 1 the header",
    )
    assert rows(path, "#case_id,findings\nK1,Clear\nK2,Edema\n") == [("K1", "Clear"), ("K2", "Edema")]


def test_a_header_that_is_read_as_a_row_because_the_job_has_the_names_is_reported(path):
    names = ("a", "b", "c")
    assert len(rows(path, HEADER + ROWS, column_names=names)) == 3
    assert notices(path, column_names=names) == (
        f"{path}: line 1 looks like a header, but is read as a row because input.column_names is set; "
        "input.skip_lines = 1 leaves it out",
    )
    assert rows(path, column_names=names, skip_lines=1) == EXPECTED
    assert notices(path, column_names=names, skip_lines=1) == ()
    assert rows(path, ROWS, column_names=names) == EXPECTED
    assert notices(path, column_names=names) == ()


def test_rows_that_are_all_wider_than_the_header_are_refused_with_the_keys_to_set(path):
    path.write_text("case_id,findings\nK1,Clear,,\nK2,Edema,,\n")
    error = refused(path)
    assert error.next_step.endswith("give 4 names in input.column_names and set input.skip_lines = 1")
    assert rows(path, column_names=("case_id", "findings", "c", "d"), skip_lines=1)[0][:2] == ("K1", "Clear")
    path.write_text("case_id,findings\nK1,Clear,,\nK2,Edema\n")
    assert "column_names" not in refused(path).next_step
