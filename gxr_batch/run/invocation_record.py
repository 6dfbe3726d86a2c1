"""The record of one invocation: its entry in run.json, its lines in log.jsonl, and the notices to the user."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from gxr_batch.engines.base import EngineInfo, Identity
from gxr_batch.job import Job
from gxr_batch.job.job_file import dotted_keys
from gxr_batch.ledger import Manifest, RunWriter
from gxr_batch.run.fingerprint import MODEL_FILES, environment, provenance, resolved

_NO_PROMPTS = (["name"], ["version"])  # keys of [form] whose values are in no prompt


class InvocationRecord:
    """The entry of one invocation. It reaches run.json with `save`; log lines are written at once."""

    def __init__(self, ledger: RunWriter, say: Callable[[str], None], job: Job, asked: Mapping[str, Any]) -> None:
        """Open the log with `started`; `asked` has the command line options."""
        self._ledger, self._say, self._name = ledger, say, job.name
        self._notices: list[str] = []
        self.entry: dict[str, Any] = {"start": ledger.log.start, "started_at": now(), **asked, **environment()}
        self.log(
            "started",
            job=job.name,
            pid=os.getpid(),
            host=socket.gethostname(),
            set=_without_prompts(asked.get("set", [])),
        )
        self._look_back()
        manifest = ledger.manifest
        if manifest is not None and not manifest.created_at:  # known from the parts, which do not have these
            manifest.name, manifest.created_at = job.name, self.entry["started_at"]

    def log(self, event: str, **fields: Any) -> None:
        """Append a line to the log. Raises StorageError."""
        self._ledger.log.event(event, **fields)

    def notify(self, *sentences: str) -> None:
        """Show sentences to the user and keep them in the manifest and the log. Raises StorageError."""
        for sentence in sentences:
            self._say(sentence)
            self.log("notice", text=sentence)
        self._notices += sentences

    def _look_back(self) -> None:
        """Record the outcome of the previous invocation if it could not do so itself."""
        if self._ledger.kept is not None:
            self.notify(f"The earlier run is kept as {self._ledger.kept}.")
        if self._ledger.took_over:
            self.entry["took_over"] = self._ledger.took_over
            self.notify(f"Taken over from {self._ledger.took_over}.")
        for entry in self._ledger.manifest.invocations if self._ledger.manifest else ():
            if "outcome" not in entry:
                entry["outcome"] = "no end recorded"  # killed, lost power, or the disk was too full to record it
                self.log("earlier_start_without_end", earlier=entry.get("start"), started_at=entry.get("started_at"))

    def save(self, job: Job, identity: Identity, info: EngineInfo | None, fingerprint: Mapping[str, Any]) -> None:
        """Write run.json. Raises StorageError.

        `info` is None before the engine is open: such an invocation decides nothing for the next one, since only an
        open engine has settled every automatic value.
        """
        manifest = self._manifest()
        if not manifest.fingerprint:
            manifest.fingerprint = dict(fingerprint) if info else {}
        else:
            if "templates" in fingerprint:
                known = manifest.fingerprint.get("templates", {})
                manifest.fingerprint["templates"] = known | fingerprint["templates"]
            if info is not None:  # a run of an earlier version lacks it
                manifest.fingerprint.setdefault(MODEL_FILES, fingerprint[MODEL_FILES])
        manifest.job = job.model_dump(mode="json")
        manifest.model = {"provenance": provenance(identity)}
        if info is not None:
            manifest.resolved = resolved(job)
            self.entry["engine"] = _described(info)
        self.entry["notices"] = self._notices
        self.register()
        self._ledger.save_manifest(manifest)

    def save_form(self, job: Job) -> None:
        """Write run.json if the job now hides other sections, which changes no text and needs no invocation."""
        manifest, form = self._manifest(), job.model_dump(mode="json", include={"form"})
        if manifest.job.get("form", form["form"]) != form["form"]:
            manifest.job |= form
            self._ledger.save_manifest(manifest)

    def register(self) -> int:
        """Add this invocation to the manifest, once, and return its number."""
        invocations = self._manifest().invocations
        if not invocations or invocations[-1] is not self.entry:
            self.entry["number"] = len(invocations) + 1
            invocations.append(self.entry)
        return int(self.entry["number"])

    def _manifest(self) -> Manifest:
        if self._ledger.manifest is None:
            self._ledger.manifest = Manifest(name=self._name, created_at=self.entry["started_at"], job={})
        return self._ledger.manifest


def _without_prompts(overrides: Sequence[str]) -> list[str]:
    """Return overrides for the log, which holds no prompt: prompt.system and what a form asks for are left out."""
    found = []
    for one in overrides:
        keys = dotted_keys(one.partition("=")[0])
        prompt = keys in (["prompt"], ["prompt", "system"]) or (keys[0] == "form" and keys[1:] not in _NO_PROMPTS)
        found.append(f"{'.'.join(keys)}=..." if prompt else one)
    return found


def _described(info: EngineInfo) -> dict[str, Any]:
    entry = {name: getattr(info, name) for name in info.__dataclass_fields__ if name not in {"identity", "notices"}}
    return entry | {"identity": dict(vars(info.identity)), "versions": dict(info.versions)}


def now() -> str:
    """Return the local time with its offset, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def user_name() -> str:
    """Return the user of this process, not from the environment, which the user can set."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # as in containers: a uid without a name
        return f"uid {os.getuid()}"
