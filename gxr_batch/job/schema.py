"""Every section of the job file as a frozen model: its keys, their defaults and their limits.

Values outside the guide's ranges cause warnings. Nothing here touches the table, the model or the run folder, and no
key ever holds a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from gxr_batch.job.form_section import FormSection
from gxr_batch.job.sampling import PRESETS, Sampling
from gxr_batch.job.section import MOST_TOKENS, FilePath, Section, quoted
from gxr_batch.job.units import parse_bytes, parse_clock, parse_duration

MOST = 2**31 - 1  # the most a result column can hold


def spelled(parse: Callable[[str], object]) -> Callable[[str], str]:
    """Return a validator that keeps the text as written and refuses text that `parse` cannot read."""

    def check(value: str) -> str:
        parse(value)
        return value

    return check


def _web_address(value: str) -> str:
    """Return a server's address without a trailing slash; raise ValueError if it is not one, or holds a secret."""
    if not value:
        return value
    try:
        parts = urlsplit(value)
        sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError('must be an address such as "http://localhost:8000/v1"')
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("must not contain a user, password, query or fragment: pass a token through api.token_env")
    return value.rstrip("/")


class ApiSection(Section):
    """The api engine's own keys: which server, which model, and how long to wait.

    A `base_url` names the server; without one the model is requested from Hugging Face, through `provider`. `token_env`
    names an environment variable, since a token itself would end up in manifests. `timeout` applies to one request,
    `first_wait` and `longest_wait` bound the waits between retries. A row is retried at most `max_retries` times while
    the server answers other requests, and for `give_up_after` while it answers none.
    """

    provider: str = Field(default="auto", min_length=1)
    model: str = ""
    base_url: str = ""
    token_env: str = ""
    concurrency: int = Field(default=8, ge=1, le=1024)
    timeout: str = Field(default="5m", min_length=1)
    max_retries: int = Field(default=5, ge=0, le=1000)
    first_wait: str = Field(default="1s", min_length=1)
    longest_wait: str = Field(default="60s", min_length=1)
    give_up_after: str = Field(default="30m", min_length=1)

    _durations = field_validator("timeout", "first_wait", "longest_wait", "give_up_after")(spelled(parse_duration))
    _address = field_validator("base_url")(_web_address)

    @field_validator("token_env")
    @classmethod
    def _name_of_a_variable(cls, value: str) -> str:
        # Only capitals, so that a token cannot pass as a name and end up in a manifest.
        if value and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,99}", value):
            raise ValueError("must name an environment variable in capitals; a job never holds the token itself")
        return value


DEFAULT_STEPS = 50
# Every linear layer of a Gemma block, attention and MLP.
_ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FinetuneSection(Section):
    """The keys of `gxr-batch finetune`.

    `max_steps` and `epochs` are alternatives for how long to train; the default is 50 steps.
    """

    data: tuple[FilePath, ...] = ()
    held_out: float = Field(default=0.1, ge=0, lt=1, allow_inf_nan=False)
    output: FilePath = Field(default="outputs/{name}-adapter", min_length=1)
    batch_size: int = Field(default=2, ge=1, le=MOST)
    gradient_accumulation_steps: int = Field(default=4, ge=1, le=MOST)
    max_steps: int | None = Field(default=None, ge=1, le=MOST)
    epochs: float | None = Field(default=None, gt=0, le=MOST, allow_inf_nan=False)
    learning_rate: float = Field(default=2e-4, gt=0, le=1, allow_inf_nan=False)
    optimizer: Literal["adamw_8bit", "adamw_torch"] = "adamw_8bit"
    weight_decay: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(default=5, ge=0, le=MOST)
    logging_steps: int = Field(default=5, ge=1, le=MOST)
    eval_steps: int = Field(default=10, ge=1, le=MOST)
    gradient_checkpointing: bool = False
    lora_r: int = Field(default=16, ge=1, le=4096)
    lora_alpha: int = Field(default=32, ge=1, le=MOST)
    lora_dropout: float = Field(default=0, ge=0, lt=1, allow_inf_nan=False)
    lora_targets: tuple[str, ...] = Field(default=_ALL_LINEAR, min_length=1)
    sample_rows: int = Field(default=4, ge=0, le=100)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _one_length(self) -> FinetuneSection:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("max_steps and epochs are alternatives: set only one of them")
        return self

    @field_validator("output")
    @classmethod
    def _known_placeholder(cls, value: str) -> str:
        unknown = set(re.findall(r"\{([^}]*)\}", value)) - {"name"}
        if unknown:
            raise ValueError(f"supports the placeholder {{name}}, not {{{quoted(sorted(unknown)[0])}}}")
        return value

    @property
    def steps(self) -> int | None:
        """Optimizer steps, None if epochs decide."""
        return None if self.epochs is not None else self.max_steps or DEFAULT_STEPS


