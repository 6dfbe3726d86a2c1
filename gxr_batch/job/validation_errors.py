"""Turns pydantic's errors about a job file into one message for its author."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gxr_batch.errors import JobFileError
from gxr_batch.job.schema import Job

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


# Plain wording for pydantic's kinds of error; `{}` takes the limits that an error names. Pydantic's own wording is
# about models, instances and patterns, which authors of job files need not know.
_SAYINGS = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_unicode": "contains bytes that are not UTF-8",
    "literal_error": "must be {expected}",
    "model_type": "must be a section of keys, written under a [header]",
    "dict_type": "must be a section of keys, written under a [header]",
}
# Kinds identified by their first word.
_KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text in quotes",
    "tuple": 'must be a list, such as ["-"]',
    "list": 'must be a list, such as ["-"]',
}
_PATTERNS = {
    "name": "must begin with a letter or digit and contain only letters, digits, dots, hyphens and underscores",
    "prompt.templates": "names begin with a letter and contain only letters, digits, hyphens and underscores",
}
# Names in the guide and its trainer for keys that have another name here.
_SPELLED_HERE = {
    "finetune.per_device_train_batch_size": "finetune.batch_size",
    "finetune.optim": "finetune.optimizer",
    "finetune.lr_scheduler_type": "finetune.lr_scheduler",
    "finetune.num_train_epochs": "finetune.epochs",
    "finetune.eval_strategy": "finetune.eval_steps",
    "finetune.r": "finetune.lora_r",
    "finetune.target_modules": "finetune.lora_targets",
}
# Keys that are omitted on purpose, with the reason and what to type instead.
_LEFT_OUT = {
    "finetune.fp16": (
        "Fine-tuning never uses float16: Gemma 3 overflows in it. The guide sets both fp16 and bf16, which is a "
        "mistake: a trainer accepts only one",
        "remove it: bfloat16 is used if the hardware supports it, else float32 (set model.dtype to choose)",
    ),
    "finetune.bf16": (
        "Fine-tuning uses the model's number format. The guide sets both fp16 and bf16, which is a mistake: a trainer "
        "accepts only one",
        'remove it: bfloat16 is used if the hardware supports it, else float32; set model.dtype = "float32" to choose',
    ),
}
# Parts of pydantic's path to an error that are not keys.
_NO_KEY = re.compile(r"(literal|constrained|function|lax|nullable|tuple)\b.*|int|float|bool|str|\[key\]")


def explain(error: ValidationError, path: Path, text: str, options: Mapping[str, str]) -> JobFileError:
    """Turn pydantic's errors into one message: the first in full, the others counted.

    `options` maps the dotted keys that the command line set to the option that set each.
    """
    from gxr_batch.cells import quoted  # imports pyarrow, which takes time

    errors = error.errors(include_url=False, include_input=False)
    first = errors[0]
    keys = _keys(first)
    dotted = ".".join(keys) or "job file"
    alike = [other for other in errors if _keys(other) == keys]
    if dotted in _LEFT_OUT:
        what, step = f"{_LEFT_OUT[dotted][0]}.", _LEFT_OUT[dotted][1]
    elif first["type"] == "extra_forbidden":
        what, step = f"Unknown key: {quoted(dotted)}.", _instead(keys)
    elif first["type"] == "missing":
        what, step = f"The job file lacks {dotted}.", "add it; jobs/nightly_teaching_cases.toml has every key"
    else:
        what, step = f"{quoted(dotted)}: {_said(alike, dotted)}.", "fix the value"
    if len(errors) > len(alike):
        step += f" ({len(errors) - len(alike)} more errors after this one)"
    return JobFileError(what, where=_place(keys, path, text, options), next_step=step)


def _instead(keys: Sequence[str]) -> str:
    """Return the probable replacement for an unknown key."""
    if here := _SPELLED_HERE.get(".".join(keys)):
        return f"here it is called {here}"
    known = list(_known_keys(keys[:-1]))
    near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
    elsewhere = [f"{section}.{keys[-1]}" for section in Job.model_fields if keys[-1] in set(_known_keys([section]))]
    nearest = elsewhere or [".".join([*keys[:-1], name]) for name in near]
    return f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(known)}"


def _keys(error: ErrorDetails) -> list[str]:
    if error["type"] in {"extra_forbidden", "missing"}:  # a wrong key may have any name
        return [str(part) for part in error["loc"]]
    return [str(part) for part in error["loc"] if not _NO_KEY.fullmatch(str(part))]


def _said(errors: Sequence[ErrorDetails], dotted: str) -> str:
    """Return the errors of one value; a value that may have several types has one for each."""
    sayings = []
    for error in errors:
        kind, context = str(error["type"]), error.get("ctx", {})
        if kind == "value_error":
            sayings.append(error["msg"].removeprefix("Value error, "))
        elif kind == "string_pattern_mismatch":
            sayings.append(_PATTERNS["name" if dotted == "name" else "prompt.templates"])
        elif kind in _SAYINGS:
            sayings.append(_SAYINGS[kind].format(**context).replace("\x27", '"'))
        else:
            sayings.append(_KINDS.get(kind.partition("_")[0], "must be a value of another type"))
    first, *others = dict.fromkeys(sayings)
    return " or ".join([first, *(other.removeprefix("must be ") for other in others)])


def _place(keys: Sequence[str], path: Path, text: str, options: Mapping[str, str]) -> str:
    """Return the option or the line that set a value."""
    from gxr_batch.cells import quoted  # imports pyarrow, which takes time

    for length in range(len(keys), 0, -1):
        if option := options.get(".".join(keys[:length])):
            return quoted(option)
    line = _line_of(text, keys)
    if line is None and keys:
        inside = [option for key, option in options.items() if key.startswith(".".join(keys) + ".")]
        if inside:
            return quoted(inside[0])
    return f"{path}, line {line}" if line else str(path)


def _known_keys(section: Sequence[str]) -> Iterator[str]:
    model: Any = Job
    for name in section:
        field = getattr(model, "model_fields", {}).get(name)
        model = field.annotation if field else None
    yield from getattr(model, "model_fields", {})


def _line_of(text: str, keys: Sequence[str]) -> int | None:
    """Return the line of a key (counted from 1), None if it comes from `--set` or a default."""
    section, wanted = "", ".".join(keys[:-1])
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            section = header[1].strip()
            if section == ".".join(keys):
                return number
        elif section == wanted and keys and re.match(rf'\s*"?{re.escape(keys[-1])}"?\s*=', line):
            return number
    return None
