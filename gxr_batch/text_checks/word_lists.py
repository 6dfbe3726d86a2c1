"""Reads the word lists of the rules from TOML files, so that lists can be extended without changing Python code.

The files are flags/lexicon.toml and identifiers/words.toml; each is read once, when its rules are imported.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def read_tables(name: str) -> dict[str, Any]:
    """Return the tables of a file of word lists, such as "flags/lexicon.toml"."""
    return tomllib.loads(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def word_sets(tables: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """Return each list of each table as a set, by its full name: "status.hedges"."""
    return {
        f"{table}.{name}": frozenset(words.split())
        for table, lists in tables.items()
        for name, words in lists.items()
        if isinstance(words, str)
    }


def sets_by_word(lists: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Return the lists by each word of their names: "oedema edema" is the name of a list for either word."""
    by_word: dict[str, frozenset[str]] = {}
    for name, words in lists.items():
        for word in name.split():
            by_word[word] = by_word.get(word, frozenset()) | frozenset(words.split())
    return by_word


def names_by_word(lists: Mapping[str, str]) -> dict[str, str]:
    """Return, for each word, the name of the list that it is in."""
    return {word: name for name, words in lists.items() for word in words.split()}


def either(words: Iterable[str]) -> str:
    """Return a pattern that matches any of the words."""
    return "|".join(map(re.escape, words))
