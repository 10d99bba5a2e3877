"""What a node moves first, and what it goes on with when the other takes little."""

import asyncio

import pytest
from kv_fleet import PROTO_LAYOUT
from kvasir_kvstore.core.cache import Held, Origin
from kvasir_kvstore.node import moves
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_kvstore.nodes import NodeSet
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2, kvnode_pb2

COLD, HOT = (bytes([i]) * 16 for i in range(2))


class Busy(NodeSet):
    """A node whose disk has much to write: it takes what is wanted alone."""

    def __init__(self) -> None:
        super().__init__([])
        self.taken: set[bytes] = set()

    def weights(self) -> dict[str, float]:
        return {"kv:1": 1.0}

    def lives(self) -> dict[str, int]:
        return {"kv:1": 1}

    async def offer(
        self, target: str, request: kvnode_pb2.OfferRequest
    ) -> kvnode_pb2.OfferResponse:
        if request.is_cold:
            raise KvasirError(Reason.OVERLOADED, "no room", retry_after_ms=200)
        self.taken.update(request.names)
        return kvnode_pb2.OfferResponse(num_pulled=len(request.names))


class Mixed:
    """A node that holds one chain on disk alone, and another that is wanted."""

    def layout(self) -> common_pb2.KvLayout:
        return PROTO_LAYOUT

    def blocks(self, *, on_disk: bool) -> dict[bytes, Held]:
        names = (COLD, HOT) if on_disk else (HOT,)
        return {name: Held(0, Origin(chain_head=name), stored_ms=1) for name in names}

    async def load(self, names: object, *, timeout_ms: int, is_cold: bool) -> int:
        raise AssertionError("nobody lacks anything")


async def test_what_is_wanted_moves_though_what_is_not_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def sleep(wait_s: float) -> None:
        if wait_s == moves.RETRY_S:
            raise asyncio.CancelledError  # one round will do

    monkeypatch.setattr(moves.asyncio, "sleep", sleep)
    target = Busy()
    address = common_pb2.PeerAddress(host="kv", grpc_port=2)
    with pytest.raises(asyncio.CancelledError):
        await moves.Mover(KvNodeSettings(name="n"), target, address, source=Mixed()).run()
    assert target.taken == {HOT}
