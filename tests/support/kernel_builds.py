"""Compiles the kernels for any CPU, with plain C in place of their intrinsics; with sanitizers if asked to."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from places import SUPPORT

from gxr_batch.engines.slots.native import compile_kernels

SOURCES = Path(compile_kernels.__file__).parent
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
STAND_IN = ("-std=gnu17", "-Wno-psabi", f"-I{SUPPORT / 'scalar_intrinsics'}")
_FLAGS = ("-fopenmp", "-fPIC", "-shared", *STAND_IN)


def products() -> list[str]:
    """Return the matrix products that compile here: AMX asks the kernel for access by an x86 system call."""
    return [name for name in compile_kernels.PRODUCTS if name != "amx" or platform.machine() == "x86_64"]


def build(product: str, folder: Path, *flags: str) -> Path:
    """Compile the kernels with one of the products into a folder; return the library."""
    target = folder / f"kernels-{product}.so"
    sources = [str(SOURCES / f"{name}.c") for name in (f"product_{product}", "forward", "candidates")]
    done = subprocess.run(
        ["gcc", *_FLAGS, *flags, *sources, "-o", str(target), "-lm"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


@cache
def load_anywhere(product: str) -> compile_kernels.Kernels:
    """Return the real kernels if this CPU can run them, else the ones in plain C. Raises NativeUnavailable."""
    try:
        return compile_kernels.load_with(product)
    except compile_kernels.NativeUnavailable as error:
        if "do not compile" in str(error) or not shutil.which("gcc") or product not in products():
            raise
    with tempfile.TemporaryDirectory() as folder:
        return compile_kernels.Kernels(ctypes.CDLL(str(build(product, Path(folder), "-O3", "-march=native"))), product)


def why_no_sanitizers() -> str:
    """Return what is missing for a run under the sanitizers, "" for nothing."""
    if not shutil.which("gcc"):
        return "there is no gcc"
    missing = [name for name in ("libasan.so", "libubsan.so") if not _runtime(name).is_absolute()]
    return f"gcc has no {' and no '.join(missing)}" if missing else ""


def sanitizer_environment() -> dict[str, str]:
    """Return the environment in which Python can load sanitized libraries, and every allocation has guards."""
    preload = ":".join(str(_runtime(name)) for name in ("libasan.so", "libubsan.so"))
    return os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}


def _runtime(name: str) -> Path:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return Path(found.strip())  # the bare name if there is none
