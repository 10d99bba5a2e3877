"""Second thoughts: where a request goes that a worker handed back, and which waiting ones move.

A prefill worker that cannot serve a request in time hands it back (P/D-Serve). It goes to its other
candidate, and if that hands it back too, to the next worker on the rings: what comes back is costly
to compute and little of it is cached, so it loses little away from its pair. Whether a target makes
it is the target's to judge, as its queue alone knows what is due before; here only what cannot be
in time on an idle worker is refused.

A worker is hot when what waits there takes longer than the SLO, or a request has waited there for
`HOT_WAIT_MS`. Requests that wait at a hot worker move to their other candidate, those that gain
most first, while the source stays busy, the move gains and the target makes the SLO
(DualMap, hotspot-aware rebalancing).

Invariants: a rebalanced request stays within its pair; every such move shortens the request's own
wait as estimated with all earlier moves counted; a pass looks at a bounded number of requests.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from kvasir_router.core.choose import (
    Rejected,
    RejectReason,
    Route,
    excluding,
    pick,
    prefill_pair,
)
from kvasir_router.core.estimate import estimate
from kvasir_router.core.fleet import FleetView, Request

MOVES_MAX = 2
"""Times that a request may be handed back; then its worker refuses it."""

HOT_WAIT_MS = 3_000
"""A request that has waited this long makes its worker hot."""

LOOKED_AT_MAX = 64
"""Waiting requests considered in one pass, at some thirty microseconds each."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A request that was routed and has no first token yet."""

    request: Request
    worker: str
    sent_ms: int


@dataclass(frozen=True, slots=True)
class Move:
    """A request should wait at `target` instead of `source`."""

    request_id: str
    source: str
    target: str
    gain_ms: float


def hand_back(
    view: FleetView, request: Request, *, refused_by: str, now_ms: int
) -> Route | Rejected:
    """What becomes of a request that `refused_by` could not serve in time."""
    decision = pick(view, excluding(request, refused_by), now_ms=now_ms)
    if isinstance(decision, Rejected):
        return decision
    late_ms = decision.ttft_estimate_ms + request.waited_ms - request.ttft_slo_ms
    if late_ms <= view.wait_ms(decision.computes):
        return decision
    message = "no other worker can serve the request in time"
    return Rejected(RejectReason.NO_TIME, message, max(int(late_ms), 1))


def rebalance(view: FleetView, queued: Iterable[Queued], *, now_ms: int) -> list[Move]:
    """Moves of waiting requests from hot workers to their other candidates, best first."""
    by_worker: dict[str, list[Queued]] = {}
    for item in islice(queued, LOOKED_AT_MAX):
        if item.worker in view.workers:
            by_worker.setdefault(item.worker, []).append(item)
    waits = _Waits(view)
    hot = {name for name, items in by_worker.items() if waits.is_hot(name, items, now_ms)}
    options = [
        option
        for name in hot
        for item in by_worker[name]
        if (option := _option(view, item, hot, now_ms)) is not None
    ]
    options.sort(key=lambda option: (-waits.gain_ms(option), option.item.request.request_id))
    return [move for option in options if (move := waits.take(option)) is not None]


@dataclass(frozen=True, slots=True)
class _Option:
    """What a move would mean: compute time at both ends, without the wait."""

    item: Queued
    target: str
    source_compute_ms: float
    target_compute_ms: float
    left_ms: float
    """Until the request's SLO."""


def _option(view: FleetView, item: Queued, hot: set[str], now_ms: int) -> _Option | None:
    request = excluding(item.request, item.worker)
    target = next(iter(prefill_pair(view, request, now_ms=now_ms)), None)
    if target is None or target in hot:
        return None
    runs = view.prefix.match(request.kv_names, (item.worker, target, *view.stores))
    waited_ms = item.request.waited_ms + now_ms - item.sent_ms
    return _Option(
        item,
        target,
        estimate(view, request, item.worker, runs).ttft_estimate_ms - view.wait_ms(item.worker),
        estimate(view, request, target, runs).ttft_estimate_ms - view.wait_ms(target),
        request.ttft_slo_ms - waited_ms,
    )


class _Waits:
    """Estimated waits, kept true while moves are taken."""

    def __init__(self, view: FleetView) -> None:
        self._view = view
        self._wait_ms: dict[str, float] = {}

    def of(self, worker: str) -> float:
        """Milliseconds of work that waits at a worker."""
        known = self._wait_ms.get(worker)
        return self._view.wait_ms(worker) if known is None else known

    def is_hot(self, worker: str, items: Sequence[Queued], now_ms: int) -> bool:
        """Whether requests should leave a worker."""
        slo_ms = min(item.request.ttft_slo_ms for item in items)
        oldest_ms = min(item.sent_ms for item in items)
        return self.of(worker) > slo_ms or now_ms - oldest_ms >= HOT_WAIT_MS

    def gain_ms(self, option: _Option) -> float:
        """How much earlier the first token comes at the target; behind all that waits there."""
        at_source = max(self.of(option.item.worker), option.source_compute_ms)
        return at_source - self.of(option.target) - option.target_compute_ms

    def take(self, option: _Option) -> Move | None:
        """The move, if it still gains and makes the SLO with all moves before it."""
        source, target, gain_ms = option.item.worker, option.target, self.gain_ms(option)
        arrives_ms = self.of(target) + option.target_compute_ms
        is_calm = self.of(source) <= option.item.request.ttft_slo_ms / 2
        if is_calm or gain_ms <= 0 or arrives_ms > option.left_ms:
            return None
        self._wait_ms[source] = max(self.of(source) - option.source_compute_ms, 0.0)
        self._wait_ms[target] = arrives_ms
        return Move(option.item.request.request_id, source, target, gain_ms)
