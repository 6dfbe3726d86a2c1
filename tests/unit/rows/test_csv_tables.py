"""CSV and similar formats: delimiters, quotes, line ends, headers, ragged rows. Cells are never changed."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import CANARY, look, refused, take

from gxr_batch.errors import TableError
from gxr_batch.rows.columns import plausible
from gxr_batch.rows.csv_tables import CHARACTERS_A_CELL, swallowed


def cells(path, content, **keys):
    """Write a file, read it, return its rows as tuples of the user's cells."""
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    table, _ = take(path, **keys)
    own = [name for name in table.column_names if not name.startswith("gxr_")]
    return list(zip(*(table[name].to_pylist() for name in own), strict=True))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cases.csv"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a,b\n1,2\n", ("1", "2")),
        ("a;b\n1,5;2\n", ("1,5", "2")),
        ("a\tb\n1;5\t2,3\n", ("1;5", "2,3")),
        ("a|b\n1|2\n", ("1", "2")),
        ('"a, with comma";b\n1;2\n', ("1", "2")),
        ("id;age, years;history, past, all\n1;2;3\n4;5;6\n", ("1", "2", "3")),
        ("a,b;c\n1,2\n3,4;5,6\n", None),
        ("sep=;\na;b\n1;2\n", ("1", "2")),
    ],
)
def test_the_delimiter_is_found_from_the_header(path, content, expected):
    if expected is None:
        assert look_at(path, content).files[0].delimiter == ","
    else:
        assert cells(path, content)[0] == expected


def look_at(path, content, **keys):
    path.write_text(content)
    return look(path, **keys)


def test_a_tie_in_the_header_is_decided_by_the_rows(path):
    assert look_at(path, "a,b;c\n1;2, 3, 4\n5;6\n").files[0].delimiter == ";"
    assert look_at(path, "a,b;c\n1,2; 3; 4\n5,6\n").files[0].delimiter == ","


def test_a_tsv_is_split_at_tabs_whatever_else_is_in_its_header(tmp_path):
    assert cells(tmp_path / "cases.tsv", "a,b,c\td,e\n1\t2\n") == [("1", "2")]


def test_a_single_column_with_a_comma_in_a_cell_is_one_cell_too_many(path):
    path.write_text("findings\nno effusion, no pneumothorax\n")
    assert "2 cells" in refused(path).what


