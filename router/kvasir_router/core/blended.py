"""What a prompt that is blended of chunks asks of a worker: less where their KV is held.

A chunk's KV is that of the chunk alone, as a prompt of its own; a worker that does not hold it
computes it, then blends the prompt and computes a share of each chunk's tokens again (docs of
chunks). Decides nothing: tells the estimate what is saved, and at what cost. What else blending
takes (the first layer of all tokens, the moves) is not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvasir_kvstore.core import block
from kvasir_kvstore.core.block import BLOCK_TOKENS

from kvasir_router.core.fleet import Blended, Chunk, FleetView, WorkerState


@dataclass(frozen=True, slots=True)
class Saved:
    """Of one prompt's chunks, at one worker."""

    held_tokens: int = 0
    """In its own cache, and not computed again."""

    fetched_tokens: int = 0
    """To be fetched from a KV node."""

    tokens: int = 0
    """Not computed, of the prompt's; negative: chunks must be computed alone first."""

    fetch_us: float = 0.0


def blended_of(
    token_ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    *,
    recompute_permille: int,
    fingerprint: bytes,
    tenant_salt: bytes,
) -> Blended:
    """How workers make the KV of a prompt with these chunks, and what they call it."""
    salt = block.blended_salt(tenant_salt, token_ids, spans, recompute_permille)
    alone = block.root(fingerprint, tenant_salt)
    chunks = []
    for start, end in ((0, spans[0][0]), *spans):
        names = tuple(block.chain(alone, token_ids[start:end]))
        # What stands before the first chunk is the same alone: none of it is computed again.
        permille = recompute_permille if start else 0
        num_again = -(-len(names) * BLOCK_TOKENS * permille // 1000)
        chunks.append(Chunk(start, names, num_again))
    names = tuple(block.chain(block.root(fingerprint, salt), token_ids))
    return Blended(names, tuple(chunk for chunk in chunks if chunk.names))


def saved_by(
    view: FleetView, blended: Blended, state: WorkerState, *, hit_tokens: int, us_per_token: float
) -> Saved:
    """What the chunks save at a worker behind a hit of `hit_tokens` of the blended prompt."""
    held_tokens = fetched_tokens = tokens = 0
    for chunk in blended.chunks:
        num_tokens = len(chunk.names) * view.block_tokens
        num_hit = max(hit_tokens - chunk.start, 0)
        if num_hit >= num_tokens:
            continue
        runs = view.prefix.match(chunk.names, (state.name, *view.stores))
        held_end = max(runs.get(state.name, 0) * view.block_tokens, num_hit)
        held, fetched = held_end - num_hit, 0
        if 0 < state.store_us_per_token < us_per_token:
            at_stores = max((runs.get(store, 0) for store in view.stores), default=0)
            fetched = max(at_stores * view.block_tokens - held_end, 0)
        num_again = -(-chunk.num_again * (num_tokens - num_hit) // num_tokens)
        held_tokens += max(held - num_again, 0)
        fetched_tokens += fetched
        tokens += held + fetched - num_again
    return Saved(held_tokens, fetched_tokens, tokens, fetched_tokens * state.store_us_per_token)
