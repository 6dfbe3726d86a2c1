"""The vllm engine without vLLM: its stream over a fake host, what it would open vLLM with, and what it refuses.

`test_engine_vllm.py` runs the same stream with the real vLLM.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import pytest
from engine_contract import CANARY, EngineContract, Subject, Watched
from places import SUPPORT
from safetensors.torch import load_file, save_file
from tiny import save_adapter, tiny_gemma

from gxr_batch.engines import vllm
from gxr_batch.engines.base import EngineInfo, Identity, StopRequest
from gxr_batch.engines.vllm import VllmEngine, _opened, engine_args, host_process
from gxr_batch.engines.vllm.host import Steps
from gxr_batch.engines.vllm.host_messages import Answer, Setup
from gxr_batch.engines.vllm.host_process import HostProcess
from gxr_batch.engines.vllm.session import Limits, RowState, VllmSession, completed
from gxr_batch.errors import EngineFailed, JobFileError, ModelUnavailable, OutOfTime
from gxr_batch.extras import install_command
from gxr_batch.forms import form_of, form_of_run
from gxr_batch.job import Job, load_job, make_job
from gxr_batch.models.device_memory import MemoryBudget
from gxr_batch.models.form_tokens import FormTokens
from gxr_batch.models.placement import Placement
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt, Turn
from gxr_batch.run.check import check

FAKE = (sys.executable, str(SUPPORT / "fake_vllm_host.py"))
DEADLY, REFUSED = 13, 14
SLOTS = 4


class Numbers:
    """Decodes ids to their numbers; an odd number of them ends in half a character."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids)) + "\ufffd" * (len(ids) % 2)


def prompts(count: int, ids=(2, 5, 9), new: int = 5, first: int = 0) -> list[Prompt]:
    messages = Messages((Turn("user", CANARY),), "t")
    rows = range(first, first + count)
    return [Prompt(Key(f"r{row}", 1), messages, Encoded(list(ids), len(ids)), row, new) for row in rows]


@contextmanager
def opened(
    seconds: float = 0.02,
    max_restarts: int = 3,
    said: list[str] | None = None,
    again: dict | None = None,
    capacity: int = 200,
    **more: bool,
):
    settings = {"seconds": seconds, "deadly": DEADLY, "refused": REFUSED, **more}

    def start() -> HostProcess:
        return HostProcess(Setup(settings | (again or {}), {}, None, []), {}, FAKE)

    host = HostProcess(Setup(settings, {}, None, []), {}, FAKE)
    info = EngineInfo(
        identity=Identity(kind="vllm", model="fake"),
        device="cpu",
        dtype=None,
        quantization=None,
        slots=SLOTS,
        load_seconds=0,
        reproducible=False,
        versions={"vllm": _opened(host)},
    )
    limits = Limits(vocab=1024, capacity=capacity, max_restarts=max_restarts)
    say = [] if said is None else said
    session = VllmSession(info, host, start, Numbers(), limits, say=say.append)
    try:
        yield session
    finally:
        session.close()


@pytest.fixture(scope="module")
def fake():
    with opened() as session:
        yield session


class TestContract(EngineContract):
    @pytest.fixture
    def subject(self, fake):
        return Subject(
            open=lambda: nullcontext(fake),
            prompts=prompts,
            lasting=lambda count: prompts(count, new=60),
            spoil=lambda prompt: prompt._replace(encoded=Encoded([REFUSED], 1)),
        )


@pytest.mark.parametrize(
    ("spoiled", "part"),
    [
        (Encoded([], 0), "no prompt"),
        (Encoded([5] * 198, 198), "more than 200 tokens"),
        (Encoded([5, 1024], 2), "tokenizer belongs to another model"),
        (Encoded([REFUSED], 1), "could not take this row"),
    ],
)
def test_a_prompt_that_the_model_cannot_process_fails_alone(fake, spoiled, part):
    work = prompts(3)
    work[1] = work[1]._replace(encoded=spoiled)
    errors = {completion.key.row_id: completion.error for completion in Watched().watch(fake, work).completions}
    assert part in errors.pop("r1")
    assert errors == {"r0": None, "r2": None}


def test_a_shown_text_arrives_in_whole_characters_and_complete(fake):
    pieces: list[str] = []
    (completion,) = Watched().watch(fake, [prompts(1, new=7)[0]._replace(on_text=pieces.append)]).completions
    assert [len(piece.split()) for piece in pieces] == [2, 2, 2, 1]
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert "".join(pieces) == completion.text


