"""What one start of a run writes down of itself: its entry in run.json, its lines in log.jsonl, what the user heard."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from gxr_batch.engines.base import EngineInfo, Identity
from gxr_batch.job import Job
from gxr_batch.ledger import Manifest, RunWriter
from gxr_batch.run.fingerprint import environment, provenance, resolved


class InvocationRecord:
    """The entry of one start. Nothing is in run.json before `save`, everything is in the log at once."""

    def __init__(self, ledger: RunWriter, say: Callable[[str], None], job: Job, asked: Mapping[str, Any]) -> None:
        """Open the log with `started`; `asked` is what the command line said."""
        self._ledger, self._say, self._name = ledger, say, job.name
        self._notices: list[str] = []
        self.entry: dict[str, Any] = {"start": ledger.log.start, "started_at": now(), **asked, **environment()}
        self.log("started", job=job.name, pid=os.getpid(), host=socket.gethostname(), set=asked.get("set", []))
        self._look_back()

    def log(self, event: str, **fields: Any) -> None:
        """Append a line to the log. Raises StorageError."""
        self._ledger.log.event(event, **fields)

    def notify(self, *sentences: str) -> None:
        """Say something to the user and keep it in the manifest and the log. Raises StorageError."""
        for sentence in sentences:
            self._say(sentence)
            self.log("notice", text=sentence)
        self._notices += sentences

    def _look_back(self) -> None:
        """Say what became of the start before, where it could not say so itself."""
        if self._ledger.took_over:
            self.entry["took_over"] = self._ledger.took_over
            self.notify(f"Taken over from {self._ledger.took_over}.")
        for entry in self._ledger.manifest.invocations if self._ledger.manifest else ():
            if "outcome" not in entry:
                entry["outcome"] = "no end recorded"  # killed, out of power, or a disk too full to say so
                self.log("earlier_start_without_end", earlier=entry.get("start"), started_at=entry.get("started_at"))

    def save(self, job: Job, identity: Identity, info: EngineInfo | None, fingerprint: Mapping[str, Any]) -> None:
        """Write run.json. Raises StorageError.

        `info` is None before the engine is open: such a start decides nothing for the next one, since only an opened
        engine has settled every automatic value.
        """
        manifest = self._manifest()
        if not manifest.fingerprint:
            manifest.fingerprint = dict(fingerprint) if info else {}
        elif "templates" in fingerprint:
            manifest.fingerprint["templates"] = manifest.fingerprint.get("templates", {}) | fingerprint["templates"]
        manifest.job = job.model_dump(mode="json")
        manifest.model = {"provenance": provenance(identity)}
        if info is not None:
            manifest.resolved = resolved(job)
            self.entry["engine"] = _described(info)
        self.entry["notices"] = self._notices
        self.register()
        manifest.save(self._ledger.folder)

    def register(self) -> int:
        """Give this start its place in the manifest, once, and return its number."""
        invocations = self._manifest().invocations
        if not invocations or invocations[-1] is not self.entry:
            self.entry["number"] = len(invocations) + 1
            invocations.append(self.entry)
        return int(self.entry["number"])

    def _manifest(self) -> Manifest:
        if self._ledger.manifest is None:
            self._ledger.manifest = Manifest(name=self._name, created_at=self.entry["started_at"], job={})
        return self._ledger.manifest


def _described(info: EngineInfo) -> dict[str, Any]:
    entry = {name: getattr(info, name) for name in info.__dataclass_fields__ if name not in {"identity", "notices"}}
    return entry | {"identity": dict(vars(info.identity)), "versions": dict(info.versions)}


def now() -> str:
    """Return the local time with its offset, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def user_name() -> str:
    """Return who this process runs as; the environment, which anybody can set, is not asked."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # as in containers: a number without a name
        return f"uid {os.getuid()}"
