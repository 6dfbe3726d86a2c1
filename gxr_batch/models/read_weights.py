"""Reads exactly a model's weights onto their device, and applies its adapter.

transformers alone would fill missing tensors with random numbers and skip unknown ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from gxr_batch.errors import ModelUnavailable
from gxr_batch.models.apply_lora import Applied, apply_adapter
from gxr_batch.models.device_memory import MemoryBudget, out_of_memory, release_cached
from gxr_batch.models.foreign import loading, not_importable
from gxr_batch.models.library_output import quiet_transformers
from gxr_batch.models.lora import Adapter
from gxr_batch.models.permissions import refuse_unreadable
from gxr_batch.models.placement import SPREAD, Placement
from gxr_batch.models.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.(\d+)\.")
_MANY_LAYERS = 256
# A configuration of so many times the size of its files does not belong to them, unless they are quantised.
_SUSPICIOUS = 2
# The bytes of a stored number that loading in 16 bits saves.
_BEYOND_16_BITS = {"F32": 2, "F64": 6}
_BELONGS = "check that the folder is complete and that its config.json belongs to its weights"
# What torch, accelerate and safetensors raise while an adapter is applied (the last one's error has no common base).
_CANNOT_LOAD = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
VISION = ("vision_tower", "multi_modal_projector")
# transformers would load an adapter in a model's folder by itself, unchecked; it finds none in such a subfolder.
_NO_ADAPTER = {"subfolder": "adapters-are-loaded-by-gxr-batch"}


def read_model(
    source: Source, config: Any, placement: Placement, memory: MemoryBudget, adapter: Adapter | None
) -> tuple[PreTrainedModel, Applied | None]:
    """Return the model in eval mode, and how its adapter was applied. Raises ModelUnavailable."""
    files = source.weight_files()
    check_whole(files)
    if _least_bytes(config.get_text_config()) > _SUSPICIOUS * sum(file.stat().st_size for file in files):
        refuse_misfit(source, config)  # before memory is asked for
    # An adapter is merged before a model is spread: weights offloaded by accelerate cannot be written to.
    later = adapter is not None and placement.device == SPREAD and not placement.four_bit
    try:
        with loading("The model's weights cannot be loaded", source.folder, next_step=_BELONGS):
            model, report = _load(source, config, placement, memory, device="cpu" if later else placement.device)
        _refuse_gaps(source, report)
        applied = None if adapter is None else apply_adapter(model, adapter)
        _drop_vision(model)
        if later:
            model = _spread(model, memory, placement)
    except Exception as error:
        if out_of_memory(error):
            device = memory.freest(memory.named("auto" if placement.device == SPREAD else placement.device))
            raise memory.too_little(device, placement.bytes_needed) from None
        if isinstance(error, ImportError):
            raise not_importable(error, source.folder) from None
        if not isinstance(error, _CANNOT_LOAD):
            raise
        raise ModelUnavailable(
            f"The model's weights cannot be loaded ({type(error).__name__}).",
            where=str(source.folder),
            next_step=_BELONGS,
        ) from None
    return model.eval(), applied


def _drop_vision(model: Any) -> None:
    """Give back the memory of a multimodal checkpoint's vision part (0.8 GiB in Gemma 3 4B): only texts are read."""
    inner = getattr(model, "model", model)
    parts = [name for name in VISION if getattr(inner, name, None) is not None]
    for name in parts:
        setattr(inner, name, None)
    if parts:
        release_cached()


def check_whole(files: Iterable[Path]) -> None:
    """Raise ModelUnavailable if a safetensors file is unreadable, damaged or truncated; the header has its length."""
    for file in files:
        refuse_unreadable([file])
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            raise ModelUnavailable(
                "The model's weights cannot be loaded: a file is damaged or truncated.",
                where=str(file),
                next_step="copy it again; a file in the hub's cache can be deleted and is downloaded again",
            ) from None


