"""The driver's side of the workers: starts them through Ray, keeps one call in flight to each, and detects lost ones.

Ray restarts a lost worker by itself, if necessary on another host, as often as the job allows. The pool also checks
whether the cluster's head is reachable: Ray waits a minute for a lost head and then ends the waiting process, in the
middle of its work and with the exit code of a bug. The pool reports the sum of its workers, which must hold the same
model.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gxr_batch.cells import quoted
from gxr_batch.engines.base import EngineInfo, Pulse, Workers
from gxr_batch.engines.ray.row_assignment import Hand
from gxr_batch.engines.ray.worker_clocks import Offset
from gxr_batch.engines.ray.worker_messages import Order, Report
from gxr_batch.errors import EngineUnavailable, ModelUnavailable

_SILENT_SECONDS = 10.0  # a live worker returns calls within half a second
# Concurrent calls to one worker: an exchange that waits, and one that ends it.
_CALLS_AT_ONCE = 4
_NOTHING = Pulse(0, 0)


class Lost(NamedTuple):
    """A worker does not answer. It is gone with its rows if it was `open`; `final` if Ray does not start it again.

    Until a lost worker is back, further calls may return the same.
    """

    open: bool
    final: bool


@dataclass(eq=False)
class Member:
    """A worker as the driver knows it. `past` counts the work of its earlier processes' engines."""

    number: int
    actor: Any
    hand: Hand = field(default_factory=Hand)
    clock: Offset = field(default_factory=Offset)
    info: EngineInfo | None = None
    host: str = ""
    life: str = ""
    ended_life: str = ""  # a process that was asked to end may still answer
    pulse: Pulse = _NOTHING
    past: Pulse = _NOTHING
    heard_at: float = float("-inf")
    called_at: float = 0.0  # like `heard_at`, on the monotonic clock
    engine_quiet: float = 0.0  # seconds without a heartbeat of its engine, when last heard
    sent_at: float = 0.0

    @property
    def name(self) -> str:
        """The worker's name in messages."""
        return f"worker {self.number}" + (f" on {quoted(self.host)}" if self.host else "")

    @property
    def alive(self) -> bool:
        """True if its engine is open and it answered recently."""
        return self.info is not None and time.monotonic() - self.heard_at < _SILENT_SECONDS

    def forget(self) -> None:
        """Record that its process is gone."""
        self.info, self.hand.slots, self.engine_quiet = None, 0, 0.0
        self.past, self.pulse = _added(self.past, self.pulse), _NOTHING
        self.clock = Offset()  # the next process may be on another host


