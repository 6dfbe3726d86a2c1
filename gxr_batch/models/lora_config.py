"""An adapter's adapter_config.json, as peft writes it: what its settings mean, and which are refused by name.

A setting that changes the numbers and is not supported is refused; none is ignored.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gxr_batch.cells import quoted
from gxr_batch.errors import ModelUnavailable
from gxr_batch.models.foreign import read_object
from gxr_batch.models.permissions import refuse_unreadable

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Settings that are supported, and those that matter only during training.
_FOLLOWED = frozenset(
    {"peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
    | {"use_rslora", "use_dora", "trainable_token_indices", "ensure_weight_tying"}
)
_TRAINING_ONLY = frozenset(
    {"auto_mapping", "task_type", "peft_version", "inference_mode", "lora_dropout", "fan_in_fan_out"}
    | {"init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"}
    | {"megatron_core", "qalora_group_size"}
)
# The vision side of Gemma 3 and of models that are laid out alike: tower, encoder, projector.
_VISION = re.compile(
    r"(^|\.)(vision_tower|vision_model|vision_encoder|vision_embedding|embed_vision|image_encoder|image_newline|visual"
    r"|multi_modal_projector|multimodal_projector|mm_projector|vision_proj\w*|mm_input_projection\w*|mm_soft_emb_norm"
    r"|audio_tower|embed_audio)(\.|$)"
)
# Values that mean that a setting is not used.
_UNUSED: tuple[Any, ...] = (None, False, "none", "", [], {})
# Initialisations that leave the base model's weights unchanged; others change them and do not save the change, so that
# the adapter alone does not reproduce the trained model.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Far beyond any adapter: a pattern of peft's has some hundred characters, a list of all modules some thousand names.
_MOST_RANK, _MOST_FACTOR, _MOST_TOKENS = 2**16, 1e30, 2**24
_LONGEST_PATTERN, _LONGEST_NAME, _MOST_NAMES = 20_000, 4096, 50_000
_PLAIN_NAME = re.compile(r"[\w.]+")
_REPEATED_GROUP, _REPEATS, _FEW_REPEATS = re.compile(r"\)[*+{]"), re.compile(r"[*+{]"), 8
_MODULES_TRIED, _TRIAL_SECONDS = 1000, 2
_TRIAL = """
import json, re, signal, sys
patterns, modules, seconds = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_PROF, seconds)  # of CPU time; ends the process
for pattern in patterns:
    for module in modules:
        for whole in (pattern, rf"(.*\\.)?({pattern})$"):
            try:
                re.fullmatch(whole, module)
            except re.error:
                pass
