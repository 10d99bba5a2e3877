"""The KV nodes, as one shared LRU cache that every worker offers its blocks to and fetches from.

Whether a run of blocks is fetched or computed is decided by the workers' own core
(kvasir_kvstore/core/fetch.py). The path is what it is measured to be; fetches share it, and each is
taken to share it to its end with those that ran when it began.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kvasir_kvstore.core.fetch import PathRates, plan_fetch

from kvasir_sim.trace import BLOCK_TOKENS, TraceRequest


@dataclass(frozen=True, slots=True)
class Fetch:
    """What the tier does for a prompt: tokens that it brings, or that it holds in vain."""

    tokens: int = 0
    ms: float = 0.0
    declined_tokens: int = 0


NO_FETCH = Fetch()


class KvTier:
    """Blocks held outside the workers, and the path to them."""

    def __init__(self, capacity_tokens: int, *, us_per_token: float, latency_ms: float) -> None:
        self._path = PathRates(latency_ms, us_per_token * BLOCK_TOKENS / 1_000)
        self._blocks_max = capacity_tokens // BLOCK_TOKENS
        self._held: OrderedDict[bytes, None] = OrderedDict()
        self._ends_ms: list[float] = []

    def offer(self, names: Sequence[bytes]) -> None:
        """A worker has computed or used these blocks; the first is the most recent."""
        for name in reversed(names):
            self._held[name] = None
            self._held.move_to_end(name)
        while len(self._held) > self._blocks_max:
            self._held.popitem(last=False)

    def plan(self, request: TraceRequest, *, beyond: int, compute_us_per_token: float) -> Fetch:
        """What fetching does for a prompt of which the first `beyond` tokens are held."""
        tokens = self._hit_tokens(request, beyond=beyond)
        num_blocks = -(-tokens // BLOCK_TOKENS)
        plan = plan_fetch(
            num_blocks=num_blocks,
            path=self._path,
            num_fetches=len(self._ends_ms),
            compute_ms_per_block=compute_us_per_token * BLOCK_TOKENS / 1_000,
        )
        if plan is None:
            return Fetch(declined_tokens=tokens)
        share = len(self._ends_ms) + 1
        return Fetch(tokens, self._path.latency_ms + num_blocks * self._path.ms_per_block * share)

    def begin(self, fetch: Fetch, now_ms: float) -> None:
        """A fetch that was planned begins."""
        if fetch.tokens:
            heapq.heappush(self._ends_ms, now_ms + fetch.ms)

    def advance(self, now_ms: float) -> None:
        """Fetches that have ended leave the path."""
        while self._ends_ms and self._ends_ms[0] <= now_ms:
            heapq.heappop(self._ends_ms)

    def _hit_tokens(self, request: TraceRequest, *, beyond: int) -> int:
        """Prompt tokens after the first `beyond` that are held in one run."""
        run = beyond // BLOCK_TOKENS
        for name in request.names[run:]:
            if name not in self._held:
                break
            run += 1
        return max(min(run * BLOCK_TOKENS, request.input_tokens) - max(beyond, 0), 0)
