"""What the sections of the job file have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

MOST_TOKENS = 1_000_000  # beyond any model


def _path_of_a_file(value: str) -> str:
    """Return a path unchanged; raise ValueError if no file can have it."""
    if "\0" in value:
        raise ValueError("contains a NUL character, which no path can")
    if len(value.encode()) > 4000 or any(len(name.encode()) > 255 for name in value.split("/")):
        raise ValueError("is too long for a path: a name has at most 255 bytes, a path 4000")
    return value


FilePath = Annotated[str, AfterValidator(_path_of_a_file)]


class Section(BaseModel):
    """A table of the job file: frozen, strict about unknown keys; its errors never quote values."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def quoted(name: str) -> str:
    """Return a name as `cells.quoted` does, which imports pyarrow: that takes time, and only errors need it."""
    from gxr_batch.cells import quoted

    return quoted(name)
