"""What can go wrong with a request, sorted by what follows: retry, fail the row, or end the engine.

A fault describes what happened in our own words, with at most the HTTP status: a server's text may quote the prompt.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

import httpx2
import openai
import socksio

from gxr_batch.models.network import causes, how_to_trust, is_untrusted

# What reading a malformed answer raises, in the library or here.
MISREAD = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
# Statuses that may pass: too early, too many, and all errors on the server's side.
_PASSING = frozenset({408, 425, 429})
_OVERLOADED = frozenset({429, 503})
# Refusals that concern the account, whatever the row.
_UNAUTHORIZED = 401
_ACCOUNT = {
    _UNAUTHORIZED: "does not accept the token",
    402: "reports that the account has no credit left",
    407: "is behind a proxy that requires a password",
}
# Refusals that concern token, model or address while nothing has been answered; after that they may concern one row.
_ADDRESS = {
    403: "does not let this token use the model",
    404: "knows no such model or address",
    405: "does not accept chat completions",
}


class Fault(Exception):
    """One request went wrong; `what` continues a sentence that begins with "the server"."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Trouble(Fault):
    """A fault that may pass: try again, not before `retry_after` seconds if the server named a time.

    `overloaded`: the server is overloaded, as also if it is `late`; `nonsense`: the response is not an answer at all.
    `crowded` is set for a late one that may be due to the requests in flight with it.
    """

    def __init__(
        self,
        what: str,
        *,
        retry_after: float | None = None,
        overloaded: bool = False,
        late: bool = False,
        nonsense: bool = False,
    ) -> None:
        super().__init__(what)
        self.retry_after, self.overloaded, self.nonsense = retry_after, overloaded or late, nonsense
        self.late, self.crowded = late, False


class Refusal(Fault):
    """The server will not answer this request; `suspicious` if that may hold for every request."""

    def __init__(self, what: str, *, suspicious: bool = False) -> None:
        super().__init__(what)
        self.suspicious = suspicious


class Unusable(Fault):
    """No request can be answered until something is fixed; `next_step` says what."""

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(what)
        self.next_step = next_step


# All that a request may raise.
EXPECTED = (Fault, openai.OpenAIError, socksio.ProtocolError, OSError, *MISREAD)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds in a Retry-After header, given as a number or a date; None if it is missing or invalid."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return None


def fault_of_error(error: Exception, *, answered: bool) -> Fault:
    """Classify the exception that ended a request. `answered`: the server gave a valid answer before."""
    if isinstance(error, Fault):
        return error
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
    if isinstance(cause, TimeoutError | httpx2.TimeoutException):
        return Trouble("gave no answer in time", late=True)
    if isinstance(cause, httpx2.UnsupportedProtocol | httpx2.InvalidURL | httpx2.LocalProtocolError):
        return Unusable("cannot be used with these settings", "check api.base_url and the token")
    if isinstance(error, openai.APIConnectionError | socksio.ProtocolError | OSError):
        return _of_connection(cause, answered=answered)
    if isinstance(error, openai.APIError):
        return Trouble("reported an error in the middle of its answer")
    return Trouble("sent something that is no chat completion", nonsense=True)


def fault_of_status(status: int, headers: Mapping[str, str], *, answered: bool, with_token: bool) -> Fault:
    """Classify an unsuccessful response, whose text is never read. `with_token`: the request held one."""
    wait = retry_after(headers)
    if status in _ACCOUNT:
        return _of_account(status, with_token=with_token)
    if status in _ADDRESS and not answered:
        step = "check api.model, api.base_url or api.provider, and the token's permissions"
        return Unusable(f"{_ADDRESS[status]} (HTTP {status})", step)
    if 300 <= status < 400:
        what = f"redirects to another address (HTTP {status}), which is not followed"
        return Unusable(what, "set api.base_url to the address that it redirects to")
    if status in _PASSING or status >= 500:
        return Trouble(f"answered HTTP {status}", retry_after=wait, overloaded=status in _OVERLOADED)
    if status >= 400:
        return Refusal(f"refused this row (HTTP {status})", suspicious=status in _ADDRESS)
    return Trouble(f"answered HTTP {status}", nonsense=True)


def _of_account(status: int, *, with_token: bool) -> Fault:
    if status == _UNAUTHORIZED and not with_token:
        step = "export SERVER_TOKEN=..., and add --set api.token_env=SERVER_TOKEN (or another name in capitals)"
        return Unusable(f"requires a token (HTTP {status})", step)
    return Unusable(f"{_ACCOUNT[status]} (HTTP {status})", "check the token and its account")


def _of_connection(error: BaseException | None, *, answered: bool) -> Fault:
    if is_untrusted(error):
        step = f"check the host in api.base_url; {how_to_trust()}"
        return Unusable("presents a certificate that this machine does not trust", step)
    if any(isinstance(cause, ssl.SSLError) for cause in causes(error)) and not answered:
        return Unusable("does not complete a TLS handshake", "check https:// or http:// and the port in api.base_url")
    if isinstance(error, httpx2.ConnectError):
        return Trouble("cannot be reached")
    if isinstance(error, httpx2.ProxyError | socksio.ProtocolError):
        return Trouble("cannot be reached through the proxy")
    return Trouble("broke off the connection")
