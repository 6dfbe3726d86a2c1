"""How requests leave this machine: the proxies and certificates that the environment names, checked before use.

The client of an API server and that of the hub are both made with `connection`, so that a variable means the same for
both, and a bad one is one message that names it.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from gxr_batch.cells import quoted
from gxr_batch.errors import ModelUnavailable

_PROXIES = ("http", "https", "socks5", "socks5h")
# Variables of other programs. Ours reads SSL_CERT_FILE and SSL_CERT_DIR, as OpenSSL does.
_NOT_READ = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
# How OpenSSL finds a certificate in a folder.
_HASHED = re.compile(r"[0-9a-f]{8}\.\d+")


def connection(url: str) -> dict[str, Any]:
    """Return the settings of an httpx2 client or transport for requests to the host of `url`.

    Raises ModelUnavailable if the environment names a proxy or certificates for it that cannot be used.
    """
    import httpx2

    proxy = proxy_of(url)
    secured = url.startswith("https:") or (proxy or "").startswith("https:")
    # Without TLS no certificate is needed: a context that trusts nobody.
    context = _certificates() if secured else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        through = httpx2.Proxy(proxy, ssl_context=context) if proxy else None
    except httpx2.InvalidURL:
        raise _bad_proxy(url) from None
    return {"verify": context, "proxy": through, "trust_env": False}


def proxy_of(url: str) -> str | None:
    """Return the proxy that the environment names for a URL; None for this machine and the hosts in NO_PROXY.

    Raises ModelUnavailable if it is not the address of a proxy.
    """
    parts = urlsplit(url)
    proxies = getproxies()
    named = proxies.get(parts.scheme) or proxies.get("all")
    if not named or is_loopback(parts.hostname or "") or _needs_none(parts.hostname or "", parts.port, proxies):
        return None
    proxy = named if "://" in named else f"http://{named}"
    try:
        to = urlsplit(proxy)
        usable = to.scheme in _PROXIES and bool(to.hostname) and to.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise _bad_proxy(url)
    return proxy


def proxy_variable(url: str) -> str:
    """Return the environment variable that names the proxy for a URL."""
    scheme = urlsplit(url).scheme
    names = [name for kind in (scheme, "all") for name in (f"{kind}_proxy", f"{kind}_proxy".upper())]
    return next((name for name in names if os.environ.get(name)), "the system's proxy settings")


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, which a proxy cannot reach for us."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def is_untrusted(error: BaseException | None) -> bool:
    """Return whether a request failed because the other side's certificate is not trusted here."""
    return any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes(error))


def how_to_trust() -> str:
    """Return what to type if a certificate is not trusted, after what the environment names now."""
    if name := next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), ""):
        return f"the certificates that are trusted are those of {name} = {quoted(Path(os.environ[name]))}"
    if name := next((name for name in _NOT_READ if os.environ.get(name)), ""):
        return f'{name} is not read: export SSL_CERT_FILE="${name}"'
    return "for a private certificate authority set SSL_CERT_FILE"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _needs_none(host: str, port: int | None, proxies: dict[str, str]) -> bool:
    """Return whether NO_PROXY names a host: by name, by a domain such as .site.org or *.site.org, or by a network."""
    if proxy_bypass(host) or (port is not None and proxy_bypass(f"{host}:{port}")):
        return True
    for entry in proxies.get("no", "").split(","):
        name = entry.strip().lower()
        if name.startswith("*.") and host.endswith(name[1:]):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(name.strip("[]"), strict=False):
                return True
        except ValueError:  # a name
            continue
    return False


def _bad_proxy(url: str) -> ModelUnavailable:
    # The value is not shown: it may hold a password.
    name = proxy_variable(url)
    return ModelUnavailable(
        f"{name} is not the address of a proxy that can be used.",
        where=f"{name}, for requests to {quoted(urlsplit(url).hostname)}",
        next_step=f"unset {name}, set it to http://HOST:PORT or socks5://HOST:PORT, or add the host to NO_PROXY",
    )


def _certificates() -> ssl.SSLContext:
    """Return the certificates to trust: of SSL_CERT_FILE, else of SSL_CERT_DIR, else the system's."""
    import httpx2

    file, folders = os.environ.get("SSL_CERT_FILE", ""), os.environ.get("SSL_CERT_DIR", "")
    if file and not os.path.isfile(file):
        raise _bad_certificates("SSL_CERT_FILE", file, "is not a file" if os.path.exists(file) else "does not exist")
    if not file and folders and (wrong := _wrong_with(folders.split(os.pathsep))):
        raise _bad_certificates("SSL_CERT_DIR", folders, wrong)
    try:
        return httpx2.create_ssl_context()
    except ssl.SSLError:
        wrong = "holds no certificate in PEM format"
    except OSError as error:
        wrong = f"cannot be read: {(error.strerror or type(error).__name__).lower()}"
    raise _bad_certificates("SSL_CERT_FILE" if file else "SSL_CERT_DIR", file or folders, wrong)


def _wrong_with(folders: list[str]) -> str:
    """Return what keeps OpenSSL from finding a certificate in any of these folders."""
    there = [folder for folder in folders if os.path.isdir(folder)]
    if not there:
        return "is not a folder"
    try:
        found = any(_HASHED.fullmatch(name) for folder in there for name in os.listdir(folder))
    except PermissionError:
        return "cannot be read: permission denied"
    return "" if found else "holds no certificate under its hash (openssl rehash makes those names)"


def _bad_certificates(name: str, value: str, wrong: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{name} {wrong}: no server's certificate can be checked.",
        where=f"{name} = {quoted(Path(value))}",
        next_step=f"unset {name}, or set it to certificates in PEM format; many systems have "
        "/etc/ssl/certs/ca-certificates.crt",
    )
