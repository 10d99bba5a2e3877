"""Builders of views and requests for the router's tests."""

import hashlib
from typing import Any

from kvasir_router.core.fleet import FleetView, Policy, Request, WorkerState
from kvasir_router.core.keys import KeyTree
from kvasir_router.core.ledger import Ledger
from kvasir_router.core.prefix import PrefixView


def make_names(seed: str, count: int) -> tuple[bytes, ...]:
    """Block names of a prompt; equal seeds share their leading names."""
    return tuple(
        hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=16).digest() for i in range(count)
    )


def make_worker(name: str, role: str = "prefill", **state: Any) -> WorkerState:
    """A worker with room, idle unless said otherwise."""
    known = {"blocks_total": 1_000, "blocks_free": 1_000, "prefill_us_per_token": 100.0}
    return WorkerState(
        name=name,
        can_prefill=role in ("prefill", "both"),
        can_decode=role in ("decode", "both"),
        **{**known, **state},
    )


def make_view(*workers: WorkerState, stores: tuple[str, ...] = (), **policy: Any) -> FleetView:
    """A fleet of these workers of which nothing else is known."""
    view = FleetView(
        prefix=PrefixView(blocks_max=10_000),
        keys=KeyTree(),
        ledger=Ledger(),
        policy=Policy(**policy),
        stores=stores,
    )
    for worker in workers:
        view.put(worker)
    return view


def make_request(
    request_id: str = "r", *, names: tuple[bytes, ...] = (), num_tokens: int = 0, **rest: Any
) -> Request:
    """A request whose prompt ends 8 tokens into its last block."""
    return Request(
        request_id=request_id,
        num_tokens=num_tokens or 32 * len(names) + 8,
        names=names,
        short_key=hashlib.blake2b(request_id.encode(), digest_size=16).digest(),
        **rest,
    )
