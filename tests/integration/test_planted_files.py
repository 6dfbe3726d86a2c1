"""Links, pipes and devices in place of files of runs and jobs; locks that vanish; what killed commands leave."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from running import COMMAND, Workplace
from small_runs import finish, result, start

from gxr_batch import files
from gxr_batch.cli import main
from gxr_batch.errors import StorageError
from gxr_batch.files import new_file, open_plain, remove_leftovers, scratch_folder, temporary_path
from gxr_batch.ledger import open_run

RUN_FILES = ("run.json", "run.lock", "log.jsonl", "inflight.json", "exports.json", "input.parquet", "results.parquet")
READERS = (
    ("status", "outputs/j"),
    ("show", "outputs/j"),
    ("export", "outputs/j", "--format", "jsonl"),
    ("report", "outputs/j"),
)
VICTIM = "a file of the user elsewhere"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a finished run of two rows and its job."""
    work = Workplace(tmp_path)
    work.table(2)
    monkeypatch.chdir(tmp_path)
    assert command("run", "j.toml").exit_code == 0
    return tmp_path


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def refused(done: Result, code: int, *said: str) -> None:
    assert done.exit_code == code, done.output
    assert done.stderr.count("Error:") == 1
    for words in said:
        assert words in done.stderr


def more_rows(place: Path) -> None:
    with (place / "f.csv").open("a") as file:
        file.write("new,another finding\n")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_pipe_in_a_run_folder_stops_no_command_from_ending(place, name):
    path = place / "outputs/j" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    more_rows(place)
    for verb in (*READERS, ("run", "j.toml")):
        done = command(*verb)
        assert done.exit_code in {0, 4}, f"{verb}: {done.output}"
        if done.exit_code:
            refused(done, 4, str(path), "it is a pipe, not a plain file", "move it away")
    assert name in {"inflight.json", "exports.json", "results.parquet"} or command("run", "j.toml").exit_code == 4


@pytest.mark.parametrize("kind", ["link", "socket", "device"])
def test_other_files_in_place_of_a_manifest_are_named(place, kind):
    path = place / "outputs/j/run.json"
    path.rename(place / "elsewhere.json")
    if kind == "link":
        path.symlink_to(place / "elsewhere.json")
    elif kind == "socket":
        os.chdir(path.parent)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("run.json")
        os.chdir(place)
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
        except OSError:
            pytest.skip("only root may make a device")
    refused(command("show", "outputs/j"), 4, f"it is a {kind}, not a plain file", str(path))
    refused(command("run", "j.toml"), 4, f"it is a {kind}, not a plain file")


@pytest.mark.parametrize("name", [*RUN_FILES, "failed.parquet", "results.csv", "report.html"])
@pytest.mark.parametrize("to", ["file", "nothing"])
def test_nothing_is_written_through_a_link_in_a_run_folder(place, name, to):
    victim = place / "victim"
    if to == "file":
        victim.write_text(VICTIM)
    path = place / "outputs/j" / name
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    more_rows(place)
    for verb in (("run", "j.toml"), ("export", "outputs/j", "--format", "csv"), ("report", "outputs/j")):
        done = command(*verb)
        assert done.exit_code in {0, 2, 4}, done.output
        assert "Traceback" not in done.output
    assert victim.read_text() == VICTIM if to == "file" else not victim.exists()


@pytest.mark.parametrize("name", ["parts", "reviews"])
def test_a_folder_of_a_run_that_is_a_link_is_refused(place, name):
    (place / "elsewhere").mkdir()
    path = place / "outputs/j" / name
    if path.exists():
        path.rename(place / "old")
    path.symlink_to(place / "elsewhere")
    more_rows(place)
    for verb in (*READERS, ("check", "j.toml"), ("run", "j.toml")):
        refused(command(*verb), 4, "it is a link, not a folder", str(path))
    assert not list((place / "elsewhere").iterdir())


def test_a_part_that_is_a_link_or_a_pipe_is_refused(place):
    part = place / "outputs/j/parts/part-00000001.parquet"
    part.rename(place / "part")
    part.symlink_to(place / "part")
    refused(command("run", "j.toml", "--limit", "1"), 4, "it is a link, not a plain file", str(part))
    part.unlink()
    os.mkfifo(part)
    refused(command("status", "outputs/j"), 4, "it is a pipe, not a plain file", str(part))


def test_a_run_folder_may_be_a_link_and_fresh_renames_what_it_leads_to(place):
    (place / "big").mkdir()
    (place / "outputs/j").rename(place / "big/j")
    (place / "outputs/j").symlink_to(place / "big/j")
    more_rows(place)
    assert "1 new" in command("run", "j.toml").stderr
    done = command("run", "j.toml", "--fresh")
    (kept,) = (place / "big").glob("j.before-*")
    assert f"The earlier run is kept as {kept}." in done.stderr
    assert (place / "outputs/j").is_symlink()
    assert (place / "big/j/run.json").exists()
    assert (kept / "results.parquet").exists()
    assert [path.name for path in (place / "outputs").iterdir()] == ["j"]
    assert (kept / "run.lock").read_text() == ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["run.json", "run.lock", "inflight.json", "exports.json"])