def test_a_host_that_does_not_listen_delays_neither_the_stream_nor_its_end(monkeypatch):
    monkeypatch.setattr(host_process, "_CLOSE_SECONDS", 0.2)
    stop = StopRequest()
    with opened(capacity=400_000, deaf=True) as session:
        more_than_a_pipe_holds = prompts(SLOTS, ids=[5] * 300_000)
        seen = Watched().watch(
            session, more_than_a_pipe_holds, stop, after=lambda seen: stop.now() if len(seen.pulses) > 1 else None
        )
        assert (len(seen.taken), seen.completions) == (SLOTS, [])
        assert seen.longest_silence < 1 + seen.stall
        host = session._host
    assert host._process.returncode == -9
    assert not host.log.parent.exists()


def test_rows_of_an_engine_that_died_start_again_in_the_next():
    said: list[str] = []
    with opened(seconds=0.05, said=said) as session:

        def kill_once(seen: Watched) -> None:
            if seen.pulses and not said:
                session._host._process.kill()

        seen = Watched().watch(session, prompts(6, new=30), after=kill_once)
    assert sorted(completion.key.row_id for completion in seen.completions) == [f"r{row}" for row in range(6)]
    assert all(completion.new_tokens == 30 for completion in seen.completions)
    assert 1 <= seen.pulses[-1].retries <= SLOTS
    assert [pulse.new_tokens for pulse in seen.pulses] == sorted(pulse.new_tokens for pulse in seen.pulses)
    assert seen.longest_silence < 1 + seen.stall
    assert len(said) == 1
    assert "1 of 3" in said[0]


def test_a_row_that_keeps_killing_the_engine_fails_and_the_others_succeed():
    work = prompts(8)
    work[1] = work[1]._replace(encoded=Encoded([DEADLY], 1))
    with opened() as session:
        seen = Watched().watch(session, work)
    by_row = {completion.key.row_id: completion for completion in seen.completions}
    assert len(by_row) == len(seen.completions) == 8
    assert "died over this row" in by_row.pop("r1").error
    assert all(completion.error is None for completion in by_row.values())


@pytest.mark.parametrize("again", [{}, {"unopened": "RuntimeError: no memory", "log": ""}])
def test_an_engine_that_dies_too_often_is_given_up_with_its_log_kept(again):
    with opened(max_restarts=1, again=again) as session, pytest.raises(EngineFailed, match="died 2 times") as caught:
        Watched().watch(session, prompts(1, ids=[DEADLY]))
    log = Path(caught.value.where.partition("own log: ")[2])
    assert log.exists()
    shutil.rmtree(log.parent)
    assert CANARY not in str(caught.value)


def test_without_a_restart_the_first_death_ends_the_stream():
    with opened(max_restarts=0) as session, pytest.raises(EngineFailed, match="died once") as caught:
        Watched().watch(session, prompts(1, ids=[DEADLY]))
    shutil.rmtree(Path(caught.value.where.partition("own log: ")[2]).parent)


def test_the_row_at_fault_for_the_last_death_is_yielded_before_the_engine_is_given_up():
    seen = Watched()
    work = prompts(SLOTS)
    work[0] = work[0]._replace(encoded=Encoded([DEADLY], 1))
    with opened(max_restarts=2) as session:
        with pytest.raises(EngineFailed, match="died 3 times") as caught:
            seen.watch(session, work)
        assert [(done.key.row_id, bool(done.error)) for done in seen.completions] == [("r0", True)]
    shutil.rmtree(Path(caught.value.where.partition("own log: ")[2]).parent)


def test_an_engine_that_died_over_the_last_row_is_restarted_for_the_next_stream():
    said: list[str] = []
    with opened(said=said) as session:
        seen = Watched().watch(session, prompts(1, ids=[DEADLY]))
        assert "died over this row" in seen.completions[0].error
        assert len(said) == 2
        assert Watched().watch(session, prompts(1)).completions[0].error is None
        assert "3 of 3" in said[2]


def test_a_host_without_a_parent_leaves_no_process_and_no_file():
    with opened() as session:
        host = session._host
        assert host.log.exists()
    assert host._process.returncode == 0
    assert not host.log.parent.exists()


