"""Writes the pages that are made from the program: docs/job-file.md, docs/command-line.md, the tables of docs/flags.md.

Run it as a script after changing a job key, the help of a command or a flag: python docs/generate.py

Types, defaults and limits of job keys come from the schema, their meanings from the comments of the reference job file.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from click.testing import CliRunner
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gxr_batch.cli import VERBS, main
from gxr_batch.job import FormPart, Job
from gxr_batch.job.sampling import PRESETS
from gxr_batch.text_checks.descriptions import LEGEND
from gxr_batch.text_checks.identifiers import RULES

DOCS = Path(__file__).parent
REFERENCE = DOCS.parent / "jobs" / "nightly_teaching_cases.toml"
MADE = "<!-- Made by docs/generate.py: change the program, the reference job file or that script, then run it. -->"

JOB_FILE_HEAD = """# Job file

A job is one TOML file. `[input]` is required, everything else has a default:

<!-- file: small.toml -->
```toml
name = "small"

[input]
path = "inputs/findings.csv"
id_column = "case_id"
```

```bash
gxr-batch check small.toml
gxr-batch run small.toml --set sampling.temperature=0.4
```

- `gxr-batch init TABLE` writes a job file for your table, with a comment on each choice.
- [`jobs/nightly_teaching_cases.toml`](../jobs/nightly_teaching_cases.toml) has every key with its default; the tables
  below list the same keys.
- `--set section.key=value` overrides a key, is repeatable, and is recorded in `run.json`.
- A key that does not exist is an error that names the nearest one. A value outside the range that the model's guide
  recommends is a warning.
- Paths are relative to the current folder, not to the job file.
- A duration is a number and `s`, `m` or `h`: `"90s"`, `"30m"`, `"7h"`. A size is a number and `MiB`, `GiB`, `MB` or
  `GB`: `"20GiB"`. A time of day is `"06:00"`, local time.
- Automatic values (`"auto"`, an empty `model.revision`, `sampling.seed = "new"`) are decided when the run begins,
  recorded in `run.json`, and kept when it is resumed.

After the run has begun, keys that decide a row's text cannot change: see
[Change a job](run-folder.md#change-a-job).
"""
SEE_ALSO = {
    "input": "[Tables](tables.md), [words for missing values](templates.md#words-for-missing-values)",
    "prompt": "[Templates](templates.md)",
    "form": "[Texts with a form](forms.md)",
    "model": "[Models and adapters](models.md)",
    "sampling": "[The model's guide](guide.md#generating)",
    "engine": "[Engines](engines.md), [Sharing a GPU](sharing-a-gpu.md)",
    "run": "[Scheduling](scheduling.md), [Run folder](run-folder.md)",
    "privacy": "[Privacy](privacy.md)",
    "export": "[Review in a spreadsheet](review.md)",
    "api": "[Engines: api](engines.md#api)",
    "vllm": "[Engines: vllm](engines.md#vllm)",
    "ray": "[Clusters](clusters.md)",
    "finetune": "[Fine-tuning](fine-tuning.md)",
}
# What a key of text takes, known by a value that it accepts; a free text accepts all of them.
SPELLINGS = {"duration": "7h", "size": "20GiB", "time of day": "06:00"}


def comments_of(reference: str) -> dict[str, str]:
    """Return the comment of every key and section of the reference job file, by dotted name."""
    found: dict[str, str] = {}
    section = last = ""
    for line in reference.splitlines():
        header = re.match(r"""(?:# )?\[([a-z.]+)(?:\."[^"]*")?\]\s*# (.+)""", line)
        key = re.match(r"""(?:# )?([a-z_0-9]+) = (?:"[^"]*"|\[[^]]*\]|[^#]*?)\s*(?:# (.+))?$""", line)
        more = re.match(r"\s+# (.+)", line)
        if header:
            section = last = header[1]
            found[last] = header[2]
        elif key:
            last = f"{section}.{key[1]}".lstrip(".")
            found[last] = key[2] or ""
        elif more:
            found[last] += f" {more[1]}"
    return found


def job_file_page() -> str:
    """Return docs/job-file.md."""
    comments = comments_of(REFERENCE.read_text())
    top = [
        line for name, field in Job.model_fields.items() if not _section(field) for line in [_line(Job, name, comments)]
    ]
    parts = [MADE, JOB_FILE_HEAD, "## Keys outside sections\n", _table(top)]
    for name, field in Job.model_fields.items():
        model = _section(field)
        if model is None:
            continue
        parts += [
            f"## [{name}]\n",
            f"{_sentence(comments[name])} See also: {SEE_ALSO[name]}.\n"
            if name in SEE_ALSO
            else f"{_sentence(comments[name])}\n",
        ]
        parts.append(_table([_line(model, key, comments, name) for key in model.model_fields]))
        if name == "form":
            parts += ['### [form.section."HEADING"]\n', f"{_sentence(comments['form.section'])}\n"]
            parts.append(_table([_line(FormPart, key, comments, "form.section") for key in FormPart.model_fields]))
        if name == "sampling":
            parts += ["### Presets\n", _presets()]
    return "\n".join(parts)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    return field.annotation if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) else None


def _table(lines: list[str]) -> str:
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *lines, ""])


