"""What a router can know of caches without hearing from the workers: what it sent where."""

from kvasir_router.core.prefix import PrefixView

from kvasir_sim.settings import SimSettings
from kvasir_sim.trace import BLOCK_TOKENS, TraceRequest


class PlacedPrefixes:
    """A prefix tree of the prompts that this replica has placed, with the workers they went to.

    As large as the workers' caches together; the names not used for longest go first. SGLang,
    llm-d and Preble each keep one.
    """

    def __init__(self, settings: SimSettings) -> None:
        blocks = settings.cache_tokens // BLOCK_TOKENS + 1
        self._prefixes = PrefixView(blocks_max=settings.workers * blocks)

    def leading(self, request: TraceRequest) -> dict[str, int]:
        """Workers that were sent the request's first block, and how many leading blocks."""
        return self._prefixes.leading(request.names)

    def num_blocks(self, worker: str) -> int:
        """Distinct blocks sent to a worker."""
        return self._prefixes.num_blocks.get(worker, 0)

    def place(self, worker: str, request: TraceRequest) -> None:
        """The request goes to `worker`."""
        self._prefixes.stored(worker, request.names)

    def keep_only(self, workers: tuple[str, ...]) -> None:
        """Forgets workers that have left."""
        for gone in set(self._prefixes.num_blocks) - set(workers):
            self._prefixes.forget(gone)
