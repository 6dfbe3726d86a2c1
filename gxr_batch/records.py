"""The value objects that packages pass to each other, and the schema of the result columns.

A new fact about a row is a new field here, never an entry in a metadata dict. These are tuples, because a run makes
millions of them; `Result` lists its fields in the order of the result columns, so that a part is written by columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

Status = Literal["ok", "failed", "held"]
FinishReason = Literal["stop", "closed", "length", "error"]
# A token limit ended the text, or with a form at least one of its sections: --retry truncated takes such rows.
TRUNCATED_REASONS: tuple[FinishReason, ...] = ("length", "closed")
ReviewStatus = Literal["unreviewed", "approved", "approved_with_edits", "rejected"]
Role = Literal["system", "user", "model"]

DISCLAIMER = (
    "AI-generated teaching material, not reviewed by a radiologist. Research and education only; not for diagnosis, "
    "treatment or any clinical use. May contain errors: verify against the images and sources."
)
REVIEWED_DISCLAIMER = (
    "AI-generated teaching material, reviewed by {reviewer} on {date}. Research and education only; not for diagnosis, "
    "treatment or any clinical use. May contain errors: verify against the images and sources."
)
# After DISCLAIMER, for a text that somebody only remarked on.
REMARKED = " There are remarks on it."
REVIEW_STATUSES: tuple[ReviewStatus, ...] = ("unreviewed", "approved", "approved_with_edits", "rejected")
REVIEW_QUALITIES = range(1, 6)
APPROVED: tuple[ReviewStatus, ...] = ("approved", "approved_with_edits")
# Flags for rows whose newest review judged an earlier text, and for rows on which reviewers disagree.
STALE_REVIEW, REVIEWERS_DISAGREE = "stale_review", "reviewers_disagree"
FLAGS_OF_REVIEWS = frozenset({STALE_REVIEW, REVIEWERS_DISAGREE})
# The error categories counted by reviewers of radiology texts, each as significant or insignificant.
ERROR_CATEGORIES = {
    "false_finding": "false finding",
    "missing_finding": "missing finding",
    "wrong_location": "wrong location",
    "wrong_severity": "wrong severity",
    "comparison_not_in_reference": "comparison not in the reference",
    "omitted_comparison": "omitted comparison",
}
ERROR_WEIGHTS = ("significant", "insignificant")
ERROR_COUNTS = tuple(f"{category}_{weight}" for category in ERROR_CATEGORIES for weight in ERROR_WEIGHTS)


class Key(NamedTuple):
    """What identifies a result: the row's id and its sample number, counted from 1."""

    row_id: str
    sample: int


class Row(NamedTuple):
    """One row of the input table, with the cells that its template may use.

    `values` maps template fields to cells (None = missing); `position` counts from 0 in input order; `content_hash` is
    the sha256 (64 hex digits) of those cells; `template` is the name of the row's template.
    """

    row_id: str
    content_hash: str
    position: int
    template: str
    values: Mapping[str, Any]


class Turn(NamedTuple):
    """One turn of a conversation. Its text is untrusted: it never yields a control token."""

    role: Role
    text: str


class Messages(NamedTuple):
    """The turns of one prompt, the name of the template that made them, and how much of the last turn is fixed.

    `literal_chars` counts the characters at the start of the last user turn that every row of the template shares.
    """

    turns: tuple[Turn, ...]
    template: str
    literal_chars: int = 0


class Encoded(NamedTuple):
    """A prompt as an engine counts it: `token_ids` is None if the engine has no ids, `length` if it cannot count.

    `shared_tokens` leading ids are the same for every row of the template, whatever its cells hold.
    """

    token_ids: list[int] | None
    length: int | None
    shared_tokens: int = 0


class Prompt(NamedTuple):
    """One unit of work for an engine. `row_seed` has 31 bits; `on_text` receives text as it is generated."""

    key: Key
    messages: Messages
    encoded: Encoded
    row_seed: int
    max_new_tokens: int
    on_text: Callable[[str], None] | None = None


class Completion(NamedTuple):
    """What an engine made of one prompt. A failed row has `finish_reason` "error" and its reason in `error`.

    With a form, "stop" means that the model ended every section, "closed" that the text has all of them and the token
    limit ended at least one, the parts in `cut_sections` (from 0).

    Seconds come from one monotonic clock, stamped after the device was synchronised: `seconds_queued` from taking the
    prompt to its prefill, `seconds_to_first_token` and `seconds_generating` from its prefill on. `seconds_share` is a
    step's time divided among the rows active in it. `rows_in_batch` is the mean over the row's steps, itself included.
    `started_at_ms` and `finished_at_ms` are UTC milliseconds since 1970 of prefill and last token. Counts are None if
    the engine cannot know them, and so is `seconds_to_first_token` if it did not see the first token.
    `reasoning` is what a server sent as reasoning, apart from the text.
    """

    key: Key
    text: str
    finish_reason: FinishReason
    error: str | None
    prompt_tokens: int | None
    new_tokens: int | None
    seconds_queued: float
    seconds_to_first_token: float | None
    seconds_generating: float
    seconds_share: float
    rows_in_batch: float
    started_at_ms: int
    finished_at_ms: int
    reasoning: str | None = None
    cut_sections: tuple[int, ...] = ()


