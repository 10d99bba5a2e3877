"""The tokenizer of a Hugging Face model folder: text to token ids and back, chat template, limits.

Reads tokenizer.json, tokenizer_config.json, generation_config.json, config.json and
chat_template.jinja; what a folder lacks is said when it is needed, not before. Pure Python on the
`tokenizers` library: the router uses it without the native engine.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine.multimodal import text_part
from kvasir_engine.rope import longest_context
from kvasir_engine.text.chat import ChatTemplate
from kvasir_engine.text.detokenizer import (
    ByteLevelDecoding,
    Decoding,
    WindowDecoding,
    byte_of_char,
    bytes_of_token,
)

NFC_SHRINKS_MAX = 4
"""Composing a text (Unicode NFC) makes it at most this many times shorter, in bytes."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        tokenizer_config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        model_config: Mapping[str, Any],
        chat_template: str | None,
    ) -> None:
        """Prefer `Tokenizer.load`.

        Raises:
            ValueError: the chat template is not valid.
        """
        self._inner = inner
        self._special_tokens = _special_tokens(tokenizer_config)
        self._template = (
            ChatTemplate(chat_template, self._special_tokens) if chat_template else None
        )
        self.eos_token_ids = self._eos_token_ids(generation_config, model_config)
        self.context_length = longest_context(model_config)
        self.vocab_size = int(model_config.get("vocab_size") or inner.get_vocab_size())

    @classmethod
    def load(cls, model_dir: str | Path) -> "Tokenizer":
        """The tokenizer of a model folder.

        Raises:
            FileNotFoundError: there is no tokenizer.json.
            ValueError: a file is not valid; the message names it.
        """
        folder = Path(model_dir)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json: text cannot be tokenised")
        tokenizer_config = _read_json(folder / "tokenizer_config.json")
        return cls(
            _read_tokenizer(file),
            tokenizer_config=tokenizer_config,
            generation_config=_read_json(folder / "generation_config.json"),
            model_config=text_part(_read_json(folder / "config.json")),
            chat_template=_read_chat_template(folder, tokenizer_config),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works."""
        return self._template is not None

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """bos_token, eos_token, ... of tokenizer_config.json, as text."""
        return self._special_tokens

    def encode(
        self, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Token ids of `text`; without special tokens, no BOS is put before it (templates hold it).

        Raises:
            KvasirError: CONTEXT_LENGTH, naming `param`, for a text that no tokenisation could make
                fit: it is refused at once, for tokenising megabytes takes seconds.
        """
        if self._bytes_max is not None and len(text) > self._bytes_max:
            raise KvasirError(
                Reason.CONTEXT_LENGTH,
                f"this model's maximum context length is {self.context_length} tokens; "
                f"{len(text)} characters of text are more",
                param=param,
            )
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_corpus(self, text: str) -> list[int]:
        """Token ids of a text of any length, which is cut into sequences afterwards."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _bytes_max(self) -> int | None:
        """A longer text has too many tokens; None: unknown, the text is changed beforehand."""
        normalizer = self._inner.normalizer
        factor = NFC_SHRINKS_MAX if isinstance(normalizer, tokenizers.normalizers.NFC) else 1
        added = self._inner.get_added_tokens_decoder().values()
        takes_spaces = any(token.lstrip or token.rstrip for token in added)
        is_changed = normalizer is not None and factor == 1
        if not self._is_byte_level or is_changed or takes_spaces:
            return None
        per_token = max(len(token.encode()) for token in self._inner.get_vocab())
        return self.context_length * per_token * factor

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The whole text of `token_ids` at once."""
        return self._inner.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text for `messages`; encode it with add_special_tokens=False.

        Raises:
            KvasirError: UNSUPPORTED without a template, INVALID_REQUEST for what it refuses.
        """
        if self._template is None:
            raise KvasirError(
                Reason.UNSUPPORTED,
                "this model has no chat template: use /v1/completions",
                param="messages",
            )
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of the prompt for `messages`.

        Raises:
            KvasirError: as `apply_chat_template` and `encode`.
        """
        text = self.apply_chat_template(messages, **variables)
        return self.encode(text, add_special_tokens=False, param="messages")

    def start_decoding(self) -> Decoding:
        """A fresh incremental decoder, special tokens left out."""
        if self._is_byte_level:
            return ByteLevelDecoding(self._token_bytes)
        return WindowDecoding(
            self._inner.decode, skipped=self._skipped_ids, fallback_bytes=self._fallback_bytes
        )

    def _eos_token_ids(self, *configs: Mapping[str, Any]) -> tuple[int, ...]:
        """Those of the first config that names any, and tokenizer_config.json's eos_token.

        Models tuned for chat often end turns with a token that only the tokenizer's files name.
        """
        named: Any = []
        for config in reversed(configs):
            ids = config.get("eos_token_id")
            named = named if ids is None else ids
        own = self._inner.token_to_id(self._special_tokens.get("eos_token", ""))
        ids = list(named) if isinstance(named, list) else [int(named)]
        return tuple(dict.fromkeys(ids if own is None else [*ids, own]))

    @cached_property
    def _skipped_ids(self) -> frozenset[int]:
        added = self._inner.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def _decoder_types(self) -> frozenset[str]:
        """Names of the tokenizers library's decoders that make up this one."""
        decoder = json.loads(self._inner.to_str()).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        return frozenset(str(part.get("type")) for part in parts)

    @property
    def _is_byte_level(self) -> bool:
        return self._decoder_types in ({"ByteLevel"}, {"ByteLevel", "Fuse"})

    @cached_property
    def _fallback_bytes(self) -> dict[int, bytes]:
        if "ByteFallback" not in self._decoder_types:
            return {}
        names = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        ids = {self._inner.token_to_id(name): byte for name, byte in names.items()}
        return {token_id: byte for token_id, byte in ids.items() if token_id is not None}

    @cached_property
    def _bytes_by_id(self) -> dict[int, bytes]:
        table = byte_of_char()
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        known = {token_id: bytes_of_token(text, table) for text, token_id in vocabulary.items()}
        return known | dict.fromkeys(self._skipped_ids, b"")

    def _token_bytes(self, token_id: int) -> bytes:
        """No bytes for special tokens, and for ids of padded vocabularies."""
        return self._bytes_by_id.get(token_id, b"")


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for key in SPECIAL_TOKENS:
        token = tokenizer_config.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[key] = text
    return tokens


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return value


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file} is not a valid tokenizer: {error}") from error


def _read_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several named ones
        by_name = {entry.get("name"): entry.get("template") for entry in template}
        template = by_name.get("default")
    return template if isinstance(template, str) else None
