"""Where templates run: jinja2's sandbox without files, imports or globals, with a limit on the work of one prompt.

The limits are far above what a prompt needs; they turn a template that would never end into an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import StrictUndefined, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from gxr_batch.prompts.filters import clause, of_each, patient, printed, stop
from gxr_batch.prompts.limits import (
    MAX_CHARS,
    NarrowEscapeFormatter,
    NarrowFormatter,
    TooMuchWork,
    check,
    check_binop,
    concatenated,
    fits,
    guarded,
)

__all__ = ["MAX_CHARS", "Sandbox", "TooMuchWork"]

MAX_STEPS = 100_000
_METHODS = (BuiltinMethodType, MethodType)
# No template can spell these names, so none can take the limits off.
_LIMITED, _FITTED = "limited loop", "fitted text"


class _Counting(Context):
    """The variables of one prompt, and how many loop turns and calls it took so far."""

    steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TooMuchWork(f"it takes more than {MAX_STEPS:,} steps")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. A name that is neither field nor word of ours is an error where it is used."""

    # Folded at compile time otherwise, where 9 ** 9 ** 9 already never ends.
    intercepted_binops = frozenset({"*", "**", "%", "+"})
    context_class = _Counting
    concat = staticmethod(concatenated)

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, finalize=printed)
        self.globals = {"patient": patient}
        self.filters = guarded(self.filters)
        self.filters |= {"clause": clause, "of_each": of_each, "stop": stop, _LIMITED: _limited, _FITTED: fits}

    def limit_work(self, tree: nodes.Template) -> None:
        """Let every `for` of a parsed template count its turns, and every `~` look at the length of its text."""
        for loop in tree.find_all(nodes.For):
            loop.iter = self._filtered(loop.iter, _LIMITED)
        for text in list(tree.find_all(nodes.Concat)):
            # The node itself stays where it is and holds one piece: what it held before, looked at.
            text.nodes = [self._filtered(nodes.Concat(text.nodes, lineno=text.lineno), _FITTED)]
            text.nodes[0].node.set_environment(self)  # type: ignore[attr-defined]

    def _filtered(self, expression: nodes.Node, name: str) -> nodes.Filter:
        made = nodes.Filter(expression, name, [], [], None, None, lineno=expression.lineno)
        made.set_environment(self)
        return made

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call something from a template: one step, so that macros which call themselves come to an end."""
        if isinstance(context, _Counting):
            context.step()
        if function is patient and not kwargs:  # ours, and in nearly every prompt: no look at what it might be
            return fits(patient(*args))
        if isinstance(function, _METHODS) and isinstance(function.__self__, str | bytes | int):
            if function.__name__ == "join" and args:
                args = (list(args[0]), *args[1:])
            check(function.__name__, function.__self__, [*args, *kwargs.values()])
        return fits(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Add, multiply, format and raise to a power, within what fits a prompt."""
        check_binop(operator, left, right)
        return fits(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return what stands for `str.format` in a template: the sandbox's own, with limits on widths."""
        if super().wrap_str_format(value) is None:
            return None
        text: Any = value.__self__
        marked = isinstance(text, Markup)
        formatter = NarrowEscapeFormatter(self, escape=text.escape) if marked else NarrowFormatter(self)

        def filled(*args: Any, **kwargs: Any) -> str:
            values = ((), args[0]) if value.__name__ == "format_map" else (args, kwargs)
            made: str = type(text)(fits(formatter.vformat(text, *values)))
            return made

        return filled


@pass_context
def _limited(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        if isinstance(context, _Counting):
            context.step()
        yield item
