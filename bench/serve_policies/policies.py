"""Published rules for the choice of a prefill worker, over the router's own view of the fleet.

Each takes what the production policy takes: what workers report, what they hold and what this
router has sent since. Sources are those of `kvasir_sim.baselines`, where they run simulated.
"""

import itertools
from collections.abc import Callable, Sequence

from kvasir_router.core.choose import Route, RouteReason, choose_by_slo
from kvasir_router.core.estimate import Candidate, estimate
from kvasir_router.core.fleet import FleetView, Request
from kvasir_router.upstream.dispatch import Choose, pick_now


def round_robin() -> Choose:
    """One after another."""
    turns = itertools.count()
    return lambda view, request, now_ms: _to(
        view, request, [view.rings.members[next(turns) % len(view.rings.members)]]
    )


def least_loaded() -> Choose:
    """Fewest prompt tokens that wait."""
    return lambda view, request, now_ms: _to(
        view, request, [min(view.rings.members, key=lambda w: (view.queued_tokens(w), w))]
    )


def affinity() -> Choose:
    """One hash of the prefix."""
    return lambda view, request, now_ms: _to(
        view, request, [view.rings.candidates(request.key(view.keys))[0]]
    )


def min_ttft() -> Choose:
    """The smallest estimate over all workers."""

    def choose(view: FleetView, request: Request, now_ms: int) -> Route:
        candidates = _estimates(view, request, view.rings.members)
        best = min(candidates, key=lambda c: (c.ttft_estimate_ms, c.worker))
        return _route(view, best)

    return choose


def dualmap() -> Choose:
    """The better of the key's pair, by hit and SLO; without queues at the router."""
    return lambda view, request, now_ms: _to(
        view, request, view.rings.candidates(request.key(view.keys))
    )


POLICIES: dict[str, Callable[[], Choose]] = {
    "kvasir": lambda: pick_now,
    "dualmap": dualmap,
    "min-ttft": min_ttft,
    "affinity": affinity,
    "least-loaded": least_loaded,
    "round-robin": round_robin,
}


def _estimates(view: FleetView, request: Request, workers: Sequence[str]) -> list[Candidate]:
    runs = view.prefix.match(request.names, tuple(workers))
    return [estimate(view, request, worker, runs) for worker in workers]


def _to(view: FleetView, request: Request, workers: Sequence[str]) -> Route:
    candidates = _estimates(view, request, workers)
    return _route(view, candidates[choose_by_slo(candidates, request)[0]])


def _route(view: FleetView, taken: Candidate) -> Route:
    decode = min(
        (w for w in view.workers.values() if w.can_decode),
        key=lambda w: (view.running(w.name), w.name),
    )
    return Route(
        prefill=taken.worker,
        decode=decode.name,
        reason=RouteReason.SMALLER_ESTIMATE,
        ttft_estimate_ms=taken.ttft_estimate_ms,
        hit_tokens=taken.hit_tokens,
        uncalibrated_ms=taken.uncalibrated_ms,
    )
