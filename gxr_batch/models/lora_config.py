"""An adapter's adapter_config.json, as peft writes it: what its settings mean, and which are refused by name.

A setting that changes the numbers and is not supported is refused; none is ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gxr_batch.cells import quoted
from gxr_batch.errors import ModelUnavailable
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
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or not settings:
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
    patterns = [settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    numbers = [settings.get("r", 8), settings.get("lora_alpha", 8), *(n for table in patterns for n in table.values())]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and one > 0 for one in numbers):
        return "A rank or an alpha of the adapter is not a positive number.", again
    return None


def is_for_images(module: str) -> bool:
    """Return whether a module or a parameter belongs to the vision side of a model, in any library's spelling."""
    return _VISION.search(module) is not None


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return value is None or _is_pattern(value) or (isinstance(value, list) and all(map(_is_pattern, value)))


def _is_table(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_pattern, value)))


def _is_tokens(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) and all(map(_is_pattern, value)) else [value or []]
    return all(isinstance(ids, list) and all(type(one) is int and one >= 0 for one in ids) for ids in lists)


def _is_layers(value: Any) -> bool:
    return value is None or all(isinstance(one, int) for one in (value if isinstance(value, list) else [value]))


_SHAPES = {
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"), _is_names),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _is_table),
    "layers_to_transform": _is_layers,
    "trainable_token_indices": _is_tokens,
}
