"""From the path of a job file to a local folder: the embedded demo model, a folder, or a snapshot of a hub model.

Everything that can be wrong with a path, a name, a login or a network becomes one message here, told apart by the
class of the error. Weights are safetensors only, and code that comes with a model is never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gxr_batch.errors import JobFileError, ModelUnavailable, NotAvailable
from gxr_batch.job import ModelSection
from gxr_batch.models.demo import DEMO, ensure_demo_model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
# What transformers loads; a hub repository may hold copies of the weights in other formats as well.
_WEIGHT_FILES = ["model.safetensors", "model-*.safetensors"]
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model lies on this machine. `revision` is the commit of a hub model, else ""."""

    path: str
    folder: Path
    revision: str = ""

    def weight_files(self) -> list[Path]:
        """Return the safetensors files that make up the weights. Raises ModelUnavailable where one is missing."""
        index = self.folder / _INDEX
        single = self.folder / "model.safetensors"
        if single.is_file():
            return [single]
        if not index.is_file():
            raise self._without_weights()
        try:
            files = [self.folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, AttributeError):
            raise ModelUnavailable("The list of weight files cannot be read.", where=str(index)) from None
        for file in files:
            if not file.is_file():
                raise ModelUnavailable("A weight file is missing.", where=str(file), next_step="copy the folder again")
        return files

    def _without_weights(self) -> NotAvailable | ModelUnavailable:
        if (self.folder / "adapter_config.json").is_file():
            return NotAvailable("an adapter folder as model.path")
        return ModelUnavailable(
            "The model has no weights in safetensors format, and no other format is loaded.",
            where=str(self.folder),
            next_step="save it with save_pretrained of a current transformers",
        )


def find(section: ModelSection, *, weights: bool) -> Source:
    """Return where the model lies, converting or downloading it first where needed.

    Without `weights` a hub model's weights are not downloaded. Raises ModelUnavailable, JobFileError, NotAvailable.
    """
    path = section.path
    folder = Path(path).expanduser()
    if path != DEMO and not folder.is_dir() and not _looks_local(path, folder):
        return _snapshot(section, weights=weights)
    if section.revision:
        raise JobFileError(
            "model.revision belongs to a model of the hub, and this one is on this machine.",
            where=f"model.path = {path}",
            next_step="remove model.revision",
        )
    if path == DEMO:
        return Source(path=path, folder=ensure_demo_model())
    if not folder.is_dir():
        raise ModelUnavailable(
            "The model is not a folder." if folder.exists() else "There is no such model folder.",
            where=str(folder.absolute()),
            next_step='name a folder that holds config.json and safetensors, a hub id, or "demo" as model.path',
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise NotAvailable("an adapter folder as model.path")
    return Source(path=path, folder=folder.absolute())


def _looks_local(path: str, folder: Path) -> bool:
    return path.startswith((".", "/", "~")) or folder.exists() or not _HUB_ID.fullmatch(path)


def _snapshot(section: ModelSection, *, weights: bool) -> Source:
    """Fetch a hub model into the hub's own cache, or find it there where the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    with _hub_errors(section):
        folder = snapshot_download(
            section.path,
            revision=section.revision or None,
            allow_patterns=_TOKENIZER_FILES + (_WEIGHT_FILES if weights else []),
        )
    # A snapshot's folder is named after its commit.
    return Source(path=section.path, folder=Path(folder), revision=Path(folder).name)


@contextmanager
def _hub_errors(section: ModelSection) -> Iterator[None]:
    """Turn the hub client's errors into ModelUnavailable, by class."""
    from huggingface_hub import errors

    where = f"model.path = {section.path}" + (f", model.revision = {section.revision}" if section.revision else "")
    page = f"https://huggingface.co/{section.path}"
    try:
        yield
    except errors.GatedRepoError:
        what, step = "The model is gated.", f"accept its terms at {page}, then log in: hf auth login"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        what = f"There is neither a folder {Path(section.path).absolute()} nor such a model on the hub."
        step = "check the name; for a private model log in: hf auth login"
    except errors.RevisionNotFoundError:
        what, step = "The model has no such revision.", f"choose one of {page}/tree/main, or leave it empty"
    except errors.LocalEntryNotFoundError:
        what = "The hub cannot be reached, and its cache on this machine does not hold the whole model."
        step = f"connect (HF_HUB_OFFLINE must be unset), or first fetch it elsewhere: hf download {section.path}"
    except OSError as error:
        reason = error.strerror or type(error).__name__
        what, step = f"The model could not be downloaded: {reason}.", "mend the connection or the disk, then run again"
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # the client's base class, whichever it is built on
        what = f"The model could not be downloaded: {type(error).__name__}."
        step = "mend the connection, then run again: what has arrived is kept"
    else:
        return
    raise ModelUnavailable(what, where=where, next_step=step)
