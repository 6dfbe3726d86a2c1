"""What may change between two invocations of a run, what may not, and how the run reports it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import Workplace
from safetensors.torch import load_file, save_file
from tiny import tiny_gemma

from gxr_batch.run import messages

ROWS = [(f"C{number}", f"finding number {number}") for number in range(20)]


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    made = Workplace(tmp_path)
    made.table(ROWS)
    made.run()
    return made


@pytest.mark.parametrize(
    ("rows", "said", "generated"),
    [
        (ROWS[::-1], "0 new, 0 edited, 0 removed, 20 kept", 0),
        (ROWS[3:], "0 new, 0 edited, 3 removed, 17 kept", 0),
        ([*ROWS, ("C99", "new")], "1 new, 0 edited, 0 removed, 20 kept", 1),
        ([("C0", "edited"), *ROWS[1:]], "0 new, 1 edited, 0 removed, 19 kept", 1),
        ([(f"D{name[1:]}", text) for name, text in ROWS], "20 new, 0 edited, 20 removed, 0 kept", 20),
    ],
    ids=["reordered", "removed", "added", "edited", "ids changed"],
)
def test_a_changed_table_is_reported_and_only_what_changed_is_generated(work, rows, said, generated):
    work.table(rows)
    done = work.run("--json")
    assert json.loads(done.stdout)["generated_now"] == generated
    assert said in done.stderr
    assert [row["case_id"] for row in work.results()] == [name for name, _ in rows]


def test_other_package_versions_cause_a_warning_that_names_them(work):
    path = work.folder / "outputs/j/run.json"
    manifest = json.loads(path.read_text())
    known = manifest["invocations"][-1]["packages"]
    pyarrow = known["pyarrow"]
    known |= {"pyarrow": "1.0", "forgotten": "2.0"}
    path.write_text(json.dumps(manifest))
    work.table([*ROWS, ("C99", "new")])
    done = work.run()
    assert f"pyarrow 1.0 -> {pyarrow}, forgotten 2.0 -> not installed" in done.stderr
    assert any("pyarrow 1.0" in notice for notice in work.manifest()["invocations"][-1]["notices"])
    work.table([*ROWS, ("C99", "new"), ("C100", "new")])
    assert "Package versions" not in work.run().stderr, "only if they differ from the last invocation"


def test_odd_values_of_the_last_invocation_are_harmless(work):
    path = work.folder / "outputs/j/run.json"
    for odd in ({"packages": 3, "engine": "x"}, {"packages": {"pyarrow": None}, "engine": {"versions": [1]}}):
        manifest = json.loads(path.read_text())
        manifest["invocations"][-1] |= odd
        path.write_text(json.dumps(manifest))
        work.table([*ROWS, (f"C{len(odd['engine']) + 98}", "new")])
        work.run()


def test_totals_cover_every_invocation_and_not_only_the_last(work):
    for count in (21, 22, 23):
        work.table([*ROWS, *((f"N{number}", "new") for number in range(count - 20))])
        summary = work.run_json()
        assert (summary["ok"], summary["generated_now"]) == (count, 1)
    assert json.loads(work.gxr("status", "outputs/j", "--json").stdout)[0]["ok"] == 23


def test_rows_with_the_same_prompt_are_separate_rows(work):
    work.job("[engine]\nkind = 'echo'\n", head="path = 'f.csv'\n")
    work.table([("a", "same"), ("b", "same"), ("c", "same")])
    work.run("--fresh")
    found = work.results()
    assert len({row["gxr_row_id"] for row in found}) == 3
    assert len({row["gxr_seed"] for row in found}) == 3


def test_check_refuses_what_run_would_refuse(work):
    done = work.gxr("check", "j.toml", "--set", "sampling.top_k=20", expect=2)
    assert "sampling.top_k (50 -> 20)" in done.stderr
    assert "contains an earlier run, which `gxr-batch run` resumes" in work.gxr("check", "j.toml").stdout


def test_a_run_that_may_fill_the_disk_warns_before_it_starts(work):
    folder = work.folder / "outputs/j"
    (said,) = messages.of_disk_space(folder, 256, 10**12)
    assert "may fill up" in said
    assert messages.of_disk_space(folder, 256, 20) == []
    assert "fill up" not in work.run("--fresh").stderr


def test_numbers_that_no_model_has_are_refused(work):
    for setting in ("sampling.max_new_tokens", "model.max_seq_length"):
        assert setting in work.run("--set", f"{setting}=90000000000", expect=2).stderr


def test_other_code_causes_a_warning_and_other_weights_are_another_model(tmp_path, gemma_tokenizer):
    model = tmp_path / "model"
    tiny_gemma(vocab=len(gemma_tokenizer)).save_pretrained(model)
    gemma_tokenizer.save_pretrained(model)
    work = Workplace(tmp_path)
    work.job(f"[model]\npath = '{model}'\n[engine]\nslots = 2\n[sampling]\nmax_new_tokens = 2\n")
    work.table(ROWS[:2])
    work.run()
    path = work.folder / "outputs/j/run.json"
    manifest = json.loads(path.read_text())
    now = manifest["invocations"][-1]["engine"]["versions"]["forward"]
    manifest["invocations"][-1]["engine"]["versions"]["forward"] = "another processor's"
    path.write_text(json.dumps(manifest))
    work.table(ROWS[:3])
    assert f"another processor's -> {now}" in work.run().stderr
    work.table(ROWS[:4])
    assert "The code" not in work.run().stderr, "only if it differs from the last invocation"
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    work.table(ROWS[:5])
    assert "model weights" in work.run(expect=2).stderr
    assert len(work.results()) == 4
