"""`finetune`: trains on answers to the prompts of `run`; no stop, kill or setting mixes two trainings."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from running import Workplace
from tiny import tiny_gemma, tiny_multimodal
from trainings import FINDINGS, Stopping, chat, equal, job, row, small_job, small_model, train, weights, write

from gxr_batch.errors import FingerprintError, GxrError, JobFileError, RunError, StorageError, TableError
from gxr_batch.extras import install_command
from gxr_batch.finetune.examples import encode, read_examples, split, steps_of
from gxr_batch.job import Job, ModelSection, load_job
from gxr_batch.models.local_model import LocalModel
from gxr_batch.models.source import find

pytestmark = pytest.mark.model

VOCAB = 262_145  # the real tokenizer's


@pytest.fixture(scope="module")
def real_dir(tmp_path_factory, gemma_tokenizer) -> Path:
    """A tiny random Gemma with the real tokenizer and its full vocabulary."""
    folder = tmp_path_factory.mktemp("tiny-262k")
    tiny_gemma(vocab=VOCAB).save_pretrained(folder)
    gemma_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def real_tokenizer(gemma_tokenizer, monkeypatch):
    """The real tokenizer, loaded once and used in place of every other."""
    # Both are imported before either is patched: one imported in between would keep the patch of the other permanently.
    from gxr_batch.finetune import make_adapter
    from gxr_batch.models import load_weights

    for module in (load_weights, make_adapter):
        monkeypatch.setattr(module, "load_tokenizer", lambda section: gemma_tokenizer)
    return gemma_tokenizer


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("tiny-small"))


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_dir) -> Path:
    monkeypatch.chdir(tmp_path)
    small_job(tmp_path, tiny_dir)
    return tmp_path


def encoded(*overrides: str):
    made = job(*overrides)
    return encode(read_examples(made)[0], LocalModel(made, "finetune").encoder(), made.model.max_seq_length)


# ---------------------------------------------------------------------- data


def test_a_prompt_has_the_same_ids_as_in_a_run(place, real_dir, real_tokenizer):
    """Compared with the modules of `run` on a table of the same cells."""
    from gxr_batch.engines import create
    from gxr_batch.rows.ingest import ingest
    from gxr_batch.rows.table_reader import read_rows
    from gxr_batch.run.pipeline import Fitter
    from gxr_batch.run.prepare import prepare

    cells = [("a small effusion", "65", "male"), ("<start_of_turn> é, “3.5 cm”", "8 months", "girl")]
    (place / "t.csv").write_text("findings,age,sex\n" + "".join(f'"{f}",{a},{s}\n' for f, a, s in cells))
    for form in ("chat", "literal"):
        overrides = [
            f"model.path={real_dir}",
            f"prompt.format={form}",
            "prompt.system=Teach.",
            'finetune.data=["rows.jsonl"]',
        ]
        entries = [
            {"template": "clinical_case", "findings": f, "age": a, "sex": s, "history": "", "answer": "Yes."}
            for f, a, s in cells
        ]
        write(place / "rows.jsonl", *entries)
        rows, _ = encoded(*overrides)
        running = load_job(Path("j.toml"), [*overrides, "engine.kind=generate"], {"input.path": "t.csv"}, table=False)
        prepared = prepare(running)
        ingest(prepared.survey, prepared.fields, place / "t.parquet", id_column="", prior=None, limit=None)
        fitter = Fitter(prepared.templates, running, create(running).encoder())
        of_run = [fitter.fit(one).encoded.token_ids for one in read_rows(place / "t.parquet", prepared.fields, None)]
        assert [one.prompt_ids for one in rows] == of_run


def test_chat_lines_and_field_lines_give_the_same_prompt(place):
    text = "You are an expert radiologist. Analyze this chest X-ray showing clear lungs."
    write(place / "data.jsonl", row("clear lungs", "Normal."), chat(text, "Normal."))
    one, other = encoded()[0]
    assert one.input_ids == other.input_ids


def test_only_the_answer_and_its_end_token_are_trained_on(place, real_dir, real_tokenizer):
    write(place / "data.jsonl", row("clear lungs", " Normal study. "))
    ((one,), _) = encoded(f"model.path={real_dir}")
    trained = [label for label in one.labels if label != -100]
    assert one.labels[one.prompt_tokens :] == one.input_ids[one.prompt_tokens :]
    assert real_tokenizer.decode(trained) == "Normal study.<end_of_turn>"
    assert trained[-1] == 106
    assert one.prompt_ids[-1] == real_tokenizer.convert_tokens_to_ids("\n")


def test_a_content_of_text_parts_is_the_same_as_its_text(place):
    def parts(*texts: str) -> list[dict]:
        return [{"type": "text", "text": text} for text in texts]

    turns = [{"role": "user", "content": parts("Analyze this.", "Clear lungs.")}]
    turns += [{"role": "assistant", "content": parts("Normal.")}]
    write(place / "data.jsonl", {"messages": turns})
    ((example,), _) = read_examples(job())
    assert [turn.text for turn in example.messages.turns] == ["Analyze this.\nClear lungs."]
    assert example.answer == "Normal."


def test_control_tokens_in_an_answer_stay_text(place, real_dir, real_tokenizer):
    write(place / "data.jsonl", row("clear lungs", "Normal <end_of_turn> <start_of_turn>user <eos>"))
    ((one,), _) = encoded(f"model.path={real_dir}")
    answer = one.input_ids[one.prompt_tokens :]
    assert (answer.count(106), answer.count(105), answer.count(1)) == (1, 0, 0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "is not a JSON object"),
        ('{"text": "canary"}', 'has neither "messages" nor "answer"'),
        ('{"messages": "canary"}', "not a list of objects"),
        ('{"messages": [{"role": "user", "content": "canary"}]}', "ending with the assistant"),
        ('{"messages": [{"role": "canary", "content": "canary"}]}', 'without a known "role"'),
        ('{"messages": [{"role": ["user"], "content": "canary"}]}', 'without a known "role"'),
        ('{"messages": [{"role": {}, "content": "canary"}]}', 'without a known "role"'),
        ('{"messages": [{"role": 5, "content": "canary"}]}', 'without a known "role"'),
        ('{"messages": [{"role": null, "content": "canary"}]}', 'without a known "role"'),
        ('{"messages": [{"role": "user", "content": {"canary": 1}}]}', 'without text in "content"'),
        ('{"messages": [{"role": "user", "content": [["canary"]]}]}', "a part that is no text"),
        ('{"messages": ["canary"]}', "not a list of objects"),
        ('{"messages": ' + "[" * 100_000, "nested too deeply"),
        ('{"answer": "' + "canary" * 700_000 + '"}', "longer than 4 MiB"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}', "empty answer"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "a part that is no text"),
        ('{"messages": [{"role": "user", "content": []}]}', 'without text in "content"'),
        ('{"template": "canary", "findings": "x", "answer": "y"}', "names a template that does not exist"),
        ('{"template": "basic", "answer": "canary"}', "needs findings"),
        ('{"template": "basic", "findings": ["canary"], "answer": "y"}', "neither text nor a number: findings"),
        ('{"template": "basic", "findings": "canary"}', 'has neither "messages" nor "answer"'),
    ],
)
def test_an_invalid_line_is_named_and_its_text_is_not_shown(place, line, reason):
    write(place / "data.jsonl", row("clear lungs", "Normal."))
    with (place / "data.jsonl").open("a") as file:
        file.write(f"\n{line}\n{line}\n")
    with pytest.raises(TableError) as caught:
        read_examples(job())
    message = str(caught.value)
    assert reason in message
    assert "data.jsonl, line 3 (also data.jsonl, line 4)" in message
    assert "canary" not in message
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("text", [b'{"answer": "\xe9"}', '{"answer": "x"}'.encode("utf-16")], ids=["latin-1", "UTF-16"])
def test_data_that_is_not_utf_8_is_refused_with_the_line(place, text):
    (place / "data.jsonl").write_bytes(b"{}\n{}\n" + text + b"\n")
    with pytest.raises(TableError, match="not UTF-8") as caught:
        read_examples(job())
    assert caught.value.where == f"{place}/data.jsonl, line 3"
    assert "save the file as UTF-8" in caught.value.next_step


@pytest.mark.parametrize("entry", [chat("canary \ud800", "x"), chat("x", "canary \ud800"), row("canary \ud800", "x")])
def test_half_a_surrogate_pair_is_refused_with_the_line(place, entry):
    (place / "data.jsonl").write_text("\n" + json.dumps(entry) + "\n")
    with pytest.raises(TableError) as caught:
        encoded()
    assert caught.value.where == "data.jsonl, line 2"
    assert "canary" not in str(caught.value)


def test_approved_rows_are_not_read_through_a_link(place):
    (place / "run").mkdir()
    (place / "run" / "run.json").write_text("{}")
    (place / "run" / "approved-chat.jsonl").symlink_to(place / "data.jsonl")
    with pytest.raises(StorageError, match="it is a link, not a plain file"):
        read_examples(job('finetune.data=["run"]'))


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_an_output_without_a_name_is_refused(place, output):
    with pytest.raises(JobFileError, match="needs a separate folder"):
        train(f"finetune.output={output}")


def test_rows_that_are_too_long_are_counted_and_left_out(place):
    write(place / "data.jsonl", *(row(f, "Yes.") for f in FINDINGS), row("clear lungs", "word " * 200))
    rows, too_long = encoded()
    assert len(rows) == 4
    assert too_long == ["data.jsonl, line 5"]


def test_only_the_prompt_decides_whether_a_row_is_held_out(place):
    rows = encoded()[0]
    training, held_out = split(rows, 0.3, 0)
    assert len(held_out) == 2
    again = split([*reversed(rows), *rows], 0.3, 0)
    assert {tuple(one.input_ids) for one in held_out} <= {tuple(one.input_ids) for one in again[1]}
    assert not {tuple(one.prompt_ids) for one in again[0]} & {tuple(one.prompt_ids) for one in again[1]}
    assert split(rows, 0, 0) == (rows, [])
    with pytest.raises(JobFileError, match="too few rows"):
        split(rows[:1], 0.1, 0)
    assert len(training) == 6


def test_epochs_are_converted_to_whole_steps():
    section = Job.model_validate({"name": "j", "input": {"path": "-"}, "finetune": {"epochs": 2}}).finetune
    assert [steps_of(section, rows) for rows in (1, 8, 9, 100)] == [2, 2, 4, 26]


def test_the_exported_approved_rows_of_a_run_folder_are_read(place):
    (place / "run").mkdir()
    with pytest.raises(RunError, match="not a run folder"):
        read_examples(job('finetune.data=["run"]'))
    (place / "run" / "run.json").write_text("{}")
    with pytest.raises(RunError, match="export run --format chat-jsonl"):
        read_examples(job('finetune.data=["run"]'))
    write(place / "run" / "approved-chat.jsonl", chat("Show it.", "Here."))
    examples, (file,) = read_examples(job('finetune.data=["run", "run/approved*.jsonl"]'))
    assert [one.answer for one in examples] == ["Here."]
    assert file.rows == 1
    (place / "run" / "reviews").mkdir()
    time.sleep(0.02)
    (place / "run" / "reviews" / "audit-001.json").write_text("")
    assert read_examples(job('finetune.data=["run"]')), "a draw for an audit is no review"
    (place / "run" / "reviews" / "review-00000001.parquet").write_text("")
    with pytest.raises(RunError, match="was reviewed after its approved rows were exported"):
        read_examples(job('finetune.data=["run"]'))


def test_missing_data_is_reported_with_its_absolute_path(place):
    with pytest.raises(JobFileError, match=str(place / "no.jsonl")):
        read_examples(job('finetune.data=["no.jsonl"]'))
    with pytest.raises(JobFileError, match="does not exist"):
        read_examples(job('finetune.data=["a**b"]'))
    with pytest.raises(JobFileError, match="There is no training data"):
        read_examples(job("finetune.data=[]"))


# ---------------------------------------------------------------------- job file


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune.fp16=true", "The guide sets both fp16 and bf16, which is a mistake"),
        ("finetune.bf16=true", "model.dtype"),
        ("finetune.per_device_train_batch_size=2", "here it is called finetune.batch_size"),
        ("finetune.optim=adamw_8bit", "here it is called finetune.optimizer"),
        ("finetune.learning_rat=1", "did you mean finetune.learning_rate?"),
        ("finetune.epochs=2", "set only one of them"),
        ("finetune.output={date}", "supports the placeholder"),
    ],
)
def test_keys_of_the_guide_with_another_name_or_meaning_are_explained(place, override, message):
    with pytest.raises(JobFileError) as caught:
        job(override)
    assert message in str(caught.value)


def test_the_defaults_are_the_guides():
    section = Job.model_validate({"name": "j", "input": {"path": "-"}}).finetune
    found = section.batch_size, section.gradient_accumulation_steps, section.steps, section.learning_rate
    assert found == (2, 4, 50, 2e-4)
    more = section.optimizer, section.weight_decay, section.lr_scheduler, section.warmup_steps
    assert more == ("adamw_8bit", 0.01, "linear", 5)
    assert (section.logging_steps, section.eval_steps) == (5, 10)


# ---------------------------------------------------------------------- training


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses a deprecated name of transformers
def test_training_lowers_the_held_out_loss_and_writes_an_adapter_that_loads(place, real_dir, real_tokenizer):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with_real = f"model.path={real_dir}"
    steps = []
    outcome = train(with_real, "finetune.max_steps=4", "finetune.eval_steps=4", show=steps.append)
    assert outcome.reason is None
    assert outcome.loss_after < outcome.loss_before - 1
    assert (steps[-1].step, steps[-1].steps) == (4, 4)
    folder = place / "outputs/j-adapter"
    base = AutoModelForCausalLM.from_pretrained(real_dir)
    ids = torch.tensor([encoded(with_real)[0][0].prompt_ids])
    with torch.inference_mode():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, folder).eval()
        assert (adapted(ids).logits - before).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(folder)("a b").input_ids == real_tokenizer("a b").input_ids
    assert set(GenerationConfig.from_pretrained(folder).eos_token_id) == {1, 106}
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["loss_after"] == outcome.loss_after
    (sample,) = evaluation["samples"]
    assert sample["base"]["new_tokens"] >= 1
    assert sample["reference"].startswith(("Impression", "Seen"))
    assert [entry["step"] for entry in evaluation["curve"] if "loss" in entry] == [1, 2, 3, 4]
    readme = (folder / "README.md").read_text()
    record = json.loads((folder / "finetune.json").read_text())
    assert record["data"]["sha256"] in readme
    assert f"| Held-out loss | {outcome.loss_before:.4f} | {outcome.loss_after:.4f} |" in readme
    assert all(words in readme for words in ("never for clinical use", "AI-generated", "ai.google.dev/gemma/terms"))
    assert str(place) not in readme.replace(str(real_dir), "")
    assert "`finetune.json` holds the paths of data" in readme
    assert "`evaluation.json` quotes 1 held-out row " in readme
    assert (folder / "NOTICE").exists()


def test_the_loss_is_over_the_answers_only(place, gemma_tokenizer):
    """The held-out loss equals the mean cross-entropy of the answers, computed here without the trainer."""
    from transformers import AutoModelForCausalLM

    outcome = train("finetune.max_steps=1", "finetune.batch_size=1")
    rows, _ = encoded()
    _, held_out = split(rows, 0.2, 0)
    base = AutoModelForCausalLM.from_pretrained(job().model.path)
    losses = []
    for one in held_out:
        with torch.inference_mode():
            scores = base(torch.tensor([one.input_ids])).logits[0, one.prompt_tokens - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(scores, torch.tensor(one.input_ids[one.prompt_tokens :])))
    assert outcome.loss_before == pytest.approx(float(torch.stack(losses).mean()), rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch"])
def test_a_training_that_was_stopped_and_resumed_gives_the_same_adapter(place, optimizer):
    chosen = ("finetune.eval_steps=2", f"finetune.optimizer={optimizer}", "finetune.lora_dropout=0.1")
    whole = train(*chosen, "finetune.output=whole")
    assert whole.trained_now
    for step in (1, 2):
        stopping = Stopping(step)
        outcome = train(*chosen, stopper=stopping.stopper, show=stopping)
        assert (outcome.reason, outcome.step) == ("terminate", step)
        assert not (place / "outputs/j-adapter").exists()
    outcome = train(*chosen)
    assert outcome.reason is None
    assert equal(weights(), weights("whole"))
    assert outcome.loss_before == whole.loss_before
    assert outcome.loss_after == whole.loss_after
    again = train(*chosen)
    assert not again.trained_now
    assert again.loss_after == whole.loss_after


def test_a_stop_during_the_final_evaluation_repeats_no_step(place):
    stopping = Stopping(3)
    assert train(stopper=stopping.stopper, show=stopping).reason == "terminate"
    steps = []
    assert train(show=steps.append).reason is None
    assert steps == []
    assert (place / "outputs/j-adapter/evaluation.json").exists()


def test_an_incomplete_checkpoint_is_not_used(place):
    stopping = Stopping(2)
    train(stopper=stopping.stopper, show=stopping)
    newest = place / "outputs/j-adapter.training/checkpoints/checkpoint-2"
    (newest / "complete.json").unlink()
    (newest / "adapter_model.safetensors").write_bytes(b"")
    steps = []
    train(show=steps.append)
    assert steps[0].step == 1
    train("finetune.output=whole")
    assert equal(weights(), weights("whole"))


def test_a_full_disk_at_the_end_is_one_message_and_no_step_is_lost(place):
    """With a low limit on file sizes, then a higher one, each library fails in its own way."""
    small = ("finetune.lora_r=2", 'finetune.lora_targets=["q_proj"]')
    stopping = Stopping(3)
    train(*small, stopper=stopping.stopper, show=stopping)
    working = place / "outputs/j-adapter.training"
    limits = {"adapter_model.safetensors": 6_000, "tokenizer.json": 20_000}
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in limits.values():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            with pytest.raises(StorageError, match="size limit"):
                train(*small)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
        assert not (place / "outputs/j-adapter").exists()
        assert not (working / "adapter.partial").exists()
    steps = []
    assert train(*small, show=steps.append).reason is None
    assert steps == []
    assert equal(weights(), weights(str(working / "checkpoints/checkpoint-3")))
    sizes = {name: (place / "outputs/j-adapter" / name).stat().st_size for name in limits}
    assert limits["adapter_model.safetensors"] < sizes["adapter_model.safetensors"] < limits["tokenizer.json"]
    assert sizes["tokenizer.json"] > limits["tokenizer.json"]


def test_a_pinned_base_from_the_hub_is_recorded_by_id_and_revision(place, tiny_dir, monkeypatch):
    """In the keys of peft, base_model_name_or_path and revision; reading the adapter gives the same commit."""
    commit, fetched = "0123456789abcdef" * 2 + "01234567", []
    snapshot = place / "hub" / commit
    shutil.copytree(tiny_dir, snapshot)

    def fetch(name: str, revision: str, patterns: list[str], *, where: str) -> Path:
        fetched.append((name, revision))
        return snapshot

    monkeypatch.setattr("gxr_batch.models.source.fetch", fetch)
    train(f"model.path=owner/name@{commit}", "finetune.max_steps=1", "finetune.sample_rows=0")
    folder = place / "outputs/j-adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", commit)
    readme = (folder / "README.md").read_text()
    assert "base_model: owner/name\n" in readme
    fetched.clear()
    sources = find(ModelSection(path=str(folder)), weights=False)
    assert fetched == [("owner/name", commit)]
    assert sources.pins()["model.base"] == f"owner/name@{commit}"


def test_an_adapter_of_a_multimodal_base_leaves_its_vision_part_alone(place, tmp_path):
    base = small_model(tmp_path / "base", tiny_multimodal())
    train(f"model.path={base}", "finetune.sample_rows=0")
    folder = place / "outputs/j-adapter"
    assert "vision_tower" in json.loads((folder / "adapter_config.json").read_text())["exclude_modules"]
    from gxr_batch.models.device_memory import MemoryBudget
    from gxr_batch.models.load_weights import load_model, load_tokenizer

    made = job(f"model.path={folder}")
    loaded = load_model(made.model, load_tokenizer(made.model), MemoryBudget(made.engine))
    assert loaded.adapter is not None


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("finetune.learning_rate=0.02", "finetune.learning_rate (0.01 -> 0.02)"),
        ("finetune.max_steps=4", "finetune.steps (3 -> 4)"),
        ("finetune.seed=1", "finetune.seed (0 -> 1)"),
        ('finetune.data=["other.jsonl"]', "data ("),
        ("prompt.format=literal", "prompt.format (chat -> literal)"),
    ],
)
def test_a_training_with_other_settings_or_data_is_not_resumed(place, override, named):
    write(place / "other.jsonl", *(row(finding, "Other.") for finding in FINDINGS))
    stopping = Stopping(1)
    train("finetune.sample_rows=0", stopper=stopping.stopper, show=stopping)
    with pytest.raises(FingerprintError) as caught:
        train(override)
    assert named in str(caught.value)
    assert "--fresh" in str(caught.value)


def test_settings_that_do_not_change_the_adapter_may_change(place):
    stopping = Stopping(1)
    train(stopper=stopping.stopper, show=stopping)
    assert train("finetune.logging_steps=2", "finetune.eval_steps=3").reason is None


def test_fresh_keeps_the_old_folders_under_other_names(place):
    train("finetune.max_steps=1")
    before = weights()
    train("finetune.max_steps=2", fresh=True)
    (kept,) = (place / "outputs").glob("j-adapter.before-*")
    assert equal(before, weights(str(kept)))
    assert not equal(before, weights())
    assert len(list((place / "outputs").glob("j-adapter.training.before-*"))) == 1


def test_an_output_that_is_not_an_adapter_is_refused(place):
    (place / "outputs/j-adapter").mkdir(parents=True)
    with pytest.raises(RunError, match="not an adapter of gxr-batch finetune"):
        train()


def test_the_training_folder_of_a_finished_adapter_can_be_deleted(place):
    train()
    shutil.rmtree(place / "outputs/j-adapter.training")
    assert not train().trained_now
    assert not (place / "outputs/j-adapter.training").exists()


def test_training_on_four_bit_weights_lowers_the_loss(place):
    outcome = train("model.load_in_4bit=true", "model.dtype=bfloat16", "finetune.max_steps=4")
    assert outcome.loss_after < outcome.loss_before
    assert json.loads(Path("outputs/j-adapter/finetune.json").read_text())["resolved"]["four_bit"] is True


def test_bfloat16_trains_and_saves_in_bfloat16(place):
    outcome = train("model.dtype=bfloat16", "finetune.max_steps=4", "finetune.gradient_checkpointing=true")
    assert outcome.loss_after < outcome.loss_before
    assert {tensor.dtype for tensor in weights().values()} == {torch.bfloat16}


def test_the_chunked_loss_is_the_same(place, monkeypatch):
    whole = train("finetune.max_steps=2")
    monkeypatch.setattr("gxr_batch.finetune.train._MOST_LOGITS_BYTES", 0)
    chunked = train("finetune.max_steps=2", "finetune.output=chunked")
    assert chunked.loss_before == pytest.approx(whole.loss_before, rel=1e-5)
    assert chunked.loss_after == pytest.approx(whole.loss_after, rel=1e-3)


def test_lora_targets_that_match_no_module_are_refused(place):
    with pytest.raises(JobFileError, match="No module of the model"):
        train('finetune.lora_targets=["nonsense"]')


def test_an_optimizer_that_does_not_run_here_is_replaced_with_a_notice(place, monkeypatch):
    import bitsandbytes.optim

    def broken(*arguments, **settings):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(bitsandbytes.optim.adamw, "AdamW", broken)
    said = []
    train("finetune.max_steps=1", said=said)
    assert "finetune.optimizer = adamw_8bit does not run on cpu; using adamw_torch." in said


def test_missing_packages_are_reported(place, monkeypatch):
    monkeypatch.setattr("gxr_batch.extras.find_spec", lambda name: None)
    with pytest.raises(GxrError, match="needs trl, peft, datasets, which are not installed") as caught:
        train()
    assert caught.value.next_step == install_command("finetune")


# ---------------------------------------------------------------------- the command


@pytest.fixture
def work(place) -> Workplace:
    workplace = Workplace.__new__(Workplace)
    workplace.folder = place
    return workplace


def test_the_command_resumes_after_a_kill_and_a_stop(work, place):
    """The real command with SIGKILL, with SIGTERM, to its end, and again with nothing left to do."""
    # The thread count changes the order of additions; other tests in this process may have set it.
    arguments = ["finetune", "j.toml", "--set", "finetune.max_steps=60", "--set", "engine.threads=1"]
    checkpoints = place / "outputs/j-adapter.training/checkpoints"

    def steps_saved() -> int:
        """The newest complete checkpoint; only two are kept, so do not wait for a certain one."""
        return max((int(path.parent.name.split("-")[1]) for path in checkpoints.glob("*/complete.json")), default=0)

    for how in (signal.SIGKILL, signal.SIGTERM):
        before = steps_saved()
        child = work.start(*arguments)
        deadline = time.monotonic() + 120
        while steps_saved() < before + 3:
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(how)
        stdout, stderr = child.communicate(timeout=120)
        assert child.returncode == (-9 if how == signal.SIGKILL else 75), stderr
    assert "stopped by a signal" in stdout
    done = work.gxr(*arguments, "--json")
    summary = json.loads(done.stdout)
    assert summary["finished"]
    assert summary["step"] == 60
    assert "Resuming from step" in done.stderr
    train("finetune.max_steps=60", "finetune.output=whole", "engine.threads=1")
    assert equal(weights(), weights("whole"))
    for finding in FINDINGS:
        assert finding not in done.stderr + stderr
    assert "nothing left to do" in work.gxr(*arguments).stdout
    assert "--fresh" in work.gxr(*arguments, "--set", "finetune.seed=9", expect=2).stderr


def test_the_command_reports_errors_without_a_traceback(work, place):
    (place / "data.jsonl").write_text('{"answer": "canary"\n')
    done = work.gxr("finetune", "j.toml", expect=2)
    assert "data.jsonl, line 1" in done.stderr
    assert "canary" not in done.stderr
    assert "Traceback" not in done.stderr
    # Reported before the model is looked up.
    done = work.gxr("finetune", "j.toml", "--set", "finetune.data=[]", "--set", "model.path=nowhere/at-all", expect=2)
    assert "There is no training data" in done.stderr
