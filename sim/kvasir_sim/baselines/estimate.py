"""What several published rules compute alike: hits, the estimate of TTFT, and a prefix key."""

from collections.abc import Mapping

from kvasir_sim.policy import RoutingPolicy
from kvasir_sim.trace import BLOCK_TOKENS, TraceRequest
from kvasir_sim.worker import Job

KEY_BLOCKS = 2
"""A key is the prompt's first 1,024 tokens (DualMap, appendix A.2): shorter ones collapse, as real
traces have only a few distinct first blocks."""


def prefix_key(request: TraceRequest, blocks: int = KEY_BLOCKS) -> bytes:
    """The name of the prefix that a request is placed by."""
    return request.names[min(blocks, len(request.names)) - 1]


def hit_tokens(request: TraceRequest, run: int) -> int:
    """Prompt tokens in so many leading blocks."""
    return min(run * BLOCK_TOKENS, request.input_tokens)


def ttft_ms(
    policy: RoutingPolicy, job: Job, worker: str, runs: Mapping[str, int], now_ms: float
) -> float:
    """What waits at `worker`, what the request must compute there, and what it reuses."""
    hit = hit_tokens(job.request, runs.get(worker, 0))
    computed = policy.view.pending_tokens(worker, now_ms) + job.request.input_tokens - hit
    us = computed * policy.view.us_per_token(worker) + hit * policy.settings.reuse_us_per_token
    return us / 1_000
