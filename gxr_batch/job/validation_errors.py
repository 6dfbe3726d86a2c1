"""Turns what pydantic finds wrong with a job file into one message for the person who wrote it."""

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


# What pydantic's kinds of error say in our words; `{}` takes the limits that an error names. Its own words speak of
# models, instances and patterns, and those who write job files need not know them.
_SAYINGS = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a number, and not inf or nan",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_unicode": "holds bytes that are not UTF-8",
    "literal_error": "must be {expected}",
    "model_type": "must be a section of keys, written under a [header]",
    "dict_type": "must be a section of keys, written under a [header]",
}
# Where the beginning of the kind is enough.
_KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text in quotes",
    "tuple": 'must be a list, such as ["-"]',
    "list": 'must be a list, such as ["-"]',
}
_PATTERNS = {
    "name": "must begin with a letter or digit and hold only letters, digits, dots, hyphens and underscores",
    "prompt.templates": "names begin with a letter and hold only letters, digits, hyphens and underscores",
}
# How the guide and its trainer spell what has another name here.
_SPELLED_HERE = {
    "finetune.per_device_train_batch_size": "finetune.batch_size",
    "finetune.optim": "finetune.optimizer",
    "finetune.lr_scheduler_type": "finetune.lr_scheduler",
    "finetune.num_train_epochs": "finetune.epochs",
    "finetune.eval_strategy": "finetune.eval_steps",
    "finetune.r": "finetune.lora_r",
    "finetune.target_modules": "finetune.lora_targets",
}
# Keys that are left out on purpose, with the reason and what to type instead.
_LEFT_OUT = {
    "finetune.fp16": (
        "Fine-tuning never uses float16: Gemma 3 overflows in it. The guide sets fp16 and bf16 together, which is a "
        "mistake, since a trainer takes one of the two",
        "remove it: bfloat16 is taken where the hardware has it, else float32 (model.dtype chooses)",
    ),
    "finetune.bf16": (
        "The number format of fine-tuning is the model's. The guide sets fp16 and bf16 together, which is a mistake, "
        "since a trainer takes one of the two",
        'remove it: bfloat16 is taken where the hardware has it, else float32; model.dtype = "float32" chooses',
    ),
}
# Parts of pydantic's path to an error that are no keys.
_NO_KEY = re.compile(r"(literal|constrained|function|lax|nullable)\b.*|int|float|bool|str|\[key\]")


def explain(error: ValidationError, path: Path, text: str, options: Mapping[str, str]) -> JobFileError:
    """Turn pydantic's errors into one message: the first in full, the others counted.

    `options` maps the dotted keys that the command line set to the option that set each.
    """
    errors = error.errors(include_url=False, include_input=False)
    first = errors[0]
    keys = _keys(first)
    dotted = ".".join(keys) or "job file"
    alike = [other for other in errors if _keys(other) == keys]
    if dotted in _LEFT_OUT:
        what, step = f"{_LEFT_OUT[dotted][0]}.", _LEFT_OUT[dotted][1]
    elif first["type"] == "extra_forbidden":
        what, step = f"Unknown key: {dotted}.", _instead(keys)
    elif first["type"] == "missing":
        what, step = f"The job file lacks {dotted}.", "add it; the README shows a complete job file"
    else:
        what, step = f"{dotted}: {_said(alike, dotted)}.", "mend the value"
    if len(errors) > len(alike):
        step += f" ({len(errors) - len(alike)} more to mend after this)"
    return JobFileError(what, where=_place(keys, path, text, options), next_step=step)


def _instead(keys: Sequence[str]) -> str:
    """Return what an unknown key was probably meant to be."""
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
    """Return what is wrong with one value; a value of several kinds has an error for each."""
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
            sayings.append(_KINDS.get(kind.partition("_")[0], "must be a value of another kind"))
    first, *others = dict.fromkeys(sayings)
    return " or ".join([first, *(other.removeprefix("must be ") for other in others)])


def _place(keys: Sequence[str], path: Path, text: str, options: Mapping[str, str]) -> str:
    """Return the option or the line that gave a value."""
    for length in range(len(keys), 0, -1):
        if option := options.get(".".join(keys[:length])):
            return option
    line = _line_of(text, keys)
    if line is None and keys:
        inside = [option for key, option in options.items() if key.startswith(".".join(keys) + ".")]
        if inside:
            return inside[0]
    return f"{path}, line {line}" if line else str(path)


def _known_keys(section: Sequence[str]) -> Iterator[str]:
    model: Any = Job
    for name in section:
        field = getattr(model, "model_fields", {}).get(name)
        model = field.annotation if field else None
    yield from getattr(model, "model_fields", {})


def _line_of(text: str, keys: Sequence[str]) -> int | None:
    """Return the line on which a key stands (counted from 1), None if `--set` or a default brought it."""
    section, wanted = "", ".".join(keys[:-1])
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            section = header[1].strip()
            if section == ".".join(keys):
                return number
        elif section == wanted and keys and re.match(rf'\s*"?{re.escape(keys[-1])}"?\s*=', line):
            return number
    return None