STARTER = """
import time
from gxr_batch.engines.vllm.host_process import HostProcess
from gxr_batch.engines.vllm.host_messages import Answer, Setup
host = HostProcess(Setup({}, {}, None, []), {})
time.sleep(600)
"""
# As much of vLLM as a host needs to begin opening it, for minutes and without listening.
OPENING = {
    "__init__.py": "__version__ = '0.0.fake'\nclass AsyncEngineArgs: pass\n",
    "lora/request.py": "class LoRARequest: pass\n",
    "v1/engine/async_llm.py": """
import os, pathlib, subprocess, sys, time
class AsyncLLM:
    def from_engine_args(arguments, stat_loggers):
        core = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pathlib.Path(os.environ["VLLM_RPC_BASE_PATH"], "socket").touch()
        pathlib.Path(os.environ["STARTED"]).write_text(f"{os.getpid()} {core.pid}")
        time.sleep(600)
""",
}


def test_a_host_whose_run_is_killed_while_it_opens_vllm_ends_at_once_with_all_its_processes(tmp_path):
    for name, source in OPENING.items():
        file = tmp_path / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    temporary, started = tmp_path / "t", tmp_path / "started"
    temporary.mkdir()
    paths = [str(tmp_path), str(Path(host_process.__file__).parents[3])]
    more = {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(temporary), "STARTED": str(started)}
    starter = subprocess.Popen([sys.executable, "-c", STARTER], env=os.environ | more)
    try:
        deadline = time.monotonic() + 60
        while not (started.exists() and started.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        family = [psutil.Process(int(pid)) for pid in started.read_text().split()]
        assert [file.name for file in temporary.glob("*/*")] != []
    finally:
        starter.kill()
        starter.wait()
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert list(temporary.iterdir()) == []


def test_a_model_that_vllm_cannot_open_names_the_cause_and_not_the_summary():
    log = "ERROR core.py ValueError: max seq len needs more cache\nRuntimeError: Engine core initialization failed."
    host = HostProcess(Setup({"unopened": "RuntimeError: summary", "log": log}, {}, None, []), {}, FAKE)
    with pytest.raises(ModelUnavailable, match="ValueError: max seq len needs more cache"):
        _opened(host)
    host.discard()
    assert not host.log.exists()


def test_a_model_that_opens_too_late_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(vllm, "_LOOK_SECONDS", 0.001)
    host = HostProcess(Setup({"deaf": True}, {}, None, []), {}, FAKE)
    with pytest.raises(OutOfTime):
        _opened(host, time.monotonic())
    host.discard()


def test_shares_add_up_to_the_time_in_which_there_was_any_row():
    steps = Steps()
    steps.wake(10.0)
    steps.step(11.0, 2)
    steps.step(13.0, 4)
    steps.wake(20.0)
    steps.step(21.0, 1)
    assert steps.between(10.0, 13.0) == (1.0, 10 / 3)
    assert steps.between(11.0, 13.0) == (0.5, 4.0)
    assert steps.between(12.0, 13.0) == (0.25, 4.0)
    assert steps.between(13.0, 20.0)[0] == 0
    assert 2 * 1.0 + 2 * 0.5 + steps.between(20.0, 21.0)[0] == 4.0


def test_steps_that_no_row_needs_any_more_are_dropped():
    steps = Steps()
    for second in range(9000):
        steps.step(second, 2)
        steps.forget(second - 10)
    assert len(steps._moments) < 5000
    assert steps.between(8990, 8999) == (4.5, 2.0)


# ---------------------------------------------------------------------- opening


def job(folder: Path, **sections) -> Job:
    model = {"path": str(folder), "max_seq_length": 512} | sections.pop("model", {})
    engine = {"kind": "vllm", "slots": 4} | sections.pop("engine", {})
    data = {"name": "j", "input": {"path": "none"}, "model": model, "engine": engine}
    return Job.model_validate(data | sections)


def prepared(job: Job, tokenizer, memory: MemoryBudget | None = None) -> engine_args.Opening:
    return engine_args.prepare_opening(job, tokenizer, memory or MemoryBudget(job.engine))


class Gpu:
    """A GPU whose free memory the tests choose."""

    def __init__(self, total: int, free: int) -> None:
        self.name, self.context, self._total, self._free = "cuda:0", 0, total, free

    def total(self):
        return self._total

    def free(self):
        return self._free

    def held(self):
        return 0

    def limit(self, size):
        pass

    def holders(self):
        return ()


def test_the_jobs_settings_become_vllms(tiny_model_dir, gemma_tokenizer):
    sampling = {"temperature": 0, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.2}
    made = prepared(job(tiny_model_dir, sampling=sampling, vllm={"eager": True}), gemma_tokenizer)
    arguments = made.setup.arguments
    assert arguments["model"] == str(tiny_model_dir)
    assert (arguments["max_model_len"], arguments["max_num_seqs"], arguments["enforce_eager"]) == (512, 4, True)
    assert arguments["enable_prefix_caching"]
    assert made.setup.sampling == sampling | {"stop_token_ids": [1, 106]}
    assert made.adapter is None
    assert made.vocab == 1024


FORM = {"sections": ["Impression", "Point"], "section": {"Impression": {"max_tokens": 9}}}


def test_a_form_is_passed_to_vllm_and_changes_no_argument_of_a_job_without_one(tiny_model_dir, gemma_tokenizer):
    plain, made = (
        prepared(job(tiny_model_dir), gemma_tokenizer),
        prepared(job(tiny_model_dir, form=FORM), gemma_tokenizer),
    )
    arguments = dict(made.setup.arguments)
    assert arguments.pop("logits_processors") == ["gxr_batch.engines.vllm.form_processor:FormProcessor"]
    assert arguments.pop("async_scheduling") is False
    settings = arguments.pop("additional_config")[engine_args.FORM]
    assert (settings["end_ids"], settings["vocab"]) == ([1, 106], 1024)
    assert form_of_run(settings) == made.form.form
    assert arguments == plain.setup.arguments
    assert made.environment == plain.environment | {"VLLM_USE_V2_MODEL_RUNNER": "0"}


def test_how_a_text_with_a_form_ended_is_found_from_its_ids(gemma_tokenizer):
    form = form_of(make_job("x", [], {"form": FORM}))
    tokens = FormTokens(form, gemma_tokenizer, frozenset({1, 106}), len(gemma_tokenizer))
    row = RowState(prompts(1, new=80)[0], 0.0)

    def made(text: str, *, end: bool = True) -> Completion:
        ids = gemma_tokenizer(text, add_special_tokens=False)["input_ids"]
        return completed(
            row, Answer(0, [*ids, 106] if end else ids, "stop" if end else "length"), gemma_tokenizer, tokens
        )

    whole = made("Impression: Clear lungs.\n\nPoint: Look twice.\n\n")
    assert (whole.text, whole.finish_reason) == ("Impression: Clear lungs.\n\nPoint: Look twice.", "stop")
    cut = made("Impression: one two three four five six seven eight nine\n\nPoint: Look twice.")
    assert (cut.finish_reason, cut.cut_sections) == ("closed", (0,))
    for text, end in (("Clear lungs.", True), ("Impression: Clear lungs.\n\nPoint: Look", False)):
        assert made(text, end=end).error == "vLLM did not hold this row to its form"


def test_on_the_cpu_the_cache_gets_the_memory_limit_or_what_the_slots_need(tiny_model_dir, gemma_tokenizer):
    limited = prepared(job(tiny_model_dir, engine={"memory_limit": "64MiB"}), gemma_tokenizer)
    assert limited.setup.arguments["kv_cache_memory_bytes"] == 64 * 2**20
    free = prepared(job(tiny_model_dir, model={"dtype": "float32"}), gemma_tokenizer)
    layers, heads, head_dim = 4, 2, 32
    assert free.setup.arguments["kv_cache_memory_bytes"] == 4 * 512 * layers * heads * head_dim * 2 * 4


@pytest.mark.parametrize(("limit", "share"), [("20GiB", 20 / 80), ("", 30 / 80), ("70GiB", 59 / 80)])
def test_on_a_gpu_the_memory_limit_is_a_share_of_all_memory_up_to_what_is_free(
    tiny_model_dir, gemma_tokenizer, limit, share
):
    asked = job(tiny_model_dir, model={"dtype": "bfloat16"}, engine={"memory_limit": limit})
    memory = MemoryBudget(asked.engine, devices=[Gpu(80 * 2**30, 60 * 2**30)])
    made = prepared(asked, gemma_tokenizer, memory)
    assert made.setup.arguments["gpu_memory_utilization"] == pytest.approx(share, rel=1e-3)
    assert made.gpu_bytes == pytest.approx(share * 80 * 2**30, rel=1e-3)
    assert made.environment["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_memory_limit_below_one_row_is_refused_by_name(tiny_model_dir, gemma_tokenizer):
    asked = job(tiny_model_dir, model={"dtype": "bfloat16"}, engine={"memory_limit": "1MiB"})
    with pytest.raises(ModelUnavailable, match="does not fit on a single GPU") as caught:
        prepared(asked, gemma_tokenizer, MemoryBudget(asked.engine, devices=[Gpu(80 * 2**30, 60 * 2**30)]))
    assert "raise engine.memory_limit" in caught.value.next_step


def test_threads_are_limited_but_not_bound_to_cores(tiny_model_dir, gemma_tokenizer):
    limited = prepared(job(tiny_model_dir, engine={"threads": 3}), gemma_tokenizer)
    assert limited.environment == {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "3"}
    assert prepared(job(tiny_model_dir), gemma_tokenizer).environment == {}


def test_4_bits_on_a_cpu_are_refused(tiny_model_dir, gemma_tokenizer):
    with pytest.raises(ModelUnavailable, match="4-bit weights on a CPU"):
        prepared(job(tiny_model_dir, model={"load_in_4bit": True}), gemma_tokenizer)


def adapter(folder: Path, **settings) -> Path:
    save_adapter(tiny_gemma(), folder, **settings)
    return folder


def test_an_adapters_rank_is_passed_to_vllm(tiny_model_dir, gemma_tokenizer, tmp_path):
    folder = adapter(tmp_path / "a", rank_pattern={"layers.1.self_attn.q_proj": 12})
    made = prepared(job(tiny_model_dir, model={"adapter": str(folder)}), gemma_tokenizer)
    assert made.setup.adapter == str(folder)
    assert made.setup.arguments["max_lora_rank"] == 16
    assert made.adapter == "beside the weights, by vLLM: 8 LoRA modules, rank 12"


def test_a_rank_that_no_module_has_is_passed_to_vllm(tiny_model_dir, gemma_tokenizer, tmp_path):
    folder = adapter(tmp_path / "a", r=40, target_modules=["q_proj"], rank_pattern={"q_proj": 3})
    made = prepared(job(tiny_model_dir, model={"adapter": str(folder)}), gemma_tokenizer)
    assert made.setup.arguments["max_lora_rank"] == 64


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["norm"]}, "replaces whole weights"),
        ({"r": 513}, "rank is 513"),
    ],
)
def test_an_adapter_that_vllm_does_not_support_is_refused_by_name(
    tiny_model_dir, gemma_tokenizer, tmp_path, settings, part
):
    asked = job(tiny_model_dir, model={"adapter": str(adapter(tmp_path / "a", **settings))})
    with pytest.raises(ModelUnavailable, match=part) as caught:
        prepared(asked, gemma_tokenizer)
    assert "merge it into its model" in caught.value.next_step


