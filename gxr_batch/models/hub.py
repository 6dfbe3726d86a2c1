"""Fetches repositories from the Hugging Face hub into its own cache, and reports in one message why one is unavailable.

Errors are distinguished by class, never by text. Downloaded files stay in the cache, so a second attempt continues.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gxr_batch.cells import quoted
from gxr_batch.errors import ModelUnavailable

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOG_IN = "hf auth login (or set HF_TOKEN)"


def fetch(name: str, revision: str, patterns: Sequence[str], *, where: str) -> Path:
    """Return the folder of a snapshot, named after its commit; from the cache if the hub cannot be reached.

    `where` is the key of the job file that names the repository. Raises ModelUnavailable.
    """
    from huggingface_hub import snapshot_download

    _refuse_no_cache(f"{where} = {name}")
    with _hub_errors(name, revision, where):
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))


def _refuse_no_cache(where: str) -> None:
    """Raise ModelUnavailable if the hub's cache would be in a folder named "~": this user has no home folder."""
    from huggingface_hub import constants

    if str(constants.HF_HUB_CACHE).startswith("~"):
        raise ModelUnavailable(
            "There is no place for the hub's cache: this user has no home folder.",
            where=where,
            next_step="set HF_HOME to a folder that this user may write to",
        )


@contextmanager
def _hub_errors(name: str, revision: str, where: str) -> Iterator[None]:
    """Convert the hub client's errors to ModelUnavailable."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    try:
        yield
    except errors.GatedRepoError:
        what, step = _gated(page)
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        what = f"Neither a folder {quoted(Path(name).absolute())} nor a model of this name on the hub exists."
        step = f"check the name; for a private model log in: {_LOG_IN}"
    except errors.RevisionNotFoundError:
        what, step = "The model has no such revision.", f"choose one of {page}/tree/main, or leave it empty"
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):  # the hub was reached and answered with an error
            what, step = _refused(error.__cause__.response.status_code)
        else:
            what = "The hub cannot be reached, and its cache on this machine does not contain the whole model."
            step = "connect to the hub (with HF_HUB_OFFLINE unset), or run on a connected machine: "
            step += f"hf download {quoted(name)}"
    except errors.HfHubHTTPError as error:
        what, step = _refused(error.response.status_code)
    except OSError as error:
        what, step = _not_written(error)
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # the client's base class, whichever it is built on
        what = f"The model could not be downloaded: {type(error).__name__}."
        step = "fix the connection, then run the same command again: downloaded files are kept"
    else:
        return
    raise ModelUnavailable(
        what, where=f"{where} = {quoted(name)}" + (f", revision {quoted(revision)}" if revision else ""), next_step=step
    )


def _gated(page: str) -> tuple[str, str]:
    from huggingface_hub import get_token

    accept = f"accept its terms at {page}"
    if get_token() is None:
        return "The model is gated, and you are not logged in to the hub.", f"{accept}, then log in: {_LOG_IN}"
    return "The model is gated, and your account has no access to it.", f"{accept}, with the account of your token"


def _refused(status: int) -> tuple[str, str]:
    if status in {401, 403}:
        return "The hub does not accept your token.", f"log in again: {_LOG_IN}"
    return f"The hub answered with HTTP status {status}.", "run the same command again later: downloaded files are kept"


def _not_written(error: OSError) -> tuple[str, str]:
    from huggingface_hub import constants

    if error.errno in _FULL:
        step = f"free disk space in {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on a larger disk"
        return "The disk is full: the model could not be downloaded.", step
    if isinstance(error, PermissionError):
        return (
            "Permission denied: this user may not write to the hub's cache.",
            f"ask the owner of {constants.HF_HUB_CACHE} for access, or set HF_HOME to another folder",
        )
    reason = error.strerror or type(error).__name__
    return (
        f"The model could not be downloaded: {reason}.",
        "fix the connection or the disk, then run the same command again",
    )
