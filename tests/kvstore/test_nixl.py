"""Pulls whose bytes NIXL moves between two processes, by UCX over TCP and shared memory.

They run where NIXL is installed (`pip install kvasir[nixl]`); what is the data plane's own part of
it is tested everywhere (test_remote_reads.py).
"""

import importlib.util
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from kvasir_kvstore._native import BlockClient, BlockServer
from kvasir_kvstore.nixl import STAGES, NixlReads
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_proto.errors import KvasirError, Reason
from kvstore_builders import EPOCH, UID, fill, make_pool, name_of
from pydantic import ValidationError

LAYERS, LAYER_BYTES, BLOCKS = 4, 64 << 10, 4

needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None,
    reason="NIXL is not installed: pip install kvasir[nixl]",
)


def _own(pipe: Connection) -> None:
    """An owner's process: publishes its blocks, then does what it is told."""
    pool = make_pool(BLOCKS, num_layers=LAYERS, layer_bytes=LAYER_BYTES)
    reads = NixlReads(pool)
    server = BlockServer(
        pool, host="127.0.0.1", port=0, uid=UID, epoch=EPOCH, remote_agent=reads.agent
    )
    for block in range(BLOCKS):
        fill(pool, block, seed=block)
        pool.publish(name_of(block), block)
    pipe.send(server.port)
    while (told := pipe.recv()) != "end":
        if told == "spoil":
            pool.data[0, -1] ^= 1
        if told == "hand off":
            pool.open_session(1)
            pool.extend_session(1, [2, 3])
            pool.finish_session(1)
        pipe.send("done")
    server.stop()


class Owner:
    def __init__(self, pipe: Connection, process: multiprocessing.process.BaseProcess) -> None:
        self._pipe, self._process = pipe, process
        self.port: int = pipe.recv()

    def tell(self, what: str) -> None:
        self._pipe.send(what)
        assert self._pipe.recv() == "done"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


@pytest.fixture(params=["tcp", "all"])
def owner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Owner]:
    """`tcp`: UCX as between two nodes without RDMA."""
    monkeypatch.setenv("UCX_TLS", request.param)
    monkeypatch.setenv("NIXL_LOG_LEVEL", "ERROR")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_own, args=(theirs,), daemon=True)
    process.start()
    owner = Owner(ours, process)
    yield owner
    if process.is_alive():
        ours.send("end")
        process.join(10)
    process.kill()


@contextmanager
def reader() -> Iterator[tuple[BlockClient, np.ndarray, np.ndarray]]:
    pool = make_pool(BLOCKS, num_layers=LAYERS, layer_bytes=LAYER_BYTES)
    client = BlockClient(pool, remote=NixlReads(pool))
    try:
        yield client, pool.data, pool.ready
    finally:
        client.close()


def content(block: int) -> np.ndarray:
    size = LAYERS * LAYER_BYTES
    return np.random.default_rng(block).integers(0, 256, size, dtype=np.uint8)


@needs_nixl
def test_nixl_moves_blocks_and_what_it_brings_is_verified(owner: Owner) -> None:
    names = [name_of(block) for block in range(BLOCKS)]
    peer = {"host": "127.0.0.1", "port": owner.port, "uid": UID}
    with reader() as (client, data, ready):
        result = client.pull_named(
            **peer, epoch=EPOCH, names=names, blocks=[0, 1, 2, 3], timeout_ms=60_000
        )
        assert (result.blocks_ok, result.error) == ([True] * BLOCKS, "")
        assert result.transport == "nixl"
        for block in range(BLOCKS):
            assert np.array_equal(data[block], content(block))
        owner.tell("hand off")
        result = client.pull_session(
            **peer, epoch=EPOCH, session_id=1, blocks=[1, 0], timeout_ms=60_000
        )
        assert (result.blocks_ok, result.error) == ([True, True], "")
        assert np.array_equal(data[1], content(2))
        assert np.array_equal(data[0], content(3))
        owner.tell("spoil")
        result = client.pull_named(
            **peer, epoch=EPOCH, names=names, blocks=[0, 1, 2, 3], timeout_ms=60_000
        )
        assert (result.blocks_ok, result.error) == ([False, True, True, True], "bad_frame")
        assert ready.tolist() == [0, LAYERS, LAYERS, LAYERS]
        result = client.pull_named(
            **peer, epoch=EPOCH + 1, names=names, blocks=[0, 1, 2, 3], timeout_ms=60_000
        )
        assert (result.blocks_ok, result.error) == ([False] * BLOCKS, "stale_peer")


