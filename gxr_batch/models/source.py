"""From the names in a job file to folders on this machine: a model, and the adapter on top of it.

A name is "demo", a folder, or a hub id: "owner/name", or pinned "owner/name@commit". Each fault in a name gives one
message, from here or, with a network, from `hub`. Weights are safetensors only, and a model's own code is never run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gxr_batch.cells import quoted
from gxr_batch.disk import expanded
from gxr_batch.errors import JobFileError, ModelUnavailable
from gxr_batch.job import ModelSection
from gxr_batch.models.demo import DEMO, ensure_demo_model
from gxr_batch.models.foreign import bad_value, read_object
from gxr_batch.models.hub import fetch
from gxr_batch.models.lora_config import CONFIG, WEIGHTS, read_adapter_config
from gxr_batch.models.permissions import denied, refuse_unreadable_folder

_DEMO_ADAPTER = Path(__file__).with_name("demo_adapter")
NONE = "none"  # as model.adapter: the base model alone
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?", re.ASCII)
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
# What transformers loads; a hub repository may also contain the weights in other formats.
_WEIGHT_FILES = ["model.safetensors", "model-*.safetensors", WEIGHTS]
# Files that a user may name instead of their folder.
_OWN_FILES = (CONFIG, WEIGHTS, "adapter_model.bin", "config.json", "model.safetensors")
_NAMED = 3
_INDEX = "model.safetensors.index.json"
_WHOLE = 'a folder with config.json and safetensors, a hub id, or "demo"'
_FOLDER_STEPS = {
    "model.path": f"set model.path to {_WHOLE}",
    "model.base": f"set model.base to {_WHOLE}",
    "model.adapter": 'set model.adapter to a folder with adapter_config.json, a hub id, or "none"',
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The folder of a model or an adapter on this machine. `revision` is the commit of a hub repository, else ""."""

    name: str
    folder: Path
    revision: str = ""

    @property
    def pinned(self) -> str:
        """The name of exactly these files: with the commit, if they come from the hub."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def has_adapter(self) -> bool:
        """Whether the folder holds an adapter."""
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
        read = read_object(index)
        if not isinstance(read.get("metadata", {}), dict):
            raise bad_value(index, "metadata", "an object")
        listed = read.get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(map(_is_weight_file, listed.values())):
            raise bad_value(index, "weight_map", "an object with the name of a safetensors file for each tensor")
        files = [self.folder / name for name in sorted(set(listed.values()))]
        for file in files:
            if not file.is_file():
                raise ModelUnavailable("A weight file is missing.", where=str(file), next_step="copy the folder again")
        return files

    def adapter_files(self) -> list[Path]:
        """Return the files that decide an adapter's effect: its settings and its tensors. Raises ModelUnavailable."""
        files = [self.folder / CONFIG, self.folder / WEIGHTS]
        for file in files:
            if not file.is_file():
                raise ModelUnavailable(
                    f"The adapter has no {file.name}, and other formats are not loaded.",
                    where=str(self.folder),
                    next_step="save it with save_pretrained from a current peft, or copy the folder again",
                )
        return files

    def _without_weights(self) -> ModelUnavailable:
        if self.has_adapter:
            return ModelUnavailable(
                "The folder contains a config.json and an adapter, but no model weights.",
                where=str(self.folder),
                next_step=f'set model.path to its base, and model.adapter = "{self.name}"',
            )
        step = "save it with save_pretrained from a current transformers"
        return ModelUnavailable(
            "The model has no weights in safetensors format, and other formats are not loaded.",
            where=str(self.folder),
            next_step=f"connect to the hub, or {step}" if self.revision else step,
        )


class Sources(NamedTuple):
    """The model whose weights are loaded, the adapter on top of it, if any, and which of them `model.path` names."""

    base: Source
    adapter: Source | None
    path: Source

    def pins(self) -> dict[str, str]:
        """Return the job keys that mean the newest version or an adapter's choice, and what exactly they mean now."""
        pins = {"model.revision": self.path.revision} if self.path.revision else {}
        if self.path is not self.base:
            pins["model.base"] = self.base.pinned
        elif self.adapter is not None and self.adapter.revision:
            pins["model.adapter"] = self.adapter.pinned
        return pins


