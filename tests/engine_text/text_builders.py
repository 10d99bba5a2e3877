"""Builders for text tests: small tokenizers of the two great families, model folders."""

import json
from pathlib import Path

import tokenizers
from kvasir_engine.text import Tokenizer
from kvasir_engine.text.detokenizer import byte_of_char
from tokenizers import decoders, models, normalizers, pre_tokenizers

MERGES = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("he", "ll"), ("hell", "o"), ("Ã", "©")]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "<{{ message.role }}>{{ message.content | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's family: every byte is a token; ids 0..255, merges, then two special tokens."""
    chars = sorted(byte_of_char(), key=lambda char: byte_of_char()[char])
    vocabulary = {char: index for index, char in enumerate(chars)}
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|begin|>", "<|end|>"])
    inner.add_tokens(["added word"])
    return inner


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Llama 2's family: spaces as U+2581, byte fallback, the first space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    pieces += ["▁", "h", "e", "l", "o", "w", "r", "d", "é", "▁he", "ll", "▁w", "or", "ld", "▁hello"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "w"), ("l", "l"), ("o", "r"), ("l", "d")]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


def make_tokenizer(
    inner: tokenizers.Tokenizer | None = None, *, chat_template: str | None = CHAT_TEMPLATE
) -> Tokenizer:
    return Tokenizer(
        inner or byte_level(),
        tokenizer_config={"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}},
        generation_config={},
        model_config={},
        chat_template=chat_template,
    )


def make_folder(folder: Path, **files: object) -> Path:
    """A model folder: tokenizer.json, and JSON files by the names given (`config=`, ...)."""
    folder.mkdir(exist_ok=True)
    byte_level().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
