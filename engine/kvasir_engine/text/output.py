"""The text of one request's output: detokenised, and cut at the first stop string.

Invariant: the pieces of all chunks joined are the decoded output up to the first stop string, and
the token ids end with the token that completed it. Whoever streams keeps one per request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvasir_engine.text.detokenizer import Decoding
from kvasir_engine.text.stop import StopChecker


class DecodingSource(Protocol):
    """A tokenizer, as far as output needs it."""

    def start_decoding(self) -> Decoding:
        """A fresh incremental decoder."""


@dataclass(frozen=True, slots=True)
class TextChunk:
    """What may go to the client now."""

    text: str
    token_ids: tuple[int, ...]
    is_stopped: bool
    """A stop string was found: this is the last chunk, whatever the engine computes further."""


class Detokenizer:
    """Token ids to text, incrementally; resumes after tokens that are out already."""

    def __init__(self, tokenizer: DecodingSource, resume_tokens: Sequence[int] = ()) -> None:
        self._decoding = tokenizer.start_decoding()
        self._decoding.feed(resume_tokens)

    def feed(self, token_ids: Sequence[int]) -> str:
        """Characters that these tokens make final."""
        return self._decoding.feed(token_ids)

    def flush(self) -> str:
        """What was held back, when no more tokens will come."""
        return self._decoding.flush()


class OutputText:
    """Turns one request's tokens into text chunks."""

    def __init__(
        self,
        tokenizer: DecodingSource,
        *,
        stop: Sequence[str] = (),
        resume_tokens: Sequence[int] = (),
        resume_text_chars: int = 0,
    ) -> None:
        """`resume_text_chars`: characters of the resumed tokens' text that are out already."""
        self._detokenizer = Detokenizer(tokenizer)
        self._checker = StopChecker(stop)
        self._owed = self._checker.feed(self._detokenizer.feed(resume_tokens))[resume_text_chars:]

    @property
    def num_chars(self) -> int:
        """Characters of output text handed out so far, those of resumed tokens included."""
        return self._checker.num_chars_emitted - len(self._owed)

    @property
    def is_stopped(self) -> bool:
        """A stop string was found."""
        return self._checker.is_stopped

    def feed(
        self, token_ids: Sequence[int], *, is_last: bool = False, ends_with_stop_token: bool = False
    ) -> TextChunk:
        """The chunk for these tokens; none must follow `is_last`.

        `ends_with_stop_token`: the last token is counted, but its text is not part of the output.
        """
        pieces = [self._owed]
        self._owed = ""
        for count, token_id in enumerate(token_ids, 1):
            is_silent = ends_with_stop_token and count == len(token_ids)
            text = "" if is_silent else self._detokenizer.feed((token_id,))
            pieces.append(self._checker.feed(text))
            if self._checker.is_stopped:
                return TextChunk("".join(pieces), tuple(token_ids[:count]), is_stopped=True)
        if is_last:
            pieces += [self._checker.feed(self._detokenizer.flush()), self._checker.flush()]
        return TextChunk("".join(pieces), tuple(token_ids), self._checker.is_stopped)
