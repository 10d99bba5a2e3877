"""The KV nodes that a worker knows: their addresses, channels and whether they answer.

Decides which nodes are live: one that failed is left alone until a probe in the background has
reached it, so a dead node costs a request at most one failed call. What is kept where is decided by
core/placement.py.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.links import Links
from kvasir_proto.rpc_errors import error_from_rpc
from kvasir_proto.v1 import kvnode_pb2, kvnode_pb2_grpc

from kvasir_kvstore.core.placement import Run, node_weight
from kvasir_kvstore.index import Location
from kvasir_kvstore.peers import join_target, parse_spec

log = logging.getLogger(__name__)

NODES_MAX = 256
PROBE_TIMEOUT_MS = 1000
CLOSE_GRACE_S = 1.0
LOAD_GRACE_S = 0.1
"""A load answers at its timeout with what it has; so much later it is given up."""
_CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # peers are near, whatever the environment says
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
Answer = TypeVar("Answer")
_NODE_IS_AWAY = frozenset({Reason.NO_WORKER, Reason.TIMEOUT, Reason.CANCELLED, Reason.DRAINING})


@dataclass(slots=True)
class _Node:
    channel: grpc.aio.Channel
    stub: "kvnode_pb2_grpc.KvNodeAsyncStub"
    links_version: int
    problem: str = "not asked yet"
    bytes_capacity: int = 1
    started_ms: int = 0


class NodeSet:
    """The nodes behind the specs; the event loop owns it."""

    def __init__(
        self,
        specs: Sequence[str],
        *,
        links: Links | None = None,
        interval_ms: int = 1000,
        asks_live: bool = False,
    ) -> None:
        """`asks_live`: nodes are probed while they answer, too, so that a new life is noticed."""
        self._specs = [parse_spec(spec) for spec in specs]
        self._links = links or Links()
        self._interval_s = interval_ms / 1000
        self._asks_live = asks_live
        self._nodes: dict[str, _Node] = {}
        self._resolve_problem = ""
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Finds and probes the nodes once, then keeps doing so."""
        await self._refresh()
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stops watching and closes the channels."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        for node in self._nodes.values():
            await node.channel.close()
        self._nodes.clear()

    def live(self) -> list[str]:
        """Targets of the nodes that answered last time."""
        return [target for target, node in self._nodes.items() if not node.problem]

    def weights(self) -> dict[str, float]:
        """What each live node counts for in the ranking."""
        now_ms = time.time_ns() // 1_000_000
        lives = self.lives()
        oldest_age_ms = now_ms - min(lives.values(), default=now_ms)
        return {
            target: node_weight(
                self._nodes[target].bytes_capacity,
                age_ms=now_ms - started_ms,
                oldest_age_ms=oldest_age_ms,
            )
            for target, started_ms in lives.items()
        }

    def lives(self) -> dict[str, int]:
        """When each live node started, in Unix milliseconds: another number is another life."""
        return {target: n.started_ms for target, n in self._nodes.items() if not n.problem}

    @property
    def problem(self) -> str:
        """What is wrong with the nodes, or ""."""
        problems = [f"{target}: {n.problem}" for target, n in self._nodes.items() if n.problem]
        if self._resolve_problem:
            problems.append(self._resolve_problem)
        if not self._nodes and not problems:
            problems.append("no KV node found")
        return "; ".join(problems)

    async def locate(
        self, target: str, names: Sequence[bytes], *, timeout_ms: int
    ) -> list[Location]:
        """Where the node says that the names' leading part is held.

        Raises:
            KvasirError: the node does not answer.
        """
        request = kvnode_pb2.LocateRequest(names=names)
        answer = await self._ask(
            target, lambda stub: stub.Locate(request, timeout=timeout_ms / 1000)
        )
        return [Run(found.holder, found.first, found.count) for found in answer.locations]

    async def offer(
        self, target: str, request: kvnode_pb2.OfferRequest
    ) -> kvnode_pb2.OfferResponse:
        """Lets the node pull what it lacks of the blocks.

        Raises:
            KvasirError: the node does not answer or refuses.
        """
        timeout_s = request.timeout_ms / 1000 + 1
        return await self._ask(target, lambda stub: stub.Offer(request, timeout=timeout_s))

    async def load(self, target: str, names: Sequence[bytes], *, timeout_ms: int) -> int:
        """Lets the node bring these blocks into memory; how many leading ones are there then.

        Raises:
            KvasirError: the node is not known or does not answer.
        """
        request = kvnode_pb2.LoadRequest(names=names, timeout_ms=timeout_ms)
        timeout_s = timeout_ms / 1000 + LOAD_GRACE_S
        answer = await self._ask(target, lambda stub: stub.Load(request, timeout=timeout_s))
        return answer.num_leading

    async def _ask(
        self,
        target: str,
        call: Callable[["kvnode_pb2_grpc.KvNodeAsyncStub"], Awaitable[Answer]],
    ) -> Answer:
        node = self._nodes.get(target)
        if node is None:
            raise KvasirError(Reason.NO_WORKER, f"KV node {target} is gone")
        try:
            return await call(node.stub)
        except grpc.aio.AioRpcError as error:
            raise self._failed(node, target, error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # The channel was closed: that cancels its calls, not whoever waits for them.
            raise KvasirError(Reason.NO_WORKER, f"KV node {target} is gone") from None

    def _failed(self, node: _Node, target: str, error: grpc.aio.AioRpcError) -> KvasirError:
        failure = error_from_rpc(error)
        if failure.reason in _NODE_IS_AWAY:
            if not node.problem:
                log.warning("KV node %s: %s", target, failure.message)
            node.problem = failure.message
        return failure

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._refresh()

    async def _refresh(self) -> None:
        targets = await self._resolve()
        for target in set(self._nodes) - targets:
            log.info("KV node %s is gone", target)
            await self._nodes.pop(target).channel.close(CLOSE_GRACE_S)
        for target in sorted(targets - set(self._nodes))[: NODES_MAX - len(self._nodes)]:
            self._nodes[target] = self._dial(target)
        await self._renew_channels()
        asked = [(t, n) for t, n in self._nodes.items() if n.problem or self._asks_live]
        probes = [self._probe(target, node) for target, node in asked]
        await asyncio.gather(*probes)

    def _dial(self, target: str) -> _Node:
        version = self._links.version
        channel = self._links.channel(target, _CHANNEL_OPTIONS)
        return _Node(channel, kvnode_pb2_grpc.KvNodeStub(channel), version)

    async def _renew_channels(self) -> None:
        """Leaves channels that would show an earlier certificate when they connect again."""
        version = self._links.version
        for target, node in self._nodes.items():
            if node.links_version != version:
                fresh = self._dial(target)
                before, node.channel, node.stub = node.channel, fresh.channel, fresh.stub
                node.links_version = fresh.links_version
                await before.close(CLOSE_GRACE_S)

    async def _resolve(self) -> set[str]:
        """Targets behind the specs; those of a name that does not resolve now stay as they are."""
        targets: set[str] = set()
        self._resolve_problem = ""
        for spec in self._specs:
            if not spec.is_dns:
                targets.add(join_target(spec.host, spec.port))
                continue
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_MS / 1000):
                    found = await asyncio.get_running_loop().getaddrinfo(
                        spec.host, spec.port, type=socket.SOCK_STREAM
                    )
            except (OSError, TimeoutError) as error:
                self._resolve_problem = f"{spec.host} does not resolve: {error}"
                return targets | set(self._nodes)
            targets |= {join_target(str(address[0]), spec.port) for *_, address in found}
        return targets

    async def _probe(self, target: str, node: _Node) -> None:
        try:
            found = await node.stub.Describe(
                kvnode_pb2.DescribeKvNodeRequest(), timeout=PROBE_TIMEOUT_MS / 1000
            )
        except grpc.aio.AioRpcError as error:
            node.problem = error_from_rpc(error).message or "does not answer"
        else:
            if node.problem:
                log.info("KV node %s answers", target)
            node.problem = ""
            node.bytes_capacity = found.bytes_capacity
            node.started_ms = found.address.epoch
