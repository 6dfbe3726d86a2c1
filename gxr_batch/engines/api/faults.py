"""What can go wrong with a request, sorted by what follows: try again, fail the row, or end the engine.

A fault says what happened in our own words, with the HTTP status at most: what a server writes may quote the prompt.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime

import httpx2
from huggingface_hub import errors as hub

# Answers that may be others a moment later: too early, too many, and everything that a server blames itself for.
_PASSING = frozenset({408, 425, 429})
_FLOODED = frozenset({429, 503})
# Refusals that are about the account, whatever the row.
_UNAUTHORIZED = 401
_ACCOUNT = {
    _UNAUTHORIZED: "does not accept the token",
    402: "says that the account has no credit left",
    407: "stands behind a proxy that wants a password",
}
# Refusals that are about token, model or address as long as nothing was ever answered, and may be about a row later.
_ADDRESS = {403: "does not let this token use the model", 404: "knows no such model or address", 405: "takes no chat"}


class Fault(Exception):
    """One request went wrong; `what` goes on after "the server"."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Trouble(Fault):
    """It may pass: try again, not before `retry_after` seconds where the server named a time.

    `flooded` says that the server has too much to do, `nonsense` that what came is no answer at all.
    """

    def __init__(
        self, what: str, *, retry_after: float | None = None, flooded: bool = False, nonsense: bool = False
    ) -> None:
        super().__init__(what)
        self.retry_after, self.flooded, self.nonsense = retry_after, flooded, nonsense


class Refusal(Fault):
    """The server will not answer this request; `suspicious` where it may be about every request."""

    def __init__(self, what: str, *, suspicious: bool = False) -> None:
        super().__init__(what)
        self.suspicious = suspicious


class Unusable(Fault):
    """No request can be answered before somebody mends something; `next_step` says what."""

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(what)
        self.next_step = next_step


class HttpStatus(Exception):
    """A response that is no success. Its text is never read."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(status)
        self.status, self.retry_after = status, retry_after(headers)


class TooLarge(Exception):
    """A response beyond what the answer to this request can need."""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or as a date; None without a sound one."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return None


# Errors that mean one thing whatever came before.
_PLAIN: tuple[tuple[tuple[type[Exception], ...], Callable[[], Fault]], ...] = (
    (
        (hub.OfflineModeIsEnabled,),
        lambda: Unusable("may not be asked: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE, or set api.base_url"),
    ),
    ((TimeoutError, httpx2.TimeoutException), lambda: Trouble("gave no answer in time")),
    (
        (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.LocalProtocolError),
        lambda: Unusable("cannot be asked", "check api.base_url, and that the token is one"),
    ),
    ((TooLarge,), lambda: Trouble("sent far more than an answer", nonsense=True)),
    ((hub.TextGenerationError,), lambda: Trouble("reported an error in the middle of its answer")),
)


def fault_of(error: Exception, *, answered: bool, heard: bool, with_token: bool) -> Fault:
    """Sort an error. `answered`: the server gave a sound answer before; `heard`: anything ever came from it."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, hub.HfHubHTTPError):  # the hub, asked which provider serves the model
        error = HttpStatus(error.response.status_code, error.response.headers)
    if isinstance(error, HttpStatus):
        return _of_status(error.status, error.retry_after, answered=answered, with_token=with_token)
    for kinds, make in _PLAIN:
        if isinstance(error, kinds):
            return make()
    if isinstance(error, httpx2.TransportError):
        return _of_connection(error, answered=answered)
    if not heard:  # the client did not even ask: it knows no such provider, or none that serves the model
        return Unusable("cannot be asked for this model", "check api.provider, api.model and the token")
    return Trouble("sent something that is no chat completion", nonsense=True)


def _of_status(status: int, wait: float | None, *, answered: bool, with_token: bool) -> Fault:
    if status in _ACCOUNT:
        return _of_account(status, with_token=with_token)
    if status in _ADDRESS and not answered:
        step = "check api.model, api.base_url or api.provider, and what the token may do"
        return Unusable(f"{_ADDRESS[status]} (HTTP {status})", step)
    if 300 <= status < 400:
        what = f"sends us elsewhere (HTTP {status}), and neither prompt nor token follows"
        return Unusable(what, "write the address that it means into api.base_url")
    if status in _PASSING or status >= 500:
        return Trouble(f"answered HTTP {status}", retry_after=wait, flooded=status in _FLOODED)
    if status >= 400:
        return Refusal(f"refused this row (HTTP {status})", suspicious=status in _ADDRESS)
    return Trouble(f"answered HTTP {status}", nonsense=True)


def _of_account(status: int, *, with_token: bool) -> Fault:
    if status == _UNAUTHORIZED and not with_token:
        step = "export SERVER_TOKEN=..., and add --set api.token_env=SERVER_TOKEN (or another name in capitals)"
        return Unusable(f"wants a token (HTTP {status})", step)
    return Unusable(f"{_ACCOUNT[status]} (HTTP {status})", "check the token and the account behind it")


def _of_connection(error: httpx2.TransportError, *, answered: bool) -> Fault:
    secured = [cause for cause in _causes(error) if isinstance(cause, ssl.SSLError)]
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in secured):
        return Unusable(
            "shows a certificate that this machine does not trust",
            "check the host in api.base_url; a certificate authority of your own goes into SSL_CERT_FILE",
        )
    if secured and not answered:
        return Unusable("speaks no TLS that fits", "check https:// or http:// and the port in api.base_url")
    if isinstance(error, httpx2.ConnectError):
        return Trouble("cannot be reached")
    if isinstance(error, httpx2.ProxyError):
        return Trouble("cannot be reached through the proxy")
    return Trouble("broke off the connection")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
