"""A worker's side of the KV tier: fetch blocks instead of computing them, offer those computed.

Decides where to look and to whom to offer; whether fetching is worth it is left to the worker.
All of it is an optimisation: whatever fails is a miss or a dropped offer, is counted, shows in
`problem` and never raises into a request. When `locate_and_fetch` has returned or raised,
nothing writes to the blocks any more.
"""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvasir_proto.errors import KvasirError
from kvasir_proto.links import Links
from kvasir_proto.v1 import common_pb2
from prometheus_client import CollectorRegistry

from kvasir_kvstore._native import BlockPool, PullResult
from kvasir_kvstore.core.placement import leading_runs, rank_nodes
from kvasir_kvstore.index import Location, RedisIndex
from kvasir_kvstore.metrics import TierMetrics
from kvasir_kvstore.nodes import NodeSet
from kvasir_kvstore.peers import DataPlane
from kvasir_kvstore.pulls import NamedPuller, can_pull_from

log = logging.getLogger(__name__)

LOCATE_TIMEOUT_MS = 500
LOCATE_NODES_MAX = 8
"""Nodes asked for one chain, in the order of their rank, when no Redis is shared."""
OFFER_TIMEOUT_MS = 10_000
OFFERS_RUNNING_MAX = 2
OFFER_NODES_MAX = 2
"""A node that cannot take an offer is replaced by the next in rank, once."""
OFFER_NAMES_WAITING_MAX = 8192
FETCHES_MAX = 8


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What a fetch brought. `problem`: a reason as in PullResult.error, or "" (misses too)."""

    num_fetched_leading: int
    bytes_moved: int
    problem: str


@dataclass(frozen=True, slots=True)
class _Offer:
    names: tuple[bytes, ...]
    chain_head: bytes
    source: common_pb2.PeerAddress
    layout: common_pb2.KvLayout


class KvTier:
    """The KV nodes, as one store of blocks. Belongs to one event loop."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        nodes: Sequence[str],
        redis_url: str | None = None,
        links: Links | None = None,
        plane: DataPlane | None = None,
        registry: CollectorRegistry | None = None,
        offer_names_waiting_max: int = OFFER_NAMES_WAITING_MAX,
    ) -> None:
        """`nodes`: HOST:PORT or dns:HOST:PORT. Raises ValueError for a malformed spec or URL."""
        self._nodes = NodeSet(nodes, links=links)
        self._index = RedisIndex(redis_url) if redis_url else None
        self._puller = NamedPuller(pool, plane or DataPlane(), pulls_max=FETCHES_MAX)
        self._metrics = TierMetrics(registry or CollectorRegistry())
        self._offers: deque[_Offer] = deque()
        self._offers_changed = asyncio.Condition()
        self._names_waiting_max = offer_names_waiting_max
        self._num_names_waiting = 0
        self._num_names_running = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Finds the nodes and begins to work off offers."""
        await self._nodes.start()
        self._tasks = [asyncio.create_task(self._offer_loop()) for _ in range(OFFERS_RUNNING_MAX)]

    async def close(self) -> None:
        """Ends fetches, drops waiting offers and closes the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._puller.close()
        await self._nodes.close()
        if self._index is not None:
            await self._index.close()

    @property
    def healthy(self) -> bool:
        """At least one node answers."""
        return bool(self._nodes.live())

    @property
    def problem(self) -> str:
        """What does not work, or "". It may be there while the rest works (`healthy`)."""
        index_problem = self._index.problem if self._index else ""
        return "; ".join(filter(None, (self._nodes.problem, index_problem)))

    @property
    def num_offers_pending(self) -> int:
        """Names that wait to be offered or are being offered."""
        return self._num_names_waiting + self._num_names_running

    async def locate_and_fetch(
        self,
        names: Sequence[bytes],
        blocks: Sequence[int],
        *,
        timeout_ms: int,
        chain_head: bytes | None = None,
    ) -> FetchResult:
        """Fetches the longest leading part of the names that the tier holds, names[i] to blocks[i].

        Args:
            blocks: of the pool, not published.
            timeout_ms: over all; what has arrived by then counts.
            chain_head: name of the chain's first block, if `names` begins later.
        """
        if not names:
            return FetchResult(0, 0, "")
        end_s = time.monotonic() + timeout_ms / 1000
        runs, problem = await self._locate(names, chain_head or names[0], end_s=end_s)
        num_fetched = bytes_moved = 0
        for run in runs:
            wanted = slice(run.first, run.end)
            result = await self._pull(run, names[wanted], blocks[wanted], end_s=end_s)
            bytes_moved += result.bytes_moved
            num_ok = next((i for i, ok in enumerate(result.blocks_ok) if not ok), run.count)
            num_fetched += num_ok
            if num_ok < run.count:
                problem = result.error
                await self._forget_stale(run, names[wanted], result)
                break
        self._metrics.blocks.labels("fetched").inc(num_fetched)
        known = sum(run.count for run in runs)
        self._metrics.blocks.labels("lost").inc(known - num_fetched)
        self._metrics.blocks.labels("unknown").inc(len(names) - known)
        return FetchResult(num_fetched, bytes_moved, problem)

    async def offer(
        self,
        names: Sequence[bytes],
        source: common_pb2.PeerAddress,
        layout: common_pb2.KvLayout,
        *,
        chain_head: bytes | None = None,
    ) -> None:
        """Lets a KV node pull these blocks some time soon; dropped if too many wait already."""
        if not names:
            return
        if self._num_names_waiting + len(names) > self._names_waiting_max:
            self._metrics.offers.labels("dropped").inc()
            return
        async with self._offers_changed:
            self._offers.append(_Offer(tuple(names), chain_head or names[0], source, layout))
            self._num_names_waiting += len(names)
            self._offers_changed.notify()

    async def flush(self, *, timeout_ms: int) -> bool:
        """Waits until nothing is left to offer; False if that takes longer."""
        try:
            async with asyncio.timeout(timeout_ms / 1000), self._offers_changed:
                await self._offers_changed.wait_for(lambda: self.num_offers_pending == 0)
        except TimeoutError:
            return False
        return True

    async def _locate(
        self, names: Sequence[bytes], chain_head: bytes, *, end_s: float
    ) -> tuple[list[Location], str]:
        """Runs that cover the longest known leading part, and what went wrong."""
        started_s = time.monotonic()
        runs: list[Location] = []
        problem = ""
        if self._index is not None:
            runs = await self._index.locate(names)
        if self._index is None or not self._index.healthy:
            runs, problem = await self._ask_nodes(names, chain_head, end_s=end_s)
        self._metrics.locate_seconds.observe(time.monotonic() - started_s)
        usable = list(itertools.takewhile(lambda run: can_pull_from(run.holder), runs))
        if len(usable) < len(runs):
            log.warning("block index: a holder's address is incomplete; it is not asked")
        return usable, problem

    async def _ask_nodes(
        self, names: Sequence[bytes], chain_head: bytes, *, end_s: float
    ) -> tuple[list[Location], str]:
        targets = rank_nodes(chain_head, self._nodes.live())[:LOCATE_NODES_MAX]
        timeout_ms = min(_ms_until(end_s), LOCATE_TIMEOUT_MS)
        answers = await asyncio.gather(
            *(self._nodes.locate(target, names, timeout_ms=timeout_ms) for target in targets),
            return_exceptions=True,
        )
        runs: list[list[Location]] = []
        problem = "" if targets else "unreachable"
        for answer in answers:
            if isinstance(answer, KvasirError):
                problem = answer.reason.value
            elif isinstance(answer, BaseException):
                raise answer
            else:
                runs.append(answer)
        return leading_runs(runs, num_names=len(names)), problem if not runs else ""

    async def _pull(
        self, run: Location, names: Sequence[bytes], blocks: Sequence[int], *, end_s: float
    ) -> PullResult:
        result = await self._puller.pull(
            run.holder, names=names, blocks=blocks, timeout_ms=_ms_until(end_s)
        )
        self._metrics.frames_bad.inc(result.frames_bad)
        self._metrics.bytes.labels(result.transport or "none").inc(result.bytes_moved)
        if result.error:
            log.warning("fetching KV blocks from %s: %s", run.holder.name, result.error)
        return result

    async def _forget_stale(
        self, run: Location, names: Sequence[bytes], result: PullResult
    ) -> None:
        """The holder has restarted or no longer has them: others need not ask it for these."""
        if self._index is None or result.error not in ("", "stale_peer"):
            return
        lost = [name for name, ok in zip(names, result.blocks_ok, strict=True) if not ok]
        await self._index.withdraw(lost, run.holder)

    async def _offer_loop(self) -> None:
        while True:
            async with self._offers_changed:
                await self._offers_changed.wait_for(lambda: bool(self._offers))
                offer = self._offers.popleft()
                self._num_names_waiting -= len(offer.names)
                self._num_names_running += len(offer.names)
            try:
                reason = await self._send(offer)
            finally:
                self._num_names_running -= len(offer.names)
            self._metrics.offers.labels(reason).inc()
            async with self._offers_changed:
                self._offers_changed.notify_all()

    async def _send(self, offer: _Offer) -> str:
        """Offers to the chain's node, else to the next in rank; "ok" or why not."""
        reason = "no_node"
        for target in rank_nodes(offer.chain_head, self._nodes.live())[:OFFER_NODES_MAX]:
            try:
                await self._nodes.offer(
                    target,
                    offer.names,
                    source=offer.source,
                    layout=offer.layout,
                    timeout_ms=OFFER_TIMEOUT_MS,
                )
            except KvasirError as error:
                log.warning("offering KV blocks to %s: %s", target, error.message)
                reason = error.reason.value
            else:
                return "ok"
        return reason


def _ms_until(end_s: float) -> int:
    return max(1, int((end_s - time.monotonic()) * 1000))
