"""Model folders with random weights: real shapes and a working tokenizer, no meaning.

Decides the values: equal (shape, seed) give equal files on every machine, tensor by tensor, so
that a shard layout does not change them. The tokenizer holds every byte and words of letters
built so that each word that a model emits encodes to the same token again.
"""

import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvasir_cli.errors import RefusedError
from kvasir_cli.models.folder import new_folder, refuse_full_disk, refuse_occupied, write_json
from kvasir_cli.models.safetensors import TensorSpec, to_bf16, write_model
from kvasir_cli.models.shapes import SHAPES
from kvasir_cli.models.tokenizer_json import (
    PRE_TOKENIZERS,
    AddedToken,
    Vocabulary,
    write_tokenizer,
)
from kvasir_cli.progress import byte_progress

PIECE_VALUES = 1 << 20
SPREAD = 0.02  # standard deviation, as models are initialised for training
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPACE = "Ġ"  # a space as byte-level BPE writes it
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_model(shape_name: str, target: Path, *, seed: int = 0, shard_bytes_max: int = 0) -> int:
    """Make a folder of that shape; returns the bytes of weights written.

    Raises:
        RefusedError: no such shape, or the folder is not free.
    """
    if shape_name not in SHAPES:
        raise RefusedError(f"no shape {shape_name!r}: choose from {', '.join(SHAPES)}")
    shape = SHAPES[shape_name]
    refuse_occupied(target)
    specs = shape.tensors()
    num_bytes = sum(spec.num_bytes for spec in specs)
    refuse_full_disk(target, num_bytes)
    vocabulary = make_vocabulary(shape.vocab, shape.context)
    start, end = (vocabulary.tokens[token] for token in (SPECIAL[1], SPECIAL[2]))
    ids = {"bos_token_id": start, "eos_token_id": end}
    label = f"random {shape_name} seed {seed}"
    with new_folder(target, label) as folder, byte_progress("making", num_bytes) as advance:
        write_json(folder / "config.json", shape.config() | ids)
        write_json(folder / "generation_config.json", ids)
        write_tokenizer(folder, vocabulary)
        write_model(
            folder,
            specs,
            lambda spec: random_pieces(spec, seed),
            advance=advance,
            shard_bytes_max=shard_bytes_max,
        )
    return num_bytes


def random_pieces(spec: TensorSpec, seed: int) -> Iterator[np.ndarray]:
    """The values of one tensor as bf16 bits: norms near one, all else near zero."""
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(spec.name.encode())]))
    mean = 1.0 if "norm" in spec.name else 0.0
    num_left = spec.num_bytes // 2
    while num_left:
        count = min(num_left, PIECE_VALUES)
        values = generator.standard_normal(count, dtype=np.float32)
        yield to_bf16(np.float32(mean) + np.float32(SPREAD) * values)
        num_left -= count


def make_vocabulary(size: int, context: int) -> Vocabulary:
    """Every byte, the special tokens, then " a", " b", ... " aa", " ab", ... up to `size`."""
    tokens = [*SPECIAL, *_byte_letters()]
    merges: list[tuple[str, str]] = []
    for length in itertools.count(1):
        for letters in itertools.product(LETTERS, repeat=length):
            if len(tokens) >= size:
                return _vocabulary(tokens, merges, context)
            stem = SPACE + "".join(letters[:-1])
            merges.append((stem, letters[-1]))
            tokens.append(stem + letters[-1])
    raise AssertionError("unreachable")


def _vocabulary(tokens: list[str], merges: list[tuple[str, str]], context: int) -> Vocabulary:
    end_of_text, start, end = SPECIAL
    return Vocabulary(
        tokens={token: i for i, token in enumerate(tokens)},
        merges=merges,
        added=[AddedToken(i, token, special=True) for i, token in enumerate(SPECIAL)],
        pre_tokenizer=PRE_TOKENIZERS["gpt-2"],
        bos=start,
        eos=end,
        pad=end_of_text,
        unknown=end_of_text,
        chat_template=CHAT_TEMPLATE,
        context_length=context,
    )


def _byte_letters() -> list[str]:
    """The 256 characters by which byte-level BPE writes bytes (GPT-2's table), in byte order."""
    shown = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (value for value in range(256) if value not in shown)
    moved = {value: chr(256 + i) for i, value in enumerate(hidden)}
    return [moved.get(value, chr(value)) for value in range(256)]
