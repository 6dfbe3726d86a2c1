"""`finetune` with broken and planted files, full disks, missing permissions and signals: named, and still resumable.

Each test starts from a copy of a training that was stopped after two of three steps, with two checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import socket
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from disks import remount, tmpfs
from other_user import shared_folder, unprivileged
from running import mostly_long
from safetensors.torch import load_file, save_file
from trainings import Stopping, equal, small_job, small_model, train, weights

from gxr_batch.cli import main
from gxr_batch.errors import GxrError, MachineError, RunError, RunLocked, StorageError
from gxr_batch.finetune.train import Trainer
from gxr_batch.finetune.workdir import Work, open_work

pytestmark = pytest.mark.model

Break = Callable[[Path], object]
TRAINING = Path("outputs/j-adapter.training")
CHECKPOINTS = TRAINING / "checkpoints"
WEIGHTS, OPTIMIZER, SCHEDULER = "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"
RANDOM, STATE = "rng_state.pth", "trainer_state.json"
READ = (WEIGHTS, OPTIMIZER, SCHEDULER, RANDOM, STATE)
VICTIM = "a file of the user elsewhere"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    small_job(folder, small_model(tmp_path_factory.mktemp("tiny-small")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stopping = Stopping(2)
        train(stopper=stopping.stopper, show=stopping)
    return folder


@pytest.fixture(scope="module")
def whole(stopped, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The adapter of the same training without a stop."""
    folder = shutil.copytree(stopped, tmp_path_factory.mktemp("whole") / "w")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(fresh=True)
        return weights()


@pytest.fixture
def place(stopped, tmp_path, monkeypatch) -> Path:
    folder = shutil.copytree(stopped, tmp_path / "w")
    monkeypatch.chdir(folder)
    return folder


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["finetune", "j.toml", *arguments])


def refused(done: Result, *said: str) -> None:
    """Exit 4 with one message."""
    assert done.exit_code == 4, done.output
    assert done.stderr.count("Error:") == 1
    assert "Traceback" not in done.output
    for words in said:
        assert words in done.stderr


def resumes(step: int, whole: dict[str, torch.Tensor]) -> list[str]:
    """Finish from this step, with the adapter of a training without a stop; return the notices."""
    said: list[str] = []
    assert train(said=said).reason is None
    assert f"Resuming from step {step} of 3." in said
    assert equal(weights(), whole)
    return [sentence for sentence in said if "checkpoint cannot be used" in sentence.lower()]


# ---------------------------------------------------------------------- checkpoints


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return (Path.touch, (self._path,))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def instead(make: Break) -> Break:
    def apply(path: Path) -> None:
        path.unlink()
        make(path)

    return apply


def bind(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


DAMAGE: dict[str, tuple[Break, str]] = {
    "cut": (cut, "it is not what was written"),
    "empty": (empty, "it is not what was written"),
    "a bit": (flip_a_bit, "it is not what was written"),
    "missing": (Path.unlink, "it is missing"),
    "folder": (instead(Path.mkdir), "it is a folder"),
    "pipe": (instead(os.mkfifo), "it is a pipe, not a plain file"),
    "socket": (instead(bind), "it is a socket, not a plain file"),
    "link": (instead(lambda path: path.symlink_to("/etc/passwd")), "it is a link, not a plain file"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Evil(Path("ran")))), "it is not what was written"),
}
SEAL = {"pipe", "folder", "socket", "link"}  # without complete.json, a kill during the save is what happened


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "case",
    mostly_long(
        [(name, damage) for damage in DAMAGE for name in (*READ, "complete.json") if name in READ or damage in SEAL],
        every=6,
    ),
    ids="-".join,
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(place, whole, case):
    name, damage = case
    apply, reason = DAMAGE[damage]
    apply(CHECKPOINTS / "checkpoint-2" / name)
    (notice,) = resumes(1, whole)
    assert notice == f"A checkpoint cannot be used: checkpoint-2/{name}: {reason}. Kept as checkpoint-2.damaged."
    assert (CHECKPOINTS / "checkpoint-2.damaged").is_dir()
    assert not (place / "ran").exists()


