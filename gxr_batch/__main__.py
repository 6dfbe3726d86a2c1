"""`python -m gxr_batch` is `gxr-batch`."""

import os
import sys


def _without_current_folder() -> None:
    """Python puts the current folder first; files in it must not replace the packages that are imported later."""
    try:
        current = os.getcwd()
    except OSError:  # deleted
        current = ""
    if not sys.flags.safe_path and sys.path[:1] == [current]:
        del sys.path[0]


if __name__ == "__main__":
    _without_current_folder()
    from gxr_batch.cli import main

    main(prog_name="gxr-batch")
