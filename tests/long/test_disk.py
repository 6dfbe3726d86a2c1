"""Disks that fail: each fault is exit 4 with one message, loses no sealed row, and the run resumes once it is fixed."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from disks import remount, tmpfs
from faults import CHECKPOINTS, JOB, can_trace, changed, traced, workplace
from running import COMMAND, Workplace, mostly_long, without_times

ROWS = 150
FAST = JOB + CHECKPOINTS
# Few slots: the first rows finish after a fifth of a second and the last ones after 15.
SLOW = "[engine]\nkind = 'echo'\nslots = 2\n[echo]\ntokens_per_second = 100\n[run]\ncheckpoint_seconds = 0.05\n"
needs_strace = pytest.mark.skipif(not can_trace(), reason="strace is missing or not permitted to trace")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict]:
    """The results of a run on a working disk."""
    work = workplace(tmp_path_factory.mktemp("whole") / "w")
    work.run()
    return without_times(work.results())


@pytest.fixture
def work(tmp_path) -> Workplace:
    return workplace(tmp_path / "w")


def contents(work: Workplace) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in work.parts()}


def is_the_one_message(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit 4; one message that says what is wrong, where, and what to do next."""
    assert done.returncode == 4, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stderr.count("Error:") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    message = done.stderr[done.stderr.index("Error:") :]
    assert re.search(r"\n  where: (/|standard output).*\n  next:  .+\n$", message), message
    for word in words:
        assert word in message


def finishes(work: Workplace, whole: list[dict], sealed: dict[Path, bytes]) -> None:
    """The same command finishes; sealed rows are unchanged and not generated again."""
    for path in sealed:
        pq.read_table(path).validate(full=True)
    done = work.run(expect=None)
    assert done.returncode == 0, done.stderr
    assert without_times(work.results()) == whole
    assert changed(work, sealed) == ""
    keys = [row for path in work.parts() for row in pq.read_table(path)["gxr_row_id"].to_pylist()]
    assert sorted(keys) == sorted(set(keys))


# Full at the folder, the lock, the table, the manifest, the first parts, later ones, and the results.
@pytest.mark.parametrize("kibibytes", mostly_long([12, 4, 20, 48, 28, 60, 80], every=3))
def test_a_full_disk(work, whole, kibibytes):
    with tmpfs(work.folder / "outputs", f"{kibibytes}k") as disk:
        is_the_one_message(work.run(expect=None), "The disk is full.", "free up disk space")
        sealed = contents(work)
        is_the_one_message(work.run(expect=None), "The disk is full.")
        remount(disk, "size=8m")
        finishes(work, whole, sealed)


@pytest.mark.parametrize("limit", mostly_long([0, 16, 1000, 3500, 9000], every=3))
def test_a_file_size_limit(work, whole, limit):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    done = subprocess.run(
        [*COMMAND, "run", "j.toml"],
        cwd=work.folder,
        text=True,
        capture_output=True,
        preexec_fn=limited,
        check=False,
    )
    is_the_one_message(done, "size limit", "ulimit -f")
    finishes(work, whole, contents(work))


TEMPORARY = [("check", "j.toml"), ("init", "f.csv", "--to", "k.toml"), ("templates", "render", "j.toml")]


@pytest.mark.parametrize("verb", mostly_long(TEMPORARY, every=3))
def test_a_full_temporary_folder(work, verb):
    work.table(9999)
    with tmpfs(work.folder / "tmp", "64k") as folder:
        more = ("--rows", "9999") if verb[0] == "templates" else ()
        done = subprocess.run(
            [*COMMAND, *verb, *more],
            cwd=work.folder,
            env=os.environ | {"TMPDIR": str(folder)},
            text=True,
            capture_output=True,
            check=False,
        )
        is_the_one_message(done, "The disk is full.", "set TMPDIR to another folder", str(folder))
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("verb", mostly_long(TEMPORARY, every=3))
def test_no_folder_for_temporary_files(work, verb):
    done = subprocess.run(
        [*COMMAND, *verb],
        cwd=work.folder,
        text=True,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)),
        check=False,
    )
    is_the_one_message(done, "No temporary folder can be made.", "set TMPDIR to another folder")


def test_a_disk_that_is_read_only_from_the_start(work, whole):
    with tmpfs(work.folder / "outputs", "8m") as disk:
        remount(disk, "ro")
        is_the_one_message(work.run(expect=None), "read-only")
        remount(disk, "rw")
        finishes(work, whole, {})


