"""Words for a missing value: counted by column, or null with input.null_values = "common"."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import CANARY, take

from gxr_batch.prompts.sandbox import Sandbox
from gxr_batch.rows.columns import FieldMap
from gxr_batch.rows.null_words import is_null_word

FIELDS = FieldMap(
    templates={"t": ("findings", "history")},
    default="t",
    columns={"findings": "report", "history": "history"},
    required=frozenset({"findings"}),
    tested=frozenset({"history"}),
)
WORDS = ["NA", " n/a ", ".", "\\N", "-", "nan", "None", "NULL", "Unknown", "<NA>", "?", "#N/A", "None.", "unknown. "]
NO_WORDS = [
    "None available.",
    "?.",
    "-.",
    "clear",
    "none of them",
    "no",
    "n",
    "a.",
    "--x",
    "unknown mass",
    "normal",
    f"NA {CANARY}",
    "N.A.D.",
]


@pytest.mark.parametrize("word", WORDS)
def test_a_usual_word_alone_in_a_cell_means_nothing(word):
    assert is_null_word(word)


@pytest.mark.parametrize("text", NO_WORDS)
def test_other_texts_are_texts(text):
    assert not is_null_word(text)


def written(folder, rows):
    path = folder / "cases.csv"
    path.write_text("report,history,other\n" + "".join(f'"{report}","{history}",NA\n' for report, history in rows))
    return path


def test_the_words_stay_text_and_are_counted_by_column_with_the_setting(tmp_path):
    rows = [("clear", "NA"), ("N/A", "n/a"), ("-", "asthma"), ("small effusion", "na.")]
    table, taken = take(written(tmp_path, rows), fields=FIELDS)
    assert table["report"].to_pylist() == ["clear", "N/A", "-", "small effusion"]
    assert table["history"].to_pylist()[-1] == "na."
    assert taken.notices == (
        "cells that hold only a word for a missing value are text in prompts: history 3 (NA 2, N/A 1); "
        'report 2 (N/A 1, - 1); input.null_values = "common" makes them missing',
        "WARNING: findings is required, and in 2 rows it is only such a word (N/A 1, - 1), which the model would get; "
        'with input.null_values = "common" these rows fail',
    )


def test_a_table_without_such_words_has_no_notice(tmp_path):
    assert take(written(tmp_path, [(text, text) for text in NO_WORDS if text != "no"]), fields=FIELDS)[1].notices == ()


def test_with_common_the_words_are_null_in_every_text_column_and_in_no_longer_text(tmp_path):
    rows = [(word, f"x{number}") for number, word in enumerate([*WORDS, *NO_WORDS])]
    table, taken = take(written(tmp_path, rows), fields=FIELDS, null_values="common")
    assert table["report"].to_pylist() == [None] * len(WORDS) + NO_WORDS
    assert table["other"].null_count == len(rows)
    assert taken.notices == ()


def test_common_words_are_null_in_parquet_columns_of_every_kind_of_text(tmp_path):
    path, words = tmp_path / "cases.parquet", ["NA", "x", None, " unknown"]
    kinds = {
        "plain": pa.array(words),
        "large": pa.array(words, pa.large_string()),
        "view": pa.array(words, pa.string_view()),
        "category": pa.array(words).dictionary_encode(),
        "bytes": pa.array(words).cast(pa.binary()),
        "fixed": pa.array([b"NA\0\0", b"x\0\0\0", None, b"-\0\0\0"], pa.binary(4)),
        "number": pa.array([1, 2, None, 4]),
        "list": pa.array([["NA"], [], None, ["x"]]),
    }
    pq.write_table(pa.table(kinds), path)
    table, _ = take(path, null_values="common")
    for name in ("plain", "large", "view", "category", "bytes"):
        shown = [one.decode() if isinstance(one, bytes) else one for one in table[name].to_pylist()]
        assert shown == [None, "x", None, None], name
    assert table["fixed"].null_count == 3
    assert table["number"].to_pylist() == [1, 2, None, 4]
    assert table["list"].to_pylist() == [["NA"], [], None, ["x"]]


def test_zeros_that_a_condition_would_take_for_true_are_counted(tmp_path):
    _, taken = take(written(tmp_path, [("a", "0.0"), ("b", "1.0"), ("c", "False"), ("d", "")]), fields=FIELDS)
    assert taken.notices == (
        "column history is text, and 2 cells of it mean zero or false, which counts as true in a condition of the "
        "template; write history | number",
    )


@pytest.mark.parametrize(
    ("cell", "without"),
    [
        ("['effusion', 'cardiomegaly']", """{{ findings[2:-2] | replace("', '", "; ") }}"""),
        ('["effusion", "cardiomegaly"]', """{{ findings[2:-2] | replace('", "', "; ") }}"""),
    ],
)
def test_lists_written_as_text_are_counted_with_the_template_that_reads_them(tmp_path, cell, without):
    cells = [cell, cell.replace("effusion", f"{CANARY}\nx"), "[1, 2]", "[sic] 'clear'", "['open", "clear", None]
    path = tmp_path / "cases.parquet"
    pq.write_table(pa.table({"report": cells, "history": ["x"] * 7, "other": cells}), path)
    assert take(path, fields=FIELDS)[1].notices == (
        "column report is text, and 2 cells of it hold a list with brackets and quotes, which appear in prompts; your "
        f"own template can leave them out: {without}",
    )
    assert Sandbox().from_string(without).render(findings=cell) == "effusion; cardiomegaly"


def test_lists_in_every_kind_of_text_column_are_counted(tmp_path):
    path = tmp_path / "cases.parquet"
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        pq.write_table(pa.table({"report": pa.array(["['a']"], kind), "history": ["x"]}), path)
        assert "1 cell of it hold a list" in take(path, fields=FIELDS)[1].notices[0]


def test_objects_written_as_text_are_counted(tmp_path):
    path = tmp_path / "cases.jsonl"
    cells = ['"clear"', f'{{"text": "{CANARY}"}}', '"[sic] {a}"', '[{"a": 1}]', "null"]
    path.write_text("".join(f'{{"report": {cell}, "history": "x"}}\n' for cell in cells))
    assert take(path, fields=FIELDS)[1].notices == (
        "column report is text, and 2 cells of it hold an object with braces and quotes, which appear in prompts; save "
        "its parts as columns and map the field to one of them",
    )
    python = tmp_path / "cases.csv"
    python.write_text("report,history\n\"{'text': 'clear'}\",x\n\"{'text'}\",x\n")
    assert "1 cell of it hold an object" in take(python, fields=FIELDS)[1].notices[0]
