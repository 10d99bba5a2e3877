"""What TLS costs between parts: `python bench/links.py --json bench/results/links.json`.

A worker's side and a router's side in one process, over loopback, with the frames of a token
stream; plain and secure rounds take turns, so that a busy machine disturbs both alike. CPU is that
of both ends together. The cost is shown as a ratio, and as a share of a decode step's time.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from aiohttp import web
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from kvasir_cli.fleet.tls import make_tls_dir
from kvasir_cli.load.machine import machine
from kvasir_proto.frames import FrameKind, encode_frame
from kvasir_proto.links import Links

ROUNDS = 40
FRAMES = 200  # of one stream
CALLS = 50
FRAME = encode_frame(FrameKind.TOKENS, b"x" * 180, token_ids=(1,), text_chars=4)  # an SSE chunk
STEP_MS = 30.0
"""Of a decode step, to compare with: SmolLM2 on two cores."""


@dataclass(frozen=True, slots=True)
class Ends:
    """A worker's servers, and what a router needs to reach them."""

    links: Links
    server: aio.Server
    url: str
    target: str

    def tls(self) -> dict[str, Any]:
        """What a request needs beside the URL."""
        secure = self.links.client_context()
        return {"ssl": secure[0], "server_hostname": secure[1]} if secure else {}


async def stream(request: web.Request) -> web.StreamResponse:
    """A token stream, a write for each token as a worker does it."""
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(FRAMES):
        await response.write(FRAME)
        await asyncio.sleep(0)
    await response.write_eof()
    return response


async def serve(links: Links) -> Ends:
    """Both servers of a worker."""
    app = web.Application()
    app.router.add_post("/internal/generate", stream)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=links.server_context()).start()
    server = aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = links.listen(server, "127.0.0.1:0")
    await server.start()
    scheme = "https" if links.is_secure else "http"
    url = f"{scheme}://127.0.0.1:{runner.addresses[0][1]}/internal/generate"
    return Ends(links, server, url, f"127.0.0.1:{port}")


async def one_stream(session: aiohttp.ClientSession, ends: Ends) -> tuple[float, float]:
    """Milliseconds to the first bytes, and CPU microseconds of a frame."""
    began, cpu = time.perf_counter(), time.process_time()
    first_ms = 0.0
    async with session.post(ends.url, data=b"r" * 4096, **ends.tls()) as response:
        async for _ in response.content.iter_any():
            first_ms = first_ms or (time.perf_counter() - began) * 1e3
    return first_ms, (time.process_time() - cpu) * 1e6 / FRAMES


async def round_of(ends: Ends) -> dict[str, float]:
    """One round: a stream on a new connection, one on a kept one, then calls over gRPC."""
    async with aiohttp.ClientSession() as session:
        new_ms, _ = await one_stream(session, ends)
        kept_ms, frame_us = await one_stream(session, ends)
    began, cpu = time.perf_counter(), time.process_time()
    async with ends.links.channel(ends.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        first_call_ms = (time.perf_counter() - began) * 1e3
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(CALLS):
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        call_us = (time.perf_counter() - began) * 1e6 / CALLS
        call_cpu_us = (time.process_time() - cpu) * 1e6 / CALLS
    return {
        "stream_first_bytes_new_connection_ms": new_ms,
        "stream_first_bytes_kept_connection_ms": kept_ms,
        "stream_cpu_us_per_frame": frame_us,
        "grpc_first_call_new_channel_ms": first_call_ms,
        "grpc_call_us": call_us,
        "grpc_call_cpu_us": call_cpu_us,
    }


async def measure() -> dict[str, Any]:
    """Medians over all rounds, plain and secure, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        links = {"plain": Links(), "tls": Links(make_tls_dir(Path(folder)))}
        ends = {kind: await serve(made) for kind, made in links.items()}
        found: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in ends}
        for _ in range(ROUNDS):
            for kind, end in ends.items():
                for name, value in (await round_of(end)).items():
                    found[kind][name].append(value)
    medians = {k: {n: statistics.median(v) for n, v in by.items()} for k, by in found.items()}
    ratios = {n: medians["tls"][n] / medians["plain"][n] for n in medians["plain"]}
    added_us = medians["tls"]["stream_cpu_us_per_frame"]
    added_us -= medians["plain"]["stream_cpu_us_per_frame"]
    return medians | {"ratio": ratios, "added_share_of_a_step": added_us / (STEP_MS * 1e3)}


def main() -> None:
    """Measure, print, and write if told where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json
    found = uvloop.run(measure())
    for name, ratio in found["ratio"].items():
        plain, tls = found["plain"][name], found["tls"][name]
        print(f"{name:40} plain {plain:9.2f}  tls {tls:9.2f}  ratio {ratio:5.2f}")
    print(f"added CPU per token: {found['added_share_of_a_step']:.2%} of a step of {STEP_MS} ms")
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
