"""Power loss: a file that kept its name and lost its bytes is set aside, reported and replaced."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from running import Workplace, mostly_long, without_times

import gxr_batch
from gxr_batch.errors import StorageError
from gxr_batch.ledger.parts import KEY_COLUMNS, DamagedPart, read_part
from gxr_batch.records import part_schema
from gxr_batch.run.status import statuses

ROWS, ROWS_A_PART = 60, 6
JOB = f"[engine]\nkind = 'echo'\nslots = {ROWS_A_PART}\n[echo]\ntokens_per_second = 400\n"
# Slots finish together, about 0.2 s apart, and each time one part is sealed: too few for a compaction.
IN_PARTS = JOB.replace("400", "100") + "[run]\ncheckpoint_seconds = 0.1\n"


def zeros_after_the_start(whole: bytes) -> bytes:
    """Only the first block reached the disk."""
    return whole[:512] + bytes(len(whole) - 512)


def lost_text_page(whole: bytes) -> bytes:
    """Footer and keys are sound; only the texts are not."""
    chunk = pq.read_metadata(io.BytesIO(whole)).row_group(0).column(part_schema().names.index("gxr_text"))
    end = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
    return whole[: end - 8] + bytes(8) + whole[end:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "one byte short": lambda whole: whole[:-1],
    "zeros": lambda whole: bytes(len(whole)),
    "zeros after the start": zeros_after_the_start,
    "garbage": lambda whole: random.Random(5).randbytes(len(whole)),
    "another file": lambda whole: b"case_id,findings\n" * 200,
    "lost text": lost_text_page,
}


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> Path:
    """A run with many parts that stopped before its last rows."""
    work = Workplace(tmp_path_factory.mktemp("halfway"))
    work.table([(f"C{number:02}", f"finding number {number:02}") for number in range(ROWS)])
    work.job(IN_PARTS)
    work.run(expect=4, faults={"crash_after": 50})
    work.job(JOB)
    assert len(work.parts()) > 3
    return work.folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict]:
    work = Workplace(tmp_path_factory.mktemp("whole"))
    work.table([(f"C{number:02}", f"finding number {number:02}") for number in range(ROWS)])
    work.run()
    return without_times(work.results())


@pytest.fixture
def work(halfway, tmp_path) -> Workplace:
    shutil.copytree(halfway, tmp_path / "w")
    made = Workplace.__new__(Workplace)
    made.folder = tmp_path / "w"
    return made


def damage(path: Path, kind: str) -> bytes:
    damaged = DAMAGES[kind](path.read_bytes())
    path.write_bytes(damaged)
    return damaged


def rows_of(path: Path) -> set[str]:
    return set(pq.read_table(path)["gxr_row_id"].to_pylist())


@pytest.mark.parametrize("kind", mostly_long(list(DAMAGES), every=3))
def test_a_damaged_part_is_set_aside_reported_and_generated_again(work, whole, kind):
    part = work.parts()[1]
    before = {path.name for path in work.parts()}
    lost = rows_of(part)
    content = damage(part, kind)
    assert len(gxr_batch.read_results(work.folder / "outputs/j")) == 50 - len(lost)
    assert part.read_bytes() == content, "a reader renamed or changed it"
    done = work.run()
    assert f"1 damaged part was set aside: {part.name}.damaged; its rows are generated again." in done.stderr
    aside = part.with_name(part.name + ".damaged")
    assert aside.read_bytes() == content
    assert not part.exists(), "its number was used again"
    new = [path for path in work.parts() if path.name not in before]
    assert lost <= set().union(*map(rows_of, new))
    entry = work.manifest()["invocations"][-1]
    assert entry["set_aside"] == [aside.name]
    assert any("damaged" in notice for notice in entry["notices"])
    assert without_times(work.results()) == whole
    keys = [row for path in work.parts() for row in pq.read_table(path)["gxr_row_id"].to_pylist()]
    assert sorted(keys) == sorted(set(keys))


def test_readers_skip_damaged_parts_and_rename_nothing(work):
    parts = work.parts()
    lost = rows_of(parts[0]) | rows_of(parts[2])
    damage(parts[0], "empty")
    damage(parts[2], "garbage")
    names = sorted(path.name for path in (work.folder / "outputs/j/parts").iterdir())
    done = work.gxr("status", "outputs/j")
    assert f"unfinished, {50 - len(lost)} generated" in done.stdout
    work.gxr("export", "outputs/j", "--format", "csv", "--partial", "--to", "out.csv")
    assert (work.folder / "out.csv").read_text(encoding="utf-8-sig").count("finding number") == 2 * (50 - len(lost))
    assert len(gxr_batch.read_results(work.folder / "outputs/j")) == 50 - len(lost)
    assert sorted(path.name for path in (work.folder / "outputs/j/parts").iterdir()) == names


def test_several_damaged_parts_and_a_name_that_is_taken(work, whole):
    parts = work.parts()
    taken = parts[-1].with_name(parts[-1].name + ".damaged")
    taken.write_text("an earlier one")
    for path in (parts[0], parts[-1]):
        damage(path, "cut")
    done = work.run()
    names = f"{parts[0].name}.damaged, {parts[-1].name}.damaged-2"
    assert f"2 damaged parts were set aside: {names}; their rows are generated again." in done.stderr
    assert taken.read_text() == "an earlier one"
    assert without_times(work.results()) == whole


def test_the_number_of_a_part_that_was_set_aside_is_never_reused(work):
    for path in work.parts():
        damage(path, "zeros")
    numbers = {path.name for path in work.parts()}
    work.run("--limit", "20")
    assert not numbers & {path.name for path in work.parts()}
    for path in work.parts():
        path.rename(path.with_name(path.name + ".damaged"))
        numbers.add(path.name)
    work.run()
    assert not numbers & {path.name for path in work.parts()}


def test_an_older_result_counts_again_if_the_newer_one_is_lost(work):
    work.run(expect=3, faults={"fail_containing": "57"})
    before = {path.name for path in work.parts()}
    work.run("--retry", "failed", expect=None)
    (newest,) = [path for path in work.parts() if path.name not in before]
    damage(newest, "cut")
    frame = gxr_batch.read_results(work.folder / "outputs/j")
    assert len(frame) == ROWS


def test_temporary_files_of_a_killed_run_are_harmless(work, whole):
    folder = work.folder / "outputs/j"
    for name in ("parts/part-00000099.parquet.tmp", "results.parquet.tmp", "run.json.tmp", "input.parquet.tmp"):
        (folder / name).write_bytes(b"PAR1 half")
    assert "unfinished, 50 generated" in work.gxr("status", "outputs").stdout
    assert len(gxr_batch.read_results(folder)) == 50
    work.run()
    assert without_times(work.results()) == whole


def test_a_lost_manifest_is_restored_from_the_newest_sound_part(work):
    (work.folder / "outputs/j/run.json").unlink()
    damage(work.parts()[-1], "empty")
    assert "sampling.top_k" in work.run("--set", "sampling.top_k=20", expect=2).stderr
    work.run()


@pytest.mark.parametrize("kind", mostly_long(["cut", "empty", "zeros", "garbage"], every=3))
def test_a_damaged_copy_of_the_table_is_set_aside_and_read_again(work, whole, kind):
    content = damage(work.folder / "outputs/j/input.parquet", kind)
    done = work.gxr("status", "outputs/j", expect=2)
    assert "The run's copy of the table is damaged." in done.stderr
    assert "Traceback" not in done.stderr
    done = work.run()
    assert "input.parquet was damaged and set aside as input.parquet.damaged." in done.stderr
    assert (work.folder / "outputs/j/input.parquet.damaged").read_bytes() == content
    assert without_times(work.results()) == whole
    assert work.manifest()["invocations"][-1]["done"] == 10, "sound parts were not used"


@pytest.mark.parametrize("kind", mostly_long(["cut", "empty", "zeros", "garbage"], every=3))
def test_damaged_results_are_written_again_from_the_parts(work, whole, kind):
    work.run()
    damage(work.folder / "outputs/j/results.parquet", kind)
    assert len(gxr_batch.read_results(work.folder / "outputs/j")) == ROWS
    done = work.gxr("export", "outputs/j", "--format", "csv", expect=None)
    assert "Traceback" not in done.stderr
    assert work.run_json()["generated_now"] == 0
    assert without_times(work.results()) == whole


def test_a_finished_run_whose_table_was_lost_reads_it_again(work, whole):
    work.run()
    damage(work.folder / "outputs/j/input.parquet", "empty")
    assert work.run_json()["generated_now"] == 0
    assert f"finished, {ROWS} generated" in work.gxr("status", "outputs/j").stdout
    assert without_times(work.results()) == whole


def test_a_finished_run_with_the_table_of_another_run_reads_its_own_again(work, whole):
    work.run()
    copy = work.folder / "outputs/j/input.parquet"
    work.gxr("run", "j.toml", "--output", "outputs/other", "--limit", "3")
    shutil.copy(work.folder / "outputs/other/input.parquet", copy)
    assert f"{ROWS - 3} new, 0 edited, 0 removed, 3 kept; 0 to generate" in work.run().stderr
    assert pq.read_metadata(copy).num_rows == ROWS
    assert without_times(work.results()) == whole
    assert "Resuming" not in work.run().stderr


def test_a_temporary_read_error_is_not_damage(work, monkeypatch):
    """Nothing is set aside because of permissions, a temporary disk error, or too little memory."""
    folder = work.folder / "outputs/j"

    def refuse(*arguments, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(StorageError, match="input/output error") as caught:
        read_part(folder, 1)
    assert not isinstance(caught.value, DamagedPart)


def test_no_flipped_bit_of_a_page_is_read_as_another_text(work):
    """Each bit flip is detected or changes nothing; only the footer, which holds no text, has no checksum."""
    folder, path = work.folder / "outputs/j", work.parts()[0]
    content, rng = path.read_bytes(), random.Random(6)
    sound = read_part(folder, 1)
    pages = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    found = 0
    for _ in range(300):
        flipped = bytearray(content)
        flipped[rng.randrange(pages)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert read_part(folder, 1).equals(sound)
        except DamagedPart:
            found += 1
    assert found > 100
    path.write_bytes(content)
    assert set(KEY_COLUMNS) <= set(read_part(folder, 1).column_names)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_part_without_read_permission_is_not_set_aside(work):
    path = work.parts()[0]
    path.chmod(0)
    done = work.run(expect=4)
    assert "Permission" in done.stderr
    assert path.exists()
    path.chmod(0o644)
    work.run()


@pytest.mark.parametrize("look", [1, 2])
def test_status_survives_a_file_renamed_at_the_same_time(work, monkeypatch, look):
    """A part has its temporary name when the folder is listed, but no longer when it is first or next accessed."""
    temporary = work.folder / "outputs/j/parts/part-00000099.parquet.tmp"
    temporary.write_bytes(b"PAR1 half")
    real, looks = os.stat, []

    def renamed(path, *arguments, **options):
        if str(path) == str(temporary):
            looks.append(path)
            if len(looks) == look:
                temporary.unlink()
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", renamed)
    (found,) = statuses(work.folder / "outputs/j")
    assert looks, "it was never accessed"
    assert found.ok == 50


def test_a_finished_run_with_a_damaged_part_generates_its_rows_again(work, whole):
    work.run()
    damage(work.parts()[0], "cut")
    lost = json.loads(work.gxr("status", "outputs/j", "--json").stdout)[0]
    assert (lost["state"], lost["damaged_parts"]) == ("unfinished", 1)
    done = work.run()
    assert "damaged part was set aside" in done.stderr
    assert without_times(work.results()) == whole


def test_results_with_flipped_bits_are_merged_again(work, whole):
    work.run()
    path = work.folder / "outputs/j/results.parquet"
    content = bytearray(path.read_bytes())
    for at in range(100, 164):
        content[at] ^= 0xFF
    path.write_bytes(content)
    frame = gxr_batch.read_results(work.folder / "outputs/j")
    assert frame["gxr_text"].tolist() == [row["gxr_text"] for row in whole]
    assert work.run_json()["generated_now"] == 0
    assert without_times(work.results()) == whole


def test_a_run_whose_results_could_not_be_written_is_not_finished(work):
    work.run()
    (work.folder / "outputs/j/results.parquet").rename(work.folder / "gone")
    assert json.loads(work.gxr("status", "outputs/j", "--json").stdout)[0]["state"] == "unfinished"
