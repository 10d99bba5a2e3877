"""kvasir engine: the engine alone, without server or scheduler."""

import os
from pathlib import Path
from typing import get_args

import click
from kvasir_engine.formats import KvFormat, WeightFormat


@click.group()
def engine() -> None:
    """Run the engine alone."""


@engine.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Model folder.")
@click.option(
    "--ids",
    "ids_file",
    type=click.Path(path_type=Path),
    required=True,
    help="Token ids, a .npy file: int64 [length].",
)
@click.option(
    "--out",
    "out_file",
    type=click.Path(path_type=Path),
    required=True,
    help="Where the logits go, a .npy file: float32 [length, vocab].",
)
@click.option(
    "--chunk",
    "chunk_tokens",
    type=click.IntRange(min=1),
    help="Tokens computed at a time.  [default: all]",
)
@click.option(
    "--threads",
    "num_threads",
    type=click.IntRange(min=0),
    default=0,
    help="0: one per core.",
)
@click.option(
    "--weights", type=click.Choice(get_args(WeightFormat)), default="bf16", show_default=True
)
@click.option("--kv", type=click.Choice(get_args(KvFormat)), default="bf16", show_default=True)
def logits(
    model: Path,
    ids_file: Path,
    out_file: Path,
    chunk_tokens: int | None,
    num_threads: int,
    weights: WeightFormat,
    kv: KvFormat,
) -> None:
    """Logits of every position of a token sequence.

    KVASIR_ISA chooses the CPU path (scalar, avx2, avx512, avx512bf16, amx), or cuda.
    """
    from kvasir_engine.logits import run_logits

    threads = num_threads or len(os.sched_getaffinity(0))
    run_logits(model, ids_file, out_file, chunk_tokens, num_threads=threads, weights=weights, kv=kv)
    click.echo(f"wrote {out_file}")
