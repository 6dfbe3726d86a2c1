"""What a job, a template, a model folder or an environment must not be able to do."""

from __future__ import annotations

import ast
import json
import os
import pickle
from pathlib import Path

import pytest
from click.testing import CliRunner
from places import ROOT
from running import Workplace

from gxr_batch.cli import main
from gxr_batch.errors import RowError, TemplateError
from gxr_batch.prompts import compile_template
from gxr_batch.prompts.render import render

PACKAGE = ROOT / "gxr_batch"
CANARY = "canary-5f3a"


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return Workplace(tmp_path / "work")


def model_folder(folder: Path, marker: Path, **config: object) -> Path:
    """Make a model folder whose code and pickles leave a marker if they are run."""
    folder.mkdir(parents=True)
    base = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(base | config))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\nclass C: pass\nclass M: pass\n")
    return folder


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pkl", "model.pt", "tf_model.h5", "consolidated.00.pth"])
def test_weights_that_are_not_safetensors_are_refused_and_never_unpickled(work, name):
    marker = work.folder / "ran"
    folder = model_folder(work.folder / "model", marker)
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    work.job("[engine]\nkind = 'generate'\n[model]\npath = './model'\n")
    done = work.run(expect=4)
    assert done.stderr.count("Error:") == 1
    assert "no weights in safetensors format, and other formats are not loaded" in done.stderr
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["generate", "auto"])
def test_code_that_comes_with_a_model_is_never_run(work, kind):
    marker = work.folder / "ran"
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.M", None]}
    folder = model_folder(work.folder / "model", marker, model_type="evil", auto_map=code)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": code, "tokenizer_class": "M"}))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    work.job(f"[engine]\nkind = '{kind}'\n[model]\npath = './model'\n")
    done = work.gxr("check", "j.toml", expect=4)
    assert "code from the model, which is never run" in done.stderr
    assert not marker.exists()


def calls() -> list[tuple[Path, ast.Call]]:
    trees = [(path, ast.parse(path.read_text())) for path in PACKAGE.rglob("*.py")]
    return [(path, node) for path, tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


def test_no_line_of_the_package_trusts_remote_code_or_loads_pickles():
    loading = 0
    for path, call in calls():
        keys = {key.arg: ast.unparse(key.value) for key in call.keywords}
        assert keys.get("trust_remote_code", "False") == "False", path
        assert name_of(call) not in {"pickle.load", "pickle.loads", "eval", "exec", "np.load"}, path
        # A resumed fine-tuning reads the optimizer's tensors so; torch refuses everything else then.
        assert name_of(call) != "torch.load" or keys.get("weights_only") == "True", path
        assert keys.get("shell", "False") == "False", path
        if name_of(call).endswith("from_pretrained"):
            loading += 1
            fixed = name_of(call).startswith(
                ("Gemma", "GenerationConfig")
            )  # transformers' own, which no folder replaces
            assert fixed or keys.get("trust_remote_code") == "False", f"{path}: {ast.unparse(call)}"
            assert "device_map" not in keys or keys.get("use_safetensors") == "True", path
    assert loading >= 3
    text = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert "trust_remote_code=True" not in text.replace(" ", "")


ESCAPES = [
    "{{ findings.__class__ }}",
    "{{ findings.__class__.__mro__[1].__subclasses__() }}",
    "{{ findings['__class__'] }}",
    "{{ findings|attr('__class__') }}",
    "{{ findings|attr('__cla' ~ 'ss__') }}",
    "{{ findings|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ [findings]|map(attribute='__class__')|list }}",
    "{{ [findings]|map('attr', '__class__')|list }}",
    "{{ [findings]|groupby('__class__') }}",
    "{{ [findings]|selectattr('__class__')|list }}",
    "{{ '{0.__class__}'.format(findings) }}",
    "{{ '{x.__class__.__mro__}'.format_map({'x': findings}) }}",
    "{{ ('{0.__class__}'|safe).format(findings) }}",
    "{{ ''.format.__self__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(a=findings).a }}",
    "{{ dict.__base__ }}",
    "{{ range.__class__ }}",
    "{{ patient.__globals__ }}{{ findings }}",
    "{{ patient.__code__.co_consts }}{{ findings }}",
    "{{ (patient|attr('__globals__')).os }}",
    "{{ request.application.__globals__ }}",
    "{{ config.items() }}",
    "{{ url_for.__globals__ }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ environment }}",
    "{{ caller.__globals__ }}",
    "{% macro m() %}{{ varargs.__class__ }}{% endmacro %}{{ m() }}",
    "{% macro m() %}x{% endmacro %}{{ m.__globals__ }}{{ m._func.__globals__ }}",
    "{% for x in findings %}{{ loop.__class__ }}{{ loop._iterator.gi_frame }}{% endfor %}",
    "{{ (findings for findings in [1]) }}",
    "{{ [].append.__self__.__class__ }}",
    "{% set x = [] %}{{ x.append(1) }}",
    "{{ {}.__class__.__bases__ }}",
    "{{ 1.0.__class__ }}",
    "{{ none.__class__ }}",
    "{% include '/etc/passwd' %}",
    "{% include findings %}",
    "{% import '/etc/passwd' as x %}",
    "{% from 'os' import environ %}",
    "{% extends '../../etc/passwd' %}",
    "{% set x %}{{ findings.__class__ }}{% endset %}{{ x }}",
    "{% filter attr('__class__') %}x{% endfilter %}",
    "{{ findings.encode.__call__.__self__ }}",
    "{{ range(10 ** 12)|list }}{{ findings }}",
    "{{ 'x' * 10 ** 12 }}{{ findings }}",
    "{{ 10 ** 10 ** 10 }}{{ findings }}",
]
GIVEAWAYS = ("<class", "<function", "<built-in", "root:", "HOME", "object at 0x", "<module", "<generator", "<bound")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("source", ESCAPES)
def test_a_way_out_of_the_template_sandbox_is_refused_or_has_no_effect(source):
    try:
        made = compile_template("own", source, "own.j2")
        text = render(made, dict.fromkeys(made.fields, "x"), system="").turns[0].text
    except (TemplateError, RowError) as error:
        text = str(error)
    assert not any(sign in text for sign in GIVEAWAYS), text


@pytest.mark.timeout(20)
@pytest.mark.parametrize("cell", ESCAPES)
def test_a_cell_is_never_read_as_a_template(cell):
    made = compile_template("own", "{{ findings }}", "own.j2")
    assert render(made, {"findings": cell}, system="").turns[0].text == cell


def everything_written(folder: Path) -> bytes:
    names = "\n".join(str(path) for path in folder.rglob("*")).encode()
    return names + b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_no_secret_of_the_environment_reaches_a_file_or_a_message(work, monkeypatch):
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "OPENAI_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "GXR_API_KEY",
        "NETRC",
    ):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = []
    for arguments, code, *faults in (
        (["run", "j.toml"], 0),
        (["run", "j.toml", "--set", "sampling.seed=3"], 2),
        (["run", "j.toml", "--output", "o"], 4, {"crash_after": 3}),
        (["run", "j.toml", "--output", "p", "--set", "engine.kind=generate", "--set", "model.path=no/such"], 4),
        (["check", "j.toml"], 0),
        (["status", "outputs", "--json"], 0),
        (["export", "outputs/j"], 0),
        (["report", "outputs/j"], 0),
    ):
        done = work.gxr(*arguments, expect=code, faults=faults[0] if faults else None)
        said.append(done.stdout + done.stderr)
    assert CANARY not in "".join(said)
    assert CANARY.encode() not in everything_written(work.folder)


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "/abs", "..", ".", "", "a\\u0000b", "~", "a b", "-x", "{date}", "x" * 101]
)
def test_a_jobs_name_cannot_escape_the_output_folder(work, name):
    text = (work.folder / "j.toml").read_text().replace("'j'", f'"{name}"')
    (work.folder / "j.toml").write_text(text)
    before = everything_written(work.folder.parent)
    done = work.run(expect=2)
    assert "name: " in done.stderr
    assert everything_written(work.folder.parent) == before


