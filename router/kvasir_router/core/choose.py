"""The whole decision: a view of the fleet and a request in, a route or a refusal out.

    1. the decode worker, by cache, memory and load                        (decode.py)
    2. a short uncached suffix stays there: nothing moves
    3. two prefill candidates from the rings, an estimate of TTFT for each
    4. the one with the longer prefix hit, unless it is too slow for the SLO (DualMap)
    5. decode where the prompt is prefilled if that worker can

Invariants: deterministic; a route names workers of the view, outside `request.exclude`. Waiting
and ordering are left to the prefill worker's queue, which alone knows its load.
"""

import enum
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvasir_router.core.decode import can_also_decode, choose_decode, fits_anywhere
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
class Candidate:
    """A prefill worker that was considered."""

    worker: str
    hit_tokens: int
    ttft_estimate_ms: float


@dataclass(frozen=True, slots=True)
class Route:
    """Who serves a request. `prefill` is None when the decode worker prefills by itself."""

    prefill: str | None
    decode: str
    reason: RouteReason
    ttft_estimate_ms: float
    hit_tokens: int
    candidates: tuple[Candidate, ...] = ()

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
    """Routes one request. `now_ms` is the caller's clock; today's rules need no history of it."""
    pair = prefill_pair(view, request)
    runs = view.prefix.match(request.names, pair)
    decode = choose_decode(view, request, runs)
    if decode is None:
        return Rejected(RejectReason.NO_DECODE_WORKER, "no decode worker is ready", 1_000)
    if not fits_anywhere(view, request):
        return Rejected(RejectReason.NO_MEMORY, "the prompt exceeds every worker's KV memory")
    at_decode = estimate(view, request, decode, runs)
    if is_short_suffix(view, request, at_decode):
        return _local(at_decode, RouteReason.SHORT_SUFFIX)
    candidates = tuple([estimate(view, request, name, runs) for name in pair])
    return _in_time(request, _route(view, request, at_decode, candidates))


def estimate(view: FleetView, request: Request, worker: str, runs: Mapping[str, int]) -> Candidate:
    """TTFT of `request` at `worker`: what waits there, what it must compute, what it reuses."""
    hit = min(runs.get(worker, 0) * view.block_tokens, request.num_tokens)
    computed = view.queued_tokens(worker) + request.num_tokens - hit
    us = computed * view.workers[worker].us_per_token + hit * view.policy.reuse_us_per_token
    return Candidate(worker, hit, us / 1_000)


def is_short_suffix(view: FleetView, request: Request, at_decode: Candidate) -> bool:
    """Whether so much is cached at the decode worker that a hand-off is not worth it."""
    missing = request.num_tokens - at_decode.hit_tokens
    return at_decode.hit_tokens > 0 and missing <= view.policy.local_prefill_tokens_max


def choose_by_slo(candidates: Sequence[Candidate], request: Request) -> tuple[int, RouteReason]:
    """Index of the candidate to take, and why (DualMap, SLO-aware request routing)."""
    if len(candidates) == 1:
        return 0, RouteReason.ONLY_CANDIDATE
    one, two = candidates
    faster = 0 if _rank(one, request) <= _rank(two, request) else 1
    if one.hit_tokens == two.hit_tokens:
        return faster, RouteReason.LESS_LOADED
    longer = 0 if one.hit_tokens > two.hit_tokens else 1
    if candidates[longer].ttft_estimate_ms <= request.ttft_slo_ms / 2:
        return longer, RouteReason.LONGER_HIT
    return faster, RouteReason.SMALLER_ESTIMATE


def _rank(candidate: Candidate, request: Request) -> tuple[float, int]:
    """Smaller is better; ties fall by the request, so that equal workers share equally."""
    return candidate.ttft_estimate_ms, _coin(candidate.worker, request)


def _coin(worker: str, request: Request) -> int:
    return zlib.crc32(f"{worker}\0{request.request_id}".encode())


def _route(
    view: FleetView, request: Request, at_decode: Candidate, candidates: tuple[Candidate, ...]
) -> Route:
    if not view.workers[at_decode.worker].transfer_healthy:
        return _local(at_decode, RouteReason.TRANSFER_UNHEALTHY)
    if not candidates:
        return _local(at_decode, RouteReason.NO_PREFILL_WORKER)
    index, reason = choose_by_slo(candidates, request)
    taken = candidates[index]
    same = taken.worker == at_decode.worker or can_also_decode(view, request, taken.worker)
    return Route(
        prefill=None if same else taken.worker,
        decode=taken.worker if same else at_decode.worker,
        reason=reason,
        ttft_estimate_ms=taken.ttft_estimate_ms,
        hit_tokens=taken.hit_tokens,
        candidates=candidates,
    )


def prefill_pair(view: FleetView, request: Request) -> tuple[str, ...]:
    """The workers of the request's key; when one refused or cannot send KV, the other alone."""
    key = request.key(view.keys)
    pair = view.rings.candidates(key)
    if not request.exclude and not view.mute:
        return pair
    avoid = request.exclude | view.mute
    return tuple(name for name in pair if name not in avoid) or view.rings.candidates(key, avoid)


def _local(at_decode: Candidate, reason: RouteReason) -> Route:
    return Route(
        prefill=None,
        decode=at_decode.worker,
        reason=reason,
        ttft_estimate_ms=at_decode.ttft_estimate_ms,
        hit_tokens=at_decode.hit_tokens,
        candidates=(at_decode,),
    )


def _in_time(request: Request, route: Route) -> Route | Rejected:
    if route.ttft_estimate_ms <= request.timeout_ms:
        return route
    wait_ms = int(route.ttft_estimate_ms - request.timeout_ms)
    return Rejected(RejectReason.NO_TIME, "every candidate's queue is too long", max(wait_ms, 1))


def excluding(request: Request, *workers: str) -> Request:
    """The same request, never to be sent to `workers` again."""
    return replace(request, exclude=request.exclude | set(workers))