def default_adapter(path: str) -> Path | None:
    """Return the folder of the adapter that comes with the model `path`, None if it comes with none.

    It is used if model.adapter = "". Only the demo model has one, made by jobs/demo_adapter.toml.
    """
    return _DEMO_ADAPTER if path == DEMO else None


def find(section: ModelSection, *, weights: bool, adapter_weights: bool = False) -> Sources:
    """Return where model and adapter are, converting or downloading them first if necessary.

    Without `weights`, a hub repository's weights are not downloaded, except an adapter's with `adapter_weights`. Raises
    ModelUnavailable, JobFileError.
    """
    found = _find(section, weights=weights)
    adapter = found.adapter
    if adapter is None or not adapter.revision or weights or not adapter_weights:
        return found
    _locate(adapter.name, adapter.revision, weights=[WEIGHTS], where="model.adapter")
    return found


def _find(section: ModelSection, *, weights: bool) -> Sources:
    named = _locate(section.path, section.revision, weights=weights, where="model.path")
    if named.is_adapter:
        if section.adapter not in {"", NONE, section.path}:
            raise JobFileError(
                "model.path is already an adapter, and model.adapter names another one.",
                where=f"model.adapter = {quoted(Path(section.adapter))}",
                next_step="set model.path to the base model, or remove model.adapter",
            )
        base = _base_of(named, section.base, weights=weights)
        return Sources(base, None if section.adapter == NONE else named, named)
    if section.base:
        raise JobFileError(
            "model.base requires an adapter as model.path, and this is a whole model.",
            where=f"model.path = {quoted(Path(section.path))}",
            next_step="remove model.base, or set model.path to the adapter",
        )
    return Sources(named, _adapter_on(named, section, weights=weights), named)


def _adapter_on(base: Source, section: ModelSection, *, weights: bool) -> Source | None:
    if section.adapter == NONE:
        return None
    if not section.adapter:
        own = default_adapter(section.path)
        if own is None and base.has_adapter:
            raise JobFileError(
                "The folder contains a whole model and an adapter, which may or may not be merged already.",
                where=str(base.folder),
                next_step=f'set model.adapter = "none" to use the weights as they are, or model.adapter = '
                f'"{section.path}" to apply the adapter',
            )
        return None if own is None else Source(name=own.name, folder=own)
    adapter = _locate(section.adapter, "", weights=weights, where="model.adapter")
    if not adapter.has_adapter:
        raise ModelUnavailable(
            f"There is no {CONFIG}: this is not an adapter.",
            where=f"model.adapter = {quoted(Path(section.adapter))}",
            next_step="use a folder or a hub id made by peft's save_pretrained; a whole model belongs in model.path",
        )
    return adapter


def _base_of(adapter: Source, given: str, *, weights: bool) -> Source:
    """Return the model that an adapter belongs to: `given`, else the one that it names."""
    config = read_adapter_config(adapter.folder)
    name, revision = given or config.base, "" if given else config.base_revision
    if not name:
        raise ModelUnavailable(
            "The adapter does not name its base model.",
            where=str(config.path),
            next_step="set model.base to a hub id or a folder",
        )
    where = "model.base" if given else f"base_model_name_or_path of {config.path}"
    try:
        # Only a hub repository has revisions, but peft writes the key for folders as well.
        base = _locate(name, revision if _on_hub(name) else "", weights=weights, where=where)
    except ModelUnavailable as error:
        if given:
            raise
        step = f"{error.next_step}; or set model.base to the base model's hub id or folder"
        raise ModelUnavailable(f"The adapter's base model: {error.what}", where=where, next_step=step) from None
    if base.is_adapter:
        raise ModelUnavailable(
            "The adapter's base is itself an adapter.",
            where=f"{where} = {quoted(Path(name))}",
            next_step="merge that one into its model first, and set model.base to the result",
        )
    return base


