"""kvasir sim: the fleet's own decisions under a simulated clock."""

import importlib

import click

from kvasir_cli.errors import CommandError


@click.group()
def sim() -> None:
    """Run the fleet's decisions under a simulated clock."""


@sim.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.pass_context
def run(ctx: click.Context) -> None:
    """Run a simulation; arguments are the simulator's own."""
    try:
        module = importlib.import_module("kvasir_sim.main")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("kvasir_sim"):
            raise
        raise CommandError("the simulator is not part of this build") from error
    module.main(ctx.args)
