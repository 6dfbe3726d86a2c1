"""What one step of a template may cost: checks before the few operations that make much out of little.

jinja2's sandbox limits `range` alone. Here stand the others: widths, repeated replacements, joins, format strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEscapeFormatter, SandboxedFormatter

MAX_CHARS = 4_000_000
# The widest column, indent or count that a call may name.
_MAX_WIDTH = 10_000
_MAX_BITS = 1_024
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d+)?(?:\.(\*|\d+))?")
# Filters whose result can be much longer than what goes in.
_GROWING = ("center", "indent", "wordwrap", "truncate", "format", "replace", "join", "batch", "slice", "tojson")


class TooMuchWork(SecurityError):
    """A prompt takes more steps, or grows longer, than any prompt should."""


def fits(result: Any) -> Any:
    """Return a text that is not too long, or anything else, as it is."""
    if isinstance(result, str | bytes) and len(result) > MAX_CHARS:
        raise _too_long()
    return result


def concatenated(pieces: Iterable[str]) -> str:
    """Join the pieces of a block or a macro."""
    kept, length = [], 0
    for piece in pieces:
        kept.append(piece)
        length += len(piece)
        if length > MAX_CHARS:
            raise _too_long()
    return "".join(kept)


def guarded(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return jinja2's filters with a look at what the growing ones are asked for."""
    return {**filters, **{name: _guarded(name, filters[name]) for name in _GROWING}}


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)  # keeps the mark by which jinja2 passes its context
    def checked(*args: Any, **kwargs: Any) -> Any:
        subject, *rest = args[first:]
        if name == "join":
            pieces = list(subject)
            check("join", rest[0] if rest else kwargs.get("d", ""), [pieces])
            args = (*args[:first], pieces, *rest)
        else:
            check(name, subject, [*rest, *kwargs.values()])
        return fits(function(*args, **kwargs))

    return checked


def check(name: str, subject: Any, args: Sequence[Any]) -> None:
    """Raise TooMuchWork where the method or filter `name` of `subject` would make too much with these arguments."""
    if name != "format" and any(isinstance(arg, int | float) and abs(arg) > _MAX_WIDTH for arg in args):
        raise TooMuchWork(f"{name} is asked for more than {_MAX_WIDTH:,}")
    if name == "format" and isinstance(subject, str):
        check_percent(subject)
    if _length(name, subject, args) > MAX_CHARS:
        raise _too_long()


def _length(name: str, subject: Any, args: Sequence[Any]) -> int:
    """Return about how long the result gets, 0 where that follows from what goes in."""
    text = subject if isinstance(subject, str | bytes) else str(subject) if name in {"replace", "indent"} else ""
    if name == "replace" and len(args) > 1:
        old, new = (arg if isinstance(arg, type(text)) else str(arg) for arg in args[:2])
        times = text.count(old) if isinstance(text, type(old)) else 0  # type: ignore[arg-type]
        return len(text) + times * len(new)
    if name == "join" and args and isinstance(args[0], Sequence):
        pieces = args[0]
        return len(str(subject)) * len(pieces) + sum(len(piece) if isinstance(piece, str) else 8 for piece in pieces)
    if name == "translate" and args and isinstance(args[0], Mapping):
        return len(text) * max((len(str(value)) for value in args[0].values()), default=1)
    if name in {"expandtabs", "indent"}:
        widths = [len(arg) if isinstance(arg, str) else arg for arg in args if isinstance(arg, int | str)]
        return len(text) * max([1, *map(int, widths)]) if len(text) * max([1, *widths]) > MAX_CHARS else 0
    return 0


def check_percent(pattern: str) -> None:
    """Raise TooMuchWork where a %-format names a width that is too large, or takes it from its values."""
    for match in _PERCENT.finditer(pattern):
        if any(width and (width == "*" or len(width) > 4) for width in match.groups()):
            raise TooMuchWork(f"a format asks for more than {_MAX_WIDTH:,} characters")


def check_binop(operator: str, left: Any, right: Any) -> None:
    """Raise TooMuchWork where an operator would make too much."""
    if operator == "%":
        if isinstance(left, str):
            check_percent(left)
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if operator in {"*", "**"} and bits > _MAX_BITS:
            raise TooMuchWork("it computes a number of hundreds of digits")
    elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
        length = len(left) * right if isinstance(right, int) else len(right) * left
        if length > 100_000:
            raise TooMuchWork("it repeats a text too often")
    elif operator == "+" and isinstance(left, list | tuple) and len(left) + len(right) > MAX_CHARS:
        raise TooMuchWork("it makes too long a list")


class _Narrow(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{5}", format_spec):
            raise TooMuchWork(f"a format asks for more than {_MAX_WIDTH:,} characters")
        return super().format_field(value, format_spec)


class NarrowFormatter(_Narrow):
    """`str.format` in a template, with limits on widths."""


class NarrowEscapeFormatter(_Narrow, SandboxedEscapeFormatter):
    """The same for text that is marked as markup."""


def _too_long() -> TooMuchWork:
    return TooMuchWork(f"it gives more than {MAX_CHARS:,} characters")
