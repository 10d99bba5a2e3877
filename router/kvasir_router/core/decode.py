"""The decode side: who holds most of the conversation, has memory and runs the fewest requests."""

from collections.abc import Mapping

from kvasir_router.core.fleet import FleetView, Request

OUTPUT_TOKENS_EXPECTED_MAX = 256
"""Memory is asked for this much output at most; longer outputs find room as others end."""


def blocks_needed(view: FleetView, request: Request) -> int:
    """Blocks for the prompt and the expected output."""
    tokens = request.num_tokens + min(request.max_tokens, OUTPUT_TOKENS_EXPECTED_MAX)
    return -(-tokens // view.block_tokens)


def fits_anywhere(view: FleetView, request: Request) -> bool:
    """Whether some worker that decodes is large enough for the prompt, were it empty."""
    needed = -(-request.num_tokens // view.block_tokens)
    return any(w.can_decode and needed <= w.blocks_total for w in view.workers.values())


def choose_decode(view: FleetView, request: Request, runs: Mapping[str, int]) -> str | None:
    """The decode worker of a request; `runs` are the leading blocks that each worker holds.

    Holding at least half of the prompt's blocks marks the worker that served the conversation's
    last turn (a shared system prompt does not), and wins unless it is much busier than the rest.
    """
    able = [w for w in view.workers.values() if w.can_decode and w.name not in request.exclude]
    if not able:
        return None
    needed = blocks_needed(view, request)
    roomy = [w for w in able if w.blocks_free + runs.get(w.name, 0) >= needed]
    pool = roomy or able
    fewest = min(view.running(w.name) for w in pool)
    calm = [w for w in pool if view.running(w.name) <= fewest + view.policy.decode_slack_requests]
    home = max(calm, key=lambda w: (runs.get(w.name, 0), w.name))
    if request.names and 2 * runs.get(home.name, 0) >= len(request.names):
        return home.name
    return min(pool, key=lambda w: (view.running(w.name), -w.blocks_free, w.name)).name


def can_also_decode(view: FleetView, request: Request, worker: str) -> bool:
    """Whether the prefill worker may as well decode: then no KV has to move."""
    state = view.workers[worker]
    if not state.can_decode or state.blocks_free < blocks_needed(view, request):
        return False
    able = (w.name for w in view.workers.values() if w.can_decode)
    fewest = min(view.running(name) for name in able)
    return view.running(worker) <= fewest + view.policy.decode_slack_requests
