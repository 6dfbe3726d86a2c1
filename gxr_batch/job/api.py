"""The [api] section: a server that generates. No key of it ever holds a token."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from gxr_batch.job.base import Section, spelled
from gxr_batch.settings import parse_duration


def _web_address(value: str) -> str:
    """Return a server's address without a slash at its end; raise ValueError for what is none, or holds a secret."""
    if not value:
        return value
    try:
        parts = urlsplit(value)
        sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError('must be an address such as "http://localhost:8000/v1"')
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("must hold neither user, password, query nor fragment: a token goes through api.token_env")
    return value.rstrip("/")


class ApiSection(Section):
    """The api engine's own keys: which server, which model there, and how patient to be.

    A `base_url` stands for itself; without one the model is asked for at Hugging Face, through `provider`. `token_env`
    names an environment variable, since a token itself would end up in manifests. `timeout` is one request's,
    `first_wait` and `longest_wait` bound the waits before a request is sent again, at most `max_retries` times for a
    row while the server answers others, and for `give_up_after` while it answers nothing.
    """

    provider: str = Field(default="auto", min_length=1)
    model: str = ""
    base_url: str = ""
    token_env: str = ""
    concurrency: int = Field(default=8, ge=1, le=1024)
    timeout: str = Field(default="5m", min_length=1)
    max_retries: int = Field(default=5, ge=0, le=1000)
    first_wait: str = Field(default="1s", min_length=1)
    longest_wait: str = Field(default="60s", min_length=1)
    give_up_after: str = Field(default="30m", min_length=1)

    _durations = field_validator("timeout", "first_wait", "longest_wait", "give_up_after")(spelled(parse_duration))
    _address = field_validator("base_url")(_web_address)

    @field_validator("token_env")
    @classmethod
    def _name_of_a_variable(cls, value: str) -> str:
        # Capitals alone, so that no token passes for a name and ends up in a manifest.
        if value and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,99}", value):
            raise ValueError("must name an environment variable in capitals; the token itself never stands in a job")
        return value
