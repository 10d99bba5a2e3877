"""What KV nodes hold makes estimates smaller, and a node that is lost is forgotten."""

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc.aio
import pytest
from fake_worker import FakeWorker
from kvasir_kvstore._native import BlockPool, BlockServer
from kvasir_kvstore.core import block
from kvasir_proto.v1 import common_pb2, inference_pb2, kvnode_pb2, kvnode_pb2_grpc
from kvasir_router.settings import RouterSettings
from pydantic import ValidationError
from router_fixtures import RouterUnderTest, running_router

LAYOUT = block.KvLayout(num_layers=2, num_kv_heads=1, head_dim=16)
IDS = tuple(range(200))
NAMES = block.chain(block.root(b"f" * 16, b""), IDS)
COMPUTED_MS, FETCHED_MS = 200.0, 27.2  # 200 tokens of 1 ms; 8 of these and 192 of 0.1 ms
ASKED = inference_pb2.InferenceRequest(
    model="tiny",
    tokens=inference_pb2.TokenIds(ids=IDS),
    sampling=common_pb2.SamplingParams(max_tokens=2),
)


class Node:
    """A KV node process; restarts on the same port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.spec = f"127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    def _spawn(self) -> None:
        code = "from kvasir_cli.main import main; main()"
        arguments = ["kvnode", "--name", "kv-0", f"--grpc-port={self._port}", "--memory-mb", "4"]
        self._process = subprocess.Popen([sys.executable, "-c", code, *arguments])

    async def start(self) -> None:
        """Starts the process and waits until it answers."""
        self._spawn()
        async with grpc.aio.insecure_channel(self.spec) as channel:
            await kvnode_pb2_grpc.KvNodeStub(channel).Describe(
                kvnode_pb2.DescribeKvNodeRequest(), timeout=60, wait_for_ready=True
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def offer(self, names: list[bytes]) -> None:
        """Gives the node these blocks."""
        pool = BlockPool(
            num_blocks=len(names),
            num_layers=LAYOUT.num_layers,
            layer_bytes=LAYOUT.layer_bytes,
            layout_digest=LAYOUT.digest,
        )
        for index, name in enumerate(names):
            pool.ready[index] = LAYOUT.num_layers
            pool.publish(name, index)
        uid = os.urandom(16)
        server = BlockServer(pool, host="127.0.0.1", port=0, uid=uid, epoch=1)
        source = common_pb2.PeerAddress(
            name="w", uid=uid, epoch=1, host="127.0.0.1", data_port=server.port
        )
        layout = common_pb2.KvLayout(
            digest=LAYOUT.digest,
            num_layers=LAYOUT.num_layers,
            block_bytes=LAYOUT.block_bytes,
            block_tokens=LAYOUT.block_tokens,
        )
        async with grpc.aio.insecure_channel(self.spec) as channel:
            answer = await kvnode_pb2_grpc.KvNodeStub(channel).Offer(
                kvnode_pb2.OfferRequest(source=source, layout=layout, names=names), timeout=20
            )
        server.stop()
        assert answer.num_pulled == len(names)


@pytest.fixture
def node(unused_tcp_port: int) -> Iterator[Node]:
    found = Node(unused_tcp_port)
    yield found
    found.kill()


@contextlib.asynccontextmanager
async def running(folder: Path, node: Node) -> AsyncIterator[RouterUnderTest]:
    """A router with two prefill workers that have measured what fetching costs."""
    load = {"prefill_us_per_token": 1_000.0, "store_us_per_token": 100.0}
    workers = [FakeWorker(f"p{i}", "prefill", load=load) for i in range(2)]
    async with running_router(
        folder,
        *workers,
        FakeWorker("d0", "decode"),
        kv_nodes=(node.spec,),
        silence_timeout_ms=10_000,
    ) as router:
        yield router


def knows(router: RouterUnderTest, num_blocks: int) -> Callable[[], bool]:
    """Whether the router knows a KV node, and that it holds so many of the prompt's blocks."""
    view = router.server.fleet.view()

    def known() -> bool:
        runs = view.prefix.match(NAMES, view.stores)
        return [runs[store] for store in view.stores] == [num_blocks]

    return known


async def routed(router: RouterUnderTest) -> inference_pb2.RouteDecision:
    decision = await router.stub.Route(ASKED, timeout=10)
    assert sorted(c.worker for c in decision.candidates) == ["p0", "p1"]
    return decision


def estimates(decision: inference_pb2.RouteDecision) -> list[float]:
    return [round(candidate.ttft_estimate_ms, 3) for candidate in decision.candidates]


async def test_blocks_that_only_a_kv_node_holds_make_both_candidates_faster(
    tmp_path: Path, node: Node
) -> None:
    async with running(tmp_path, node) as router:
        assert estimates(await routed(router)) == [COMPUTED_MS] * 2
        await node.start()
        await router.until(knows(router, 0))
        await node.offer(NAMES)
        await router.until(knows(router, len(NAMES)))
        decisions = [await routed(router) for _ in range(20)]
        for decision in decisions:
            assert estimates(decision) == [FETCHED_MS] * 2
            assert decision.reason == "less_loaded", "neither has it: no preference"
        assert {decision.prefill_worker for decision in decisions} == {"p0", "p1"}


async def test_lost_kv_node_is_forgotten_and_found_again(tmp_path: Path, node: Node) -> None:
    async with running(tmp_path, node) as router:
        await node.start()
        await router.until(knows(router, 0))
        await node.offer(NAMES)
        await router.until(knows(router, len(NAMES)))
        view = router.server.fleet.view()
        node.kill()
        await router.until(lambda: not view.stores)
        await router.until(lambda: not view.prefix.leading(NAMES))
        assert estimates(await routed(router)) == [COMPUTED_MS] * 2
        async with router.http.get("/readyz") as response:
            assert response.status == 200
            degraded = (await response.json())["degraded"]
        (fault,) = degraded
        assert fault.startswith(f"KV node {node.spec}: unreachable")
        assert await router.chat_text(max_tokens=3) == "abc"
        await node.start()
        await router.until(knows(router, 0))


async def test_router_is_ready_without_its_kv_nodes(tmp_path: Path, node: Node) -> None:
    async with running(tmp_path, node) as router:
        async with router.http.get("/readyz") as response:
            assert response.status == 200
        async with router.http.get("/metrics") as response:
            assert "kvasir_router_kv_nodes 0.0" in await response.text()
        assert await router.chat_text(max_tokens=3) == "abc"


def test_malformed_kv_node_addresses_are_refused() -> None:
    with pytest.raises(ValidationError, match="neither HOST:PORT"):
        RouterSettings(model=Path("m"), model_name="m", kv_nodes=("kv-0",))
