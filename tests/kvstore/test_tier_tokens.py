"""What a model says while its KV tier fails: the tokens of a run without one, whatever happens."""

import asyncio
import contextlib
import itertools
import random
import re
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import RedisServer
from kv_fleet import NodeProcess, describe, running_node
from kvasir_kvstore._native import BlockPool, BlockServer
from kvasir_kvstore.core import fetch
from kvasir_proto.v1 import kvnode_pb2
from kvstore_builders import Wire, eventually, fill, free_port
from worker_builders import RunningWorker, make_model_dir, make_request, prompt, started

PROMPTS = [prompt(200, seed=seed) for seed in range(1, 41)]
"""Of more blocks than a worker's cache holds, so that each comes from the tier or is computed."""
CALL_S_MAX = 60
CORRUPTIONS = 1_000
"""Frames that are changed."""
LIES = 20
"""Connections to each server that stands in for the node."""
FRAME_MAGIC = b"KSVR"
FRAME_HEADER_BYTES = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _fetches_whatever_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "GAIN_MIN", 0.0)
    monkeypatch.setattr(fetch, "LOSS_SHARE_MAX", 1e9)


async def undisturbed(model: Path) -> list[list[int]]:
    """What the model says to each prompt."""
    async with started(model, "alone") as worker:
        return [(await worker.generate(make_request(ids))).tokens for ids in PROMPTS]


class Load:
    """Clients that send the prompts again and again, and compare what they get."""

    def __init__(self, worker: RunningWorker, expected: list[list[int]]) -> None:
        self._worker, self._expected = worker, expected
        self._turns = itertools.count()
        self.num_fetched = self.num_computed = 0

    async def client(self) -> None:
        while True:
            await self.one()

    async def one(self) -> None:
        """One request; RunningWorker.generate would fail if its stream were cut short."""
        index = next(self._turns) % len(PROMPTS)
        async with asyncio.timeout(CALL_S_MAX):
            result = await self._worker.generate(make_request(PROMPTS[index]))
        assert result.error is None, result.error
        assert result.tokens == self._expected[index], "wrong tokens"
        self.num_fetched += result.stats.tokens_cached_fetched
        self.num_computed += result.stats.tokens_computed

    async def more(
        self, clients: "list[asyncio.Task[None]]", *, fetched: int = 0, computed: int = 0
    ) -> None:
        """Until so many more tokens were fetched and computed; the clients must go on."""
        end = (self.num_fetched + fetched, self.num_computed + computed)

        async def counts() -> tuple[int, int]:
            for client in clients:
                if client.done():
                    client.result()
            return self.num_fetched, self.num_computed

        await eventually(counts, lambda now: now[0] >= end[0] and now[1] >= end[1], 90)


