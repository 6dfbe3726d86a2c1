"""The ledger: progress is the parts, found by key and content, merged in input order."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_runs import (
    PROVENANCE,
    finish,
    finish_with_a_failure,
    manifest,
    read_with_manifest,
    result,
    start,
)

from gxr_batch.disk import write_whole
from gxr_batch.errors import RunError, RunLocked, StorageError
from gxr_batch.ledger import RunReader, open_run, read_results
from gxr_batch.ledger.join import merged
from gxr_batch.ledger.manifest import load_manifest
from gxr_batch.ledger.parts import part_numbers
from gxr_batch.ledger.state import State


def test_results_are_in_input_order_whatever_the_order_of_completion(tmp_path):
    with open_run(tmp_path / "run") as ledger:
        start(ledger, ["a", "b", "c", "d"])
        for position in (2, 0):
            ledger.add(position, result("abcd"[position]))
        ledger.seal()
        for position in (3, 1):
            ledger.add(position, result("abcd"[position]))
        ledger.seal()
        finish(ledger)
    table = pq.read_table(tmp_path / "run" / "results.parquet")
    assert table["gxr_row_id"].to_pylist() == ["a", "b", "c", "d"]
    assert table["gxr_text"].to_pylist() == [f"text of {letter}" for letter in "abcd"]
    assert table["findings"].to_pylist() == [f"findings of {letter}" for letter in "abcd"]
    assert table.column_names[0] == "findings"
    assert "gxr_content_hash" not in table.column_names


def test_what_was_not_sealed_is_still_to_do(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a", "b"])
        ledger.add(0, result("a"))
        ledger.seal()
        ledger.add(1, result("b"))
    with open_run(tmp_path) as ledger:
        start(ledger, ["a", "b"])
        assert ledger.counts() == (1, 0, 0, 1)


def test_a_run_resumed_with_a_reordered_table_keeps_every_result(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a", "b", "c"])
        ledger.add(0, result("a"))
        ledger.add(2, result("c"))
        ledger.seal()
    with open_run(tmp_path) as ledger:
        drift = start(ledger, ["c", "b", "a"])
        assert str(drift) == "0 new, 0 edited, 0 removed, 3 kept"
        assert ledger.state.status[:, 0].tolist() == [1, 0, 1]
        ledger.add(1, result("b"))
        ledger.seal()
        finish(ledger)
    assert pq.read_table(tmp_path / "results.parquet")["gxr_text"].to_pylist() == [
        "text of c",
        "text of b",
        "text of a",
    ]


def test_new_edited_and_removed_rows_are_counted_and_only_they_change(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a", "b", "c"])
        for position, letter in enumerate("abc"):
            ledger.add(position, result(letter))
        ledger.seal()
    with open_run(tmp_path) as ledger:
        drift = start(ledger, ["a", "c", "d"], {"c": "another hash"})
        assert drift == (1, 1, 1, 1)
        assert ledger.state.status[:, 0].tolist() == [1, 0, 0]


def test_a_reverted_edit_finds_its_old_result(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])
        ledger.add(0, result("a"))
        ledger.seal()
        start(ledger, ["a"], {"a": "edited"})
        assert ledger.counts().left == 1
        start(ledger, ["a"])
        assert ledger.counts().ok == 1


def test_the_newest_attempt_counts_but_a_failed_one_never_replaces_an_ok_one(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a", "b"])
        ledger.add(0, result("a", text="first"))
        ledger.add(1, result("b", status="failed"))
        ledger.seal()
        ledger.add(0, result("a", status="failed", attempt=2))
        ledger.add(1, result("b", text="second", attempt=2))
        ledger.seal()
        before = ledger.state
    assert before.attempt[:, 0].tolist() == [2, 2], "a failed attempt counts, so that the next one has another seed"
    state = State.scan(tmp_path, tmp_path / "input.parquet", 1)
    for name in ("status", "attempt", "part", "line", "truncated"):
        assert getattr(state, name).tolist() == getattr(before, name).tolist()
    assert read_with_manifest(tmp_path)["gxr_text"].tolist() == ["first", "second"]


def test_edited_cells_are_never_shown_with_the_text_of_the_earlier_ones(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a", "b"])
        for position, letter in enumerate("ab"):
            ledger.add(position, result(letter))
        ledger.seal()
        known = State.scan(tmp_path, tmp_path / "input.parquet", 1)  # as a reader has it when a run begins
        start(ledger, ["a", "b"], {"b": "edited"})
        with pytest.raises(RunError, match="table changed while it was being read"):
            list(merged(tmp_path, known, PROVENANCE))


def test_two_attempts_in_one_part_count_in_their_order(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])
        ledger.add(0, result("a", text="first"))
        ledger.add(0, result("a", text="second", attempt=2))
        ledger.seal()
    assert read_with_manifest(tmp_path)["gxr_text"].tolist() == ["second"]


def test_each_sample_is_a_separate_key(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a", "b"], samples=2)
        for position, letter in enumerate("ab"):
            for sample in (2, 1):
                ledger.add(position, result(letter, sample=sample, text=f"{letter}{sample}"))
        ledger.seal()
        finish(ledger)
        start(ledger, ["a", "b"], samples=1)
        assert ledger.counts() == (2, 0, 0, 0)
    table = pq.read_table(tmp_path / "results.parquet")
    assert table["gxr_text"].to_pylist() == ["a1", "a2", "b1", "b2"]


def test_failed_rows_are_written_as_a_ready_to_run_input(tmp_path):
    finish_with_a_failure(tmp_path)
    table = pq.read_table(tmp_path / "failed.parquet")
    assert table.to_pydict() == {"findings": ["findings of b"], "gxr_error": ["reason"]}


def test_the_list_of_failures_is_emptied_once_none_is_left(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])
        ledger.add(0, result("a", status="failed"))
        ledger.seal()
        finish(ledger)
        ledger.add(0, result("a", attempt=2))
        ledger.seal()
        finish(ledger)
    assert pq.read_table(tmp_path / "failed.parquet").num_rows == 0


def test_a_first_part_with_null_errors_only_does_not_affect_later_parts(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a", "b"])
        ledger.add(0, result("a"))
        ledger.seal()
        ledger.add(1, result("b", status="failed"))
        ledger.seal()
        finish(ledger)
    assert pq.read_table(tmp_path / "results.parquet")["gxr_error"].to_pylist() == [None, "reason"]


def test_part_numbers_continue_after_a_resume(tmp_path):
    for letter in "ab":
        with open_run(tmp_path) as ledger:
            start(ledger, ["a", "b"])
            ledger.add("ab".index(letter), result(letter))
            ledger.seal()
    assert part_numbers(tmp_path) == [1, 2]


def test_a_temporary_file_of_a_killed_run_is_not_a_part(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])
        (tmp_path / "parts" / "part-00000001.parquet.tmp").write_bytes(b"PAR1 half")
        assert part_numbers(tmp_path) == []
        ledger.add(0, result("a"))
        ledger.seal()
    assert part_numbers(tmp_path) == [1]


def test_a_table_without_rows_gives_empty_results(tmp_path):
    with open_run(tmp_path) as ledger:
        write_empty = pa.table({"findings": pa.array([], pa.string()), "gxr_row_id": pa.array([], pa.string())})
        pq.write_table(write_empty.append_column("gxr_content_hash", pa.array([], pa.string())), ledger.incoming_input)
        ledger.adopt_input(1)
        finish(ledger)
    table = pq.read_table(tmp_path / "results.parquet")
    assert table.num_rows == 0
    assert "gxr_disclaimer" in table.column_names


def test_a_second_writer_is_refused_and_the_holder_is_named(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom gxr_batch.ledger import open_run\n"
        "with open_run(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=f"process {child.pid} on ") as caught, open_run(tmp_path):
            pass
        assert "since" in str(caught.value)
    finally:
        child.kill()  # a dead holder holds no lock
        child.communicate()
    with open_run(tmp_path):
        pass


def test_fresh_keeps_the_old_run_under_another_name(tmp_path):
    folder = tmp_path / "run"
    with open_run(folder) as ledger:
        start(ledger, ["a"])
        ledger.add(0, result("a"))
        ledger.seal()
    with open_run(folder, fresh=True) as ledger:
        start(ledger, ["a"])
        assert ledger.counts().left == 1
    (kept,) = tmp_path.glob("run.before-*")
    assert part_numbers(kept) == [1]


def test_a_folder_with_other_content_is_never_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.docx").write_text("precious")
    with pytest.raises(RunError, match="is not a run"), open_run(tmp_path, fresh=True):
        pass
    assert (tmp_path / "thesis.docx").read_text() == "precious"


@pytest.mark.parametrize("name", ["parts/gear.txt", "input.parquet", "parts/part-1.parquet"])
def test_names_that_occur_in_many_folders_do_not_make_one_a_run(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    with pytest.raises(RunError, match="is not a run"), open_run(tmp_path):
        pass
    assert sorted(found.name for found in tmp_path.iterdir()) == [name.split("/")[0]]


def test_a_run_killed_right_at_the_beginning_can_be_resumed(tmp_path):
    (tmp_path / "parts").mkdir()
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])


def test_a_failed_write_names_the_file_and_keeps_the_old_one(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="disk is full") as caught:
        write_whole(target, fail)
    assert str(target) in str(caught.value)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_read_results_of_an_unfinished_run_gives_the_finished_rows(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a", "b"])
        ledger.add(1, result("b"))
        ledger.seal()
        frame = read_with_manifest(tmp_path)
    assert frame["gxr_row_id"].tolist() == ["b"]
    assert frame["gxr_ai_generated"].tolist() == [True]


def test_read_results_after_a_retry_that_was_killed_before_it_wrote_the_results_gives_the_new_ones(tmp_path):
    finish_with_a_failure(tmp_path)
    known = manifest()
    known.invocations = [{"number": 1, "results_sha256": "s"}]
    known.save(tmp_path)
    assert read_results(tmp_path)["gxr_status"].tolist() == ["ok", "failed"]
    with open_run(tmp_path) as ledger:
        start(ledger, ["a", "b"])
        known.invocations.append({"number": 2})
        known.save(tmp_path)
        ledger.add(1, result("b", attempt=2))
        ledger.seal()
    assert read_results(tmp_path)["gxr_text"].tolist() == ["text of a", "text of b"]


GOOD = {"format": 1, "name": "n", "created_at": "t", "job": {"sampling": {"samples_per_row": 1}}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 1}',
        "[" * 100_000,
        *(
            json.dumps(GOOD | broken)
            for broken in (
                {"job": {}},
                {"job": {"sampling": {"samples_per_row": "1"}}},
                {"invocations": [3]},
                {"invocations": [{"counts": 3}]},
                {"invocations": [{"generating_since": "noon"}]},
                {"invocations": [{"done": "many"}]},
                {"model": {"provenance": {"gxr_model": 3}}},
                {"fingerprint": []},
                {"fingerprint": {"templates": "x"}},
            )
        ),
    ],
)
def test_a_damaged_manifest_is_an_error_with_a_next_step(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match="damaged") as caught:
        load_manifest(tmp_path)
    assert "no generated row is lost" in caught.value.next_step


def test_a_manifest_of_a_later_version_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(RunError, match="later version"):
        load_manifest(tmp_path)


def test_a_table_deleted_before_the_results_are_written_is_a_machine_error(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a", "b"])
        ledger.add(0, result("a", status="failed"))
        ledger.add(1, result("b"))
        ledger.seal()
        (tmp_path / "input.parquet").unlink()
        for write in (lambda: finish(ledger), ledger.write_failed, lambda: ledger.rescan(1)):
            with pytest.raises(StorageError, match="missing"):
                write()


def test_reading_a_folder_without_a_run_asks_for_a_run_folder(tmp_path):
    with pytest.raises(RunError, match="no run here"):
        RunReader(tmp_path)


@pytest.mark.parametrize("columns", [{"gxr_row_id": ["a"]}, {"x": ["a"]}])
def test_a_file_of_another_kind_in_place_of_a_part_is_a_damaged_part(tmp_path, columns):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])
    pq.write_table(pa.table(columns), tmp_path / "parts" / "part-00000001.parquet")
    assert State.scan(tmp_path, tmp_path / "input.parquet", 1).damaged == [1]


@pytest.mark.parametrize(("name", "value"), [("status", "odd"), ("status", None), ("sample", 0), ("row_id", None)])
def test_a_part_with_impossible_keys_is_damaged(tmp_path, name, value):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])
        ledger.add(0, result("a"))
        ledger.seal()
    path = tmp_path / "parts" / "part-00000001.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index(f"gxr_{name}")
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array([value], field.type)), path)
    assert State.scan(tmp_path, tmp_path / "input.parquet", 1).damaged == [1]


@pytest.mark.parametrize("content", [b"", b"PAR1PAR1"])
def test_a_damaged_copy_of_the_table_is_reported_and_read_again(tmp_path, content):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])
    path = tmp_path / "input.parquet"
    path.write_bytes(content)
    with pytest.raises(RunError, match="copy of the table is damaged") as caught:
        State.scan(tmp_path, path, 1)
    assert "reads the table again" in caught.value.next_step
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])
        assert ledger.set_aside == ["input.parquet.damaged"]


def test_a_folder_in_place_of_the_table_is_set_aside_too(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])
    path = tmp_path / "input.parquet"
    path.unlink()
    path.mkdir()
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])
        assert ledger.set_aside == ["input.parquet.damaged"]


def test_results_in_place_of_the_table_are_a_damaged_copy(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])
        ledger.add(0, result("a"))
        ledger.seal()
        ledger.write_results(PROVENANCE, {})
        manifest().save(tmp_path)
    columns = pq.read_table(tmp_path / "results.parquet").append_column("gxr_content_hash", pa.array(["hash of a"]))
    pq.write_table(columns, tmp_path / "input.parquet")
    with pytest.raises(RunError, match="copy of the table is damaged"):
        list(RunReader(tmp_path).schema)


def test_a_file_name_that_is_not_utf8_survives_the_manifest(tmp_path):
    made = manifest()
    made.invocations = [{"input_files": ["f\udcff.csv", "é"]}]
    made.save(tmp_path)
    assert load_manifest(tmp_path).invocations == made.invocations
    assert "é" in (tmp_path / "run.json").read_text(encoding="utf-8")
