"""From a model's folder to loaded objects: tokenizer, weights in their number format, on their device.

What a setting cannot mean for this model is refused before the weights are read. Where the model comes from is left to
`source`, on which device and in which number format it goes to `placement`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from gxr_batch.errors import JobFileError, ModelUnavailable
from gxr_batch.job import ModelSection
from gxr_batch.models.device import out_of_memory
from gxr_batch.models.placement import SPREAD, Placement, place
from gxr_batch.models.quiet import quiet_transformers
from gxr_batch.models.room import Room
from gxr_batch.models.source import Source, find
from gxr_batch.models.weights import weights_sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a damaged or foreign folder makes of transformers and safetensors (whose error is a subclass of none of ours).
_CANNOT_LOAD = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
_END_OF_TURN = "<end_of_turn>"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which weights a job means: model as the job names it, commit of a hub model or "", sha256 of the weights."""

    model: str
    revision: str
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to generate. `config` is its text configuration, `end_ids` the ids that end an answer."""

    model: PreTrainedModel
    config: Any
    placement: Placement
    end_ids: tuple[int, ...]
    load_seconds: float

    @property
    def device(self) -> str:
        """The device, or the devices that a spread model lies on."""
        spread = getattr(self.model, "hf_device_map", {}).values() if self.placement.device == SPREAD else ()
        places = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in spread}
        return ", ".join(sorted(places)) or str(self.model.device)

    @property
    def quantization(self) -> str | None:
        """The name of the quantisation, None for full weights."""
        return "nf4" if self.placement.four_bit else None


def identity(section: ModelSection) -> Origin:
    """Return which weights would be loaded. Raises ModelUnavailable, JobFileError."""
    source = find(section, weights=True)
    return Origin(model=section.path, revision=source.revision, weights_sha256=weights_sha256(source.weight_files()))


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer; the weights are neither needed nor fetched. Raises ModelUnavailable, JobFileError."""
    source = find(section, weights=False)
    _config_of(source, section)
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelUnavailable(
                f"The model's tokenizer cannot be loaded ({type(error).__name__}).",
                where=str(source.folder),
                next_step="the folder needs tokenizer.json and tokenizer_config.json, as save_pretrained writes them",
            ) from None
    return tokenizer


def load_model(section: ModelSection, tokenizer: PreTrainedTokenizerBase, room: Room) -> LoadedModel:
    """Load the weights onto their device, within this run's share of it.

    Raises ModelUnavailable where the machine cannot, JobFileError.
    """
    began = time.monotonic()
    source = find(section, weights=True)
    files = source.weight_files()
    config = _config_of(source, section)
    placement = place(section, config.get_text_config(), sum(file.stat().st_size for file in files), room)
    model = _read_weights(source, config, placement, room)
    ends = end_ids(model, tokenizer)
    # The model's own sampling defaults would fill every setting that a caller leaves out.
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return LoadedModel(
        model=model,
        config=config.get_text_config(),
        placement=placement,
        end_ids=ends,
        load_seconds=time.monotonic() - began,
    )


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends an answer, sorted.

    They are gathered from wherever a model may name them: a base model or an adapter's folder often lacks some, and
    without Gemma's <end_of_turn> an answer runs on into the next turn.
    """
    found: set[int] = set()
    named = [getattr(model.generation_config, "eos_token_id", None), model.config.get_text_config().eos_token_id]
    for ids in [*named, tokenizer.eos_token_id]:
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    by_name = tokenizer.get_vocab().get(_END_OF_TURN)
    if by_name is not None:
        found.add(by_name)
    return tuple(sorted(found))


def load_config(section: ModelSection) -> Any:
    """Read the model's configuration, without its weights, and refuse settings that it cannot be used with.

    Raises ModelUnavailable, JobFileError.
    """
    return _config_of(find(section, weights=False), section)


def _config_of(source: Source, section: ModelSection) -> Any:
    from transformers import AutoConfig

    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelUnavailable(
                f"The model's config.json is missing, damaged or of a kind that this transformers does not know "
                f"without code of the model's own, which is never run ({type(error).__name__}).",
                where=str(source.folder),
                next_step="choose another model, or a newer transformers",
            ) from None
    if section.dtype == "float16" and str(config.model_type).startswith("gemma3"):
        raise JobFileError(
            "Gemma 3 overflows in float16 and then returns empty text.",
            where="model.dtype",
            next_step='use "auto", "bfloat16" or "float32"',
        )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and section.max_seq_length > longest:
        raise JobFileError(
            f"The model takes at most {longest} tokens.",
            where=f"model.max_seq_length = {section.max_seq_length}",
            next_step=f"use {longest} or less",
        )
    return config


def _read_weights(source: Source, config: Any, placement: Placement, room: Room) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    dtype: torch.dtype = getattr(torch, placement.dtype)
    loader: Any = AutoModelForCausalLM  # its types do not know output_loading_info
    try:
        # This class also loads the text side of multimodal Gemma 3 checkpoints.
        with quiet_transformers():
            model, report = loader.from_pretrained(
                source.folder,
                config=config,
                dtype=dtype,
                device_map=SPREAD if placement.device == SPREAD else {"": placement.device},
                max_memory=room.by_device() if placement.device == SPREAD else None,
                quantization_config=_four_bit(dtype) if placement.four_bit else None,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:
        if out_of_memory(error):
            device = room.freest(room.named("auto" if placement.device == SPREAD else placement.device))
            raise room.too_little(device, placement.bytes_needed) from None
        if not isinstance(error, _CANNOT_LOAD):
            raise
        raise ModelUnavailable(
            f"The model's weights cannot be loaded ({type(error).__name__}).",
            where=str(source.folder),
            next_step="check that the folder is complete and that its config.json belongs to its weights",
        ) from None
    # transformers would fill what a checkpoint lacks with random numbers and say so in its log only.
    if missing := report["missing_keys"]:
        raise ModelUnavailable(
            f"The weights lack {len(missing)} of the model's tensors, e.g. {min(missing)}.",
            where=str(source.folder),
            next_step="check that config.json belongs to these weights",
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _four_bit(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, **settings)  # type: ignore[no-untyped-call]
