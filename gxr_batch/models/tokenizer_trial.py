"""Tries a tokenizer and its chat templates in a child process before they are loaded into this one.

The tokenizer library ends the process on some files, and a template may never end. Passed trials are remembered in the
user's private part of the cache, by the state of the file, so that a model is tried once; deleting that record costs a
second.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gxr_batch.errors import ModelUnavailable
from gxr_batch.models import try_tokenizer
from gxr_batch.models.foreign import AGAIN, bad_value, read_object, read_text, refuse_large
from gxr_batch.models.private_cache import read_record, write_record

_TRIED = "tried-tokenizers.json"
_MOST_KEPT = 200
_SECONDS = 600  # of waiting; the child's limits are on its CPU time
_GIB = 2**30
_MEMORY_A_BYTE = 40  # of tokenizer.json; Gemma's takes a quarter of it


def refuse_crashing(folder: Path, adapter: Path | None = None) -> None:
    """Refuse a folder whose tokenizer or chat templates end a process, or never end; `adapter` may have a template.

    Raises ModelUnavailable.
    """
    path = folder / "tokenizer.json"
    with_tokenizer = path.exists() or path.is_symlink()
    if with_tokenizer:
        refuse_large(path)
    templates = _templates(folder) | ({} if adapter is None else _template_files(adapter))
    key = _key(path if with_tokenizer else None, templates)
    known = _load()
    if key in known:
        return
    _try(path if with_tokenizer else None, templates)
    write_record(_TRIED, json.dumps([*known, key][-_MOST_KEPT:], indent=0).encode())


def _templates(folder: Path) -> dict[str, str]:
    """Return the texts of a folder's chat templates by their places."""
    found = _template_files(folder)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return found
    given = read_object(path).get("chat_template")
    if isinstance(given, str):
        found[f"{path}: chat_template"] = given
    elif isinstance(given, list):
        for number, one in enumerate(given):
            if not isinstance(one, dict) or not all(isinstance(one.get(key), str) for key in ("name", "template")):
                raise bad_value(path, f"chat_template[{number}]", "an object with name and template, both text")
            found[f"{path}: chat_template[{number}]"] = one["template"]
    elif isinstance(given, dict):
        if not all(isinstance(one, str) for one in given.values()):
            raise bad_value(path, "chat_template", "text")
        found |= {f"{path}: chat_template.{name}": text for name, text in given.items()}
    elif given is not None:
        raise bad_value(path, "chat_template", "text")
    return found


def _template_files(folder: Path) -> dict[str, str]:
    paths = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    return {str(path): read_text(path) for path in paths if path.exists() or path.is_symlink()}


def _try(path: Path | None, templates: Mapping[str, str]) -> None:
    size = 0 if path is None else path.stat().st_size
    asked = {
        "tokenizer": None if path is None else str(path),
        "templates": list(templates.values()),
        "memory": _GIB + _MEMORY_A_BYTE * size,
    }
    # The library's own folder must not be on the child's path: it has modules with common names.
    command = [sys.executable, "-P", try_tokenizer.__file__]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), text=True, capture_output=True, timeout=_SECONDS, check=False
        )
        code, steps = done.returncode, done.stdout.split()
    except subprocess.TimeoutExpired as error:
        code, steps = -1, (error.stdout or b"").decode().split()
    if code == 0:
        return
    step = steps[-1] if steps else ""
    if step.isdigit():
        raise ModelUnavailable(
            "The chat template never ends, or takes too much memory.",
            where=list(templates)[int(step)],
            next_step=f'{AGAIN}; or set prompt.format = "literal" and remove the template',
        )
    if not step:
        raise ModelUnavailable(
            "The tokenizer could not be tried in a child process.", where=str(path), next_step="free memory, then retry"
        )
    raise ModelUnavailable(
        "The tokenizer makes far too many tokens of a text."
        if code == try_tokenizer.TOO_LONG
        else "The tokenizer library ends the process, never ends, or takes too much memory with this file.",
        where=str(path),
        next_step=AGAIN,
    )


def _key(path: Path | None, templates: Mapping[str, str]) -> str:
    state: list[Any] = [version("tokenizers"), version("jinja2"), sorted(set(templates.values()))]
    if path is not None:
        stat = path.stat()
        state += [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _load() -> list[str]:
    try:
        known = json.loads(read_record(_TRIED))
    except (ValueError, RecursionError):
        return []
    return known if isinstance(known, list) else []
