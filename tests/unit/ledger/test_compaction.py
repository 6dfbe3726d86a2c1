"""Small parts are compacted during a run: no key is lost or counted twice for any reader, killed or not."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_runs import finish, manifest, read_with_manifest, result, start

from gxr_batch import disk
from gxr_batch.errors import StorageError
from gxr_batch.ledger import RunReader, compaction, open_run, read_results
from gxr_batch.ledger import join as merging
from gxr_batch.ledger import state as scanning
from gxr_batch.ledger.compaction import PARTS_PER_COMPACTION, part_info, part_infos
from gxr_batch.ledger.parts import part_numbers, part_path, read_part
from gxr_batch.run.status import statuses

MANY = 2 * PARTS_PER_COMPACTION + 3


class Killed(BaseException):
    """Simulates SIGKILL: nothing in the program catches it."""


def names(rows: int) -> list[str]:
    return [f"r{number:04}" for number in range(rows)]


def seal_each(ledger, ids, at=None, **fields) -> None:
    """Seal a separate part for every row."""
    for position in range(len(ids)) if at is None else at:
        ledger.add(position, result(ids[position], **fields))
        ledger.seal()


def run_all(folder: Path, ids) -> None:
    with open_run(folder) as ledger:
        start(ledger, ids)
        seal_each(ledger, ids)


def kill_by(owner, name: str, deadly, folder: Path, ids) -> None:
    """Run with a function replaced by one that raises Killed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, deadly)
        with pytest.raises(Killed):
            run_all(folder, ids)


def keys_in_parts(folder: Path, damaged: int = 0) -> list[str]:
    sound = [number for number in part_numbers(folder) if number != damaged]
    return [key for number in sound for key in read_part(folder, number)["gxr_row_id"].to_pylist()]


def same_state(folder: Path, ledger) -> None:
    """What the next invocation finds equals the writer's state, text by text."""
    found = scanning.State.scan(folder, folder / "input.parquet", ledger.state.samples, whole=True)
    for name in ("status", "attempt", "truncated"):
        assert getattr(found, name).tolist() == getattr(ledger.state, name).tolist()


def test_small_parts_are_compacted_and_every_row_is_found_again(tmp_path):
    ids = names(MANY)
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        seal_each(ledger, ids)
        assert [part.rows for part in part_infos(tmp_path)] == [PARTS_PER_COMPACTION, PARTS_PER_COMPACTION, 1, 1, 1]
        assert keys_in_parts(tmp_path) == ids
        same_state(tmp_path, ledger)
        finish(ledger)
    table = pq.read_table(tmp_path / "results.parquet")
    assert table["gxr_text"].to_pylist() == [f"text of {row_id}" for row_id in ids]
    assert read_with_manifest(tmp_path)["gxr_text"].tolist() == table["gxr_text"].to_pylist()


def test_compaction_goes_by_levels_and_the_number_of_files_stays_small(tmp_path):
    ids = names(PARTS_PER_COMPACTION**2 + PARTS_PER_COMPACTION + 1)
    most = 0
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        for position in range(len(ids)):
            seal_each(ledger, ids, [position])
            most = max(most, len(os.listdir(tmp_path / "parts")))
        finish(ledger)
    assert most <= 2 * PARTS_PER_COMPACTION
    assert [(part.level, part.rows) for part in part_infos(tmp_path)] == [(2, PARTS_PER_COMPACTION**2), (1, 16), (0, 1)]
    assert pq.read_table(tmp_path / "results.parquet")["gxr_row_id"].to_pylist() == ids


def test_a_full_part_is_not_rewritten(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "FULL_ROWS", 3)
    ids = names(3 * PARTS_PER_COMPACTION)
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        for first in range(0, len(ids), 3):
            for position in range(first, first + 3):
                ledger.add(position, result(ids[position]))
            ledger.seal()
    assert part_numbers(tmp_path) == list(range(1, PARTS_PER_COMPACTION + 1))


def test_a_compacted_part_is_written_in_groups_no_larger_than_a_full_part(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "FULL_ROWS", 7)
    ids = names(MANY)
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        seal_each(ledger, ids)
        finish(ledger)
    with pq.ParquetFile(part_path(tmp_path, PARTS_PER_COMPACTION + 1)) as file:
        assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [7, 7, 2]
    assert pq.read_table(tmp_path / "results.parquet")["gxr_text"].to_pylist() == [f"text of {name}" for name in ids]


