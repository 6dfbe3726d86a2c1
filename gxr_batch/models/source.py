"""From the names in a job file to folders on this machine: a model, and the adapter that goes on top of it.

A name is "demo", a folder, or a hub id: "owner/name", or pinned "owner/name@commit". What can be wrong with a name is
one message here, with a network in `hub`. Weights are safetensors only, and code that comes with a model is never run.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gxr_batch.errors import JobFileError, ModelUnavailable
from gxr_batch.job import ModelSection
from gxr_batch.models.demo import DEMO, ensure_demo_model
from gxr_batch.models.hub import fetch
from gxr_batch.models.lora_config import CONFIG, WEIGHTS, read_adapter_config

_DEMO_ADAPTER = Path(__file__).with_name("demo_adapter")
NONE = "none"  # model.adapter for the base model alone
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?", re.ASCII)
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
# What transformers loads; a hub repository may hold copies of the weights in other formats as well.
_WEIGHT_FILES = ["model.safetensors", "model-*.safetensors", WEIGHTS]
_INDEX = "model.safetensors.index.json"
_WHOLE = 'name a folder that holds config.json and safetensors, a hub id, or "demo" as'
_FOLDER_STEPS = {
    "model.path": f"{_WHOLE} model.path",
    "model.base": f"{_WHOLE} model.base",
    "model.adapter": 'name a folder that holds adapter_config.json, a hub id, or "none" as model.adapter',
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model or an adapter lies on this machine. `revision` is the commit of a hub repository, else ""."""

    name: str
    folder: Path
    revision: str = ""

    @property
    def pinned(self) -> str:
        """The name that means these very files: with the commit, where they come from the hub."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter lies in the folder."""
        return (self.folder / CONFIG).is_file()

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter and no model."""
        return self.has_adapter and not (self.folder / "config.json").is_file()

    def weight_files(self) -> list[Path]:
        """Return the safetensors files that make up the weights. Raises ModelUnavailable if one is missing."""
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

    def adapter_files(self) -> list[Path]:
        """Return what decides an adapter's effect: its settings and its tensors. Raises ModelUnavailable."""
        files = [self.folder / CONFIG, self.folder / WEIGHTS]
        for file in files:
            if not file.is_file():
                raise ModelUnavailable(
                    f"The adapter has no {file.name}, and no other format is loaded.",
                    where=str(self.folder),
                    next_step="save it with save_pretrained of a current peft, or copy the folder again",
                )
        return files

    def weight_bytes(self) -> int | None:
        """Return the size of the weights as far as it is known here; a hub model's may not be fetched yet."""
        try:
            return sum(file.stat().st_size for file in self.weight_files())
        except (ModelUnavailable, OSError):
            return None

    def _without_weights(self) -> ModelUnavailable:
        if self.has_adapter:
            return ModelUnavailable(
                "The folder holds a config.json and an adapter, but no weights of a model.",
                where=str(self.folder),
                next_step=f'name its base as model.path, and set model.adapter = "{self.name}"',
            )
        step = "save it with save_pretrained of a current transformers"
        return ModelUnavailable(
            "The model has no weights in safetensors format, and no other format is loaded.",
            where=str(self.folder),
            next_step=f"connect to the hub, or {step}" if self.revision else step,
        )


class Sources(NamedTuple):
    """The model whose weights are loaded, the adapter on top of it, if any, and which of them `model.path` names."""

    base: Source
    adapter: Source | None
    path: Source

    def pins(self) -> dict[str, str]:
        """Return the job keys that mean newest versions or an adapter's own choice, and what exactly they mean now."""
        pins = {"model.revision": self.path.revision} if self.path.revision else {}
        if self.path is not self.base:
            pins["model.base"] = self.base.pinned
        elif self.adapter is not None and self.adapter.revision:
            pins["model.adapter"] = self.adapter.pinned
        return pins


def default_adapter(path: str) -> Path | None:
    """Return the folder of the adapter that the model `path` comes with, None if it comes with none.

    model.adapter = "" takes it. So far the demo model alone has one, which jobs/demo_adapter.toml makes.
    """
    return _DEMO_ADAPTER if path == DEMO else None


