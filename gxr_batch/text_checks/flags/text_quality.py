"""Checks of a text apart from its findings: empty, cut off, repetitive, not English, a refusal, a copy of its prompt.

Also whether it claims to have looked at an image, and chat markers: in a text they leaked from the model, in a cell
they may be an attempt to steer it.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import eq

from gxr_batch.text_checks.flags.evidence import MAX_CHARS, Reading
from gxr_batch.text_checks.flags.lexicon import WORDS

_TAG = re.compile(r"</?[A-Za-z][^<>]{0,60}>")
# A sentence ends with a mark, optionally followed by closing quotes, brackets and markup.
_SENTENCE_END = re.compile("[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019\u00bb)\\]*_`~\\s]*\\Z")
_LIST_NUMBER = re.compile(r"(?:\A|\n)\s*\d{1,3}[.)]\Z")
_TAIL = 40  # characters at the end that are searched for the end of a sentence

_FEW_TRIGRAMS = 15
_DISTINCT_TRIGRAMS = 0.6  # prose is above 0.9, a loop that fills half of the text below 0.6
_SENTENCE_WORDS = 4
_SENTENCE_REPEATS = 3
_WORD_REPEATS = 4
_SENTENCE_RUN = 4  # consecutive sentences of any length
_DENSE_CHARS = 200
_DENSE_RATIO = 4.0  # zlib compresses prose of this length to about half

_NOT_LATIN = re.compile(r"[^\W\d_a-zA-ZÀ-ɏ]")
_GREEK = re.compile("[\u0370-\u03ff\u1f00-\u1fff]")  # Greek letters and words occur in English texts
_NOT_LATIN_SHARE, _GREEK_LETTERS, _OTHER_LETTERS = 0.25, 25, 4
_ENGLISH = WORDS["language.english"]
_ENGLISH_SHARE = 0.1
_FEW_WORDS, _MANY_WORDS = 8, 20  # terse English has no small words, but no accents either
_FOREIGN = WORDS["language.foreign"]
_FOREIGN_KINDS, _FOREIGN_WORDS = 3, 5


def is_empty(reading: Reading) -> bool:
    """Return whether a text has no word, apart from markup."""
    text = _TAG.sub(" ", reading.text) if "<" in reading.text else reading.text
    return not any(map(str.isalpha, text))


def is_cut(reading: Reading) -> bool:
    """Return whether a text reached its token limit and does not end like a sentence."""
    return reading.evidence.finish_reason == "length" and stops_mid_sentence(reading.evidence.text)


def stops_mid_sentence(text: str) -> bool:
    """Return whether a text does not end like a sentence."""
    tail = text.rstrip()[-_TAIL:]
    return _SENTENCE_END.search(tail) is None or _LIST_NUMBER.search(tail) is not None


def repeats(reading: Reading) -> bool:
    """Return whether a text is repetitive: few distinct word triples, or a sentence or word again and again."""
    words = reading.words
    if _has_few_triples(words):
        return True
    again = bytes(map(eq, words, words[1:]))  # 1 if a word equals the previous one
    if b"\1\1" in again and any(
        word.isalpha() for word, one, two in zip(words, again, again[1:], strict=False) if one and two
    ):
        return _in_a_row(words)
    if _TWICE.search(reading.new):
        return True
    sentences = [tuple(sentence) for sentence in reading.sentences]
    if len(sentences) - len(set(sentences)) >= _SENTENCE_REPEATS - 1:
        long = Counter(sentence for sentence in sentences if len(sentence) > _SENTENCE_WORDS)
        if max(long.values(), default=0) >= _SENTENCE_REPEATS:
            return True
        runs = zip(*(sentences[shift:] for shift in range(_SENTENCE_RUN)), strict=False)
        if any(len(set(run)) == 1 for run in runs):
            return True
    few_words = len(words) * 10 < len(reading.new)  # prose has a word or mark in every five characters
    return few_words and len(reading.new) >= _DENSE_CHARS and _density(reading.new) > _DENSE_RATIO


# "irritation and irritation"
_TWICE = re.compile(r"\b([a-z]{5,}) (?:and|or) \1\b", re.IGNORECASE)


def _has_few_triples(words: list[str]) -> bool:
    triples = len(words) - 2
    enough = _DISTINCT_TRIGRAMS * triples
    # Counting pairs takes half the time, and each pair except the last begins a triple.
    if triples < _FEW_TRIGRAMS or len(set(pairwise(words))) - 1 >= enough:
        return False
    return len(set(zip(words, words[1:], words[2:], strict=False))) < enough


def _in_a_row(words: list[str]) -> bool:
    run = 1
    for before, word in pairwise(words):
        run = run + 1 if word == before and word.isalpha() else 1
        if run >= _WORD_REPEATS:
            return True
    return False


def _density(text: str) -> float:
    raw = text.encode("utf-8", "replace")
    return len(raw) / len(zlib.compress(raw, 1))


def is_foreign(reading: Reading) -> bool:
    """Return whether a text, or much of it, is in another script or has the small words of another language."""
    if not reading.new.isascii():
        strange = len(_NOT_LATIN.findall(reading.new))
        greek = len(_GREEK.findall(reading.new)) if strange else 0
        if greek >= _GREEK_LETTERS or strange - greek >= _OTHER_LETTERS:
            return True
        if strange and strange >= _NOT_LATIN_SHARE * sum(map(str.isalpha, reading.new)):
            return True
    kinds = _FOREIGN & reading.vocabulary
    if len(kinds) >= _FOREIGN_KINDS and sum(word in kinds for word in reading.words) >= _FOREIGN_WORDS:
        return True
    if len(_ENGLISH & reading.vocabulary) >= _FEW_WORDS:
        return False
    spoken = [word for word in reading.words if word[0].isalpha()]
    enough = len(spoken) >= (_MANY_WORDS if reading.new.isascii() else _FEW_WORDS)
    return enough and sum(word in _ENGLISH for word in spoken) < _ENGLISH_SHARE * len(spoken)


_ABLE = (
    r"(?:\w+ ){0,2}(?:provid|offer|giv|interpret|analy[sz]|assist|help|diagnos|view|see|access|process|compl|fulfil|"
    r"answer|generat|creat|read|perform|examin|review|mak|discuss)"
)
_REFUSALS = re.compile(
    r"\b(?:as an ai\b|as a (?:large )?language model|i(?:'m| am) (?:just |only )?an? (?:ai|language model|artificial)|"
    rf"(?:i|we) (?:can't|cannot|can not|won't|will not|am unable to|am not able to) {_ABLE}|"
    rf"i'm (?:unable|not able) to {_ABLE}|"
    rf"i (?:won't|will not) be able to {_ABLE}|"
    r"i (?:must|have to|need to) (?:decline|refuse)|i decline\b|"
    r"i (?:do not|don't) have (?:access|the (?:ability|capability|capacity|expertise|means)|any (?:ability|access))|"
    r"i(?:'m| am) not (?:qualified|authori[sz]ed|allowed|permitted|a (?:doctor|physician|radiologist|medical))|"
    rf"(?:not possible|impossible) for me to {_ABLE}|"
    r"(?:sorry|apologi[sz]e|unfortunately) (?:, )?(?:but )?(?:, )?(?:i |we )?(?:can't|cannot|can not))"
)
_SPEAKERS = frozenset({"i", "i'm", "we", "ai", "language", "sorry", "apologize", "apologise", "me"})

_IMAGE = r"(?:image|picture|photo|photograph|figure|scan|x ray|xray|radiograph|film|radiographic image)s?"
_KIND = r"(?:(?:chest|medical|x ray|xray|radiographic|frontal|same) )*"
_SEEING = re.compile(
    rf"\b(?:(?:provided|attached|uploaded|submitted|shared|enclosed|supplied|accompanying) {_KIND}{_IMAGE}\b"
    r"(?! (?:findings?|descriptions?|reports?|results?|information))|"
    rf"{_IMAGE} (?:that |which )?you (?:have |'ve )?(?:provided|shared|uploaded|attached|sent|submitted|posted|gave)|"
    r"(?:image|picture|photo|figure)s? (?:is |are |was )?(?:shown |displayed |attached |provided |uploaded )?"
    r"(?:above|below|here|provided|attached|uploaded)\b|"
    rf"(?:above|following) {_KIND}(?:image|picture|photo|figure)\b|"
    rf"i (?:can |could |also |clearly )*(?:see|observe|notice)\b[^.;!?\n]{{0,80}}\b{_IMAGE}\b|"
    r"(?:looking at|reviewing|examining|inspecting|review of|inspection of|examination of|"
    r"having (?:reviewed|examined|seen)|based on) (?:the |this |your |these )?"
    rf"{_KIND}(?:image|picture|photo|figure)s?\b|"
    rf"i (?:have |'ve )?(?:reviewed|examined|looked at|analy[sz]ed|inspected|seen) (?:\w+ ){{0,3}}{_IMAGE}\b|"
    r"i've (?:reviewed|examined|looked at|analy[sz]ed|inspected|seen)\b|"
    r"thank(?:s| you) for (?:sharing|providing|sending|uploading|submitting)|"
    r"as (?:you can see|can be seen|seen|shown) (?:here )?(?:in|on) (?:the |this )?(?:image|picture|photo|figure)\b)"
)
_SEEN_THINGS = WORDS["image.cues"]
_FIGURE = re.compile(r"\bfig(?:ure)?s?\.?\s?\d", re.IGNORECASE)
_FIGURES = frozenset({"fig", "figs", "figure", "figures"})
_TELLING = WORDS["image.telling"]


def refuses(reading: Reading) -> bool:
    """Return whether a text declines the task or speaks as an AI."""
    return not _SPEAKERS.isdisjoint(reading.vocabulary) and _any(_REFUSALS, reading.sentences, _SPEAKERS)


def claims_to_see(reading: Reading) -> bool:
    """Return whether a text claims to have looked at an image, other than in advice on how to look."""
    if not _FIGURES.isdisjoint(reading.vocabulary) and _FIGURE.search(reading.new):
        return True
    if _SEEN_THINGS.isdisjoint(reading.vocabulary):
        return False
    return _any(_SEEING, (words for words in reading.sentences if _TELLING.isdisjoint(words)), _SEEN_THINGS)


def _any(pattern: re.Pattern[str], sentences: Iterable[Sequence[str]], cues: frozenset[str]) -> bool:
    return any(not cues.isdisjoint(words) and pattern.search(" ".join(words)) for words in sentences)


_LONG_CELL = 12  # characters; a shorter cell may occur in the instruction by chance
_INSTRUCTION_WORDS, _REST_WORDS = 4, 8  # in a whole sentence; in the rest of one after a cell
_FIRST_WORDS = 6  # of a sentence, since the rest may come from the row
_COPY_CHARS = 60
_COPY_SHARE = 0.7
# Models invent this once they have learnt how prompts begin.
_NEW_ROLE = re.compile(r"(?:\A|[.!?:\n])\s{0,4}you are an? ")
_STOPS = " \t\r\n.,;:?!"


def echoes(reading: Reading) -> bool:
    """Return whether a text contains a sentence of the instruction, or is mostly a copy of one cell."""
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
    """Return a cell as templates print it: without surrounding spaces and its final mark."""
    return cell.strip().rstrip(_STOPS)


def _instruction(prompt: str, cells: list[str]) -> list[str]:
    """Return the sentences, or pieces of them, before the first and after the last cell.

    The words that introduce findings ("The X-ray shows ...") may also begin an answer, so they do not count.
    """
    places = [(place, place + len(cell)) for cell in cells if (place := prompt.find(cell)) >= 0]
    first, last = (min(places)[0], max(places)[1]) if places else (len(prompt), len(prompt))
    rest, *sentences = _sentences(prompt[last:])
    found = [rest] if rest.count(" ") >= _REST_WORDS else []
    sentences += _sentences(prompt[:first])
    for sentence in sentences:
        words = sentence.split(" ", _FIRST_WORDS)
        if len(words) >= _INSTRUCTION_WORDS and words[0] != "the":
            found.append(" ".join(words[:_FIRST_WORDS]).rstrip(_STOPS))
    return found


def _sentences(text: str) -> list[str]:
    for mark in ("? ", "! ", ": ", "\n"):
        if mark in text:
            text = text.replace(mark, ". ")
    return text.casefold().split(". ")


_CONTROL = re.compile(
    r"<(?:start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token|bos|eos|pad|unk|mask|s|/s|unused\d+"
    r"|\|[a-z_0-9]{1,30}\|?)>|\[/?INST\]|<</?SYS>>",
    re.IGNORECASE,
)
# A role alone on its line is left over from a turn without its markers; with a colon it is a chat transcript.
_ROLE_LINE = re.compile(
    r"^[ \t]*(?:(?:user|model|assistant)[ \t]*:?[ \t]*$|(?:user|assistant|human)[ \t]*:)", re.IGNORECASE | re.MULTILINE
)
_ROLES = frozenset({"user", "model", "assistant", "human"})


def leaks_markers(reading: Reading) -> bool:
    """Return whether a text contains control tokens or lines that only name a role."""
    text = reading.text
    if ("<" in text or "[" in text) and _CONTROL.search(text):
        return True
    return not _ROLES.isdisjoint(reading.vocabulary) and _ROLE_LINE.search(reading.new) is not None


def input_has_control_tokens(reading: Reading) -> bool:
    """Return whether a cell of the row contains a control token of a language model."""
    for value in reading.evidence.values.values():
        cell = value if isinstance(value, str) else "" if value is None else str(value)
        if ("<" in cell or "[" in cell) and _CONTROL.search(cell[:MAX_CHARS]):
            return True
    return False
