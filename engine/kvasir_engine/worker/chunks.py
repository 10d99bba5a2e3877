"""The chunks of a request: documents in its prompt whose KV may be that of other prompts.

Decides under which names the blocks of a request go. Invariant: what is blended of chunks is never
named as what is computed.
"""

from dataclasses import dataclass

from kvasir_kvstore.core import block
from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_proto.v1 import worker_pb2

Message = worker_pb2.GenerateRequest | worker_pb2.PrefillRequest


@dataclass(frozen=True, slots=True)
class Chunks:
    """What of a prompt is blended, and for whom."""

    spans: tuple[tuple[int, int], ...]
    recompute_permille: int
    tenant_salt: bytes
    """Of the tenant: names of the chunks themselves are exact."""

    end: int
    """Leading tokens, in whole blocks, whose KV is blended; the prompt's last one is computed."""

    @property
    def sources(self) -> tuple[tuple[int, int], ...]:
        """The chunks, and first what stands before them: alone it is what it is here."""
        head = (0, self.spans[0][0])
        return (head, *self.spans) if head[1] else self.spans


def chunks_of(message: Message) -> Chunks | None:
    """The chunks of a checked request; None: all its KV is exact."""
    if not message.HasField("chunks"):
        return None
    spans = tuple((span.start, span.end) for span in message.chunks.spans)
    end = whole_blocks(min(spans[-1][1], len(message.token_ids) - 1))
    return Chunks(spans, message.chunks.recompute_permille, message.tenant_salt, end)


def names_salt(message: Message) -> bytes:
    """The salt under which a request's own blocks are named."""
    chunks = chunks_of(message)
    if chunks is None:
        return message.tenant_salt
    return block.blended_salt(
        message.tenant_salt, message.token_ids, chunks.spans, chunks.recompute_permille
    )


def whole_blocks(num_tokens: int) -> int:
    """The tokens of full blocks among so many."""
    return num_tokens // BLOCK_TOKENS * BLOCK_TOKENS
