"""What the shape of a text tells without its meaning: empty, cut off, running in circles, of another language."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from itertools import pairwise
from operator import eq

from gxr_batch.text_checks.flags.evidence import Reading
from gxr_batch.text_checks.flags.sentences import word_set

_TAG = re.compile(r"</?[A-Za-z][^<>]{0,60}>")
# A sentence ends with its mark, after which quotes, brackets and markup may close.
_SENTENCE_END = re.compile("[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019\u00bb)\\]*_`~\\s]*\\Z")
_LIST_NUMBER = re.compile(r"(?:\A|\n)\s*\d{1,3}[.)]\Z")
_TAIL = 40  # characters from the end that are looked at for the end of a sentence

_FEW_TRIGRAMS = 15
_DISTINCT_TRIGRAMS = 0.6  # prose has above 0.9, a loop that fills half of the text less than 0.6
_SENTENCE_WORDS = 4
_SENTENCE_REPEATS = 3
_WORD_REPEATS = 4
_SENTENCE_RUN = 4  # of sentences of any length, one after the other
_DENSE_CHARS = 200
_DENSE_RATIO = 4.0  # zlib makes prose of this length about half as long

_NOT_LATIN = re.compile(r"[^\W\d_a-zA-ZÀ-ɏ]")
_GREEK = re.compile("[\u0370-\u03ff\u1f00-\u1fff]")  # letters and words of it stand in English texts
_NOT_LATIN_SHARE, _GREEK_LETTERS, _OTHER_LETTERS = 0.25, 25, 4
_ENGLISH = word_set(
    "the of and a an in is are was to with without no not on at for by from this that it as or there be has have "
    "had which can may but if than then these its will would should be been patient findings finding shows seen "
    "present normal clear lung lungs heart chest right left upper lower lobe lobes small large mild moderate "
    "effusion effusions pneumothorax consolidation opacity opacities nodule nodules mass size ribs rib bones "
    "angles sharp free enlarged intact trachea central pleura pleural diaphragm both bilateral fracture line "
    "lines tube ray film study i you we see what when also other one two three more most"
)
_ENGLISH_SHARE = 0.1
_FEW_WORDS, _MANY_WORDS = 8, 20  # English in telegram style has no small words, but no accents either
# Frequent small words of Spanish, French, German, Italian, Portuguese and Dutch that are no English words.
_FOREIGN = word_set(
    "el los las del que con para por una un se y est de des du le la les et dans avec sur pour une sont aux der "
    "das und ist mit nicht ein eine auf für im zu sind den dem von des wird es sich gli della nel nella che è di "
    "il lo al os da em um uma não com ao na het een van niet met voor zijn op wordt más está son más sin au il ou"
)
_FOREIGN_KINDS, _FOREIGN_WORDS = 3, 5


def is_empty(reading: Reading) -> bool:
    """Say whether a text has no word, apart from markup."""
    text = _TAG.sub(" ", reading.text) if "<" in reading.text else reading.text
    return not any(map(str.isalpha, text))


def is_cut(reading: Reading) -> bool:
    """Say whether a text met its token limit and does not end as a sentence does."""
    if reading.evidence.finish_reason != "length":
        return False
    tail = reading.evidence.text.rstrip()[-_TAIL:]
    return _SENTENCE_END.search(tail) is None or _LIST_NUMBER.search(tail) is not None


def repeats(reading: Reading) -> bool:
    """Say whether a text runs in circles: few distinct word triples, a sentence or a word again and again."""
    words = reading.words
    if _has_few_triples(words):
        return True
    again = bytes(map(eq, words, words[1:]))  # 1 where a word is the one before it
    if b"\1\1" in again and any(
        word.isalpha() for word, one, two in zip(words, again, again[1:], strict=False) if one and two
    ):
        return _in_a_row(words)
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


def _has_few_triples(words: list[str]) -> bool:
    triples = len(words) - 2
    enough = _DISTINCT_TRIGRAMS * triples
    # Pairs are counted in half the time, and each but the last begins a triple of its own.
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
    """Say whether a text, or a good part of it, is in another script or has the small words of another language."""
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
