"""Admission by time: a prompt that cannot be served within its SLO is handed back at once.

The worker alone knows its true load; the router re-forwards what it hands back. Pure but for
`check_in_time`, which reads the worker's load.
"""

from collections.abc import Sequence

from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine.worker.host import Host


def refusal_in_time(
    *,
    prefill_tokens_queued: int,
    prefill_us_per_token: float,
    num_tokens: int,
    ttft_slo_ms: int,
) -> KvasirError | None:
    """BUSY if the tokens ahead and these cannot be computed within the SLO.

    A worker with nothing ahead never refuses: nobody else would be faster.
    """
    if not ttft_slo_ms or not prefill_tokens_queued:
        return None
    expected_ms = (prefill_tokens_queued + num_tokens) * prefill_us_per_token / 1000
    if expected_ms <= ttft_slo_ms:
        return None
    return KvasirError(
        Reason.BUSY,
        f"{prefill_tokens_queued} prompt tokens are ahead: about {expected_ms:.0f} ms",
        retry_after_ms=int(expected_ms - ttft_slo_ms) + 1,
    )


def check_in_time(
    host: Host, token_ids: Sequence[int], *, tenant_salt: bytes, ttft_slo_ms: int
) -> None:
    """Checks that this worker can prefill these tokens in time.

    Raises:
        KvasirError: BUSY.
    """
    if not ttft_slo_ms:
        return
    load = host.served().engine.load()
    names = host.served().names(token_ids, tenant_salt=tenant_salt)
    refusal = refusal_in_time(
        prefill_tokens_queued=load.prefill_tokens_queued,
        prefill_us_per_token=load.prefill_us_per_token,
        num_tokens=len(token_ids) - BLOCK_TOKENS * host.hub.num_leading_held(names),
        ttft_slo_ms=ttft_slo_ms,
    )
    if refusal is not None:
        raise refusal