def sealed(checkpoint: Path) -> None:
    """Mark a checkpoint as complete with its present content."""
    seal = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in READ}
    (checkpoint / "complete.json").write_text(json.dumps(seal))


def change(**values: Any) -> Break:
    """Change keys of a JSON file."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pickled(value: Any) -> Break:
    return lambda path: torch.save(value, path)


def change_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def apply(path: Path) -> None:
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return apply


def shorten_states(path: Path) -> None:
    """Cut the tensors of an optimizer's state: its kernels would read beyond them."""
    saved = torch.load(path)
    for state in saved["state"].values():
        inner = state["__bnb_optimizer_quant_state__"]
        for key, value in inner.items():
            inner[key] = value[:1].clone()
    torch.save(saved, path)


FORGED: dict[str, tuple[str, Break]] = {
    "weights cut": (WEIGHTS, cut),
    "weights of another shape": (WEIGHTS, change_tensors(lambda all: all.update({min(all): all[min(all)][:1]}))),
    "weights missing": (WEIGHTS, change_tensors(lambda all: all.pop(min(all)))),
    "weights of another format": (WEIGHTS, change_tensors(lambda all: all.update({min(all): all[min(all)].half()}))),
    "optimizer cut": (OPTIMIZER, cut),
    "optimizer that runs code": (OPTIMIZER, lambda path: path.write_bytes(pickle.dumps(Evil(Path("ran"))))),
    "optimizer that runs code, zipped": (OPTIMIZER, pickled(Evil(Path("ran")))),
    "optimizer that is a list": (OPTIMIZER, pickled([1])),
    "optimizer without groups": (OPTIMIZER, pickled({"state": {}, "param_groups": []})),
    "optimizer with short states": (OPTIMIZER, shorten_states),
    "scheduler empty": (SCHEDULER, empty),
    "scheduler with a method": (SCHEDULER, pickled({"step": 1})),
    "random state that is a list": (RANDOM, pickled([1])),
    "random state of text": (RANDOM, pickled({"python": "x", "numpy": "x", "cpu": "x"})),
    "random state that runs code": (RANDOM, pickled(Evil(Path("ran")))),
    "state nested deep": (STATE, lambda path: path.write_text(9999 * "[" + 9999 * "]")),
    "state with a deep history": (STATE, lambda path: path.write_text('{"log_history":' + 999 * "[" + 999 * "]" + "}")),
    "state that is a list": (STATE, lambda path: path.write_text("[1]")),
    "state of another step": (STATE, change(global_step=1)),
    "state with a step of text": (STATE, change(global_step="x")),
    "state with an odd history": (STATE, change(log_history=[5])),
    "state with text as a number": (STATE, change(total_flos="x")),
    "state with other callbacks": (STATE, change(stateful_callbacks=[1])),
    "state with an unknown key": (STATE, change(odd=1)),
}


@pytest.mark.filterwarnings("error")  # no warning of a library may reach the terminal
@pytest.mark.parametrize("seal", [True, False], ids=["sealed", "of an earlier version"])
@pytest.mark.parametrize("attack", mostly_long(list(FORGED), every=4))
def test_a_forged_checkpoint_runs_no_code_and_the_one_before_is_used(place, whole, attack, seal):
    checkpoint = CHECKPOINTS / "checkpoint-2"
    name, apply = FORGED[attack]
    apply(checkpoint / name)
    if seal:
        sealed(checkpoint)
    else:
        (checkpoint / "complete.json").write_text("{}\n")
    (notice,) = resumes(1, whole)
    assert notice.startswith(f"A checkpoint cannot be used: checkpoint-2/{name}: ")
    assert not (place / "ran").exists()


def test_checkpoints_of_earlier_versions_are_resumed(place, whole):
    for checkpoint in CHECKPOINTS.iterdir():
        (checkpoint / "complete.json").write_text("{}\n")
    assert resumes(2, whole) == []


