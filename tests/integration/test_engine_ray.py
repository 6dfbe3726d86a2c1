"""The ray engine on a real Ray on this machine, shared by the tests of this file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType

import faulty_engine
import psutil
import pytest
from engine_contract import CANARY, EngineContract, Subject, Watched
from fault_server import Act, FaultServer
from faulty_engine import playing
from running import Faults

from gxr_batch.engines import create
from gxr_batch.engines.base import EngineInfo, Identity, Session
from gxr_batch.engines.ray.cluster import connected, load_ray
from gxr_batch.engines.ray.pool import Member, joined
from gxr_batch.engines.ray.worker import Worker
from gxr_batch.engines.suspects import CRASHED
from gxr_batch.errors import EngineFailed, EngineUnavailable, ModelUnavailable, OutOfTime
from gxr_batch.extras import install_command
from gxr_batch.job import Job, RaySection
from gxr_batch.records import Encoded, Key, Messages, Prompt, Turn
from gxr_batch.run.check import check

WORDS = "a small pleural effusion on the left and a normal heart"


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    """Started once: every engine of this file connects to it."""
    cloudpickle = load_ray().cloudpickle
    cloudpickle.register_pickle_by_value(faulty_engine)  # the workers cannot import from the tests' folder
    with connected(RaySection(workers=6), on_gpu=False):
        yield
    cloudpickle.unregister_pickle_by_value(faulty_engine)


def job(
    echo: dict[str, object] | None = None,
    api: dict[str, object] | None = None,
    form: dict[str, object] | None = None,
    **ray: object,
) -> Job:
    return Job.model_validate(
        {
            "name": "j",
            "input": {"path": "f.csv"},
            "engine": {"kind": "ray", "slots": 4},
            "ray": {"worker": "echo", "workers": 2, "cpus_per_worker": 1} | ray,
            "echo": echo or {},
            "api": api or {},
            "form": form or {},
        }
    )


def prompt(number: int, text: str = WORDS, new: int = 32, **more: object) -> Prompt:
    turns = (Turn("user", f"{text} {number}"),)
    length = len(turns[0].text.split())
    return Prompt(Key(f"C{number}", 1), Messages(turns, "t"), Encoded(None, length), number + 1, new)._replace(**more)


def prompts(count: int) -> list[Prompt]:
    return [prompt(number) for number in range(count)]


@contextmanager
def session(made: Job, said: list[str] | None = None, faults: Faults | None = None) -> Iterator[Session]:
    with playing(faults or {}), create(made, (said if said is not None else []).append).open() as opened:
        yield opened


def worker_processes() -> set[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return {process for process in found if process.name().startswith("ray::Worker")}


@pytest.fixture(scope="class")
def opened(one_ray):
    """Two workers for all tests of the contract: starting them for each would take most of the time."""
    with session(job({"tokens_per_second": 400}), faults={"fail_containing": CANARY}) as opened:
        yield opened


class TestRayContract(EngineContract):
    @pytest.fixture
    def subject(self, opened):
        return Subject(
            open=lambda: nullcontext(opened),
            prompts=prompts,
            lasting=lambda count: [prompt(number, " ".join(["word"] * 480), 600) for number in range(count)],
            spoil=lambda spoiled: prompt(int(spoiled.key.row_id[1:]), CANARY),
        )


def once(act: Callable[[], None]) -> Callable[[Watched], None]:
    """Return a callback that acts when the second row comes back."""
    left = [act]

    def after(seen: Watched) -> None:
        if len(seen.completions) >= 2 and left:
            left.pop()()

    return after


def test_the_rows_of_a_killed_worker_run_again_and_are_returned_once():
    said: list[str] = []
    before = worker_processes()
    with session(job({"tokens_per_second": 40}), said) as opened:
        one, other = sorted(worker_processes() - before, key=lambda process: process.pid)
        seen = Watched().watch(opened, prompts(30), after=once(one.kill))
        assert other.is_running()
    assert sorted(seen.keys()) == sorted(tuple(given.key) for given in prompts(30))
    assert all(completion.error is None for completion in seen.completions)
    last = seen.pulses[-1]
    assert 1 <= last.retries <= 4
    assert last.workers is not None
    assert last.workers.lost == 1
    assert sum(last.workers.rows) == 30
    assert seen.longest_silence < 1.0 + seen.stall
    assert sum("was lost; it will be replaced" in sentence for sentence in said) == 1


def test_a_row_that_kills_its_worker_is_found_and_the_other_rows_succeed(capfd):
    killer = prompt(3, CANARY)
    given = [*prompts(3), killer, *prompts(12)[4:]]
    with session(job({"tokens_per_second": 200}), faults={"kill_containing": CANARY}) as opened:
        seen = Watched().watch(opened, given)
    errors = {completion.key: completion.error for completion in seen.completions}
    assert len(seen.completions) == len(given)
    assert {key: error for key, error in errors.items() if error} == {killer.key: CRASHED}
    assert seen.pulses[-1].workers is not None
    assert seen.pulses[-1].workers.lost == 2
    out, err = capfd.readouterr()
    assert out + err == "", "Ray printed output of its workers"


def test_a_row_that_hangs_its_worker_is_found_and_the_other_rows_succeed():
    said: list[str] = []
    hanging = prompt(3, CANARY)
    given = [*prompts(3), hanging, *prompts(12)[4:]]
    made = job({"tokens_per_second": 200}, hung_after="6s")
    with session(made, said, {"hang_containing": CANARY}) as opened:
        seen = Watched().watch(opened, given)
    errors = {completion.key: completion.error for completion in seen.completions}
    assert len(seen.completions) == len(given)
    assert {key: error for key, error in errors.items() if error} == {hanging.key: CRASHED}
    assert seen.pulses[-1].workers is not None
    assert seen.pulses[-1].workers.lost == 2
    assert sum("did not respond for 6 s; it will be replaced" in sentence for sentence in said) == 2
    assert seen.longest_silence < 1.0 + seen.stall


def test_a_worker_that_stops_responding_is_replaced_and_works_again():
    said: list[str] = []
    before = worker_processes()
    with session(job({"tokens_per_second": 40}, hung_after="6s"), said) as opened:
        stopped = min(worker_processes() - before, key=lambda process: process.pid)
        seen = Watched().watch(opened, prompts(30), after=once(stopped.suspend))
        assert sorted(seen.keys()) == sorted(tuple(given.key) for given in prompts(30))
        assert all(completion.error is None for completion in seen.completions)
        assert sum("did not respond" in sentence for sentence in said) == 1
        stopped.wait(60)
        later, deadline = Watched(), time.monotonic() + 120
        while time.monotonic() < deadline and not (later.pulses and later.pulses[-1].workers.alive == 2):
            later.watch(opened, prompts(8))
    assert later.pulses[-1].workers.alive == 2
    assert later.pulses[-1].workers.lost == 1


def test_workers_are_not_blamed_if_the_driver_does_not_listen():
    with session(job({"tokens_per_second": 40}, hung_after="6s")) as opened:
        seen = Watched().watch(opened, prompts(30), after=once(lambda: time.sleep(9)))
    assert sorted(seen.keys()) == sorted(tuple(given.key) for given in prompts(30))
    assert seen.pulses[-1].workers is not None
    assert seen.pulses[-1].workers.lost == 0


def test_a_host_without_this_package_is_named_as_a_cause(monkeypatch):
    elsewhere = ModuleType("elsewhere")  # importable only here
    elsewhere.Worker = type("Worker", (Worker,), {"__module__": "elsewhere"})
    monkeypatch.setitem(sys.modules, "elsewhere", elsewhere)
    monkeypatch.setattr("gxr_batch.engines.ray.open_pool.Worker", elsewhere.Worker)
    with pytest.raises(ModelUnavailable, match="before its engine was open") as raised:  # noqa: SIM117
        with session(job(workers=1, max_restarts=1)):
            pass
    assert "this version of gxr-batch" in raised.value.next_step


def test_a_worker_that_gets_more_slots_gets_more_rows():
    """The driver must know: the engine waits for rows as long as a slot is free."""
    said: list[str] = []
    with session(job({"tokens_per_second": 100}, workers=1), said, faults={"more_slots": 9}) as opened:
        seen = Watched().watch(opened, prompts(40))
        assert (opened.info.slots, opened.info.reproducible) == (9, False)
    assert sorted(seen.keys()) == sorted(tuple(given.key) for given in prompts(40))
    assert 4 < seen.ahead <= 9
    assert said.count("9 slots from now on.") == 1


def test_an_engine_that_keeps_failing_ends_the_stream_with_its_own_message():
    said: list[str] = []
    seen = Watched()
    with (
        session(job(workers=1, max_restarts=1), said, {"crash_after": 5}) as opened,
        pytest.raises(EngineFailed, match="asked to fail here") as raised,
    ):
        seen.watch(opened, prompts(30))
    assert "worker 1 on" in raised.value.where
    assert 5 <= len(set(seen.keys())) == len(seen.completions) <= 10
    assert sum("will be replaced" in sentence for sentence in said) >= 1


def test_a_worker_that_cannot_open_its_engine_raises_its_error_here():
    with FaultServer(lambda body, number: Act(401, {"error": CANARY})) as server:
        made = job(worker="api", api={"model": "m", "base_url": server.url})
        with pytest.raises(ModelUnavailable, match="The server requires a token") as raised, session(made):
            pass
    assert "(worker" in raised.value.where
    assert CANARY not in str(raised.value)


def test_a_token_that_expires_ends_the_stream_and_fails_no_row():
    said: list[str] = []
    seen = Watched()
    with FaultServer(lambda body, number: Act(401) if number > 20 else None) as server:
        made = job(worker="api", api={"model": "m", "base_url": server.url})
        with session(made, said) as opened, pytest.raises(EngineUnavailable, match="requires a token"):
            seen.watch(opened, prompts(60))
    assert seen.completions
    assert {completion.error for completion in seen.completions} == {None}
    assert not any("replaced" in sentence for sentence in said)


def test_workers_that_do_not_fit_the_cluster_are_reported_after_a_while():
    said: list[str] = []
    with pytest.raises(ModelUnavailable, match="1 of 1 workers did not fit the cluster"):  # noqa: SIM117
        with session(job(workers=1, cpus_per_worker=64, give_up_after="6s"), said):
            pass
    assert any("have not started yet" in sentence for sentence in said)


def test_workers_are_not_waited_for_when_the_run_must_stop():
    engine = create(job(workers=1, cpus_per_worker=64))
    with pytest.raises(OutOfTime), engine.open(time.monotonic() + 2):
        pass


def test_a_text_from_a_worker_is_shown_in_the_drivers_process():
    shown: list[str] = []
    with session(job(workers=1)) as opened:
        (completion,) = Watched().watch(opened, [prompt(1, on_text=shown.append)]).completions
    assert shown == [completion.text]


def test_workers_write_the_jobs_form_and_report_the_sections_that_were_cut(tmp_path, monkeypatch):
    (tmp_path / "own.toml").write_text('sections = ["Impression", "Teaching point"]\n')
    monkeypatch.chdir(tmp_path)
    made = job(form={"name": "own.toml"}, workers=1)
    engine = create(made)
    (tmp_path / "own.toml").unlink()  # as on another host
    with engine.open() as opened:
        done = Watched().watch(opened, [prompt(1), prompt(2, new=6)]).completions
    whole, cut = sorted(done, key=lambda completion: completion.key)
    assert whole.text == (
        "Impression: [echo 2] a small pleural effusion on\n\nTeaching point: the left and a normal heart 1"
    )
    assert (whole.finish_reason, whole.cut_sections) == ("stop", ())
    assert cut.text == "Impression: [echo 3] a\n\nTeaching point: small pleural effusion"
    assert (cut.finish_reason, cut.cut_sections) == ("closed", (1,))


def test_without_ray_the_message_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModelUnavailable) as raised:
        load_ray()
    assert raised.value.next_step == install_command("ray")


def test_check_also_names_what_to_install(monkeypatch, tmp_path):
    table = tmp_path / "f.csv"
    table.write_text("findings\nclear lungs\n")
    asked = job().with_values({"input.path": str(table), "run.output": str(tmp_path / "out")})
    check(asked, limit=None, say=[].append)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModelUnavailable, match="not installed"):
        check(asked, limit=None, say=[].append)


def member(number: int, **changes: object) -> Member:
    made = Member(number, None)
    identity = Identity(kind="transformers", model="m", weights_sha256=str(changes.pop("weights", "w")))
    values = {"device": "cuda:0", "dtype": "bfloat16", "quantization": None, "slots": 8} | changes
    made.info = EngineInfo(identity=identity, load_seconds=1, reproducible=True, **values)
    made.host = "n1"
    return made


def test_a_pool_is_the_sum_of_its_workers():
    members = [member(1, notices=("one",)), member(2, slots=6, notices=("one", "two"))]
    members[1].clock.heard(100.0, 400.0, 400.0, 100.002)
    info = joined(members, 3.0, {"ray": "2"})
    assert (info.slots, info.device, info.load_seconds) == (14, "2 x cuda:0 on n1", 3.0)
    assert info.notices[:2] == ("one", "two")
    assert "The clock of n1 is 300.0 s ahead" in info.notices[2]


def test_workers_with_different_code_get_a_notice_and_are_not_reproducible():
    one, same, other = (member(at, versions={"forward": name}) for at, name in enumerate(("tiles", "tiles", "dots"), 1))
    alike, mixed = joined([one, same], 0.0, {"ray": "2"}), joined([one, other], 0.0, {"ray": "2"})
    assert (alike.reproducible, mixed.reproducible) == (True, False)
    assert not alike.notices
    assert "different code (dots, tiles)" in mixed.notices[0]


@pytest.mark.parametrize("change", [{"weights": "other"}, {"dtype": "float32"}, {"quantization": "4bit"}])
def test_workers_that_would_write_different_texts_are_refused(change):
    with pytest.raises(ModelUnavailable, match="Workers differ in"):
        joined([member(1), member(2, **change)], 0.0, {"ray": "2"})
