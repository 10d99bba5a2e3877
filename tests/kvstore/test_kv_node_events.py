"""A KV node tells its watchers what it holds: a snapshot, then every change, then its end."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable

import grpc.aio
from kv_fleet import LAYOUT, NodeProcess, make_holder, node_stub, running_node
from kvasir_proto.v1 import kvnode_pb2

BLOCKS_OF_ONE_MIB = (1 << 20) // LAYOUT.block_bytes


class Watched:
    """What a watcher of a node knows."""

    def __init__(self, call: "grpc.aio.UnaryStreamCall") -> None:
        self._call = call
        self.held: set[bytes] = set()
        self.sequence = 0

    async def until(self, condition: Callable[[], bool]) -> None:
        """Applies events until a condition holds."""
        async with asyncio.timeout(20):
            while not condition():
                event = await self._call.read()
                assert event.sequence == self.sequence + 1
                assert event.snapshot == (event.sequence == 1)
                self.sequence = event.sequence
                self.held -= set(event.removed)
                self.held |= set(event.stored)

    async def end(self) -> object:
        """Reads on until the stream is over."""
        async with asyncio.timeout(20):
            while (event := await self._call.read()) is not grpc.aio.EOF:
                assert isinstance(event, kvnode_pb2.KvNodeEvent)
        return await self._call.code()


@contextlib.asynccontextmanager
async def watched(node: NodeProcess) -> AsyncIterator[Watched]:
    async with node_stub(node) as stub:
        call = stub.WatchEvents(kvnode_pb2.WatchKvNodeRequest(load_interval_ms=50))
        yield Watched(call)
        call.cancel()


def make_names(count: int) -> list[bytes]:
    return [os.urandom(16) for _ in range(count)]


async def test_watchers_know_what_a_node_holds_and_hear_of_its_end() -> None:
    names, later = make_names(5), make_names(3)
    with running_node(memory_mb=1) as node:
        async with make_holder([node.spec]) as a, watched(node) as early:
            a.publish([*names, *later])
            await a.offer(names)
            await early.until(lambda: early.held == set(names))
            async with watched(node) as late:
                await late.until(lambda: late.held == set(names))
                assert late.sequence == 1, "the snapshot has them all"
                await a.offer(later)
                for watcher in (early, late):
                    await watcher.until(lambda w=watcher: w.held == {*names, *later})
                ended = asyncio.create_task(late.end())
                assert await asyncio.to_thread(node.terminate) == 0
                assert await ended is grpc.StatusCode.OK


async def test_blocks_given_up_for_others_are_told() -> None:
    first, rest = make_names(4), make_names(BLOCKS_OF_ONE_MIB)
    with running_node(memory_mb=1, memory_high=1) as node:
        num_blocks = len(first) + len(rest)
        async with make_holder([node.spec], num_blocks=num_blocks) as a, watched(node) as watcher:
            a.publish([*first, *rest])
            await a.offer(first)
            await watcher.until(lambda: watcher.held == set(first))
            await a.offer(rest)
            await watcher.until(lambda: watcher.held == set(rest))
