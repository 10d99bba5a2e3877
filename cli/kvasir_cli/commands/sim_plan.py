"""kvasir sim plan: a day under rules that size a fleet, as a table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from kvasir_sim.plan.settings import PlanSimSettings
from rich.console import Console
from rich.table import Table

from kvasir_cli.settings_options import build, options

if TYPE_CHECKING:
    from kvasir_sim.plan.compare import Spread


def _plan(num_seeds: int, json_file: Path | None, png_file: Path | None, **values: Any) -> None:
    from kvasir_sim.plan.compare import compare_days, spread_of, spreads, to_json

    if png_file is not None:
        from kvasir_cli.commands.sim_sweep import need_matplotlib

        need_matplotlib()
    settings = build(PlanSimSettings, values)
    console = Console()
    with console.status("making the day") as status:
        days = compare_days(
            settings,
            num_seeds=num_seeds,
            progress=lambda name: status.update(f"replaying the day: {name}"),
        )
    console.print(_table(spreads(days)))
    splits = ", ".join(dict.fromkeys(day.results[1].name for day in days))
    console.print(
        f"{' + '.join(str(day.num_requests) for day in days)} requests; "
        f"{_share(spread_of(day.saving for day in days))} fewer worker-hours than the best static "
        f"split that attains as much ({splits})"
    )
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(days), indent=2) + "\n")
    if png_file is not None:
        from kvasir_sim.plan.day import make_day
        from kvasir_sim.plan.picture import save_day

        day = make_day(hours=settings.hours, rate_rps=settings.rate, seed=settings.seed)
        save_day(day, days[0], png_file)


def _table(rules: "dict[str, dict[str, Spread]]") -> Table:
    table = Table(box=None)
    for name in ("rule", "attained", "TTFT", "TPOT", "worker-hours", "most", "changes/h"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    table.add_column("flips/h (worst)", justify="right")
    for name, figures in rules.items():
        table.add_row(
            name,
            _share(figures["attainment"]),
            _share(figures["ttft_attainment"]),
            _share(figures["tpot_attainment"]),
            _number(figures["worker_hours"], 0),
            _number(figures["workers_max"], 0),
            _number(figures["changes_per_hour"], 1),
            f"{figures['flips_per_hour'].median:.1f} ({figures['flips_per_hour_max'].most:.0f})",
        )
    return table


def _share(spread: "Spread") -> str:
    return _text(spread, lambda value: f"{value:.1%}")


def _number(spread: "Spread", digits: int) -> str:
    return _text(spread, lambda value: f"{value:.{digits}f}")


def _text(spread: "Spread", write: Callable[[float], str]) -> str:
    """The median and, where days differ, the range."""
    middle, least, most = map(write, spread)
    return middle if least == most else f"{middle} ({least} to {most})"


plan = click.Command(
    "plan",
    params=[
        *options(PlanSimSettings),
        click.Option(
            ["--seeds", "num_seeds"],
            type=click.IntRange(1, 100),
            default=1,
            show_default=True,
            help="Days to replay, from --seed on: medians and ranges are shown.",
        ),
        click.Option(
            ["--png", "png_file"],
            type=click.Path(path_type=Path, dir_okay=False, writable=True),
            help="Draw the first day into this file.",
        ),
        click.Option(
            ["--json", "json_file"],
            type=click.Path(path_type=Path, dir_okay=False, writable=True),
            help="Write the figures to this file.",
        ),
    ],
    callback=_plan,
    help="Size a fleet over a day of bursty load by the planner and by other rules.",
)
