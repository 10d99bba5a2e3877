"""Token ids to text, piece by piece: decides which characters are final.

Invariant: the pieces joined (with the flush) are the decoded text of all tokens, and no piece
holds a U+FFFD for a character whose bytes have not all arrived. Two ways lead there. Byte-level
BPE maps each token to bytes, so an incremental UTF-8 decoder is exact. Any other decoder
(sentencepiece-like) is asked for a short window of tokens, so that spaces between words stay; its
byte fallback tokens take the first way. In broken UTF-8 a complete character stays what it is,
where decoders of whole texts may give up the bytes around it as well.
"""

import codecs
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
HELD_TOKENS_MAX = 8
"""A character is complete long before: text that is still broken is broken for good."""


class Decoding(Protocol):
    """One request's way from tokens to text."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Characters that these tokens make final."""

    def flush(self) -> str:
        """What is left when no more tokens will come."""


class ByteLevelDecoding:
    """Tokens are bytes; UTF-8 is decoded incrementally."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        """Characters that these tokens make final."""
        return self._utf8.decode(b"".join(map(self._token_bytes, token_ids)))

    def flush(self) -> str:
        """A U+FFFD if the last character is incomplete."""
        return self._utf8.decode(b"", final=True)


class WindowDecoding:
    """Decodes the last finished piece and what follows it, and hands out the difference."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        skipped: Container[int],
        fallback_bytes: Mapping[int, bytes],
    ) -> None:
        """`skipped` have no text; `fallback_bytes` are the tokens that stand for one byte."""
        self._decode = decode
        self._skipped = skipped
        self._fallback_bytes = fallback_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window: list[int] = []
        self._num_done = 0  # leading tokens of the window that are out already
        self._num_chars = 0  # characters of the decoded window that are out already

    def feed(self, token_ids: Sequence[int]) -> str:
        """Characters that these tokens make final."""
        return "".join(self._feed_one(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """What was held back."""
        return self._take_window() + self._utf8.decode(b"", final=True)

    def _feed_one(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        byte = self._fallback_bytes.get(token_id)
        if byte is not None:
            held = self._take_window()
            self._forget_done([token_id])
            return held + self._utf8.decode(byte)
        broken = self._utf8.decode(b"", final=True)
        self._window.append(token_id)
        return broken + self._advance()

    def _advance(self) -> str:
        text = self._decode(self._window)
        num_held = len(self._window) - self._num_done
        if text.endswith(REPLACEMENT) and num_held <= HELD_TOKENS_MAX:
            return ""
        piece = text[self._num_chars :]
        if piece:
            self._forget_done(self._window[self._num_done :])
        return piece

    def _take_window(self) -> str:
        return self._decode(self._window)[self._num_chars :] if self._window else ""

    def _forget_done(self, context: list[int]) -> None:
        """The tokens just finished are the context of the next ones."""
        self._window = context
        self._num_done = len(context)
        self._num_chars = len(self._decode(context))


def byte_of_char() -> dict[str, int]:
    """The inverse of GPT-2's table, which shows every byte as a printable character."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    table = {chr(byte): byte for byte in shown}
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def bytes_of_token(token: str, table: Mapping[str, int]) -> bytes:
    """The bytes that a byte-level token stands for; a token outside the table is plain text."""
    try:
        return bytes([table[char] for char in token])
    except KeyError:
        return token.encode()