def test_a_disk_that_becomes_read_only(work, whole):
    work.job(SLOW)
    with tmpfs(work.folder / "outputs/j/parts", "8m") as disk:
        child = work.start("run", "j.toml")
        wait_for_parts(work, 2)
        remount(disk, "ro")
        out, err = child.communicate(timeout=60)
        is_the_one_message(subprocess.CompletedProcess([], child.returncode, out, err), "read-only")
        sealed = contents(work)
        assert sealed
        in_parts = sum(pq.read_metadata(path).num_rows for path in sealed)
        assert work.manifest()["invocations"][-1]["counts"]["ok"] == in_parts, "it counts rows that it could not save"
        assert f"unfinished, {in_parts} generated" in work.gxr("status", "outputs").stdout
        remount(disk, "rw")
        work.job(FAST)
        finishes(work, whole, sealed)


@pytest.mark.parametrize("failing", [{}, {"fail_containing": "number 00"}], ids=["all well", "with failed rows"])
@pytest.mark.parametrize("back", [True, False], ids=["restored", "deleted"])
def test_a_run_folder_that_disappears(work, whole, failing, back):
    work.job(SLOW)
    child = work.start("run", "j.toml", faults=failing)
    wait_for_parts(work, 2)
    run = work.folder / "outputs/j"
    run.rename(work.folder / "gone")
    out, err = child.communicate(timeout=60)
    is_the_one_message(subprocess.CompletedProcess([], child.returncode, out, err), "The run folder is missing.")
    work.job(FAST)
    if not back:
        shutil.rmtree(work.folder / "gone")
        finishes(work, whole, {})
        return
    (work.folder / "gone").rename(run)
    sealed = contents(work)
    assert sealed
    if failing:
        work.run("--retry", "failed")
        assert [row["gxr_text"] for row in work.results()].count(None) == 0
    else:
        finishes(work, whole, sealed)


SAYS = {"EIO": "input/output error", "EDQUOT": "quota", "ENOSPC": "The disk is full.", "EROFS": "read-only"}


@needs_strace
@pytest.mark.parametrize(
    "fault",
    mostly_long(
        [
            "mkdir:error=EDQUOT:when=1",
            "write:error=ENOSPC:when=1",
            "write:error=EIO:when=5+",
            "write:error=EDQUOT:when=14+",
            "write:error=EIO:when=16+",
            "write:error=EDQUOT:when=18",
            "write:error=EIO:when=10+",
            "fsync:error=EIO:when=1",
            "fsync:error=EIO:when=4+",
            "fsync:error=EIO:when=7",
            "fsync:error=EDQUOT:when=8+",
            "fsync:error=EIO:when=15",
            "rename:error=EROFS:when=2+",
            "rename:error=EIO:when=4",
            "rename:error=ENOSPC:when=8+",
        ],
        every=3,
    ),
)
def test_a_call_that_fails(work, whole, fault):
    """Once, or (+) from then on."""
    done = traced(work, "run", "j.toml", inject=fault)
    is_the_one_message(done, SAYS[fault.split(":")[1].removeprefix("error=")])
    finishes(work, whole, contents(work))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("words", ["run j.toml", "run j.toml --json", "check j.toml"])
def test_an_output_that_cannot_be_printed(work, whole, words):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *words.split()], cwd=work.folder, text=True, stdout=full, stderr=subprocess.PIPE, check=False
        )
    done.stdout = ""
    is_the_one_message(done, "standard output", "No space left")
    finishes(work, whole, contents(work))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_message_that_cannot_be_printed_leaves_the_exit_code(work):
    (work.folder / "f.csv").unlink()
    with open("/dev/full", "w") as full:
        assert subprocess.run([*COMMAND, "run", "j.toml"], cwd=work.folder, stderr=full, check=False).returncode == 2


@needs_strace
@pytest.mark.parametrize(
    "words", mostly_long(["run j.toml", "status outputs/j", "export outputs/j --format csv --partial"], every=3)
)
@pytest.mark.parametrize("file", ["parts/part-00000001.parquet", "input.parquet"])
def test_a_file_that_is_temporarily_unreadable_is_not_reported_as_damaged(work, whole, words, file):
    work.run("--limit", "30")
    sealed = contents(work)
    read = [f"outputs/j/{file}", str(work.folder / "outputs/j" / file)]
    done = traced(work, *words.split(), inject="pread64,read:error=EIO:when=1+", only=read)
    is_the_one_message(done, "input/output error", file)
    assert not list(work.folder.glob("outputs/j/parts/*.damaged"))
    finishes(work, whole, sealed)


def wait_for_parts(work: Workplace, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(work.parts()) < count:
        assert time.monotonic() < deadline, "no parts were written"
        time.sleep(0.01)
