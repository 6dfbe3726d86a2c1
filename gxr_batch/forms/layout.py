r"""How a form is laid out in a text, and how a text is taken apart again.

    Impression: Right basal consolidation.

    Key findings:
    - Consolidation in the right lower zone
    - No effusion

    Difficulty: easy

A blank line separates sections, and none is inside one. So a text has exactly as many pieces between blank lines as
the form has sections, and each begins with its heading: nothing in a section can close it or be taken for a heading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence

from gxr_batch.cells import is_unicode
from gxr_batch.forms.form import PREFIX, Form, Part

SEPARATOR = "\n\n"
BULLET = "- "
Content = str | list[str] | float

_ASKS = {"text": "", "line": "one line", "bullets": 'a list, each item on a line that begins with "- "', "number": ""}
_REQUEST = (
    "Write your answer in these parts, in this order, each under its heading and separated by a blank line:\n{headings}"
)
_BRIEF_REQUEST = "Write your answer under these headings: {headings}."
_TOO_LARGE = 10**9  # for a number
_NUMBER = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,3})?")
_FENCE = re.compile(r"```\w*\n(.*)\n```", re.DOTALL)
# A heading as models write it that are not held to the form: bold, numbered, with or without marks.
_MARKS = r"[ \t]*(?:\#{1,6}[ \t]+)?(?P<before>[*_]{1,3})?(?:\d{1,2}[.)][ \t]+)?(?P<after>[*_]{1,3})?"


def request_of(form: Form) -> str:
    """Return what a prompt says about the form: its request, with the headings and what is asked under each.

    A text that is held to the form needs no more than the headings if nothing is asked: the layout comes by itself, and
    words about it are repeated by small models and computed for every row.
    """
    if form.version > 1 and not form.checked and not any(part.ask or part.choices for part in form.parts):
        names = ", ".join(part.heading for part in form.parts)
        return (form.request.strip() or _BRIEF_REQUEST).replace("{headings}", names)
    lines = [f"{part.heading}: {ask}" if (ask := _ask(part)) else f"{part.heading}:" for part in form.parts]
    return (form.request.strip() or _REQUEST).replace("{headings}", "\n".join(lines))


def _ask(part: Part) -> str:
    if part.ask:
        return " ".join(part.ask.split())
    return f"one of: {', '.join(part.choices)}" if part.kind == "choice" else _ASKS[part.kind]


def parts_of(form: Form, text: str) -> list[Content] | None:
    """Return what is under each heading of a text, None unless it has the form exactly.

    A section of bullets is a list of its items, a number a float, any other a text without blanks around it.
    """
    pieces = text.strip().split(SEPARATOR)
    if len(pieces) != len(form.parts):
        return None
    found: list[Content] = []
    for part, piece in zip(form.parts, pieces, strict=True):
        if not piece.startswith(part.opening):
            return None
        content = _content(part, piece[len(part.heading) + 1 :].strip())
        if content is None:
            return None
        found.append(content)
    return found


def _content(part: Part, text: str) -> Content | None:
    if part.kind == "bullets":
        items = [line.removeprefix("-").strip() for line in text.split("\n")]
        return [item for item in items if item] or None
    if part.kind == "number":
        return float(text) if _NUMBER.fullmatch(text) else None
    if part.kind == "choice":
        return text if text in part.choices else None
    return text or None


def sections_of(form: Form, contents: Sequence[Content], which: Collection[int]) -> dict[str, str]:
    """Return some of these sections as text, each under its column's name without the prefix."""
    return {form.parts[at].column.removeprefix(PREFIX): str(in_a_cell(contents[at])) for at in which}


def in_a_cell(content: Content) -> str | float:
    """Return a section as a cell of a sheet shows it: a list as lines that begin with "- "."""
    return "\n".join(BULLET + item for item in content) if isinstance(content, list) else content


def composed(form: Form, contents: Sequence[Content]) -> str:
    """Return the text with these sections, as `parts_of` takes it apart again; blank lines in a section are dropped.

    Raises ValueError, naming the heading, for a section that its kind does not allow.
    """
    return SEPARATOR.join(
        part.opening + _laid_out(part, content) for part, content in zip(form.parts, contents, strict=True)
    )


def _laid_out(part: Part, content: Content) -> str:
    if isinstance(content, list):
        lines = [" ".join(item.split()) for item in content]
        text = "\n".join(BULLET + line for line in lines if line)
    else:
        text = f"{content:.3f}".rstrip("0").rstrip(".") if isinstance(content, float) else content
        lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
        lines = [line for line in lines if line.strip()]
        if part.kind == "bullets":
            lines = [BULLET + re.sub(r"^\s*(?:[-*\u2022](?:\s+|$))?", "", line) for line in lines]
        text = "\n".join(lines).strip()
    if part.kind not in {"text", "bullets"}:
        text = " ".join(text.split())
    if not text or _content(part, text) is None:
        raise ValueError(part.heading)
    return text.removeprefix("-") if part.kind == "bullets" else f" {text}"


def recovered(form: Form, text: str) -> str | None:
    """Return a text that was asked for the form, but not held to it, in the form's layout; None if it lacks the form.

    Each heading must begin exactly one line, in the form's order and with nothing before the first; marks of Markdown
    around it, its capitals and what separates sections do not matter.
    """
    places: list[tuple[int, int]] = []
    for part in form.parts:
        close = r"(?(before)[*_]{0,3}|(?(after)[*_]{0,3}))"  # marks that end only what they began
        pattern = rf"^{_MARKS}{re.escape(part.heading)}[ \t]*{close}[ \t]*(?::[ \t]*{close}|$)"
        hits = list(re.finditer(pattern, text, re.MULTILINE | re.IGNORECASE))
        if len(hits) != 1:
            return None
        places.append(hits[0].span())
    if places != sorted(places) or text[: places[0][0]].strip():
        return None
    ends = [*(start for start, _ in places[1:]), len(text)]
    return _composed_leniently(form, [text[start:end].strip() for (_, start), end in zip(places, ends, strict=True)])


def _composed_leniently(form: Form, contents: Sequence[Content]) -> str | None:
    """Return the text with these sections, None if one is not allowed; a choice may have other capitals."""
    try:
        return composed(form, [_choice(part, content) for part, content in zip(form.parts, contents, strict=True)])
    except ValueError:
        return None


def _choice(part: Part, content: Content) -> Content:
    if not isinstance(content, str):
        return content
    wanted = content.rstrip(".").casefold()
    return next((choice for choice in part.choices if choice.casefold() == wanted), content)


def in_layout(form: Form, text: str) -> str | None:
    """Return the answer of a model that was asked for the form, but not held to it, in the form's layout.

    An answer that has the layout stays as it is, one with the form's headings is `recovered`, and so is a JSON object
    that has exactly the headings as keys. A fence of Markdown around all of it is dropped. None for any other.
    """
    text = text.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1].strip()
    if parts_of(form, text) is not None:
        return text
    return _of_json(form, text) if text.startswith("{") else recovered(form, text)


def _of_json(form: Form, text: str) -> str | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not is_unicode(json.dumps(found, ensure_ascii=False)):
        return None
    values = {str(key).strip().casefold(): value for key, value in found.items()}
    if len(found) != len(form.parts) or {*values} != {part.heading.casefold() for part in form.parts}:
        return None
    contents: list[Content] = []
    for part in form.parts:
        value = values[part.heading.casefold()]
        if isinstance(value, int | float) and not isinstance(value, bool):
            contents.append(float(min(value, _TOO_LARGE)))
        elif isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            contents.append(value)
        else:
            return None
    return _composed_leniently(form, contents)
