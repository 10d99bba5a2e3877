"""One worker of the fleet: what it said of itself, by its event stream."""

from collections.abc import Sequence
from typing import Any, Protocol

import grpc.aio
from kvasir_proto.links import Links
from kvasir_proto.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from kvasir_router.membership.stream import LOAD_INTERVAL_MS, Followed


class Listener(Protocol):
    """Who wants to know of a member's events."""

    def on_event(self, member: "Member", event: worker_pb2.WorkerEvent) -> None:
        """An event arrived and `member` already shows it."""

    def on_lost(self, member: "Member") -> None:
        """The stream broke: `member` takes no request until the next event."""

    def on_forgotten(self, member: "Member") -> None:
        """What `member` holds is not known any more; the next event will be a snapshot."""


class Member(Followed[worker_pb2.WorkerEvent]):
    """A worker at one address."""

    kind = "worker"
    event_type = worker_pb2.WorkerEvent

    def __init__(
        self, target: str, listener: Listener, *, links: Links, silence_timeout_ms: int
    ) -> None:
        super().__init__(target, links=links, silence_timeout_ms=silence_timeout_ms)
        self.description: worker_pb2.WorkerDescription | None = None
        self._listener = listener
        self._stub: worker_pb2_grpc.WorkerAsyncStub | None = None

    @property
    def name(self) -> str:
        """The worker's own name, or its address before it said one."""
        return self.description.address.name if self.description else self.target

    async def hand_back(self, request_ids: Sequence[str], *, timeout_s: float) -> int:
        """Asks the worker to hand back those of these requests that still wait; how many did.

        Raises:
            AioRpcError: it cannot be asked now.
        """
        if self._stub is None:
            return 0
        request = worker_pb2.HandBackRequest(request_ids=request_ids)
        return (await self._stub.HandBack(request, timeout=timeout_s)).num_handed_back

    async def check_transfer(
        self, peers: Sequence[common_pb2.PeerAddress], *, timeout_s: float
    ) -> Sequence[worker_pb2.TransferCheck]:
        """Asks the worker to pull a canary from one of these peers; what came of those tried.

        Raises:
            AioRpcError: it cannot be asked now.
        """
        if self._stub is None:
            return ()
        request = worker_pb2.CheckTransferRequest(peers=peers)
        return (await self._stub.CheckTransfer(request, timeout=timeout_s)).checks

    def _watch(
        self, channel: grpc.aio.Channel, *, after: int
    ) -> "grpc.aio.UnaryStreamCall[Any, worker_pb2.WorkerEvent]":
        self._stub = worker_pb2_grpc.WorkerStub(channel)
        return self._stub.WatchEvents(
            worker_pb2.WatchEventsRequest(load_interval_ms=LOAD_INTERVAL_MS, after=after)
        )

    def _learn(self, event: worker_pb2.WorkerEvent) -> bool:
        if event.HasField("description"):
            self.description = event.description
        return self.description is not None

    def _tell(self, event: worker_pb2.WorkerEvent) -> None:
        self._listener.on_event(self, event)

    def _lost(self) -> None:
        self._listener.on_lost(self)

    def _forget(self) -> None:
        self._listener.on_forgotten(self)
