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
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from kvasir_proto.errors import KvasirError
from kvasir_proto.links import Links
from kvasir_proto.v1 import common_pb2, kvnode_pb2
from prometheus_client import CollectorRegistry

from kvasir_kvstore._native import BlockPool, PullResult
from kvasir_kvstore.codecs import Link
from kvasir_kvstore.core.placement import Run, leading_runs, rank_nodes
from kvasir_kvstore.index import Location, RedisIndex
from kvasir_kvstore.metrics import TierMetrics
from kvasir_kvstore.nodes import NodeSet
from kvasir_kvstore.path_probe import Done, PathProbe
from kvasir_kvstore.peers import DataPlane, join_target
from kvasir_kvstore.pulls import WATCH_INTERVAL_S, GoesOn, NamedPuller, can_pull_from

log = logging.getLogger(__name__)

LOCATE_TIMEOUT_MS = 500
LOCATE_NODES_MAX = 8
"""Nodes asked for one chain, in the order of their rank, when no Redis is shared."""
OFFER_TIMEOUT_MS = 10_000
OFFERS_RUNNING_MAX = 2
OFFER_NODES_SPARE = 1
"""So many nodes that cannot take an offer are replaced by the next in rank."""
OFFER_NAMES_WAITING_MAX = 8192
FETCHES_MAX = 8
Result = TypeVar("Result")


