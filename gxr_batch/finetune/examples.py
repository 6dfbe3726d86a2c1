"""Reads training data into examples, encodes them, and splits off the held-out rows.

There are three kinds of sources: chat lines as written by `export --format chat-jsonl`, lines of template fields with
an answer, and run folders with approved rows. Prompts are rendered and encoded as in `run`, followed by the answer and
its end token. Errors name the file and line, never the text. Rows are held out by the hashes of their prompts, so that
file order and new rows move no row to the other side, and no prompt is on both sides.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gxr_batch.cells import quoted
from gxr_batch.disk import expanded, storage_errors
from gxr_batch.errors import JobFileError, RowError, RunError, TableError, TemplateError
from gxr_batch.files import MOST_TEXT_BYTES, open_plain
from gxr_batch.forms import form_of
from gxr_batch.job import FinetuneSection, Job
from gxr_batch.ledger import is_run
from gxr_batch.ledger.reviews import review_files
from gxr_batch.prompts import Template, Templates
from gxr_batch.prompts.render import render
from gxr_batch.records import Messages, Role, Turn

if TYPE_CHECKING:
    from gxr_batch.models.tokens import ChatEncoder


# Written to the run folder by `export --format chat-jsonl`.
APPROVED = "approved-chat.jsonl"
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "model"}
_OWN_KEYS = ("template", "answer", "metadata")
_GLOB = frozenset("*?[")
_LINES_NAMED = 5


class Example(NamedTuple):
    """A prompt and the answer to train on; `where` names its file and line."""

    messages: Messages
    answer: str
    where: str


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file that was read, with its sha256 (hex) and number of examples."""

    path: Path
    sha256: str
    rows: int


class _InvalidLine(Exception):
    """A line is invalid; the message gives the reason and never quotes the line."""


def read_examples(job: Job) -> tuple[list[Example], list[DataFile]]:
    """Return all examples of `finetune.data`, in order, and the files they came from.

    Raises JobFileError and RunError for a source that cannot be used, TableError for invalid lines, TemplateError.
    """
    templates = Templates(job.prompt, form_of(job))
    examples: list[Example] = []
    files: list[DataFile] = []
    wrong: list[tuple[str, str]] = []
    for path in _files(job.finetune.data):
        text, sha256 = _text_of(path)
        before = len(examples)
        # Not splitlines(), which also splits at characters that a JSON text may hold.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{quoted(path)}, line {number}"
            try:
                messages, answer = _example(line, templates, job.prompt.system)
                examples.append(Example(messages, answer, where))
            except _InvalidLine as error:
                wrong.append((where, str(error)))
        files.append(DataFile(path=path, sha256=sha256, rows=len(examples) - before))
    if wrong:
        raise _refusal(wrong)
    return examples, files


def _refusal(wrong: Sequence[tuple[str, str]]) -> TableError:
    first, *others = wrong
    where = first[0]
    if others:
        named = "; ".join(place for place, _ in others[: _LINES_NAMED - 1])
        left = len(others) - (_LINES_NAMED - 1)
        where += f" (also {named}" + (f" and {left:,} more)" if left > 0 else ")")
    return TableError(f"A line of the training data {first[1]}.", where=where, next_step="fix or remove it")


# ---------------------------------------------------------------------- sources


def _files(sources: Sequence[str]) -> Iterator[Path]:
    """Yield the files of `finetune.data`, each once, in order."""
    if not sources:
        raise JobFileError(
            "There is no training data.",
            where="finetune.data",
            next_step='name files or run folders, e.g. [finetune] data = ["outputs/my-run", "more.jsonl"]',
        )
    seen: set[Path] = set()
    for source in sources:
        for path in matches(source):
            folder = path.parent if path.name == APPROVED and is_run(path.parent) else path
            file = _approved_rows(folder) if folder.is_dir() else path
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def matches(source: str) -> list[Path]:
    """Return the files and folders that an entry of `finetune.data` matches. Raises JobFileError if there are none."""
    path = expanded(source)
    if path.exists():
        return [path]
    if _GLOB & set(source):
        base = Path(path.anchor or ".")
        try:
            found = sorted(base.glob(str(path.relative_to(base))))
        except ValueError:  # "**" is a whole part of a path, or an error
            found = []
        if found:
            return found
    raise JobFileError(
        "The training data does not exist.",
        where=f"finetune.data: {path.absolute()}",
        next_step="check the path; relative paths start at the current directory",
    )


