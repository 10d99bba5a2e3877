"""Blocks move to other nodes at no more than the rate that was set."""

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pytest
from kv_fleet import PROTO_LAYOUT
from kvasir_kvstore.core.cache import Held, Origin
from kvasir_kvstore.node import moves
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_proto.v1 import common_pb2, kvnode_pb2
from kvstore_builders import name_of

MB_PER_S = 0.3
CHAINS, BLOCKS = 6, 70


class Target:
    """The only node; takes half of what it is offered, and the rest when offered it again."""

    def __init__(self, asleep_s: list[float]) -> None:
        self._asleep_s = asleep_s
        self.moved: list[tuple[float, int]] = []
        """When, in seconds of sleep, and how many bytes."""
        self._seen: set[tuple[bytes, ...]] = set()

    def weights(self) -> Mapping[str, float]:
        return {"there:1": 1.0}

    def lives(self) -> Mapping[str, int]:
        return {"there:1": 1}

    async def offer(
        self, target: str, request: kvnode_pb2.OfferRequest
    ) -> kvnode_pb2.OfferResponse:
        assert target == "there:1"
        names = tuple(request.names)
        half = len(names) // 2
        count = len(names) - half if names in self._seen else half
        num_missed = 0 if names in self._seen else len(names) - half
        self._seen.add(names)
        self.moved.append((sum(self._asleep_s), count * PROTO_LAYOUT.block_bytes))
        return kvnode_pb2.OfferResponse(num_pulled=count, num_missed=num_missed)


class Source:
    """Holds some chains."""

    def layout(self) -> common_pb2.KvLayout:
        return PROTO_LAYOUT

    def blocks(self, *, on_disk: bool) -> Mapping[bytes, Held]:
        held = {}
        for chain in range(CHAINS):
            origin = Origin(tenant=b"", chain_head=name_of(chain * BLOCKS))
            for block in range(BLOCKS):
                held[name_of(chain * BLOCKS + block)] = Held(0, origin, 0)
        return held

    async def load(self, names: Sequence[bytes], *, timeout_ms: int, is_cold: bool) -> int:
        return len(names)


async def test_bytes_moved_never_pass_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep_s: list[float] = []
    target = Target(asleep_s)

    async def sleep(seconds: float) -> None:
        asleep_s.append(seconds)
        if len(asleep_s) > 1 and seconds == moves.INTERVAL_S:
            raise asyncio.CancelledError  # the second round: all is placed

    monkeypatch.setattr(moves, "asyncio", SimpleNamespace(sleep=sleep))
    settings = KvNodeSettings(name="kv-0", move_mb_per_s=MB_PER_S)
    here = common_pb2.PeerAddress(host="here", grpc_port=1)
    mover = moves.Mover(settings, target, here, source=Source())  # type: ignore[arg-type]
    with pytest.raises(asyncio.CancelledError):
        await mover.run()
    assert mover.blocks_moved == CHAINS * BLOCKS
    bytes_per_s = MB_PER_S * (1 << 20)
    burst_bytes = moves.NAMES_PER_OFFER * PROTO_LAYOUT.block_bytes + 1
    num_bytes = 0
    for at_s, count in target.moved:
        num_bytes += count
        assert num_bytes <= bytes_per_s * (at_s - moves.INTERVAL_S) + burst_bytes
    asleep = sum(asleep_s) - 2 * moves.INTERVAL_S
    assert asleep == pytest.approx(num_bytes / bytes_per_s)
