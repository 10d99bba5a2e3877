"""The decode side: who holds most of the conversation, has memory, keeps the pace and is calm.

In this order: a worker that holds at least half of the prompt's blocks (it served the
conversation's last turn; a shared system prompt does not make one), then the least busy one. Either
must have memory for the prompt and the output to be expected, and decode fast enough for the
request's TPOT; only when nobody does, the least busy one takes it anyway.

Invariant: looks at a bounded number of workers, however many there are.
"""

import zlib
from collections.abc import Mapping
from itertools import islice

from kvasir_router.core.fleet import FleetView, Request, WorkerState

LOOKED_AT_MAX = 16
"""Least busy workers that are tried before the one with most memory is."""

EQUALS_MAX = 4
"""Equally busy workers among which the request's name decides: routers that heard the same reports
would else all send their next request to the same one."""


def blocks_needed(view: FleetView, request: Request) -> int:
    """Blocks for the prompt and the expected output."""
    tokens = request.num_tokens + min(request.max_tokens, view.output.tokens)
    return -(-tokens // view.block_tokens)


def fits_anywhere(view: FleetView, request: Request) -> bool:
    """Whether some worker that decodes is large enough for the prompt, were it empty."""
    return -(-request.num_tokens // view.block_tokens) <= view.blocks_total_max


def choose_decode(view: FleetView, request: Request, runs: Mapping[str, int]) -> str | None:
    """The decode worker of a request; `runs` are leading blocks held, the longest runs first."""
    needed = blocks_needed(view, request)
    calm = calmest(view, request, needed)
    if calm is None:
        return None
    running_max = view.running(calm) + view.policy.decode_slack_requests
    half = len(request.names) / 2
    for name, blocks in runs.items():
        if not blocks or blocks < half:
            break
        state = view.workers.get(name)
        if (
            state is not None
            and state.can_decode
            and name not in request.exclude
            and view.running(name) <= running_max
            and _can_take(view, request, state, needed - blocks)
        ):
            return name
    return calm


def calmest(view: FleetView, request: Request, needed: int) -> str | None:
    """The least busy worker that can take the request, else the least busy one."""
    first, equals, running = None, list[str](), 0.0
    exclude, workers = request.exclude, view.workers
    for key, name in islice(view.by_running.items(), LOOKED_AT_MAX + len(exclude)):
        if name in exclude:
            continue
        first = first or name
        if equals and key[0] > running:
            break
        if _can_take(view, request, workers[name], needed):
            running = key[0]
            equals.append(name)
            if len(equals) == EQUALS_MAX:
                break
    if equals:
        return equals[zlib.crc32(request.request_id.encode()) % len(equals)]
    for name in islice(view.by_room, 1 + len(request.exclude)):
        if name not in request.exclude and _can_take(view, request, view.workers[name], needed):
            return name
    return first


def _can_take(view: FleetView, request: Request, state: WorkerState, needed: int) -> bool:
    """Whether a worker has `needed` blocks free and would still keep the request's TPOT.

    Its step time is taken to grow with what it runs: too much by what the weights cost.
    """
    if state.blocks_free < needed:
        return False
    if not request.tpot_slo_ms or not state.decode_ms_per_step:
        return True
    growth = (view.running(state.name) + 1) / max(state.num_running, 1)
    return state.decode_ms_per_step * growth <= request.tpot_slo_ms


def can_also_decode(view: FleetView, request: Request, worker: str) -> bool:
    """Whether the prefill worker may as well decode: then no KV has to move."""
    state = view.workers[worker]
    if not state.can_decode or not _can_take(view, request, state, blocks_needed(view, request)):
        return False
    least = view.by_running.least_key()
    assert least is not None
    return view.running(worker) <= least[0] + view.policy.decode_slack_requests
