"""kvasir sim plan: a day under rules that size a fleet, as a table."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from kvasir_sim.plan.settings import PlanSimSettings
from rich.console import Console
from rich.table import Table

from kvasir_cli.settings_options import build, options

if TYPE_CHECKING:
    from kvasir_sim.plan.compare import Comparison


def _plan(json_file: Path | None, **values: Any) -> None:
    from kvasir_sim.plan.compare import compare

    settings = build(PlanSimSettings, values)
    console = Console()
    with console.status("making the day") as status:
        found = compare(settings, progress=lambda name: status.update(f"replaying the day: {name}"))
    console.print(_table(found))
    console.print(
        f"{found.num_requests} requests; {found.saving:.0%} fewer worker-hours than the best "
        f"static split that attains as much ({found.results[1].name})"
    )
    if json_file is not None:
        json_file.write_text(json.dumps(found.to_json(), indent=2) + "\n")


def _table(found: "Comparison") -> Table:
    table = Table(box=None)
    for name in ("rule", "attained", "TTFT", "TPOT", "worker-hours", "most", "changes/h"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    table.add_column("flips/h (worst)", justify="right")
    for result in found.results:
        table.add_row(
            result.name,
            f"{result.attainment:.1%}",
            f"{result.ttft_attainment:.1%}",
            f"{result.tpot_attainment:.1%}",
            f"{result.worker_hours:.0f}",
            str(result.workers_max),
            f"{result.changes_per_hour:.1f}",
            f"{result.flips_per_hour:.1f} ({result.flips_per_hour_max})",
        )
    return table


plan = click.Command(
    "plan",
    params=[
        *options(PlanSimSettings),
        click.Option(
            ["--json", "json_file"],
            type=click.Path(path_type=Path, dir_okay=False, writable=True),
            help="Write the figures to this file.",
        ),
    ],
    callback=_plan,
    help="Size a fleet over a day of bursty load by the planner and by other rules.",
)
