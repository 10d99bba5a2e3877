"""What to do after a worker failed a request: try another, or tell the client. Pure.

Invariants: at most `attempts_max` attempts; a request whose output has begun is never ended by a
refusal alone; before that it is re-forwarded `MOVES_MAX` times at most (P/D-Serve).
"""

from dataclasses import dataclass, replace

from kvasir_proto.errors import PEER_PARAM, KvasirError, Reason

from kvasir_router.core.choose import Route
from kvasir_router.core.rebalance import MOVES_MAX

CLIENTS_FAULT = frozenset(
    {
        Reason.INVALID_REQUEST,
        Reason.UNSUPPORTED,
        Reason.UNAUTHENTICATED,
        Reason.UNKNOWN_MODEL,
        Reason.CONTEXT_LENGTH,
        Reason.TOO_LARGE,
    }
)
REFUSALS = frozenset({Reason.BUSY, Reason.OVERLOADED})
PEERS_FAULT = frozenset({Reason.KV_TRANSFER, Reason.STALE_PEER})
RETRY_AFTER_MS = 1_000


@dataclass(frozen=True, slots=True)
class Attempts:
    """What has been tried for one request."""

    attempts_max: int
    num_failed: int = 0
    num_refused: int = 0
    exclude: frozenset[str] = frozenset()
    refused_by: str | None = None
    """The worker that handed it back, if that is why another is tried."""


def after_failure(
    tried: Attempts, failure: KvasirError, route: Route, *, has_output: bool
) -> Attempts | KvasirError:
    """The state for the next attempt, or what to tell the client."""
    if failure.reason in CLIENTS_FAULT:
        return failure
    refused = failure.reason in REFUSALS
    blamed = culprit(failure, route)
    tried = replace(
        tried,
        num_failed=tried.num_failed + 1,
        num_refused=tried.num_refused + refused,
        exclude=tried.exclude | {blamed},
        refused_by=blamed if refused and not has_output else None,
    )
    if tried.num_failed >= tried.attempts_max:
        return last_word(failure)
    if tried.num_refused > MOVES_MAX and not has_output:
        return last_word(failure)
    return tried


def culprit(failure: KvasirError, route: Route) -> str:
    """The worker to leave out from now on."""
    if route.prefill is None:
        return route.decode
    is_peers = failure.param == PEER_PARAM or failure.reason in PEERS_FAULT
    return route.prefill if is_peers else route.decode


def last_word(failure: KvasirError) -> KvasirError:
    """The failure as the client should see it: `param` names a worker's field, not the client's."""
    if failure.reason in REFUSALS:
        retry_after_ms = failure.retry_after_ms or RETRY_AFTER_MS
        message = "all candidates are busy; try again later"
        return KvasirError(Reason.OVERLOADED, message, retry_after_ms=retry_after_ms)
    return KvasirError(failure.reason, failure.message, retry_after_ms=failure.retry_after_ms)
