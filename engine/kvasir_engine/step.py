"""Runs one step: a plan of slices becomes arrays, logits, tokens.

Decides nothing: what is computed is the scheduler's choice, how tokens are drawn each request's.
Invariant: arrays are in the order of the step's slices, tokens in the order of its sampled ones.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvasir_engine.core.decisions import Slice, Step


class ForwardModel(Protocol):
    """`kvasir_engine._native.Model`, as far as a step needs it."""

    def attach_pool(
        self, data: NDArray[np.uint8], ready: NDArray[np.uint32], progress: NDArray[np.uint32]
    ) -> None:
        """KV goes into this memory from now on."""

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
    ) -> None:
        """Computes a mixed batch."""

    def sample(
        self,
        *,
        logits: NDArray[np.float32],
        temperature: NDArray[np.float32],
        top_k: NDArray[np.int32],
        top_p: NDArray[np.float32],
        seed: NDArray[np.uint64],
        position: NDArray[np.int64],
    ) -> NDArray[np.int32]:
        """Draws a token for each row of logits."""


class StepRunner:
    """The model, and a buffer for its logits."""

    def __init__(self, model: ForwardModel, *, vocab_size: int, num_sampled_max: int) -> None:
        self._model = model
        self._logits = np.empty((num_sampled_max, vocab_size), dtype=np.float32)

    def run(self, step: Step) -> list[int]:
        """Computes the step; the tokens drawn after its sampled slices."""
        slices = step.slices
        counts = np.fromiter((len(part.token_ids) for part in slices), np.int32, len(slices))
        sampled = np.fromiter((part.sampling is not None for part in slices), np.bool_, len(slices))
        logits = self._logits[: int(sampled.sum())]
        self._model.forward(
            token_ids=np.concatenate([part.token_ids for part in slices]),
            positions=np.concatenate([_positions(part) for part in slices]),
            seq_token_counts=counts,
            block_tables=_block_tables(slices),
            output_rows=(np.cumsum(counts, dtype=np.int32) - 1)[sampled],
            logits=logits,
            completes=_completes(slices),
            arrived=np.array(step.arrived, dtype=np.int32),
        )
        return self._draw(step.sampled, logits) if len(logits) else []

    def _draw(self, slices: tuple[Slice, ...], logits: NDArray[np.float32]) -> list[int]:
        """Each token is drawn by its request's sampling at its absolute position."""
        choices = [part.sampling for part in slices if part.sampling is not None]
        drawn: list[int] = self._model.sample(
            logits=logits,
            temperature=np.array([choice.temperature for choice in choices], dtype=np.float32),
            top_k=np.array([choice.top_k for choice in choices], dtype=np.int32),
            top_p=np.array([choice.top_p for choice in choices], dtype=np.float32),
            seed=np.array([choice.seed for choice in choices], dtype=np.uint64),
            position=np.array([part.end for part in slices], dtype=np.int64),
        ).tolist()
        return drawn


def _positions(part: Slice) -> NDArray[np.int32]:
    return np.arange(part.start, part.end, dtype=np.int32)


def _block_tables(slices: tuple[Slice, ...]) -> NDArray[np.int32]:
    """[num_slices, longest]; what lies behind a shorter table is not read."""
    width = max(len(part.block_table) for part in slices)
    tables = np.zeros((len(slices), width), dtype=np.int32)
    for row, part in zip(tables, slices, strict=True):
        row[: len(part.block_table)] = part.block_table
    return tables


def _completes(slices: tuple[Slice, ...]) -> NDArray[np.int32]:
    return np.array([block for part in slices for block in part.completes], dtype=np.int32)
