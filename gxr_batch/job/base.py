"""What all sections of the job file are made of: the frozen base, and the kinds of values that several of them hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

MOST_TOKENS = 1_000_000  # beyond any model
MOST = 2**31 - 1  # what a column of the results holds


def spelled(parse: Callable[[str], object]) -> Callable[[str], str]:
    """Return a validator that keeps the text as it is spelled and refuses what `parse` cannot read."""

    def check(value: str) -> str:
        parse(value)
        return value

    return check


def _path_of_a_file(value: str) -> str:
    """Return a path as it is; raise ValueError for one that no file can have."""
    if "\0" in value:
        raise ValueError("holds a NUL character, and no path does")
    if len(value.encode()) > 4000 or any(len(name.encode()) > 255 for name in value.split("/")):
        raise ValueError("is too long for a path: a name has at most 255 bytes, a path 4000")
    return value


FilePath = Annotated[str, AfterValidator(_path_of_a_file)]


class Section(BaseModel):
    """A table of the job file: frozen, strict about unknown keys, silent about values in its errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
