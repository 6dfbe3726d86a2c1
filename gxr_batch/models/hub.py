"""Fetches repositories from the Hugging Face hub into its own cache, and reports in one message why one is unavailable.

Errors are distinguished by class, never by text. Downloaded files stay in the cache, so a second attempt continues.
The hub is asked by `fetch` and by nothing else: see `models/offline.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from gxr_batch.cells import quoted
from gxr_batch.errors import GxrError, ModelUnavailable
from gxr_batch.models.network import how_to_trust, is_untrusted, proxy_of, proxy_variable
from gxr_batch.models.offline import asked, bad_endpoint, is_offline

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOG_IN = "hf auth login (or set HF_TOKEN)"
_KEPT = "run the same command again: downloaded files are kept"
_WRONG = (
    "check HF_ENDPOINT, and that no proxy or login page answers instead of the hub; HF_HUB_OFFLINE=1 uses files that "
    "were downloaded before"
)


def fetch(name: str, revision: str, patterns: Sequence[str], *, where: str) -> Path:
    """Return the folder of a snapshot, named after its commit; from the cache if the hub cannot be reached.

    `where` is the key of the job file that names the repository. Raises ModelUnavailable.
    """
    from huggingface_hub import snapshot_download

    from gxr_batch.models.hub_client import WrongAnswer

    _refuse_no_cache(f"{where} = {name}")
    with asked(), _hub_errors(name, revision, where):
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
        if not folder.is_dir():
            raise WrongAnswer("lists no file of a model or adapter in this repository")
        return folder


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
    """Watch what the hub answers, and convert whatever its library raises to ModelUnavailable."""
    from huggingface_hub import errors

    from gxr_batch.models.hub_client import WrongAnswer, watched_client

    host = _host()
    page = f"https://huggingface.co/{name}"
    with watched_client() as watched:
        try:
            yield
        except (GxrError, MemoryError):
            raise
        except WrongAnswer as error:
            what, step = f"The hub {host} {error}.", _WRONG
        except errors.GatedRepoError:
            what, step = _gated(page)
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            what = f"Neither a folder {quoted(Path(name).absolute())} nor a model of this name on the hub exists."
            step = f"check the name; for a private model log in: {_LOG_IN}"
        except errors.RevisionNotFoundError:
            what, step = "The model has no such revision.", f"choose one of {page}/tree/main, or leave it empty"
        except errors.LocalEntryNotFoundError as error:
            what, step = _not_found(error.__cause__, name, host)
        except errors.HfHubHTTPError as error:
            what, step = _refused(error.response.status_code, host)
        except OSError as error:
            what, step = _not_written(error, host)
        except errors.HTTPError as error:  # type: ignore[attr-defined]  # the client's base class, whichever it is
            what, step = _broken_off(error, host)
        except Exception as error:  # whatever the library raises on an answer of another form
            what, step = _unexpected(error, watched.answer, host)
        else:
            return
    raise ModelUnavailable(
        what, where=f"{where} = {quoted(name)}" + (f", revision {quoted(revision)}" if revision else ""), next_step=step
    )


def _not_found(cause: BaseException | None, name: str, host: str) -> tuple[str, str]:
    """Return why a model that is not in the cache could not be downloaded either."""
    from huggingface_hub import errors

    if isinstance(cause, errors.HfHubHTTPError):  # the hub was reached and answered with an error
        return _refused(cause.response.status_code, host)
    if isinstance(cause, errors.FileMetadataError):
        return f"The hub {host} answered without the commit or the ETag of a file.", _WRONG
    if is_untrusted(cause):
        return f"The hub {host} presents a certificate that this machine does not trust.", how_to_trust()
    what = (
        f"The hub {host} cannot be reached{_through_proxy()}, and its cache on this machine does not contain the whole"
    )
    step = "connect to the hub (with HF_HUB_OFFLINE unset), or run on a connected machine: hf download"
    return f"{what} model.", f"{step} {quoted(name)}"


def _broken_off(error: Exception, host: str) -> tuple[str, str]:
    """Return why a download failed for a reason that may pass."""
    name = type(error).__name__
    if name == "ProxyError":
        return f"The hub {host} cannot be reached{_through_proxy()}.", "check the proxy, or add the hub to NO_PROXY"
    return f"The model could not be downloaded from the hub {host}: {name}.", f"fix the connection, then {_KEPT}"


def _through_proxy() -> str:
    from huggingface_hub import constants

    address = constants.ENDPOINT
    return f" through the proxy in {proxy_variable(address)}" if not is_offline() and proxy_of(address) else ""


def _unexpected(error: Exception, answer: str, host: str) -> tuple[str, str]:
    from huggingface_hub import constants

    if answer:
        return f"The hub {host} sent what its library cannot read ({answer}; {type(error).__name__}).", _WRONG
    step = f"delete this model's folder in {constants.HF_HUB_CACHE}, or set HF_HOME to another folder"
    return f"The hub's cache on this machine cannot be used ({type(error).__name__}).", step


def _host() -> str:
    """Return the hub's host and port, as messages show it. Raises ModelUnavailable if HF_ENDPOINT is no web address."""
    from huggingface_hub import constants

    with suppress(ValueError):
        parts = urlsplit(constants.ENDPOINT)
        if parts.scheme in {"http", "https"} and parts.hostname:
            return quoted(f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname)
    raise bad_endpoint()


def _gated(page: str) -> tuple[str, str]:
    from huggingface_hub import get_token

    accept = f"accept its terms at {page}"
    if get_token() is None:
        return "The model is gated, and you are not logged in to the hub.", f"{accept}, then log in: {_LOG_IN}"
    return "The model is gated, and your account has no access to it.", f"{accept}, with the account of your token"


def _refused(status: int, host: str) -> tuple[str, str]:
    if status in {401, 403}:
        return "The hub does not accept your token.", f"log in again: {_LOG_IN}"
    return (
        f"The hub {host} answered with HTTP status {status}.",
        "run the same command again later: downloaded files are kept",
    )


def _not_written(error: OSError, host: str) -> tuple[str, str]:
    from huggingface_hub import constants

    if error.errno in _FULL:
        step = f"free disk space in {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on a larger disk"
        return "The disk is full: the model could not be downloaded.", step
    if isinstance(error, PermissionError):
        return (
            "Permission denied: this user may not write to the hub's cache.",
            f"ask the owner of {constants.HF_HUB_CACHE} for access, or set HF_HOME to another folder",
        )
    if type(error) is OSError and error.errno is None:  # the library's check of what it downloaded
        return f"The hub {host} sent a file of another size than it had announced.", _WRONG
    reason = error.strerror or type(error).__name__
    return (
        f"The model could not be downloaded: {reason}.",
        "fix the connection or the disk, then run the same command again",
    )