def test_status_of_a_folder_shows_the_other_runs_next_to_a_bad_one(place, name):
    for other, content in (("deep", b"[" * 100_000), ("long", b'{"a": "' + b"x" * 2**20), ("pipe", None)):
        (place / "outputs" / other).mkdir()
        for file in (place / "outputs/j").iterdir():
            if file.is_file() and file.name != name:
                (place / "outputs" / other / file.name).write_bytes(file.read_bytes())
        if content is None:
            os.mkfifo(place / "outputs" / other / name)
        else:
            (place / "outputs" / other / name).write_bytes(content)
    done = command("status", "outputs")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert any(line.startswith("outputs/j ") and "finished" in line for line in lines)
    assert done.stdout.count("unreadable") == (3 if name == "run.json" else 0)


def test_a_run_may_be_called_run_json(place):
    (place / "outputs/j").rename(place / "outputs/run.json")
    assert "outputs/run.json" in command("status", "outputs").stdout
    assert command("show", "outputs/run.json").exit_code == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device", "endless", "large"])
def test_job_files_and_templates_are_plain_files_of_a_sensible_size(place, kind):
    said = {
        "pipe": "it is a pipe, not a plain file",
        "device": "it is a device, not a plain file",
        "endless": "it is a device, not a plain file",
        "large": "it is larger than 4 MiB",
    }[kind]
    for name in ("other.toml", "own.j2"):
        path = place / name
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "large":
            with path.open("wb") as file:
                file.truncate(2**33)
        else:
            path.symlink_to("/dev/null" if kind == "device" else "/dev/zero")
    for verb in ("check", "run", "finetune"):
        refused(command(verb, "other.toml"), 2, "The job file cannot be read", said, "other.toml")
    refused(command("templates", "show", "own.j2"), 2, "The template cannot be read", said, "own.j2")
    refused(command("check", "j.toml", "--set", "prompt.template=own.j2"), 2, said)


def test_a_job_file_and_a_template_may_be_links(place):
    (place / "mine.j2").write_text("{{ findings }}")
    (place / "linked.j2").symlink_to("mine.j2")
    (place / "linked.toml").symlink_to("j.toml")
    assert command("check", "linked.toml", "--output", "o", "--set", "prompt.template=linked.j2").exit_code == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["f.csv", "f.jsonl", "f.parquet", "f.xlsx", "f.csv.gz"])
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_tables_and_sheets_are_plain_files(place, name, kind):
    path = place / "other" / name
    path.parent.mkdir()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    for verb in (("check", "j.toml", "--set", f"input.path={path}"), ("init", str(path))):
        refused(command(*verb), 2, "not a regular file", str(path))
    refused(command("review", "import", "outputs/j", str(path)), 2, str(path))


def write_after(vanish: Callable[[Path], object], folder: Path) -> None:
    """Seal a row, let the lock vanish and another process in, and seal the next one, which must raise."""
    with open_run(folder) as ledger:
        start(ledger, ["a", "b", "c"])
        ledger.add(0, result("a"))
        ledger.seal()
        vanish(folder)
        with open_run(folder) as second:  # nothing keeps another process out now
            second.log.event("started")
            ledger.add(1, result("b"))
            before = sorted(path.name for path in folder.rglob("*"))
            for write in (ledger.drop_unsealed, ledger.write_failed, lambda: finish(ledger)):
                with pytest.raises(StorageError):
                    write()
            try:
                ledger.seal()
            finally:
                assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_run_stops_if_its_lock_file_vanishes_and_loses_no_saved_row(tmp_path):
    for vanish in (
        lambda folder: (folder / "run.lock").unlink(),
        lambda folder: (folder / "run.lock").replace(folder / "old.lock"),
        lambda folder: folder.rename(tmp_path / "moved"),
    ):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        with pytest.raises(StorageError, match=r"lost its lock|run folder is missing") as caught:
            write_after(vanish, folder)
        assert "run the same command again" in str(caught.value)
        home = folder if folder.exists() and list((folder / "parts").iterdir()) else tmp_path / "moved"
        assert [path.name for path in (home / "parts").iterdir()] == ["part-00000001.parquet"]


def test_a_running_command_whose_lock_is_deleted_ends_with_one_message(tmp_path):
    work = Workplace(tmp_path)
    work.job("[engine]\nkind = 'echo'\nslots = 2\n[echo]\ntokens_per_second = 200\n[run]\ncheckpoint_seconds = 0.1\n")
    child = work.start("run", "j.toml", "--quiet")
    until(work.parts)
    (tmp_path / "outputs/j/run.lock").unlink()
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said.count("Error:")) == (4, 1), said
    assert "This process lost its lock" in said
    assert work.run_json()["ok"] == 60
    keys = [row["gxr_row_id"] for row in work.results()]
    assert len(keys) == len(set(keys)) == 60