def torn(folder: Path) -> None:
    """Some of what a killed node left is changed, and its end is gone."""
    blocks = folder / "blocks"
    content = bytearray(blocks.read_bytes())
    for offset in range(100, len(content), 50_000):
        content[offset] ^= 1
    blocks.write_bytes(content[: 2 * len(content) // 3])


async def until_told(metric: Callable[[str], float], name: str) -> None:
    """Until what was done to a node has come to light."""

    async def value() -> float:
        return await asyncio.to_thread(metric, name)

    await eventually(value, lambda now: now > 0, 90)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_no_token_changes_while_a_kv_node_and_redis_die_and_a_disk_is_full(
    model: Path, own_redis: RedisServer, tmp_path: Path
) -> None:
    expected = await undisturbed(model)
    own_redis.start()
    specs = [f"127.0.0.1:{port}" for port in (free_port(), free_port())]
    nodes = [
        NodeProcess(
            name=f"kv-{i}",
            grpc_port=int(spec.rpartition(":")[2]),
            redis=own_redis.url,
            lease_ttl_ms=1500,
            kv_nodes=specs,
            disk_dir=tmp_path / str(i),
            memory_mb=1,
        )
        for i, spec in enumerate(specs)
    ]

    def restart_with_torn_files(node: NodeProcess) -> None:
        assert node.settings.disk_dir is not None
        torn(node.settings.disk_dir)
        node.start()

    try:
        for node in nodes:
            node.start()
        assert nodes[1]._process is not None
        disk_bytes = (1 << 19, 1 << 19)  # soon full
        resource.prlimit(nodes[1]._process.pid, resource.RLIMIT_FSIZE, disk_bytes)
        settings = {"kv_nodes": tuple(specs), "redis": own_redis.url, "kv_cache_mb": 1}
        async with started(model, "w", **settings) as worker:
            load = Load(worker, expected)
            clients = [asyncio.create_task(load.client()) for _ in range(3)]
            await load.more(clients, fetched=1_000)
            await asyncio.to_thread(nodes[0].kill)
            await load.more(clients, computed=600)
            await asyncio.to_thread(restart_with_torn_files, nodes[0])
            await load.more(clients, fetched=1_000)
            await asyncio.to_thread(own_redis.stop)
            await load.more(clients, fetched=400)
            await asyncio.to_thread(own_redis.start)
            await load.more(clients, fetched=400)
            await until_told(nodes[0].metric, 'kvasir_kvnode_tier_blocks_bad_total{tier="disk"}')
            assert "disk: File too large" in nodes[1].get("/readyz")[1]
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    finally:
        for node in nodes:
            node.close()


class Corruption:
    """Changes what a KV node sends, frame by frame; `counts` are of frames changed, by how.

    No more of an answer is changed once its reader must have hung up.
    """

    def __init__(self) -> None:
        self._random = random.Random(7)
        self.counts: Counter[str] = Counter()

    def __call__(self, offset: int, data: bytes) -> bytes | None:
        chance = self._random.random()
        if chance < 0.3:
            return data
        if chance < 0.34:
            self.counts["cut off"] += 1
            return None
        if chance < 0.38:
            self.counts["cut short"] += 1
            return data[: self._random.randrange(len(data))]
        if chance < 0.42:
            self.counts["halves swapped"] += 1
            middle = len(data) // 2
            return data[middle:] + data[:middle]
        if offset == 0:
            self.counts["greeting"] += 1
            return self._with_changed_bits(data, of=range(len(data)))
        return b"".join(self._changed(frames_of(data)))

    def _changed(self, frames: list[bytes]) -> list[bytes]:
        """Some payloads swapped under headers that stay, some with changed bits; then a header."""
        for i, frame in enumerate(frames):
            other = self._random.randrange(len(frames))
            chance = self._random.random()
            if len(frame) <= FRAME_HEADER_BYTES or chance < 0.3:
                continue
            if chance < 0.6 and len(frame) == len(frames[other]) and frame != frames[other]:
                frames[i], frames[other] = (
                    frame[:FRAME_HEADER_BYTES] + frames[other][FRAME_HEADER_BYTES:],
                    frames[other][:FRAME_HEADER_BYTES] + frame[FRAME_HEADER_BYTES:],
                )
                self.counts["payloads swapped"] += 1
            elif chance < 0.95:
                payload = range(FRAME_HEADER_BYTES, len(frame))
                frames[i] = self._with_changed_bits(frame, of=payload)
                self.counts["payload"] += 1
            else:
                frames[i] = self._with_changed_bits(frame, of=range(FRAME_HEADER_BYTES))
                self.counts["header"] += 1
                break
        return frames

    def _with_changed_bits(self, data: bytes, *, of: range) -> bytes:
        changed = bytearray(data)
        for at in self._random.sample(of, self._random.randint(1, min(8, len(of)))):
            changed[at] ^= 1 << self._random.randrange(8)
        return bytes(changed)


def frames_of(data: bytes) -> list[bytes]:
    """What came at once, cut before each frame."""
    starts = [match.start() for match in re.finditer(FRAME_MAGIC, data)]
    return [data[start:end] for start, end in itertools.pairwise([0, *starts, len(data)])]


@contextlib.contextmanager
def liar(
    about: kvnode_pb2.KvNodeDescription, names: list[bytes], *, digest: bytes, epoch: int
) -> Iterator[BlockServer]:
    """Serves garbage under these names as another life of the node, or of another model."""
    layout = about.layout
    pool = BlockPool(
        num_blocks=len(names),
        num_layers=layout.num_layers,
        layer_bytes=layout.block_bytes // layout.num_layers,
        layout_digest=digest,
    )
    for block, name in enumerate(names):
        fill(pool, block, seed=block)
        pool.publish(name, block)
    server = BlockServer(pool, host="127.0.0.1", port=0, uid=about.address.uid, epoch=epoch)
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_corrupted_transfers_change_no_token(model: Path) -> None:
    """Nor does an earlier life of the node that answers in its place, or another model's node."""
    expected = await undisturbed(model)
    corruption = Corruption()
    with (
        running_node(host="127.0.0.1", advertise_host="127.0.0.2", memory_mb=64) as node,
        Wire(
            node.settings.data_port, corruption, at=("127.0.0.2", node.settings.data_port)
        ) as wire,
    ):
        settings = {"kv_nodes": (node.spec,), "kv_cache_mb": 1, "fetch_timeout_ms": 200}
        async with started(model, "w", **settings) as worker:
            load = Load(worker, expected)
            for _ in PROMPTS:  # until the node has blocks
                await load.one()
            about = await describe(node)
            served = worker.host.served()
            names = [name for ids in PROMPTS for name in served.names(ids, tenant_salt=b"")]
            digest, epoch = about.layout.digest, about.address.epoch
            with (
                liar(about, names, digest=digest, epoch=epoch - 1) as stale,
                liar(about, names, digest=bytes(16), epoch=epoch) as foreign,
            ):

                def refused() -> tuple[int, int]:
                    return stale.stats()["stale_refused"], foreign.stats()["layout_refused"]

                ports = itertools.cycle([node.settings.data_port] * 3 + [stale.port, foreign.port])
                while corruption.counts.total() < CORRUPTIONS or min(refused()) < LIES:
                    wire.target = next(ports)
                    await load.one()
                assert stale.stats()["blocks_sent"] == foreign.stats()["blocks_sent"] == 0
            kinds = {"cut off", "cut short", "halves swapped", "greeting", "header", "payload"}
            assert corruption.counts.keys() == kinds | {"payloads swapped"}
            assert load.num_fetched > 0, "what was whole was used"
            assert await worker.metric("kvasir_kvtier_frames_bad_total") > CORRUPTIONS / 10
