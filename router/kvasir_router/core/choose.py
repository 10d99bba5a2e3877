"""The whole decision: a view of the fleet and a request in, a route or a refusal out.

    1. two prefill candidates from the rings; a new worker takes its keys over bit by bit
    2. one walk over the prompt's blocks: who holds how much of it
    3. the decode worker, by cache, memory, pace and load                   (decode.py)
    4. a short uncached suffix stays there: nothing moves
    5. an estimate of TTFT for each candidate                               (estimate.py)
    6. the one with the longer prefix hit, unless it is too slow for the SLO (DualMap)
    7. decode where the prompt is prefilled if that worker can

Invariants: deterministic; a route names workers of the view, outside `request.exclude`; the time
taken does not depend on how many workers there are or how much is queued. Waiting and ordering are
left to the prefill worker's queue, which alone knows its load.
"""

import enum
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvasir_router.core.decode import can_also_decode, choose_decode, fits_anywhere
from kvasir_router.core.estimate import Candidate, estimate
from kvasir_router.core.fleet import FleetView, Request


class RouteReason(enum.StrEnum):
    """Why this prefill worker."""

    LONGER_HIT = "longer_hit"  # of two candidates, and fast enough
    SMALLER_ESTIMATE = "smaller_estimate"  # the longer hit would be too late
    LESS_LOADED = "less_loaded"  # equal hits
    ONLY_CANDIDATE = "only_candidate"
    SHORT_SUFFIX = "short_suffix"  # prefilled where it is decoded: almost all is cached there
    NO_PREFILL_WORKER = "no_prefill_worker"  # prefilled where it is decoded, for want of another
    TRANSFER_UNHEALTHY = "transfer_unhealthy"  # likewise: KV cannot reach the decode worker


class RejectReason(enum.StrEnum):
    """Why a request has no route."""

    NO_DECODE_WORKER = "no_decode_worker"
    NO_MEMORY = "no_memory"  # the prompt is larger than any worker's KV memory
    NO_TIME = "no_time"  # no candidate reaches a first token before the request's deadline


@dataclass(frozen=True, slots=True)
class Route:
    """Who serves a request. `prefill` is None when the decode worker prefills by itself."""

    prefill: str | None
    decode: str
    reason: RouteReason
    ttft_estimate_ms: float
    hit_tokens: int
    candidates: tuple[Candidate, ...] = ()
    uncalibrated_ms: float = 0.0
    """The estimate before experience corrected it: what `Calibration.observe` wants back."""

    @property
    def computes(self) -> str:
        """The worker that computes the prompt."""
        return self.prefill or self.decode


@dataclass(frozen=True, slots=True)
class Rejected:
    """Nobody can serve a request now. `retry_after_ms` of 0: later is no better."""

    reason: RejectReason
    message: str
    retry_after_ms: int = 0


def pick(view: FleetView, request: Request, *, now_ms: int) -> Route | Rejected:
    """Routes one request. `now_ms` is the caller's clock."""
    pair = prefill_pair(view, request, now_ms=now_ms)
    runs = view.prefix.match(request.kv_names, (*pair, *view.stores))
    decode = choose_decode(view, request, runs)
    if decode is None:
        return Rejected(RejectReason.NO_DECODE_WORKER, "no decode worker is ready", 1_000)
    if not fits_anywhere(view, request):
        return Rejected(RejectReason.NO_MEMORY, "the prompt exceeds every worker's KV memory")
    if is_short_suffix(view, request, decode, runs):
        return _local(estimate(view, request, decode, runs), RouteReason.SHORT_SUFFIX)
    healthy = view.workers[decode].transfer_healthy
    if not pair or not healthy:
        why = RouteReason.NO_PREFILL_WORKER if healthy else RouteReason.TRANSFER_UNHEALTHY
        return _in_time(request, _local(estimate(view, request, decode, runs), why))
    candidates = tuple([estimate(view, request, name, runs) for name in pair])
    return _in_time(request, _route(view, request, decode, candidates))


