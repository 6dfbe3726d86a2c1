"""Plays `check` and `run` with broken model and adapter folders, and says what is wrong.

As a program: `model_mutations.py FOLDER values:FIRST:STEP attacks:FIRST:STEP` plays every STEPth broken value of all
files, and every STEPth case of `model_attacks`; it prints one JSON object for each, and the figures.

`ModelFolders` makes a small valid folder of each kind. Each command runs in a forked child with limits on its time and
memory, since a library may end the process: a fork of a process that has imported the libraries takes milliseconds. A
fork copies one thread, and the libraries' pools of threads would be broken in it; so this process imports and computes
nothing, which each fork checks.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from json_mutations import Mutation, damages, mutations
from model_attacks import ATTACKS

from gxr_batch.cli import main

GIB = 2**30
SECONDS = 60.0
MEMORY = 8 * GIB  # of addresses; torch alone maps a few
EXITS = {0, 2, 3, 4}
# Importing starts no threads then: of numpy, of pyarrow's allocator.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "TOKENIZERS_PARALLELISM": "false",
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n"
    "{% endif %}"
)
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


class Case(NamedTuple):
    """One broken file of a folder."""

    file: str
    mutation: Mutation

    def __str__(self) -> str:
        return f"{self.file}: {self.mutation.name}"


@dataclass
class Outcome:
    """How one case ended: exit codes (negative: a signal), CPU seconds, most memory, and the trouble."""

    case: str
    codes: dict[str, int]
    seconds: float
    peak: int
    troubles: list[str]
    said: str = ""


def small_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer with Gemma's control tokens and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    controls = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*controls, *letters, "in", "ing"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("i", "n"), ("in", "g")], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("\t", " ")])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    made.add_special_tokens([AddedToken(token, normalized=False) for token in controls])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": {
            "__type": "AddedToken",
            "content": "<unk>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        },
        "added_tokens_decoder": {
            "5": {"content": "<end_of_turn>", "special": True, "lstrip": False, "normalized": False}
        },
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


class ModelFolders:
    """A small Gemma in several weight files, and an adapter for it, in one folder; makes broken copies of both."""

    def __init__(self, folder: Path) -> None:
        self.model, self.adapter = folder / "model", folder / "adapter"

    def make(self) -> None:
        """Write the valid folders."""
        from tiny import save_adapter, tiny_gemma

        small_tokenizer(self.model)
        made = tiny_gemma(vocab=320)
        made.generation_config.eos_token_id = [1, 5]
        made.save_pretrained(self.model, max_shard_size="200KB")
        save_adapter(tiny_gemma(vocab=320), self.adapter, rank_pattern={"layers.0.self_attn.q_proj": 4})
        config = json.loads((self.adapter / ADAPTER).read_text())
        (self.adapter / ADAPTER).write_text(json.dumps(config | {"base_model_name_or_path": str(self.model)}))

    def cases(self) -> list[Case]:
        """Return all cases of all files."""
        return [Case(name, each) for name in (*MODEL_FILES, INDEX, ADAPTER) for each in self._of(name)]

    def _of(self, name: str) -> Iterator[Mutation]:
        document = json.loads(self.path(name).read_text())
        yield from mutations(document, items=1)
        yield from damages(document)

    def path(self, name: str) -> Path:
        """Return where a file is in the valid folders."""
        return (self.adapter if name == ADAPTER else self.model) / name

    def broken(self, case: Case, folder: Path) -> dict[str, Path]:
        """Make a folder that differs in one file; return what to set in the job."""
        kind = "adapter" if case.file == ADAPTER else "path"
        folder.mkdir(parents=True)
        for path in self.path(case.file).parent.iterdir():
            if path.name != case.file:
                (folder / path.name).symlink_to(path)
        (folder / case.file).write_bytes(case.mutation.text())
        return {"path": self.model, kind: folder}


def play(work: Path, model: dict[str, Path], name: str, verbs: Sequence[str] = ("check", "run")) -> Outcome:
    """Run the verbs on a job with this model, each in a fork, and say what breaks the contract."""
    outcome = Outcome(name, {}, 0.0, 0, [])
    for verb in verbs:
        command = _command(work, [verb, "j.toml", *_settings(model), *_extra(verb)])
        code, text, seconds, peak = _in_a_fork(command, work / "said.txt")
        outcome.codes[verb] = code
        outcome.seconds, outcome.peak = max(outcome.seconds, seconds), max(outcome.peak, peak)
        outcome.said += text
        if code not in EXITS:
            outcome.troubles.append(f"{verb} ended {code}: {text[-1500:]}")
        elif code in (2, 4) and text.count("Error: ") != 1:
            outcome.troubles.append(f"{verb} gave no single message: {text[-1500:]}")
        elif len(text) > 6000:
            outcome.troubles.append(f"{verb} printed {len(text)} characters")
    refusing = [verb for verb, code in outcome.codes.items() if code in (2, 4)]
    if not outcome.troubles and 0 < len(refusing) < len(outcome.codes):
        outcome.troubles.append(f"only {refusing[0]} refuses this: {outcome.said[-1500:]}")
    return outcome


def workplace(folder: Path) -> Path:
    """Make a folder with a job of one row; the model is given by options."""
    folder.mkdir(parents=True)
    (folder / "f.csv").write_text("case_id,findings\nA,opacity in the left lung\n")
    (folder / "j.toml").write_text(
        "name = 'j'\n[input]\npath = 'f.csv'\nid_column = 'case_id'\n[prompt]\ntemplate = 't.j2'\n"
        "[sampling]\nmax_new_tokens = 2\n[model]\nmax_seq_length = 256\ndtype = 'float32'\n"
        "[engine]\nthreads = 1\nslots = 2\n"
    )
    (folder / "t.j2").write_text("Findings: {{ findings }}\n")
    return folder


def _settings(model: dict[str, Path]) -> list[str]:
    return [part for key, path in model.items() for part in ("--set", f"model.{key}={path}")]


def _extra(verb: str) -> list[str]:
    return ["--fresh"] if verb == "run" else []


def _in_a_fork(function: Callable[[], object], said: Path) -> tuple[int, str, float, int]:
    """Call a function in a fork; return exit code, output, CPU seconds, and most resident bytes."""
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies one thread only"
    with said.open("wb") as output:
        child = os.fork()
        if child == 0:
            _be_a_command(function, output.fileno())
    handle = os.pidfd_open(child)
    ended, _, _ = select.select([handle], [], [], SECONDS)
    with suppress(ProcessLookupError):  # what it started may still run
        os.killpg(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    os.close(handle)
    text = said.read_text(errors="replace") + ("" if ended else f"not ended after {SECONDS:.0f} s")
    return os.waitstatus_to_exitcode(status), text, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def _be_a_command(function: Callable[[], object], output: int) -> None:
    """Call a function as the interpreter calls a program, and end this process."""
    code = 0
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(output, 1)
        os.dup2(output, 2)
        function()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def _command(folder: Path, arguments: list[str]) -> Callable[[], object]:
    def run() -> None:
        os.chdir(folder)
        main(arguments, prog_name="gxr-batch")

    return run


def ready(folders: ModelFolders, work: Path) -> None:
    """Make the valid folders, import in this process what the commands need, and see that they run."""
    os.environ |= ONE_THREAD
    model = {"path": folders.model, "adapter": folders.adapter}

    def first() -> None:
        folders.make()
        for verb in ("check", "run"):
            with suppress(SystemExit):
                _command(work, [verb, "j.toml", *_settings(model)])()
        (work / "modules.json").write_text(json.dumps(list(sys.modules)))

    code, text, _, _ = _in_a_fork(first, work / "said.txt")
    assert code == 0, text
    for name in json.loads((work / "modules.json").read_text()):
        with suppress(ImportError):  # some names are no modules
            import_module(name)
    gc.freeze()  # a child that collects garbage would copy all pages
    for each in ({"path": folders.model}, model):
        outcome = play(work, each, "valid")
        assert outcome.codes == {"check": 0, "run": 0}, outcome.said


def play_cases(folders: ModelFolders, cases: Sequence[Case], work: Path) -> Iterator[Outcome]:
    """Play cases one after the other."""
    for number, case in enumerate(cases):
        folder = work / f"case-{number}"
        yield play(work, folders.broken(case, folder), str(case))
        _clear(work, folder)


def play_attacks(folders: ModelFolders, names: Sequence[str], work: Path) -> Iterator[Outcome]:
    """Play attacks one after the other; the trouble of one includes a message without what it must name."""
    for name in names:
        kind, apply, message = ATTACKS[name]
        folder = work / "attack"
        shutil.copytree(folders.model if kind == "path" else folders.adapter, folder)
        apply(folder)
        outcome = play(work, {"path": folders.model, kind: folder}, name)
        if set(outcome.codes.values()) != {4} or outcome.said.count(message) != len(outcome.codes):
            outcome.troubles.append(f"{outcome.codes}, not 4 with {message!r}: {outcome.said[-1500:]}")
        yield outcome
        _clear(work, folder)


def _clear(work: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    for run in (work / "outputs").glob("*"):
        shutil.rmtree(run)


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return counts of cases by exits, the slowest and the one with the most memory."""
    exits: dict[str, int] = {}
    for one in outcomes:
        key = " ".join(f"{verb}={code}" for verb, code in one.codes.items())
        exits[key] = exits.get(key, 0) + 1
    slowest = max(outcomes, key=lambda one: one.seconds)
    largest = max(outcomes, key=lambda one: one.peak)
    return {
        "cases": len(outcomes),
        "exits": exits,
        "slowest": (round(slowest.seconds, 2), slowest.case),
        "most memory": (f"{largest.peak / 2**20:.0f} MiB", largest.case),
        "troubles": sum(bool(one.troubles) for one in outcomes),
    }


def _main(scratch: Path, *parts: str) -> None:
    folders = ModelFolders(scratch / "valid")
    work = workplace(scratch / "work")
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    ready(folders, work)
    outcomes = []
    for part in parts:
        what, first, step = part.split(":")
        chosen = slice(int(first), None, int(step))
        if what == "attacks":
            played = play_attacks(folders, list(ATTACKS)[chosen], work)
        else:
            played = play_cases(folders, folders.cases()[chosen], work)
        for outcome in played:
            outcomes.append(outcome)
            print(json.dumps(vars(outcome)), flush=True)
    print(json.dumps(figures(outcomes)))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), *sys.argv[2:])
