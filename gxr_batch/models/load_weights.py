"""From the names in a job file to loaded objects: tokenizer, and weights in their number format on their device.

Settings that are impossible for a model are refused before its weights are read. `source` decides where the model comes
from, `placement` its device and number format, and `read_weights` reads it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gxr_batch.errors import JobFileError
from gxr_batch.job import ModelSection
from gxr_batch.models.config_numbers import CONFIG, refuse_odd_config, refuse_odd_file
from gxr_batch.models.demo import DEMO
from gxr_batch.models.device_memory import MemoryBudget
from gxr_batch.models.foreign import bad_value, file_sha256, loading, read_object, read_text, refuse_damaged
from gxr_batch.models.library_output import quiet_transformers
from gxr_batch.models.lora_config import read_adapter_config
from gxr_batch.models.lora_vocabulary import has_tokenizer, refuse_unknown_tokens
from gxr_batch.models.placement import SPREAD, Placement, WhyNoKernels, no_kernels, place
from gxr_batch.models.quantization import notices_of_format, refuse_format, stored_in_four_bits
from gxr_batch.models.source import Source, Sources, default_adapter, find
from gxr_batch.models.tokenizer_trial import refuse_crashing
from gxr_batch.models.weights_hash import weights_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Gemma's own end tokens: ids 1 and 106.
_ENDS = ("<eos>", "<end_of_turn>")
GENERATION = "generation_config.json"
# The small ones that transformers reads.
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
_TEMPLATE = "chat_template.jinja"
_MOST_IDS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The identity of a job's weights: names as in the job, commits of hub models or "", sha256 of the bytes.

    `files_sha256` is that of the tokenizer, its chat template and the configuration. `pins` maps job keys that leave
    something open to what they mean now.
    """

    model: str
    revision: str
    weights_sha256: str
    files_sha256: str
    adapter: str | None = None
    adapter_sha256: str | None = None
    pins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to generate. `config` is its text configuration, `end_ids` are the ids that end an answer.

    `adapter` describes how its adapter was applied, None if there is none.
    """

    model: PreTrainedModel
    config: Any
    placement: Placement
    end_ids: tuple[int, ...]
    load_seconds: float
    adapter: str | None = None

    @property
    def device(self) -> str:
        """The device, or the devices of a model that is spread."""
        spread = getattr(self.model, "hf_device_map", {}).values() if self.placement.device == SPREAD else ()
        places = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in spread}
        return ", ".join(sorted(places)) or str(self.model.device)

    @property
    def quantization(self) -> str | None:
        """The name of the quantisation, None for full weights."""
        return "nf4" if self.placement.four_bit else None


def identity(section: ModelSection) -> Origin:
    """Return which weights would be loaded. Raises ModelUnavailable, JobFileError."""
    sources = find(section, weights=True)
    base, adapter, path = sources
    # An adapter as model.path is the model; otherwise the base is, whichever key names it.
    model = path if adapter is path else base
    return Origin(
        model=section.path if model is path else base.name,
        revision=model.revision,
        weights_sha256=weights_sha256(base.weight_files()),
        files_sha256=_files_sha256(sources),
        adapter=adapter.pinned if adapter else None,
        adapter_sha256=weights_sha256(adapter.adapter_files()) if adapter else None,
        pins=sources.pins(),
    )


def files_sha256(section: ModelSection) -> str:
    """Return `Identity.files_sha256` without looking for weights. Raises ModelUnavailable, JobFileError."""
    return _files_sha256(find(section, weights=False))


def _files_sha256(sources: Sources) -> str:
    """Return one sha256 over the files besides the weights that decide texts: their names and contents.

    Those of the demo model are left out: the installed transformers writes them, each version in another way.
    """
    base, adapter, tokenizer = sources.base, sources.adapter, _tokenizer_of(sources)
    template = adapter if adapter is not None and (adapter.folder / _TEMPLATE).is_file() else tokenizer
    used = [(base, CONFIG), (base, GENERATION), (template, _TEMPLATE)]
    used += [(tokenizer, name) for name in (*_TOKENIZER_FILES, *_VOCABULARIES)]
    used += [] if adapter is None else [(adapter, GENERATION)]
    files = [source.folder / name for source, name in used if source.name != DEMO]
    lines = [f"{file.name}\t{file_sha256(file)}\n" for file in files if file.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer, the adapter's if it has one; the weights are neither needed nor downloaded.

    Raises ModelUnavailable, JobFileError.
    """
    sources = find(section, weights=False)
    _config_of(sources, section)
    from transformers import AutoTokenizer

    folder = _tokenizer_of(sources).folder
    adapter = None if sources.adapter is None else sources.adapter.folder
    refuse_damaged(folder, *_TOKENIZER_FILES)
    ours = sources.base.name == DEMO and folder == sources.base.folder and adapter in (None, default_adapter(DEMO))
    if not ours:
        refuse_crashing(folder, adapter)
    files = [folder / name for name in (*_TOKENIZER_FILES, "tokenizer.json")]
    with (
        quiet_transformers(),
        loading(
            "The model's tokenizer cannot be loaded",
            *([file for file in files if file.is_file()] or [folder]),
            next_step="the folder needs tokenizer.json and tokenizer_config.json, as save_pretrained writes them",
        ),
    ):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if adapter is not None and (own := adapter / _TEMPLATE).is_file():
        tokenizer.chat_template = read_text(own)  # an adapter may have one without a tokenizer
    return tokenizer


