"""The job file as frozen models: every key of the contract, its default, its limits and what is not built yet.

Reading is strict: an unknown key is refused with the nearest known one, an impossible value with its place in the file.
Values outside the guide's ranges are warnings. Nothing here touches the table, the model or the run folder.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gxr_batch.errors import JobFileError, NotAvailable
from gxr_batch.settings import PRESETS, Sampling, parse_bytes, parse_clock, parse_duration

TEMPLATE_NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"
# Known to the contract, refused until the issue that builds them.
UNBUILT_SECTIONS = ("api", "vllm", "ray", "finetune")


def _spelled(parse: Callable[[str], object]) -> Callable[[str], str]:
    """Return a validator that keeps the text as it is spelled and refuses what `parse` cannot read."""

    def check(value: str) -> str:
        parse(value)
        return value

    return check


class Section(BaseModel):
    """A table of the job file: frozen, strict about unknown keys, silent about values in its errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class InputSection(Section):
    """Where the findings table is and how to read it."""

    path: str = Field(min_length=1)
    id_column: str = ""
    delimiter: str = "auto"
    encoding: str = "auto"
    null_values: tuple[str, ...] = ()
    columns: dict[str, str] = {}

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, value: str) -> str:
        if value != "auto" and (len(value) != 1 or value in '"\r\n'):
            raise ValueError('must be "auto" or one character that is neither a quote nor a line end')
        return value


class PromptSection(Section):
    """Which template makes the prompts, and how the turns are laid out."""

    template: str = Field(default="clinical_case", min_length=1)
    template_column: str = ""
    system: str = ""
    format: Literal["chat", "literal"] = "chat"
    too_long: Literal["fail", "truncate"] = "fail"
    templates: dict[Annotated[str, Field(pattern=TEMPLATE_NAME)], str] = {}


class ModelSection(Section):
    """Which weights, in which number format, on which device."""

    path: str = Field(default="demo", min_length=1)
    base: str = ""
    revision: str = ""
    adapter: str = ""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    load_in_4bit: Literal["auto"] | bool = "auto"
    device_map: str = "auto"
    max_seq_length: int = Field(default=2048, ge=16)


class SamplingSection(Section):
    """How the next token is drawn. A key that is None here takes the preset's value."""

    preset: Literal["default", "deterministic", "creative", "detailed", "concise"] = "default"
    max_new_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seed: int | Literal["new"] = 0
    samples_per_row: int = Field(default=1, ge=1, le=1000)

    def settings(self) -> Sampling:
        """Return the preset's settings with the keys set here laid over them."""
        own = self.model_dump(exclude={"preset", "seed", "samples_per_row"}, exclude_none=True)
        return PRESETS[self.preset].replace(**own)


class EngineSection(Section):
    """What generates, and how much of the machine it may use."""

    kind: Literal["auto", "generate", "transformers", "echo", "api", "vllm", "ray"] = "auto"
    slots: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    memory_limit: str = ""
    wait_for_memory: str = ""
    reproducible: bool = True
    self_check: bool = True
    threads: int = Field(default=0, ge=0)
    window: int = Field(default=4096, ge=1)

    _memory = field_validator("memory_limit")(_spelled(parse_bytes))
    _wait = field_validator("wait_for_memory")(_spelled(parse_duration))


class RunSection(Section):
    """Where results go, how often they are made safe, and when to stop."""

    output: str = Field(default="outputs/{name}", min_length=1)
    checkpoint_seconds: float = Field(default=30, gt=0, allow_inf_nan=False)
    grace_seconds: float = Field(default=20, ge=0, allow_inf_nan=False)
    stop_by: str = ""
    time_limit: str = ""
    max_failed: Literal["off"] | int | float = 0.5
    max_attempts: int = Field(default=3, ge=1)

    _clock = field_validator("stop_by")(_spelled(parse_clock))
    _limit = field_validator("time_limit")(_spelled(parse_duration))

    @field_validator("max_failed")
    @classmethod
    def _share_or_count(cls, value: Literal["off"] | int | float) -> Literal["off"] | int | float:
        if isinstance(value, bool) or (value != "off" and (value <= 0 or (value >= 1 and value != int(value)))):
            raise ValueError('must be a share above 0 and below 1, a whole number of rows, or "off"')
        return value

    @field_validator("output")
    @classmethod
    def _known_placeholders(cls, value: str) -> str:
        unknown = set(re.findall(r"\{([^}]*)\}", value)) - {"name", "date"}
        if unknown:
            raise ValueError(f"knows the placeholders {{name}} and {{date}}, not {{{sorted(unknown)[0]}}}")
        return value


class PrivacySection(Section):
    """Screening for identifiers."""

    identifiers: Literal["auto", "off", "flag", "hold"] = "auto"


class ExportSection(Section):
    """What is written beside the results when the run finishes."""

    formats: tuple[str, ...] = ()


class EchoSection(Section):
    """The echo engine's own keys: its speed and the faults that it plays.

    `tokens_per_second` is one row's speed (0 = as fast as it can); `fail_every` makes every Nth prompt fail;
    `fail_containing` fails prompts that hold this text; `crash_after` ends the engine after so many completions.
    """

    tokens_per_second: float = Field(default=0, ge=0, allow_inf_nan=False)
    fail_every: int = Field(default=0, ge=0)
    fail_containing: str = ""
    crash_after: int = Field(default=0, ge=0)


