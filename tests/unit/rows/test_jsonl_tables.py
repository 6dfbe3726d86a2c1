"""JSON Lines: columns and types from all lines, mixtures as text, damage with its line."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess

import pyarrow as pa
import pytest
from tables import CANARY, look, refused, take

from gxr_batch.job import InputSection
from gxr_batch.rows.columns import FieldMap
from gxr_batch.rows.survey import survey


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cases.jsonl"


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return take(path)[0]


def test_members_are_columns_in_order_of_appearance_and_missing_ones_are_null(path):
    table = write(path, {"id": "A", "findings": "x"}, "", {"view": None, "findings": "", "id": "B"})
    assert table.column_names[:3] == ["id", "findings", "view"]
    assert table.select(["id", "findings", "view"]).to_pylist() == [
        {"id": "A", "findings": "x", "view": None},
        {"id": "B", "findings": None, "view": None},
    ]


@pytest.mark.parametrize(
    ("values", "kind", "read"),
    [
        ([1, None, 3], pa.int64(), [1, None, 3]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([True, None], pa.bool_(), [True, None]),
        ([2**53 + 1, 1], pa.int64(), [2**53 + 1, 1]),
        ([2**53 + 1, 0.5], pa.string(), ["9007199254740993", "0.5"]),
        ([10**30], pa.string(), [str(10**30)]),
        ([45, "46 y", True], pa.string(), ["45", "46 y", "true"]),
        ([["a", "b"], [], None], pa.list_(pa.string()), [["a", "b"], [], None]),
        ([[1, "b"]], pa.list_(pa.string()), [["1", "b"]]),
        (
            [{"a": 1}, {"b": "x"}],
            pa.struct([("a", pa.int64()), ("b", pa.string())]),
            [{"a": 1, "b": None}, {"a": None, "b": "x"}],
        ),
        ([{"a": 1}, "x"], pa.string(), ['{"a": 1}', "x"]),
        ([None, None], pa.null(), [None, None]),
        ([float("nan"), 1.5], pa.float64(), [None, 1.5]),
        ([45, "", {}, [], 46], pa.int64(), [45, None, None, None, 46]),
        ([True, ""], pa.bool_(), [True, None]),
        ([["a"], "", {}, []], pa.list_(pa.string()), [["a"], None, None, []]),
        ([[1, ""]], pa.list_(pa.int64()), [[1, None]]),
        ([{}, "", [], {"a": 1}], pa.struct([("a", pa.int64())]), [None, None, None, {"a": 1}]),
        ([{"a": ""}, {"a": 1}], pa.struct([("a", pa.int64())]), [{"a": None}, {"a": 1}]),
        (["x", "", {}, []], pa.string(), ["x", None, "{}", "[]"]),
        (["", {}, None], pa.string(), [None, "{}", None]),
        ([[], None], pa.list_(pa.string()), [[], None]),
    ],
)
def test_a_column_has_the_type_of_all_its_values_or_is_text(path, values, kind, read):
    column = write(path, *({"x": value} for value in values))["x"]
    assert column.type == kind
    assert column.to_pylist() == read


@pytest.mark.parametrize("empty", ["", {}, []])
@pytest.mark.parametrize("value", [45, 1.5, "x", ["a"], {"text": "x"}])
def test_an_empty_cell_leaves_the_content_of_the_other_rows_as_it_was(path, value, empty):
    fields = FieldMap(templates={"t": ("x",)}, default="t", columns={"x": "x"})

    def hashes(*values):
        path.write_text("".join(json.dumps({"x": one}) + "\n" for one in values))
        return take(path, fields=fields)[0]["gxr_content_hash"].to_pylist()

    assert hashes(value, empty)[0] == hashes(value)[0]


def test_types_are_found_in_the_last_line_too(path):
    table = write(path, *[{"x": number} for number in range(40_000)], {"x": "last"})
    assert table["x"].to_pylist()[-2:] == ["39999", "last"]


def test_null_values_and_repeated_names_are_handled_as_in_other_tables(path):
    path.write_text('{" x ": "NA", "x": "b"}\n')
    table, _ = take(path, null_values=("NA",))
    assert table.select(["x", "x (2)"]).to_pylist() == [{"x": None, "x (2)": "b"}]


def test_compressed_and_marked_files_are_read(tmp_path):
    path = tmp_path / "cases.jsonl.gz"
    path.write_bytes(gzip.compress('\ufeff{"x": "ödème"}\r\n'.encode()))
    assert take(path)[0]["x"].to_pylist() == ["ödème"]
    (tmp_path / "spark.json").write_text('{"x": 1}\n')
    assert take(tmp_path / "spark.json")[0]["x"].to_pylist() == [1]


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        (f'{{"x": 1}}\n{{"x": "{CANARY}\n', "The line is not one JSON object.", 2),
        (f'{{"x": 1}}\n["{CANARY}"]\n', "The line is not one JSON object.", 2),
        (f'{{"x": "{CANARY}"}} {{"x": 2}}\n', "The line is not one JSON object.", 1),
        ('[{"x": 1}]\n', "The file is one JSON array, not JSON Lines.", 1),
        ('[\n{"x": 1}\n]\n', "The file is one JSON array, not JSON Lines.", 1),
        ('{"x": 1, "x": 2}\n', "An object has two members of one name.", 1),
        ('{\n "x": 1\n}\n', "The file is JSON with line breaks inside objects, not JSON Lines.", 1),
        ("[" * 100_000, "The file is one JSON array, not JSON Lines.", 1),
        ('{"x": "' + CANARY + '\\ud83d"}\n', "A cell contains half of a surrogate pair, which is not a character.", 1),
    ],
)
def test_what_is_not_json_lines_names_its_line(path, text, what, line):
    path.write_text(text)
    error = refused(path)
    assert error.what == what
    assert error.where.startswith(f"{path}, line {line}")


@pytest.mark.parametrize(
    "text", ['[\n {"x": "clear"},\n {"x": "effusion"}\n]\n', '{\n "x": "clear"\n}\n{\n "x": "effusion"\n}']
)
@pytest.mark.parametrize("name", ["my cases.json", "cases.jsonl"])
@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_other_json_is_refused_with_a_command_that_makes_it_readable(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    command = refused(path).next_step.removeprefix("write one object to a line: ").partition(";")[0]
    subprocess.run(command, shell=True, check=True)  # as a user would type it
    (lines,) = set(tmp_path.iterdir()) - {path}
    assert take(lines)[0]["x"].to_pylist() == ["clear", "effusion"]


@pytest.mark.parametrize("text", ["\n\n", "{}\n"])
def test_a_file_without_members_is_refused(path, text):
    path.write_text(text)
    assert refused(path).what == "The file has no JSON object."


def test_a_limit_and_a_change_are_handled(path):
    write(path, *({"x": number} for number in range(100)))
    assert take(path, limit=7)[1].rows == 7
    seen = look(path).files[0]
    write(path, {"x": 1})
    assert seen.changed()


def test_a_run_that_has_begun_reads_empty_values_as_before(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"age": 5.0, "study": {"a": 1}, "words": ["x"]}\n{"age": "", "study": {}, "words": ""}\n'
    )
    section = InputSection(path=str(tmp_path / "t.jsonl"))
    assert survey(section).schema.types == [pa.float64(), pa.struct([("a", pa.int64())]), pa.list_(pa.string())]
    assert survey(section, version=1).schema.types == [pa.string()] * 3
