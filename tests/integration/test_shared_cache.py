"""A cache folder to which others can write: their code is not loaded, and no other model passes as the demo model."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_builds import STAND_IN
from other_user import NOBODY, shared_folder, umask
from running import Workplace

from gxr_batch.disk import writable_by_others
from gxr_batch.engines.slots.native import compile_kernels
from gxr_batch.errors import StorageError
from gxr_batch.models import demo, tokenizer_trial, verify_demo, weights_hash
from gxr_batch.models.private_cache import private_folder, private_home
from gxr_batch.models.weights_hash import cache_home, weights_sha256

needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="there is no gcc")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
QUICK = ("-O0", "-fopenmp", "-fPIC", *STAND_IN)


@pytest.fixture
def cache(monkeypatch):
    """A cache folder that every user can write to."""
    with shared_folder() as folder:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        (folder / "gxr-batch").mkdir()
        (folder / "gxr-batch").chmod(0o777)
        yield folder / "gxr-batch"


@pytest.fixture
def kernels(monkeypatch):
    """A function that loads the kernels as a new process would, on any CPU, and counts how often it compiled them."""
    monkeypatch.setattr(compile_kernels, "FEATURES", frozenset())
    monkeypatch.setattr(compile_kernels, "PRODUCTS", {"avx512": frozenset()})
    monkeypatch.setattr(compile_kernels, "_FLAGS", QUICK)
    compiled = []
    run = compile_kernels._run
    monkeypatch.setattr(compile_kernels, "_run", lambda *command: (compiled.append(command), run(*command)))

    def load():
        compile_kernels.load_with.cache_clear()
        before = len(compiled)
        found = compile_kernels.load_with("avx512")
        return found, (len(compiled) - before) // 4

    yield load
    compile_kernels.load_with.cache_clear()


def kept(cache: Path) -> Path:
    (library,) = cache.glob("private-*/kernels-*.so")
    return library


def replace(library: Path, content: bytes) -> None:
    """Write in the place of a loaded library, and not into it: the process would crash at the next load."""
    library.unlink()
    library.write_bytes(content)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> bytes:
    """A library that leaves a file MARKER when it is loaded."""
    folder = tmp_path_factory.mktemp("planted")
    marker = folder / "MARKER"
    (folder / "p.c").write_text(
        "#include <stdio.h>\n"
        f'__attribute__((constructor)) static void run(void) {{ fclose(fopen("{marker}", "w")); }}\n'
        "int gxr_ready(void) { return 1; }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", folder / "p.c", "-o", folder / "p.so"], check=True)
    ctypes.CDLL(str(folder / "p.so"))
    assert marker.exists(), "it works"
    marker.unlink()
    yield (folder / "p.so").read_bytes()
    assert not marker.exists(), "a planted library ran"


@needs_gcc
def test_the_kernels_are_compiled_once_into_a_folder_of_this_user(cache, kernels):
    with umask(0o002):
        found, compiled = kernels()
    assert (compiled, found.why_not_kept) == (1, "")
    assert kernels()[1] == 0
    for path in (kept(cache), kept(cache).parent):
        assert (path.stat().st_mode & 0o777, path.stat().st_uid) == (0o700, os.geteuid())


@needs_gcc
@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None])
def test_an_empty_or_cut_library_is_compiled_again_once(cache, kernels, damage):
    kernels()
    whole = kept(cache).read_bytes()
    replace(kept(cache), whole[: len(whole) // 2] if damage is None else damage)
    assert kernels()[1] == 1
    assert kept(cache).read_bytes()[:4] == b"\x7fELF"
    assert kernels()[1] == 0


@needs_gcc
@pytest.mark.parametrize("how", ["a library that others can write", "a link", "the name of earlier versions"])
def test_a_planted_library_is_not_loaded(cache, kernels, planted, how):
    kernels()
    library = kept(cache)
    sealed = planted + compile_kernels.hashlib.sha256(planted).digest()
    if how == "a link":
        (cache / "theirs.so").write_bytes(sealed)
        library.unlink()
        library.symlink_to(cache / "theirs.so")
    elif how == "the name of earlier versions":
        (cache / "native").mkdir()
        (cache / "native" / library.name).write_bytes(sealed)
        library.unlink()
    else:
        replace(library, sealed)
        library.chmod(0o777)
    found, compiled = kernels()
    assert (compiled, found.why_not_kept) == (1, "")
    assert hasattr(found.library, "gxr_forward")


@needs_gcc
@needs_root
@pytest.mark.parametrize("how", ["a file of another user", "a folder of another user", "a link to such a folder"])
def test_what_another_user_made_is_not_loaded(cache, kernels, planted, how):
    kernels()
    library = kept(cache)
    replace(library, planted + compile_kernels.hashlib.sha256(planted).digest())
    os.chown(library, NOBODY, NOBODY)
    if how != "a file of another user":
        os.chown(library.parent, NOBODY, NOBODY)
    if how == "a link to such a folder":
        library.parent.rename(cache / "theirs")
        library.parent.symlink_to(cache / "theirs")
    found, compiled = kernels()
    assert compiled == 1
    assert hasattr(found.library, "gxr_forward")
    assert bool(found.why_not_kept) == (how != "a file of another user")


@needs_gcc
def test_a_cache_that_cannot_be_written_costs_time_and_not_the_kernels(tmp_path, monkeypatch, kernels):
    (tmp_path / "gxr-batch").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found, compiled = kernels()
    assert compiled == 1
    assert found.why_not_kept


@pytest.mark.parametrize("home", ["", "here", "./here"])
def test_no_cache_is_in_the_current_folder(tmp_path, monkeypatch, home):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", home)
    try:
        assert cache_home().is_absolute()
        assert tmp_path not in cache_home().parents
    except StorageError as error:
        assert "absolute" in error.where  # noqa: PT017


# ---------------------------------------------------------------------------------------------------- demo model


@pytest.fixture(scope="module")
def weights(demo_model_dir, tmp_path_factory) -> Path:
    """A copy that no other test links to: a link changes the times of a file."""
    return Path(shutil.copy(demo_model_dir / "model.safetensors", tmp_path_factory.mktemp("weights")))


@pytest.fixture
def shared_demo(cache, demo_model_dir, weights, monkeypatch) -> Path:
    """The demo model in a cache folder that everybody can write to, and a conversion that takes no time."""
    folder = cache / "models" / demo.NAME
    folder.mkdir(parents=True)
    for path in demo_model_dir.iterdir():
        if path.name != weights.name:
            shutil.copy(path, folder / path.name)
    linked = weights.stat().st_dev == cache.stat().st_dev
    (os.link if linked else shutil.copy)(weights, folder / weights.name)

    def convert(target, progress):
        target.mkdir()
        (target / "OWN").touch()

    monkeypatch.setattr(demo, "_convert_into", convert)
    return folder


@pytest.fixture
def read(monkeypatch) -> list[Path]:
    """The files whose digests were computed."""
    read = []
    real = verify_demo.sha256_of
    monkeypatch.setattr(verify_demo, "sha256_of", lambda path, **more: (read.append(path), real(path, **more))[1])
    return read


@pytest.mark.model
def test_the_demo_model_of_a_group_is_verified_once(shared_demo, read):
    assert demo.ensure_demo_model() == shared_demo
    assert len(read) == 2
    verify_demo._matches.cache_clear()
    assert demo.ensure_demo_model() == shared_demo
    assert len(read) == 2


@pytest.mark.model
@pytest.mark.parametrize("offline", [True, False])
def test_a_demo_model_that_was_made_offline_or_not_is_the_same(shared_demo, offline):
    path = shared_demo / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "local_files_only": offline}))
    assert demo.ensure_demo_model() == shared_demo


@pytest.mark.model
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_another_model_does_not_pass_as_the_demo_model(shared_demo, name, read):
    assert demo.ensure_demo_model() == shared_demo
    text = (shared_demo / name).read_text() if (shared_demo / name).exists() else "{{ messages }}"
    (shared_demo / name).write_text(text.replace("bos", "b0s"))
    assert demo.ensure_demo_model() == private_home() / "models" / demo.NAME
    assert (private_home() / "models" / demo.NAME / "OWN").exists()
    assert demo.ensure_demo_model() == private_home() / "models" / demo.NAME


@pytest.mark.model
def test_other_weights_with_the_size_and_times_of_the_real_ones_are_noticed(shared_demo):
    assert demo.ensure_demo_model() == shared_demo
    weights = shared_demo / "model.safetensors"
    before = weights.stat()
    weights.unlink()
    with weights.open("wb") as file:
        file.truncate(before.st_size)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert demo.ensure_demo_model() != shared_demo


@pytest.mark.model
def test_a_record_that_others_wrote_is_not_believed(shared_demo):
    (shared_demo / "config.json").write_text("{}")
    with private_folder() as folder:
        (folder / "demo-verified.json").write_text(verify_demo._state(shared_demo))
        (folder / "demo-verified.json").chmod(0o666)
    assert demo.ensure_demo_model() != shared_demo


def test_a_cache_of_this_user_alone_is_not_read(tmp_path, monkeypatch, read):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    demo.demo_folder().mkdir(parents=True)
    assert demo.ensure_demo_model() == demo.demo_folder()
    assert not read


def test_a_trial_of_a_tokenizer_that_others_recorded_is_not_believed(cache, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(tokenizer_trial, "_try", lambda *asked: tried.append(asked))
    (tmp_path / "tokenizer.json").write_text("{}")
    key = tokenizer_trial._key(tmp_path / "tokenizer.json", {})
    (cache / tokenizer_trial._TRIED).write_text(json.dumps([key]))
    for _ in range(2):
        tokenizer_trial.refuse_crashing(tmp_path)
    assert len(tried) == 1, "tried once, then remembered where only this user can write"


@pytest.mark.timeout(20)
def test_pipes_in_the_place_of_records_make_nothing_wait(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "_try", lambda *asked: None)
    for name in (weights_hash._HASHES, tokenizer_trial._TRIED):
        os.mkfifo(cache / name)
    (tmp_path / "tokenizer.json").write_text("{}")
    tokenizer_trial.refuse_crashing(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert weights_sha256([tmp_path / "model.safetensors"]) == hashlib.sha256(b"weights").hexdigest()


# ---------------------------------------------------------------------------------------------------- who can write


def test_who_can_write_to_a_path(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    assert writable_by_others(folder / "file") == ""
    for place in (folder, folder.parent):
        place.chmod(0o777)
        assert writable_by_others(folder / "file" / "not" / "there") == f"every user ({place})"
        place.chmod(0o1777)
        assert writable_by_others(folder) == ("" if place != folder else f"every user ({folder})")
        place.chmod(0o755)
    (tmp_path / "link").symlink_to(folder)
    folder.chmod(0o777)
    assert writable_by_others(tmp_path / "link") == f"every user ({tmp_path / 'link'})"


@needs_root
def test_groups_and_owners_that_can_write_to_a_path(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir(0o775)
    folder.chmod(0o775)
    assert writable_by_others(folder) == "", "a group of the user's name without other members"
    os.chown(folder, 0, 54321)
    assert writable_by_others(folder) == f"group 54321 ({folder})"
    os.chown(folder, 54321, 0)
    folder.chmod(0o755)
    assert writable_by_others(folder) == f"user 54321 ({folder})"


@pytest.mark.parametrize("shared", ["", "cache", "outputs"])
def test_check_says_who_can_write_to_cache_and_outputs(tmp_path, monkeypatch, shared):
    work = Workplace(tmp_path)
    for name in ("cache", "outputs"):
        (tmp_path / name).mkdir()
    if shared:
        (tmp_path / shared).chmod(0o777)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "gxr_batch", "check", "j.toml"]
    done = subprocess.run(command, cwd=work.folder, env=environment, capture_output=True, text=True, check=True)
    assert ("The cache folder can be written by every user" in done.stderr) == (shared == "cache")
    assert ("The output folder can be written by every user" in done.stderr) == (shared == "outputs")
