"""kvasir sim: the fleet's own decisions under a simulated clock.

Options are the fields of the simulator's settings class; what is simulated is left to it.
"""

import json
from pathlib import Path
from typing import Any

import click
from kvasir_sim.settings import SimSettings

from kvasir_cli.commands.sim_cache import cache
from kvasir_cli.commands.sim_generate import generate
from kvasir_cli.commands.sim_plan import plan
from kvasir_cli.commands.sim_sweep import sweep
from kvasir_cli.progress import count_progress
from kvasir_cli.settings_options import build, options


@click.group()
def sim() -> None:
    """Run the fleet's decisions under a simulated clock."""


def _run(json_file: Path | None, **values: Any) -> None:
    from kvasir_sim.main import run_sim

    settings = build(SimSettings, values)
    done = 0
    with count_progress(f"simulating {settings.policy}", settings.requests) as advance:

        def progress(count: int) -> None:
            nonlocal done
            advance(count - done)
            done = count

        result = run_sim(settings, progress=lambda count, _: progress(count)).to_json()
    for name, value in result.items():
        click.echo(
            f"{name:28}{value:12.4g}" if isinstance(value, float) else f"{name:28}{value:12}"
        )
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


JSON_OPTION = click.Option(
    ["--json", "json_file"],
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Write the figures to this file.",
)

sim.add_command(
    click.Command(
        "run",
        params=[*options(SimSettings), JSON_OPTION],
        callback=_run,
        help="Replay a request trace against modelled workers under a routing policy.",
    )
)
sim.add_command(sweep)
sim.add_command(cache)
sim.add_command(plan)
sim.add_command(generate)