def _approved_rows(folder: Path) -> Path:
    """Return the file with the approved rows of a run folder. Raises RunError if it is missing or outdated.

    Only the export decides which rows are approved; the command runs it first.
    """
    if not is_run(folder):
        raise RunError(
            "The folder is not a run folder.",
            where=f"finetune.data: {folder.absolute()}",
            next_step="name a run folder such as outputs/demo, or JSONL files, e.g. data/*.jsonl",
        )
    file = folder / APPROVED
    export = f"gxr-batch export {folder} --format chat-jsonl"
    if not file.is_file():
        raise RunError("The run's approved rows are not exported yet.", where=str(file.absolute()), next_step=export)
    with storage_errors(file):
        open_plain(file).close()
    if max((path.stat().st_mtime for path in review_files(folder)), default=0.0) > file.stat().st_mtime:
        raise RunError(
            "The run was reviewed after its approved rows were exported.",
            where=str(file.absolute()),
            next_step=export,
        )
    return file


def _text_of(path: Path) -> tuple[str, str]:
    """Return a file's text and sha256. Raises TableError if it cannot be read."""
    try:
        with open_plain(path, links=True) as file:
            data = file.read()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TableError(
            f"The training data cannot be read: {reason}.",
            where=str(path.absolute()),
            next_step="name a JSONL file that you can read, or a run folder",
        ) from None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n"), hashlib.sha256(data).hexdigest()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    raise TableError(
        "The training data is not UTF-8 text.",
        where=f"{path.absolute()}, line {line:,}",
        next_step="save the file as UTF-8",
    )


# ---------------------------------------------------------------------- lines


def _example(line: str, templates: Templates, system: str) -> tuple[Messages, str]:
    """Return prompt and answer of one line. Raises _InvalidLine."""
    if len(line) > MOST_TEXT_BYTES:
        raise _InvalidLine(f"is longer than {MOST_TEXT_BYTES >> 20} MiB, far more than a model is trained on")
    try:
        entry = json.loads(line)
    except RecursionError:
        raise _InvalidLine("has values that are nested too deeply") from None
    except ValueError:
        raise _InvalidLine("is not valid JSON") from None
    if not isinstance(entry, dict):
        raise _InvalidLine("is not a JSON object")
    if "messages" in entry:
        return _from_chat(entry["messages"])
    if "answer" in entry:
        return _from_fields(entry, templates, system)
    raise _InvalidLine('has neither "messages" nor "answer"')


