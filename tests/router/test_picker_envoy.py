"""Requests through a real Envoy that asks the router's picker where they are to go."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from envoy_proxy import running_envoy
from fake_worker import FakeWorker, Script
from kvasir_operator.certificates import make_bundle, utc_now
from router_fixtures import RouterUnderTest, running_router

LONG = {"role": "user", "content": "x" * 200_000}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
MODES = ("full-duplex", "buffered", "headers")


@dataclass
class Gateway:
    """Two routers that know one another, and Envoy in front of them."""

    routers: list[RouterUnderTest]
    worker: FakeWorker
    urls: dict[str, str]
    http: aiohttp.ClientSession

    async def post(self, mode: str, body: Any, path: str = "/v1/chat/completions", **more: Any):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(self.urls[mode] + path, data=data, **more) as response:
            return response.status, response.headers, await response.read()

    def num_open(self) -> int:
        """Requests under way, as the picker counts them."""
        return self.routers[0].server.replicas.num_open

    def served(self) -> list[float]:
        """Answers by HTTP of each router."""
        return [_count(router, protocol="http") for router in self.routers]


def _count(router: RouterUnderTest, **labels: str) -> float:
    samples = router.server.metrics.requests.collect()[0].samples
    return sum(
        s.value for s in samples if s.name.endswith("_total") and labels.items() <= s.labels.items()
    )


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running_gateway(
    tmp_path: Path, port_of: Callable[[], int], **settings: Any
) -> AsyncIterator[Gateway]:
    async with contextlib.AsyncExitStack() as stack:
        worker = FakeWorker("w")
        grpc_ports, http_ports = [port_of(), port_of()], [port_of(), port_of()]
        routers = []
        for index, (grpc_port, http_port) in enumerate(zip(grpc_ports, http_ports, strict=True)):
            folder = tmp_path / str(index)
            folder.mkdir()
            known = () if index else (worker,)
            router = await stack.enter_async_context(
                running_router(
                    folder,
                    *known,
                    grpc_port=grpc_port,
                    http_port=http_port,
                    picker_port=0,
                    peers=tuple(f"127.0.0.1:{port}" for port in grpc_ports),
                    **({"workers": (worker.target,)} if index else {}),
                    **{"drain_timeout_ms": 100, **settings},
                )
            )
            await router.has_members("w")
            routers.append(router)
        await until(lambda: len(routers[0].server.peers.endpoints()) == 1)
        ports = {mode: port_of() for mode in MODES}
        await stack.enter_async_context(
            running_envoy(
                ports,
                picker_port=routers[0].server.picker_port,
                endpoint_ports=tuple(http_ports),
            )
        )
        http = await stack.enter_async_context(aiohttp.ClientSession())
        urls = {mode: f"http://127.0.0.1:{port}" for mode, port in ports.items()}
        yield Gateway(routers, worker, urls, http)


@pytest.fixture
async def gateway(tmp_path: Path, unused_tcp_port_factory) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path, unused_tcp_port_factory) as found:
        yield found


@pytest.mark.parametrize("mode", MODES)
async def test_whole_and_streamed_answers_come_through_and_are_accounted(
    gateway: Gateway, mode: str
) -> None:
    status, headers, body = await gateway.post(mode, CHAT)
    assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "abcde")
    assert headers["x-kvasir-decode-worker"] == "w"
    status, _, body = await gateway.post(mode, {**CHAT, "stream": True})
    assert status == 200
    assert body.endswith(b"data: [DONE]\n\n")
    status, _, body = await gateway.post(mode, CHAT | {"messages": [LONG]})
    assert status == 400, "a prompt that is too long, by the picker or by the router"
    assert json.loads(body)["error"]["code"] == "context_length_exceeded"
    async with gateway.http.get(gateway.urls[mode] + "/v1/models") as response:
        assert (await response.json())["data"][0]["id"] == "tiny"
    await until(lambda: gateway.num_open() == 0)
    assert len(gateway.worker.requests) == 2


@pytest.mark.parametrize("mode", MODES)
async def test_client_that_leaves_in_the_middle_ends_its_request_everywhere(
    gateway: Gateway, mode: str
) -> None:
    gateway.worker.script = Script(pause_after=2)
    url = gateway.urls[mode] + "/v1/chat/completions"
    async with gateway.http.post(url, json={**CHAT, "stream": True}) as response:
        assert response.status == 200
        assert await response.content.readany()
        assert gateway.num_open() == 1
        assert response.connection is not None
        response.connection.close()
    await until(lambda: gateway.num_open() == 0)
    async with asyncio.timeout(10):
        await gateway.worker.cancelled.wait()


@pytest.mark.parametrize("mode", ["full-duplex", "buffered"])
async def test_gateway_itself_refuses_what_the_core_refuses(gateway: Gateway, mode: str) -> None:
    refused = {
        b"{": (400, "invalid_request_error"),
        b'{"model": "x", "prompt": "a"}': (404, "model_not_found"),
        json.dumps({"model": "tiny", "prompt": "x" * 600}).encode(): (
            400,
            "context_length_exceeded",
        ),
        json.dumps({"model": "tiny", "prompt": "x", "n": 2}).encode(): (400, "unsupported"),
    }
    for body, expected in refused.items():
        status, headers, answer = await gateway.post(mode, body, "/v1/completions")
        error = json.loads(answer)["error"]
        assert (status, error["code"] if error["code"] != "invalid_request" else error["type"]) == (
            expected
        )
        assert headers["content-type"].startswith("application/json")
    assert gateway.served() == [0, 0], "nothing of it has come to a router"
    assert _count(gateway.routers[0], protocol="ext_proc") == len(refused)
    assert gateway.num_open() == 0


async def test_requests_with_one_prefix_meet_at_one_replica(gateway: Gateway) -> None:
    async def serve(prefix: str, num: int) -> list[float]:
        before = gateway.served()
        for index in range(num):
            body = {"model": "tiny", "prompt": prefix * 40 + str(index), "max_tokens": 1}
            status, _, _ = await gateway.post("full-duplex", body, "/v1/completions")
            assert status == 200
        return [now - then for now, then in zip(gateway.served(), before, strict=True)]

    homes = set()
    for prefix in "abcdefghijkl":
        served = await serve(prefix, 3)
        assert sorted(served) == [0, 3], prefix
        homes.add(served.index(3))
    assert homes == {0, 1}, "different prefixes spread"


async def test_full_queue_is_told_with_retry_after(gateway: Gateway) -> None:
    gateway.worker.load = {"prefill_tokens_queued": 10**9, "prefill_us_per_token": 1_000.0}
    gateway.worker.tell()
    view = gateway.routers[0].server.fleet.view
    await until(lambda: view().workers["w"].prefill_tokens_queued)
    body = {"model": "tiny", "prompt": "x" * 40, "timeout_ms": 1_000}
    status, headers, answer = await gateway.post("full-duplex", body, "/v1/completions")
    assert (status, json.loads(answer)["error"]["code"]) == (429, "overloaded")
    assert int(headers["retry-after"]) > 1
    assert gateway.served() == [0, 0]


async def test_large_body_is_passed_on_whole(gateway: Gateway) -> None:
    """What the picker hands back in pieces is what the client sent."""
    messages = [{"role": "user", "content": "hi"}]
    body = {**CHAT, "messages": messages, "user": "x" * 300_000}
    status, _, answer = await gateway.post("full-duplex", body)
    assert (status, json.loads(answer)["choices"][0]["message"]["content"]) == (200, "abcde")


async def test_client_cannot_name_the_endpoint_itself(gateway: Gateway) -> None:
    headers = {"x-gateway-destination-endpoint": f"127.0.0.1:{gateway.worker.http_port}"}
    for mode in MODES:
        status, _, answer = await gateway.post(mode, CHAT, headers=headers)
        assert (status, json.loads(answer)["object"]) == (200, "chat.completion")


async def test_replica_that_leaves_gets_no_more_requests(gateway: Gateway) -> None:
    leaving = gateway.routers[1].server
    leaving.leaving.begin()
    await until(lambda: not gateway.routers[0].server.peers.endpoints())
    for index in range(8):
        body = {"model": "tiny", "prompt": f"{index}" * 64, "max_tokens": 1}
        status, _, _ = await gateway.post("full-duplex", body, "/v1/completions")
        assert status == 200
    assert gateway.served() == [8, 0]


async def test_gateway_without_a_certificate_asks_over_tls(
    tmp_path: Path, unused_tcp_port_factory
) -> None:
    tls = tmp_path / "tls"
    tls.mkdir()
    bundle = make_bundle("chat.default.kvasir.internal", now=utc_now())
    for name, data in {
        "tls.crt": bundle.certificate,
        "tls.key": bundle.key,
        "ca.crt": bundle.ca,
    }.items():
        (tls / name).write_bytes(data)
    http_port, ports = unused_tcp_port_factory(), {"full-duplex": unused_tcp_port_factory()}
    secure = {"tls_dir": tls, "picker_tls": True, "picker_port": 0}
    async with (
        running_router(
            tmp_path,
            ready=False,
            http_port=http_port,
            **secure,
        ) as router,
        running_envoy(
            ports,
            picker_port=router.server.picker_port,
            endpoint_ports=(http_port,),
            tls=True,
        ),
        aiohttp.ClientSession(f"http://127.0.0.1:{ports['full-duplex']}") as http,
    ):
        async with http.get("/v1/models") as response:
            assert (await response.json())["data"][0]["id"] == "tiny"
        async with http.post("/v1/chat/completions", json=CHAT) as response:
            assert response.status == 503, "there is no worker"
            assert (await response.json())["error"]["code"] == "no_worker"
