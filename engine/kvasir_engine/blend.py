"""KV of a prompt put together from KV of its parts: moved, and recomputed where it is most off.

A part's KV was computed elsewhere, or alone. Moved to its place in this prompt it is an
approximation: its tokens have not seen what now stands before them. Of each part some tokens are
therefore computed again: half of them its first ones, which without a context became sinks of
attention (EPIC, arXiv 2410.15332), half those whose K and V deviate most in the second layer from
what this prompt makes of them (CacheBlend, arXiv 2405.16444). To know the deviation, the first
layer of all tokens is computed.

Decides which tokens those are. Invariant: what is between the parts is computed, everything in
order of position, so a computed token sees all computed ones before it. Blocks and their names,
and when this runs, are left to others.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from kvasir_kvstore.core.block import BLOCK_TOKENS
from numpy.typing import NDArray

from kvasir_engine.decoder import ModelConfig

PROBED_LAYER = 1
"""Its K and V are the first that depend on the context."""


class BlendModel(Protocol):
    """`kvasir_engine._native.Model`, as far as blending needs it."""

    def forward(
        self,
        *,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        seq_token_counts: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        output_rows: NDArray[np.int32],
        logits: NDArray[np.float32],
        completes: NDArray[np.int32],
        arrived: NDArray[np.int32],
        num_layers: int | None = None,
    ) -> None:
        """Computes tokens, or their first layers."""

    def move_kv(
        self,
        *,
        source_blocks: NDArray[np.int32],
        source_first: int,
        target_blocks: NDArray[np.int32],
        target_first: int,
        count: int,
    ) -> None:
        """KV of `count` tokens to other positions in other blocks."""

    def read_kv(
        self, *, layer: int, blocks: NDArray[np.int32], first: int, out: NDArray[np.float32]
    ) -> None:
        """K and V of consecutive tokens."""


@dataclass(frozen=True, slots=True)
class Part:
    """KV that is here: of `count` tokens that stand at `first` in the prompt."""

    first: int
    count: int
    source_blocks: tuple[int, ...]
    source_first: int
    is_exact: bool
    """It was computed after the same tokens: as good as computed here."""

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.first + self.count


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """The KV of a prompt's positions [start, end), to be put together."""

    token_ids: NDArray[np.int32]
    """Of positions [0, end)."""
    blocks: NDArray[np.int32]
    """Of the same positions; those before `start` are whole, and are only read."""
    start: int
    parts: tuple[Part, ...]
    """In order of position, disjoint, within [start, end)."""
    recompute_permille: int
    """Of a part's tokens."""

    @property
    def end(self) -> int:
        """A multiple of BLOCK_TOKENS, as `start` is."""
        return len(self.token_ids)

    @property
    def approximate(self) -> tuple[Part, ...]:
        """Parts of which tokens are computed again."""
        return tuple(part for part in self.parts if not part.is_exact)

    def num_recomputed(self, part: Part) -> int:
        """How many tokens of a part are computed again."""
        return 0 if part.is_exact else math.ceil(part.count * self.recompute_permille / 1000)

    @property
    def tokens_reused(self) -> int:
        """Tokens whose KV stays what it was elsewhere."""
        return sum(part.count - self.num_recomputed(part) for part in self.parts)


