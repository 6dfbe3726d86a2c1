"""What `run` and `check` share before any model is loaded: templates, table, fields, and the run folder."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from typing import Any

from gxr_batch.errors import GxrError, TableError, TemplateError
from gxr_batch.forms import Form, form_of, form_of_run, with_form_inline
from gxr_batch.job import InputSection, Job
from gxr_batch.ledger import Manifest
from gxr_batch.ledger.manifest import known_manifest
from gxr_batch.prompts import Templates, version_of_run
from gxr_batch.prompts.column_types import mismatch, refuse_nested
from gxr_batch.prompts.render import field_map, unfilled
from gxr_batch.prompts.template import FORM_SECTIONS
from gxr_batch.rows.columns import FieldMap
from gxr_batch.rows.survey import Survey, survey
from gxr_batch.run.output_folder import output_folder
from gxr_batch.run.run_source import id_column_of, refuse_own_folder, run_source

# How cells are read for prompts. Another value makes finished runs read their tables again and find the rows whose
# prompts are different.
CELL_FORMS = "2"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job whose templates compile and whose table can be read.

    `mismatch` is what a new run is refused for: a template that compares a column with a value of another type.
    """

    job: Job
    templates: Templates
    survey: Survey
    fields: FieldMap
    form: Form | None = None
    mismatch: TemplateError | None = None

    def source_key(self, limit: int | None) -> str:
        """Return one sha256 over everything that decides which keys the table has."""
        job = self.job
        parts = (
            self.survey.sha256,
            CELL_FORMS,
            job.input.model_dump_json(exclude={"path", *_unset(job.input)}),
            job.prompt.template_column,
            self.templates.default.name,
            *(self.templates.get(name).fingerprint for name in sorted(self.fields.templates)),
            str(limit),
            str(job.sampling.samples_per_row),
        )
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def _unset(section: InputSection) -> set[str]:
    """Return the keys added in format 3 that have their default: without them a finished run's key stays the same."""
    added = ("escape", "skip_lines", "column_names", "sheet", "only")
    return {key for key in added if getattr(section, key) == InputSection.model_fields[key].default}


def refuse_emptied(rows: int, manifest: Manifest | None, job: Job) -> None:
    """Raise TableError if the table has no rows but had some the last time the run read it."""
    entries = manifest.invocations if manifest else []
    before = next((entry["rows"] for entry in reversed(entries) if isinstance(entry.get("rows"), int)), 0)
    if before and not rows:
        raise TableError(
            f"The table has no rows; the last time this ran it had {before:,}.",
            where=job.input.path,
            next_step="check the export that wrote the table; if it is right, `gxr-batch run --allow-empty` accepts it",
        )


def prepare(job: Job, *, fresh: bool = False) -> Prepared:
    """Compile the templates, survey the table, match the two. Raises JobFileError, TemplateError, TableError.

    The form that the job names is written out in the job. It and the rules of templates are as they were when the run
    began, unless it is to begin `fresh`.
    """
    job = with_form_inline(job if fresh else _with_versions_of_its_run(job))
    form = form_of(job)
    templates = Templates(job.prompt, form)
    job, table = survey_of(job)
    fields = field_map(templates, job, table.schema.names)
    if FORM_SECTIONS in table.schema.names and any(templates.get(name).places_form for name in fields.templates):
        raise TemplateError(
            f"The word {FORM_SECTIONS} of a template is what a form asks for, and the table has a column of that name.",
            where=job.input.path,
            next_step="rename the column, or the word in the template",
        )
    refuse_nested(templates, fields, table.schema)
    wrong = mismatch(templates, fields, table.schema)
    return Prepared(job=job, templates=templates, survey=table, fields=fields, form=form, mismatch=wrong)


def _with_versions_of_its_run(job: Job) -> Job:
    """Return the job with the versions of forms and of template rules of the run that it resumes, if there is one."""
    begun: dict[str, Any] = {}
    with suppress(GxrError, ValueError):  # a damaged run is refused later, by name
        if manifest := known_manifest(output_folder(job, date.today())):
            begun["prompt.version"] = version_of_run(manifest.fingerprint, manifest.job)
            if (job.form.name or job.form.sections) and (form := form_of_run(manifest.fingerprint, manifest.job)):
                begun["form.version"] = form.version
        return job.with_values(begun)
    return job


def survey_of(job: Job) -> tuple[Job, Survey]:
    """Survey the table; return it with the job, which for a run as input takes the row ids of that run.

    Raises TableError, RunError, StorageError.
    """
    source = run_source(job.input)
    if source is None:
        return job, survey(job.input, version=job.prompt.version)
    refuse_own_folder(job.input, output_folder(job, date.today()))
    job = job.with_values({"input.id_column": id_column_of(job.input, source)})
    return job, survey(job.input, [source])


def notices_of(prepared: Prepared, manifest: Manifest | None) -> list[str]:
    """Return notices about the templates and the table. Raises TemplateError for a new run with a mismatch.

    A run that has begun is resumed as it began, so that its rows are of one kind.
    """
    if prepared.mismatch is not None and manifest is None:
        raise prepared.mismatch
    own = unfilled(prepared.templates, prepared.fields, prepared.survey.schema.names)
    return [*prepared.survey.notices, *own, *([prepared.mismatch.what] if prepared.mismatch else [])]
