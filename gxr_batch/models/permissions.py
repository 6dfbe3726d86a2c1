"""Files of a model that this user may not read: reported as such, never as damage.

Libraries report a missing permission in many ways, or use a default instead, so permissions are checked first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gxr_batch.errors import ModelUnavailable

# The files that are read by name; weights are added by their callers.
_READ = ("config.json", "generation_config.json", "adapter_config.json", "chat_template.jinja", "chat_template.json")
_READ_TOO = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "processor_config.json", "*.index.json")


def denied(path: Path) -> ModelUnavailable:
    """Return the error for a file or a folder that this user may not read."""
    mode = "a+rX" if path.is_dir() else "a+r"
    return ModelUnavailable(
        "Permission denied: this user may not read the model.",
        where=str(path),
        next_step=f"ask the owner for access (chmod {mode} {path}), or use a copy",
    )


def refuse_unreadable(paths: Iterable[Path]) -> None:
    """Raise ModelUnavailable if one of these files exists and this user may not read it."""
    for path in paths:
        if os.access(path, os.R_OK, effective_ids=True):
            continue
        try:
            path.stat()
        except PermissionError:  # a link into a folder of somebody else
            raise denied(path) from None
        except OSError:  # missing, which the callers report
            continue
        raise denied(path)


def refuse_unreadable_folder(folder: Path) -> None:
    """Raise ModelUnavailable if this user may not read a model's folder or its settings and tokenizer."""
    if not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
        raise denied(folder)
    refuse_unreadable(folder / name for name in _READ)
    for pattern in _READ_TOO:
        refuse_unreadable(sorted(folder.glob(pattern)))
