"""gxr-batch: generate chest X-ray teaching cases in bulk from a table of findings. Research and education only.

`load_job`, `check_job`, `run_job` and `read_results` do from Python what the command line does; docs/python.md has an
example. Everything is imported on first use, so that `import gxr_batch` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gxr_batch.errors import GxrError, MachineError, UserError
    from gxr_batch.job import Job
    from gxr_batch.ledger import read_results
    from gxr_batch.library import check_job, load_job, run_job
    from gxr_batch.run.check import CheckResult
    from gxr_batch.run.invocation import Progress
    from gxr_batch.run.runner import RunResult
    from gxr_batch.run.stop import Stopper

__all__ = [
    "CheckResult",
    "GxrError",
    "Job",
    "MachineError",
    "Progress",
    "RunResult",
    "Stopper",
    "UserError",
    "check_job",
    "load_job",
    "read_results",
    "run_job",
]

_MODULES = {
    "CheckResult": "run.check",
    "GxrError": "errors",
    "Job": "job",
    "MachineError": "errors",
    "Progress": "run.invocation",
    "RunResult": "run.runner",
    "Stopper": "run.stop",
    "UserError": "errors",
    "check_job": "library",
    "load_job": "library",
    "read_results": "ledger",
    "run_job": "library",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"gxr_batch.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