@pytest.mark.parametrize("first", [0, 5, 12])
def test_the_newest_attempt_counts_whichever_part_it_is_in(tmp_path, first):
    """Attempts of one key before, inside and after a compacted part; a failed one never replaces an ok one."""
    ids = names(MANY)
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        seal_each(ledger, ids, range(first))
        attempts = [("failed", "a"), ("ok", "b"), ("failed", "c"), ("ok", "d")]
        for attempt, (status, text) in enumerate(attempts, 1):
            seal_each(ledger, ids, [20], status=status, text=text if status == "ok" else None, attempt=attempt)
            seal_each(ledger, ids, [21], status=status if attempt < 3 else "failed", text=text, attempt=attempt)
        seal_each(ledger, ids, range(first, 20))
        same_state(tmp_path, ledger)
        frame = read_with_manifest(tmp_path).set_index("gxr_row_id")
    assert any(part.level for part in part_infos(tmp_path))
    assert frame.loc["r0020", ["gxr_text", "gxr_attempt"]].tolist() == ["d", 4]
    assert frame.loc["r0021", ["gxr_text", "gxr_attempt"]].tolist() == ["b", 2]


def test_a_row_held_at_an_attempt_that_failed_before_stays_held(tmp_path):
    """The order of the parts decides, not the attempt's number, and compaction keeps it."""
    ids = names(MANY)
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        seal_each(ledger, ids, [0], status="failed")
        seal_each(ledger, ids, range(1, PARTS_PER_COMPACTION - 1))
        seal_each(ledger, ids, [0], status="held")
        assert part_info(tmp_path, PARTS_PER_COMPACTION + 1).level == 1
        same_state(tmp_path, ledger)
        assert ledger.counts().held == 1


@pytest.mark.parametrize("dropped", [0, 1, PARTS_PER_COMPACTION - 1])
def test_killed_before_all_sources_are_deleted_every_key_counts_once(tmp_path, dropped):
    ids, real = names(MANY), Path.unlink
    left = iter(range(dropped))

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("part-") and next(left, None) is None:
            raise Killed
        real(path, missing_ok)

    kill_by(Path, "unlink", unlink, tmp_path, ids)
    assert part_numbers(tmp_path) == list(range(dropped + 1, PARTS_PER_COMPACTION + 2))
    assert read_with_manifest(tmp_path)["gxr_row_id"].tolist() == ids[:PARTS_PER_COMPACTION]
    (seen,) = statuses(tmp_path)
    assert (seen.ok, seen.left) == (PARTS_PER_COMPACTION, MANY - PARTS_PER_COMPACTION)
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        assert part_numbers(tmp_path) == [PARTS_PER_COMPACTION + 1]
        seal_each(ledger, ids, range(PARTS_PER_COMPACTION, MANY))
        finish(ledger)
    assert keys_in_parts(tmp_path) == ids
    assert pq.read_table(tmp_path / "results.parquet")["gxr_row_id"].to_pylist() == ids


def test_killed_while_writing_a_compacted_part_its_sources_all_exist(tmp_path):
    ids, real = names(MANY), disk.publish

    def killed(temporary: Path, target: Path, *last) -> None:
        if target.name == f"part-{PARTS_PER_COMPACTION + 1:08}.parquet":
            raise Killed
        real(temporary, target, *last)

    kill_by(disk, "publish", killed, tmp_path, ids)
    assert part_numbers(tmp_path) == list(range(1, PARTS_PER_COMPACTION + 1))
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        assert ledger.counts().ok == PARTS_PER_COMPACTION


@pytest.mark.parametrize("dropped", [0, 5])
def test_a_part_number_is_not_reused_if_not_all_sources_can_be_deleted(tmp_path, monkeypatch, dropped):
    """The run ends; a row added nevertheless must not overwrite the compacted part."""
    ids, real = names(MANY), Path.unlink
    left = iter(range(dropped))

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("part-") and next(left, None) is None:
            raise OSError(errno.EIO, "no")
        real(path, missing_ok)

    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        monkeypatch.setattr(Path, "unlink", unlink)
        with pytest.raises(StorageError, match="input/output"):
            seal_each(ledger, ids)
        ledger.add(PARTS_PER_COMPACTION, result(ids[PARTS_PER_COMPACTION]))
        ledger.seal()
        monkeypatch.undo()
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        assert ledger.counts().ok == PARTS_PER_COMPACTION + 1
        assert not ledger.set_aside
    assert keys_in_parts(tmp_path) == ids[: PARTS_PER_COMPACTION + 1]


