"""Compiles the kernels once with the machine's C compiler and loads them; if that is impossible, reports why.

The library is stored in the user's private part of the cache folder, under a name derived from sources, compiler, CPU
and OpenMP runtime, so a change in any of them causes a new build. Two processes that build at once each rename a whole
file into place. It ends with the sha256 of the rest: a cut file, which could crash the process, is built again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gxr_batch.disk import write_whole
from gxr_batch.errors import StorageError
from gxr_batch.models.private_cache import closed_folder, own_bytes, private_folder

_FOLDER = Path(__file__).parent
# CPU features that all kernels use, as Linux names them.
FEATURES = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16"})
# The matrix products, fastest first, with the further CPU features that each needs.
PRODUCTS = {"amx": frozenset({"amx_tile", "amx_bf16"}), "avx512": frozenset[str]()}
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu17", "-Werror=implicit-function-declaration")


class NativeUnavailable(Exception):
    """The kernels cannot be used here; the message gives the reason. The library's forward pass is used instead."""


class Kernels(NamedTuple):
    """The compiled functions, which of PRODUCTS they use, and why not the faster one, if the CPU supports it.

    `why_not_kept` tells why they are compiled again in every process.
    """

    library: ctypes.CDLL
    product: str
    why_slower: str = ""
    why_not_kept: str = ""


def supported() -> bool:
    """Return whether the CPU can run the kernels, compiled or not."""
    return any((FEATURES | features) <= _processor_features() for features in PRODUCTS.values())


@cache
def load() -> Kernels:
    """Return the kernels with the fastest product that this machine supports. Raises NativeUnavailable."""
    why = ""
    for product, features in PRODUCTS.items():
        if features <= _processor_features():
            try:
                return load_with(product)._replace(why_slower=why)
            except NativeUnavailable as error:
                why = str(error)
    raise NativeUnavailable(why)


@cache
def load_with(product: str) -> Kernels:
    """Return the kernels with one of PRODUCTS, compiling them if necessary. Raises NativeUnavailable."""
    missing = (FEATURES | PRODUCTS[product]) - _processor_features()
    if missing:
        raise NativeUnavailable(f"the CPU lacks {', '.join(sorted(missing))}")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NativeUnavailable("there is no C compiler (cc, gcc or clang)")
    try:
        with tempfile.TemporaryDirectory(prefix="gxr-batch-kernels-") as scratch:
            kernels = _kernels(compiler, product, Path(scratch))
    except (OSError, StorageError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"the kernels do not compile ({type(error).__name__})") from error
    if not kernels.library.gxr_ready():
        raise NativeUnavailable("the system does not grant access to the CPU's tile registers")
    return kernels


def _processor_features() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _kernels(compiler: str, product: str, scratch: Path) -> Kernels:
    """Load the kernels from the cache, compiling them into it if necessary, else from a scratch folder.

    Raises OSError, StorageError, SubprocessError.
    """
    build = _Build(compiler, product)
    try:
        with private_folder() as folder:
            kept = folder / build.name
            if not _whole(own_bytes(kept)):
                made = build.compile_in(scratch)
                write_whole(kept, lambda file: _write_sealed(file, made))
            return Kernels(ctypes.CDLL(str(kept)), product)
    except (OSError, StorageError) as error:
        why = getattr(error, "what", None) or getattr(error, "strerror", None) or type(error).__name__
    made = build.compile_in(scratch)
    with closed_folder(scratch) as folder:
        library = ctypes.CDLL(str(folder / made.name))
    return Kernels(library, product, why_not_kept=str(why).rstrip("."))


class _Build:
    """How the kernels are compiled here; `name` is that of a library which needs no new build."""

    def __init__(self, compiler: str, product: str) -> None:
        """Raises OSError, SubprocessError."""
        self._compiler = compiler
        self._sources = [_FOLDER / f"{name}.c" for name in (f"product_{product}", "forward", "candidates")]
        self._runtime = _openmp_runtime()
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
        features = " ".join(sorted(_processor_features()))
        texts = [path.read_text() for path in (_FOLDER / "kernels.h", *self._sources)]
        key = "\x1f".join((*texts, version, features, str(self._runtime), *_FLAGS))
        self.name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"

    def compile_in(self, scratch: Path) -> Path:
        """Compile into a folder of this process, once; return the library. Raises OSError, SubprocessError."""
        made = scratch / self.name
        if made.exists():
            return made
        objects = [scratch / f"{source.stem}.o" for source in self._sources]
        for source, target in zip(self._sources, objects, strict=True):
            _run(self._compiler, *_FLAGS, "-c", str(source), "-o", str(target))
        openmp = str(self._runtime) if self._runtime else "-fopenmp"
        _run(self._compiler, "-shared", *map(str, objects), "-o", str(made), openmp, "-lm")
        return made


_SEAL_BYTES = hashlib.sha256().digest_size


def _whole(content: bytes) -> bool:
    """Return whether a library is what was written. What follows the last section is not read by the loader."""
    return content[-_SEAL_BYTES:] == hashlib.sha256(content[:-_SEAL_BYTES]).digest()


def _write_sealed(file: BinaryIO, library: Path) -> None:
    content = library.read_bytes()
    os.fchmod(file.fileno(), 0o700)
    file.write(content + hashlib.sha256(content).digest())


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True, timeout=300)


def _openmp_runtime() -> Path | None:
    """Return torch's OpenMP runtime: two runtimes in one process would each spin on every core."""
    import torch

    folder = Path(torch.__file__).parent
    for place in (folder / "lib", folder.parent / "torch.libs"):
        for found in sorted(place.glob("libgomp*.so*")):
            return found
    return None
