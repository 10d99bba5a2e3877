"""What fetches from the KV tier took on this worker, and how the next one is to go."""

from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_kvstore.core.fetch import RETRY_EVERY, FetchPlan, PathRates, plan_fetch


class FetchRates:
    """The worker's path to the KV tier. Belongs to one event loop."""

    def __init__(self) -> None:
        self.path = PathRates()
        self.num_running = 0
        self._num_declined = 0

    @property
    def us_per_token(self) -> float:
        """What a fetched token costs; 0: not yet known."""
        return self.path.ms_per_block * 1000 / BLOCK_TOKENS

    def plan(self, *, num_blocks: int, compute_ms_per_block: float) -> FetchPlan | None:
        """How to fetch so many blocks; None: compute them."""
        is_retry = self._num_declined >= RETRY_EVERY - 1
        plan = plan_fetch(
            num_blocks=num_blocks,
            path=self.path,
            num_fetches=self.num_running,
            compute_ms_per_block=compute_ms_per_block,
            is_retry=is_retry,
        )
        if plan is None:
            self._num_declined += num_blocks > 0
        elif is_retry:
            self._num_declined = 0
        return plan

    def fetched(self, *, locate_ms: float, transfer_ms: float, num_arrived: float) -> None:
        """A fetch ended that had found blocks, or was stopped before it did."""
        self.path = self.path.after(
            latency_ms=locate_ms,
            transfer_ms=transfer_ms,
            num_arrived=num_arrived,
            num_fetches=self.num_running,
        )

    def probed(self, locate_ms: float, transfer_ms: float, num_arrived: int) -> None:
        """A probe of the path ended; whatever requests have shown meanwhile counts for more."""
        if self.path.wants_probe:
            self.path = self.path.after(
                latency_ms=locate_ms,
                transfer_ms=transfer_ms,
                num_arrived=num_arrived,
                num_fetches=self.num_running + 1,
            )
