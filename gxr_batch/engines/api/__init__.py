"""The engine that asks a server: Hugging Face Inference, or any server with OpenAI's chat completions API.

The server applies the chat template, counts the tokens and samples them; no part of the model is local. Texts are
therefore not reproducible, even if the server accepts a seed.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from huggingface_hub import get_token

from gxr_batch.cells import quoted
from gxr_batch.engines.base import EngineInfo, Identity, Say, require_time
from gxr_batch.errors import ModelUnavailable, RowError
from gxr_batch.forms import form_of
from gxr_batch.job import Job
from gxr_batch.job.units import parse_duration
from gxr_batch.models.network import is_loopback, proxy_of
from gxr_batch.models.offline import is_offline
from gxr_batch.records import Encoded, Messages

if TYPE_CHECKING:
    from gxr_batch.engines.api.outage import Outage
    from gxr_batch.engines.api.session import ApiSession

# A server applies the chat template and then parses control tokens anywhere in the text, so a cell could end its turn
# and begin another. These are the spellings of the model families; engines on this machine need no such list.
_CONTROL = re.compile(
    r"<(start|end)_of_\w+>|<(bos|eos|pad|unk|mask|s)>|</s>|<image_soft_token>|\[multimodal\]|\[/?INST\]|<\|[^|<>]{1,40}\|>"
)
_OF_HUGGING_FACE = "hf_"
_LOOK_SECONDS = 0.1


class ApiEncoder:
    """Counts nothing, since the server has the tokenizer, and rejects text that could be a control token there."""

    def encode(self, messages: Messages) -> Encoded:
        """Return neither ids nor a length. Raises RowError if the text holds what may be a control token."""
        if any(turn.role != "system" and _CONTROL.search(turn.text) for turn in messages.turns):
            raise RowError("the prompt holds what a server may read as a control token, such as <start_of_turn>")
        return Encoded(None, None)


class ApiEngine:
    """Asks the server in the job's [api] section. `say` reports outages while they last."""

    def __init__(self, job: Job, say: Say) -> None:
        self._settings, self._sampling, self._say = job.api, job.sampling.settings(), say
        self._form = form_of(job)
        own = self._settings.base_url
        self._place = f"api.base_url = {own}" if own else f"api.provider = {self._settings.provider}"

    def identity(self) -> Identity:
        """Return the model's name; which weights the server has behind it is unknown."""
        return Identity(kind="api", model=self._settings.model)

    def encoder(self) -> ApiEncoder:
        """Return an encoder that does not count."""
        return ApiEncoder()

    @contextmanager
    def open(self, until: float = float("inf")) -> Iterator[ApiSession]:
        """Send the server a test question. Raises ModelUnavailable if it is unusable, ApiOutage if down, OutOfTime."""
        began = time.monotonic()
        # Imported here because these import the openai library, which takes a second.
        from gxr_batch.engines.api.openai_client import Client
        from gxr_batch.engines.api.outage import Outage
        from gxr_batch.engines.api.retries import Calls
        from gxr_batch.engines.api.server_faults import Unusable
        from gxr_batch.engines.api.session import ApiSession, loop_in_thread

        settings = self._settings
        outage = Outage(self._place, parse_duration(settings.give_up_after) or 0.0, self._say)
        with ExitStack() as opened:
            try:
                client = Client(settings, self._token(), self._sampling)
                calls = Calls(client, settings, outage, self._form)
                loop = opened.enter_context(loop_in_thread(client))
                refused = self._greeted(asyncio.run_coroutine_threadsafe(calls.greet(), loop), outage, until)
            except Unusable as fault:
                what, step = f"The server {fault.what}.", fault.next_step
                raise ModelUnavailable(what, where=self._place, next_step=step) from None
            yield ApiSession(self._info(began, refused), loop, calls, outage, self._say)

    def _greeted(self, greeting: Future[list[str]], outage: Outage, until: float) -> list[str]:
        while not greeting.done():
            outage.look()
            require_time(until)
            wait([greeting], timeout=_LOOK_SECONDS)
        return greeting.result()

    def _token(self) -> str | None:
        """Return the token from the environment; servers other than Hugging Face get none unless the job names one."""
        settings = self._settings
        if not settings.base_url and is_offline():
            raise ModelUnavailable(
                "Hugging Face cannot be used: HF_HUB_OFFLINE is set.",
                where=self._place,
                next_step="unset HF_HUB_OFFLINE, or set api.base_url to another server",
            )
        if name := settings.token_env:
            token, where = os.environ.get(name, "").strip(), f"api.token_env = {quoted(name)}"
            missing = f"The environment variable {quoted(name)} is {'empty' if name in os.environ else 'not set'}."
            step = f"export {quoted(name)}=..., then run the same command again"
        elif settings.base_url:
            return None
        else:
            token, where = (get_token() or "").strip(), self._place
            missing = "There is no Hugging Face token: HF_TOKEN is not set, and you are not logged in."
            step = "hf auth login, or export HF_TOKEN=..., then run the same command again"
        if not token or not token.isascii() or not token.isprintable():
            wrong = "The token contains characters that are not allowed in a token." if token else missing
            raise ModelUnavailable(wrong, where=where, next_step=step)
        if not settings.base_url and not token.startswith(_OF_HUGGING_FACE):
            raise ModelUnavailable(
                f"This is not a Hugging Face token: those begin with {_OF_HUGGING_FACE}.",
                where=where,
                next_step="use a Hugging Face token; for a provider's token set api.base_url to the provider's address",
            )
        return token

    def _info(self, began: float, refused: list[str]) -> EngineInfo:
        from gxr_batch.engines.api.openai_client import ROUTER

        settings = self._settings
        address, onward = settings.base_url or ROUTER, ""
        if not settings.base_url:
            chosen = settings.provider == "auto"
            provider = "a provider that Hugging Face chooses" if chosen else f"the provider {quoted(settings.provider)}"
            onward = f", and from there to {provider} (api.provider)"
        notices = [
            f"Every prompt is sent to {quoted(address)}{onward}: use findings without identifiers. "
            "The texts are not reproducible."
        ]
        if address.startswith("http://") and not is_loopback(urlsplit(address).hostname or ""):
            notices.append("The address is not https: prompts, texts and the token are sent unencrypted.")
        if proxy_of(address):
            notices.append("Requests go through the proxy set in the environment.")
        if refused:
            keys = ", ".join(f"sampling.{name}" for name in refused)
            notices.append(f"The server refuses {keys} and uses its own default instead.")
        return EngineInfo(
            identity=self.identity(),
            device="server",
            dtype=None,
            quantization=None,
            slots=settings.concurrency,
            load_seconds=time.monotonic() - began,
            reproducible=False,
            versions={name: version(name) for name in ("openai", "httpx2", "tenacity")},
            notices=tuple(notices),
        )
