"""The command with an echo engine that plays faults, as a separate process.

    python tests/support/faulty_cli.py --faults '{"fail_every": 7}' run j.toml

Arguments after the faults are for the command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from faulty_engine import faulty

from gxr_batch.cli import main as command
from gxr_batch.engines import register


def main(arguments: Sequence[str]) -> None:
    option, faults, *others = arguments
    assert option == "--faults"
    register("echo", faulty(json.loads(faults)))
    command(others, prog_name="gxr-batch")


if __name__ == "__main__":
    main(sys.argv[1:])
