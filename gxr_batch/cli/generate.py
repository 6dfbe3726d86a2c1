"""`gxr-batch generate`: one prompt, or a conversation, with the engine of `run`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gxr_batch.cli.exit_codes import Exit
from gxr_batch.cli.options import say_to_stderr
from gxr_batch.cli.streams import safe

if TYPE_CHECKING:
    from gxr_batch.chat import Conversation, Question
    from gxr_batch.job import Job
    from gxr_batch.records import Completion

# option -> the job file key that it sets
_KEYS = {
    "model": "model.path",
    "base": "model.base",
    "adapter": "model.adapter",
    "revision": "model.revision",
    "load_in_4bit": "model.load_in_4bit",
    "max_seq_length": "model.max_seq_length",
    "system_prompt": "prompt.system",
    "template": "prompt.template",
    "preset": "sampling.preset",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "repetition_penalty": "sampling.repetition_penalty",
    "max_new_tokens": "sampling.max_new_tokens",
    "seed": "sampling.seed",
    "engine": "engine.kind",
}


def _settings(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that set job file keys. Some also accept the spelling of the model's original script."""
    options = (
        click.option(
            "--model",
            "--model-id",
            "--hub",
            metavar="PATH",
            help='Hub id, folder or "demo"; with --engine api, the model\'s name on the server.  [default: demo]',
        ),
        click.option("--adapter", metavar="PATH", help='LoRA adapter: hub id, folder, or "none".'),
        click.option("--base", metavar="PATH", help="Base model of the adapter. Default: the one it names."),
        click.option("--revision", help="Commit or tag of a hub model."),
        click.option(
            "--load-in-4bit/--no-load-in-4bit", default=None, help="Load the weights in 4 bits or at full precision."
        ),
        click.option("--max-seq-length", type=int, help="Maximum tokens of prompt plus answer.  [default: 2048]"),
        click.option("--system-prompt", "--system", help="System text, placed before the first question."),
        click.option("--preset", help="default, deterministic, creative, detailed or concise."),
        click.option("--temperature", type=float, help="0 = greedy.  [default: 0.7]"),
        click.option("--do-sample/--no-do-sample", default=None, help="--no-do-sample is the same as --temperature 0."),
        click.option("--top-p", type=float, help="Nucleus sampling: probability mass kept.  [default: 0.9]"),
        click.option("--top-k", type=int, help="Tokens kept, 0 = off.  [default: 50]"),
        click.option("--repetition-penalty", type=float, help="1.0 = off.  [default: 1.1]"),
        click.option(
            "--max-new-tokens", "--max-tokens", type=int, help="Maximum tokens of the answer.  [default: 256]"
        ),
        click.option("--seed", type=int, help="Sampling seed.  [default: 0]"),
        click.option("--engine", help="auto, transformers, generate, vllm, api, ray or echo.  [default: auto]"),
        click.option("--batch-size", type=int, hidden=True),
        click.option(
            "--set", "overrides", metavar="SECTION.KEY=VALUE", multiple=True, help="Set any key of a job file."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command(name="generate")
@click.option("--prompt", help="Answer this one prompt.")
@click.option("--interactive", is_flag=True, help="Hold a conversation; /help lists the commands.")
@click.option("--template", metavar="NAME", help="Fill this template with the --field values, instead of --prompt.")
@click.option("--field", "fields", metavar="NAME=VALUE", multiple=True, help="A field of the template; repeatable.")
@click.option("--job", "job_file", type=click.Path(path_type=Path), help="Read model and settings from a job file.")
@_settings
@click.option("--quiet", is_flag=True, help="Show no notices.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the answer, counts and times as JSON; with one prompt only."
)
def command(
    prompt: str | None,
    interactive: bool,
    fields: tuple[str, ...],
    job_file: Path | None,
    overrides: tuple[str, ...],
    do_sample: bool | None,
    batch_size: int | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Answer one prompt, or hold a conversation, and stream the answer.

    Uses the same engine, prompt layout and defaults as `run`. Each option sets a key of the job file.

    \b
    Examples:
      gxr-batch generate --prompt "Analyze this chest X-ray showing a small left pleural effusion."
      gxr-batch generate --template clinical_case --field findings="Clear lungs." --field age=40
      gxr-batch generate --interactive --temperature 0.4 --model my/adapter-folder
    """
    _check_usage(prompt, interactive, settings["template"], fields, as_json)
    say = say_to_stderr(quiet)
    given = {_KEYS[name]: value for name, value in settings.items() if value is not None}
    if do_sample is False:
        given["sampling.temperature"] = 0
    if batch_size not in {None, 1}:
        say("--batch-size has no effect here: one prompt is answered at a time. For `run`, set engine.slots.")
    job = _job(job_file, overrides, given)
    from gxr_batch.chat import Question, open_conversation

    question = None if prompt is None else Question(prompt)
    if settings["template"]:
        question = _filled(job, fields)
    with open_conversation(job, say) as conversation:
        if interactive:
            from gxr_batch.cli.interactive import talk

            talk(conversation, first=question)
        else:
            assert question is not None, "checked by _check_usage"
            _answer(conversation, question, as_json=as_json)


def _check_usage(
    prompt: str | None, interactive: bool, template: str | None, fields: tuple[str, ...], as_json: bool
) -> None:
    if prompt is not None and template:
        raise click.UsageError("--prompt and --template cannot be combined; give one of them.")
    if prompt is None and not template and not interactive:
        raise click.UsageError("Give --prompt, --template with --field, or --interactive.")
    if fields and not template:
        raise click.UsageError("--field requires --template.")
    if as_json and interactive:
        raise click.UsageError("--json cannot be combined with --interactive.")
    if prompt is not None and not prompt.strip():
        raise click.UsageError("--prompt is empty.")


def _job(job_file: Path | None, overrides: tuple[str, ...], given: dict[str, Any]) -> Job:
    """Return the job that the options describe. --model names the model, local or on a server."""
    from gxr_batch.job import load_job, make_job

    def made(given: dict[str, Any]) -> Job:
        return load_job(job_file, overrides, given, table=False) if job_file else make_job("generate", overrides, given)

    if _KEYS["model"] in given:  # the job file and --set may select the engine too
        of_server = {"api.model" if key == _KEYS["model"] else key: value for key, value in given.items()}
        if (job := made(of_server)).generator == "api":
            return job
    return made(given)


def _filled(job: Job, fields: tuple[str, ...]) -> Question:
    """Return the template filled with the given fields."""
    from gxr_batch.cells import quoted
    from gxr_batch.chat import filled
    from gxr_batch.errors import RowError, UserError
    from gxr_batch.forms import form_of
    from gxr_batch.prompts import Templates

    template = Templates(job.prompt, form_of(job)).default
    values = {}
    for field in fields:
        name, equals, value = field.partition("=")
        if not equals or name.strip() not in template.fields:
            raise click.UsageError(
                f"--field takes NAME=VALUE; the fields of template {quoted(template.name)} are "
                f"{', '.join(map(quoted, template.fields))}."
            )
        values[name.strip()] = value
    try:
        return filled(template, values)
    except RowError as error:
        raise UserError(f"The template cannot be filled: {error.what}.", where="--field") from None


def _answer(conversation: Conversation, question: Question, *, as_json: bool) -> None:
    """Print the answer to one prompt."""
    from gxr_batch.engines.base import StopRequest
    from gxr_batch.records import DISCLAIMER

    def show(piece: str) -> None:
        if not as_json:
            click.echo(piece, nl=False)

    done = conversation.ask(question, show, StopRequest())
    if done is None or done.error is not None:
        click.echo(safe(f"Error: no answer: {done.error if done else 'the engine returned none'}"), err=True)
        click.get_current_context().exit(Exit.SOME_FAILED)
    elif as_json:
        click.echo(json.dumps(_summary(conversation, done), ensure_ascii=False, indent=2))
    else:
        click.echo(f"\n\n{DISCLAIMER}")


def _summary(conversation: Conversation, done: Completion) -> dict[str, Any]:
    from gxr_batch.records import DISCLAIMER

    identity = conversation.info.identity
    return {
        "text": done.text,
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.prompt_tokens,
        "new_tokens": done.new_tokens,
        "seconds_to_first_token": done.seconds_to_first_token,
        "seconds_generating": done.seconds_generating,
        "model": identity.model,
        "model_revision": identity.revision,
        "adapter": identity.adapter,
        "ai_generated": True,
        "disclaimer": DISCLAIMER,
    }