class Wanted(StrEnum):
    """What came of a block that a prompt wanted of the tier."""

    FETCHED = "fetched"
    LOADED = "loaded"
    """Of those fetched: from a node's disk or store."""
    UNKNOWN = "unknown"
    """No node holds it."""
    LOST = "lost"
    """It was said to be held and did not come whole: gone, damaged, or its holder is away."""
    SLOW = "slow"
    """The fetch was ended, as computing had become faster."""
    DECLINED = "declined"
    """Not asked for, as computing was expected to be faster."""
    NO_MEMORY = "no_memory"
    """Not asked for, as there was no memory to fetch it into."""


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What a fetch brought. `problem`: as PullResult.error, "slow" (ended), or "" (misses too)."""

    num_fetched_leading: int
    bytes_moved: int
    problem: str
    locate_ms: float = 0.0
    """Until it was known who has the blocks; the transfer came after."""


@dataclass(frozen=True, slots=True)
class _Offer:
    names: tuple[bytes, ...]
    chain_head: bytes
    tenant: bytes
    source: common_pb2.PeerAddress
    layout: common_pb2.KvLayout

    @property
    def request(self) -> kvnode_pb2.OfferRequest:
        """What a node is asked."""
        return kvnode_pb2.OfferRequest(
            source=self.source,
            layout=self.layout,
            names=self.names,
            timeout_ms=OFFER_TIMEOUT_MS,
            tenant=self.tenant,
            chain_head=self.chain_head,
        )


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
        replicas: int = 1,
    ) -> None:
        """A tier of these nodes.

        Args:
            nodes: HOST:PORT or dns:HOST:PORT.
            replicas: nodes that each block is offered to.

        Raises:
            ValueError: a spec or URL is malformed.
        """
        self._replicas = replicas
        self._nodes = NodeSet(nodes, links=links)
        self._index = RedisIndex(redis_url, links=links) if redis_url else None
        plane = plane or DataPlane()
        self._puller = NamedPuller(pool, plane, pulls_max=FETCHES_MAX)
        self._probe = PathProbe(pool, plane, self._nodes)
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
        await self._probe.close()
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

    @property
    def counts(self) -> Mapping[str, int]:
        """Blocks that were wanted, by what came of it, since the start."""
        return self._metrics.blocks.counts

    @property
    def links(self) -> list[Link]:
        """Over which blocks came, the latest last."""
        return self._puller.links.known()

    def note(self, what: Wanted, num_blocks: int) -> None:
        """Counts blocks that were wanted."""
        self._metrics.blocks.add(what, num_blocks)

    async def locate_and_fetch(
        self,
        names: Sequence[bytes],
        blocks: Sequence[int],
        *,
        timeout_ms: int,
        chain_head: bytes | None = None,
        goes_on: GoesOn | None = None,
    ) -> FetchResult:
        """Fetches the longest leading part of the names that the tier holds, names[i] to blocks[i].

        Args:
            blocks: of the pool, not published.
            timeout_ms: over all; what has arrived by then counts.
            chain_head: name of the chain's first block, if `names` begins later.
            goes_on: asked all the while, with how many blocks have come; False ends the fetch, and
                what has arrived counts.
        """
        if not names:
            return FetchResult(0, 0, "")
        started_s = time.monotonic()
        end_s = started_s + timeout_ms / 1000
        head = chain_head or names[0]
        found = await _watched(self._locate(names, head, end_s=end_s), goes_on)
        runs, problem = found or ([], "slow")
        locate_ms = (time.monotonic() - started_s) * 1000
        known = runs[-1].end if runs else 0
        result = await self._fetch(runs, names, blocks, end_s=end_s, goes_on=goes_on)
        if result.problem not in ("", "slow") and self._index is not None:
            done = result.num_fetched_leading  # the holder is away: another may have the rest
            runs, _ = await self._ask_nodes(names[done:], head, end_s=end_s)
            if runs:
                known = max(known, done + runs[-1].end)
                more = await self._fetch(
                    runs, names[done:], blocks[done:], end_s=end_s, goes_on=_after(goes_on, done)
                )
                result = FetchResult(
                    done + more.num_fetched_leading,
                    result.bytes_moved + more.bytes_moved,
                    more.problem,
                )
        num_fetched = result.num_fetched_leading
        self.note(Wanted.FETCHED, num_fetched)
        is_slow = result.problem == "slow"
        self.note(Wanted.SLOW if is_slow else Wanted.LOST, known - num_fetched)
        self.note(Wanted.UNKNOWN, len(names) - known)
        return FetchResult(num_fetched, result.bytes_moved, result.problem or problem, locate_ms)

    def probe(self, names: Sequence[bytes], chain_head: bytes, done: Done) -> None:
        """Learns what fetching takes, by a few of these blocks that nobody waits for."""

        async def locate(names: Sequence[bytes], end_s: float) -> list[Location]:
            return (await self._locate(names, chain_head, end_s=end_s))[0]

        self._probe.start(names, locate, done)

    async def offer(
        self,
        names: Sequence[bytes],
        source: common_pb2.PeerAddress,
        layout: common_pb2.KvLayout,
        *,
        chain_head: bytes | None = None,
        tenant: bytes = b"",
    ) -> None:
        """Lets a KV node pull these blocks some time soon; dropped if too many wait already.

        Args:
            tenant: 16 bytes that tell tenants apart, for quotas; none: of no tenant.
        """
        if not names:
            return
        if self._num_names_waiting + len(names) > self._names_waiting_max:
            self._metrics.offers.labels("dropped").inc()
            return
        async with self._offers_changed:
            head = chain_head or names[0]
            self._offers.append(_Offer(tuple(names), head, tenant, source, layout))
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
        targets = rank_nodes(chain_head, self._nodes.weights())[:LOCATE_NODES_MAX]
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

    async def _fetch(
        self,
        runs: Sequence[Location],
        names: Sequence[bytes],
        blocks: Sequence[int],
        *,
        end_s: float,
        goes_on: GoesOn | None,
    ) -> FetchResult:
        """Fetches run after run until one does not come whole."""
        num_fetched = bytes_moved = 0
        for run in runs:
            if goes_on is not None and not goes_on(num_fetched):
                return FetchResult(num_fetched, bytes_moved, "slow")
            wanted = slice(run.first, run.end)
            so_far = _after(goes_on, num_fetched)
            result = await self._pull(
                run, names[wanted], blocks[wanted], end_s=end_s, goes_on=so_far
            )
            bytes_moved += result.bytes_moved
            num_ok, problem = _num_leading(result), result.error
            if num_ok < run.count and not problem:
                rest = slice(run.first + num_ok, run.end)
                lost = Run(run.holder, rest.start, run.count - num_ok)
                so_far = _after(goes_on, num_fetched + num_ok)
                loaded = await self._load(
                    lost, names[rest], blocks[rest], end_s=end_s, goes_on=so_far
                )
                num_ok += loaded.num_fetched_leading
                bytes_moved += loaded.bytes_moved
                problem = loaded.problem
            num_fetched += num_ok
            if num_ok < run.count:
                if _ms_until(end_s) > 1:  # else they may only have come late
                    await self._forget_stale(run, names[wanted][num_ok:], problem)
                is_slow = problem == "cancelled" and goes_on is not None
                return FetchResult(num_fetched, bytes_moved, "slow" if is_slow else problem)
        return FetchResult(num_fetched, bytes_moved, "")

    async def _pull(
        self,
        run: Location,
        names: Sequence[bytes],
        blocks: Sequence[int],
        *,
        end_s: float,
        goes_on: GoesOn | None = None,
    ) -> PullResult:
        result = await self._puller.pull(
            run.holder,
            names=names,
            blocks=blocks,
            timeout_ms=_ms_until(end_s),
            goes_on=goes_on,
        )
        self._metrics.frames_bad.inc(result.frames_bad)
        self._metrics.bytes.labels(result.transport or "none").inc(result.bytes_moved)
        encoding = "encoded" if result.is_lossy else "raw"
        self._metrics.wire_bytes.labels(encoding).inc(result.bytes_wire)
        if result.error not in ("", "cancelled"):
            log.warning("fetching KV blocks from %s: %s", run.holder.name, result.error)
        return result

    async def _load(
        self,
        run: Location,
        names: Sequence[bytes],
        blocks: Sequence[int],
        *,
        end_s: float,
        goes_on: GoesOn | None,
    ) -> FetchResult:
        """Fetches blocks that the holder has elsewhere; without a problem, it has no more."""
        target = join_target(run.holder.host, run.holder.grpc_port)
        num_fetched = bytes_moved = 0
        problem = ""
        while num_fetched < run.count and (timeout_ms := _ms_until(end_s)) > 1:
            part = slice(num_fetched, run.count)
            going_on = _after(goes_on, num_fetched)
            try:
                loading = self._nodes.load(target, names[part], timeout_ms=timeout_ms)
                count = await _watched(loading, going_on)
            except KvasirError as error:
                log.info("loading KV blocks at %s: %s", run.holder.name, error.message)
                problem = error.reason.value
                break
            if not count:
                problem = "slow" if count is None else ""
                break
            part = slice(num_fetched, num_fetched + count)
            result = await self._pull(run, names[part], blocks[part], end_s=end_s, goes_on=going_on)
            num_ok = _num_leading(result)
            num_fetched, bytes_moved = num_fetched + num_ok, bytes_moved + result.bytes_moved
            problem = result.error
            if num_ok < count:
                break
        self.note(Wanted.LOADED, num_fetched)
        return FetchResult(num_fetched, bytes_moved, problem)

    async def _forget_stale(self, run: Location, names: Sequence[bytes], problem: str) -> None:
        """The holder has restarted or no longer has them: others need not ask it for these."""
        if self._index is not None and problem in ("", "stale_peer"):
            await self._index.withdraw(names, run.holder)

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
        """Offers to the chain's nodes, the next in rank for one that fails; "ok" or why not."""
        reason = "no_node"
        num_left = self._replicas
        ranked = rank_nodes(offer.chain_head, self._nodes.weights())
        for target in ranked[: self._replicas + OFFER_NODES_SPARE]:
            try:
                await self._nodes.offer(target, offer.request)
            except KvasirError as error:
                log.warning("offering KV blocks to %s: %s", target, error.message)
                reason = error.reason.value
                continue
            num_left -= 1
            if not num_left:
                break
        return "ok" if num_left < self._replicas else reason


async def _watched(call: Coroutine[Any, Any, Result], goes_on: GoesOn | None) -> Result | None:
    """The call's result; None: it was ended, since to wait on did not pay."""
    task = asyncio.create_task(call)
    try:
        while goes_on is not None and not task.done():
            await asyncio.wait({task}, timeout=WATCH_INTERVAL_S)
            if not task.done() and not goes_on(0):
                return None
        return await task
    finally:
        task.cancel()


def _after(goes_on: GoesOn | None, num_before: int) -> GoesOn | None:
    """Asks with the blocks of earlier pulls added."""
    return None if goes_on is None else lambda num_arrived: goes_on(num_before + num_arrived)


def _num_leading(result: PullResult) -> int:
    """Blocks that came, from the first on."""
    oks = result.blocks_ok
    return next((i for i, ok in enumerate(oks) if not ok), len(oks))


def _ms_until(end_s: float) -> int:
    return max(1, int((end_s - time.monotonic()) * 1000))
