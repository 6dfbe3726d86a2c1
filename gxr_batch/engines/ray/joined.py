"""What a pool says of itself: the sum of its workers, which have to hold the same model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from gxr_batch.engines.base import EngineInfo
from gxr_batch.engines.ray.pool import Member
from gxr_batch.errors import ModelUnavailable

# Clocks that differ by more are worth a sentence: whoever compares logs of several hosts is misled.
_NOTABLE_SECONDS = 1.0


def joined(members: Sequence[Member], load_seconds: float, versions: dict[str, str]) -> EngineInfo:
    """Return the pool's own info. Raises ModelUnavailable where two workers would write different texts."""
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
    """Raise ModelUnavailable, naming what differs, where two workers do not hold the same model."""
    one, two = _info(first), _info(other)
    pairs = {
        "weights": (one.identity.weights_sha256, two.identity.weights_sha256),
        "adapter": (one.identity.adapter_sha256, two.identity.adapter_sha256),
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
    assert member.info is not None, "only an open worker is asked"
    return member.info


def _devices(members: Sequence[Member]) -> str:
    """Return e.g. "2 x cuda:0 on node1, 2 x cuda:0 on node2"."""
    counted = Counter((_info(member).device, member.host) for member in members)
    return ", ".join(f"{count} x {device} on {host}" for (device, host), count in counted.items())


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
    return [f"Workers compute by different code ({', '.join(forwards)}), so a row's words depend on who gets it."]


def _of_clocks(members: Sequence[Member]) -> list[str]:
    said = {}
    for member in members:
        ahead = member.clock.seconds
        if member.clock.known and abs(ahead) >= _NOTABLE_SECONDS:
            said[member.host] = (
                f"The clock of {member.host} is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}; its times are "
                "converted to this machine's."
            )
    return list(said.values())