class Pool:
    """The members, and their calls in flight."""

    def __init__(self, ray: Any, actors: Sequence[Any], head: Head) -> None:
        self._ray, self._head = ray, head
        self.members = [Member(number, actor) for number, actor in enumerate(actors, start=1)]
        self._calls: dict[Any, Member] = {}
        self._all = list(self.members)
        self.lost = 0

    @property
    def idle(self) -> list[Member]:
        """The members without a call in flight."""
        busy = {member.number for member in self._calls.values()}
        return [member for member in self.members if member.number not in busy]

    def call(self, member: Member, order: Order) -> None:
        """Send an order; `next` returns its report."""
        member.sent_at, member.called_at = time.time(), time.monotonic()
        self._calls[member.actor.exchange.remote(order)] = member

    def next(self, seconds: float) -> tuple[Member, Report | Lost] | None:
        """Return the next report or lost member; None if nothing came in time. Raises EngineUnavailable."""
        exceptions = self._ray.exceptions
        if self._head.gone:
            raise _disconnected("its head cannot be reached")
        try:
            # In the order in which they were sent, so that no worker is overlooked for long.
            ready, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=seconds)
            if not ready:
                return None
            member = self._calls.pop(ready[0])
            report: Report = self._ray.get(ready[0])
        except exceptions.ActorDiedError:
            return self._gone(member, final=True)
        except exceptions.ActorUnavailableError:
            return self._gone(member, final=False)
        except exceptions.RayTaskError:  # no method raises, but there is none if a host lacks gxr-batch
            self._ray.kill(member.actor, no_restart=False)
            return self._gone(member, final=False)
        except (exceptions.RayError, ConnectionError) as error:
            raise _disconnected(type(error).__name__) from None
        if report.life == member.ended_life:
            return member, Lost(open=False, final=False)
        member.life, member.host, member.pulse = report.life, report.host, report.pulse
        member.heard_at = time.monotonic()
        member.engine_quiet = min(report.quiet_seconds, member.heard_at - member.hand.dealt_at)
        member.clock.heard(member.sent_at, report.received_at, report.sent_at, time.time())
        return member, report

    def _gone(self, member: Member, *, final: bool) -> tuple[Member, Lost]:
        lost = Lost(member.info is not None, final)
        self.lost += lost.open
        member.forget()
        if final:
            self.members.remove(member)
        return member, lost

    def hung(self, seconds: float) -> list[Member]:
        """Return the members that have held rows this long without a heartbeat.

        Either the engine has shown none, as a report states, or the process does not report. Only time in which it was
        the worker's turn counts: the driver may have been busy itself.
        """
        late = time.monotonic() - seconds
        overdue = {call: called for call, called in self._calls.items() if called.called_at <= late}
        if overdue:
            _, unanswered = self._ray.wait(list(overdue), num_returns=len(overdue), timeout=0)
            overdue = {call: overdue[call] for call in unanswered}
        silent = [member for member in self.members if member.engine_quiet >= seconds]
        return [member for member in (*silent, *overdue.values()) if member.hand.flight]

    def restart(self, member: Member) -> None:
        """End a member whose engine failed or hangs, so that Ray restarts it if allowed."""
        self.lost += 1
        member.ended_life = member.life
        member.forget()
        self._ray.kill(member.actor, no_restart=False)

    def give_up(self, member: Member) -> None:
        """End a member permanently."""
        self.members.remove(member)
        member.forget()
        self._ray.kill(member.actor)

    def drop(self, errand: int) -> None:
        """Have every member drop the work of lower errands."""
        for member in self.members:
            member.actor.drop.remote(errand)

    def close(self) -> None:
        """End the members."""
        for member in self.members:
            self._ray.kill(member.actor)

    def pulse(self, rows_in_flight: int, again: int) -> Pulse:
        """Return the sum of the members' pulses; `again` rows were given to another worker."""
        total = _NOTHING
        for member in self._all:
            total = _added(total, _added(member.past, member.pulse))
        memory = sum(member.pulse.memory_bytes for member in self.members)
        workers = Workers(
            sum(member.alive for member in self.members), self.lost, tuple(member.hand.rows for member in self._all)
        )
        return total._replace(
            rows_in_flight=rows_in_flight, memory_bytes=memory, retries=total.retries + again, workers=workers
        )


def start(ray: Any, count: int, make: Any, arguments: tuple[Any, ...], **options: Any) -> Pool:
    """Start a pool of `count` actors of the class `make`."""
    actor = ray.remote(make).options(max_task_retries=0, max_concurrency=_CALLS_AT_ONCE, **options)
    head = Head(ray.get_runtime_context().gcs_address)
    return Pool(ray, [actor.remote(*arguments) for _ in range(count)], head)


def _disconnected(why: str) -> EngineUnavailable:
    return EngineUnavailable(
        f"The connection to Ray was lost ({why}).",
        where='engine.kind = "ray"',
        next_step="check the cluster, then run the same command again",
    )


def _added(one: Pulse, other: Pulse) -> Pulse:
    return Pulse(
        one.new_tokens + other.new_tokens, 0, splits=one.splits + other.splits, retries=one.retries + other.retries
    )


_EVERY_SECONDS = 5.0
_MISSES = 6  # half a minute: a head that keeps its state elsewhere is back sooner, and closing takes some of the rest
_CONNECT_SECONDS = 0.5


