"""KV nodes as real processes, and workers' sides of the tier, for tests."""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import IO

import grpc.aio
import numpy as np
from kvasir_kvstore._native import BlockPool, BlockServer
from kvasir_kvstore.client import KvTier
from kvasir_kvstore.core.block import KvLayout
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_kvstore.peers import DataPlane
from kvasir_proto.v1 import common_pb2, kvnode_pb2, kvnode_pb2_grpc
from kvstore_builders import fill, free_port, make_pool, random_uid, wait_until

LAYOUT = KvLayout(num_layers=4, num_kv_heads=2, head_dim=16)
PROTO_LAYOUT = common_pb2.KvLayout(
    digest=LAYOUT.digest,
    num_layers=LAYOUT.num_layers,
    block_bytes=LAYOUT.block_bytes,
    block_tokens=LAYOUT.block_tokens,
)
_RUN = """
import logging, sys
from kvasir_kvstore.node.main import run
from kvasir_kvstore.node.settings import KvNodeSettings
logging.basicConfig(level=logging.INFO)
run(KvNodeSettings.model_validate_json(sys.argv[1]))
"""


class NodeProcess:
    """One `kvasir kvnode` process; restarts on the same ports."""

    def __init__(self, **settings: object) -> None:
        ports = {"grpc_port": free_port(), "http_port": free_port(), "data_port": free_port()}
        self.settings = KvNodeSettings.model_validate({"name": "kv-0", **ports, **settings})
        self.spec = f"127.0.0.1:{self.settings.grpc_port}"
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process and waits until it is ready."""
        self.spawn()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Waits until a process that was spawned is ready."""
        wait_until(self._is_ready, self.spec, timeout_s=60)

    def spawn(self) -> None:
        """Starts the process."""
        command = [sys.executable, "-c", _RUN, self.settings.model_dump_json()]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        with contextlib.suppress(OSError):
            return self.get("/readyz")[0] == 200
        return False

    def get(self, path: str) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.settings.http_port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.startswith(name)]
        assert len(lines) == 1, lines
        return float(lines[0].split()[-1])

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wait(self, timeout_s: float = 60) -> int:
        """The exit status of a process that ends by itself."""
        assert self._process is not None
        status = self._process.wait(timeout_s)
        self._process = None
        return status

    def terminate(self, timeout_s: float = 10) -> int:
        assert self._process is not None
        self._process.terminate()
        return self.wait(timeout_s)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode()

    def close(self) -> None:
        self.kill()
        self._log.close()


@contextlib.contextmanager
def running_node(**settings: object) -> Iterator[NodeProcess]:
    node = NodeProcess(**settings)
    try:
        node.start()
        yield node
    finally:
        node.close()


@contextlib.asynccontextmanager
async def node_stub(node: NodeProcess) -> AsyncIterator["kvnode_pb2_grpc.KvNodeAsyncStub"]:
    async with grpc.aio.insecure_channel(node.spec) as channel:
        yield kvnode_pb2_grpc.KvNodeStub(channel)


async def describe(node: NodeProcess) -> kvnode_pb2.KvNodeDescription:
    async with node_stub(node) as stub:
        return await stub.Describe(kvnode_pb2.DescribeKvNodeRequest(), timeout=5)


@dataclass
class Holder:
    """A worker's pool with what serves it and its side of the tier."""

    pool: BlockPool
    server: BlockServer
    address: common_pb2.PeerAddress
    tier: KvTier
    contents: dict[bytes, np.ndarray] = field(default_factory=dict)

    def publish(self, names: list[bytes]) -> None:
        for block, name in enumerate(names, start=len(self.contents)):
            self.contents[name] = fill(self.pool, block, seed=block + 100)
            self.pool.publish(name, block)

    async def offer(self, names: list[bytes]) -> None:
        await self.tier.offer(names, self.address, PROTO_LAYOUT)
        assert await self.tier.flush(timeout_ms=20_000)


@contextlib.asynccontextmanager
async def make_holder(
    nodes: list[str],
    *,
    redis_url: str | None = None,
    num_blocks: int = 64,
    plane: DataPlane | None = None,
    replicas: int = 1,
) -> AsyncIterator[Holder]:
    plane = plane or DataPlane()
    pool = make_pool(
        num_blocks,
        num_layers=LAYOUT.num_layers,
        layer_bytes=LAYOUT.layer_bytes,
        digest=LAYOUT.digest,
        shared=bool(plane.socket_dir),
    )
    uid = random_uid()
    server = BlockServer(
        pool,
        host="127.0.0.1",
        port=0,
        uid=uid,
        epoch=1,
        socket_dir=plane.socket_dir,
        key=plane.key,
    )
    address = common_pb2.PeerAddress(
        name="w", uid=uid, epoch=1, host="127.0.0.1", data_port=server.port
    )
    tier = KvTier(pool, nodes=nodes, redis_url=redis_url, plane=plane, replicas=replicas)
    await tier.start()
    try:
        yield Holder(pool, server, address, tier)
    finally:
        await tier.close()
        await asyncio.to_thread(server.stop)
