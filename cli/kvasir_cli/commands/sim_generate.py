"""kvasir sim generate: request traces of conversations, agents, RAG and bursts."""

from pathlib import Path
from typing import Any

import click
from kvasir_sim.generate import GenerateSettings

from kvasir_cli.settings_options import build, options


def _generate(target: Path, **values: Any) -> None:
    from kvasir_sim.generate import generate as make_trace
    from kvasir_sim.generate import write_trace

    rows = make_trace(build(GenerateSettings, values))
    write_trace(rows, target)
    span_s = (float(str(rows[-1]["timestamp"])) - float(str(rows[0]["timestamp"]))) / 1_000
    click.echo(f"{target}: {len(rows)} requests over {span_s:.0f} s")


generate = click.Command(
    "generate",
    params=[
        click.Argument(["target"], type=click.Path(path_type=Path, dir_okay=False)),
        *options(GenerateSettings),
    ],
    callback=_generate,
    help="Write a made-up request trace to TARGET, in Mooncake's format.",
)
