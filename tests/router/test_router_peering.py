"""Router replicas tell one another which keys are extended, and need nobody for it."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from fake_worker import FakeWorker, random_name
from kvasir_proto.v1 import peering_pb2, peering_pb2_grpc
from kvasir_router.core.exchange import RECORDS_MAX, Edge, EdgeRecord
from kvasir_router.core.keys import KeyTree
from kvasir_router.peering.wire import from_messages, to_messages
from router_fixtures import RouterUnderTest, running_router

ORIGIN = b"o" * 16


def keys_of(router: RouterUnderTest) -> KeyTree:
    return router.server.fleet.view().keys


def hot(keys: KeyTree, *, children: int = 40) -> tuple[bytes, ...]:
    """Makes a prefix so hot that its key is extended; names of one prompt below it."""
    prefix = (random_name(), random_name())
    for index in range(children * 4):
        keys.observe((*prefix, random_name(), random_name()), num_workers=8, now_ms=index)
    return (*prefix, random_name(), random_name())


async def until(condition) -> None:
    async with asyncio.timeout(15):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_extended_keys_reach_the_other_replica_and_it_survives_alone(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    async with contextlib.AsyncExitStack() as stack:
        first_stack = await stack.enter_async_context(contextlib.AsyncExitStack())
        first = await first_stack.enter_async_context(running_router(folders[0], ready=False))
        peer = f"127.0.0.1:{first.server.grpc_port}"
        second = await stack.enter_async_context(
            running_router(folders[1], ready=False, peers=(peer,))
        )
        names = hot(keys_of(first))
        depth = keys_of(first).depth(names)
        assert depth > keys_of(KeyTreeHolder()).depth(names), "it is extended"
        await until(lambda: keys_of(second).depth(names) == depth)
        assert second.server.peers.num_connected == 1
        await first_stack.aclose()
        await until(lambda: second.server.peers.num_connected == 0)
        assert keys_of(second).depth(names) == depth, "what was learned stays"


class KeyTreeHolder:
    """A router that has seen nothing."""

    def __init__(self) -> None:
        tree = KeyTree()
        view = type("View", (), {"keys": tree})
        fleet = type("Fleet", (), {"view": staticmethod(lambda: view)})
        self.server = type("Server", (), {"fleet": fleet})


async def test_replica_that_meets_itself_lets_go(tmp_path: Path, unused_tcp_port: int) -> None:
    peer = f"127.0.0.1:{unused_tcp_port}"
    async with running_router(
        tmp_path, ready=False, grpc_port=unused_tcp_port, peers=(peer,)
    ) as router:
        await until(lambda: all(task.done() for task in router.server.peers._tasks.values()))
        assert router.server.peers.num_connected == 0


async def test_stream_tells_of_changes_and_gives_signs_of_life(tmp_path: Path) -> None:
    async with running_router(tmp_path, ready=False) as router:
        stub = peering_pb2_grpc.RouterPeerStub(router.channel)
        call = stub.WatchKeys(peering_pb2.WatchKeysRequest(), timeout=20)
        first = await call.read()
        assert len(first.replica) == 16
        assert not first.records
        assert not (await call.read()).records
        hot(keys_of(router))
        while not (news := await call.read()).records:
            pass
        assert keys_of(router).num_extended >= len(news.records) > 0
        call.cancel()


def test_records_survive_the_wire() -> None:
    records = [
        EdgeRecord(random_name(), Edge(5, random_name()), 3, ORIGIN),
        EdgeRecord(random_name(), None, 4, ORIGIN),
    ]
    assert list(from_messages(to_messages(records))) == records


@pytest.mark.parametrize(
    "change",
    [
        {"name": b"short"},
        {"end": b""},
        {"depth": 1},
        {"depth": 5_000},
        {"version": 0},
        {"version": 2**60},
        {"origin": b""},
    ],
    ids=lambda change: next(iter(change)),
)
def test_malformed_record_of_a_peer_is_left_out(change: dict) -> None:
    (sound,) = to_messages([EdgeRecord(random_name(), Edge(5, random_name()), 3, ORIGIN)])
    assert len(list(from_messages([sound]))) == 1
    for field, value in change.items():
        setattr(sound, field, value)
    assert not list(from_messages([sound]))


def test_peer_that_sends_too_much_is_cut_off() -> None:
    (sound,) = to_messages([EdgeRecord(random_name(), None, 3, ORIGIN)])
    assert len(list(from_messages([sound] * (RECORDS_MAX + 1)))) == RECORDS_MAX


async def test_worker_without_events_is_known_by_what_was_sent_to_it(tmp_path: Path) -> None:
    worker = FakeWorker("w0", "both", blocks_unannounced=True)
    async with running_router(tmp_path, worker) as router:
        long = [{"role": "user", "content": "a long question " * 10}]
        for _ in range(2):
            await router.openai.chat.completions.create(model="tiny", messages=long, max_tokens=2)
        fleet = await router.stub.Fleet(_fleet_request(), timeout=10)
        (member,) = fleet.members
        assert member.blocks_known == 5
        assert member.ttft_factor > 0


def _fleet_request():
    from kvasir_proto.v1 import inference_pb2

    return inference_pb2.FleetRequest()
