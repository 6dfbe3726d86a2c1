"""The job file: strict about keys, clear about values, and never quoting one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gxr_batch.errors import JobFileError
from gxr_batch.job import Job, load_job
from gxr_batch.job.sampling import PRESETS, Sampling
from gxr_batch.job.units import parse_bytes, parse_clock, parse_duration

MINIMAL = 'name = "night"\n[input]\npath = "a.csv"\n'


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(MINIMAL)
    return path


def test_a_minimal_job_has_the_contracts_defaults(job_file):
    job = load_job(job_file)
    assert job.sampling.settings() == Sampling(
        max_new_tokens=256, temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.1
    )
    assert job.model.path == "demo"
    assert job.model.max_seq_length == 2048
    assert job.run.checkpoint_seconds == 30
    assert job.run.grace_seconds == 20
    assert job.run.max_failed == 0.5
    assert job.engine.window == 4096
    assert job.warnings() == []


def test_an_unknown_key_names_its_line_and_the_nearest_key(job_file):
    job_file.write_text(MINIMAL + "[sampling]\n\ntemprature = 0.3\n")
    with pytest.raises(JobFileError) as caught:
        load_job(job_file)
    assert caught.value.what == "Unknown key: sampling.temprature."
    assert caught.value.where == f"{job_file}, line 6"
    assert caught.value.next_step == "did you mean sampling.temperature?"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("sampling.temperature=-1", "sampling.temperature"),
        ("sampling.top_p=1.5", "sampling.top_p"),
        ("sampling.top_k=-1", "sampling.top_k"),
        ("sampling.max_new_tokens=0", "sampling.max_new_tokens"),
        ("sampling.max_new_tokens=2048", "smaller than model.max_seq_length"),
        ("sampling.preset=wild", "sampling.preset"),
        ("engine.slots=0", "engine.slots"),
        ("engine.kind=warp", "engine.kind"),
        ("run.time_limit=7x", 'such as "90s", "30m" or "7h"'),
        ("run.stop_by=25:00", 'such as "06:00"'),
        ("run.max_failed=1.5", "run.max_failed"),
        ("run.max_failed=0", "run.max_failed"),
        ("run.output=out/{job}", "{name} and {date}"),
        ("name=../up", "name"),
        ("input.delimiter=ab", "one character"),
        ("input=3", "input"),
    ],
)
def test_an_impossible_value_names_its_key(job_file, override, part):
    with pytest.raises(JobFileError) as caught:
        load_job(job_file, [override])
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("engine.slots=0", 'engine.slots: must be "auto" or at least 1.'),
        ("engine.slots=many", 'engine.slots: must be "auto" or a whole number.'),
        (
            "engine.kind=warp",
            'engine.kind: must be "auto", "generate", "transformers", "echo", "api", "vllm" or "ray".',
        ),
        ("engine=fast", "engine: must be a section of keys, written under a [header]."),
        (
            "name=a b",
            "name: must begin with a letter or digit and contain only letters, digits, dots, hyphens and underscores.",
        ),
        (
            "prompt.templates.a b=x",
            "prompt.templates.a b: names begin with a letter and contain only letters, digits, hyphens",
        ),
        ("run.output=''", "run.output: must not be empty."),
        ("run.max_failed=inf", "run.max_failed: must be a share above 0"),
        ("run.max_failed=nan", "run.max_failed: must be a share above 0"),
        ("run.max_failed=1" + "0" * 400, "run.max_failed: must be a share above 0"),
        ("sampling.temperature=nan", "sampling.temperature: must be a finite number."),
        ("input.null_values=-", 'input.null_values: must be a list, such as ["-"] or "common".'),
        ("input.path=\udcff", "input.path: contains bytes that are not UTF-8."),
        ("engine.reproducible=7", "engine.reproducible: must be true or false."),
        (f"engine.window={'9' * 25}", "engine.window: must be at most 2147483647."),
    ],
)
def test_an_error_is_in_plain_words_and_names_the_option(job_file, override, sentence):
    with pytest.raises(JobFileError) as caught:
        load_job(job_file, [override])
    assert caught.value.what.startswith(sentence)
    assert caught.value.where == f"--set {override.partition('=')[0]}"


def test_a_section_given_as_a_string_names_its_line(job_file):
    job_file.write_text('name = "night"\ninput = "a.csv"\n')
    with pytest.raises(JobFileError, match="input: must be a section") as caught:
        load_job(job_file)
    assert caught.value.where == f"{job_file}, line 2"


def test_an_error_names_the_option_that_overrides_a_line_instead_of_the_line(job_file):
    job_file.write_text(MINIMAL + "[engine]\nslots = 4\n[run]\nstop_by = '06:00'\n")
    for overrides, given, where in (
        (["engine.slots=0"], None, "--set engine.slots"),
        ([], {"run.stop_by": "25:00"}, "--stop-by"),
        (["run.stop_by=25:00"], None, "--set run.stop_by"),
    ):
        with pytest.raises(JobFileError) as caught:
            load_job(job_file, overrides, given)
        assert caught.value.where == where


@pytest.mark.parametrize("key", ['form.section."Key findings".max_tokens', "form.section.Key findings.max_tokens"])
def test_set_takes_quoted_keys_as_in_the_job_file(job_file, key):
    job = load_job(job_file, ['form.sections=["Impression", "Key findings"]', f"{key}=80"])
    assert job.form.section["Key findings"].max_tokens == 80


@pytest.mark.parametrize("value", ["[" * 5000, "{a=" * 5000, "9" * 5000])
def test_toml_too_deep_or_too_long_for_python_is_a_job_file_error(job_file, value):
    with pytest.raises(JobFileError):
        load_job(job_file, [f"sampling.temperature={value}"])
    job_file.write_text(f"{MINIMAL}x = {value}\n")
    with pytest.raises(JobFileError, match="nested too deeply or has a huge number"):
        load_job(job_file)


def test_a_set_value_cannot_add_a_second_key(job_file):
    with pytest.raises(JobFileError, match="must be a number"):
        load_job(job_file, ["sampling.temperature=1\nname = 'other'"])


def test_values_of_a_job_never_appear_in_the_message(job_file):
    with pytest.raises(JobFileError) as caught:
        load_job(job_file, ["prompt.system=[1]", 'prompt.format="canary text"'])
    assert "canary" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_set_takes_toml_values_and_bare_words(job_file):
    job = load_job(job_file, ["sampling.temperature=0.4", "run.output=elsewhere", 'input.null_values=["-"]'])
    assert job.sampling.settings().temperature == 0.4
    assert job.run.output == "elsewhere"
    assert job.input.null_values == ("-",)


@pytest.mark.parametrize("override", ["sampling.temperature", "=3", "a..b=1", "#=1", 'a.""=1', "[x]\n[y]\nz=1"])
def test_a_malformed_set_is_refused(job_file, override):
    with pytest.raises(JobFileError):
        load_job(job_file, [override])


def test_broken_toml_names_the_line(job_file):
    job_file.write_text('name = "x"\n[input\n')
    with pytest.raises(JobFileError, match="line 2"):
        load_job(job_file)


def test_a_missing_job_file_is_named_with_its_absolute_path(tmp_path):
    with pytest.raises(JobFileError) as caught:
        load_job(tmp_path / "none.toml")
    assert str(tmp_path / "none.toml") in caught.value.where


def test_a_byte_order_mark_before_the_toml_is_accepted(job_file):
    job_file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_job(job_file).name == "night"


def test_values_outside_the_guides_ranges_warn_with_range_and_reason(job_file):
    warnings = load_job(job_file, ["sampling.temperature=1.8", "sampling.top_k=5"]).warnings()
    assert len(warnings) == 2
    assert "0.1 to 1.5" in warnings[0]
    assert "10 to 100" in warnings[1]


@pytest.mark.parametrize("override", ["sampling.temperature=0", "sampling.top_k=0"])
def test_a_setting_that_is_switched_off_does_not_warn(job_file, override):
    assert load_job(job_file, [override]).warnings() == []


def test_a_preset_sets_values_and_explicit_keys_override_them(job_file):
    assert load_job(job_file, ["sampling.preset=deterministic"]).sampling.settings().temperature == 0.4
    job = load_job(job_file, ["sampling.preset=detailed", "sampling.max_new_tokens=64"])
    assert job.sampling.settings().max_new_tokens == 64
    assert "has no effect" in job.warnings()[0]


def test_presets_are_within_the_guides_ranges():
    assert all(preset.warnings() == [] for preset in PRESETS.values())


def test_with_values_replaces_dotted_keys(job_file):
    job = load_job(job_file).with_values({"model.dtype": "float32", "engine.slots": 4})
    assert isinstance(job, Job)
    assert (job.model.dtype, job.engine.slots) == ("float32", 4)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("7h", 25200), ("1.5h", 5400), ("", None)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(("text", "size"), [("20GiB", 20 * 2**30), ("800 MB", 800 * 10**6), ("", None)])
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["20", "GiB", "-1GiB", "0GiB", "1TiB"])
def test_a_size_without_a_known_unit_is_refused(text):
    with pytest.raises(ValueError, match="must be a size"):
        parse_bytes(text)


def test_clocks():
    assert parse_clock("06:30") is not None
    with pytest.raises(ValueError, match="time of day"):
        parse_clock("6.30")
