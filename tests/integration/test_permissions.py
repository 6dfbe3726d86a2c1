"""Machines that several people share: permissions follow the umask, and a missing one is never called damage."""

from __future__ import annotations

import json
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from other_user import shared_folder, umask, unprivileged
from running import Workplace

from gxr_batch.disk import expanded, follow_umask
from gxr_batch.errors import ModelUnavailable, StorageError, UserError
from gxr_batch.job.schema import ModelSection
from gxr_batch.ledger import RunReader
from gxr_batch.models import hub, weights_hash
from gxr_batch.models.load_weights import identity, load_config, load_tokenizer
from gxr_batch.models.lora import read_adapter
from gxr_batch.models.source import Source


@pytest.fixture
def homeless(monkeypatch) -> None:
    """Make this process one of a uid without a passwd entry, without HOME."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_home_folder_the_message_names_the_variable_to_set(homeless, monkeypatch, tmp_path):
    with pytest.raises(StorageError, match="no home folder") as caught:
        weights_hash.cache_home()
    assert "XDG_CACHE_HOME" in caught.value.next_step
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights_hash.cache_home() == tmp_path / "gxr-batch"


def test_a_model_in_a_folder_needs_no_home_folder(homeless, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert len(weights_hash.weights_sha256([tmp_path / "model.safetensors"])) == 64


def test_a_path_below_an_unknown_home_folder_is_refused(homeless):
    with pytest.raises(UserError, match="meant by ~ is unknown") as caught:
        expanded("~/table.csv")
    assert caught.value.where == "~/table.csv"
    with pytest.raises(UserError):
        expanded("~no-such-user/table.csv")


def test_the_hubs_cache_is_not_made_in_a_folder_named_tilde(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with pytest.raises(ModelUnavailable, match="no home folder"):
        hub.fetch("owner/name", "", ["*.json"], where="model.path")


def test_the_cache_of_hashes_can_be_shared(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with umask(0o002):
        weights_hash.weights_sha256([tmp_path / "model.safetensors"])
    (written,) = (path for path in (tmp_path / "gxr-batch").iterdir())
    assert written.stat().st_mode & 0o777 == 0o664


def test_safetensors_follow_the_umask(tmp_path):
    (tmp_path / "model.safetensors").touch(0o600)
    with umask(0o027):
        follow_umask(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def look_at(section: ModelSection) -> None:
    load_config(section)
    identity(section)


UNREADABLE = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
]


@pytest.mark.model
@pytest.mark.parametrize("name", ["", *UNREADABLE])
def test_a_model_file_without_read_permission_is_not_called_damaged(name, tiny_model_dir):
    with shared_folder() as place:
        folder = shutil.copytree(tiny_model_dir, place / "model")
        section = ModelSection(path=str(folder))
        before = identity(section)  # the hash of the weights is cached from here on
        load_tokenizer(section)
        (folder / name).chmod(0)
        try:
            with unprivileged(), pytest.raises(ModelUnavailable, match="Permission denied") as caught:
                look_at(section)
            assert caught.value.where == str(folder / name)
            assert "chmod a+r" in caught.value.next_step
        finally:
            (folder / name).chmod(0o755)
        assert identity(section) == before


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_without_read_permission_is_not_called_damaged(name):
    with shared_folder() as folder:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        (folder / "adapter_model.safetensors").write_bytes(b"")
        (folder / name).chmod(0)
        with unprivileged(), pytest.raises(ModelUnavailable, match="Permission denied"):
            read_adapter(Source(name="a", folder=folder))


@pytest.mark.parametrize("name", ["run.json", "input.parquet", "parts/part-00000001.parquet", "results.parquet", ""])
def test_a_run_without_read_permission_is_not_called_damaged(name):
    with shared_folder() as place:
        work = Workplace(place)
        work.run()
        folder = place / "outputs/j"
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        (folder / name).chmod(0)
        with unprivileged(), pytest.raises(StorageError, match="Permission denied"):
            read_whole(folder)
        (folder / name).chmod(0o777)
        assert not list(folder.rglob("*.damaged"))
        work.run()


def read_whole(folder: Path) -> None:
    reader = RunReader(folder)
    list(reader.finished())
    _ = reader.results


def test_a_run_continues_without_its_hint_and_reports_it_once(tmp_path):
    work = Workplace(tmp_path)
    (tmp_path / "outputs/j/inflight.json").mkdir(parents=True)
    (tmp_path / "outputs/j/run.lock").touch()
    done = work.run()
    assert done.stderr.count("inflight.json cannot be written (Is a directory)") == 1
    assert len(work.results()) == 60


def test_a_folder_that_this_user_may_not_enter_is_no_bug(tmp_path):
    code = "raise PermissionError(13, 'Permission denied', '/closed/table.csv')"
    work = Workplace(tmp_path)
    (tmp_path / "closed.py").write_text(
        f"from gxr_batch.cli import main\nfrom gxr_batch.rows import source_files\n\n"
        f"def find(pattern):\n    {code}\n\nimport gxr_batch.rows.survey as survey\nsurvey.find = find\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "closed.py", "check", "j.toml"], cwd=work.folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 4, done.stderr
    assert "Permission denied" in done.stderr
    assert "/closed/table.csv" in done.stderr
    assert "bug" not in done.stderr