def refuse_misfit(source: Source, config: Any) -> None:
    """Raise ModelUnavailable if the weights' names and shapes contradict the configuration.

    Only headers are read. Weights under other names than the model's, which the library knows how to convert, and
    quantised ones are left to loading.
    """
    if getattr(config, "quantization_config", None):
        return
    stored = {name: one.shape for name, one in _headers(source.weight_files()).items()}
    layers = 1 + max((int(found[3]) for name in stored if (found := _LAYER.search(name))), default=0)
    claimed = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(claimed, int) and claimed > max(_MANY_LAYERS, 2 * layers):  # making so many takes a minute
        raise ModelUnavailable(
            f"The weights have {layers} layers, and config.json says {claimed}.",
            where=f"{source.folder / 'config.json'}: num_hidden_layers",
            next_step=_BELONGS,
        )
    model = without_weights(source, config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    common = wanted.keys() & stored.keys()
    for name in sorted(common):
        if wanted[name] != stored[name]:
            shapes = [" x ".join(map(str, shape)) or "one number" for shape in (stored[name], wanted[name])]
            raise ModelUnavailable(
                f"The weights do not fit config.json: {name} is {shapes[0]}, not {shapes[1]}.",
                where=str(source.folder / "config.json"),
                next_step=_BELONGS,
            )
    if 2 * len(common) < len(wanted) and not stored.keys() <= wanted.keys():
        return
    left_out = model._keys_to_ignore_on_load_missing or ()
    missing = [name for name in wanted.keys() - common if not any(re.search(one, name) for one in left_out)]
    known = model.state_dict().keys()
    other = [name for name in stored if name not in known and _LAYER.search(name) and "rotary" not in name]
    _refuse_gaps(source, {"missing_keys": missing, "unexpected_keys": other if len(common) == len(wanted) else []})


def without_weights(source: Source, config: Any) -> Any:
    """Return the model of a configuration on torch's device "meta", for its names and shapes. Raises ModelUnavailable.

    As in loading, the configuration does not decide the number format.
    """
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM
    where = source.folder / "config.json"
    with quiet_transformers(), loading("No model can be made of config.json", where), torch.device("meta"):
        return made.from_config(config, dtype=torch.float32)


def _least_bytes(config: Any) -> int:
    """Return what a model has at least in 16 bits: some families have more matrices, and none fewer."""
    names = ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size")
    sizes = [size if isinstance(size := getattr(config, name, 0), int) else 0 for name in names]
    hidden, vocabulary, layers, inner = sizes
    return 2 * hidden * (vocabulary + layers * (hidden + inner))


def bytes_in_16_bits(source: Source, config: Any) -> int:
    """Return the size of stored weights in 16 bits; quantised ones count as they are. Raises ModelUnavailable."""
    files = source.weight_files()
    check_whole(files)
    size = sum(file.stat().st_size for file in files)
    if getattr(config, "quantization_config", None):
        return size
    return size - sum(math.prod(one.shape) * _BEYOND_16_BITS.get(one.dtype, 0) for one in _headers(files).values())


class _Stored(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


def _headers(files: Iterable[Path]) -> dict[str, _Stored]:
    """Return shape and number format of every stored tensor by its name."""
    found: dict[str, _Stored] = {}
    for file in files:
        with loading("The model's weights cannot be loaded: a file is damaged", file), safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found |= {name: _Stored(tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    return found


def _load(source: Source, config: Any, placement: Placement, memory: MemoryBudget, *, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    dtype: torch.dtype = getattr(torch, placement.dtype)
    loader: Any = AutoModelForCausalLM  # its type hints lack output_loading_info
    # This class also loads the text side of multimodal Gemma 3 checkpoints.
    with quiet_transformers():
        return loader.from_pretrained(  # type: ignore[no-any-return]
            source.folder,
            config=config,
            dtype=dtype,
            device_map=SPREAD if device == SPREAD else {"": device},
            max_memory=memory.by_device(placement.weights_share) if device == SPREAD else None,
            # A checkpoint stored in 4 bits has its own settings.
            quantization_config=_four_bit(dtype) if placement.four_bit and not placement.stored_in_four_bits else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            adapter_kwargs=dict(_NO_ADAPTER),
        )


def _refuse_gaps(source: Source, report: Any) -> None:
    """Raise ModelUnavailable if the weights lack tensors of the model, or contain others."""
    for key, sentence in (
        ("missing_keys", "The weights lack {} of the model's tensors, e.g. {}."),
        ("unexpected_keys", "The weights contain {} tensors that the model does not have, e.g. {}."),
    ):
        if names := report[key]:
            raise ModelUnavailable(
                sentence.format(len(names), min(names)),
                where=str(source.folder),
                next_step="check that config.json belongs to these weights",
            )


def _spread(model: Any, memory: MemoryBudget, placement: Placement) -> Any:
    """Divide a model in the main memory among the devices, as from_pretrained would have done."""
    from accelerate import dispatch_model, infer_auto_device_map

    places = infer_auto_device_map(
        model,
        max_memory=memory.by_device(placement.weights_share),
        no_split_module_classes=list(model._no_split_modules or []),
    )
    return dispatch_model(model, places)


def _four_bit(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, **settings)  # type: ignore[no-untyped-call]