@pytest.mark.parametrize(
    ("output", "place"),
    [
        ("outputs/{name}", "work/outputs/j"),
        ("{name}/{name}", "work/j/j"),
        ("a/../b", "work/b"),
        ("../outside", "outside"),  # the user named the full path, so it is intended
    ],
)
def test_a_run_is_written_exactly_to_its_output_path(work, output, place):
    (work.folder / "a").mkdir()
    done = work.run_json("--output", output)
    found = {path.parent for path in work.folder.parent.rglob("run.json")}
    assert found == {work.folder.parent / place}
    assert (work.folder / done["run"]).resolve() == (work.folder.parent / place).resolve()


@pytest.mark.parametrize("output", ["a\\u0000b", "{home}", "{name.__class__}", "{0}", "x" * 300, ""])
def test_an_output_that_cannot_be_a_folder_name_is_refused(work, output):
    (work.folder / "j.toml").write_text((work.folder / "j.toml").read_text() + f'[run]\noutput = "{output}"\n')
    assert "run.output" in work.run(expect=2).stderr
    assert not (work.folder / "outputs").exists()


def test_a_date_in_the_output_matches_dates_only(work):
    """Text next to the placeholder is taken literally, never as a pattern that matches other runs."""
    work.run("--output", "outputs/x2024-01-01")
    os.rename(work.folder / "outputs" / "x2024-01-01", work.folder / "outputs" / "[x]2024-01-01")
    done = work.run_json("--output", "outputs/*{date}")
    assert "/*" in done["run"]


@pytest.mark.parametrize("cell", ["../../secret", "/etc/passwd", "own.j2", "a\x00b", "nothing"])
def test_a_cell_that_names_a_template_never_names_a_file(work, cell):
    (work.folder / "own.j2").write_text("{{ findings }} " + CANARY)
    work.table([("C1", "opacity", cell)], ("case_id", "findings", "which"))
    work.job("[prompt]\ntemplate_column = 'which'\n[engine]\nkind = 'echo'\n")
    work.run(expect=3)
    (row,) = work.results()
    assert row["gxr_error"] == "column which names a template that does not exist"


@pytest.mark.parametrize("name", ["../x", "a/b", "a.b", "1a", "", "a\\u0000"])
def test_a_template_name_is_restricted_to_plain_characters(work, name):
    text = (work.folder / "j.toml").read_text() + f'[prompt.templates]\n"{name}" = "own.j2"\n'
    (work.folder / "j.toml").write_text(text)
    (work.folder / "own.j2").write_text("{{ findings }}")
    assert "names begin with a letter" in work.run(expect=2).stderr


def test_what_a_template_tries_to_access_is_not_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.j2").write_text("{{ findings.__class__ }}")
    done = CliRunner().invoke(main, ["templates", "show", "own.j2"])
    assert (done.exit_code, "uses something that the sandbox does not allow" in done.stderr) == (2, True)
