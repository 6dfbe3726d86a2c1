"""Optional packages: whether they are installed, and the command that installs them.

gxr-batch is not on a package index, so an extra is installed from the folder that the package was installed from.
"""

from __future__ import annotations

import os
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
    if not (_PROJECT / "pyproject.toml").is_file():
        return f"{_shown(Path(sys.executable))} -m pip install '.[{extra}]', in the source folder of gxr-batch"
    folder = "." if Path.cwd() == _PROJECT else str(_PROJECT)
    if extra == "vllm":  # vLLM pins a torch build that would replace this environment's
        return (
            f"make -C {folder} vllm-cuda (NVIDIA GPU) or make -C {folder} vllm-cpu, "
            f"then use {Path(folder, '.venv-vllm/bin/gxr-batch')}"
        )
    # The pinned versions, so that an extra does not upgrade the packages that earlier texts were generated with.
    constraints = Path(folder, "constraints.txt")
    return f"{_shown(Path(sys.executable))} -m pip install -c {constraints} -e '{folder}[{extra}]'"


def _shown(path: Path) -> str:
    """Return a path relative to the current folder if it is inside it."""
    here = Path(os.path.abspath(path))  # not resolved: a venv's python is a link to the system's
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else str(here)
