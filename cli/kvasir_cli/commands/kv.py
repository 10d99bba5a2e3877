"""kvasir kv: what codecs of the KV cache cost a model."""

import os
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