def is_short_suffix(
    view: FleetView, request: Request, decode: str, runs: Mapping[str, int]
) -> bool:
    """Whether so much is cached at the decode worker that a hand-off is not worth it."""
    hit = runs.get(decode, 0) * view.block_tokens
    return hit > 0 and request.num_tokens - hit <= view.policy.local_prefill_tokens_max


def choose_by_slo(candidates: Sequence[Candidate], request: Request) -> tuple[int, RouteReason]:
    """Index of the candidate to take, and why (DualMap, SLO-aware request routing)."""
    if len(candidates) == 1:
        return 0, RouteReason.ONLY_CANDIDATE
    one, two = candidates
    faster = 0 if _is_faster(one, two, request) else 1
    if one.hit_tokens == two.hit_tokens:
        return faster, RouteReason.LESS_LOADED
    longer = 0 if one.hit_tokens > two.hit_tokens else 1
    if candidates[longer].ttft_estimate_ms + request.waited_ms <= request.ttft_slo_ms / 2:
        return longer, RouteReason.LONGER_HIT
    return faster, RouteReason.SMALLER_ESTIMATE


def _is_faster(one: Candidate, two: Candidate, request: Request) -> bool:
    """By the estimates; ties fall by the request, so that equal workers share equally."""
    if one.ttft_estimate_ms != two.ttft_estimate_ms:
        return one.ttft_estimate_ms < two.ttft_estimate_ms
    return _coin(one.worker, request) <= _coin(two.worker, request)


def _coin(worker: str, request: Request) -> int:
    return zlib.crc32(f"{worker}\0{request.request_id}".encode())


def _route(
    view: FleetView, request: Request, decode: str, candidates: tuple[Candidate, ...]
) -> Route:
    index, reason = choose_by_slo(candidates, request)
    taken = candidates[index]
    same = taken.worker == decode or can_also_decode(view, request, taken.worker)
    return Route(
        prefill=None if same else taken.worker,
        decode=taken.worker if same else decode,
        reason=reason,
        ttft_estimate_ms=taken.ttft_estimate_ms,
        hit_tokens=taken.hit_tokens,
        candidates=candidates,
        uncalibrated_ms=taken.uncalibrated_ms,
    )


def prefill_pair(view: FleetView, request: Request, *, now_ms: int) -> tuple[str, ...]:
    """The workers of the request's key; when one refused or cannot send KV, the other alone."""
    key = request.key(view.keys)
    pair = view.rings.candidates(key)
    if view.is_any_warming(now_ms):
        pair = _shielded(view, key, pair, now_ms)
    if not request.exclude and not view.mute:
        return pair
    avoid = request.exclude | view.mute
    return tuple(name for name in pair if name not in avoid) or view.rings.candidates(key, avoid)


def _shielded(view: FleetView, key: bytes, pair: tuple[str, ...], now_ms: int) -> tuple[str, ...]:
    """The pair of a key, without new workers whose turn for this key has not come."""
    avoid: frozenset[str] = frozenset()
    while early := [w for w in pair if _turn(w, key) >= view.share_taken(w, now_ms)]:
        avoid |= set(early)
        pair = view.rings.candidates(key, avoid)
    return pair


def _turn(worker: str, key: bytes) -> float:
    """When in its warm-up, from 0 to 1, a worker takes a key over: the same on every replica."""
    return zlib.crc32(key, zlib.crc32(worker.encode())) / 2**32


def _local(at_decode: Candidate, reason: RouteReason) -> Route:
    return Route(
        prefill=None,
        decode=at_decode.worker,
        reason=reason,
        ttft_estimate_ms=at_decode.ttft_estimate_ms,
        hit_tokens=at_decode.hit_tokens,
        candidates=(at_decode,),
        uncalibrated_ms=at_decode.uncalibrated_ms,
    )


def _in_time(request: Request, route: Route) -> Route | Rejected:
    if route.ttft_estimate_ms <= request.timeout_ms:
        return route
    wait_ms = int(route.ttft_estimate_ms - request.timeout_ms)
    return Rejected(RejectReason.NO_TIME, "every candidate's queue is too long", max(wait_ms, 1))


def excluding(request: Request, *workers: str) -> Request:
    """The same request, never to be sent to `workers` again."""
    return replace(request, exclude=request.exclude | set(workers))
