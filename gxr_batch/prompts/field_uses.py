"""How a template uses its fields: which it needs, which it prints whole, and what it compares with what.

A field is optional if a condition asks about it, or if it is used only where something replaces a missing cell: under
`default` or `or`, in a branch of a conditional expression, as the source of a loop with a test or an `else`. A
condition that only compares a field asks about it for its own branches: elsewhere the field is needed all the same. If
all alternatives are missing, or a branch builds on a missing cell, the row fails and names them: `read_uses` puts a
filter around such expressions in the tree that runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from jinja2 import nodes

NEEDED = "needed value"  # no template can spell it
DEFAULT = frozenset({"d", "default"})
# Text filters of jinja2, which would print a missing cell as "None".
TEXT_FILTERS = frozenset(
    {"capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "replace", "safe", "string", "striptags",
     "title", "trim", "truncate", "upper", "urlencode", "wordwrap"}
)  # fmt: skip
_NULL_SAFE = TEXT_FILTERS | DEFAULT | {"clause", "number"}
_ASKING_TESTS = frozenset({"defined", "none", "undefined"})
_KEEPS_TEXT = TEXT_FILTERS | DEFAULT | {"clause"}
# Filters that take a struct, a map or a list of structs apart.
_TAKES_APART = frozenset(
    {"attr", "count", "dictsort", "first", "groupby", "items", "last", "length", "list", "map", "max", "min", "random",
     "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "tojson", "unique"}
)  # fmt: skip
_CALCULATIONS = (nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Pow)
_ORDER_TESTS = frozenset(
    {"!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "le", "lessthan", "lt", "ne"}
)
# needed: a cell must fill it; replaced: something takes its place; built on: needed if its branch is used
_Role = Literal["needed", "replaced", "built on", "asked"]


class Uses(NamedTuple):
    """How a template uses its fields.

    `optional`: a row may lack them. The others map a field to the line of its first such use: `whole` if it is printed,
    so that no struct can fill it, `with_number` and `with_text` if it is compared or calculated with one, `with_truth`
    if it is compared with true or false. `tested`: its truth is a condition. `by_new_rules`: earlier versions made
    another prompt of a missing cell.
    """

    optional: frozenset[str]
    whole: dict[str, int]
    with_number: dict[str, int]
    with_text: dict[str, int]
    with_truth: dict[str, int]
    tested: frozenset[str]
    by_new_rules: frozenset[str]


def read_uses(tree: nodes.Template, fields: Collection[str], version: int) -> Uses:
    """Return how a parsed template uses these fields, and mark in its tree what a row may not lack.

    Up to version 1 of the rules, a comparison asked about its field for the whole template.
    """
    fields = frozenset(fields)
    named = frozenset(name.name for test in _conditions(tree) for name in _names(test))
    asked = frozenset(name for test in _conditions(tree) for name in _asked_about(test)) if version > 1 else named
    compared: dict[str, dict[str, int]] = {"number": {}, "text": {}, "truth": {}}
    for name, kind, line in _comparisons(tree):
        if name in fields:
            compared[kind].setdefault(name, line)
    whole = dict(reversed([(name, line) for name, line in _whole(tree) if name in fields]))
    by_new_rules = named & fields & {name.name for node in _changed(tree) for name in _names(node)}
    reading = _Reading(fields, asked, named)
    reading.read(tree, "needed")
    return Uses(
        optional=(asked & fields) | reading.asked | (fields - reading.needed),
        whole=whole,
        with_number=compared["number"],
        with_text=compared["text"],
        with_truth=compared["truth"],
        tested=fields & frozenset(_tested(tree)),
        by_new_rules=by_new_rules,
    )


def _names(node: nodes.Node | None) -> Iterator[nodes.Name]:
    if isinstance(node, nodes.Name):
        yield node
    elif node is not None:
        yield from node.find_all(nodes.Name)


def _conditions(tree: nodes.Template) -> Iterator[nodes.Node]:
    """Yield the tests of `if` statements and expressions."""
    yield from (node.test for node in tree.find_all(nodes.If))
    yield from (node.test for node in tree.find_all(nodes.CondExpr))


def _asked_about(node: nodes.Node) -> Iterator[str]:
    """Yield the names whose presence a condition is about, and not only what they are equal to or larger than."""
    if isinstance(node, nodes.Compare):
        operands = [node.expr, *(one.expr for one in node.ops)]
        if not any(isinstance(one, nodes.Const) and one.value in (None, "") for one in operands):
            return
    elif isinstance(node, nodes.Test) and node.name in _ORDER_TESTS:
        return
    elif isinstance(node, nodes.Name):
        yield node.name
    for child in node.iter_child_nodes():
        yield from _asked_about(child)


def _changed(tree: nodes.Template) -> Iterator[nodes.Node]:
    """Yield what earlier versions did otherwise with a missing cell."""
    yield from (one.node for one in tree.find_all(nodes.Filter) if one.node and one.name in TEXT_FILTERS | DEFAULT)
    yield from (one.node for one in tree.find_all(nodes.Test) if one.name in {"defined", "undefined"})


class _Reading:
    """One pass over a tree: sorts each use of a field by its role, and puts the filter around what a row needs."""

    def __init__(self, fields: frozenset[str], asked: frozenset[str], named: frozenset[str]) -> None:
        self._fields, self._asked, self._named = fields, asked, named
        self.needed: set[str] = set()
        self.asked: set[str] = set()

    def read(self, node: nodes.Node, role: _Role) -> nodes.Node:
        """Return the node, or the filter around it."""
        if isinstance(node, nodes.Name):
            return self._name(node, role)
        if isinstance(node, nodes.Output):
            node.nodes = [self._printed(one) for one in node.nodes]
        elif isinstance(node, nodes.If):
            with self._branches_of(node.test, *(one.test for one in node.elif_)):
                self._children(node, "needed", test="asked")
        elif isinstance(node, nodes.For):
            self._children(node, "needed", test="asked", iter="replaced" if self._may_be_empty(node) else "needed")
        elif isinstance(node, nodes.Assign):
            aliased = isinstance(node.node, nodes.Name) and any(
                name.name in self._named for name in _names(node.target)
            )
            self._children(node, "needed", node="replaced" if aliased else "needed")
        elif role == "asked" or isinstance(node, nodes.Not):
            self._children(node, "asked")
        elif isinstance(node, nodes.Test) and node.name in _ASKING_TESTS:
            self.asked |= {name.name for name in _names(node.node)} & self._fields
            self._children(node, role, node="asked")
        elif isinstance(node, nodes.CondExpr):
            with self._branches_of(node.test):
                self._children(node, "replaced", test="asked")
        elif isinstance(node, nodes.Or) or (isinstance(node, nodes.Filter) and node.name in DEFAULT):
            self._children(node, "replaced")
        elif isinstance(node, nodes.Compare) and role != "needed":
            self._children(node, "asked")
        elif isinstance(node, nodes.Expr) and role == "replaced" and not _keeps_missing(node):
            self._children(node, "built on")
        else:
            self._children(node, role)
        return node

    @contextmanager
    def _branches_of(self, *tests: nodes.Node) -> Iterator[None]:
        """Take the names that conditions compare for asked about, while their branches are read."""
        before = self._asked
        self._asked = before | {name.name for test in tests for name in _names(test)}
        yield
        self._asked = before

    def _name(self, node: nodes.Name, role: _Role) -> nodes.Node:
        if node.name not in self._fields or node.ctx != "load":
            return node
        if role == "needed" and node.name not in self._asked:
            self.needed.add(node.name)
        return _needed(node, node.name) if role == "built on" and node.name not in self._asked else node

    def _children(self, node: nodes.Node, role: _Role, /, **others: _Role) -> None:
        for name, value in node.iter_fields():
            own = others.get(name, role)
            if isinstance(value, list):
                value[:] = [self.read(one, own) if isinstance(one, nodes.Node) else one for one in value]
            elif isinstance(value, nodes.Node):
                setattr(node, name, self.read(value, own))

    def _printed(self, node: nodes.Expr) -> nodes.Expr:
        """Return a printed expression; one that can be missing as a whole gets the filter."""
        read = self.read(node, "needed")
        assert isinstance(read, nodes.Expr)
        inner = node
        while isinstance(inner, nodes.Filter) and inner.name not in DEFAULT and inner.node is not None:
            inner = inner.node
        leaves = list(_leaves(inner))
        names = list(dict.fromkeys(_called(one) for one in leaves if not isinstance(one, nodes.Const)))
        bases = {name.name for one in leaves for name in _names(one)} & self._fields
        never = any(isinstance(one, nodes.Const) for one in leaves) or isinstance(inner, nodes.Name)
        if never or not bases or bases <= self._asked or any(isinstance(one, nodes.CondExpr) for one in leaves):
            return read
        return _around(node, inner, " or ".join(names))

    def _may_be_empty(self, node: nodes.For) -> bool:
        """Return whether a loop has a test or an `else`, or its body asks about what it loops over."""
        return bool(node.test or node.else_) or any(name.name in self._named for name in _names(node.target))


def _keeps_missing(node: nodes.Expr) -> bool:
    """Return whether an expression of a missing cell is a missing value, and no error or text."""
    return isinstance(node, nodes.Getattr | nodes.Getitem | nodes.And | nodes.Tuple | nodes.List | nodes.Const) or (
        isinstance(node, nodes.Filter) and node.name in _NULL_SAFE
    )


def _leaves(node: nodes.Expr | None) -> Iterator[nodes.Expr]:
    """Yield the values that an expression can have: the operands of `or`, both branches, a cell and its default."""
    if isinstance(node, nodes.Or):
        yield from (*_leaves(node.left), *_leaves(node.right))
    elif isinstance(node, nodes.CondExpr):
        yield from (*_leaves(node.expr1), *(_leaves(node.expr2) if node.expr2 else [node]))
    elif isinstance(node, nodes.Filter) and node.name in DEFAULT and node.args:
        yield from (*_leaves(node.node), *_leaves(node.args[0]))
    elif isinstance(node, nodes.Filter) and node.name in _NULL_SAFE - DEFAULT:
        yield from _leaves(node.node)
    elif isinstance(node, nodes.Getattr | nodes.Getitem | nodes.Name):
        yield node
    else:
        yield nodes.Const("", lineno=node.lineno if node else 0)


def _called(node: nodes.Expr) -> str:
    """Return what a message calls a cell or a member of one, such as `study.age`."""
    if isinstance(node, nodes.Getattr):
        return f"{_called(node.node)}.{node.attr}"
    if isinstance(node, nodes.Getitem):
        key = node.arg.value if isinstance(node.arg, nodes.Const) else "..."
        return f"{_called(node.node)}[{key!r}]"
    return node.name if isinstance(node, nodes.Name) else "..."


def _around(outer: nodes.Expr, inner: nodes.Expr, label: str) -> nodes.Expr:
    """Return `outer` with the filter around `inner`, which is `outer` or below its filters."""
    if outer is inner:
        return _needed(inner, label)
    assert isinstance(outer, nodes.Filter)
    assert outer.node is not None
    outer.node = _around(outer.node, inner, label)
    return outer


def _needed(node: nodes.Expr, label: str) -> nodes.Filter:
    label_node = nodes.Const(label, lineno=node.lineno)
    return nodes.Filter(node, NEEDED, [label_node], [], None, None, lineno=node.lineno)


def _whole(tree: nodes.Node, *, tested: bool = False) -> Iterator[tuple[str, int]]:
    """Yield the names whose value is used as a whole, except in conditions, with their lines."""
    for field, value in tree.iter_fields():
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, nodes.Node):
                continue
            below = tested or (field == "test" and isinstance(tree, nodes.If | nodes.CondExpr | nodes.For))
            below = below or isinstance(tree, nodes.Test | nodes.Not | nodes.Compare)
            if isinstance(child, nodes.Name):
                if child.ctx == "load" and not below and not _takes_apart(tree, field):
                    yield child.name, child.lineno
            else:
                yield from _whole(child, tested=below)


def _takes_apart(parent: nodes.Node, field: str) -> bool:
    if isinstance(parent, nodes.Filter) and field == "node":
        return parent.name in _TAKES_APART
    kinds = (nodes.Getattr, nodes.Getitem, nodes.Assign, nodes.For)
    return isinstance(parent, kinds) and field in {"node", "iter"}


def _tested(tree: nodes.Template) -> Iterator[str]:
    """Yield the names whose truth a condition tests."""
    waiting = [*_conditions(tree), *(loop.test for loop in tree.find_all(nodes.For) if loop.test)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, nodes.Name):
            yield node.name
        elif isinstance(node, nodes.And | nodes.Or):
            waiting += [node.left, node.right]
        elif isinstance(node, nodes.Not):
            waiting.append(node.node)


def _comparisons(tree: nodes.Template) -> Iterator[tuple[str, str, int]]:
    """Yield the name, "number", "text" or "truth", and line of each comparison or calculation with a constant."""
    for compare in tree.find_all(nodes.Compare):
        left = compare.expr
        for operand in compare.ops:
            right = operand.expr
            if operand.op in {"in", "notin"}:
                if items := _items(right):
                    kinds = {_constant(item) for item in items}
                    yield from _compared(left, kinds.pop() if len(kinds) == 1 else "", compare.lineno)
            else:
                yield from (*_compared(left, _constant(right), compare.lineno),)
                yield from (*_compared(right, _constant(left), compare.lineno),)
            left = right
    for test in tree.find_all(nodes.Test):
        if test.name in _ORDER_TESTS and test.args:
            yield from _compared(test.node, _constant(test.args[0]), test.lineno)
        elif test.name in {"true", "false"}:
            yield from _compared(test.node, "truth", test.lineno)
    for kind in _CALCULATIONS:
        for node in tree.find_all(kind):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                if _constant(other) == "number":
                    yield from _compared(one, "number", node.lineno)


def _items(node: nodes.Expr) -> list[nodes.Expr]:
    """Return the items of a list or tuple; jinja2 may have made a constant of it."""
    if isinstance(node, nodes.List | nodes.Tuple):
        return node.items
    constant = isinstance(node, nodes.Const) and isinstance(node.value, list | tuple)
    return [nodes.Const(item) for item in node.value] if constant else []  # type: ignore[attr-defined] # by `constant`


def _compared(cell: nodes.Node, kind: str, line: int) -> Iterator[tuple[str, str, int]]:
    # A text filter makes text of any cell, which may then be compared with text.
    passed = DEFAULT if kind == "text" else _KEEPS_TEXT
    while isinstance(cell, nodes.Filter) and cell.name in passed and cell.node is not None:
        cell = cell.node
    if kind and isinstance(cell, nodes.Name):
        yield cell.name, kind, line


def _constant(node: nodes.Node) -> str:
    """Return "number", "text" or "truth" for a constant of that kind, else "".

    The empty text has no kind: it tests for none.
    """
    if isinstance(node, nodes.Neg | nodes.Pos):
        return "number" if _constant(node.node) == "number" else ""
    if not isinstance(node, nodes.Const | nodes.TemplateData):
        return ""
    value = node.value if isinstance(node, nodes.Const) else node.data
    if isinstance(value, str):
        return "text" if value.strip() else ""
    if isinstance(value, bool):
        return "truth"
    return "number" if isinstance(value, int | float) else ""