WorkerKind = Literal["auto", "transformers", "generate", "echo", "api", "vllm"]
_MOST_WORKERS = 4096


class RaySection(Section):
    """The ray engine's own keys.

    Each of `workers` processes runs an engine of kind `worker` with the job's settings, on a GPU if the cluster has
    any, else on `cpus_per_worker` CPUs. Without an `address` Ray is started on this machine for the run. A lost worker
    is replaced up to `max_restarts` times, as is one that has rows and does not respond for `hung_after`; without any
    live worker for `give_up_after` the run ends and can be resumed.
    """

    worker: WorkerKind = "auto"
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=_MOST_WORKERS)] = "auto"
    cpus_per_worker: Literal["auto"] | Annotated[int, Field(ge=1, le=_MOST_WORKERS)] = "auto"
    address: str = ""
    max_restarts: int = Field(default=3, ge=0, le=1000)
    hung_after: str = Field(default="5m", min_length=1)
    give_up_after: str = Field(default="10m", min_length=1)

    _duration = field_validator("hung_after", "give_up_after")(spelled(parse_duration))

    @field_validator("address")
    @classmethod
    def _place_of_a_cluster(cls, value: str) -> str:
        host, colon, port = value.rpartition(":")
        if value not in {"", "auto"} and not (colon and host and port.isdecimal() and "/" not in value):
            raise ValueError(
                'must be "HOST:PORT" of the cluster\'s head, or "auto" on one of its nodes; ray:// is not supported: '
                "start gxr-batch on a node of the cluster"
            )
        return value


_HOTTEST, _COOLEST = 2.0, 0.01


class VllmSection(Section):
    """The vllm engine's own keys.

    `max_restarts` bounds how often an engine that died is restarted in one invocation; `eager` disables vLLM's compiled
    kernels, which loads faster and generates more slowly.
    """

    max_restarts: int = Field(default=3, ge=0, le=1000)
    eager: bool = False


def _why_vllm_refuses(sampling: Sampling) -> str | None:
    """Return why vLLM cannot sample with these settings, None if it can."""
    if sampling.temperature > _HOTTEST:
        return f"sampling.temperature must be at most {_HOTTEST:g} with the vllm engine"
    return None


def _vllm_warnings(sampling: Sampling, *, cuda_graphs: bool) -> list[str]:
    """Return one sentence for each setting that vLLM changes or ignores."""
    found = []
    if 0 < sampling.temperature < _COOLEST:
        found.append(f"sampling.temperature = {sampling.temperature:g} becomes {_COOLEST:g} with vLLM, its minimum")
    if cuda_graphs:
        found.append(
            "engine.cuda_graphs has no effect with the vllm engine: vLLM records graphs unless vllm.eager is true"
        )
    return found


TEMPLATE_NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"
Screening = Literal["off", "flag", "hold"]
# Keys of [model] and [engine] that have an effect if a server generates.
_NEEDED_FOR_A_SERVER = {"kind", "window", "max_seq_length"}