def _locate(name: str, revision: str, *, weights: bool | list[str], where: str) -> Source:
    """Return the folder of a name; `weights` are the files to download besides the small ones, True for all."""
    if _on_hub(name):
        plain, commit = id_and_commit(name)
        patterns = _TOKENIZER_FILES + (weights if isinstance(weights, list) else _WEIGHT_FILES if weights else [])
        folder = fetch(plain, revision or commit, patterns, where=where)
        refuse_unreadable_folder(folder)
        # A snapshot's folder is named after its commit.
        found = Source(name=plain, folder=folder, revision=folder.name)
        _refuse_folder_above(found, where)
        return found
    if revision:
        raise JobFileError(
            "model.revision is for models on the hub, and this one is on this machine.",
            where=f"{where} = {quoted(Path(name))}",
            next_step="remove model.revision",
        )
    if name == DEMO:
        source = Source(name=name, folder=ensure_demo_model())
        refuse_unreadable_folder(source.folder)
        return source
    folder = expanded(name)
    if not _is_folder(folder):
        noun = "adapter" if where == "model.adapter" else "model"
        step = _FOLDER_STEPS.get(where, "put the folder there")
        if folder.name in _OWN_FILES and folder.is_file() and where in _FOLDER_STEPS:
            step = f'set {where} = "{Path(name).parent}", the folder of this file'
        raise ModelUnavailable(
            f"The {noun} is not a folder." if folder.exists() else f"There is no such {noun} folder.",
            where=str(folder.absolute()),
            next_step=step,
        )
    refuse_unreadable_folder(folder.absolute())
    found = Source(name=name, folder=folder.absolute())
    _refuse_folder_above(found, where)
    return found


def _is_weight_file(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and name.isprintable() and Path(name).name == name


def _refuse_folder_above(source: Source, where: str) -> None:
    """Raise ModelUnavailable for a folder with models or adapters only further down.

    Trainers write one into checkpoint-N for each step, and peft writes an adapter with a name into a folder of it.
    """
    if source.has_adapter or (source.folder / "config.json").is_file():
        return
    wanted = (CONFIG,) if where == "model.adapter" else (CONFIG, "config.json")
    folders = [folder for pattern in ("*", "*/*") for folder in source.folder.glob(pattern)]
    below = sorted((one for one in folders if any((one / name).is_file() for name in wanted)), key=_by_number)
    if not below:
        return
    names = [str(folder.relative_to(source.folder)) for folder in below]
    noun = "adapter" if all((folder / CONFIG).is_file() for folder in below) else "model"
    do = "a folder in it does" if len(names) == 1 else f"{len(names)} folders in it do"
    best = _best_of(below[-1])
    advised = best if best in names else names[-1]
    key = where if where in _FOLDER_STEPS else "model.base"
    why = "" if len(names) == 1 else ", the best by its trainer_state.json" if best in names else ", the last one"
    if source.revision:
        step = f"hf download {source.name} --include '{advised}/*' --local-dir FOLDER"
        step += f', then set {key} = "FOLDER/{advised}"{why}'
    else:
        step = f'set {key} = "{Path(source.name) / advised}"{why}'
    raise ModelUnavailable(
        f"The folder contains no {noun} itself, but {do}: {', '.join(map(quoted, names[-_NAMED:]))}.",
        where=f"{where} = {quoted(Path(source.name))}",
        next_step=step,
    )


def _by_number(folder: Path) -> tuple[int, str]:
    """Return a sort key for folders that puts checkpoint-1000 after checkpoint-500."""
    number = re.search(r"(\d+)$", folder.name)
    return int(number[1]) if number else 0, str(folder)


def _best_of(checkpoint: Path) -> str:
    """Return the name of the best checkpoint by what the trainer wrote into the last one, "" if it did not."""
    try:
        return Path(read_object(checkpoint / "trainer_state.json").get("best_model_checkpoint") or "").name
    except (ModelUnavailable, TypeError):
        return ""


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:
        raise denied(path.absolute().parent) from None


def id_and_commit(name: str) -> tuple[str, str]:
    """Split a pinned hub id, "owner/name@commit"; return any other name unchanged, with ""."""
    plain, _, commit = name.partition("@") if _on_hub(name) else (name, "", "")
    return plain, commit


def _on_hub(name: str) -> bool:
    folder = expanded(name)
    if name == DEMO or _is_folder(folder):
        return False
    return not (name.startswith((".", "/", "~")) or folder.exists() or not _HUB_ID.fullmatch(name))