@needs_nixl
def test_an_owner_that_dies_ends_the_pull(owner: Owner) -> None:
    peer = {"host": "127.0.0.1", "port": owner.port, "uid": UID, "epoch": EPOCH}
    with reader() as (client, _data, ready):
        first = client.pull_named(**peer, names=[name_of(0)], blocks=[0], timeout_ms=60_000)
        assert first.blocks_ok == [True]
        owner.kill()
        result = client.pull_named(**peer, names=[name_of(1)], blocks=[1], timeout_ms=60_000)
        assert (result.blocks_ok, result.error) == ([False], "unreachable")
        assert ready[1] == 0


@needs_nixl
def test_a_peer_that_nixl_does_not_reach_is_a_failure_that_ends() -> None:
    """A read of a peer whose process has gone, as when it dies after its frames were sent."""
    ended = False
    pool = make_pool(BLOCKS, num_layers=LAYERS, layer_bytes=LAYER_BYTES)
    reads = NixlReads(pool)
    gone = NixlReads(make_pool())
    agent, address = gone.agent, gone._pool.data.ctypes.data
    del gone
    assert reads.read(b"not an agent", [(address, 256)], 10_000, lambda: ended) == 0
    assert reads.read(agent, [(address, 256)], 300, lambda: ended) == 0
    ended = True
    assert reads.read(agent, [(address, 256)], 10_000, lambda: ended) == 0


@needs_nixl
def test_a_pool_can_be_read_by_its_own_process() -> None:
    """What a worker does before it is ready."""
    pool = make_pool(BLOCKS, num_layers=LAYERS, layer_bytes=LAYER_BYTES)
    reads = NixlReads(pool)
    expected = fill(pool, 1, seed=5)
    address = int(pool.data[1].ctypes.data)
    stage = reads.read(reads.agent, [(address, 100), (address + 100, 100)], 10_000, lambda: False)
    assert stage in [int(row.ctypes.data) for row in reads._stages]
    row = next(row for row in reads._stages if row.ctypes.data == stage)
    assert np.array_equal(row[:200], expected[:200])
    reads.release(stage)


def test_without_nixl_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr("kvasir_kvstore.nixl.importlib.import_module", fail)
    with pytest.raises(KvasirError, match=r"NIXL does not work here: no nixl\._api") as caught:
        NixlReads(make_pool())
    assert caught.value.reason == Reason.UNSUPPORTED


class BrokenAgent:
    """Of a library that raises errors of no kind that it names."""

    name = "reader"

    def register_memory(self, *_args: object) -> None:
        pass

    def get_agent_metadata(self) -> bytes:
        return b"reader"

    def get_xfer_descs(self, *_args: object) -> None:
        raise RuntimeError("std::exception")


def test_no_error_costs_staging_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvasir_kvstore.nixl.new_agent", BrokenAgent)
    reads = NixlReads(make_pool())
    for _ in range(2 * STAGES):
        assert reads.read(b"reader", [(1, 1)], 10_000, lambda: False) == 0
    assert len(reads._free) == STAGES


def test_nixl_and_a_key_exclude_one_another(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_bytes(bytes(range(32)))
    settings = KvNodeSettings(name="a", kv_transport="nixl")
    assert settings.data_plane.is_nixl
    with pytest.raises(ValidationError, match="does not encrypt"):
        KvNodeSettings(name="a", kv_transport="nixl", kv_key_file=key_file)