# The value of input.null_values for the usual words.
COMMON = "common"


class InputSection(Section):
    """Where the findings table is and how to read it."""

    path: FilePath = Field(min_length=1)
    id_column: str = ""
    delimiter: str = "auto"
    encoding: str = "auto"
    escape: str = "auto"
    skip_lines: Literal["auto"] | Annotated[int, Field(ge=0, le=MOST)] = "auto"
    column_names: tuple[str, ...] = ()
    sheet: str = ""
    null_values: tuple[str, ...] | Literal["common"] = ()
    only: Literal["", "ok", "approved"] = ""
    columns: dict[str, str] = Field(default_factory=dict)

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, value: str) -> str:
        if value != "auto" and (len(value) != 1 or value in '"\r\n'):
            raise ValueError('must be "auto" or one character other than a quote or a line end')
        return value

    @field_validator("escape")
    @classmethod
    def _no_character_or_one(cls, value: str) -> str:
        if value not in {"auto", ""} and (len(value) != 1 or value in '"\r\n'):
            raise ValueError('must be "auto", "" or one character other than a quote or a line end')
        return value

    @model_validator(mode="after")
    def _two_characters(self) -> InputSection:
        if self.escape == self.delimiter != "auto":
            raise ValueError("delimiter and escape must be different characters")
        return self


PROMPT_VERSION = 2


class PromptSection(Section):
    """Which template makes the prompts, and how its turns are formatted.

    `version` is of the rules by which prompts are made of cells: a run that has begun keeps its own.
    """

    template: FilePath = Field(default="clinical_case", min_length=1)
    template_column: str = ""
    system: str = ""
    format: Literal["chat", "literal"] = "chat"
    too_long: Literal["fail", "truncate"] = "fail"
    templates: dict[Annotated[str, Field(pattern=TEMPLATE_NAME)], FilePath] = Field(default_factory=dict)
    version: int = Field(default=PROMPT_VERSION, ge=1, le=PROMPT_VERSION)


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


MOST_SAMPLES = 1000  # of one row


class SamplingSection(Section):
    """How the next token is drawn. A key that is None takes the preset's value."""

    preset: Literal["default", "deterministic", "creative", "detailed", "concise"] = "default"
    max_new_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=MOST)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | Literal["new"] = 0
    samples_per_row: int = Field(default=1, ge=1, le=MOST_SAMPLES)

    def settings(self) -> Sampling:
        """Return the preset's settings overridden by the keys that are set."""
        own = self.model_dump(exclude={"preset", "seed", "samples_per_row"}, exclude_none=True)
        return PRESETS[self.preset].replace(**own)


class EngineSection(Section):
    """Which engine generates, and how much of the machine it may use."""

    kind: Literal["auto", "generate", "transformers", "echo", "api", "vllm", "ray"] = "auto"
    slots: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST)] = "auto"
    memory_limit: str = ""
    wait_for_memory: str = ""
    reproducible: bool = True
    self_check: bool = True
    kernels: Literal["auto", "library"] = "auto"
    cuda_graphs: bool = False
    threads: int = Field(default=0, ge=0, le=MOST)
    window: int = Field(default=4096, ge=1, le=MOST)

    _memory = field_validator("memory_limit")(spelled(parse_bytes))
    _wait = field_validator("wait_for_memory")(spelled(parse_duration))


class RunSection(Section):
    """Where results go, how often they are saved, and when to stop."""

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
        number = value if value != "off" and not isinstance(value, bool) and abs(value) < 2**63 else None
        if value != "off" and (number is None or number <= 0 or (number >= 1 and number != int(number))):
            raise ValueError('must be a share above 0 and below 1, a whole number of rows, or "off"')
        return value

    @field_validator("output")
    @classmethod
    def _known_placeholders(cls, value: str) -> str:
        unknown = set(re.findall(r"\{([^}]*)\}", value)) - {"name", "date"}
        if unknown:
            raise ValueError(f"supports the placeholders {{name}} and {{date}}, not {{{quoted(sorted(unknown)[0])}}}")
        return value