def test_an_adapter_of_another_class_of_the_model_is_refused(tiny_model_dir, gemma_tokenizer, tmp_path):
    folder = adapter(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name.replace("model.layers", "model.language_model.layers"): t for name, t in tensors.items()}, weights)
    with pytest.raises(ModelUnavailable, match="trained on another class"):
        prepared(job(tiny_model_dir, model={"adapter": str(folder)}), gemma_tokenizer)


def test_a_gpu_is_selected_by_its_index_among_the_visible_ones(tiny_model_dir, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    placement = Placement(device="cuda:1", dtype="bfloat16", four_bit=False)
    assert engine_args._environment(job(tiny_model_dir), placement) == {"CUDA_VISIBLE_DEVICES": "5"}


def test_without_vllm_the_message_names_what_to_install(monkeypatch, demo_model_dir):
    monkeypatch.setattr("gxr_batch.extras.find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match="not installed") as caught, VllmEngine(job(demo_model_dir)).open():
        pass
    assert caught.value.next_step == install_command("vllm")


def test_check_also_names_what_to_install(monkeypatch, demo_model_dir, tmp_path):
    monkeypatch.setattr("gxr_batch.extras.find_spec", lambda name: None)
    table = tmp_path / "f.csv"
    table.write_text("findings\nclear lungs\n")
    asked = job(demo_model_dir, input={"path": str(table)}, run={"output": str(tmp_path / "out")})
    with pytest.raises(ModelUnavailable, match="not installed"):
        check(asked, limit=None, say=[].append)


def test_a_temperature_that_vllm_refuses_is_refused_when_the_job_file_is_read(tmp_path):
    file = tmp_path / "j.toml"
    file.write_text('name = "j"\n[input]\npath = "f.csv"\n[engine]\nkind = "vllm"\n')
    with pytest.raises(JobFileError, match="at most 2"):
        load_job(file, ["sampling.temperature=2.5"])
    assert any("0.001" in one for one in load_job(file, ["sampling.temperature=0.001"]).warnings())
    assert any("cuda_graphs" in one for one in load_job(file, ["engine.cuda_graphs=true"]).warnings())
