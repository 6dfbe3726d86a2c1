"""The errors that gxr-batch raises on purpose. Any other exception is a bug and keeps its traceback.

    GxrError
    ├── UserError           the user's input is wrong
    │   ├── JobFileError        job file or command line
    │   ├── TableError          input table: file, line or row, column
    │   ├── TemplateError       prompt template
    │   ├── RunError            a run folder that the command cannot use
    │   │   └── LaterVersion        a run folder that a later version of gxr-batch wrote
    │   └── FingerprintError    the job no longer matches the run that it would resume
    ├── MachineError        the machine cannot do it now; resumable once that is fixed
    │   ├── ModelUnavailable    weights, tokenizer or device
    │   ├── StorageError        disk full, read-only, gone
    │   ├── RunLocked           another process writes to this run folder
    │   ├── OutOfDeviceMemory   other processes hold the GPU memory and keep it
    │   ├── OutOfTime           the engine was not open when the run had to stop; stops the run, not an error
    │   └── EngineFailed        an engine that cannot continue
    │       └── EngineUnavailable   its server refuses everything, or its cluster is gone; no row is to blame
    │           └── ApiOutage           a server that did not answer for too long; stops the run, not an error
    └── RowError            one row cannot be generated; becomes a failed row and never leaves the runner

Messages name locations (file, line, row id, column), never the text of a cell, a prompt or an answer.
Only the command line turns an error into an exit code.
"""

from __future__ import annotations


class GxrError(Exception):
    """What is wrong, where, and what to type next.

    `what` is a full sentence, `where` a file, line, row id or column, `next_step` a fix; the last two may be empty.
    """

    def __init__(self, what: str, *, where: str = "", next_step: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.next_step = next_step

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {_on_one_line(self.where)}")
        if self.next_step:
            lines.append(f"  next:  {_on_one_line(self.next_step)}")
        return "\n".join(lines)


def _on_one_line(text: str) -> str:
    """Return a text that may hold a path, which must not look like lines of the message."""
    return text.replace("\n", r"\n").replace("\r", r"\r")


class UserError(GxrError):
    """The user's input is wrong; nothing was lost, nothing was generated."""


class JobFileError(UserError):
    """The job file, or an option that overrides it, cannot be used."""


class TableError(UserError):
    """The input table cannot be used."""


class TemplateError(UserError):
    """A prompt template is missing, does not compile, or asks for columns that the table lacks."""


class RunError(UserError):
    """The path holds no run, or one that this command cannot use."""


class LaterVersion(RunError):
    """A later version of gxr-batch wrote this run; nothing in it was touched."""


class FingerprintError(UserError):
    """The job would give different texts from the run that it would resume."""


class MachineError(GxrError):
    """The machine cannot do it now; the run can be resumed once that is fixed."""


class ModelUnavailable(MachineError):
    """The model, its tokenizer or its device cannot be used."""


class StorageError(MachineError):
    """The disk is full, read-only, or the folder is gone."""


class RunLocked(MachineError):
    """Another process writes to this run folder."""


class OutOfDeviceMemory(MachineError):
    """Other processes hold the device's memory and keep it; no row is to blame."""


class OutOfTime(MachineError):
    """The engine was not open when the run had to stop; nothing was generated since."""


class EngineFailed(MachineError):
    """The engine cannot continue; rows that it took and did not return are still to do."""


class EngineUnavailable(EngineFailed):
    """The server or cluster behind the engine refuses every request or is gone; no row can cause that."""


class ApiOutage(EngineUnavailable):
    """A server did not answer for longer than the job waits; the requested rows are still to do."""


class RowError(GxrError):
    """This one row cannot be generated. `what` becomes its `gxr_error`, so it names columns and counts, never text."""