class Job(Section):
    """One job file, with the `--set` options laid over it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    input: InputSection
    prompt: PromptSection = PromptSection()
    model: ModelSection = ModelSection()
    sampling: SamplingSection = SamplingSection()
    engine: EngineSection = EngineSection()
    run: RunSection = RunSection()
    privacy: PrivacySection = PrivacySection()
    export: ExportSection = ExportSection()
    echo: EchoSection = EchoSection()

    @model_validator(mode="after")
    def _room_for_a_prompt(self) -> Job:
        if self.sampling.settings().max_new_tokens >= self.model.max_seq_length:
            raise ValueError("sampling.max_new_tokens must be smaller than model.max_seq_length: no prompt would fit")
        return self

    def with_values(self, values: Mapping[str, Any]) -> Job:
        """Return a copy with dotted keys replaced, e.g. {"model.dtype": "bfloat16"}."""
        data = self.model_dump()
        for dotted, value in values.items():
            section, key = dotted.split(".", 1)
            data[section][key] = value
        return Job.model_validate(data)

    def warnings(self) -> list[str]:
        """Return one sentence for each setting outside the guide's ranges or without effect."""
        found = self.sampling.settings().warnings()
        preset = PRESETS[self.sampling.preset]
        changed = preset.differences(PRESETS["default"])
        own = self.sampling.model_dump(exclude_none=True)
        if changed and all(key in own for key in changed):
            found.append(
                f'sampling.preset "{self.sampling.preset}" has no effect: '
                f"{', '.join(sorted(changed))} {'is' if len(changed) == 1 else 'are'} set in the job file"
            )
        return found


def load_job(path: Path, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None) -> Job:
    """Read a job file and lay `section.key=value` overrides over it, then `given` values by dotted key.

    Raises JobFileError where the file or an override cannot be used, NotAvailable where it asks for what is not built.
    """
    text = _read(path)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise JobFileError(
            f"The job file is not valid TOML: {error}.",
            where=str(path),
            next_step="mend that line; strings need quotes",
        ) from None
    for override in overrides:
        _apply(data, override)
    for dotted, value in (given or {}).items():
        _put(data, dotted.split("."), value, where=f"--{dotted.rpartition('.')[2].replace('_', '-')}")
    for section in UNBUILT_SECTIONS:
        if section in data:
            raise NotAvailable(f"[{section}]")
    try:
        job = Job.model_validate(data)
    except ValidationError as error:
        raise _explain(error, path, text) from None
    _refuse_unbuilt(job)
    return job


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise JobFileError(
            "There is no such job file.", where=str(path.absolute()), next_step="check the path"
        ) from None
    except IsADirectoryError:
        raise JobFileError("This is a folder, not a job file.", where=str(path.absolute())) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise JobFileError(f"The job file cannot be read: {reason}.", where=str(path.absolute())) from None


def _apply(data: dict[str, Any], override: str) -> None:
    dotted, equals, raw = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise JobFileError(
            "--set takes section.key=value.",
            where=f"--set {dotted}",
            next_step="e.g. --set sampling.temperature=0.4",
        )
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw  # a bare word is meant as text: shells take the quotes away
    _put(data, keys, value, where=f"--set {dotted}")


def _put(data: dict[str, Any], keys: Sequence[str], value: Any, *, where: str) -> None:
    target = data
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise JobFileError(f"{key} is not a section of the job file.", where=where)
    target[keys[-1]] = value


def _refuse_unbuilt(job: Job) -> None:
    unbuilt = {
        f'engine.kind = "{job.engine.kind}"': job.engine.kind in {"api", "vllm", "ray"},
        "engine.memory_limit": bool(job.engine.memory_limit),
        "engine.wait_for_memory": bool(job.engine.wait_for_memory),
        "model.adapter": job.model.adapter not in {"", "none"},
        'prompt.too_long = "truncate"': job.prompt.too_long == "truncate",
        "model.base": bool(job.model.base),
        f'privacy.identifiers = "{job.privacy.identifiers}"': job.privacy.identifiers in {"flag", "hold"},
        "export.formats": bool(job.export.formats),
    }
    for thing, asked in unbuilt.items():
        if asked:
            raise NotAvailable(thing)


def _explain(error: ValidationError, path: Path, text: str) -> JobFileError:
    """Turn pydantic's errors into one message: the first in full, the others counted."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    first = errors[0]
    keys = [str(part) for part in first["loc"] if not str(part).startswith(("literal", "constrained", "function"))]
    keys = [key for key in keys if key not in {"int", "float", "bool", "[key]"}]
    dotted = ".".join(keys) or "job file"
    if first["type"] == "extra_forbidden":
        known = list(_known_keys(keys[:-1]))
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        what = f"Unknown key: {dotted}."
        step = f"did you mean {'.'.join([*keys[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}"
    elif first["type"] == "missing":
        what, step = f"The job file lacks {dotted}.", "add it; the README shows a complete job file"
    else:
        what, step = f"{dotted}: {first['msg'].removeprefix('Value error, ')}.", "mend the value"
    if len(errors) > 1:
        step += f" ({len(errors) - 1} more to mend after this)"
    line = _line_of(text, keys)
    return JobFileError(what, where=f"{path}, line {line}" if line else str(path), next_step=step)


def _known_keys(section: Sequence[str]) -> Iterator[str]:
    model: Any = Job
    for name in section:
        field = getattr(model, "model_fields", {}).get(name)
        model = field.annotation if field else None
    yield from getattr(model, "model_fields", {})


def _line_of(text: str, keys: Sequence[str]) -> int | None:
    """Return the line on which a key stands (counted from 1), None where `--set` or a default brought it."""
    section, wanted = "", ".".join(keys[:-1])
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            section = header[1].strip()
            if section == ".".join(keys):
                return number
        elif section == wanted and keys and re.match(rf'\s*"?{re.escape(keys[-1])}"?\s*=', line):
            return number
    return None
