"""gxr-batch: generate chest X-ray teaching cases in bulk from a table of findings. Research and education only.

`read_results(run_dir)` returns the finished rows of a run as a pandas DataFrame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gxr_batch.ledger import read_results

__all__ = ["read_results"]


def __getattr__(name: str) -> Any:
    if name == "read_results":  # on demand: `gxr-batch --help` must not wait for pyarrow
        from gxr_batch.ledger import read_results

        return read_results
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
