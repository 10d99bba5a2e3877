"""The router replicas as endpoints, and how many requests this picker has open at each."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from kvasir_proto.errors import KvasirError, Reason

from kvasir_router.core.replicas import choose_replica
from kvasir_router.core.ring import RingPair
from kvasir_router.leaving import Leaving
from kvasir_router.peering.follow import Peers


class Replicas:
    """This replica and those of its peers that answer it."""

    def __init__(self, own: Callable[[], str], peers: Peers, leaving: Leaving) -> None:
        self._own, self._peers, self._leaving = own, peers, leaving
        self._rings = RingPair.build(())
        self._open: Counter[str] = Counter()

    @property
    def num_open(self) -> int:
        """Requests under way to any of them."""
        return self._open.total()

    def choose(self, key: bytes, *, among: frozenset[str] | None) -> str:
        """The endpoint for a key; `among`: the gateway takes no other.

        Raises:
            KvasirError: NO_WORKER: there is none.
        """
        members = self._members()
        if members != self._rings.members:
            self._rings = self._rings.changed(members)
        avoid = frozenset(members) - among if among is not None else frozenset()
        endpoint = choose_replica(self._rings, key, self._open, avoid=avoid)
        if endpoint is None:
            why = "no router is among the endpoints that the gateway would take"
            raise KvasirError(Reason.NO_WORKER, why, retry_after_ms=1_000)
        return endpoint

    def _members(self) -> tuple[str, ...]:
        """All that take new requests; one that leaves serves on while there is no other."""
        others, own = self._peers.endpoints(), self._own()
        return tuple(sorted(others if others and self._leaving.has_begun else {*others, own}))

    @contextlib.contextmanager
    def opened(self, endpoint: str) -> Iterator[None]:
        """While it lasts, a request is under way there."""
        self._open[endpoint] += 1
        try:
            yield
        finally:
            self._open[endpoint] -= 1
            if not self._open[endpoint]:
                del self._open[endpoint]
