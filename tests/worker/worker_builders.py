"""Builders for worker tests: a tiny model folder, workers with real sockets, requests."""

import asyncio
import itertools
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import grpc.aio
from kvasir_cli.models.making import make_vocabulary
from kvasir_cli.models.tokenizer_json import write_tokenizer
from kvasir_engine.worker import main
from kvasir_engine.worker.settings import WorkerSettings
from kvasir_proto import rpc_errors
from kvasir_proto.errors import KvasirError
from kvasir_proto.frames import Frame, FrameDecoder, FrameKind
from kvasir_proto.v1 import common_pb2, worker_pb2, worker_pb2_grpc

GOLDENS = Path(__file__).parent.parent / "fixtures" / "goldens"
BLOCK_TOKENS = 32
_request_ids = itertools.count(1)


def make_model_dir(target: Path, *, golden: str = "llama-gqa-tied", tokenizer: bool = True) -> Path:
    """A copy of a golden model, with a tokenizer of 512 tokens."""
    target.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        source = GOLDENS / golden / name
        if source.exists():
            shutil.copyfile(source, target / name)
    if tokenizer:
        write_tokenizer(target, make_vocabulary(512, 1024))
    return target


def prompt(length: int, *, seed: int = 1) -> list[int]:
    """Token ids that differ from seed to seed from the first one on."""
    return [(seed * 131 + i * i * 7 + i * 13) % 509 + 1 for i in range(length)]


def make_request(token_ids: list[int], **changes: object) -> worker_pb2.GenerateRequest:
    """A greedy request for 8 tokens as gRPC chunks; `changes` are sampling's or the request's."""
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 8, "ignore_eos": True}
    known = common_pb2.SamplingParams.DESCRIPTOR.fields_by_name
    sampling |= {key: changes.pop(key) for key in list(changes) if key in known}
    fields = {
        "request_id": f"test-{next(_request_ids)}",
        "format": worker_pb2.STREAM_FORMAT_GRPC,
        "timeout_ms": 60_000,
        "stream_id": "chatcmpl-1",
        "created_s": 7,
        "model": "tiny",
    }
    return worker_pb2.GenerateRequest(
        token_ids=token_ids,
        sampling=common_pb2.SamplingParams(**sampling),
        **(fields | changes),
    )


@dataclass
class Result:
    """What a stream held."""

    frames: list[Frame] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    done: worker_pb2.GenerateChunk | None = None
    error: KvasirError | None = None
    http_status: int = 200

    def add(self, frame: Frame) -> None:
        """Takes a frame in."""
        assert self.done is None
        assert self.error is None
        self.frames.append(frame)
        self.tokens += frame.token_ids()
        if frame.kind is FrameKind.DONE:
            self.done = worker_pb2.GenerateChunk.FromString(frame.payload)
        elif frame.kind is FrameKind.ERROR:
            self.error = rpc_errors.error_from_message(common_pb2.Error.FromString(frame.payload))

    @property
    def payload(self) -> bytes:
        """What the client receives."""
        return b"".join(f.payload for f in self.frames if f.kind is FrameKind.TOKENS)

    @property
    def stats(self) -> common_pb2.RequestStats:
        """Of the last chunk."""
        assert self.done is not None, self.error
        return self.done.stats


class RunningWorker:
    """A worker that serves, and clients of its sockets."""

    def __init__(self, parts: main.Parts, session: aiohttp.ClientSession) -> None:
        self.parts = parts
        self.host = parts.host
        self.address = parts.host.address
        self.url = f"http://{self.address.host}:{self.address.http_port}"
        self.session = session
        self.channel = grpc.aio.insecure_channel(f"{self.address.host}:{self.address.grpc_port}")
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)

    async def frames(self, request: worker_pb2.GenerateRequest) -> AsyncIterator[Frame]:
        """The frames of one request as they come; needs a good status."""
        async with self.session.post(
            f"{self.url}/internal/generate", data=request.SerializeToString()
        ) as response:
            assert response.status == 200, await response.read()
            decoder = FrameDecoder()
            async for data in response.content.iter_any():
                for frame in decoder.feed(data):
                    yield frame
            assert decoder.pending_bytes() == 0

    async def generate(self, request: worker_pb2.GenerateRequest) -> Result:
        """One request over HTTP, to its end."""
        result = Result()
        async with self.session.post(
            f"{self.url}/internal/generate", data=request.SerializeToString()
        ) as response:
            body = await response.read()
            result.http_status = response.status
        if result.http_status != 200:
            message = common_pb2.Error.FromString(body)
            result.error = rpc_errors.error_from_message(message)
            return result
        decoder = FrameDecoder()
        for frame in decoder.feed(body):
            result.add(frame)
        assert decoder.pending_bytes() == 0
        return result

    async def get_json(self, path: str) -> tuple[int, dict]:
        """Status and body of a GET."""
        async with self.session.get(self.url + path) as response:
            return response.status, await response.json()

    async def metric(self, name: str) -> float:
        """The sum of a metric's samples whose name and labels begin with `name`."""
        async with self.session.get(self.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    @property
    def blocks_free(self) -> int:
        """Free or evictable blocks."""
        return self.host.served().engine.load().blocks_free

    @property
    def is_idle(self) -> bool:
        """Nothing in flight holds anything."""
        served = self.host.served()
        load = served.engine.load()
        return (
            self.host.state.num_in_flight == self.host.admission.num_waiting == 0
            and load.num_running == load.num_waiting == load.num_reserved == load.num_handoffs == 0
            and load.blocks_free == load.blocks_total
            and served.pool.num_sessions == 0
        )


@asynccontextmanager
async def started(
    model: Path, name: str = "w", *, role: str = "both", **changes: object
) -> AsyncIterator[RunningWorker]:
    """A worker in this process, ready."""
    fields = {"model_name": "tiny", "kv_cache_mb": 4, "threads": 1, "local_prefill_tokens_max": 0}
    settings = WorkerSettings(model=model, name=name, role=role, **(fields | changes))
    async with main.worker(settings) as parts:
        await parts.loaded
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            worker = RunningWorker(parts, session)
            try:
                yield worker
            finally:
                await worker.channel.close()


class Process:
    """A part of Kvasir in a process of its own, by its command line."""

    def __init__(self, *arguments: str) -> None:
        code = "import sys; from kvasir_cli.main import main; main()"
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True
        )

    def wait_for_log(self, text: str) -> str:
        """The first line of the log that holds `text`."""
        assert self.popen.stderr is not None
        seen = []
        for line in self.popen.stderr:
            if text in line:
                return line
            seen.append(line)
        raise AssertionError(f"it ended without {text!r}: {''.join(seen)}")

    def stop(self) -> str:
        """Kills it, if it still runs; the rest of its log."""
        self.popen.kill()
        return self.popen.communicate()[1]


@contextmanager
def worker_process(model: Path, name: str, role: str, **flags: object) -> Iterator[Process]:
    """A worker process that serves; its address is `address_of`."""
    arguments = {"model": model, "model-name": "tiny", "name": name, "role": role, "threads": 1}
    arguments |= {"kv-cache-mb": 4} | {key.replace("_", "-"): value for key, value in flags.items()}
    process = Process("worker", *(f"--{key}={value}" for key, value in arguments.items()))
    try:
        process.wait_for_log(f"{name} serves tiny")
        yield process
    finally:
        process.stop()


async def address_of(grpc_port: int) -> common_pb2.PeerAddress:
    """The address of the worker that listens there."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        about = await stub.Describe(worker_pb2.DescribeRequest(), timeout=10)
    return about.address


async def until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    """Waits for a condition that other tasks bring about."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