def _from_chat(messages: Any) -> tuple[Messages, str]:
    """Return the prompt's turns, and the last turn, which must be the assistant's, as the answer."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _InvalidLine('has "messages" that are not a list of objects')
    turns = []
    for message in messages:
        role, content = message.get("role"), _content(message.get("content"))
        if not isinstance(role, str) or role not in _ROLES or not isinstance(content, str):
            raise _InvalidLine(
                'has a message without a known "role" (system, user, assistant) or without text in "content"'
            )
        turns.append(Turn(_ROLES[role], content))
    talk = turns[1:] if turns and turns[0].role == "system" else turns
    asked = [turn.role for turn in talk]
    if not asked or len(asked) % 2 or asked != ["user", "model"] * (len(asked) // 2):
        raise _InvalidLine("has messages that do not alternate between user and assistant, ending with the assistant")
    return Messages(tuple(turns[:-1]), "chat"), _answer(turns[-1].text)


def _content(value: Any) -> Any:
    """Return a content that is a list of text parts as one text; anything else stays as it is.

    Raises _InvalidLine for an image or another part that is no text.
    """
    if not isinstance(value, list) or not value:
        return value
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise _InvalidLine("has a message with a part that is no text; only the text side of a model is trained")
        texts.append(text)
    return "\n".join(texts)


def _from_fields(entry: dict[str, Any], templates: Templates, system: str) -> tuple[Messages, str]:
    """Return the prompt that a row with these cells would have, and its answer."""
    template = _template(entry.get("template"), templates)
    values = {name: value for name, value in entry.items() if name in template.fields and name not in _OWN_KEYS}
    odd = [name for name, value in values.items() if not isinstance(value, str | int | float | None)]
    if odd:
        raise _InvalidLine(f"has a field that is neither text nor a number: {quoted(odd[0])}")
    try:
        return render(template, values, system=system), _answer(entry["answer"])
    except RowError as error:
        raise _InvalidLine(f"cannot be rendered: {error.what}") from None


def _template(name: Any, templates: Templates) -> Template:
    if name is None or name == "":
        return templates.default
    try:
        return templates.get(str(name))
    except TemplateError:
        raise _InvalidLine(
            f"names a template that does not exist (known: {', '.join(map(quoted, templates.available()))})"
        ) from None


def _answer(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise _InvalidLine("has an empty answer, or one that is not text")
    return text.strip()


# ---------------------------------------------------------------------- token ids


class TrainingRow(NamedTuple):
    """An encoded example. The first `prompt_tokens` of `input_ids` are the prompt; the loss is over the rest."""

    messages: Messages
    answer: str
    input_ids: list[int]
    prompt_tokens: int

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's ids, as `run` would encode them."""
        return self.input_ids[: self.prompt_tokens]

    @property
    def labels(self) -> list[int]:
        """The training labels: -100 in the prompt (ignored), the ids of the answer and its end token after it."""
        return [-100] * self.prompt_tokens + self.input_ids[self.prompt_tokens :]


class Rows(NamedTuple):
    """Training rows, held-out rows, and the places of examples that are too long and left out."""

    training: list[TrainingRow]
    held_out: list[TrainingRow]
    too_long: list[str]

    @property
    def sha256(self) -> str:
        """The sha256 (hex) of all rows, in order."""
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            for row in part:
                digest.update(json.dumps([row.prompt_tokens, row.input_ids]).encode())
            digest.update(b"\n")
        return digest.hexdigest()


def encode(
    examples: Iterable[Example], encoder: ChatEncoder, max_seq_length: int
) -> tuple[list[TrainingRow], list[str]]:
    """Return the rows that fit in `max_seq_length` tokens, and the places of those that do not. Raises TableError."""
    rows: list[TrainingRow] = []
    too_long: list[str] = []
    for example in examples:
        try:
            prompt = encoder.encode(example.messages).token_ids or []
            answer = encoder.encode_answer(example.answer)
        except RowError as error:
            raise TableError(
                f"A line of the training data cannot be encoded: {error.what}.",
                where=example.where,
                next_step="fix or remove it",
            ) from None
        if len(prompt) + len(answer) > max_seq_length:
            too_long.append(example.where)
        else:
            rows.append(TrainingRow(example.messages, example.answer, prompt + answer, len(prompt)))
    return rows, too_long


def steps_of(section: FinetuneSection, rows: int) -> int:
    """Return the number of optimizer steps for this many rows; the last step of an epoch may be smaller."""
    if section.steps is not None:
        return section.steps
    batches = math.ceil(rows / section.batch_size)
    return max(1, math.ceil((section.epochs or 0) * math.ceil(batches / section.gradient_accumulation_steps)))


def split(rows: Sequence[TrainingRow], share: float, seed: int) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Return training and held-out rows, each in the given order; rows with the same prompt stay together.

    Raises JobFileError if no training row would be left.
    """
    keys = [hashlib.sha256(json.dumps([seed, row.prompt_ids]).encode()).hexdigest() for row in rows]
    wanted = max(1, round(share * len(rows))) if share else 0
    last = sorted(keys)[wanted - 1] if 0 < wanted <= len(keys) else ""
    training = [row for row, key in zip(rows, keys, strict=True) if key > last]
    held_out = [row for row, key in zip(rows, keys, strict=True) if key <= last]
    if not training:
        raise JobFileError(
            f"There are too few rows for training: {len(rows)}, of which {len(held_out)} would be held out.",
            where="finetune.data, finetune.held_out",
            next_step="add data, or set finetune.held_out = 0",
        )
    return training, held_out
