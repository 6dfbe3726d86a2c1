"""Optional packages: whether they are installed, and the command that installs them.

gxr-batch is not on a package index, so an extra is installed from the folder that the package was installed from.
"""

from __future__ import annotations

import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from gxr_batch.errors import ModelUnavailable

_PROJECT = Path(__file__).resolve().parents[1]


def require(extra: str, *packages: str, purpose: str, where: str) -> None:
    """Check that the packages of an extra can be imported. Raises ModelUnavailable, which names the command to type."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise missing_extra(extra, *missing, purpose=purpose, where=where)


def missing_extra(extra: str, *packages: str, purpose: str, where: str) -> ModelUnavailable:
    """Return the error for packages that are not installed; `purpose` begins the sentence, e.g. "Fine-tuning"."""
    listed, verb = ", ".join(packages), "is" if len(packages) == 1 else "are"
    return ModelUnavailable(
        f"{purpose} needs {listed}, which {verb} not installed.", where=where, next_step=install_command(extra)
    )


def install_command(extra: str) -> str:
    """Return the shell command that adds an extra to this environment, with paths as seen from the current folder."""
    here = _current_folder()
    folder = Path() if here == _PROJECT else _PROJECT
    if not (_PROJECT / "pyproject.toml").is_file():
        folder = Path("FOLDER")  # installed from a wheel: the user knows where the source folder is
    if extra == "vllm":  # vLLM pins a torch build that would replace this environment's
        make = f"make -C {shlex.quote(str(folder))}"
        command = shlex.quote(str(folder / ".venv-vllm/bin/gxr-batch"))
        return f"{make} vllm-cuda (NVIDIA GPU) or {make} vllm-cpu, then use {command}"
    python = Path(os.path.abspath(sys.executable))  # not resolved: a venv's python is a link to the system's
    if here is not None and python.is_relative_to(here):
        python = python.relative_to(here)
    # The pinned versions, so that an extra does not upgrade the packages that earlier texts were generated with.
    words = [str(python), "-m", "pip", "install", "-c", str(folder / "constraints.txt"), "-e", f"{folder}[{extra}]"]
    command = shlex.join(words)
    return f"{command}, where FOLDER is the source folder of gxr-batch" if folder == Path("FOLDER") else command


def _current_folder() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # deleted since
        return None
