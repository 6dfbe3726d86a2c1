"""What the readings of the drawn rows say about a run: its error rate and bound, agreement, and how good its flags are.

A row is erroneous if a reader rejected it or counted a significant error in it. A row that was approved with edits and
without counts is unknown: the rate leaves it out, the bounds count it as erroneous.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.audit.audit_files import Audit, audits_of, damaged_record
from gxr_batch.audit.draw import Drawn
from gxr_batch.audit.error_bounds import LEVEL, Stratum, advice, bound, error_rate, single_look_bound
from gxr_batch.errors import RunError
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.reviews import REVIEWS_NAME, UNREVIEWED, judged_sha256, same_person
from gxr_batch.records import (
    ERROR_CATEGORIES,
    ERROR_COUNTS,
    FLAGS_OF_REVIEWS,
    Key,
    Review,
)

_MANY_ROWS = 2**24  # the bounds take some 50 bytes for each row
_SIGNIFICANT = [f"{category}_significant" for category in ERROR_CATEGORIES]
_COLUMNS = ["gxr_row_id", "gxr_sample", "gxr_status", "gxr_text", "gxr_prompt_sha256", "gxr_flags", "gxr_template"]
Finding = Literal["erroneous", "good", "unknown"]


class Reading(NamedTuple):
    """A drawn row that was read: by whom, and what each found; its flags and template."""

    row: Drawn
    found: Mapping[str, Finding]
    kinds: frozenset[str]
    flags: frozenset[str]
    template: str

    @property
    def verdict(self) -> Finding:
        """What counts: erroneous if any reader found it so, else unknown if any could not say."""
        return overall(self.found.values()) or "unknown"


class Rate(NamedTuple):
    """Rows read, erroneous ones and unknown ones, of `rows`; the estimated rate (None: nothing was read)."""

    rows: int
    read: int
    erroneous: int
    unknown: int
    rate: float | None
    bound: float


class FlagQuality(NamedTuple):
    """Read rows with a flag, how many of those are erroneous, and the estimates for the whole run (None: unknown)."""

    flagged: int
    erroneous: int
    precision: float | None
    recall: float | None


@dataclass(kw_only=True)
class Summary:
    """The figures. `single_look` is None if there are strata; alpha is Krippendorff's, None if it is undefined."""

    audits: int
    drawn: int
    whole: Rate
    single_look: float | None
    strata: dict[str, Rate]
    templates: dict[str, Rate]
    kinds: dict[str, int]
    readers: dict[str, tuple[int, int]]
    shared: int
    agreed: int
    alpha: float | None
    differing: list[tuple[Key, dict[str, Finding]]] = field(default_factory=list)
    flags: dict[str, FlagQuality] = field(default_factory=dict)
    changed: int = 0
    elsewhere: int = 0
    frame_rows: int = 0
    generated: int = 0
    advice: str = ""


def summarise(reader: RunReader) -> Summary:
    """Return the figures of all draws of a run. Raises RunError if nothing was drawn."""
    audits = audits_of(reader.folder)
    if not audits:
        raise RunError(
            "No rows of this run were drawn for an audit, so reviews say nothing about the other rows.",
            where=str(reader.folder),
            next_step=f"gxr-batch export {reader.folder} --audit 150",
        )
    counts, frame_rows = reader.state.counts(), sum(audits[-1].frame_rows.values())
    # Rows may have been removed from the table since; but such a number alone would fill the memory.
    if frame_rows > max(counts.total, _MANY_ROWS):
        raise damaged_record(reader.folder / REVIEWS_NAME / f"audit-{audits[-1].number:03d}.json")
    drawn = {row.key: row for audit in audits for row in audit.rows}
    readings, changed = _readings(reader, drawn)
    strata = _strata(audits[-1], readings)
    whole = _rate(strata.values())
    everything = [_counted(one, unknown_is="erroneous") for one in strata.values()]
    shared = [one for one in readings if len(one.found) > 1]
    agreed = sum(len(set(one.found.values())) == 1 for one in shared)
    reviewed = {review.key for review in reader.reviews.all if is_read(review)}
    return Summary(
        audits=len(audits),
        drawn=len(drawn),
        whole=whole,
        single_look=(
            single_look_bound(whole.read, whole.erroneous + whole.unknown) if len(strata) == 1 and whole.read else None
        ),
        strata={name: _rate([one]) for name, one in strata.items()},
        templates=_by_template(readings, audits[-1].frame_rows),
        kinds=dict(Counter(kind for one in readings for kind in one.kinds)),
        readers=_by_reader(readings),
        shared=len(shared),
        agreed=agreed,
        alpha=_alpha(shared),
        differing=[(one.row.key, dict(one.found)) for one in shared if len(set(one.found.values())) > 1],
        flags=_flag_qualities(readings, audits[-1].frame_rows),
        changed=changed,
        elsewhere=len(reviewed - drawn.keys()),
        frame_rows=frame_rows,
        generated=counts.ok,
        advice=advice(everything, unknown=whole.unknown),
    )