def until(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_check_ended_by_a_signal_leaves_no_copy_of_the_table(tmp_path, number):
    work = Workplace(tmp_path)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    work.table(200_000)
    environment = os.environ | {"TMPDIR": str(temporary)}
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, and children inherit that
    try:
        child = subprocess.Popen([*COMMAND, "check", "j.toml"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGHUP, hung_up)
    until(lambda: any(path.stat().st_size for path in temporary.rglob("input.parquet")))
    (folder,) = temporary.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    child.send_signal(number)
    said = child.communicate(timeout=60)[1].decode()
    assert (child.returncode, said.count("Stopped by a signal.")) == (
        (-number, 0) if number == signal.SIGKILL else (75, 1)
    ), said
    assert list(temporary.iterdir()) == ([folder] if number == signal.SIGKILL else [])
    work.table(3)
    subprocess.run([*COMMAND, "check", "j.toml"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("form", ["xlsx", "csv", "jsonl"])
def test_a_killed_export_leaves_texts_only_until_the_next_one(place, form):
    left = "import os, signal; from gxr_batch.cells import as_text\nfrom gxr_batch.disk import publish\n"
    kill = "import gxr_batch.disk as disk\ndisk.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    code = f"{left}{kill}from gxr_batch.cli import main\nmain(['export', 'outputs/j', '--format', '{form}'])"
    subprocess.run([os.sys.executable, "-c", code], cwd=place, check=False)
    run = place / "outputs/j"
    (half,) = run.glob(f"results.{form}.*.tmp")
    assert half.stat().st_size
    (run / "notes.tmp").write_text("a file of the user")
    (run / "results.xlsx.mine.tmp").write_text("another")
    assert command("export", "outputs/j", "--format", form).exit_code == 0
    assert sorted(path.name for path in run.glob("*.tmp")) == ["notes.tmp", "results.xlsx.mine.tmp"]


def test_the_next_run_removes_what_killed_ones_left_of_any_version(place):
    run = place / "outputs/j"
    left = [
        "run.json.tmp",
        "input.parquet.tmp",
        "input.parquet.0123456789abcdef.tmp.ids",
        "parts/part-00000007.parquet.tmp",
        "parts/part-00000008.parquet.0123456789abcdef.tmp",
        "results.csv.4711-0123abcd.tmp",
    ]
    for name in left:
        (run / name).write_text("half")
    (run / "results.xlsx.0123456789abcdef.tmp").mkdir()
    (run / "results.xlsx.0123456789abcdef.tmp/rows").write_text("half")
    assert command("run", "j.toml").exit_code == 0
    assert not list(run.rglob("*.tmp*"))


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("already_locked", [False, True])
def test_what_another_process_takes_for_a_leftover_is_made_again(tmp_path, monkeypatch, folder, already_locked):
    lock = files.try_lock
    seen = []

    def once_removed(descriptor):
        """Another process finds what was made, and removes it before the first attempt to lock it, or during that."""
        if not seen:
            (found,) = tmp_path.iterdir()
            seen.append(found)
            if not already_locked:
                remove_leftovers(tmp_path)
                return lock(descriptor)
            other = os.open(found, os.O_RDONLY)
            assert lock(other)
            assert not lock(descriptor)
            found.rmdir() if folder else found.unlink()
            os.close(other)
            return False
        return lock(descriptor)

    monkeypatch.setattr(files, "try_lock", once_removed)
    target = tmp_path / "results.csv"
    with scratch_folder(target.name, tmp_path) if folder else new_file(temporary_path(target)):
        assert seen
        (found,) = tmp_path.iterdir()
        remove_leftovers(tmp_path)
        assert found.exists()


def test_a_folder_removed_before_it_is_opened_is_made_again(tmp_path, monkeypatch):
    make = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, mode: (make(path, mode), monkeypatch.undo(), path.rmdir()))
    with scratch_folder("results.csv", tmp_path) as scratch:
        assert scratch.exists()


def test_a_temporary_file_that_is_being_written_is_left_alone(tmp_path):
    path = temporary_path(tmp_path / "results.csv")
    victim = tmp_path / "victim"
    victim.write_text(VICTIM)
    planted = temporary_path(tmp_path / "results.csv")
    planted.symlink_to(victim)
    with new_file(path), scratch_folder("results.csv", tmp_path) as scratch:
        remove_leftovers(tmp_path)
        assert path.exists()
        assert scratch.exists()
    remove_leftovers(tmp_path, "other")
    assert path.exists()
    remove_leftovers(tmp_path)
    assert not path.exists()
    assert not scratch.exists()
    assert victim.read_text() == VICTIM
    with pytest.raises(FileExistsError):
        new_file(planted)
    with pytest.raises(OSError, match="it is a link"):
        open_plain(planted)


def test_temporary_names_cannot_be_foreseen(place, monkeypatch):
    names = []
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: names.append(path.name) or real(path, target))
    more_rows(place)
    assert command("run", "j.toml").exit_code == 0
    assert len(names) > 4
    assert len({name.split(".")[-2] for name in names}) == len(names)
    assert json.loads((place / "outputs/j/run.json").read_text())["invocations"]
