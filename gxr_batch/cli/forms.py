"""`gxr-batch forms`: list and show forms."""

from __future__ import annotations

import click


@click.group(name="forms")
def command() -> None:
    """List or show forms: the headings that every text has.

    \b
    Example:
      gxr-batch forms show quiz
    """


@command.command(name="list")
def list_() -> None:
    """List the built-in forms with their headings.

    \b
    Example:
      gxr-batch forms list
    """
    from gxr_batch.cli.layout import wrapped
    from gxr_batch.forms import builtin_form_names
    from gxr_batch.forms.library import read_form
    from gxr_batch.job import FormPart

    for name in builtin_form_names():
        section, description = read_form(name)
        click.echo("\n".join(wrapped(f"{name}: {description}", "  ")))
        for heading in section.sections:
            part = section.section.get(heading, FormPart())
            choices = f" ({', '.join(part.choices)})" if part.choices else ""
            click.echo(f"  {heading}: {part.kind}{choices}{', hidden' if part.hidden else ''}")


@command.command()
@click.argument("name")
def show(name: str) -> None:
    """Show a form's file, by built-in name or path of a .toml file.

    Copy it to write another one: gxr-batch forms show quiz > my_quiz.toml

    \b
    Example:
      gxr-batch forms show quiz
    """
    from gxr_batch.cells import for_terminal
    from gxr_batch.forms.library import form_source

    click.echo(for_terminal(form_source(name)), nl=False)
