"""Whether a text says its prompt back: the instruction, or the findings with next to nothing else."""

from __future__ import annotations

import re

from gxr_batch.text_checks.flags.evidence import Reading

_LONG_CELL = 12  # characters; a shorter cell may stand in the instruction by chance
_SENTENCE_WORDS, _REST_WORDS = 4, 8  # of a whole sentence; of what is left of one after a cell
_FIRST_WORDS = 6  # of a sentence, since what follows may be worded by the row
_COPY_CHARS = 60
_COPY_SHARE = 0.7
# What models make up once they have learnt how prompts begin.
_NEW_ROLE = re.compile(r"(?:\A|[.!?:\n])\s{0,4}you are an? ")
_STOPS = " \t\r\n.,;:?!"


def echoes(reading: Reading) -> bool:
    """Say whether a text holds a sentence of the instruction, or is for the most part a copy of one cell."""
    text, prompt = reading.text, reading.prompt
    if reading.says_prompt:
        return True
    if not prompt:
        return False
    cells = [_bare(value) for value in reading.evidence.values.values() if isinstance(value, str)]
    long = [cell for cell in cells if len(cell) >= _LONG_CELL]
    shown = text.casefold()
    if any(piece in shown for piece in _instruction(prompt, long)):
        return True
    if "you are a" in shown and _NEW_ROLE.search(shown) and _NEW_ROLE.match(prompt.casefold()):
        return True
    return any(len(cell) >= _COPY_CHARS and len(cell) >= _COPY_SHARE * len(text) and cell in text for cell in long)


def _bare(cell: str) -> str:
    """Return a cell as templates print it: without blanks around it and the mark that ends it."""
    return cell.strip().rstrip(_STOPS)


def _instruction(prompt: str, cells: list[str]) -> list[str]:
    """Return the sentences, or pieces of them, that stand before the first and after the last cell.

    What tells that findings follow ("The X-ray shows ...") is how an answer may begin, so it does not count.
    """
    places = [(place, place + len(cell)) for cell in cells if (place := prompt.find(cell)) >= 0]
    first, last = (min(places)[0], max(places)[1]) if places else (len(prompt), len(prompt))
    rest, *sentences = _sentences(prompt[last:])
    found = [rest] if rest.count(" ") >= _REST_WORDS else []
    sentences += _sentences(prompt[:first])
    for sentence in sentences:
        words = sentence.split(" ", _FIRST_WORDS)
        if len(words) >= _SENTENCE_WORDS and words[0] != "the":
            found.append(" ".join(words[:_FIRST_WORDS]).rstrip(_STOPS))
    return found


def _sentences(text: str) -> list[str]:
    for mark in ("? ", "! ", ": ", "\n"):
        if mark in text:
            text = text.replace(mark, ". ")
    return text.casefold().split(". ")