def _line(model: type[BaseModel], key: str, comments: Mapping[str, str], section: str = "") -> str:
    field = model.model_fields[key]
    dotted = f"{section}.{key}".lstrip(".")
    meaning = comments[dotted]
    default = "from the preset" if section == "sampling" and field.default is None else _default(field)
    cells = (f"`{key}`", _type(model, key, field), default, _linked(meaning))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _linked(text: str) -> str:
    """Return a comment as Markdown: pages as links, values and names as code."""
    text = re.sub(r"docs/([a-z-]+)\.md", r"[\1](\1.md)", text)
    values = r'[a-z]+\.kind = "[^"]*"|"[^"]*"'
    names = r"\[[a-z]+\.[a-z]+\]|\b(?:NAME\.training|[a-z]+\.(?:json|[a-z]+_[a-z_]+|template|kind))\b"
    return re.sub(f"{values}|{names}", lambda found: f"`{found[0]}`", text)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{_linked(text[1:])}."


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "not set"
    return f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type(model: type[BaseModel], key: str, field: FieldInfo) -> str:
    if field.annotation is str and (spelling := _spelling(model, key)):
        return spelling
    return " or ".join(dict.fromkeys(_kinds(field.annotation, field.metadata)))


def _kinds(annotation: Any, limits: Any = ()) -> Iterator[str]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _kinds(inner[0], inner[1:])
    elif origin in {Union, types.UnionType}:
        for one in inner:
            yield from _kinds(one, limits)
    elif origin is Literal:
        yield ", ".join(f"`{_toml(value)}`" for value in inner)
    elif origin is tuple:
        yield f"list of {' or '.join(_kinds(inner[0]))}"
    elif origin is dict:
        yield "table"
    elif annotation is not type(None):
        yield {str: "text", bool: "`true`, `false`", int: "integer", float: "number"}[annotation] + _range(limits)


def _range(limits: Any) -> str:
    """Return what values a number may have, as far as that is useful to a reader."""
    flat = [inner for limit in limits for inner in (limit.metadata if isinstance(limit, FieldInfo) else [limit])]
    bounds = {name: getattr(limit, name) for limit in flat for name in ("ge", "gt", "le", "lt") if hasattr(limit, name)}
    found = [("from {:,}", "ge"), ("above {:,}", "gt"), ("to {:,}", "le"), ("below {:,}", "lt")]
    said = [text.format(bounds[name]) for text, name in found if name in bounds and abs(bounds[name]) < 2**31 - 1]
    return f" {' '.join(said)}" if said else ""


def _spelling(model: type[BaseModel], key: str) -> str:
    accepted = [name for name, value in SPELLINGS.items() if _accepts(model, key, value)]
    other = any(_accepts(model, key, value) for value in ("any text", "host:1"))
    return accepted[0] if len(accepted) == 1 and not other else ""


def _accepts(model: type[BaseModel], key: str, value: str) -> bool:
    try:
        model.model_validate({key: value})
    except ValidationError as error:
        return all(fault["loc"] != (key,) for fault in error.errors())
    return True


def _presets() -> str:
    names = ("temperature", "max_new_tokens", "top_p", "top_k", "repetition_penalty")
    rows = [
        f"| `{name}` | {' | '.join(f'{getattr(preset, key):g}' for key in names)} |" for name, preset in PRESETS.items()
    ]
    return "\n".join(
        [f"| preset | {' | '.join(f'`{name}`' for name in names)} |", f"|---{'|---' * len(names)}|", *rows, ""]
    )


def command_line_page() -> str:
    """Return docs/command-line.md: the help of every command at 100 columns."""
    runner = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    parts = [
        MADE,
        "# Command line\n",
        "The help of every command. [Exit codes](run-folder.md#exit-codes) are the same for all of them.\n",
    ]

    def shown(names: list[str], command: click.Command) -> None:
        text = runner.invoke(main, [*names, "--help"], prog_name="gxr-batch", terminal_width=100).output.rstrip()
        parts.append(f"{'##' if len(names) < 2 else '###'} {' '.join(['gxr-batch', *names])}\n\n```text\n{text}\n```\n")
        if isinstance(command, click.Group) and names:
            for name in command.list_commands(click.Context(command)):
                found = command.get_command(click.Context(command), name)
                assert found is not None
                shown([*names, name], found)

    shown([], main)
    for verb in VERBS:
        found = main.get_command(click.Context(main), verb)
        assert found is not None
        shown([verb], found)
    return "\n".join(parts)


def flags_page() -> str:
    """Return docs/flags.md."""
    return _with_table(DOCS / "flags.md", "flag", LEGEND)


def privacy_page() -> str:
    """Return docs/privacy.md."""
    return _with_table(DOCS / "privacy.md", "rule", RULES)


def _with_table(path: Path, head: str, entries: Mapping[str, str]) -> str:
    """Return a page with the table between its two comments made again."""
    lines = [
        f"| `{name}` | {re.sub(r'<[a-z_]+>', lambda mark: f'`{mark[0]}`', text)} |" for name, text in entries.items()
    ]
    table = "\n".join([f"| {head} | meaning |", "|---|---|", *lines])
    between = re.compile(r"(<!-- made by docs/generate.py -->\n).*?(\n<!-- end -->)", re.DOTALL)
    page, tables = between.subn(lambda found: f"{found[1]}\n{table}\n{found[2]}", path.read_text())
    assert tables == 1, f"{path} has lost the comments around its table"
    return page


PAGES = {
    DOCS / "job-file.md": job_file_page,
    DOCS / "command-line.md": command_line_page,
    DOCS / "flags.md": flags_page,
    DOCS / "privacy.md": privacy_page,
}

if __name__ == "__main__":
    for path, made in PAGES.items():
        path.write_text(made())
