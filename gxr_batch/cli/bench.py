"""`gxr-batch bench`: load time, speed and memory of a model on this machine."""

from __future__ import annotations

import json

import click

from gxr_batch.cli.options import say_to_stderr


class SlotCounts(click.ParamType[tuple[int, ...]]):
    """Slot counts, as in 1,8,32."""

    name = "slots"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the counts. Refuses anything else."""
        if isinstance(value, tuple):
            return value
        try:
            counts = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            counts = ()
        if not counts or min(counts) < 1:
            self.fail("takes whole numbers from 1, e.g. 1,8,32", param, ctx)
        return counts


@click.command(name="bench")
@click.option("--model", help='Hub id, folder, or "demo".  [default: demo]')
@click.option("--slots", type=SlotCounts(), default="1,8,32", show_default=True, help="Slot counts to measure.")
@click.option("--rows-a-slot", type=click.IntRange(min=1), default=2, show_default=True, help="Rows per slot.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Maximum number of new tokens.  [default: 256]")
@click.option("--set", "overrides", metavar="SECTION.KEY=VALUE", multiple=True, help="Set any key of a job file.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: str | None,
    slots: tuple[int, ...],
    rows_a_slot: int,
    max_new_tokens: int | None,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure load time, seconds for 256 tokens, memory, and rows per minute on this machine.

    Loads the model again for every slot count. Prints Markdown tables that can be pasted into an issue.

    \b
    Example:
      gxr-batch bench --model demo --slots 1,8,32
    """
    from gxr_batch.bench import bench, table
    from gxr_batch.errors import UserError
    from gxr_batch.job import make_job

    # Any name, so that --engine api is refused below and not for a missing name.
    asked = {"model.path": model, "sampling.max_new_tokens": max_new_tokens, "api.model": "any"}
    job = make_job("bench", overrides, {key: value for key, value in asked.items() if value is not None})
    if job.generator == "api":
        raise UserError(
            "bench measures this machine, but an API generates on another one.",
            where=f"{job.generator_key} = api",
            next_step=f"remove {job.generator_key} to measure this machine; the summary of a run shows the speed of a "
            "server: gxr-batch run my.toml --limit 50 --set api.concurrency=8",
        )
    found = bench(job, slots, rows_a_slot, say_to_stderr(quiet))
    click.echo(json.dumps(found.as_dict(), indent=2) if as_json else table(found))
