"""Token ids to text, piece by piece: decides which characters are final.

Invariant: the pieces joined (with the flush) are the decoded text of all tokens, and no piece
holds a U+FFFD for a character whose bytes have not all arrived. Two ways lead there: byte-level
BPE maps each token to bytes, so an incremental UTF-8 decoder is exact; any other decoder
(sentencepiece-like: leading spaces, byte fallback) is asked for a short window of tokens.
"""

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
HELD_REPLACEMENTS_MAX = 3
"""A UTF-8 sequence has at most four bytes: three may wait for the fourth."""
WINDOW_TOKENS_MAX = 32
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

    def __init__(self, decode: Callable[[list[int]], str], is_skipped: Callable[[int], bool]):
        self._decode = decode
        self._is_skipped = is_skipped
        self._window: list[int] = []
        self._num_done = 0  # leading tokens of the window that are out already
        self._num_chars = 0  # characters of the decoded window that are out already

    def feed(self, token_ids: Sequence[int]) -> str:
        """Characters that these tokens make final."""
        pieces = []
        for token_id in token_ids:
            if not self._is_skipped(token_id):
                self._window.append(token_id)
                pieces.append(self._advance())
        return "".join(pieces)

    def flush(self) -> str:
        """What was held back."""
        return self._decode(self._window)[self._num_chars :] if self._window else ""

    def _advance(self) -> str:
        text = self._decode(self._window)
        held = len(text) - len(text.rstrip(REPLACEMENT))
        is_broken = len(self._window) - self._num_done > WINDOW_TOKENS_MAX
        end = len(text) if is_broken else len(text) - min(held, HELD_REPLACEMENTS_MAX)
        piece = text[self._num_chars : end]
        self._num_chars = max(self._num_chars, end)
        if piece and end == len(text):
            self._forget_done()
        return piece

    def _forget_done(self) -> None:
        """The tokens just finished become the context of the next ones."""
        del self._window[: self._num_done]
        self._num_done = len(self._window)
        self._num_chars = len(self._decode(self._window))


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