# ---------------------------------------------------------------------------------------------------- readings


def _readings(reader: RunReader, drawn: Mapping[Key, Drawn]) -> tuple[list[Reading], int]:
    """Return the drawn rows that were read, and how many drawn rows have another text now."""
    found: list[Reading] = []
    unchanged = 0
    names: dict[str, str] = {}  # each reader's, as spelled first
    reviews = reader.reviews
    wanted = pa.array({key.row_id for key in drawn}, pa.string())
    for table in reader.finished():
        some = table.filter(pc.is_in(table["gxr_row_id"], value_set=wanted))
        for row in some.select(_COLUMNS).to_pylist():
            key = Key(row["gxr_row_id"], row["gxr_sample"])
            if key not in drawn:
                continue
            text, prompt = row["gxr_text"], row["gxr_prompt_sha256"]
            if text is None or judged_sha256(text, prompt) != drawn[key].judged_sha256:
                continue
            unchanged += 1
            said = [review for review in reviews.valid(key, text, prompt) if is_read(review)]
            if said:
                flags = frozenset(row["gxr_flags"] or ()) - FLAGS_OF_REVIEWS
                found.append(
                    Reading(
                        drawn[key],
                        {
                            names.setdefault(same_person(one.reviewer), one.reviewer or "unnamed"): finding_of(one)
                            for one in said
                        },
                        frozenset(kind for review in said for kind in _kinds_of(review)),
                        flags,
                        row["gxr_template"] or "",
                    )
                )
    return found, len(drawn) - unchanged


def is_read(review: Review) -> bool:
    """Return whether a review judges its text: a verdict, or counts without one. A comment alone does not."""
    return review.status != UNREVIEWED or any(count is not None for count in review.errors)


def overall(found: Iterable[Finding]) -> Finding | None:
    """Return what counts of several readers' findings: one error is enough, None without a reader."""
    said = set(found)
    worst_first: tuple[Finding, ...] = ("erroneous", "unknown", "good")
    return next((finding for finding in worst_first if finding in said), None)


def finding_of(review: Review) -> Finding:
    """Return what a review says of its text."""
    counts = dict(zip(ERROR_COUNTS, review.errors, strict=True))
    significant = [counts[name] for name in _SIGNIFICANT]
    if review.status == "rejected" or any(significant):
        return "erroneous"
    if review.status == "approved_with_edits" and all(count is None for count in review.errors):
        return "unknown"
    return "good"


def _kinds_of(review: Review) -> Iterator[str]:
    counts = dict(zip(ERROR_COUNTS, review.errors, strict=True))
    kinds = [category for category in ERROR_CATEGORIES if counts[f"{category}_significant"]]
    yield from kinds or (["rejected, no kind given"] if review.status == "rejected" else [])


# ---------------------------------------------------------------------------------------------------- figures


class _Read(NamedTuple):
    rows: int
    readings: list[Reading]


def _strata(audit: Audit, readings: Iterable[Reading]) -> dict[str, _Read]:
    found = {name: _Read(rows, []) for name, rows in audit.frame_rows.items()}
    for one in readings:
        found[one.row.stratum].readings.append(one)
    return found


def _counted(one: _Read, *, unknown_is: Literal["erroneous", "left out"]) -> Stratum:
    verdicts = Counter(reading.verdict for reading in one.readings)
    if unknown_is == "erroneous":
        return Stratum(one.rows, len(one.readings), verdicts["erroneous"] + verdicts["unknown"])
    return Stratum(one.rows, len(one.readings) - verdicts["unknown"], verdicts["erroneous"])


def _rate(strata: Iterable[_Read]) -> Rate:
    parts = list(strata)
    known = [_counted(one, unknown_is="left out") for one in parts]
    everything = [_counted(one, unknown_is="erroneous") for one in parts]
    read = sum(one.read for one in everything)
    return Rate(
        sum(one.rows for one in parts),
        read,
        sum(one.erroneous for one in known),
        read - sum(one.read for one in known),
        error_rate(known),
        bound(everything),
    )


