"""A KV node with an object store: moto's server, which speaks S3, as a process of its own."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import obstore
import pytest
from kv_fleet import LAYOUT, NodeProcess, describe, make_holder, running_node
from kvasir_kvstore.node.object_store import open_store
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_proto.v1 import kvnode_pb2
from kvstore_builders import eventually, free_port, wait_until
from pydantic import ValidationError

BLOCKS_OF_ONE_MIB = (1 << 20) // LAYOUT.block_bytes
URL = "s3://blocks/kv"


class S3Server:
    """Keeps its objects only while it runs."""

    def __init__(self, folder: Path) -> None:
        self._port = free_port()
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._log = folder / "s3.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-p", str(self._port)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._has_bucket, "the S3 server", timeout_s=60)

    def _has_bucket(self) -> bool:
        request = urllib.request.Request(f"{self.endpoint}/blocks", method="PUT")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def put(self, key: str) -> None:
        """An object under any key."""
        url = f"{self.endpoint}/blocks/{key}"
        with urllib.request.urlopen(urllib.request.Request(url, b"x", method="PUT"), timeout=5):
            pass

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    server = S3Server(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.stop()


async def store_of(node: NodeProcess) -> kvnode_pb2.TierDescription:
    (tier,) = (await describe(node)).tiers
    return tier


async def fetch(node: NodeProcess, names: list[bytes], contents: dict[bytes, np.ndarray]) -> int:
    """Fetches into a fresh worker: how many came; every one must be right."""
    async with make_holder([node.spec], num_blocks=len(names)) as worker:
        blocks = list(range(len(names)))
        result = await worker.tier.locate_and_fetch(names, blocks, timeout_ms=30_000)
        for block, name in zip(blocks[: result.num_fetched_leading], names, strict=False):
            assert np.array_equal(worker.pool.data[block], contents[name]), "a wrong block"
        return result.num_fetched_leading


async def test_blocks_outlive_the_node_in_the_store_and_a_changed_one_is_a_miss(
    s3: S3Server,
) -> None:
    names = [os.urandom(16) for _ in range(4)]
    settings = {"store_url": URL, "store_endpoint": s3.endpoint}
    with running_node(**settings) as node:
        async with make_holder([node.spec]) as worker:
            worker.publish(names)
            await worker.offer(names)
            await eventually(
                lambda: store_of(node), lambda tier: tier.blocks_written == 4, timeout_s=30
            )
            node.kill()
            store = open_store(URL, s3.endpoint)
            (page,) = obstore.list(store)
            (path,) = [entry["path"] for entry in page if entry["path"].endswith(names[3].hex())]
            body = bytearray(bytes(await (await obstore.get_async(store, path)).bytes_async()))
            body[-5] ^= 1
            await obstore.put_async(store, path, bytes(body))
            node.start()
            other = [os.urandom(16)]
            worker.publish(other)
            await worker.offer(other)  # says which layout there is
            await eventually(
                lambda: store_of(node), lambda tier: tier.blocks_used >= 4, timeout_s=30
            )
            assert await fetch(node, names, worker.contents) == 3
            tier = await store_of(node)
            assert (tier.blocks_read, tier.blocks_bad, tier.problem) == (3, 1, "")


async def test_objects_that_are_no_blocks_are_passed_over_and_counted(s3: S3Server) -> None:
    names = [os.urandom(16) for _ in range(3)]
    settings = {"store_url": URL, "store_endpoint": s3.endpoint}
    with running_node(**settings) as node:
        async with make_holder([node.spec]) as worker:
            worker.publish(names)
            await worker.offer(names)
            await eventually(
                lambda: store_of(node), lambda tier: tier.blocks_written == 3, timeout_s=30
            )
            node.kill()
            store = open_store(URL, s3.endpoint)
            (page,) = obstore.list(store)
            folder, _, _ = page[0]["path"].rpartition("/")
            # A read-me, names too short and too long, one of a block that is none.
            foreign = ["README", "00/00/00", f"{folder}/00", f"{folder}/{os.urandom(20).hex()}"]
            foreign.append(f"{folder}/{os.urandom(16).hex()}")
            root = LAYOUT.digest.hex()
            for key in foreign:
                path = key if key.startswith(root) else f"{root}/{key}"
                await obstore.put_async(store, path, b"x" * 100)
            node.start()
            other = [os.urandom(16)]
            worker.publish(other)
            await worker.offer(other)  # says which layout there is
            found = await eventually(
                lambda: store_of(node), lambda tier: tier.objects_foreign == 5, timeout_s=30
            )
            assert found.problem == ""
            await eventually(
                lambda: store_of(node), lambda tier: tier.blocks_used == 4, timeout_s=30
            )
            # Much grows where a block was: it is not even read.
            await obstore.put_async(store, page[0]["path"], bytes(1 << 20))
            bad = bytes.fromhex(page[0]["path"].rpartition("/")[2])
            assert await fetch(node, [bad], worker.contents) == 0
            assert "has 1048576 bytes" in node.log()
            left = [name for name in names if name != bad]
            assert await fetch(node, left, worker.contents) == 2
            # A path that no S3 client of its kind can name does not keep blocks from being used.
            s3.put(f"kv/{root}/../x")
            node.kill()
            node.start()
            await worker.offer([*left, *other])
            await eventually(lambda: store_of(node), lambda tier: "no block" in tier.problem, 30)
            assert await fetch(node, other, worker.contents) == 1


async def test_an_outage_is_told_of_and_ends_by_itself(s3: S3Server) -> None:
    names = [os.urandom(16) for _ in range(18)]
    settings = {"store_url": URL, "store_endpoint": s3.endpoint}
    with running_node(**settings) as node:
        async with make_holder([node.spec]) as worker:
            worker.publish(names)
            await worker.offer(names[:4])
            await eventually(
                lambda: store_of(node), lambda tier: tier.blocks_written == 4, timeout_s=30
            )
            s3.stop()
            await worker.offer(names[4:16])
            tier = await eventually(
                lambda: store_of(node), lambda tier: tier.blocks_dropped == 12, timeout_s=60
            )
            assert "store" in tier.problem
            assert (await describe(node)).degraded == [tier.problem]
            assert await fetch(node, names[:16], worker.contents) == 16, "memory serves on"
            s3.start()
            await eventually(lambda: store_of(node), lambda tier: not tier.problem, timeout_s=60)
            await worker.offer(names[16:])
            await eventually(
                lambda: store_of(node), lambda tier: tier.blocks_written == 6, timeout_s=30
            )


@pytest.mark.parametrize("url", ["http://bucket", "s3://"], ids=["scheme", "bucket"])
def test_a_url_that_is_not_of_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="s3://BUCKET"):
        KvNodeSettings(name="n", store_url=url)
