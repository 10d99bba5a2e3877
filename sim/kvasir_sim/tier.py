"""The KV nodes, as one shared LRU cache that every worker offers its blocks to and fetches from."""

from collections import OrderedDict
from collections.abc import Sequence

from kvasir_sim.trace import BLOCK_TOKENS, TraceRequest


class KvTier:
    """Blocks held outside the workers, and what a fetched token costs."""

    def __init__(self, capacity_tokens: int, *, us_per_token: float) -> None:
        self.us_per_token = us_per_token
        self._blocks_max = capacity_tokens // BLOCK_TOKENS
        self._held: OrderedDict[bytes, None] = OrderedDict()

    def offer(self, names: Sequence[bytes]) -> None:
        """A worker has computed or used these blocks; the first is the most recent."""
        for name in reversed(names):
            self._held[name] = None
            self._held.move_to_end(name)
        while len(self._held) > self._blocks_max:
            self._held.popitem(last=False)

    def hit_tokens(self, request: TraceRequest, *, beyond: int) -> int:
        """Prompt tokens after the first `beyond` that can be fetched in one run."""
        run = beyond // BLOCK_TOKENS
        first = run
        for name in request.names[first:]:
            if name not in self._held:
                break
            run += 1
        return max(min(run * BLOCK_TOKENS, request.input_tokens) - max(beyond, 0), 0)
