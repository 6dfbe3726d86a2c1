"""A run on disk. `open_run` writes one, `RunReader` and `read_results` read one; no other package knows its files."""

from gxr_batch.ledger.manifest import Manifest
from gxr_batch.ledger.run_reader import RunReader, is_run, read_results
from gxr_batch.ledger.run_writer import Drift, RunWriter, encode_metadata, open_run
from gxr_batch.ledger.state import FAILED, HELD, OK, TODO, Counts, State

__all__ = [
    "FAILED",
    "HELD",
    "OK",
    "TODO",
    "Counts",
    "Drift",
    "Manifest",
    "RunReader",
    "RunWriter",
    "State",
    "encode_metadata",
    "is_run",
    "open_run",
    "read_results",
]
