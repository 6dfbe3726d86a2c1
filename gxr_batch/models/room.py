"""This run's share of the machine: which device it takes, how much of it, and how long it waits for its neighbours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from gxr_batch.errors import ModelUnavailable
from gxr_batch.job import EngineSection
from gxr_batch.job.units import parse_bytes, parse_duration
from gxr_batch.models.device import Cpu, Device, gib, visible

Say = Callable[[str], None]
_LOOK_SECONDS = 5.0
_SAY_SECONDS = 300.0
_HOLDERS_NAMED = 5
# Of the memory that is free beside the weights, what the KV cache may take. Without a limit half is left to neighbours
# and to activations; what is left of a limit belongs to this run alone, and activations need little of it.
_CACHE_SHARE, _CACHE_SHARE_OF_LIMIT = 0.5, 0.8


class Room:
    """`engine.memory_limit` and `engine.wait_for_memory` over the visible devices."""

    def __init__(
        self,
        settings: EngineSection,
        say: Say = lambda _: None,
        devices: Sequence[Device] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`say` gets sentences for the user while they wait; the rest is for tests."""
        self.devices = visible() if devices is None else list(devices)
        self.size_limit = parse_bytes(settings.memory_limit)
        self.wait_seconds = parse_duration(settings.wait_for_memory) or 0.0
        self._say, self._clock, self._sleep = say, clock, sleep

    def named(self, device_map: str) -> list[Device]:
        """Return the devices that `model.device_map` leaves to choose from. Raises ModelUnavailable for none."""
        if device_map == "auto":
            return self.devices
        if device_map == "cpu":
            return [self.at("cpu")]
        wanted = "cuda:0" if device_map == "cuda" else device_map
        if found := [device for device in self.devices if device.name == wanted]:
            return found
        here = ", ".join(dict.fromkeys(["cpu", *(device.name for device in self.devices)]))
        raise ModelUnavailable(
            f"This machine has no device {device_map}.",
            where="model.device_map",
            next_step=f'choose "auto" or one of: {here}',
        )

    def at(self, place: object) -> Device:
        """Return the device that torch calls so; the main memory where it is none of the visible ones."""
        return next((device for device in self.devices if device.name == str(place)), Cpu())

    def free(self, device: Device) -> int:
        """Return the bytes that this run may still take of a device."""
        left = device.free()
        limit = self._limit_of(device)
        return left if limit is None else max(0, min(left, limit - device.held()))

    def capacity(self, device: Device) -> int:
        """Return the bytes that this run could have of a device if nobody else were there."""
        limit = self._limit_of(device)
        return device.total() if limit is None else min(device.total(), limit)

    def for_cache(self, device: Device, *, beside: int = 0) -> int:
        """Return the bytes that the KV cache may take; weights of `beside` bytes are still to come."""
        if device.name == "cpu" and self.size_limit is not None:
            return self.size_limit
        return int(
            max(0, self.free(device) - beside) * (_CACHE_SHARE if self.size_limit is None else _CACHE_SHARE_OF_LIMIT)
        )

    def _limit_of(self, device: Device) -> int | None:
        """On the CPU the limit is the budget of the KV cache alone, since nothing could hold a process below it."""
        return None if device.name == "cpu" else self.size_limit

    def by_device(self) -> dict[int | str, int]:
        """Return what this run may take of each card and of the main memory, as accelerate's max_memory."""
        return {number: self.free(device) for number, device in enumerate(self.devices)} | {"cpu": Cpu().free()}

    def freest(self, devices: Sequence[Device]) -> Device:
        """Return the device with the most room for this run."""
        return max(devices, key=self.free)

    def keep_to_limit(self, device: Device) -> None:
        """Bind this process to its limit on a device, before anything is loaded."""
        if self.size_limit is not None:
            device.limit(self.size_limit)

    def wait(self, devices: Sequence[Device], needed: int) -> Device:
        """Return the freest device, once it has `needed` bytes. Raises ModelUnavailable after wait_for_memory.

        Says at once, and every few minutes, who holds the device. What no device could ever give is not waited for.
        """
        began = self._clock()
        said = float("-inf")
        hopeless = all(self.capacity(device) < needed for device in devices)
        while self.free(device := self.freest(devices)) < needed:
            now = self._clock()
            if hopeless or now - began >= self.wait_seconds:
                raise self.too_little(device, needed, waited=now - began)
            if now - said >= _SAY_SECONDS:
                said = now
                self._say(
                    f"Waiting for memory on {device.name}: {gib(needed)} needed, {gib(self.free(device))} free"
                    f"{_named(device)}. Gives up after {(self.wait_seconds - (now - began)) / 60:,.0f} more minutes."
                )
            self._sleep(min(_LOOK_SECONDS, self.wait_seconds - (now - began)))
        return device

    def too_little(self, device: Device, needed: int, *, waited: float = 0.0) -> ModelUnavailable:
        """Return the error that says how much is missing, and who has it."""
        after = f" after {waited / 60:,.0f} minutes of waiting" if waited else ""
        return ModelUnavailable(
            f"There is too little memory on {device.name}{after}: {gib(needed)} needed, {gib(self.free(device))} free"
            f"{_named(device)}.",
            where="engine.memory_limit" if self.size_limit else device.name,
            next_step='free memory, set engine.wait_for_memory = "30m", raise engine.memory_limit, or set '
            "model.load_in_4bit = true",
        )


def _named(device: Device) -> str:
    holders = list(device.holders())
    more = f" and {len(holders) - _HOLDERS_NAMED} more" if len(holders) > _HOLDERS_NAMED else ""
    return f", held by {'; '.join(holders[:_HOLDERS_NAMED])}{more}" if holders else ""
