"""Fetch or recompute: the choice, from rates measured on this worker. Pure."""

from dataclasses import dataclass

from kvasir_kvstore.core.block import BLOCK_TOKENS

_WEIGHT = 0.3
"""Of the newest measurement in the running mean."""
FETCH_LATENCY_MS = 2.0
"""Of asking where blocks are and opening the transfer."""
RETRY_EVERY = 32
"""A fetch that is not worth it by old measurements is tried again this often."""


@dataclass(slots=True)
class FetchRates:
    """What a fetched block costs, and the choice that follows."""

    ms_per_block: float = 0.0
    """Running mean; 0: not yet known, so a fetch is tried."""
    num_declined: int = 0

    @property
    def us_per_token(self) -> float:
        """What a fetched token costs; 0: not yet known."""
        return self.ms_per_block * 1000 / BLOCK_TOKENS

    def fetched(self, *, num_blocks: int, elapsed_ms: float) -> None:
        """A fetch ended; one that brought nothing says nothing about the rate."""
        if num_blocks == 0:
            return
        ms_per_block = elapsed_ms / num_blocks
        known = self.ms_per_block
        self.ms_per_block = known + _WEIGHT * (ms_per_block - known) if known else ms_per_block

    def timeout_ms(
        self, *, num_blocks: int, compute_ms_per_block: float, timeout_ms_max: int
    ) -> int:
        """How long to try to fetch `num_blocks`; 0: compute them.

        `compute_ms_per_block` of 0 means that it is not yet known: fetching is then tried. The
        time is bounded by twice what computing would take, so a wrong guess costs at most that.
        """
        if num_blocks == 0:
            return 0
        if not compute_ms_per_block:
            return timeout_ms_max
        compute_ms = num_blocks * compute_ms_per_block
        fetch_ms = FETCH_LATENCY_MS + num_blocks * self.ms_per_block
        if fetch_ms >= compute_ms:
            self.num_declined += 1
            if self.num_declined % RETRY_EVERY:
                return 0
        return min(timeout_ms_max, int(2 * compute_ms) + 50)
