"""GGUF file in, Hugging Face folder out: bf16 safetensors, config, tokenizer, generation config.

The order: refuse what is not supported, then write beside the target, then rename. Memory holds
one piece of one tensor at a time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvasir_engine.config import parse_config
from kvasir_engine.tensors import check_tensors
from kvasir_proto.errors import KvasirError

from kvasir_cli.errors import RefusedError
from kvasir_cli.models.folder import new_folder, refuse_full_disk, refuse_occupied, write_json
from kvasir_cli.models.gguf_config import hf_config
from kvasir_cli.models.gguf_file import GgufFile, open_gguf
from kvasir_cli.models.gguf_tensors import Planned, pieces, plan_tensors
from kvasir_cli.models.gguf_tokenizer import end_token_ids, read_vocabulary
from kvasir_cli.models.safetensors import write_model
from kvasir_cli.models.tokenizer_json import write_tokenizer
from kvasir_cli.progress import byte_progress


def import_gguf(source: Path, target: Path, *, label: str) -> int:
    """Import a GGUF file into a new folder; returns the bytes of weights written.

    Args:
        label: names the source in the folder's manifest.

    Raises:
        RefusedError: not a GGUF file, or a model or tokenizer that is not supported.
        CommandError: the disk is too small.
    """
    refuse_occupied(target)
    file = open_gguf(source)
    config = hf_config(file)
    planned = {item.spec.name: item for item in plan_tensors(file, config)}
    _refuse_uncomputable(file, config, planned)
    vocabulary = read_vocabulary(file)
    specs = [item.spec for item in planned.values()]
    num_bytes = sum(spec.num_bytes for spec in specs)
    refuse_full_disk(target, num_bytes)
    ends = end_token_ids(file, vocabulary)
    generation = {"bos_token_id": config.get("bos_token_id"), "eos_token_id": ends}
    with new_folder(target, label) as folder, byte_progress("importing", num_bytes) as advance:
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", generation)
        write_tokenizer(folder, vocabulary)
        write_model(folder, specs, lambda spec: pieces(planned[spec.name]), advance=advance)
    return num_bytes


def _refuse_uncomputable(
    file: GgufFile, config: dict[str, Any], planned: Mapping[str, Planned]
) -> None:
    """Raise before the weights are written, if the engine would refuse the folder."""
    shapes = {name: item.spec.shape for name, item in planned.items()}
    try:
        check_tensors(parse_config(config), shapes)
    except KvasirError as error:
        raise RefusedError(f"{file.path}: {error.message}") from error
