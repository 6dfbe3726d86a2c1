"""Where templates run: jinja2's sandbox without files, imports or globals, with a limit on the work of one prompt.

The limits are far above what a prompt needs; they turn a template that would never end into an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import StrictUndefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

from gxr_batch.templates.words import clause, of_each, patient, printed, stop

MAX_STEPS = 100_000
MAX_CHARS = 4_000_000
_MAX_BITS = 1_024
# No template can spell this name, so none can take the limit off its loops.
_LIMITED = "limited loop"


class TooMuchWork(SecurityError):
    """A prompt takes more steps, or grows longer, than any prompt should."""


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
    intercepted_binops = frozenset({"*", "**"})
    context_class = _Counting

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, finalize=printed)
        self.globals = {"patient": patient}
        self.filters |= {"clause": clause, "of_each": of_each, "stop": stop, _LIMITED: _limited}

    def limit_loops(self, tree: nodes.Template) -> None:
        """Let every `for` of a parsed template count its turns."""
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _LIMITED, [], [], None, None, lineno=loop.lineno)
            loop.iter.set_environment(self)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call something from a template: one step, so that macros which call themselves come to an end."""
        if isinstance(context, _Counting):
            context.step()
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply and raise to a power, within what fits a prompt."""
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MAX_BITS:
                raise TooMuchWork("it computes a number of hundreds of digits")
        elif not isinstance(left, int | float) or not isinstance(right, int | float):
            length = len(left) * right if isinstance(right, int) else len(right) * left
            if length > MAX_RANGE:
                raise TooMuchWork("it repeats a text too often")
        return super().call_binop(context, operator, left, right)


@pass_context
def _limited(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        if isinstance(context, _Counting):
            context.step()
        yield item