def find(section: ModelSection, *, weights: bool) -> Sources:
    """Return where model and adapter lie, converting or downloading them first where needed.

    Without `weights` those of a hub repository are not downloaded. Raises ModelUnavailable, JobFileError.
    """
    named = _locate(section.path, section.revision, weights=weights, where="model.path")
    if named.is_adapter:
        if section.adapter not in {"", NONE, section.path}:
            raise JobFileError(
                "model.path is an adapter already, and model.adapter names another one.",
                where=f"model.adapter = {section.adapter}",
                next_step="name the base model as model.path, or remove model.adapter",
            )
        base = _base_of(named, section.base, weights=weights)
        return Sources(base, None if section.adapter == NONE else named, named)
    if section.base:
        raise JobFileError(
            "model.base is for an adapter as model.path, and this one is a whole model.",
            where=f"model.path = {section.path}",
            next_step="remove model.base, or name the adapter as model.path",
        )
    return Sources(named, _adapter_on(named, section, weights=weights), named)


def _adapter_on(base: Source, section: ModelSection, *, weights: bool) -> Source | None:
    if section.adapter == NONE:
        return None
    if not section.adapter:
        own = default_adapter(section.path)
        if own is None and base.has_adapter:
            raise JobFileError(
                "The folder holds a whole model and an adapter, and nothing says whether its weights have it already.",
                where=str(base.folder),
                next_step=f'set model.adapter = "none" to take the weights as they are, or model.adapter = '
                f'"{section.path}" to put the adapter on top',
            )
        return None if own is None else Source(name=own.name, folder=own)
    adapter = _locate(section.adapter, "", weights=weights, where="model.adapter")
    if not adapter.has_adapter:
        raise ModelUnavailable(
            f"There is no {CONFIG}: this is not an adapter.",
            where=f"model.adapter = {section.adapter}",
            next_step="name a folder or a hub id that peft's save_pretrained made; a whole model goes to model.path",
        )
    return adapter


def _base_of(adapter: Source, given: str, *, weights: bool) -> Source:
    """Return the model that an adapter belongs on: `given`, else the one that it names itself."""
    config = read_adapter_config(adapter.folder)
    name, revision = given or config.base, "" if given else config.base_revision
    if not name:
        raise ModelUnavailable(
            "The adapter does not say which model it belongs on.",
            where=str(config.path),
            next_step="name it as model.base: a hub id or a folder",
        )
    where = "model.base" if given else f"base_model_name_or_path of {config.path}"
    try:
        # Only a hub repository has revisions; peft writes the key for folders as well.
        base = _locate(name, revision if _on_hub(name) else "", weights=weights, where=where)
    except ModelUnavailable as error:
        if given:
            raise
        step = f"{error.next_step}; or set model.base to the base model's hub id or folder"
        raise ModelUnavailable(f"The adapter's base model: {error.what}", where=where, next_step=step) from None
    if base.is_adapter:
        raise ModelUnavailable(
            "The adapter's base is an adapter itself.",
            where=f"{where} = {name}",
            next_step="merge the lower one into its model first, and name the result as model.base",
        )
    return base


def _locate(name: str, revision: str, *, weights: bool, where: str) -> Source:
    if _on_hub(name):
        plain, commit = id_and_commit(name)
        patterns = _TOKENIZER_FILES + (_WEIGHT_FILES if weights else [])
        folder = fetch(plain, revision or commit, patterns, where=where)
        # A snapshot's folder is named after its commit.
        return Source(name=plain, folder=folder, revision=folder.name)
    if revision:
        raise JobFileError(
            "model.revision belongs to a model of the hub, and this one is on this machine.",
            where=f"{where} = {name}",
            next_step="remove model.revision",
        )
    if name == DEMO:
        return Source(name=name, folder=ensure_demo_model())
    folder = Path(name).expanduser()
    if not folder.is_dir():
        noun = "adapter" if where == "model.adapter" else "model"
        raise ModelUnavailable(
            f"The {noun} is not a folder." if folder.exists() else f"There is no such {noun} folder.",
            where=str(folder.absolute()),
            next_step=_FOLDER_STEPS.get(where, "put the folder there"),
        )
    return Source(name=name, folder=folder.absolute())


def id_and_commit(name: str) -> tuple[str, str]:
    """Split a pinned hub id, "owner/name@commit"; any other name comes back whole, with ""."""
    plain, _, commit = name.partition("@") if _on_hub(name) else (name, "", "")
    return plain, commit


def _on_hub(name: str) -> bool:
    folder = Path(name).expanduser()
    if name == DEMO or folder.is_dir():
        return False
    return not (name.startswith((".", "/", "~")) or folder.exists() or not _HUB_ID.fullmatch(name))
