"""A prompt with chunks: documents set apart by a separator, whose KV may be that of other prompts.

    head SEPARATOR chunk SEPARATOR chunk SEPARATOR rest

The separator is no part of the prompt. Each part is tokenised by itself, so that a chunk has the
same tokens in every prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2

CHUNKS_MAX = 256
RECOMPUTE_PERMILLE_DEFAULT = 150


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens, and where the chunks lie."""

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()


def split_prompt(text: str, separator: str, encode: Callable[[str, bool], list[int]]) -> Prompt:
    """The prompt of a text with separators; `encode(part, is_first)` tokenises.

    Raises:
        KvasirError: INVALID_REQUEST: there is no chunk, or there are too many.
    """
    parts = text.split(separator)
    if not 3 <= len(parts) <= CHUNKS_MAX + 2:
        message = f"the prompt must hold 1 to {CHUNKS_MAX} chunks, each between two separators"
        raise KvasirError(Reason.INVALID_REQUEST, message, param="chunk_separator")
    token_ids: list[int] = []
    spans = []
    for index, part in enumerate(parts):
        start = len(token_ids)
        if part or index == 0:
            token_ids += encode(part, index == 0)
        if 0 < index < len(parts) - 1 and len(token_ids) > start:
            spans.append((start, len(token_ids)))
    return Prompt(tuple(token_ids), tuple(spans))


def chunks_message(prompt: Prompt, recompute: float | None) -> common_pb2.Chunks | None:
    """What workers are told; None: nothing is to be reused."""
    if not prompt.spans:
        return None
    permille = RECOMPUTE_PERMILLE_DEFAULT if recompute is None else max(round(recompute * 1000), 1)
    spans = [common_pb2.TokenSpan(start=start, end=end) for start, end in prompt.spans]
    return common_pb2.Chunks(spans=spans, recompute_permille=permille)
