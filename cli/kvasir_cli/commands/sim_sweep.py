"""kvasir sim sweep: all policies over rates and replica counts, as a table and a picture."""

import json
import os
from pathlib import Path
from typing import Any, get_args

import click
from kvasir_sim.settings import PolicyName, SimSettings

from kvasir_cli.progress import count_progress
from kvasir_cli.settings_options import build, options

VARIED = ("policy", "rate", "replicas")
POLICIES: tuple[str, ...] = get_args(PolicyName)
RATES = (7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0)
REPLICAS = (1, 4, 16)


def _file(flag: str, name: str, text: str) -> click.Option:
    return click.Option(
        [flag, name], type=click.Path(path_type=Path, dir_okay=False, writable=True), help=text
    )


PARAMS: list[click.Parameter] = [
    click.Option(
        ["--policy", "policies"],
        type=click.Choice(POLICIES),
        multiple=True,
        help="A policy, given repeatedly. [default: all]",
    ),
    click.Option(
        ["--rate", "rates"],
        type=click.FloatRange(min=0, min_open=True),
        multiple=True,
        help="Requests per second, given repeatedly. [default: 7 to 14]",
    ),
    click.Option(
        ["--replicas"],
        type=click.IntRange(1, 256),
        multiple=True,
        help="Router replicas, given repeatedly. [default: 1, 4, 16]",
    ),
    *(option for option in options(SimSettings) if option.name not in VARIED),
    click.Option(
        ["--processes", "num_processes"],
        type=click.IntRange(1, 256),
        help="Runs at a time. [default: the machine's cores]",
    ),
    _file("--png", "png_file", "Draw the curves into this file."),
    _file("--table", "table_file", "Write the table to this file, as Markdown."),
    _file("--json", "json_file", "Write every figure of every run to this file."),
]


def _sweep(
    policies: tuple[PolicyName, ...],
    rates: tuple[float, ...],
    replicas: tuple[int, ...],
    num_processes: int | None,
    png_file: Path | None,
    table_file: Path | None,
    json_file: Path | None,
    **values: Any,
) -> None:
    from kvasir_sim.sweep import Axes, run_sweep, to_markdown

    if png_file is not None:
        need_matplotlib()
    base = build(SimSettings, values)
    axes = Axes(
        policies or POLICIES,  # type: ignore[arg-type]
        rates or RATES,
        replicas or REPLICAS,
    )
    runs = axes.settings(base)
    with count_progress(f"simulating {base.trace.name}", len(runs)) as advance:
        points = run_sweep(
            runs, num_processes=num_processes or os.cpu_count() or 1, advance=advance
        )
    table = to_markdown(points)
    click.echo(table)
    if table_file is not None:
        table_file.write_text(table)
    if json_file is not None:
        json_file.write_text(json.dumps([point.to_json() for point in points], indent=1) + "\n")
    if png_file is not None:
        from kvasir_sim.plot import save_sweep

        title = f"{base.trace.name}, {base.workers} workers, sync every {base.sync_ms:g} ms"
        save_sweep(points, png_file, title=title, slo_ms=base.slo_ttft_ms)


def need_matplotlib() -> None:
    """Before the runs, not after them."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise click.UsageError("--png needs matplotlib: pip install 'kvasir[plots]'") from error


sweep = click.Command(
    "sweep",
    params=PARAMS,
    callback=_sweep,
    help="Run policies over rates and replica counts; draw the curves.",
)
