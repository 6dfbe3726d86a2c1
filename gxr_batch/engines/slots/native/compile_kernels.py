"""Compiles the kernels once with the machine's C compiler and loads them; if that is impossible, reports why.

The library is stored in the user's cache folder under a name derived from sources, compiler, CPU and OpenMP runtime, so
a change in any of them causes a new build. Two processes that build at once each rename a whole file into place.
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
from typing import NamedTuple

_FOLDER = Path(__file__).parent
# CPU features that all kernels use, as Linux names them.
FEATURES = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16"})
# The matrix products, fastest first, with the further CPU features that each needs.
PRODUCTS = {"amx": frozenset({"amx_tile", "amx_bf16"}), "avx512": frozenset[str]()}
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu17", "-Werror=implicit-function-declaration")


class NativeUnavailable(Exception):
    """The kernels cannot be used here; the message gives the reason. The library's forward pass is used instead."""


class Kernels(NamedTuple):
    """The compiled functions, which of PRODUCTS they use, and why not the faster one, if the CPU supports it."""

    library: ctypes.CDLL
    product: str
    why_slower: str = ""


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
        library = ctypes.CDLL(str(_compiled(compiler, product)))
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"the kernels do not compile ({type(error).__name__})") from error
    if not library.gxr_ready():
        raise NativeUnavailable("the system does not grant access to the CPU's tile registers")
    return Kernels(library, product)


def _processor_features() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _compiled(compiler: str, product: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    runtime = _openmp_runtime()
    features = " ".join(sorted(_processor_features()))
    sources = [_FOLDER / f"{name}.c" for name in (f"product_{product}", "forward", "candidates")]
    texts = [path.read_text() for path in (_FOLDER / "kernels.h", *sources)]
    key = "\x1f".join((*texts, version, features, str(runtime), *_FLAGS))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gxr-batch" / "native"
    target = folder / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "kernels.so"
        compiled = [made.with_name(f"{source.stem}.o") for source in sources]
        for source, target_object in zip(sources, compiled, strict=True):
            _run(compiler, *_FLAGS, "-c", str(source), "-o", str(target_object))
        openmp = str(runtime) if runtime else "-fopenmp"
        _run(compiler, "-shared", *map(str, compiled), "-o", str(made), openmp, "-lm")
        made.replace(target)
    return target


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