def test_an_explicit_delimiter_wins(path):
    assert cells(path, "a,b;c\n1,2;3\n", delimiter=";") == [("1,2", "3")]
    assert cells(path, "a~b\n1~2\n", delimiter="~") == [("1", "2")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_end_works(path, end):
    assert cells(path, end.join(["a,b", "1,2", "3,4", ""])) == [("1", "2"), ("3", "4")]


def test_a_last_line_without_a_line_end_counts(path):
    assert cells(path, "a,b\n1,2\n3,4") == [("1", "2"), ("3", "4")]


def test_quoted_cells_keep_line_ends_quotes_and_delimiters(path):
    assert cells(path, 'a,b\r\n"1\r\nx, ""y""\n",2\r\n') == [('1\r\nx, "y"\n', "2")]


def test_a_quote_inside_an_unquoted_cell_is_text(path):
    assert cells(path, 'a,b\n5" tube,6\' 2"\n') == [('5" tube', "6' 2\"")]


@pytest.mark.parametrize("word", ["None", "NA", "N/A", "nan", "null", "-", " ", "0", "False"])
def test_words_that_look_like_missing_values_stay_text(path, word):
    assert cells(path, f"a,b\n{word},x\n") == [(word, "x")]


@pytest.mark.parametrize("word", ["007", "+1", "1e5", "12345678901234567890123", "1.10", "2024-01-02", "  x  ", "=1+1"])
def test_numbers_and_dates_stay_text(path, word):
    assert cells(path, f"a,b\n{word},x\n") == [(word, "x")]


def test_only_empty_cells_are_null_including_quoted_ones(path):
    assert cells(path, 'a,b,c\n,"",x\n') == [(None, None, "x")]


def test_null_values_are_null_if_they_are_the_whole_cell(path):
    assert cells(path, "a,b\nNA,NAD\n-,XXXX\n", null_values=("NA", "-")) == [(None, "NAD"), (None, "XXXX")]


def test_nul_characters_are_kept(path):
    assert cells(path, "a,b\nx\0y,\0\n") == [("x\0y", "\0")]


def test_a_cell_of_200000_characters_is_read_whole_and_the_csv_modules_limit_is_restored(path):
    before = csv.field_size_limit()
    long = "no effusion " * 16_667
    assert cells(path, f"a,b\n{long},1\nx,2\n") == [(long, "1"), ("x", "2")]
    assert csv.field_size_limit() == before


def test_a_header_name_over_the_csv_modules_limit_works(path):
    name = "n" * 140_000
    assert look_at(path, f"{name},b\n1,2\n").schema.names == [name, "b"]


def test_a_header_without_rows_is_reported(path):
    path.write_text("a,b\n")
    table, taken = take(path)
    assert (table.num_rows, taken.rows) == (0, 0)
    assert table.column_names == ["a", "b", "gxr_row_id", "gxr_content_hash"]
    assert taken.notices == ("the table has a header but no rows",)


def test_rows_of_empty_cells_are_rows(path):
    assert cells(path, "a,b\n,\n1,2\n") == [(None, None), ("1", "2")]


def test_rows_without_a_cell_at_the_end_are_left_out_and_counted(path):
    """As a spreadsheet saves cells that were cleared."""
    path.write_text("a;b\n;\n1;2\n" + ";\n" * 20_000 + "3;4\n" + ';\n"";""\n' * 10_000)
    table, taken = take(path)
    assert table.num_rows == 20_003
    assert (table["a"][0].as_py(), table["a"][-1].as_py()) == (None, "3")
    assert taken.notices[0] == f"{path}: 20,000 rows without any cell at the end, left out"
    assert cells(path, 'a\n1\n""\n') == [("1",), (None,)], "the only way to write such a row"


@pytest.mark.parametrize("blank", ["\n", "\r\n", "   \n"])
def test_blank_lines_are_not_rows(path, blank):
    assert cells(path, f"{blank}a,b\n{blank}1,2\n{blank}{blank}3,4\n{blank}") == [("1", "2"), ("3", "4")]


def test_blank_lines_in_a_single_column_are_skipped_and_reported(path):
    path.write_text('a\n1\n\n""\n3\n\n')
    table, taken = take(path)
    assert table["a"].to_pylist() == ["1", None, "3"]
    assert taken.notices[0] == f'{path}: 2 blank lines skipped; write a row with one empty cell as ""'


@pytest.mark.parametrize(("row", "found"), [("1,2", "2 cells"), (f"1,2,{CANARY},4", "4 cells"), (CANARY, "1 cell")])
def test_a_ragged_row_names_file_line_and_counts(path, row, found):
    path.write_text(f'a,b,c\n1,"two\nlines",3\n\n1,2,3\n{row}\n1,2,3\n')
    error = refused(path)
    assert error.what == f"A row has {found}; the header has 3."
    assert error.where == f"{path}, line 6"
    assert "quotes" in error.next_step
    assert "the delimiter is ," in error.next_step


def test_a_ragged_row_far_down_names_its_line(path):
    path.write_text("a,b\n" + "1,2\n" * 40_000 + "1\n")
    assert refused(path).where == f"{path}, line 40002"


def test_a_quote_that_is_never_closed_names_the_line_where_its_row_starts(path):
    path.write_text(f'a,b\n1,2\n3,"{CANARY}\n5,6\n7,8\n')
    error = refused(path)
    assert error.what == "The row that starts on line 3 has unbalanced quotes."
    assert error.where == f"{path}, line 3 (noticed on line 5)"


def test_a_quote_closed_in_the_middle_of_a_cell_names_its_line(path):
    path.write_text(f'a,b\n1,"he said "{CANARY}" twice"\n3,4\n')
    assert refused(path).where == f"{path}, line 2 (noticed on line 2)"


def test_a_stray_quote_closed_by_the_next_quoted_cell_names_the_row_where_it_opened(path):
    path.write_text(f'a,b\n1,"{CANARY}\n2,x\n3,"fine"\n')
    assert refused(path).where == f"{path}, line 2 (noticed on line 4)"


def test_a_quote_that_is_never_closed_does_not_fill_memory(path):
    path.write_text('a,b\n1,"' + "x" * (CHARACTERS_A_CELL + 2**20) + "\n")
    assert "unbalanced" in refused(path).what


@pytest.mark.parametrize(
    "rows",
    [
        ["C1,40,{}", 'C2,41,"5 mm', "C3,42,6 mm", 'C4,43,tube 7"', "C5,44,x"],
        ["C1,40,{}", '"C2,41,x', "C3,42,x", 'C4",43,x', "C5,44,x"],
        ["C1,40,{}", 'C2,"41,x', 'C3,42",x', "C5,44,x"],
    ],
)
def test_rows_swallowed_by_a_stray_quote_in_valid_csv_are_found(path, rows):
    path.write_text("id,age,findings\n" + "\n".join(rows).format(CANARY) + "\n")
    error = refused(path)
    closed = next(number for number, row in enumerate(rows, 2) if '"' in row and number > 3)
    assert error.what.startswith(f"A quote opened on line 3 is closed only on line {closed}")
    assert error.where == f"{path}, line 3"


def test_doubtful_cells_are_read_and_reported(path):
    text = 'id,a,b\nC1,x,"one\ntwo, three, four"\nC2,x,"one\ntwo, three"\nC3,x,y\n'
    path.write_text(text)
    table, taken = take(path)
    assert table.num_rows == 3
    assert taken.notices[0].startswith(f"{path}: 1 cell spanning lines that look like rows, the first on line 2")


def test_a_list_in_a_cell_whose_lines_start_like_the_row_is_read_and_reported(path):
    cell = "Nodules:\nS6, 12 mm\nS8, 9 mm"
    assert cells(path, f'id,findings\nP17,"{cell}"\n') == [("P17", cell)]
    assert "1 cell spanning lines that look like rows" in take(path)[1].notices[0]


@pytest.mark.parametrize(
    "row",
    [
        ["C1", "40", "Heart: normal.\nLungs: clear, no effusion.\nBones: intact."],
        ["C1", "40", "1. Effusion, small, left.\n2. Nodule, right, 4 mm"],
        ["A1\nB2", "40", "x"],
        ["C1", "a\nb", "c\nd"],
        ["C1", "2\n3"],
        ["a\nb"],
    ],
)
def test_ordinary_multi_line_cells_are_never_taken_for_swallowed_rows(row):
    assert swallowed(row, ",") != "sure"


def test_names_are_cleaned_each_with_a_notice(path):
    seen = look_at(path, " a ,a,,gxr_text,b,a (2),a,\n1,2,3,4,5,6,7,8\n")
    assert seen.schema.names == ["a", "a (3)", "column_3", "b", "a (2)", "a (4)", "column_8"]
    assert seen.notices == tuple(
        f"{path}: {text}"
        for text in (
            "spaces around the column name a are removed",
            "the column name a is repeated: column 2 is called a (3)",
            "column 3 has no name and is called column_3",
            "the column name a is repeated: column 7 is called a (4)",
            "column 8 has no name and is called column_8",
            "1 column left out: gxr_text; names that begin with gxr_ are reserved for results. "
            "To read the results of a run, set input.path to the run folder",
        )
    )
    assert cells(path, path.read_bytes()) == [("1", "2", "3", "5", "6", "7", "8")]


def test_an_unnamed_column_never_takes_a_name_from_the_file(path):
    assert look_at(path, "column_2,,c\n").schema.names == ["column_2", "column_2 (2)", "c"]


def test_a_notice_about_many_files_is_reported_once(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.csv").write_text(f"a,\n{number},2\n")
    (notice,) = look(tmp_path / "*.csv").notices
    assert notice == f"{tmp_path}/0.csv and 3 more files: column 2 has no name and is called column_2"


def test_a_table_without_a_usable_column_is_refused(path):
    path.write_text("gxr_a,gxr_b\n1,2\n")
    assert refused(path).what == "This file has no usable column."


def test_files_with_different_columns_make_one_table(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.tsv").write_text("z\tx\n3\t4\n")
    (tmp_path / "c.txt").write_text("y;w\n5;6\n")
    table, taken = take(tmp_path / "*.[ct]*")
    assert taken.rows == 3
    assert table.column_names == ["x", "y", "z", "w", "gxr_row_id", "gxr_content_hash"]
    assert table.select(["x", "y", "z", "w"]).to_pylist() == [
        {"x": "1", "y": "2", "z": None, "w": None},
        {"x": "4", "y": None, "z": "3", "w": None},
        {"x": None, "y": "5", "z": None, "w": "6"},
    ]


def test_a_limit_takes_the_first_rows_of_all_files(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.csv").write_text(f"x\n{name}1\n{name}2\n")
    assert take(tmp_path / "*.csv", limit=3)[0]["x"].to_pylist() == ["a1", "a2", "b1"]
    assert take(tmp_path / "*.csv", limit=2)[0]["x"].to_pylist() == ["a1", "a2"]
    assert take(tmp_path / "*.csv", limit=9)[1].rows == 6


def test_rows_after_the_limit_are_never_parsed(path):
    path.write_text("a,b\n" + "1,2\n" * 20_000 + "ragged\n")
    assert take(path, limit=5)[1].rows == 5


def test_a_missing_column_is_reported_with_the_closest_name(path):
    path.write_text("Case_ID,age,findings\n1,2,3\n")
    error = refused(path, id_column="case_id")
    assert error.what == "The table has no column case_id."
    assert error.where == "input.id_column"
    assert error.next_step == "did you mean Case_ID?"
    assert refused(path, id_column="zzz").next_step == "its columns: Case_ID, age, findings"


text_cells = st.text(st.characters(codec="utf-8", exclude_characters="\ufeff"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from(["C1", "id"]), text_cells, text_cells), max_size=6),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_whatever_the_csv_module_writes_is_read_back(tmp_path_factory, rows, delimiter, end):
    path = tmp_path_factory.mktemp("csv") / "cases.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerow(["id", "findings", "history"])
        writer.writerows(rows)
    table, _ = take(path, delimiter=delimiter)
    read = zip(*(table[name].to_pylist() for name in ("id", "findings", "history")), strict=True)
    assert [tuple(cell or "" for cell in row) for row in read] == rows


HEADERLESS = "C1,55,M,cough,Canary lower lobe opacity. No effusion.,cough\nC2,60,F,fever,Clear lungs.,fever\n"


@pytest.mark.parametrize("keys", [{}, {"id_column": "case_id"}, {"id_column": "coug"}])
def test_the_first_row_of_a_table_without_a_header_stays_out_of_every_message(path, keys):
    path.write_text(HEADERLESS)
    try:
        said = " ".join(look(path, **keys).notices)
    except TableError as error:
        said = str(error)
        assert "its first line has 6 cells that look like data: is the header line missing?" in said
    assert not any(cell in said for cell in ("C1", "55", "cough", "Canary"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("case_id", True),
        ("Findings (free text)", True),
        ("Befund", True),
        ("", True),
        ("No effusion.", False),
        ("opacity, left", False),
        ("55", False),
        ("2024-01-02", False),
        ("right lower lobe opacity with a small effusion", False),
        ("x" * 49, False),
        ("two\nlines", False),
    ],
)
def test_what_looks_like_a_column_name(name, expected):
    assert plausible([name]) is expected


@pytest.mark.parametrize(
    ("long", "expected"),
    [
        (["Image and Fluoroscopy Area Dose Product"], True),
        (["Secondary Capture Device Manufacturer's Model Name"], True),
        (["Image and Fluoroscopy Area Dose Product"] * 2, False),
        (["Dose in five or six words, or more"], False),
        (["No pleural effusion is seen on this film."], False),
        (["55"], False),
        (["a b c d e f", "b c d e f g", "c d e f g h"], False),
    ],
)
def test_a_few_of_many_column_names_may_be_longer(long, expected):
    names = [f"Name {letter}" for letter in "ABCDEFGHIJKLMNOPQRS"]
    assert plausible([*names, *long]) is expected
    assert not plausible(long)


@pytest.mark.parametrize(
    ("text", "names", "what", "next_step"),
    [
        ("id,box [x,y],,\nA,1,2\n\nB,3,4\n", (), "The rows have 3 cells; the header has 5.", "skip_lines = 1"),
        ("A,x\nB,y\n", ("a", "b", "c"), "The rows have 2 cells; input.column_names has 3.", "name every column"),
        ("A,x\nB,y\n", ("a",), "The rows have 2 cells; input.column_names has 1.", "name every column"),
        ("id,a,b\nA,1\nB,3,4\n", (), "A row has 2 cells; the header has 3.", "fix that line"),
        ("id,a\nA,1,2\nB,3,\n", (), "A row has 3 cells; the header has 2.", "fix that line"),
    ],
)
def test_rows_that_agree_with_each_other_but_not_with_their_names(path, text, names, what, next_step):
    path.write_text(text)
    error = refused(path, column_names=names)
    assert error.what == what
    assert error.where in {f"{path}, line 1", f"{path}, line 2"}
    assert next_step in error.next_step


def test_the_names_of_a_faulty_header_can_be_given_as_its_message_says(path):
    path.write_text("id,box [x,y],,\nA,1,2\nB,3,4\n")
    table, _ = take(path, skip_lines=1, column_names=("id", "x", "y"))
    assert table["y"].to_pylist() == ["2", "4"]
