"""kvasir kv: what codecs of the KV cache cost a model, and how fast they are."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import click


@click.group()
def kv() -> None:
    """Work on the KV cache of models."""


@kv.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Model folder.")
@click.option(
    "--text",
    "files",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="English text, repeatable.  [default: /usr/share/common-licenses]",
)
@click.option("--tokens", "num_tokens", type=click.IntRange(min=1), default=8192, show_default=True)
@click.option(
    "--threads", "num_threads", type=click.IntRange(min=0), default=0, help="0: one per core."
)
@click.option(
    "--png", "png_file", type=click.Path(path_type=Path), help="Draw it (needs matplotlib)."
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="Write the record there.  [default: into the model's folder, for its workers]",
)
def probe(
    model: Path,
    files: tuple[Path, ...],
    num_tokens: int,
    num_threads: int,
    png_file: Path | None,
    json_file: Path | None,
) -> None:
    """Perplexity of a text through a compressed round trip of the KV cache, by codec.

    Workers use only codecs that passed for their model.
    """
    from kvasir_engine.codec_probe import RECORD_NAME, draw_probe, run_probe, write_record
    from kvasir_engine.model import load_model
    from kvasir_engine.quality import licence_files, text_ids

    from kvasir_cli.commands.sim_sweep import need_matplotlib
    from kvasir_cli.progress import stages

    if png_file is not None:
        need_matplotlib()
    ids = text_ids(model, files or licence_files(), num_tokens)
    if not len(ids):
        raise click.UsageError("the text is shorter than one window of 512 tokens: give --text")
    threads = num_threads or len(os.sched_getaffinity(0))
    with stages() as report:
        loaded = load_model(model, num_threads=threads, progress=report)
        found = run_probe(loaded, ids, lambda done, total: report("measure", done, total))
    click.echo(f"  {'raw':<8} perplexity {found.perplexity:8.4f}")
    for row in found.rows:
        verdict = "allowed" if row.is_allowed else "refused"
        click.echo(
            f"  {row.codec:<8} perplexity {row.perplexity:8.4f} {row.change:+8.3%}"
            f"  (at most {row.change_max:.1%}: {verdict})  {row.ratio:.2f} times smaller"
        )
    record = json_file or model / RECORD_NAME
    write_record(found, record)
    click.echo(f"wrote {record}")
    if png_file is not None:
        draw_probe(found).savefig(png_file, format="png", dpi=110)
        click.echo(f"wrote {png_file}")


@kv.command()
@click.option("--heads", "num_heads", type=click.IntRange(1, 4096), default=8, show_default=True)
@click.option("--head-dim", type=click.IntRange(32, 1024), default=64, show_default=True)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the result there."
)
def rates(num_heads: int, head_dim: int, json_file: Path | None) -> None:
    """Measure the codecs on one core, beside memcpy, in raw bytes."""
    from kvasir_kvstore.bench_codecs import run_bench_codecs

    from kvasir_cli.load.machine import machine

    if head_dim % 32:
        raise click.UsageError("--head-dim must be a multiple of 32")
    rows = run_bench_codecs(num_heads=num_heads, head_dim=head_dim)
    for row in rows:
        click.echo(
            f"  {row.place:<6}  {row.codec:<8} {row.path:<7} encode {row.encode_gb_per_s:6.2f} GB/s"
            f"  decode {row.decode_gb_per_s:6.2f} GB/s  {row.ratio:.2f} times smaller"
        )
    if json_file is not None:
        result = {"bench": "kv_codecs", "machine": machine(), "rows": [asdict(r) for r in rows]}
        json_file.write_text(json.dumps(result, indent=2) + "\n")
        click.echo(f"wrote {json_file}")
