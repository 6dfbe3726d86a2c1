"""Makes broken versions of a JSON document: each value replaced by others of all types and sizes, or left out.

`mutations(document)` yields them in a fixed order, each with a name that says what was changed where. A version is
made when `text()` is called, since some have a megabyte. Those that are no JSON at all are `damages(document)`.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Path = tuple[str | int, ...]

_MARK = "the-value-is-replaced-here"
# By name, as JSON text: Python could not write all of them.
VALUES = {
    "null": "null",
    "true": "true",
    "false": "false",
    "0": "0",
    "1": "1",
    "-1": "-1",
    "-5": "-5",
    "7": "7",
    "1000000000": "1000000000",
    "2**31": str(2**31),
    "2**32 - 1": str(2**32 - 1),
    "2**63": str(2**63),
    "10**30": str(10**30),
    "10**5000": "1" + 5000 * "0",  # more digits than Python converts
    "0.5": "0.5",
    "1e308": "1e308",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "empty text": '""',
    "text": '"odd"',
    "a number as text": '"12"',
    "half a surrogate pair": '"\\ud800"',
    "a null character": '"a\\u0000b"',
    "an escape sequence": '"\\u001b[31mred\\u001b[0m\\r\\n"',
    "a path out": '"../../../../etc/passwd"',
    "an open pattern": '"(a*)*$ ["',
    "long text": '"' + 1_000_000 * "x" + '"',
    "empty list": "[]",
    "list of null": "[null]",
    "list of numbers": "[1, 2, 3]",
    "list of texts": '["a", "b"]',
    "long list": "[" + 100_000 * "0, " + "0]",
    "empty object": "{}",
    "object": '{"odd": 1}',
    "object of objects": '{"odd": {"type": {"odd": []}}}',
    "nested lists": 400 * "[" + 400 * "]",
    "nested objects": 400 * '{"a": ' + "1" + 400 * "}",
    "deeply nested lists": 100_000 * "[" + 100_000 * "]",
}


class Mutation(NamedTuple):
    """One broken version; `name` is the place, e.g. `layers[0].kind`, and what is there instead."""

    name: str
    text: Callable[[], bytes]


def places(document: Any, *, items: int = 2) -> Iterator[Path]:
    """Yield the path of each value, the document's own first; of long lists and objects only `items` at each end."""
    yield ()
    if isinstance(document, dict):
        keys: Sequence[str | int] = list(document)
    elif isinstance(document, list):
        keys = range(len(document))
    else:
        return
    some = keys if isinstance(document, dict) and len(keys) <= 200 else [*keys[:items], *keys[items:][-items:]]
    for key in some:
        yield from ((key, *path) for path in places(document[key], items=items))


def mutations(document: Any, *, items: int = 2) -> Iterator[Mutation]:
    """Yield every value of a document replaced by each of VALUES, and left out."""
    for path in places(document, items=items):
        for name, value in VALUES.items():
            yield Mutation(f"{spelled(path)} = {name}", _replaced(document, path, value))
        if path:
            yield Mutation(f"{spelled(path)} is missing", _without(document, path))


def damages(document: Any) -> Iterator[Mutation]:
    """Yield what a file may hold instead of JSON."""
    whole = json.dumps(document, indent=2)
    for name, made in (
        ("an empty file", b""),
        ("half a file", whole[: len(whole) // 2].encode()),
        ("a byte order mark", b"\xef\xbb\xbf" + whole.encode()),
        ("UTF-16", whole.encode("utf-16")),
        ("no UTF-8", b'{"a": "\xff\xfe"}'),
        ("null characters", 4096 * b"\0"),
        ("HTML", b"<!doctype html><html><body>Sign in</body></html>"),
        ("two documents", (whole + whole).encode()),
        ("a megabyte of blanks", whole.encode() + 2**20 * b" "),
    ):
        yield Mutation(name, lambda made=made: made)  # type: ignore[misc]


def sample(cases: Sequence[Mutation], count: int, seed: int = 0) -> list[Mutation]:
    """Return `count` of the cases, always the same for a seed, spread over all of them."""
    chosen = sorted(random.Random(seed).sample(range(len(cases)), min(count, len(cases))))
    return [cases[number] for number in chosen]


def spelled(path: Path) -> str:
    """Return a path as text."""
    if not path:
        return "the whole document"
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def _replaced(document: Any, path: Path, value: str) -> Callable[[], bytes]:
    def text() -> bytes:
        changed = copy.deepcopy(document)
        if not path:
            return value.encode()
        _inside(changed, path[:-1])[path[-1]] = _MARK
        return json.dumps(changed, indent=2, ensure_ascii=False).replace(f'"{_MARK}"', value).encode()

    return text


def _without(document: Any, path: Path) -> Callable[[], bytes]:
    def text() -> bytes:
        changed = copy.deepcopy(document)
        del _inside(changed, path[:-1])[path[-1]]
        return json.dumps(changed, indent=2, ensure_ascii=False).encode()

    return text


def _inside(document: Any, path: Path) -> Any:
    for key in path:
        document = document[key]
    return document
