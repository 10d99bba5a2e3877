"""Brings blocks to the KV nodes that their chains belong to, when nodes come or go.

Decides which chains are offered to whom: those that after a change of the live nodes belong
(core/placement.py) to a node to which they did not belong before, whether in memory or on disk;
and those new in memory, since whoever offered them may have seen other nodes live. The other node
pulls, as it does from workers, and says what it has already, so that two holders of a chain do no
harm; what it lacks and is on disk alone is loaded for it, and is the least valuable on both nodes
until a request wants it: moves displace next to nothing. Blocks keep their age.
What has moved is not given up here: it loses its value as it is no longer asked for. One chain
after the other, in the background, at a bounded rate; what failed is tried again in the next round.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2, kvnode_pb2

from kvasir_kvstore.core.cache import Held, Origin
from kvasir_kvstore.core.placement import rank_nodes
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_kvstore.nodes import NodeSet
from kvasir_kvstore.peers import join_target

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
RETRY_S = 5.0
"""After a round in which not all could be offered: a node may refuse for long."""
NAMES_PER_OFFER = 32
"""Half of what may be on its way from disk to memory at a time: requests have the rest."""
OFFER_TIMEOUT_MS = 10_000
TRIES_MAX = 10
"""Of one offer to a node that is overloaded."""


@dataclass(frozen=True, slots=True)
class _Members:
    """The live nodes: what each counts for, and which life of it that is."""

    weights: Mapping[str, float]
    lives: Mapping[str, int]

    def share(self, chain_head: bytes, replicas: int) -> set[tuple[str, int]]:
        """The nodes that a chain belongs to, and their lives."""
        ranked = rank_nodes(chain_head, self.weights)[:replicas]
        return {(target, self.lives[target]) for target in ranked}


class Source(Protocol):
    """What a node holds."""

    def layout(self) -> common_pb2.KvLayout | None:
        """Of its blocks; None: there are none."""

    def blocks(self, *, on_disk: bool) -> Mapping[bytes, Held]:
        """Those in memory, and on disk if asked for."""

    async def load(self, names: Sequence[bytes], *, timeout_ms: int, is_cold: bool) -> int:
        """Brings the leading part of the names into memory; how many of them are there then."""


class Mover:
    """One node's part of keeping chains where they belong."""

    def __init__(
        self,
        settings: KvNodeSettings,
        nodes: NodeSet,
        address: common_pb2.PeerAddress,
        *,
        source: Source,
    ) -> None:
        """`address` and `source`: of the node itself."""
        self._nodes, self._address, self._source = nodes, address, source
        self._replicas = settings.kv_replicas
        self._bytes_per_s = settings.move_mb_per_s * (1 << 20)
        self._placed: _Members | None = None
        """With these, the names in `_names_placed` are where they belong."""
        self._names_placed: frozenset[bytes] = frozenset()
        self.blocks_moved = 0

    async def run(self) -> None:
        """Moves what is to be moved until cancelled."""
        wait_s = INTERVAL_S
        while True:
            await asyncio.sleep(wait_s)
            wait_s = INTERVAL_S
            members = _Members(self._nodes.weights(), self._nodes.lives())
            layout = self._source.layout()
            in_memory = self._source.blocks(on_disk=False)
            wanted = {name for name, block in in_memory.items() if not block.is_cold}
            new = wanted - self._names_placed
            if layout is None or (members == self._placed and not new):
                continue
            held: Mapping[bytes, Held] = {name: in_memory[name] for name in new}
            if members != self._placed:
                held = self._source.blocks(on_disk=True)
            if await self._place(held, members, layout, new=new, wanted=wanted):
                self._placed, self._names_placed = members, frozenset(in_memory)
            else:
                wait_s = RETRY_S

    async def _place(
        self,
        held: Mapping[bytes, Held],
        members: "_Members",
        layout: common_pb2.KvLayout,
        *,
        new: Set[bytes],
        wanted: Set[bytes],
    ) -> bool:
        """Offers blocks to nodes they newly belong to; False: not all could be."""
        chains: defaultdict[tuple[Origin, bool, bool], list[bytes]] = defaultdict(list)
        for name, block in held.items():
            chains[block.origin, name in new, name not in wanted].append(name)
        failed: set[str] = set()
        # What is wanted goes first: a node that has much to write takes nothing else.
        for (origin, is_new, is_cold), names in sorted(chains.items(), key=lambda it: it[0][2]):
            head = origin.chain_head
            before: set[tuple[str, int]] = set()
            if self._placed is not None and not is_new:
                before = self._placed.share(head, self._replicas)
            targets = {target for target, _ in members.share(head, self._replicas) - before}
            for target in sorted(targets - failed):
                for start in range(0, len(names), NAMES_PER_OFFER):
                    part = names[start : start + NAMES_PER_OFFER]
                    blocks = {name: held[name] for name in part}
                    if not await self._offer(target, blocks, layout, is_cold=is_cold):
                        failed.add(target)  # the others' turn; it gets its own in the next round
                        break
        return not failed

    async def _offer(
        self,
        target: str,
        blocks: Mapping[bytes, Held],
        layout: common_pb2.KvLayout,
        *,
        is_cold: bool,
    ) -> bool:
        """Offers blocks of one chain; those that are on disk alone only if they are lacking."""
        if target == join_target(self._address.host, self._address.grpc_port):
            return True
        try:
            answer = await self._ask(target, blocks, layout, is_cold)
            num_pulled, num_loaded = answer.num_pulled, 0
            if answer.num_missed:
                num_loaded = await self._source.load(
                    list(blocks), timeout_ms=OFFER_TIMEOUT_MS, is_cold=True
                )
            if num_loaded:
                num_pulled += (await self._ask(target, blocks, layout, is_cold)).num_pulled
        except KvasirError as error:
            log.info("moving blocks to %s: %s", target, error.message)
            return False
        self.blocks_moved += num_pulled
        num_moved = max(num_pulled, num_loaded)
        await asyncio.sleep(num_moved * layout.block_bytes / self._bytes_per_s)
        return True

    async def _ask(
        self,
        target: str,
        blocks: Mapping[bytes, Held],
        layout: common_pb2.KvLayout,
        is_cold: bool,
    ) -> kvnode_pb2.OfferResponse:
        """Offers again as long as the node only has too much to do just now."""
        tries_left = TRIES_MAX
        while True:
            tries_left -= 1
            try:
                return await self._nodes.offer(target, self._request(blocks, layout, is_cold))
            except KvasirError as error:
                if error.reason is not Reason.OVERLOADED or not tries_left:
                    raise
                await asyncio.sleep(error.retry_after_ms / 1000)

    def _request(
        self, blocks: Mapping[bytes, Held], layout: common_pb2.KvLayout, is_cold: bool
    ) -> kvnode_pb2.OfferRequest:
        """Of blocks of one chain, with their ages now."""
        now_ms = time.time_ns() // 1_000_000
        origin = next(iter(blocks.values())).origin
        return kvnode_pb2.OfferRequest(
            source=self._address,
            layout=layout,
            names=list(blocks),
            timeout_ms=OFFER_TIMEOUT_MS,
            tenant=origin.tenant,
            chain_head=origin.chain_head,
            ages_ms=[max(now_ms - block.stored_ms, 0) for block in blocks.values()],
            is_cold=is_cold,
        )