def test_other_files_in_a_checkpoint_are_not_read(place, whole):
    """The trainer would prefer some of them to those that it wrote."""
    for name in ("pytorch_model.bin", "model.safetensors", "adapter_model.bin", "scaler.pt", "training_args.bin"):
        (CHECKPOINTS / "checkpoint-2" / name).write_bytes(pickle.dumps(Evil(place / "ran")))
    (CHECKPOINTS / "checkpoint-2" / "config.json").write_text("[")
    (CHECKPOINTS / "checkpoint-2" / "pytorch_model_fsdp_0").mkdir()
    assert resumes(2, whole) == []
    assert not (place / "ran").exists()


def copied(path: Path) -> None:
    shutil.copytree(CHECKPOINTS / "checkpoint-2", path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("checkpoint-5", lambda path: path.write_text("x"), ": it is a file, not a folder"),
        ("checkpoint-3", os.mkfifo, ": it is a file, not a folder"),
        ("checkpoint-3", lambda path: path.symlink_to("checkpoint-2"), ": it is a link, not a folder"),
        ("checkpoint-3", lambda path: path.symlink_to("/nowhere"), ": it is a link, not a folder"),
        ("checkpoint-3", copied, "/trainer_state.json: it does not fit this training"),
        ("checkpoint-99999999999999", copied, ": this training has only 3 steps"),
    ],
    ids=["file", "pipe", "link", "broken link", "copy", "foreign number"],
)
def test_a_checkpoint_that_somebody_put_there_is_set_aside(place, whole, name, make, reason):
    make(CHECKPOINTS / name)
    (notice,) = resumes(2, whole)
    assert notice == f"A checkpoint cannot be used: {name}{reason}. Kept as {name}.damaged."
    assert os.path.lexists(CHECKPOINTS / f"{name}.damaged")


@pytest.mark.parametrize("name", ["checkpoint-007", "checkpoint-٣", "checkpoint-" + "9" * 200, "checkpoint-"])
def test_names_that_no_checkpoint_has_are_left_alone(place, whole, name):
    copied(CHECKPOINTS / name)
    assert resumes(2, whole) == []
    assert (CHECKPOINTS / name / STATE).exists()


def test_without_a_checkpoint_that_can_be_used_the_newest_file_is_named_and_nothing_changes(place, whole):
    kept = (CHECKPOINTS / "checkpoint-2" / OPTIMIZER).read_bytes()
    for checkpoint in CHECKPOINTS.iterdir():
        cut(checkpoint / OPTIMIZER)
    before = sorted(place.rglob("*"))
    refused(
        command(),
        "No checkpoint of this training can be used: it is not what was written.",
        f"where: {place}/{CHECKPOINTS}/checkpoint-2/{OPTIMIZER}",
        "restore it or move it away, or add --fresh",
    )
    assert sorted(place.rglob("*")) == before
    (CHECKPOINTS / "checkpoint-2" / OPTIMIZER).write_bytes(kept)
    resumes(2, whole)


def test_two_damaged_checkpoints_are_one_notice(place, whole):
    copied(CHECKPOINTS / "checkpoint-7")
    empty(CHECKPOINTS / "checkpoint-2" / STATE)
    (notice,) = resumes(1, whole)
    assert "checkpoint-7: this training has only 3 steps. 1 more cannot be used either." in notice
    assert "Kept as checkpoint-7.damaged, checkpoint-2.damaged." in notice


# ---------------------------------------------------------------------- other files


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["finetune.json", "run.lock", "checkpoints"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_link_or_pipe_in_the_training_folder_is_refused(place, name, kind):
    path = TRAINING / name
    path.rename(place / "elsewhere")
    path.symlink_to(place / "elsewhere") if kind == "link" else os.mkfifo(path)
    before = sorted((place / "elsewhere").rglob("*"))
    refused(command(), str(place / path))
    assert sorted((place / "elsewhere").rglob("*")) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(9999 * "["),
        lambda path: path.write_text('{"name":' + 999 * "[" + 999 * "]" + "}"),
        lambda path: path.write_text("[1]"),
        lambda path: path.write_bytes(b"\xff"),
        change(resolved=[1]),
        change(fingerprint=[1]),
        change(job=1),
        change(loss_before="x"),
        change(starts={}),
        change(format=99),
        change(format="1"),
    ],
)
def test_a_damaged_record_is_named(place, damage):
    damage(TRAINING / "finetune.json")
    with pytest.raises(RunError, match="record of this training is damaged") as caught:
        train()
    assert caught.value.where == f"{place}/{TRAINING}/finetune.json"
    assert "--fresh" in caught.value.next_step


