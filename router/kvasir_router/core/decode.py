"""The decode side: who holds most of the conversation, has memory and runs the fewest requests."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from kvasir_router.core.fleet import FleetView, Request

OUTPUT_TOKENS_EXPECTED_MAX = 256
"""Memory is asked for this much output at most; longer outputs find room as others end."""

LOOKED_AT_MAX = 16
"""Least busy workers that are asked for memory before the one with most of it is."""


def blocks_needed(view: FleetView, request: Request) -> int:
    """Blocks for the prompt and the expected output."""
    tokens = request.num_tokens + min(request.max_tokens, OUTPUT_TOKENS_EXPECTED_MAX)
    return -(-tokens // view.block_tokens)


def fits_anywhere(view: FleetView, request: Request) -> bool:
    """Whether some worker that decodes is large enough for the prompt, were it empty."""
    return -(-request.num_tokens // view.block_tokens) <= view.blocks_total_max


def choose_decode(view: FleetView, request: Request, runs: Mapping[str, int]) -> str | None:
    """The decode worker of a request; `runs` are leading blocks held, the longest runs first.

    Holding at least half of the prompt's blocks marks the worker that served the conversation's
    last turn (a shared system prompt does not), and wins unless it is much busier than the rest.
    """
    calm = calmest(view, request)
    if calm is None:
        return None
    running_max = view.running(calm) + view.policy.decode_slack_requests
    needed, half = blocks_needed(view, request), len(request.names) / 2
    for name, blocks in runs.items():
        if not blocks or blocks < half:
            break
        state = view.get(name)
        if (
            state is not None
            and state.can_decode
            and name not in request.exclude
            and state.blocks_free + blocks >= needed
            and view.running(name) <= running_max
        ):
            return name
    return calm


def calmest(view: FleetView, request: Request) -> str | None:
    """The least busy worker with room for the request, else the least busy one."""
    needed = blocks_needed(view, request)
    first = next(_allowed(view.by_running, request), None)
    for name in islice(_allowed(view.by_running, request), LOOKED_AT_MAX):
        if view.workers[name].blocks_free >= needed:
            return name
    roomiest = next(_allowed(view.by_room, request), None)
    if roomiest is not None and view.workers[roomiest].blocks_free >= needed:
        return roomiest
    return first


def _allowed(names: Iterable[str], request: Request) -> Iterator[str]:
    return (name for name in names if name not in request.exclude)


def can_also_decode(view: FleetView, request: Request, worker: str) -> bool:
    """Whether the prefill worker may as well decode: then no KV has to move."""
    state = view.workers[worker]
    if not state.can_decode or state.blocks_free < blocks_needed(view, request):
        return False
    least = view.by_running.least_key()
    assert least is not None
    return view.running(worker) <= least[0] + view.policy.decode_slack_requests
