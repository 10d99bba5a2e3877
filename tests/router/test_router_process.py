"""The router as a process of its own: on uvloop, stopped by SIGTERM, refusing a taken port."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
from fake_worker import FakeWorker, Script
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from kvasir_router.main import run
from kvasir_router.settings import RouterSettings
from router_fixtures import make_model_dir

COMPLETIONS = "/v1/completions"
PROGRAM = """
import sys
from kvasir_router.main import run
from kvasir_router.settings import RouterSettings
run(RouterSettings.model_validate_json(sys.argv[1]))
"""


@dataclass
class Router:
    """A process, and how it is asked."""

    process: asyncio.subprocess.Process
    http: aiohttp.ClientSession
    grpc_port: int


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


async def start(settings: RouterSettings) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, settings.model_dump_json(), stderr=asyncio.subprocess.PIPE
    )


async def until_ready(http: aiohttp.ClientSession, *, expected: bool) -> None:
    """Asks /readyz of another process until it answers as expected."""
    while True:
        try:
            async with http.get("/readyz") as response:
                is_ready = response.status == 200
        except aiohttp.ClientConnectionError:
            is_ready = False
        if is_ready == expected:
            return
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def router_process(
    folder: Path, worker: FakeWorker, **settings: int
) -> AsyncIterator[Router]:
    """A router process that is ready; `worker` is what it routes to."""
    ports = {"http_port": free_port(), "grpc_port": free_port()}
    await worker.start()
    process = await start(
        RouterSettings(
            model=make_model_dir(folder),
            model_name="tiny",
            workers=(worker.target,),
            **ports,
            **settings,
        )
    )
    url = f"http://127.0.0.1:{ports['http_port']}"
    try:
        async with asyncio.timeout(60), aiohttp.ClientSession(url) as http:
            await until_ready(http, expected=True)
            yield Router(process, http, grpc_port=ports["grpc_port"])
            assert await process.wait() == 0
            assert process.stderr is not None
            assert "Traceback" not in (await process.stderr.read()).decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await worker.stop()


async def until_refused(http: aiohttp.ClientSession) -> None:
    """Makes new connections until there is nobody to accept one."""
    while True:
        try:
            async with http.get("/healthz", headers={"Connection": "close"}):
                await asyncio.sleep(0.01)
        except aiohttp.ClientConnectorError:
            return


def asked(num_tokens: int) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "x", "max_tokens": num_tokens, "stream": True}


async def assert_whole(response: aiohttp.ClientResponse, num_tokens: int) -> None:
    text = await response.text()
    assert text.count('"text":"') == num_tokens
    assert text.endswith("data: [DONE]\n\n")


async def test_sigterm_finishes_the_stream_and_ends_with_0(tmp_path: Path) -> None:
    worker = FakeWorker("a", script=Script(pause_after=3))
    async with (
        router_process(tmp_path, worker) as router,
        router.http.post(COMPLETIONS, json=asked(300)) as response,
    ):
        await response.content.readuntil(b"\n\n")
        router.process.send_signal(signal.SIGTERM)
        await until_ready(router.http, expected=False)
        worker.resume.set()
        await assert_whole(response, 300)


async def test_new_connections_are_served_while_it_lingers_and_refused_after(
    tmp_path: Path,
) -> None:
    """Whoever has not yet heard that it stops is served, and told to go elsewhere next."""
    worker = FakeWorker("a", script=Script(pause_after=3))
    async with (
        router_process(tmp_path, worker, shutdown_linger_ms=3_600_000) as router,
        grpc.aio.insecure_channel(f"127.0.0.1:{router.grpc_port}") as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        async with router.http.get("/healthz") as response:
            assert "Connection" not in response.headers
        router.process.send_signal(signal.SIGTERM)
        await until_ready(router.http, expected=False)
        answer = await health.Check(HealthCheckRequest(), timeout=30)
        assert answer.status == HealthCheckResponse.NOT_SERVING
        async with router.http.post(COMPLETIONS, json=asked(300)) as response:
            assert response.headers["Connection"] == "close"
            await response.content.readuntil(b"\n\n")
            router.process.send_signal(signal.SIGTERM)  # a second one ends the lingering
            await until_refused(router.http)
            worker.resume.set()
            await assert_whole(response, 300)


def test_a_taken_port_and_a_missing_tokenizer_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        run(RouterSettings(model=tmp_path, model_name="tiny"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        model = make_model_dir(tmp_path)
        for ports in ({"http_port": port, "grpc_port": 0}, {"http_port": 0, "grpc_port": port}):
            with pytest.raises(OSError, match=str(port)):
                run(RouterSettings(model=model, model_name="tiny", **ports))