class Head:
    """The head at an address such as "10.0.0.5:6379"."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._at = host.strip("[]"), int(port)
        self._looked_at, self._misses = time.monotonic(), 0

    @property
    def gone(self) -> bool:
        """True if it was unreachable for half a minute. Checks every five seconds, for at most half a second."""
        now = time.monotonic()
        if now - self._looked_at >= _EVERY_SECONDS:
            self._looked_at = now
            self._misses = 0 if self._reached() else self._misses + 1
        return self._misses >= _MISSES

    def _reached(self) -> bool:
        try:
            socket.create_connection(self._at, _CONNECT_SECONDS).close()
        except OSError:
            return False
        return True


# A larger difference between clocks gets a notice, since it misleads when comparing logs of several hosts.
_NOTABLE_SECONDS = 1.0


def joined(members: Sequence[Member], load_seconds: float, versions: Mapping[str, str]) -> EngineInfo:
    """Return the pool's info. Raises ModelUnavailable if two workers would write different texts."""
    first, *others = members
    for other in others:
        check_alike(first, other)
    infos = [_info(member) for member in members]
    of_pool = {"ray": versions["ray"], **_all_versions(infos)}
    mixed = _of_forwards(infos)
    return EngineInfo(
        identity=infos[0].identity,
        device=_devices(members),
        dtype=infos[0].dtype,
        quantization=infos[0].quantization,
        slots=sum(info.slots for info in infos),
        load_seconds=load_seconds,
        reproducible=all(info.reproducible for info in infos) and not mixed,
        versions=of_pool,
        notices=(*dict.fromkeys(notice for info in infos for notice in info.notices), *mixed, *_of_clocks(members)),
        adapter=infos[0].adapter,
    )


def check_alike(first: Member, other: Member) -> None:
    """Raise ModelUnavailable, naming the difference, unless two workers hold the same model."""
    one, two = _info(first), _info(other)
    pairs = {
        "weights": (one.identity.weights_sha256, two.identity.weights_sha256),
        "adapter": (one.identity.adapter_sha256, two.identity.adapter_sha256),
        "tokenizer or configuration": (one.identity.files_sha256, two.identity.files_sha256),
        "number format": (one.dtype, two.dtype),
        "quantisation": (one.quantization, two.quantization),
    }
    for what, (mine, yours) in pairs.items():
        if mine != yours:
            raise ModelUnavailable(
                f"Workers differ in {what}: {str(mine)[:12]} and {str(yours)[:12]}.",
                where=f"{first.name}, {other.name}",
                next_step="give every host the same model, and set model.dtype and model.load_in_4bit",
            )


def _info(member: Member) -> EngineInfo:
    assert member.info is not None, "the worker must be open"
    return member.info


def _devices(members: Sequence[Member]) -> str:
    """Return e.g. "2 x cuda:0 on node1, 2 x cuda:0 on node2"."""
    counted = Counter((_info(member).device, member.host) for member in members)
    return ", ".join(f"{count} x {device} on {quoted(host)}" for (device, host), count in counted.items())


def _all_versions(infos: Iterable[EngineInfo]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for info in infos:
        for name, version in info.versions.items():
            found.setdefault(name, {})[version] = None
    return {name: " | ".join(versions) for name, versions in found.items()}


def _of_forwards(infos: Iterable[EngineInfo]) -> list[str]:
    forwards = sorted({info.versions.get("forward", "") for info in infos})
    if len(forwards) == 1:
        return []
    return [f"Workers use different code ({', '.join(forwards)}), so a row's text depends on its worker."]


def _of_clocks(members: Sequence[Member]) -> list[str]:
    said = {}
    for member in members:
        ahead = member.clock.seconds
        if member.clock.known and abs(ahead) >= _NOTABLE_SECONDS:
            said[member.host] = (
                f"The clock of {quoted(member.host)} is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}; its "
                "times are "
                "converted to this machine's clock."
            )
    return list(said.values())
