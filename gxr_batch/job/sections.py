"""Every section of the job file as a frozen model: its keys, their defaults and their limits.

Values outside the guide's ranges are warnings. Nothing here touches the table, the model or the run folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gxr_batch.job.api import ApiSection
from gxr_batch.job.base import MOST, MOST_TOKENS, FilePath, Section, spelled
from gxr_batch.job.finetuning import FinetuneSection
from gxr_batch.job.ray import RaySection
from gxr_batch.job.vllm import VllmSection, refusal, untaken
from gxr_batch.settings import PRESETS, Sampling, parse_bytes, parse_clock, parse_duration

TEMPLATE_NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"
Screening = Literal["off", "flag", "hold"]
# Keys of [model] and [engine] that do something where a server generates.
_NEEDED_FOR_A_SERVER = {"kind", "window", "max_seq_length"}


class InputSection(Section):
    """Where the findings table is and how to read it."""

    path: FilePath = Field(min_length=1)
    id_column: str = ""
    delimiter: str = "auto"
    encoding: str = "auto"
    null_values: tuple[str, ...] = ()
    columns: dict[str, str] = Field(default_factory=dict)

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, value: str) -> str:
        if value != "auto" and (len(value) != 1 or value in '"\r\n'):
            raise ValueError('must be "auto" or one character that is neither a quote nor a line end')
        return value


class PromptSection(Section):
    """Which template makes the prompts, and how the turns are laid out."""

    template: FilePath = Field(default="clinical_case", min_length=1)
    template_column: str = ""
    system: str = ""
    format: Literal["chat", "literal"] = "chat"
    too_long: Literal["fail", "truncate"] = "fail"
    templates: dict[Annotated[str, Field(pattern=TEMPLATE_NAME)], FilePath] = Field(default_factory=dict)


class ModelSection(Section):
    """Which weights, with which adapter, in which number format, on which device."""

    path: FilePath = Field(default="demo", min_length=1)
    base: FilePath = ""
    revision: str = ""
    adapter: FilePath = ""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    load_in_4bit: Literal["auto"] | bool = "auto"
    device_map: str = "auto"
    max_seq_length: int = Field(default=2048, ge=16, le=MOST_TOKENS)


class SamplingSection(Section):
    """How the next token is drawn. A key that is None here takes the preset's value."""

    preset: Literal["default", "deterministic", "creative", "detailed", "concise"] = "default"
    max_new_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=MOST)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | Literal["new"] = 0
    samples_per_row: int = Field(default=1, ge=1, le=1000)

    def settings(self) -> Sampling:
        """Return the preset's settings with the keys set here laid over them."""
        own = self.model_dump(exclude={"preset", "seed", "samples_per_row"}, exclude_none=True)
        return PRESETS[self.preset].replace(**own)


class EngineSection(Section):
    """What generates, and how much of the machine it may use."""

    kind: Literal["auto", "generate", "transformers", "echo", "api", "vllm", "ray"] = "auto"
    slots: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST)] = "auto"
    memory_limit: str = ""
    wait_for_memory: str = ""
    reproducible: bool = True
    self_check: bool = True
    cuda_graphs: bool = False
    threads: int = Field(default=0, ge=0, le=MOST)
    window: int = Field(default=4096, ge=1, le=MOST)

    _memory = field_validator("memory_limit")(spelled(parse_bytes))
    _wait = field_validator("wait_for_memory")(spelled(parse_duration))


class RunSection(Section):
    """Where results go, how often they are made safe, and when to stop."""

    output: FilePath = Field(default="outputs/{name}", min_length=1)
    checkpoint_seconds: float = Field(default=30, gt=0, allow_inf_nan=False)
    grace_seconds: float = Field(default=20, ge=0, allow_inf_nan=False)
    stop_by: str = ""
    time_limit: str = ""
    max_failed: Literal["off"] | int | float = 0.5
    max_attempts: int = Field(default=3, ge=1, le=1000)

    _clock = field_validator("stop_by")(spelled(parse_clock))
    _limit = field_validator("time_limit")(spelled(parse_duration))

    @field_validator("max_failed")
    @classmethod
    def _share_or_count(cls, value: Literal["off"] | int | float) -> Literal["off"] | int | float:
        number = value if value != "off" and not isinstance(value, bool) and isfinite(value) else None
        if value != "off" and (number is None or number <= 0 or (number >= 1 and number != int(number))):
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
    """What is done about rows in which identifier screening hits."""

    identifiers: Literal["auto", "off", "flag", "hold"] = "auto"

    def screening(self, engine_kind: str) -> Screening:
        """Return what a hit does with this engine: a prompt for an API leaves the machine, so there it is held."""
        if self.identifiers == "auto":
            return "hold" if engine_kind == "api" else "flag"
        return self.identifiers


