"""kvasir sim cache: what caches of KV blocks save on a trace, by policy of eviction and size."""

import json
from dataclasses import asdict
from pathlib import Path

import click

SHARES = (0.01, 0.03, 0.1, 0.3)
INPUT_TOKENS_MAX = 1 << 30


@click.command()
@click.option(
    "--trace",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="Whose blocks are wanted: jsonl as Mooncake's.",
)
@click.option("--requests", type=click.IntRange(min=1), default=1 << 20, help="Of the trace.")
@click.option(
    "--share",
    "shares",
    type=click.FloatRange(min=0, max=1, min_open=True),
    multiple=True,
    default=SHARES,
    show_default=True,
    help="Size of the cache, as a share of the trace's distinct blocks.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False, writable=True))
def cache(trace: Path, requests: int, shares: tuple[float, ...], json_file: Path | None) -> None:
    """Compare the eviction of KV nodes with LRU and S3-FIFO on a trace."""
    from kvasir_sim.cache import compare
    from kvasir_sim.readers import load_trace

    rows = compare(load_trace(trace, max_input=INPUT_TOKENS_MAX, count=requests), shares=shares)
    for row in rows:
        click.echo(
            f"{row.policy:8}{row.num_slots:9} blocks ({row.slots_share:.0%}) "
            f"saves {row.hit_share:7.2%} of at most {row.hit_share_max:.2%}"
        )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