def test_sources_that_a_kill_left_behind_replace_a_damaged_compacted_part(tmp_path, monkeypatch):
    ids = names(PARTS_PER_COMPACTION)
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        monkeypatch.setattr(compaction, "_drop", lambda folder, numbers: None)
        seal_each(ledger, ids)
        monkeypatch.undo()
    part_path(tmp_path, PARTS_PER_COMPACTION + 1).write_bytes(b"PAR1 and no more")
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        assert ledger.counts().ok == PARTS_PER_COMPACTION
        assert part_numbers(tmp_path) == list(range(1, PARTS_PER_COMPACTION + 1))
        assert ledger.set_aside == [f"part-{PARTS_PER_COMPACTION + 1:08}.parquet.damaged"]
        seal_each(ledger, ids, [0], attempt=2)
    # Numbers are never reused: the next part does not get the damaged part's number.
    assert PARTS_PER_COMPACTION + 1 not in part_numbers(tmp_path)


def test_parts_copied_in_from_another_run_lose_no_row(tmp_path):
    """The copied compacted part lists numbers that other parts have here."""
    ids, here, there = names(MANY), tmp_path / "here", tmp_path / "there"
    for folder, rows in (
        (here, range(PARTS_PER_COMPACTION - 1)),
        (there, range(PARTS_PER_COMPACTION, 2 * PARTS_PER_COMPACTION)),
    ):
        with open_run(folder) as ledger:
            start(ledger, ids)
            seal_each(ledger, ids, rows)
    compacted = PARTS_PER_COMPACTION + 1
    shutil.copy(part_path(there, compacted), part_path(here, compacted))
    done = [name for at, name in enumerate(ids[: 2 * PARTS_PER_COMPACTION]) if at != PARTS_PER_COMPACTION - 1]
    assert read_with_manifest(here)["gxr_row_id"].tolist() == done
    with open_run(here) as ledger:
        start(ledger, ids)
        assert sorted(keys_in_parts(here)) == done
        seal_each(ledger, ids, [PARTS_PER_COMPACTION - 1, *range(2 * PARTS_PER_COMPACTION, MANY)])
        compaction.compact(here, part_infos(here), 99)
        finish(ledger)
    assert pq.read_table(here / "results.parquet")["gxr_text"].to_pylist() == [f"text of {name}" for name in ids]


def test_readers_skip_a_damaged_compacted_part_whose_sources_a_kill_left_behind(tmp_path, monkeypatch):
    ids = names(MANY)
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        monkeypatch.setattr(compaction, "_drop", lambda folder, numbers: None)
        seal_each(ledger, ids, range(PARTS_PER_COMPACTION))
        monkeypatch.undo()
    compacted = part_path(tmp_path, PARTS_PER_COMPACTION + 1)
    content = compacted.read_bytes()
    compacted.write_bytes(content[:40] + bytes(400) + content[440:])  # its footer is sound
    assert read_with_manifest(tmp_path)["gxr_text"].tolist() == [
        f"text of {name}" for name in ids[:PARTS_PER_COMPACTION]
    ]
    (seen,) = statuses(tmp_path)
    assert (seen.ok, seen.damaged_parts) == (PARTS_PER_COMPACTION, 1)


def test_a_compacted_part_whose_mark_is_unreadable_keeps_its_place(tmp_path):
    """Skipped, it would count as newer than the parts before it, or older than those after it."""
    ids = names(MANY)
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        seal_each(ledger, ids, [0], text="old")
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        seal_each(ledger, ids, [0, *range(1, PARTS_PER_COMPACTION - 1)], text="new", attempt=2)
        table = read_part(tmp_path, compacted := PARTS_PER_COMPACTION + 1)
        for number, rows in ((1, table.slice(0, 1)), (compacted, table.slice(1))):  # as if compacted later
            pq.write_table(rows.replace_schema_metadata({"gxr_union": "?"}), part_path(tmp_path, number))
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        seal_each(ledger, ids, range(PARTS_PER_COMPACTION - 1, 2 * PARTS_PER_COMPACTION - 3))
        assert len(part_numbers(tmp_path)) == 1
        assert ledger.counts().ok == 2 * PARTS_PER_COMPACTION - 3
    assert read_with_manifest(tmp_path)["gxr_text"].tolist()[0] == "new"