def test_a_record_without_settings_is_completed(place, whole):
    change(job={}, data={})(TRAINING / "finetune.json")
    assert resumes(2, whole) == []
    assert "| data.jsonl | 8 |" in Path("outputs/j-adapter/README.md").read_text()


def test_a_changed_setting_cannot_add_lines_to_the_message(place):
    record = json.loads((TRAINING / "finetune.json").read_text())
    change(fingerprint=record["fingerprint"] | {"finetune.seed": "\nError: x\x1b[2J"})(TRAINING / "finetune.json")
    done = command()
    assert done.exit_code == 2
    assert done.stderr.count("Error:") - done.stderr.count(r"\nError:") == 1
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("damage", ["pipe", "deep", "list", "text"])
def test_a_finished_adapter_needs_no_evaluation_file(place, damage):
    train()
    path = Path("outputs/j-adapter/evaluation.json")
    contents = {"deep": 9999 * "[", "list": "[1]", "text": '{"loss_before": "x", "loss_after": [1]}'}
    if damage == "pipe":
        instead(os.mkfifo)(path)
    else:
        path.write_text(contents[damage])
    done = command()
    assert done.exit_code == 0, done.output
    assert "nothing left to do" in done.stdout


def test_nothing_is_written_through_planted_links(place, whole):
    """Neither into a checkpoint's folder that somebody made first, nor into the adapter's."""
    victim = place / "victim"
    victim.write_text(VICTIM)

    def plant(progress) -> None:
        folder = CHECKPOINTS / "checkpoint-3"
        if not folder.exists():
            folder.mkdir()
            for name in (*READ, "complete.json", "training_args.bin", "adapter_config.json"):
                (folder / name).symlink_to(victim)

    (place / "elsewhere").mkdir()
    (TRAINING / "adapter.partial").symlink_to(place / "elsewhere")
    train(show=plant)
    assert equal(weights(), whole)
    assert victim.read_text() == VICTIM
    assert list((place / "elsewhere").iterdir()) == []


def test_an_output_that_is_a_broken_link_is_refused_before_the_training(place):
    Path("outputs/j-adapter").symlink_to("/nowhere/at-all")
    with pytest.raises(RunError, match="a link that leads nowhere"):
        train()


# ---------------------------------------------------------------------- disks and permissions


