"""A program that reads a tokenizer and renders chat templates, to be run in a child process with limits.

A library that aborts, never ends, or takes all of the memory then ends the child. What is merely wrong is left to the
real loader. Standard input: JSON with `tokenizer`, the path of a tokenizer.json or null, `templates`, their texts, and
`memory`, bytes. Standard output: the step that has begun. It imports nothing of this package, so that it starts fast.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

_TOKENIZER_SECONDS, _TEMPLATE_SECONDS = 60, 3  # of CPU time, far more than any takes
# Something of each kind: blanks, letters with accents, digits, signs, other scripts, one letter often.
_TEXTS = (
    "a b",
    "".join(map(chr, range(32, 127))) * 2,
    "Röntgen-Thorax:\n\n\t3,5 cm, naïve; «où»…  胸部X線 грудь صدر ہے 😀",
    " ".join(["opacity in the left lower lobe, unchanged since 12/03/2019."] * 20),
    "a" * 2000,
)
_MOST_TOKENS = 40  # for each character; a byte-level vocabulary needs at most four
_TURNS = (("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"))
TOO_LONG = 3  # exit code


def _limit(seconds: int) -> None:
    """End the process by a signal once it has used so much more CPU time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _try_tokenizer(path: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.get_vocab()
    for text in _TEXTS:
        ids = tokenizer.encode(text).ids
        if len(ids) > _MOST_TOKENS * len(text) + 1000:
            sys.exit(TOO_LONG)
        tokenizer.decode(ids)


def _try_template(text: str) -> None:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Near enough to the environment of transformers: a template that fails here is judged by the real one.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.globals |= {"strftime_now": lambda form: form, "raise_exception": _refuse}
    template = environment.from_string(text)
    names: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    for roles in _TURNS:
        messages = [{"role": role, "content": f"\ue000{number}\ue001"} for number, role in enumerate(roles)]
        try:
            template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **names)
        except MemoryError:
            raise
        except Exception:  # a template may refuse some turns
            continue


def _refuse(message: str) -> None:
    raise ValueError(message)


def _main() -> None:
    asked = json.load(sys.stdin)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = asked["memory"] if hard == resource.RLIM_INFINITY else min(asked["memory"], hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if asked["tokenizer"] is not None:
        print("tokenizer", flush=True)
        _limit(_TOKENIZER_SECONDS)
        try:
            _try_tokenizer(asked["tokenizer"])
        except MemoryError:
            raise
        except Exception:  # reported by the real loader, with its place
            pass
    for number, text in enumerate(asked["templates"]):
        print(number, flush=True)
        _limit(_TEMPLATE_SECONDS)
        try:
            _try_template(text)
        except MemoryError:
            raise
        except Exception:
            continue


if __name__ == "__main__":
    _main()
