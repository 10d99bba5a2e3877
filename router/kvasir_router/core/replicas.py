"""Which router replica is to serve a request that comes through a gateway.

Replicas decide alike, but each knows only of the requests that it has sent itself. Requests with
the same key therefore meet at the same replica: its estimates of their workers' queues are then
complete. Invariant: no replica has more than SLACK requests beyond its share of what is open.
"""

from collections.abc import Mapping

from kvasir_router.core.ring import RingPair

SLACK = 8
"""Requests that a replica may have open beyond the mean before others are preferred to it."""


def choose_replica(
    rings: RingPair,
    key: bytes,
    open_requests: Mapping[str, int],
    *,
    avoid: frozenset[str] = frozenset(),
) -> str | None:
    """The first of the key's two replicas that has room, else the least busy of all."""
    able = [name for name in rings.members if name not in avoid]
    if not able:
        return None
    bound = SLACK + sum(open_requests.get(name, 0) for name in able) / len(able)
    for name in rings.candidates(key, avoid):
        if open_requests.get(name, 0) < bound:
            return name
    return min(able, key=lambda name: (open_requests.get(name, 0), name))
