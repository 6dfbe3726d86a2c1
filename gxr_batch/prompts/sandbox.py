"""Runs templates in jinja2's sandbox without files, imports or globals, and limits the work of one prompt.

Two limits stop endless templates: MAX_STEPS loop iterations and calls, and MAX_CHARS of any text. They are counted, not
timed, so a row fails on every machine or on none, and no signal or thread is needed. But a count sees an operation only
after it ran, and jinja2 has no limit for those that make gigabytes, or take hours, in a single call of C. Their
arguments are checked before they run; this is why widths, replacements, formats and powers have rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import StrictUndefined, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.visitor import NodeTransformer
from markupsafe import Markup, soft_str

from gxr_batch.job import PROMPT_VERSION
from gxr_batch.prompts.field_uses import DEFAULT, NEEDED, TEXT_FILTERS
from gxr_batch.prompts.filters import (
    NO_NUMBER,
    clause,
    number,
    of_each,
    patient,
    patient_of_version_1,
    printed,
    stop,
)

# All far above what a prompt needs.
MAX_STEPS, MAX_CHARS = 100_000, 4_000_000
_MAX_WIDTH = 10_000  # the widest column, indent or count that a call may name
_MAX_REPEATED = 100_000  # characters or items that `*` may make
_MAX_ESTIMATE = 100_000_000  # characters that a call may make, estimated from its arguments
_MAX_BITS = 1_024
_ITEM_SIZE = 8  # the size of a list item, besides its characters
_WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*[\d.]*?(?:\*|\d{5})")
_TOO_LONG = f"it gives more than {MAX_CHARS:,} characters"
_TOO_LARGE = "it computes a number of hundreds of digits"
_TOO_WIDE = f"a format asks for more than {_MAX_WIDTH:,} characters"
# Filters whose result can be much longer than their input.
_GROWING = (
    "batch", "center", "format", "indent", "join", "map", "replace", "round", "slice", "tojson", "truncate", "wordwrap",
)  # fmt: skip
# These make their subject longer by the length of an argument, or by a number.
_BY_NUMBER = frozenset({"expandtabs", "indent", "tojson"})
_MULTIPLYING = _BY_NUMBER | {"%", "format", "join", "replace", "translate"}
_METHODS = (BuiltinMethodType, MethodType)
# No template can spell these names, so none can remove the limits.
_LIMITED, _FITTED, _PRINTED = "limited loop", "fitted value", "printed value"


class TooMuchWork(SecurityError):
    """A prompt takes more steps or characters than allowed."""


class MissingValue(ValueError):
    """A prompt needs a value that the row lacks; the message names its fields."""


class _Counting(Context):
    """The variables of one prompt, and how many loop iterations and calls it has used."""

    steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TooMuchWork(f"it takes more than {MAX_STEPS:,} steps")


def concatenated(pieces: Iterable[str]) -> str:
    """Join the pieces of a prompt, a block or a macro. Raises TooMuchWork."""
    kept, length = [], 0
    for piece in pieces:
        kept.append(piece)
        length += len(piece)
        if length > MAX_CHARS:
            raise TooMuchWork(_TOO_LONG)
    return "".join(kept)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. Using a name that is neither a field nor a built-in function is an error."""

    # Without this, constants are folded at compile time, and 9 ** 9 ** 9 never ends.
    intercepted_binops = frozenset({"*", "**", "%", "+"})
    context_class = _Counting
    concat = staticmethod(concatenated)

    def __init__(self, version: int = PROMPT_VERSION) -> None:
        """`version` is of the rules (`prompt.version`).

        Up to version 1, what is joined shows "None" for a missing cell and "65.0", and `patient` knows fewer words.
        """
        super().__init__(undefined=StrictUndefined, finalize=printed)
        self._joins_as_printed = version > 1
        self._patient = patient if version > 1 else patient_of_version_1
        self.globals = {"patient": self._patient}
        self.filters |= {name: _guarded(name, self.filters[name]) for name in _GROWING}
        self.filters |= {name: _of_a_cell(self.filters[name]) for name in TEXT_FILTERS}
        if self._joins_as_printed:
            self.filters |= {"join": _joining(self.filters["join"]), "string": _as_printed_text}
        self.filters |= dict.fromkeys(DEFAULT, _default) | {"number": number, NEEDED: _needed_value}
        self.tests |= {"defined": _is_there, "undefined": lambda value: not _is_there(value)}
        self.filters |= {"clause": clause, "of_each": of_each, "stop": stop}
        self.filters |= {_LIMITED: _limited, _FITTED: _fits, _PRINTED: printed}

    def limit_work(self, tree: nodes.Template) -> None:
        """Make every `for` of a parsed template count its iterations, and check the size of every text it builds."""
        if self._joins_as_printed:
            for node in tree.find_all(nodes.Concat):
                node.nodes = [_filtered(one, _PRINTED) for one in node.nodes]
        _Limiting().visit(tree)
        tree.set_environment(self)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute or a key; a missing cell has none, and every member of it is missing."""
        return None if obj is None else super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item or an attribute; see `getattr`."""
        return None if obj is None else super().getitem(obj, argument)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call something from a template: one step, so that recursive macros end."""
        assert isinstance(context, _Counting)  # by context_class
        context.step()
        if function is self._patient and not kwargs:  # built in, and in nearly every prompt: skip the checks
            return _fits(function(*args))
        if isinstance(function, LoopContext):  # a recursive loop; this call gives its next level
            args = (_limited(context, *args),)
        elif isinstance(function, _METHODS) and isinstance(function.__self__, str | bytes | int):
            args = _listed(args)
            _check(function.__name__, function.__self__, [*args, *kwargs.values()])
        return _fits(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Add, multiply, format and raise to a power, within the limits of a prompt."""
        if operator == "%" and isinstance(left, str | bytes):
            _check("%", left, [right])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > _MAX_BITS:
                raise TooMuchWork(_TOO_LARGE)
        elif operator == "*" and max(_repeated(left, right), _repeated(right, left)) > _MAX_REPEATED:
            raise TooMuchWork("it repeats a text too often")
        return _fits(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the `str.format` of templates: the sandbox's own, with limits on widths."""
        if super().wrap_str_format(value) is None:
            return None
        text: Any = value.__self__
        formatter = _NarrowEscape(self, escape=text.escape) if isinstance(text, Markup) else _Narrow(self)

        def filled(*args: Any, **kwargs: Any) -> str:
            _check("format", text, [*args, *kwargs.values()])
            values = ((), args[0]) if value.__name__ == "format_map" else (args, kwargs)
            made: str = type(text)(formatter.vformat(text, *values))
            return made

        return filled


class _Narrow(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{5}", format_spec):
            raise TooMuchWork(_TOO_WIDE)
        return super().format_field(value, format_spec)


class _NarrowEscape(_Narrow, SandboxedEscapeFormatter):
    """The same for text that is marked as markup."""


class _Limiting(NodeTransformer):
    """Wraps the iterable of every `for` in a counter, and every text or list that is built in a size check."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _LIMITED)
        return node

    def _fitted(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filtered(node, _FITTED)

    visit_Concat = visit_Dict = visit_List = visit_Tuple = _fitted


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context
def _limited(context: _Counting, items: Iterable[Any] | None) -> Iterator[Any]:
    for item in () if items is None else items:
        context.step()
        yield item


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return one of jinja2's filters with a check of its arguments."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)  # keeps the marker that makes jinja2 pass its context
    def checked(*args: Any, **kwargs: Any) -> Any:
        passed, (subject, *rest) = args[:first], _listed(args[first:])
        _check("%" if name == "format" else name, subject, [*rest, *kwargs.values()])
        return _fits(function(*passed, subject, *rest, **kwargs))

    return checked


def _of_a_cell(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a text filter that leaves a missing cell missing."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def of_a_cell(*args: Any, **kwargs: Any) -> Any:
        return None if len(args) > place and args[place] is None else function(*args, **kwargs)

    return of_a_cell


def _joining(function: Callable[..., str]) -> Callable[..., str]:
    """Return the filter `join` with items as prompts show them, without those that are missing."""

    @wraps(function)
    def joined(context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
        if attribute is None and not isinstance(value, str | None):
            value = [printed(one) for one in value if _is_there(one) or isinstance(one, Undefined)]
        return function(context, value, d, attribute)

    return joined


def _as_printed_text(value: Any) -> Any:
    """Return the filter `string`: a value as the text that prompts show; a missing cell stays missing."""
    return None if value is None else soft_str(printed(value))


def _is_there(value: Any) -> bool:
    return value is not None and value is not NO_NUMBER and not isinstance(value, Undefined)


def _default(value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    """Return `default_value` for a missing cell; with `boolean` also for everything else that is false."""
    return value if _is_there(value) and (value or not boolean) else default_value


def _needed_value(value: Any, names: str) -> Any:
    if value is None or value is NO_NUMBER:
        raise MissingValue(names)
    return value


def _check(name: str, subject: Any, args: Sequence[Any]) -> None:
    """Raise TooMuchWork if a method, a filter or "%" could make `subject` too long with these arguments."""
    sizes = [_size(arg) for arg in args]
    if name == "%":
        if _WIDE_PERCENT.search(str(subject, "latin-1") if isinstance(subject, bytes) else str(subject)):
            raise TooMuchWork(_TOO_WIDE)
    elif name not in {"format", "map"}:  # their numbers are printed, or belong to another filter
        numbers = [abs(arg) for arg in args if isinstance(arg, int | float)]
        if any(number > _MAX_WIDTH for number in numbers):
            raise TooMuchWork(f"{name} is asked for more than {_MAX_WIDTH:,}")
        if name in _BY_NUMBER:
            sizes += [int(number) for number in numbers]
    if name in _MULTIPLYING and _size(subject) * max(sizes, default=1) > _MAX_ESTIMATE:
        raise TooMuchWork(_TOO_LONG)


def _repeated(subject: Any, times: Any) -> int:
    sequence = isinstance(subject, str | bytes | list | tuple) and isinstance(times, int)
    return len(subject) * times if sequence else 0


def _fits(value: Any) -> Any:
    """Return a value, which may be a generator. Raises TooMuchWork if it is too long or too large."""
    if isinstance(value, Iterator):
        return _bounded(value)
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise TooMuchWork(_TOO_LARGE)
    if _size(value) > MAX_CHARS:
        raise TooMuchWork(_TOO_LONG)
    return value


def _size(value: Any) -> int:
    """Return the number of characters and items of a value, nested ones included; counting stops above MAX_CHARS."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if not isinstance(value, list | tuple):
        return 1
    size = 0
    for item in value:
        size += _ITEM_SIZE + _size(item)
        if size > MAX_CHARS:
            break
    return size


def _bounded(items: Iterator[Any]) -> Iterator[Any]:
    size = 0
    for item in items:
        size += _ITEM_SIZE + _size(item)
        if size > MAX_CHARS:
            raise TooMuchWork(_TOO_LONG)
        yield item


def _listed(args: Sequence[Any]) -> tuple[Any, ...]:
    """Return arguments with generators as lists, so that checking does not consume them."""
    return tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