def _by_template(readings: Sequence[Reading], frame_rows: Mapping[str, int]) -> dict[str, Rate]:
    """Return what was found by template; without bounds: how many rows of each there are is not counted."""
    known = _weighted(readings, frame_rows)
    found = {}
    for name in sorted({one.template for one in readings}):
        verdicts = Counter(one.verdict for one in readings if one.template == name)
        own = [(one, weight) for one, weight in known if one.template == name]
        wrong = sum(weight for one, weight in own if one.verdict == "erroneous")
        rate = wrong / sum(weight for _, weight in own) if own else None
        found[name] = Rate(0, verdicts.total(), verdicts["erroneous"], verdicts["unknown"], rate, 1.0)
    return found


def _weighted(readings: Iterable[Reading], frame_rows: Mapping[str, int]) -> list[tuple[Reading, float]]:
    """Return the readings that are not unknown, each with the number of rows of its stratum that it counts as."""
    judged = [one for one in readings if one.verdict != "unknown"]
    read = Counter(one.row.stratum for one in judged)
    return [(one, frame_rows[one.row.stratum] / read[one.row.stratum]) for one in judged]


def _by_reader(readings: Iterable[Reading]) -> dict[str, tuple[int, int]]:
    """Return how many rows each reader read, and how many of those were erroneous to them."""
    read: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for one in readings:
        for name, finding in one.found.items():
            read[name] += 1
            wrong[name] += finding == "erroneous"
    return {name: (count, wrong[name]) for name, count in sorted(read.items())}


def _alpha(shared: Sequence[Reading]) -> float | None:
    """Return Krippendorff's alpha of erroneous or not, over rows that several readers read; unknown is missing."""
    import krippendorff
    import numpy as np

    names = sorted({name for one in shared for name in one.found})
    values = {"erroneous": 1.0, "good": 0.0, "unknown": np.nan}
    table = np.full((len(names), len(shared)), np.nan)
    for unit, one in enumerate(shared):
        for name, finding in one.found.items():
            table[names.index(name), unit] = values[finding]
    pairable = np.sum(~np.isnan(table), axis=0) > 1 if len(shared) else np.array([], bool)
    if len(np.unique(table[:, pairable][~np.isnan(table[:, pairable])])) < 2:
        return None  # everybody said the same of every row
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement="nominal"))


def _flag_qualities(readings: Sequence[Reading], frame_rows: Mapping[str, int]) -> dict[str, FlagQuality]:
    """Return how good each flag is, and any flag, with read rows weighted by the rows of their stratum."""
    known = _weighted(readings, frame_rows)
    names = sorted({flag for one in readings for flag in one.flags})
    found = {}
    for name in ["any flag", *names]:
        flagged = [(one, weight) for one, weight in known if (one.flags if name == "any flag" else name in one.flags)]
        wrong = [(one, weight) for one, weight in flagged if one.verdict == "erroneous"]
        hit = sum(weight for _, weight in wrong)
        marked = sum(weight for _, weight in flagged)
        all_wrong = sum(weight for one, weight in known if one.verdict == "erroneous")
        found[name] = FlagQuality(
            len(flagged), len(wrong), hit / marked if marked else None, hit / all_wrong if all_wrong else None
        )
    return found


def as_json(summary: Summary) -> dict[str, Any]:
    """Return the figures for programs."""
    return {
        "audits": summary.audits,
        "drawn": summary.drawn,
        "level": LEVEL,
        "run": summary.whole._asdict() | {"bound_of_a_single_look": summary.single_look},
        "strata": {name: rate._asdict() for name, rate in summary.strata.items()},
        "templates": {
            name: {"read": rate.read, "erroneous": rate.erroneous, "unknown": rate.unknown, "rate": rate.rate}
            for name, rate in summary.templates.items()
        },
        "kinds": summary.kinds,
        "readers": {name: {"read": read, "erroneous": wrong} for name, (read, wrong) in summary.readers.items()},
        "agreement": {
            "rows": summary.shared,
            "agreed": summary.agreed,
            "krippendorff_alpha": summary.alpha,
            "differing": [
                {"row_id": key.row_id, "sample": key.sample, "readers": found} for key, found in summary.differing
            ],
        },
        "flags": {name: quality._asdict() for name, quality in summary.flags.items()},
        "drawn_rows_with_another_text_now": summary.changed,
        "reviewed_outside_the_draw": summary.elsewhere,
        "advice": summary.advice,
    }