class PrivacySection(Section):
    """What happens to rows in which identifier screening finds something."""

    identifiers: Literal["auto", "off", "flag", "hold"] = "auto"

    def screening(self, engine_kind: str) -> Screening:
        """Return what a hit does with this engine: API prompts leave the machine, so they are held."""
        if self.identifiers == "auto":
            return "hold" if engine_kind == "api" else "flag"
        return self.identifiers


ExportFormat = Literal["xlsx", "csv", "csv-plain", "jsonl", "parquet", "openai-batch", "chat-jsonl", "report"]


class ExportSection(Section):
    """What is written next to the results when the run finishes."""

    formats: tuple[ExportFormat, ...] = ()


class EchoSection(Section):
    """The echo engine's own keys. `tokens_per_second` is one row's speed (0 = as fast as possible)."""

    tokens_per_second: float = Field(default=0, ge=0, allow_inf_nan=False)


class Job(Section):
    """One job file, with its `--set` overrides applied."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    input: InputSection
    prompt: PromptSection = PromptSection()
    form: FormSection = FormSection()
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
        """The kind of engine that generates: with "ray", its workers' engine."""
        return self.ray.worker if self.engine.kind == "ray" else self.engine.kind

    @property
    def generator_key(self) -> str:
        """The key that names the generator."""
        return "ray.worker" if self.engine.kind == "ray" else "engine.kind"

    @model_validator(mode="after")
    def _a_prompt_fits(self) -> Job:
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
                "--set api.model=NAME (generate: --model NAME), a hub id or the server's name for it"
            )
        if self.api.base_url and self.api.provider != "auto":
            raise ValueError("api.base_url and api.provider cannot be combined: providers belong to Hugging Face")
        if self.model.adapter not in {"", "none"} or self.model.base:
            raise ValueError("model.adapter and model.base need a local engine: a server has its own weights")
        if self.prompt.format == "literal":
            raise ValueError('prompt.format = "literal" needs a local engine: a server formats the turns')
        if self.prompt.too_long == "truncate":
            raise ValueError('prompt.too_long = "truncate" needs a local engine: only the server can count tokens')
        return self

    @model_validator(mode="after")
    def _what_vllm_draws(self) -> Job:
        if self.generator == "vllm" and (why := _why_vllm_refuses(self.sampling.settings())):
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
        """Return one sentence for each setting outside the guide's ranges or with no effect."""
        found = self.sampling.settings().warnings()
        preset = PRESETS[self.sampling.preset]
        changed = preset.differences(PRESETS["default"])
        own = self.sampling.model_dump(exclude_none=True)
        if changed and all(key in own for key in changed):
            found.append(
                f'sampling.preset "{self.sampling.preset}" has no effect: '
                f"{', '.join(sorted(changed))} {'is' if len(changed) == 1 else 'are'} set explicitly"
            )
        if self.generator == "api" and (idle := self._keys_of_this_machine()):
            found.append(
                f'{", ".join(idle)} {"has" if len(idle) == 1 else "have"} no effect with {self.generator_key} = "api": '
                "the server has its own weights (api.model names them), and api.concurrency limits parallel requests"
            )
        if self.generator == "vllm":
            found += _vllm_warnings(self.sampling.settings(), cuda_graphs=self.engine.cuda_graphs)
        return found

    def _keys_of_this_machine(self) -> list[str]:
        """Return the keys that are set and have no effect on a server."""
        defaults = {"model": ModelSection(), "engine": EngineSection()}
        return [
            f"{section}.{key}"
            for section, default in defaults.items()
            for key, value in getattr(self, section)
            if value != getattr(default, key) and key not in _NEEDED_FOR_A_SERVER
        ]
