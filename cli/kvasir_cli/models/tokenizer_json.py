"""tokenizer.json and its neighbours, for BPE vocabularies: of bytes, and SentencePiece's.

Decides how a vocabulary, its merges and a pre-tokenizer type become files that the library
`tokenizers` and the engine read. Invariant: the library has loaded the result once before it is
written, so a folder never holds a tokenizer that cannot be used.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvasir_cli.errors import RefusedError
from kvasir_cli.models.folder import write_json

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before merges apply. Names are those of llama.cpp."""

    pattern: str = ""  # empty: the pattern of GPT-2, built into the library
    digits_apart: bool = False
    ignore_merges: bool = False  # a piece that is in the vocabulary is taken whole
    nfc: bool = False

    def steps(self) -> list[dict[str, Any]]:
        """The pre-tokenizers of tokenizer.json."""
        steps: list[dict[str, Any]] = []
        if self.digits_apart:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.pattern:
            split = {"Regex": self.pattern}
            steps.append(
                {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False}
            )
        steps.append(_byte_level(use_regex=not self.pattern))
        return steps


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """Text is not cut: spaces are marked and merges cross them; other bytes have tokens."""

    adds_prefix: bool
    """Whether a text begins with a space that is not written."""

    def normalizer(self) -> dict[str, Any]:
        """Of tokenizer.json."""
        mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
        if not self.adds_prefix:
            return mark
        prepend = {"type": "Prepend", "prepend": SPACE_MARK}
        return {"type": "Sequence", "normalizers": [prepend, mark]}

    def decoder(self) -> dict[str, Any]:
        """Of tokenizer.json."""
        steps: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if self.adds_prefix:
            steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {"type": "Sequence", "decoders": steps}


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(digits_apart=True),
    "starcoder": PreTokenizer(digits_apart=True),
    "refact": PreTokenizer(digits_apart=True),
    "llama-bpe": PreTokenizer(_LLAMA3, ignore_merges=True),
    "llama3": PreTokenizer(_LLAMA3, ignore_merges=True),
    "qwen2": PreTokenizer(_QWEN2, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2, nfc=True),
    "gpt-4o": PreTokenizer(_GPT4O),
}


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token matched in text before anything else; a special one is not shown when decoded."""

    token_id: int
    content: str
    special: bool


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All that makes a tokenizer."""

    tokens: dict[str, int]
    merges: Sequence[tuple[str, str]]
    added: Sequence[AddedToken]
    pre_tokenizer: PreTokenizer | SentencePiece
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unknown: str | None = None
    bos_is_added: bool = False
    chat_template: str | None = None
    context_length: int = 0


def write_tokenizer(folder: Path, vocabulary: Vocabulary) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Raises:
        RefusedError: the library does not accept the vocabulary; it says why.
    """
    from tokenizers import Tokenizer

    text = json.dumps(_tokenizer(vocabulary), ensure_ascii=False)
    try:
        Tokenizer.from_str(text)
    except Exception as error:
        raise RefusedError(f"its tokenizer cannot be rebuilt: {error}") from error
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", _tokenizer_config(vocabulary))


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token) for token in vocabulary.added],
        **_text_steps(vocabulary.pre_tokenizer),
        "post_processor": _post_processor(vocabulary),
        "model": _bpe(vocabulary),
    }


def _text_steps(kind: PreTokenizer | SentencePiece) -> dict[str, Any]:
    """What happens to text before merges apply, and after tokens are joined."""
    if isinstance(kind, SentencePiece):
        return {
            "normalizer": kind.normalizer(),
            "pre_tokenizer": None,
            "decoder": kind.decoder(),
        }
    return {
        "normalizer": {"type": "NFC"} if kind.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": kind.steps()},
        "decoder": _byte_level(use_regex=True),
    }


def _bpe(vocabulary: Vocabulary) -> dict[str, Any]:
    kind = vocabulary.pre_tokenizer
    is_pieces = isinstance(kind, SentencePiece)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": vocabulary.unknown if is_pieces else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": is_pieces,
        "byte_fallback": is_pieces,
        "ignore_merges": not isinstance(kind, SentencePiece) and kind.ignore_merges,
        "vocab": vocabulary.tokens,
        "merges": [list(merge) for merge in vocabulary.merges],
    }


def _added(token: AddedToken) -> dict[str, Any]:
    return {
        "id": token.token_id,
        "content": token.content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": token.special,
    }


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    if not vocabulary.bos_is_added or vocabulary.bos is None:
        is_pieces = isinstance(vocabulary.pre_tokenizer, SentencePiece)
        return None if is_pieces else _byte_level(use_regex=True)
    bos = vocabulary.bos
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary.tokens[bos]], "tokens": [bos]}},
    }


def _tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.bos_is_added,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "pad_token": vocabulary.pad,
        "unk_token": vocabulary.unknown,
        "model_max_length": vocabulary.context_length,
    }
    if vocabulary.chat_template:
        config["chat_template"] = vocabulary.chat_template
    return config
