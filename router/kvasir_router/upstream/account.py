"""What a request on its way means for the estimates of load, whoever carries it."""

import contextlib
from collections.abc import Iterator

from kvasir_router.core.choose import Route
from kvasir_router.core.fleet import Request
from kvasir_router.membership.fleet import Fleet, now_ms


@contextlib.contextmanager
def accounted(fleet: Fleet, request: Request, route: Route) -> Iterator[None]:
    """While it lasts, the request counts as load of its workers."""
    ledger, tokens = fleet.ledger, request.num_tokens - route.hit_tokens
    fleet.routed(request, route.computes)
    ledger.sent(route.computes, request_id=request.request_id, tokens=tokens, now_ms=now_ms())
    ledger.opened(route.decode)
    try:
        yield
    finally:
        ledger.closed(route.decode)
        ledger.prefilled(route.computes, request_id=request.request_id)


def first_token(fleet: Fleet, route: Route, request_id: str, *, took_ms: float | None) -> None:
    """The prompt is computed, `took_ms` after it was sent: estimates learn from it.

    None: they have nothing to learn from it, for they do not know what blending takes.
    """
    if took_ms is not None:
        fleet.view().calibration.observe(
            route.computes, uncalibrated_ms=route.uncalibrated_ms, actual_ms=took_ms
        )
    fleet.ledger.prefilled(route.computes, request_id=request_id)
