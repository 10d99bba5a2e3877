"""The router as a process of its own: on uvloop, stopped by SIGTERM, refusing a taken port."""

import asyncio
import signal
import socket
import sys
from pathlib import Path

import aiohttp
import pytest
from fake_worker import FakeWorker, Script
from kvasir_router.main import run
from kvasir_router.settings import RouterSettings
from router_fixtures import make_model_dir

PROGRAM = """
import sys
from kvasir_router.main import run
from kvasir_router.settings import RouterSettings
run(RouterSettings.model_validate_json(sys.argv[1]))
"""


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


async def test_sigterm_finishes_the_stream_and_ends_with_0(tmp_path: Path) -> None:
    worker = await FakeWorker("a", script=Script(pause_after=3)).start()
    port = free_port()
    settings = RouterSettings(
        model=make_model_dir(tmp_path),
        model_name="tiny",
        http_port=port,
        grpc_port=0,
        workers=(worker.target,),
    )
    process = await start(settings)
    try:
        async with asyncio.timeout(30), aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
            await until_ready(http, expected=True)
            body = {"model": "tiny", "prompt": "x", "max_tokens": 300, "stream": True}
            async with http.post("/v1/completions", json=body) as response:
                await response.content.readuntil(b"\n\n")
                process.send_signal(signal.SIGTERM)
                await until_ready(http, expected=False)
                worker.resume.set()
                text = await response.text()
            assert text.count('"text":"') == 300
            assert text.endswith("data: [DONE]\n\n")
            assert await process.wait() == 0
            assert process.stderr is not None
            assert (await process.stderr.read()).decode() == ""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await worker.stop()


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
