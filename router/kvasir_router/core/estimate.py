"""The estimate of TTFT at a worker: wait, compute, reuse and decode interference.

    wait          prompt tokens that wait there, reported or routed since, at its measured speed
    compute       the prompt's tokens that nobody holds, or that are cheaper computed than fetched
    reuse         its own cache; beyond that the longest run of a peer or of a KV node, if moving a
                  token is measured to take less than computing it
    chunks        of a prompt that is blended: those that are held are moved, not computed, but for
                  a share; those that are not are computed alone first
    interference  every chunk of prefill shares its step with the tokens decoded there

The sum is multiplied by what experience says of the worker (calibrate.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvasir_router.core.blended import saved_by
from kvasir_router.core.fleet import FleetView, Request, WorkerState

CHUNK_TOKENS = 512
"""Prompt tokens that a worker computes in one step while it also decodes."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that was considered for a prompt."""

    worker: str
    hit_tokens: int
    """In its own cache, and not computed again."""

    ttft_estimate_ms: float
    uncalibrated_ms: float = 0.0
    fetched_tokens: int = 0
    """Beyond its own cache, to be fetched from a peer or a KV node."""


def estimate(view: FleetView, request: Request, worker: str, runs: Mapping[str, int]) -> Candidate:
    """TTFT of `request` at `worker`; `runs` are leading blocks held, the longest runs first."""
    state = view.workers[worker]
    us_per_token = state.prefill_us_per_token or view.us_per_token_typical
    hit = min(runs.get(worker, 0) * view.block_tokens, request.num_tokens)
    fetched, fetch_us = 0, 0.0
    if state.peer_us_per_token or state.store_us_per_token:
        fetched, fetch_us = _fetch(view, request, state, us_per_token, runs)
    computed = request.num_tokens - hit - fetched + view.queued_tokens(worker)
    if request.blended is not None:
        saved = saved_by(
            view, request.blended, state, hit_tokens=hit + fetched, us_per_token=us_per_token
        )
        hit += saved.held_tokens
        fetched += saved.fetched_tokens
        fetch_us += saved.fetch_us
        computed -= saved.tokens
    us = computed * us_per_token + hit * view.policy.reuse_us_per_token + fetch_us
    if state.can_decode and state.num_running:
        us += computed / CHUNK_TOKENS * state.decode_ms_per_step * 1_000
    factor = view.calibration.factor(worker)
    return Candidate(worker, hit, us * factor / 1_000, us / 1_000, fetched)


def _fetch(
    view: FleetView,
    request: Request,
    state: WorkerState,
    us_per_token: float,
    runs: Mapping[str, int],
) -> tuple[int, float]:
    """Tokens worth fetching beyond the own cache, and the time that takes in microseconds."""
    held = runs.get(state.name, 0)
    at_peers = next((n for who, n in runs.items() if who not in view.stores), 0)
    at_stores = max((runs.get(store, 0) for store in view.stores), default=0)
    offers = ((at_peers, state.peer_us_per_token), (at_stores, state.store_us_per_token))
    best, best_us, best_saved = 0, 0.0, 0.0
    for blocks, cost_us in offers:
        whole = min(blocks * view.block_tokens, request.num_tokens)
        tokens = whole - held * view.block_tokens
        saved = tokens * (us_per_token - cost_us)
        if cost_us and saved > best_saved:
            best, best_us, best_saved = tokens, tokens * cost_us, saved
    return best, best_us