def run_blend(
    model: BlendModel, config: ModelConfig, blend: Blend, *, tokens_max: int
) -> Iterator[None]:
    """Puts the KV together, at most `tokens_max` tokens at a time; other work may come between.

    When it is exhausted, the blocks from `start` on are whole.
    """
    # 1. What is here, to its place.
    for part in blend.parts:
        model.move_kv(
            source_blocks=np.array(part.source_blocks, np.int32),
            source_first=part.source_first,
            target_blocks=blend.blocks,
            target_first=part.first,
            count=part.count,
        )
        yield
    # 2. How far it is off.
    deviations = yield from _deviations(model, config, blend, tokens_max=tokens_max)
    # 3. What is missing or most off, computed.
    positions = _chosen(blend, deviations)
    for start in range(0, len(positions), tokens_max):
        chosen = positions[start : start + tokens_max]
        is_last = start + tokens_max >= len(positions)
        completes = blend.blocks[blend.start // BLOCK_TOKENS :] if is_last else _NO_BLOCKS
        _compute(model, config, blend, chosen, completes=completes)
        yield


_NO_BLOCKS = np.empty(0, np.int32)
Deviations = dict[Part, NDArray[np.float32]]
"""Per token of each approximate part, by any measure."""


def _deviations(
    model: BlendModel, config: ModelConfig, blend: Blend, *, tokens_max: int
) -> Generator[None, None, Deviations]:
    if not blend.approximate or config.num_layers <= PROBED_LAYER:
        return {part: np.zeros(part.count, np.float32) for part in blend.approximate}
    moved = {part: _read(model, config, blend, part) for part in blend.approximate}
    first = min([blend.approximate[0].first, *_missing(blend)[:1].tolist()])
    for start in range(first, blend.end, tokens_max):
        positions = np.arange(start, min(start + tokens_max, blend.end), dtype=np.int32)
        _compute(model, config, blend, positions, completes=_NO_BLOCKS, num_layers=PROBED_LAYER)
        yield
    return {
        part: _distance(before, _read(model, config, blend, part)) for part, before in moved.items()
    }


def _read(model: BlendModel, config: ModelConfig, blend: Blend, part: Part) -> NDArray[np.float32]:
    """[count, K|V, elements of all heads]."""
    kv_width = config.num_kv_heads * config.head_width
    out = np.empty((part.count, 2 * kv_width), np.float32)
    model.read_kv(layer=PROBED_LAYER, blocks=blend.blocks, first=part.first, out=out)
    return out.reshape(part.count, 2, kv_width)


def _distance(before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared distances of K and V, each in parts of its mean square: V is far smaller than K."""
    squares = np.square(after).mean(axis=(0, 2)) + np.finfo(np.float32).tiny
    distances = np.square(after - before).mean(axis=2) / squares
    return np.asarray(distances.sum(axis=1), np.float32)


def _missing(blend: Blend) -> NDArray[np.int32]:
    """Positions of which no KV is here."""
    is_missing = np.ones(blend.end, np.bool_)
    is_missing[: blend.start] = False
    for part in blend.parts:
        is_missing[part.first : part.end] = False
    return np.flatnonzero(is_missing).astype(np.int32)


def _chosen(blend: Blend, deviations: Deviations) -> NDArray[np.int32]:
    """Positions to compute, in order; at least one, whose step makes the blocks whole."""
    positions = [_missing(blend)]
    for part, deviation in deviations.items():
        num_recomputed = blend.num_recomputed(part)
        num_first = (num_recomputed + 1) // 2
        by_deviation = num_first + np.argsort(-deviation[num_first:], kind="stable")
        rest = by_deviation[: num_recomputed - num_first]
        positions.append(part.first + np.concatenate([np.arange(num_first), rest]))
    chosen = np.unique(np.concatenate(positions)).astype(np.int32)
    return chosen if len(chosen) else np.array([blend.end - 1], np.int32)


def _compute(
    model: BlendModel,
    config: ModelConfig,
    blend: Blend,
    positions: NDArray[np.int32],
    *,
    completes: NDArray[np.int32],
    num_layers: int | None = None,
) -> None:
    """Computes these tokens in place: runs of consecutive ones, over one block table.

    Every layer writes the K and V of all of them before any attends, so they see each other.
    """
    starts = np.flatnonzero(np.diff(positions, prepend=positions[0] - 2) != 1)
    counts = np.diff(starts, append=len(positions)).astype(np.int32)
    model.forward(
        token_ids=blend.token_ids[positions],
        positions=positions,
        seq_token_counts=counts,
        block_tables=np.tile(blend.blocks, (len(counts), 1)),
        output_rows=np.empty(0, np.int32),
        logits=np.empty((0, config.vocab_size), np.float32),
        completes=completes,
        arrived=np.empty(0, np.int32),
        num_layers=num_layers,
    )