def test_a_damaged_source_and_its_adjacent_parts_are_not_changed(tmp_path):
    ids = names(MANY)
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        seal_each(ledger, ids, range(PARTS_PER_COMPACTION - 1))
        part_path(tmp_path, 3).write_bytes(b"PAR1 and no more")
        seal_each(ledger, ids, range(PARTS_PER_COMPACTION - 1, PARTS_PER_COMPACTION + 2))
        assert keys_in_parts(tmp_path, damaged=3) == [key for key in ids[: PARTS_PER_COMPACTION + 2] if key != ids[2]]
        assert not list((tmp_path / "parts").glob("*.tmp"))
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        assert ledger.set_aside == ["part-00000003.parquet.damaged"]
        seal_each(ledger, ids, [2, *range(PARTS_PER_COMPACTION + 2, MANY)])
        same_state(tmp_path, ledger)
        assert ledger.counts().left == 0
    assert sorted(keys_in_parts(tmp_path)) == ids
    assert (tmp_path / "parts" / "part-00000003.parquet.damaged").exists()


def test_a_scan_that_listed_the_folder_before_a_compaction_counts_every_key(tmp_path, monkeypatch):
    ids, real = names(MANY), scanning.groups_of
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        seal_each(ledger, ids, range(PARTS_PER_COMPACTION - 1))

        def groups_of(folder, number, columns=None):
            if number == 7 and len(part_numbers(folder)) == PARTS_PER_COMPACTION - 1:
                seal_each(ledger, ids, [PARTS_PER_COMPACTION - 1])  # so parts 7 to 15 are deleted when their turn comes
            return real(folder, number, columns)

        monkeypatch.setattr(scanning, "groups_of", groups_of)
        found = scanning.State.scan(tmp_path, tmp_path / "input.parquet", 1)
        assert part_numbers(tmp_path) == [PARTS_PER_COMPACTION + 1]
    assert found.counts().ok == PARTS_PER_COMPACTION
    assert not found.damaged


@pytest.mark.parametrize("more", [1, PARTS_PER_COMPACTION * (PARTS_PER_COMPACTION - 1)], ids=["once", "twice"])
def test_a_merge_that_looked_up_its_rows_before_a_compaction_finds_them(tmp_path, more):
    ids = names(PARTS_PER_COMPACTION + PARTS_PER_COMPACTION**2)
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        manifest().save(tmp_path)
        seal_each(ledger, ids, range(PARTS_PER_COMPACTION - 1))
        reader = RunReader(tmp_path)
        tables = reader.finished()  # a generator that has looked everything up and read nothing yet
        seal_each(ledger, ids, range(PARTS_PER_COMPACTION - 1, PARTS_PER_COMPACTION - 1 + more))
        table = pa.concat_tables(tables)
    assert table["gxr_text"].to_pylist() == [f"text of {name}" for name in ids[: PARTS_PER_COMPACTION - 1]]


def test_a_merge_that_opened_the_folder_before_a_compaction_finds_its_rows(tmp_path, monkeypatch):
    ids, real = names(MANY), merging.read_group
    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        manifest().save(tmp_path)
        seal_each(ledger, ids, range(PARTS_PER_COMPACTION - 1))

        def read_group(folder, number, group):
            if number == 9 and part_numbers(folder)[0] == 1:
                seal_each(ledger, ids, [PARTS_PER_COMPACTION - 1])
            return real(folder, number, group)

        monkeypatch.setattr(merging, "read_group", read_group)
        texts = read_results(tmp_path)["gxr_text"].tolist()
    assert texts == [f"text of {name}" for name in ids[: PARTS_PER_COMPACTION - 1]]


def test_a_deleted_part_is_a_machine_error(tmp_path):
    with open_run(tmp_path) as ledger:
        start(ledger, ["a"])
        seal_each(ledger, ["a"])
        part_path(tmp_path, 1).unlink()
        with pytest.raises(StorageError, match="missing"):
            finish(ledger)


def test_readers_during_compaction_never_fail_and_never_count_backwards(tmp_path):
    ids = names(6 * PARTS_PER_COMPACTION)
    trouble: list[BaseException] = []
    over = threading.Event()

    def read() -> None:
        before = 0
        try:
            while not over.is_set():
                (seen,) = statuses(tmp_path)
                assert seen.ok >= before, "rows that were counted are missing"
                before = seen.ok
                assert len(read_results(tmp_path)) >= before
        except BaseException as error:
            trouble.append(error)

    with open_run(tmp_path) as ledger:
        start(ledger, ids)
        manifest().save(tmp_path)
        thread = threading.Thread(target=read)
        thread.start()
        try:
            seal_each(ledger, ids)
        finally:
            over.set()
            thread.join()
    assert not trouble