"""
MERGE_FIRST = "merge it into its model with the program that trained it, and set model.path to the result"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The settings of one LoRA adapter, checked. Module names are those of the class that it was trained on."""

    path: Path
    settings: Mapping[str, Any]

    @property
    def base(self) -> str:
        """The base model that the adapter names, "" if it names none."""
        return str(self.settings.get("base_model_name_or_path") or "")

    @property
    def base_revision(self) -> str:
        """The revision of the base model, "" for the newest."""
        return str(self.settings.get("revision") or "")

    @property
    def uses_dora(self) -> bool:
        """Whether weights are split into magnitude and direction."""
        return bool(self.settings.get("use_dora"))

    @property
    def highest_rank(self) -> int:
        """The highest rank in the settings, for all modules or for some."""
        return max(int(self.settings.get("r", 8)), *map(int, (self.settings.get("rank_pattern") or {}).values()), 1)

    @property
    def ties_weights(self) -> bool:
        """Whether peft trained the output layer together with an embedding that shares its weight."""
        return bool(self.settings.get("ensure_weight_tying"))

    def tokens(self, module: str) -> list[int] | None:
        """Return the token ids whose rows of this module's weight were trained, None if there are none."""
        named: Any = self.settings.get("trainable_token_indices") or {}
        by_name = named if isinstance(named, dict) else {"embed_tokens": named}
        return next((ids for name, ids in by_name.items() if self._named([name], module)), None)

    def saves(self, module: str) -> bool:
        """Return whether training replaced this module's whole weight."""
        return any(module.endswith(name) for name in self.settings.get("modules_to_save") or ())

    def rank(self, module: str) -> int:
        """Return the rank of a module's matrices."""
        return int(self._by_pattern("rank_pattern", module, self.settings.get("r", 8)))

    def scale(self, module: str) -> float:
        """Return the factor on a module's product of matrices."""
        alpha = float(self._by_pattern("alpha_pattern", module, self.settings.get("lora_alpha", 8)))
        rank = self.rank(module)
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def targets(self, module: str) -> bool:
        """Return whether training put matrices on a module of this name, by peft's rules.

        The rules are implemented here because importing peft takes seconds and merging needs nothing else from it.
        """
        wanted = self.settings.get("target_modules") or ()
        saved = self.settings.get("modules_to_save") or ()
        if self._named(self.settings.get("exclude_modules") or (), module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
            return False
        layers = self.settings.get("layers_to_transform")
        if isinstance(wanted, str) or layers in (None, []) or module in wanted:  # a full name counts in any layer
            return self._named(wanted, module)
        patterns = self.settings.get("layers_pattern") or [r"[^.]*"]
        kinds = [patterns] if isinstance(patterns, str) else patterns
        layer = next((found for kind in kinds if (found := re.match(rf"(?:^|.*?\.){kind}\.(\d+)\.", module))), None)
        chosen = layers if isinstance(layers, list) else [layers]
        return self._named(wanted, module) and layer is not None and int(layer[1]) in chosen

    @staticmethod
    def _named(names: Any, module: str) -> bool:
        """Return whether a regular expression matches a module's name, or a list contains the name's end."""
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _by_pattern(self, key: str, module: str, otherwise: Any) -> Any:
        """Return the value of the first pattern that matches the end of a module's name, as peft does."""
        patterns = self.settings.get(key) or {}
        return next((value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", module)), otherwise)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check a folder's adapter_config.json. Raises ModelUnavailable."""
    path = folder / CONFIG
    refuse_unreadable([path])
    try:
        settings = read_object(path)
    except ModelUnavailable:
        settings = {}
    if not settings:
        raise ModelUnavailable(
            "The adapter's settings cannot be read: the file is damaged.",
            where=str(path),
            next_step="copy the adapter's folder again",
        )
    if refusal := _refusal(settings):
        what, step = refusal
        raise ModelUnavailable(what, where=str(path), next_step=step)
    return AdapterConfig(path=path, settings=settings)


def _refusal(settings: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return which unsupported setting an adapter uses, and the next step."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        return f"The adapter is of the kind {quoted(repr(kind))}, and only LORA is supported.", MERGE_FIRST
    for key, value in settings.items():
        if key == "target_parameters" and isinstance(value, list) and value and all(map(is_for_images, value)):
            continue
        if key not in _FOLLOWED | _TRAINING_ONLY and not any(value is one or value == one for one in _UNUSED):
            return f"The adapter uses {quoted(key)}, which is not supported.", MERGE_FIRST
    start = settings.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        return (
            f"The adapter was initialised with init_lora_weights = {quoted(repr(start))}, which also changes the "
            "base model.",
            "save it with peft's path_initial_model_for_weight_conversion, or merge it into its model first",
        )
    again = "copy the adapter's folder again"
    if damaged := next((key for key, holds in _SHAPES.items() if not holds(settings.get(key))), None):
        return f"The adapter's {damaged} is not in peft's format.", again
    wrong = _wrong_number(settings)
    return (f"The adapter's {wrong} is not a positive number, or a rank is not a whole one.", again) if wrong else None


def _wrong_number(settings: Mapping[str, Any]) -> str:
    """Return the key with a rank or an alpha that none can be, "" if there is none."""
    for key, pattern, holds in (("r", "rank_pattern", _is_rank), ("lora_alpha", "alpha_pattern", _is_factor)):
        if not holds(settings.get(key, 8)):
            return key
        if not all(map(holds, (settings.get(pattern) or {}).values())):
            return pattern
    return ""


def refuse_endless(config: AdapterConfig, modules: Sequence[str]) -> None:
    """Refuse patterns that take hours to compare with the names of modules: they are tried in a child process.

    Only patterns that could are tried. Raises ModelUnavailable.
    """
    keys = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
    for key in keys:
        value = config.settings.get(key) or ()
        patterns = [value] if isinstance(value, str) else list(value)
        doubtful = [one for one in patterns if _REPEATED_GROUP.search(one) or len(_REPEATS.findall(one)) > _FEW_REPEATS]
        if not doubtful:
            continue
        asked = json.dumps([doubtful, list(modules)[:_MODULES_TRIED], _TRIAL_SECONDS])
        done = subprocess.run([sys.executable, "-P", "-c", _TRIAL], input=asked, text=True, check=False)
        if done.returncode:
            raise ModelUnavailable(
                f"The adapter's {key} takes too long to compare with the names of modules.",
                where=str(config.path),
                next_step="name the modules in a list, or simplify the pattern",
            )


def is_for_images(module: str) -> bool:
    """Return whether a module or a parameter belongs to the vision side of a model, in any library's spelling."""
    return _VISION.search(module) is not None


def _is_rank(value: Any) -> bool:
    return type(value) in (int, float) and 1 <= value <= _MOST_RANK and value == int(value)


def _is_factor(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= _MOST_FACTOR


def _is_pattern(value: Any) -> bool:
    """Return whether a text is a regular expression, also as a part of the others that it is put into."""
    if not isinstance(value, str) or len(value) > _LONGEST_PATTERN:
        return False
    if _PLAIN_NAME.fullmatch(value):
        return True
    try:
        re.compile(value)
        re.compile(f"x({value})x")
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_whole_pattern(value: Any) -> bool:
    """Return whether a text is a regular expression that is used alone, and may begin with flags."""
    try:
        return isinstance(value, str) and len(value) <= _LONGEST_PATTERN and re.compile(value) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _is_targets(value: Any) -> bool:
    return _is_whole_pattern(value) or _is_names(value)


def _is_names(value: Any) -> bool:
    listed = isinstance(value, list) and len(value) <= _MOST_NAMES and all(map(_is_pattern, value))
    return value is None or listed or _is_pattern(value)


def _is_table(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and len(value) <= _MOST_NAMES and all(map(_is_pattern, value)))


def _is_tokens(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) and all(map(_is_pattern, value)) else [value or []]
    return all(
        isinstance(ids, list) and all(type(one) is int and 0 <= one <= _MOST_TOKENS for one in ids) for ids in lists
    )


def _is_layers(value: Any) -> bool:
    return value is None or all(isinstance(one, int) for one in (value if isinstance(value, list) else [value]))


def _is_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= _LONGEST_NAME)


_SHAPES = {
    **dict.fromkeys(("target_modules", "exclude_modules"), _is_targets),
    **dict.fromkeys(("modules_to_save", "layers_pattern"), _is_names),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _is_table),
    **dict.fromkeys(("base_model_name_or_path", "revision"), _is_name),
    "layers_to_transform": _is_layers,
    "trainable_token_indices": _is_tokens,
}