def _tokenizer_of(sources: Sources) -> Source:
    """Return where the tokenizer is: an adapter may come with its own, since training can change the chat template."""
    adapter = sources.adapter
    return adapter if adapter is not None and has_tokenizer(adapter.folder) else sources.base


def load_model(
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    memory: MemoryBudget,
    why_no_kernels: WhyNoKernels = no_kernels,
) -> LoadedModel:
    """Load the weights onto their device, within this run's share of it, and apply the adapter.

    In float16 where only an engine's own kernels can compute the model (`why_no_kernels`): see `placement.place`.
    Raises ModelUnavailable if the machine cannot, JobFileError.
    """
    from transformers import GenerationConfig

    from gxr_batch.models.lora import read_adapter
    from gxr_batch.models.read_weights import bytes_in_16_bits, read_model, without_weights

    began = time.monotonic()
    sources = find(section, weights=True)
    config = _config_of(sources, section)
    # First, since it takes no time and finds most faults in an adapter.
    adapter = None if sources.adapter is None else read_adapter(sources.adapter)
    placement = place(
        section,
        config.get_text_config(),
        bytes_in_16_bits(sources.base, config),
        memory,
        stored_in_four_bits=stored_in_four_bits(config),
        why_no_kernels=lambda: why_no_kernels(without_weights(sources.base, config)),
    )
    model, applied = read_model(sources.base, config, placement, memory, adapter)
    formats = notices_of_format(section, sources.base, placement, adapter.config if adapter else None)
    if adapter is not None:
        embedding: Any = model.get_input_embeddings()
        rows = int(embedding.weight.shape[0])
        refuse_unknown_tokens(adapter, tokenizer, sources.base.folder, rows)
    ends = end_ids(model, tokenizer, sources.adapter.folder if sources.adapter else None)
    # Otherwise the model's sampling defaults would fill every setting that a caller leaves out.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return LoadedModel(
        model=model,
        config=model.config.get_text_config(),  # an adapter may have changed its vocabulary
        placement=replace(placement, notices=(*placement.notices, *formats, *(applied.notices if applied else ()))),
        end_ids=ends,
        load_seconds=time.monotonic() - began,
        adapter=applied.how if applied else None,
    )


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path | None = None) -> tuple[int, ...]:
    """Return every id that ends an answer, sorted; `adapter` is the folder of one.

    They are collected from every place that may name them: a base model or an adapter's folder often lacks some, and
    without Gemma's <end_of_turn> an answer runs on into the next turn.
    """
    named = [getattr(model.generation_config, "eos_token_id", None), model.config.get_text_config().eos_token_id]
    return _end_ids([*named, _ends_of_folder(adapter)], tokenizer)


def end_ids_of(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends an answer, sorted, for a model whose weights are not loaded here."""
    sources = find(section, weights=False)
    named = [_config_of(sources, section).get_text_config().eos_token_id, _ends_of_folder(sources.base.folder)]
    return _end_ids([*named, _ends_of_folder(sources.adapter.folder if sources.adapter else None)], tokenizer)


def _ends_of_folder(folder: Path | None) -> Any:
    if folder is None or not (folder / GENERATION).is_file():  # most adapters have none
        return None
    ends = read_object(folder / GENERATION).get("eos_token_id")
    for one in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one <= _MOST_IDS:
            raise bad_value(folder / GENERATION, "eos_token_id", "an id of a token, or a list of ids")
    return ends


def _end_ids(named: list[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    found: set[int] = set()
    for ids in [*named, tokenizer.eos_token_id]:
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    vocabulary = tokenizer.get_vocab()
    if _ENDS[1] in vocabulary:  # a fine-tune's tokenizer may name only one of the two
        found.update(vocabulary[name] for name in _ENDS if name in vocabulary)
    return tuple(sorted(found))


def load_config(section: ModelSection) -> Any:
    """Read the model's configuration, without its weights, and refuse settings that do not work with it.

    Raises ModelUnavailable, JobFileError.
    """
    return _config_of(find(section, weights=False), section)


def _config_of(sources: Sources, section: ModelSection) -> Any:
    from transformers import AutoConfig, GenerationConfig

    folder = sources.base.folder
    refuse_damaged(folder, GENERATION)
    refuse_odd_file(folder)  # before the library computes with it
    with (
        quiet_transformers(),
        loading(
            "The model's config.json is missing, damaged, or of a kind that this transformers only supports with code "
            "from the model, which is never run",
            folder / CONFIG,
            next_step="correct the file, choose another model, or use a newer transformers",
        ),
    ):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
    if (folder / GENERATION).is_file():
        # Loading the weights reads it as well.
        with quiet_transformers(), loading(f"The model's {GENERATION} cannot be used", folder / GENERATION):
            GenerationConfig.from_pretrained(folder)
        _ends_of_folder(folder)
    refuse_odd_config(text, folder)
    if sources.adapter is not None:
        read_adapter_config(sources.adapter.folder)  # refuses unsupported settings by name
        _ends_of_folder(sources.adapter.folder)
    refuse_format(section, sources, config)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and section.max_seq_length > longest:
        raise JobFileError(
            f"The model supports at most {longest} tokens.",
            where=f"model.max_seq_length = {section.max_seq_length}",
            next_step=f"use {longest} or less",
        )
    return config
