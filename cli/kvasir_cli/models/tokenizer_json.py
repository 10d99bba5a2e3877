"""tokenizer.json and its neighbours, for byte-level BPE vocabularies.

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


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(digits_apart=True),
    "starcoder": PreTokenizer(digits_apart=True),
    "refact": PreTokenizer(digits_apart=True),
    "llama-bpe": PreTokenizer(_LLAMA3, ignore_merges=True),
    "llama3": PreTokenizer(_LLAMA3, ignore_merges=True),
    "qwen2": PreTokenizer(_QWEN2, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2, nfc=True),
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
    pre_tokenizer: PreTokenizer
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
    pre = vocabulary.pre_tokenizer
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token) for token in vocabulary.added],
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.steps()},
        "post_processor": _post_processor(vocabulary),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocabulary.tokens,
            "merges": [list(merge) for merge in vocabulary.merges],
        },
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


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any]:
    if not vocabulary.bos_is_added or vocabulary.bos is None:
        return _byte_level(use_regex=True)
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
