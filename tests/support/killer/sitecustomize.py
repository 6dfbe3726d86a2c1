"""Kills its process at the Nth moment before or after a write under one folder; on PYTHONPATH in tests only.

GXR_KILL_FOLDER names the folder, GXR_KILL_AT the moment (0 = never), GXR_KILL_LOG a file that gets one line per moment.
It is used if strace is missing, and sees less: pyarrow's writes are one call, not one per buffer.
GXR_TEST_MARK replaces the random part of the names of temporary files, which strace has to know.
"""

import os
import secrets
import signal
import sys

FOLDER = os.environ.get("GXR_KILL_FOLDER")
MARK = os.environ.get("GXR_TEST_MARK")
WRITING = os.O_WRONLY | os.O_RDWR
seen = {"moments": 0}


def concerns(path):
    try:
        return f"{os.path.abspath(os.fsdecode(path))}/".startswith(FOLDER)
    except TypeError:
        return False


def moment(when, call, path):
    wrap_arrow()
    seen["moments"] += 1
    with os.fdopen(os.open(os.environ["GXR_KILL_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as log:
        log.write(f"{when} {call} {os.path.basename(str(path))}\n")
    if seen["moments"] == int(os.environ["GXR_KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)


def wrap(module, name, path_of=lambda arguments: arguments[0]):
    real = getattr(module, name)

    def wrapped(*arguments, **options):
        path = path_of(arguments)
        if not concerns(path):
            return real(*arguments, **options)
        moment("before", name, path)
        result = real(*arguments, **options)
        moment("after", name, path)
        return result

    setattr(module, name, wrapped)


def path_of(file):
    return os.readlink(f"/proc/self/fd/{file.fileno()}") if hasattr(file, "fileno") else file


def wrap_arrow():
    parquet = sys.modules.get("pyarrow.parquet")
    if parquet is not None and "arrow" not in seen:
        seen["arrow"] = 1
        wrap(parquet, "write_table", lambda arguments: path_of(arguments[1]))
        for name in ("write_table", "close"):
            wrap(parquet.ParquetWriter, name, lambda arguments: path_of(arguments[0].where))


def opened(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING and concerns(arguments[0]):
        moment("before", "open", arguments[0])


if MARK:
    secrets.token_hex = lambda size=32: MARK[: 2 * size]
if FOLDER:
    for name in ("mkdir", "rename", "replace", "unlink"):
        wrap(os, name)
    wrap(os, "fsync", lambda arguments: os.readlink(f"/proc/self/fd/{arguments[0]}"))
    sys.addaudithook(opened)
