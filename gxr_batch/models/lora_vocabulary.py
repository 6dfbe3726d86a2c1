"""An adapter that was trained with added tokens, or on the rows of single tokens: which vocabulary its model gets.

Peft saves a resized embedding and output layer with the adapter, if it notices that they were resized. The rows of
added tokens are nowhere else, so an adapter without them is refused: random rows would look like a bad fine-tune.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gxr_batch.models.lora_config import MERGE_FIRST

if TYPE_CHECKING:
    from gxr_batch.models.lora import Adapter, Patch

# The tokenizer of Gemma 3 has this token also in models that have no row for it.
_NEVER_USED = "<image_soft_token>"


class Vocabulary(NamedTuple):
    """The names of embedding and output layer ("" if there is none), the number of tokens to resize them to (None to
    leave them), and whether they share their weight afterwards.
    """

    embedding: str
    head: str
    rows: int | None
    tied: bool


def vocabulary_of(adapter: Adapter, patches: dict[str, Patch], model: Any) -> Vocabulary:
    """Return the vocabulary that a model gets from an adapter, whose patches are given by the model's module names.

    If peft saved the weight that both layers share with only one of them, the other gets a patch with it. Raises
    ModelUnavailable if the adapter lacks rows of added tokens.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    ends = {"embedding": names[id(embedding)], "output layer": names.get(id(head), "")}
    shared = head is not None and head.weight is embedding.weight
    if shared:
        _share(patches, ends["embedding"], ends["output layer"])
    first, last = (patches.get(name) for name in ends.values())
    tied = shared and _stays_tied(adapter, first, last)
    found = {end: patches.get(name) for end, name in ends.items() if name}
    rows = _rows(adapter, found, embedding.weight.shape[0], tied=tied)
    return Vocabulary(embedding=ends["embedding"], head=ends["output layer"], rows=rows, tied=tied)


def _share(patches: dict[str, Patch], embedding: str, head: str) -> None:
    """Give both layers the weight that was saved with one of them as the base of its matrices."""
    for one, other in ((embedding, head), (head, embedding)):
        patch = patches.get(one)
        if patch is not None and patch.is_lora and patch.weight is not None and other not in patches:
            patches[other] = replace(patch, module=other, a=None, b=None, magnitude=None)
            return


def _stays_tied(adapter: Adapter, embedding: Patch | None, head: Patch | None) -> bool:
    """Return whether a shared weight is still shared with the adapter; peft may change only one of the two layers."""
    if embedding is None and head is None:
        return True
    if embedding is not None and head is not None:
        lora = embedding.is_lora or head.is_lora
        same = _equal(embedding.weight, head.weight) and _equal(embedding.rows, head.rows)
        return not lora and same and embedding.tokens == head.tokens
    one = embedding or head
    assert one is not None
    if one.is_lora:
        return False
    if one.weight is not None:  # trained for one layer, or saved because the shared weight was resized
        return adapter.config.ties_weights or not adapter.config.saves(one.module)
    return one is embedding  # rows that were trained in the embedding count for both


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _rows(adapter: Adapter, ends: Mapping[str, Patch | None], now: int, *, tied: bool) -> int | None:
    """Return the number of tokens to resize to. Raises ModelUnavailable if the adapter lacks rows of added tokens."""
    sizes = {_size(patch) for patch in ends.values() if patch is not None} - {None, now}
    highest = max((token for patch in ends.values() if patch is not None for token in patch.tokens), default=-1)
    if not sizes and highest < now:
        return None
    if len(sizes) > 1:
        return None  # no vocabulary fits both, which is reported with the shapes
    rows = sizes.pop() if sizes else highest + 1
    assert rows is not None
    has_it = {end: patch is not None and _has_rows(patch, now, rows) for end, patch in ends.items()}
    lacking = [] if tied and any(has_it.values()) else [end for end, there in has_it.items() if not there]
    if lacking:
        raise adapter.refuse(
            f"The adapter was trained with {rows} tokens, its base has {now}, and the adapter does not contain the "
            f"rows of the {' and the '.join(lacking)} for the other tokens.",
            MERGE_FIRST,
        )
    return rows


def _size(patch: Patch) -> int | None:
    """Return the number of tokens that a patch of the embedding or the output layer was made for, None if any."""
    if patch.weight is not None:
        return patch.weight.shape[0]
    if patch.a is None or patch.b is None:
        return None
    return patch.b.shape[0] if patch.module.endswith("lm_head") else patch.a.shape[1]


def _has_rows(patch: Patch, now: int, rows: int) -> bool:
    """Return whether a patch brings every row that the model lacks."""
    if patch.weight is not None:
        return patch.weight.shape[0] == rows
    brought = set(patch.tokens)
    return patch.rows is not None and rows - now <= len(brought) and set(range(now, rows)) <= brought


def refuse_unknown_tokens(adapter: Adapter, tokenizer: Any, base: Path, rows: int) -> None:
    """Raise ModelUnavailable if the adapter's own tokenizer has added tokens for which there is no row.

    `tokenizer` is the one in use, `base` the folder of the base model, `rows` the model's number of tokens.
    """
    if not has_tokenizer(adapter.source.folder):
        return
    beyond = [token.content for number, token in tokenizer.added_tokens_decoder.items() if number >= rows]
    if not beyond:
        return
    known = ""
    with suppress(OSError, ValueError):  # a base without this file has no token that could excuse one here
        known = (base / "tokenizer.json").read_text(encoding="utf-8")
    added = [text for text in beyond if text != _NEVER_USED and json.dumps(text, ensure_ascii=False) not in known]
    if added:
        raise adapter.refuse(
            f"The adapter's tokenizer has {len(added)} added tokens for which neither the adapter nor its base has a "
            f"row, e.g. {added[0]}.",
            MERGE_FIRST,
        )


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer: an adapter may come with its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
