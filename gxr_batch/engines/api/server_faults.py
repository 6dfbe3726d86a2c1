"""What can go wrong with a request, sorted by what follows: try again, fail the row, or end the engine.

A fault says what happened in our own words, with the HTTP status at most: what a server writes may quote the prompt.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime

import httpx2
import openai

# What the library's reading of a wrong answer ends in, and ours.
MISREAD = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
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
    """No request can be answered before somebody fixes something; `next_step` says what."""

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(what)
        self.next_step = next_step


# Whatever a request may end in.
EXPECTED = (Fault, openai.OpenAIError, OSError, *MISREAD)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or as a date; None without a sound one."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return None


def fault_of_error(error: Exception, *, answered: bool) -> Fault:
    """Sort what a request ended in. `answered`: the server gave a sound answer before."""
    if isinstance(error, Fault):
        return error
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
    if isinstance(cause, TimeoutError | httpx2.TimeoutException):
        return Trouble("gave no answer in time")
    if isinstance(cause, httpx2.UnsupportedProtocol | httpx2.InvalidURL | httpx2.LocalProtocolError):
        return Unusable("cannot be asked", "check api.base_url, and that the token is one")
    if isinstance(error, openai.APIConnectionError | OSError):
        return _of_connection(cause, answered=answered)
    if isinstance(error, openai.APIError):
        return Trouble("reported an error in the middle of its answer")
    return Trouble("sent something that is no chat completion", nonsense=True)


def fault_of_status(status: int, headers: Mapping[str, str], *, answered: bool, with_token: bool) -> Fault:
    """Sort a response that is no success, whose text is never read. `with_token`: the request held one."""
    wait = retry_after(headers)
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


def _of_connection(error: BaseException | None, *, answered: bool) -> Fault:
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
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