@contextmanager
def file_size_limit(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Smaller than weights, optimizer's state, scheduler and random state, which different libraries write.
@pytest.mark.parametrize("limit", [300_000, 600_000])
def test_a_checkpoint_above_the_file_size_limit_is_one_message_and_resumable(place, whole, limit):
    with file_size_limit(limit):
        refused(command(), "size limit", f"where: {place}/{CHECKPOINTS}/checkpoint-3", "ulimit -f")
    assert not (CHECKPOINTS / "checkpoint-3").exists()
    assert resumes(2, whole) == []


@pytest.mark.parametrize("kibibytes", mostly_long([100, 4, 700, 1500, 2900], every=2))
def test_a_full_disk_is_the_usual_message_and_resumable(place, whole, kibibytes):
    shutil.rmtree("outputs")
    with tmpfs(place / "outputs", f"{kibibytes}k") as disk:
        refused(command(), "The disk is full.", "free up disk space", "to resume")
        saved = sorted(int(path.parent.name.rpartition("-")[2]) for path in CHECKPOINTS.glob("*/complete.json"))
        assert len(list(CHECKPOINTS.glob("*"))) == len(saved), "half a checkpoint takes up space"
        remount(disk, "size=64m")
        said: list[str] = []
        assert train(said=said).reason is None
        assert (f"Resuming from step {saved[-1]} of 3." in said) if saved else not any("Resum" in one for one in said)
        assert equal(weights(), whole)


def test_a_read_only_disk_is_one_message(place, whole):
    shutil.move("outputs", "kept")
    with tmpfs(place / "outputs", "64m") as disk:
        shutil.copytree("kept", "outputs", dirs_exist_ok=True)
        remount(disk, "ro")
        refused(command(), "The file system is read-only.")
        remount(disk, "rw")
        resumes(2, whole)


def save_nothing(work: Work) -> None:
    with work.checkpointing(3, 0):
        raise AssertionError("it must not begin")


@pytest.mark.parametrize(
    ("path", "mode", "act"),
    [
        (CHECKPOINTS / "checkpoint-2" / OPTIMIZER, 0, lambda work: work.flaw(work.sealed_checkpoints()[0])),
        (CHECKPOINTS / "checkpoint-2", 0, lambda work: work.sealed_checkpoints()),
        (CHECKPOINTS, 0o555, save_nothing),
        (TRAINING, 0o555, lambda work: work.record.save(work.folder)),
    ],
    ids=["file", "checkpoint", "checkpoints", "training"],
)
def test_a_missing_permission_is_never_called_damage(stopped, monkeypatch, path, mode, act):
    with shared_folder() as shared:
        shutil.copytree(stopped, shared / "w")
        for each in shared.rglob("*"):
            each.chmod(0o777)
        monkeypatch.chdir(shared / "w")
        path.chmod(mode)
        with (
            unprivileged(),
            pytest.raises(StorageError, match="Permission denied") as caught,
            open_work(Path("outputs/j-adapter"), fresh=False, take_over=False) as work,
        ):
            act(work)
        path.chmod(0o777)
        assert str(shared / "w" / TRAINING) in caught.value.where
        assert all((CHECKPOINTS / f"checkpoint-{step}" / name).exists() for step in (1, 2) for name in READ)
        monkeypatch.undo()


# ---------------------------------------------------------------------- two trainings, signals


def during_a_save(monkeypatch, act: Callable[[], object]) -> None:
    """Call `act` once while a checkpoint is saved, after some of its files."""
    save, pending = Trainer._save_rng_state, [act]

    def acting(self: Trainer, output_dir: str) -> None:
        if pending:
            pending.pop()()
        save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_rng_state", acting)


def test_a_second_training_in_the_same_folder_is_refused(place, whole, monkeypatch):
    errors: list[GxrError] = []

    def second() -> None:
        for fresh in (False, True):
            try:
                train(fresh=fresh)
            except MachineError as error:
                errors.append(error)

    during_a_save(monkeypatch, second)
    resumes(2, whole)
    assert [type(error) for error in errors] == [RunLocked, RunLocked]


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_training_that_lost_its_lock_writes_nothing_more(place, whole, monkeypatch, how):
    def lose() -> None:
        (TRAINING / "run.lock").unlink() if how == "deleted" else TRAINING.rename(TRAINING.with_name("away"))

    during_a_save(monkeypatch, lose)
    with pytest.raises(StorageError, match="lost its lock" if how == "deleted" else "missing"):
        train()
    assert not Path("outputs/j-adapter").exists()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    if how == "moved":
        shutil.rmtree(TRAINING)  # the trainer makes folders that are missing
        TRAINING.with_name("away").rename(TRAINING)
    resumes(2, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_during_a_save_ends_after_it(place, monkeypatch, number, code):
    shutil.rmtree("outputs")
    during_a_save(monkeypatch, lambda: os.kill(os.getpid(), number))
    done = command()
    assert done.exit_code == code, done.output
    saved = [path.parent.name for path in CHECKPOINTS.glob("*/complete.json")]
    assert saved
    assert "Traceback" not in done.output
    said: list[str] = []
    assert train(said=said).reason is None
    assert f"Resuming from step {max(int(name.rpartition('-')[2]) for name in saved)} of 3." in said


def test_a_second_ctrl_c_during_a_save_leaves_no_half_checkpoint(place, whole, monkeypatch):
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    during_a_save(monkeypatch, twice)
    done = command()
    assert done.exit_code == 130, done.output
    assert "Stopped by Ctrl-C" in done.stderr
    assert not (CHECKPOINTS / "checkpoint-3").exists()
    resumes(2, whole)
