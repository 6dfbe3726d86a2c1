"""The interactive mode of `gxr-batch generate`: reads questions, prints answers, runs slash commands.

Ctrl-C stops the current answer. Ctrl-D or /quit ends the conversation.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from gxr_batch.chat import Question
from gxr_batch.cli.streams import safe
from gxr_batch.engines.base import StopRequest
from gxr_batch.errors import GxrError
from gxr_batch.records import DISCLAIMER

if TYPE_CHECKING:
    from gxr_batch.chat import Conversation

_HELP = """/reset         start a new conversation; the system text stays
/system TEXT   set the system text and start a new conversation; without TEXT, show it
/save FILE     write the conversation as JSON
/help          show this
/quit          quit (also Ctrl-D); Ctrl-C stops an answer"""
_ROLES = {"system": "system", "user": "user", "model": "assistant"}


def talk(conversation: Conversation, first: Question | None = None) -> None:
    """Answer questions from stdin until the user quits; `first` is answered before any is read."""
    click.echo(f"{DISCLAIMER}\n/help lists the commands.")
    with suppress(ImportError):  # line editing and history, if the platform has them
        import readline  # noqa: F401
    if first is not None:
        click.echo(f"> {first.text}")
        _answer(conversation, first)
    for line in _lines():
        if line.startswith("/"):
            if not _command(conversation, line):
                return
        else:
            _answer(conversation, Question(line))


def _lines() -> Iterator[str]:
    """Yield the lines that the user types, except empty ones, until Ctrl-D."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\n(type /quit or press Ctrl-D to quit)")
            continue
        if line:
            yield line


def _answer(conversation: Conversation, question: Question) -> None:
    try:
        with _interruptible() as stop:
            done = conversation.ask(question, lambda piece: click.echo(piece, nl=False), stop)
    except GxrError as error:
        click.echo(safe(f"Error: {error}"), err=True)
        return
    if done is None:
        click.echo("\n[stopped]")
    elif done.error is not None:
        click.echo(f"[no answer: {done.error}]")
    else:
        counted = ""
        if done.new_tokens is not None and done.seconds_generating > 0:
            counted = f", {done.new_tokens} tokens, {done.new_tokens / done.seconds_generating:.1f} tok/s"
        cut = ", cut off by max_new_tokens" if done.finish_reason == "length" else ""
        click.echo(f"\n[AI-generated{counted}{cut}]")


@contextmanager
def _interruptible() -> Iterator[StopRequest]:
    """Make Ctrl-C stop the stream cleanly inside the block."""
    stop = StopRequest()

    def on(number: int, frame: FrameType | None) -> None:
        stop.now()

    before = signal.signal(signal.SIGINT, on)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _command(conversation: Conversation, line: str) -> bool:
    """Run one command; return False to end the conversation."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in {"/quit", "/exit"}:
        return False
    if name == "/reset":
        conversation.reset()
        click.echo("[new conversation]")
    elif name == "/system":
        _set_system(conversation, rest)
    elif name == "/save":
        _save(conversation, rest)
    elif name == "/help":
        click.echo(_HELP)
    else:
        click.echo(safe(f"Unknown command {name[:80]}.\n{_HELP}"), err=True)
    return True


def _set_system(conversation: Conversation, text: str) -> None:
    if text:
        conversation.system = text
        conversation.reset()
        click.echo("[system text set; new conversation]")
    else:
        click.echo(conversation.system or "[no system text]")


def _save(conversation: Conversation, name: str) -> None:
    """Write the conversation to a file. An existing file is never replaced."""
    if not name:
        click.echo("/save needs a file name.", err=True)
        return
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    identity = conversation.info.identity
    content = {
        "ai_generated": True,
        "disclaimer": DISCLAIMER,
        "model": identity.model,
        "model_revision": identity.revision,
        "adapter": identity.adapter,
        "messages": [*system, *({"role": _ROLES[turn.role], "content": turn.text} for turn in conversation.turns)],
    }
    path = Path(name)
    try:
        path = path.expanduser()
        data = (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "backslashreplace")
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        click.echo(safe(f"{path} already exists; choose another name."), err=True)
    except RuntimeError:
        click.echo("The home folder meant by ~ is unknown; write the path without it.", err=True)
    except (OSError, ValueError) as error:
        click.echo(safe(f"{path} cannot be written: {getattr(error, 'strerror', None) or 'invalid name'}."), err=True)
    else:
        click.echo(f"[saved to {path}]")
