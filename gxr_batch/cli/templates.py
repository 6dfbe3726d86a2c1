"""`gxr-batch templates`: list, show and preview prompt templates."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import click


@click.group(name="templates")
def command() -> None:
    """List, show or preview prompt templates.

    \b
    Example:
      gxr-batch templates show clinical_case
    """


@command.command(name="list")
def list_() -> None:
    """List the built-in templates with their required and optional fields.

    \b
    Example:
      gxr-batch templates list
    """
    from gxr_batch.cli.layout import wrapped
    from gxr_batch.job import PromptSection
    from gxr_batch.prompts import Templates

    templates = Templates(PromptSection())
    for name, description in templates.available().items():
        template = templates.get(name)
        optional = [field for field in template.fields if field not in template.required]
        click.echo("\n".join(wrapped(f"{name}: {description}", "  ")))
        click.echo(f"  requires {', '.join(template.required)}")
        if optional:
            click.echo(f"  optional {', '.join(optional)}")


@command.command()
@click.argument("name")
def show(name: str) -> None:
    """Show a template's text, by built-in name or path of a .j2 file.

    \b
    Example:
      gxr-batch templates show educational
    """
    from gxr_batch.job import PromptSection
    from gxr_batch.prompts import Templates

    click.echo(Templates(PromptSection(template=name)).default.source)


@command.command()
@click.argument("job_file", metavar="JOB.toml", type=click.Path(path_type=Path))
@click.option("--rows", type=click.IntRange(min=1), default=3, show_default=True, help="How many rows to preview.")
@click.option("--template", help="Use this template. Default: the job file's.")
def render(job_file: Path, rows: int, template: str | None) -> None:
    """Render a job's template on the first rows of its table.

    \b
    Example:
      gxr-batch templates render jobs/demo.toml --rows 2
    """
    from gxr_batch.cells import for_terminal, quoted
    from gxr_batch.disk import temporary_folder
    from gxr_batch.errors import RowError
    from gxr_batch.job import load_job
    from gxr_batch.prompts.render import render as fill
    from gxr_batch.prompts.render import row_template
    from gxr_batch.rows.ingest import ingest
    from gxr_batch.rows.table_reader import read_rows
    from gxr_batch.run.prepare import prepare

    job = load_job(job_file, given={"prompt.template": template} if template else None)
    prepared = prepare(job)
    with temporary_folder("gxr-batch-templates") as scratch:
        table = scratch / "input.parquet"
        ingest(prepared.survey, prepared.fields, table, id_column=prepared.job.input.id_column, prior=None, limit=rows)
        for row in islice(read_rows(table, prepared.fields, None), rows):
            click.echo(f"--- row {quoted(row.row_id)} ({quoted(row.template)})")
            try:
                messages = fill(row_template(prepared.templates, row.template), row.values, system=job.prompt.system)
            except RowError as error:
                click.echo(for_terminal(f"cannot be rendered: {error.what}"))
            else:
                click.echo(for_terminal("\n".join(f"[{turn.role}]\n{turn.text}" for turn in messages.turns)))