class Result(NamedTuple):
    """One finished key, as parts store it: the fields are the columns `gxr_...` in this order.

    `findings_kept` and `findings_lost` are None if nothing was compared: see `Checked` in text_checks/flags.
    """

    row_id: str
    sample: int
    content_hash: str
    status: Status
    text: str | None
    finish_reason: FinishReason
    error: str | None
    flags: list[str]
    prompt_tokens: int | None
    new_tokens: int | None
    max_new_tokens: int
    seed: int
    attempt: int
    seconds_queued: float | None
    seconds_to_first_token: float | None
    seconds_generating: float | None
    seconds_share: float | None
    tokens_per_second: float | None
    rows_in_batch: float | None
    started_at: int
    finished_at: int
    template: str
    prompt_sha256: str | None
    reasoning: str | None
    findings_kept: list[str] | None = None
    findings_lost: list[str] | None = None


class Review(NamedTuple):
    """One reviewer's judgement of one generated text.

    `judged_sha256` names the generated text that was judged and its prompt: the review applies to no other text.
    `text` is the whole corrected text of `approved_with_edits`, `quality` runs from 1 to 5, `errors` counts in the
    order of ERROR_COUNTS (None = not filled in).
    """

    key: Key
    judged_sha256: str
    status: ReviewStatus
    reviewer: str
    reviewed_at: date
    quality: int | None
    errors: tuple[int | None, ...]
    text: str | None
    comment: str | None

    @property
    def is_empty(self) -> bool:
        """Whether the reviewer says nothing, as to withdraw an earlier review."""
        filled = (self.text, self.comment, self.quality, *self.errors)
        return self.status == "unreviewed" and all(value is None for value in filled)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which weights an engine would generate with; known before they are loaded, part of the run's fingerprint.

    Hashes are sha256 hex digests; None if the engine has no local weights. `files_sha256` covers the
    tokenizer, its chat template and the configuration. `pins` are job keys that leave something open (the newest
    revision, the base that an adapter names), with the exact value of each.
    """

    kind: str
    model: str
    revision: str = ""
    adapter: str | None = None
    weights_sha256: str | None = None
    adapter_sha256: str | None = None
    files_sha256: str | None = None
    pins: Mapping[str, str] = field(default_factory=dict)


# Columns that merging takes from the manifest, the same for every row of a run.
PROVENANCE_COLUMNS = (
    "gxr_model",
    "gxr_model_revision",
    "gxr_adapter",
    "gxr_ai_generated",
    "gxr_review_status",
    "gxr_disclaimer",
)
# What the model wrote, which is withheld in held rows.
GENERATED_COLUMNS = ("gxr_text", "gxr_reasoning")
# Lists of names, which people see joined by commas.
LIST_COLUMNS = ("gxr_flags", "gxr_findings_kept", "gxr_findings_lost")
# What result columns are called in a job that reads a run: source_text for gxr_text.
SOURCE_PREFIX = "source_"
# The content hash stays inside the run folder: it identifies the row, and is not a result.
CONTENT_HASH = "gxr_content_hash"
PRIVATE_COLUMNS = (CONTENT_HASH,)


def part_schema() -> pa.Schema:
    """Return the Arrow schema of a part: one field for each field of `Result`, in order."""
    import pyarrow as pa

    seconds = pa.float64()
    moment = pa.timestamp("ms", tz="UTC")
    types: dict[str, pa.DataType] = {
        "sample": pa.int32(),
        "prompt_tokens": pa.int32(),
        "new_tokens": pa.int32(),
        "max_new_tokens": pa.int32(),
        "seed": pa.int64(),
        "attempt": pa.int32(),
        "seconds_queued": seconds,
        "seconds_to_first_token": seconds,
        "seconds_generating": seconds,
        "seconds_share": seconds,
        "tokens_per_second": pa.float64(),
        "rows_in_batch": pa.float64(),
        "started_at": moment,
        "finished_at": moment,
        **{name.removeprefix("gxr_"): pa.list_(pa.string()) for name in LIST_COLUMNS},
    }
    return pa.schema([pa.field(f"gxr_{name}", types.get(name, pa.string())) for name in Result._fields])


def result_schema() -> pa.Schema:
    """Return the Arrow schema of the `gxr_...` columns of results.parquet, in the contract's order."""
    import pyarrow as pa

    public = [field for field in part_schema() if field.name not in PRIVATE_COLUMNS]
    provenance = [
        pa.field(name, pa.bool_() if name == "gxr_ai_generated" else pa.string()) for name in PROVENANCE_COLUMNS
    ]
    return pa.schema(public + provenance)


def review_schema() -> pa.Schema:
    """Return the Arrow schema of what a review adds to a row, in the order in which reviewers fill it in.

    `gxr_review_status` is already a result column.
    """
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("gxr_review_quality", pa.int32()),
            *(pa.field(f"gxr_review_{name}", pa.int32()) for name in ERROR_COUNTS),
            pa.field("gxr_review_text", pa.string()),
            pa.field("gxr_review_comment", pa.string()),
            pa.field("gxr_reviewer", pa.string()),
            pa.field("gxr_reviewed_at", pa.date32()),
        ]
    )
