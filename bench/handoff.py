"""What a hand-off costs: a prompt prefilled elsewhere beside one prefilled where it is decoded.

Three worker processes: one of role both, and two of role decode that pull its KV over shared memory
and over TCP. The same process computes both prompts of a pair, one that it decodes itself and one
that it hands off, whichever first in turn; all prompts are new, and what was handed off must go on
with the tokens that the first worker says when asked afterwards. TTFT is to the first token's
frame, `second_ms` to the second one's, which needs all KV where it is decoded.

    python bench/handoff.py --model DIR --json bench/results/handoff.json
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import aiohttp
import grpc.aio
from kvasir_cli.fleet.ports import free_ports
from kvasir_cli.load.machine import machine
from kvasir_proto.frames import FrameDecoder, FrameKind
from kvasir_proto.v1 import common_pb2, worker_pb2, worker_pb2_grpc

HOST = "127.0.0.1"
OUTPUT_TOKENS = 4
WARM_UP_TOKENS = 256
TOKEN_IDS = range(1_000, 40_000)
START_S = 180.0
REQUEST_MS = 120_000
PATHS = ("shm", "tcp")
"""How KV gets to where it is decoded."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One process that serves."""

    url: str
    address: common_pb2.PeerAddress


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer; times in ms since the request was sent."""

    ttft_ms: float
    second_ms: float
    tokens: tuple[int, ...]
    stats: common_pb2.RequestStats


@contextmanager
def process(arguments: dict[str, object]) -> Iterator[None]:
    """A worker process, until the end."""
    options = [f"--{name}={value}" for name, value in arguments.items()]
    with Popen([sys.executable, "-m", "kvasir_cli", "worker", *options], stderr=DEVNULL) as worker:
        try:
            yield
        finally:
            worker.kill()


@asynccontextmanager
async def fleet(args: argparse.Namespace) -> AsyncIterator[dict[str, Worker]]:
    """The workers, by name, ready."""
    roles = {"both": "both", "shm": "decode", "tcp": "decode"}
    source = random.Random(os.getpid())
    ports = free_ports(HOST, 2 * len(roles), avoid=frozenset(), source=source)
    with ExitStack() as stack:
        sockets = stack.enter_context(tempfile.TemporaryDirectory())
        for i, (name, role) in enumerate(roles.items()):
            arguments: dict[str, object] = {
                "model": args.model,
                "model-name": "bench",
                "name": name,
                "role": role,
                "grpc-port": ports[2 * i],
                "http-port": ports[2 * i + 1],
                "kv-cache-mb": args.kv_cache_mb,
                "weights": args.weights,
                "threads": args.threads,
            }
            if name != "tcp":
                arguments["kv-socket-dir"] = sockets
            stack.enter_context(process(arguments))
        async with asyncio.timeout(START_S):
            yield {name: await ready(*ports[2 * i : 2 * i + 2]) for i, name in enumerate(roles)}


async def ready(grpc_port: int, http_port: int) -> Worker:
    """A worker, once it serves."""
    url = f"http://{HOST}:{http_port}"
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}/readyz") as response:
                    if response.status == 200:
                        break
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.1)
    async with grpc.aio.insecure_channel(f"{HOST}:{grpc_port}") as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        about = await stub.Describe(worker_pb2.DescribeRequest(), timeout=10)
    return Worker(url, about.address)


async def ask(
    session: aiohttp.ClientSession,
    worker: Worker,
    prompt: list[int],
    peer: common_pb2.PeerAddress | None,
) -> Timed:
    """One greedy request, timed from here. Raises RuntimeError if the worker refuses."""
    request = worker_pb2.GenerateRequest(
        request_id=f"bench-{random.getrandbits(48)}",
        token_ids=prompt,
        sampling=common_pb2.SamplingParams(
            temperature=0, top_p=1, max_tokens=OUTPUT_TOKENS, ignore_eos=True
        ),
        format=worker_pb2.STREAM_FORMAT_GRPC,
        timeout_ms=REQUEST_MS,
        model="bench",
        prefill_peer=peer,
    )
    decoder, tokens, at_ms, done = FrameDecoder(), list[int](), list[float](), b""
    body, started_s = request.SerializeToString(), time.monotonic()
    async with session.post(f"{worker.url}/internal/generate", data=body) as response:
        async for data in response.content.iter_any():
            now_ms = (time.monotonic() - started_s) * 1000
            for frame in decoder.feed(data):
                if frame.kind is FrameKind.ERROR:
                    raise RuntimeError(common_pb2.Error.FromString(frame.payload).message)
                tokens += frame.token_ids()
                at_ms += [now_ms] * len(frame.token_ids())
                done = frame.payload if frame.kind is FrameKind.DONE else done
        if response.status != 200 or len(tokens) != OUTPUT_TOKENS:
            raise RuntimeError(f"status {response.status}, {len(tokens)} tokens")
    stats = worker_pb2.GenerateChunk.FromString(done).stats
    return Timed(at_ms[0], at_ms[1], tuple(tokens), stats)


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per length of prompt and path."""
    rows = []
    async with fleet(args) as workers, aiohttp.ClientSession() as session:
        both = workers["both"]
        for num_tokens in args.prompt:
            pairs = defaultdict[str, list[tuple[Timed, Timed]]](list)
            for turn in range(1 + args.repetitions):
                for path in args.path:
                    length = num_tokens if turn else min(num_tokens, WARM_UP_TOKENS)
                    timed = {}
                    for name in (path, "both") if turn % 2 else ("both", path):
                        source = random.Random(f"{num_tokens}/{turn}/{path}/{name}")
                        prompt = source.choices(TOKEN_IDS, k=length)
                        peer = None if name == "both" else both.address
                        timed[name] = await ask(session, workers[name], prompt, peer)
                        again = await ask(session, both, prompt, None)
                        if again.tokens != timed[name].tokens:
                            raise RuntimeError("the tokens differ")
                    if turn:
                        pairs[path].append((timed["both"], timed[path]))
            for path in args.path:
                rows.append(row(num_tokens, path, pairs[path]))
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def row(num_tokens: int, path: str, pairs: list[tuple[Timed, Timed]]) -> dict[str, Any]:
    """Medians; ratios are those of each pair, so that a slow minute falls on both."""

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    return {
        "prompt_tokens": num_tokens,
        "path": path,
        "both_ttft_ms": median([both.ttft_ms for both, _ in pairs]),
        "ttft_ms": median([split.ttft_ms for _, split in pairs]),
        "ttft_ratio": median([split.ttft_ms / both.ttft_ms for both, split in pairs]),
        "both_second_ms": median([both.second_ms for both, _ in pairs]),
        "second_ms": median([split.second_ms for _, split in pairs]),
        "second_ratio": median([split.second_ms / both.second_ms for both, split in pairs]),
        "prefill_ms": median([split.stats.prefill_ms for _, split in pairs]),
        "both_prefill_ms": median([both.stats.prefill_ms for both, _ in pairs]),
        "transfer_ms": median([split.stats.transfer_ms for _, split in pairs]),
        "kv_mb": median([split.stats.kv_bytes_moved / 1e6 for _, split in pairs]),
    }


def lengths(value: str) -> list[int]:
    """N,N,... as numbers."""
    return [int(part) for part in value.split(",")]


def main() -> None:
    """Prints one line per length and path."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompt", type=lengths, default=[512, 2048], metavar="N,N")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--path", nargs="+", choices=PATHS, default=PATHS)
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--threads", type=int, default=0, help="of each worker; 0: one per core")
    parser.add_argument("--kv-cache-mb", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = asyncio.run(measure(args))
    if args.json:
        about = {"model": args.model.name, "weights": args.weights, "machine": machine()}
        result = {"bench": "handoff", **about, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