ExportFormat = Literal["xlsx", "csv", "csv-plain", "jsonl", "parquet", "openai-batch", "chat-jsonl", "report"]


class ExportSection(Section):
    """What is written beside the results when the run finishes."""

    formats: tuple[ExportFormat, ...] = ()


class EchoSection(Section):
    """The echo engine's own keys: its speed and the faults that it plays.

    `tokens_per_second` is one row's speed (0 = as fast as it can); `fail_every` makes every Nth prompt fail;
    `fail_containing` fails prompts that hold this text; `crash_after` ends the engine after so many completions;
    `kill_containing` kills the process over such a prompt, as a fault in a kernel or the system's OOM killer would, and
    `hang_containing` hangs for good over it, as a driver that never comes back would.
    """

    tokens_per_second: float = Field(default=0, ge=0, allow_inf_nan=False)
    fail_every: int = Field(default=0, ge=0, le=MOST)
    fail_containing: str = ""
    crash_after: int = Field(default=0, ge=0, le=MOST)
    kill_containing: str = ""
    hang_containing: str = ""


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
    api: ApiSection = ApiSection()
    vllm: VllmSection = VllmSection()
    ray: RaySection = RaySection()
    finetune: FinetuneSection = FinetuneSection()

    @property
    def generator(self) -> str:
        """The kind of engine that generates: with "ray" the one that its workers hold."""
        return self.ray.worker if self.engine.kind == "ray" else self.engine.kind

    @property
    def generator_key(self) -> str:
        """The key that names it."""
        return "ray.worker" if self.engine.kind == "ray" else "engine.kind"

    @model_validator(mode="after")
    def _room_for_a_prompt(self) -> Job:
        if self.sampling.settings().max_new_tokens >= self.model.max_seq_length:
            raise ValueError("sampling.max_new_tokens must be smaller than model.max_seq_length: no prompt would fit")
        return self

    @model_validator(mode="after")
    def _what_a_server_needs(self) -> Job:
        if self.generator != "api":
            return self
        if not self.api.model.strip():
            raise ValueError(
                f'api.model must name the model to ask for, since {self.generator_key} = "api": add '
                "--set api.model=NAME (generate: --model NAME), a hub id or the server's own name for it"
            )
        if self.api.base_url and self.api.provider != "auto":
            raise ValueError("api.base_url and api.provider exclude each other: providers are Hugging Face's")
        if self.model.adapter not in {"", "none"} or self.model.base:
            raise ValueError(
                "model.adapter and model.base need an engine of this machine: a server has its own weights"
            )
        if self.prompt.format == "literal":
            raise ValueError('prompt.format = "literal" needs an engine of this machine: a server lays out the turns')
        if self.prompt.too_long == "truncate":
            raise ValueError('prompt.too_long = "truncate" needs an engine of this machine: a server alone counts')
        return self

    @model_validator(mode="after")
    def _what_vllm_draws(self) -> Job:
        if self.generator == "vllm" and (why := refusal(self.sampling.settings())):
            raise ValueError(why)
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
                f"{', '.join(sorted(changed))} {'is' if len(changed) == 1 else 'are'} set beside it"
            )
        if self.generator == "api" and (idle := self._keys_of_this_machine()):
            found.append(
                f'{", ".join(idle)} {"has" if len(idle) == 1 else "have"} no effect with {self.generator_key} = "api": '
                "the server has its own weights (api.model names them), and api.concurrency says how many are asked for"
            )
        if self.generator == "vllm":
            found += untaken(self.sampling.settings(), cuda_graphs=self.engine.cuda_graphs)
        return found

    def _keys_of_this_machine(self) -> list[str]:
        """Return the keys that are set and mean nothing to a server."""
        defaults = {"model": ModelSection(), "engine": EngineSection()}
        return [
            f"{section}.{key}"
            for section, default in defaults.items()
            for key, value in getattr(self, section)
            if value != getattr(default, key) and key not in _NEEDED_FOR_A_SERVER
        ]
