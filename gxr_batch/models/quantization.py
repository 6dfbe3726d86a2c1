"""Models that are stored in 4 bits, and adapters trained on one: reported or refused by name, never replaced.

Many adapters name a "...-bnb-4bit" base. Such weights stay in 4 bits, whatever number format the run asks for.
"""

from __future__ import annotations

import re
from typing import Any

from gxr_batch.cells import quoted
from gxr_batch.errors import JobFileError
from gxr_batch.job import ModelSection
from gxr_batch.models.lora_config import AdapterConfig
from gxr_batch.models.placement import Placement
from gxr_batch.models.source import Source, Sources

_SUFFIX = re.compile(r"(-unsloth)?-bnb-4bit$")


def stored_in_four_bits(config: Any) -> bool:
    """Return whether a checkpoint's weights are in bitsandbytes' 4 bits, by its configuration."""
    settings = getattr(config, "quantization_config", None)
    settings = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    return bool(settings.get("load_in_4bit") or settings.get("_load_in_4bit"))


def quantised_otherwise(config: Any) -> str:
    """Return the quantised format of a checkpoint that is not bitsandbytes' 4 bits, "" if it has none."""
    settings = getattr(config, "quantization_config", None)
    if not settings or stored_in_four_bits(config):
        return ""
    table = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    return str(getattr(table.get("quant_method"), "value", table.get("quant_method")) or "unknown")


def refuse_format(section: ModelSection, sources: Sources, config: Any) -> None:
    """Raise JobFileError if a job asks for full weights from a checkpoint that has none."""
    if section.load_in_4bit is False and stored_in_four_bits(config):
        raise JobFileError(
            f"The weights of {quoted(sources.base.name)} are stored in 4 bits, and the job asks for full weights.",
            where="model.load_in_4bit = false",
            next_step=f"{_full_weights(section, sources.base)}, or remove model.load_in_4bit",
        )


def notices_of_format(
    section: ModelSection, base: Source, placement: Placement, adapter: AdapterConfig | None
) -> list[str]:
    """Return notices if weights are in another format than the run asks for, or than their adapter was trained on."""
    if placement.stored_in_four_bits and section.load_in_4bit == "auto":
        separate = " and the adapter stays separate" if adapter else ""
        return [
            f"The weights of {quoted(base.name)} are stored in 4 bits and are used as they are; the rest of the run "
            "is in "
            f"{placement.dtype}{separate}. For full weights, {_full_weights(section, base)}."
        ]
    if adapter is None or not adapter.base:
        return []
    trained_on = adapter.base.rstrip("/").rpartition("/")[2]
    if _SUFFIX.search(trained_on) and not placement.four_bit:
        return [
            f"The adapter was trained on 4-bit weights ({quoted(adapter.base)}), and this run applies it to "
            f"{quoted(base.name)} in "
            f"{placement.dtype}. Its texts are close to what it was trained to write; model.load_in_4bit = true is "
            "closer, but slower on a CPU."
        ]
    if _plain(trained_on) != _plain(base.folder.name) and _plain(trained_on) != _plain(base.name.rpartition("/")[2]):
        return [f"The adapter was trained on {quoted(adapter.base)}, and this run applies it to {quoted(base.name)}."]
    return []


def _plain(name: str) -> str:
    return _SUFFIX.sub("", name).lower()


def _full_weights(section: ModelSection, base: Source) -> str:
    """Return which key to set to which model."""
    key = "model.path" if section.path == base.name else "model.base"
    plain = _SUFFIX.sub("", base.name)
    return f'set {key} = "{plain}"' if plain != base.name else f"set {key} to a model with full weights"
