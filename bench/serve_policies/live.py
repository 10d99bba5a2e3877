"""A local fleet of paced workers, routers in this process, and a trace replayed through them.

Lengths are divided by `scale` and the time of a token is multiplied by it, so that a request takes
as long as in the simulator; `speedup` then divides all times.
"""

import asyncio
import hashlib
import random
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.links import Links
from kvasir_proto.v1 import common_pb2, worker_pb2
from kvasir_router.core.choose import Route
from kvasir_router.core.keys import KeyLimits
from kvasir_router.membership.fleet import Fleet, now_ms
from kvasir_router.metrics import RouterMetrics
from kvasir_router.settings import RouterSettings
from kvasir_router.upstream.call import Call, Progress
from kvasir_router.upstream.client import WorkerClient
from kvasir_router.upstream.dispatch import Dispatcher
from kvasir_sim import trace as sim_trace
from kvasir_sim.trace import TraceRequest
from policies import POLICIES

VOCABULARY = 500
READY_TIMEOUT_S = 300.0
KEY_LIMITS = KeyLimits(start_blocks=2)
"""As in the simulator: two blocks of the trace."""


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """One replay, in the simulator's units."""

    model: Path
    num_prefill: int
    num_decode: int
    num_replicas: int
    rate: float
    slo_ttft_ms: int
    us_per_token: float
    cache_tokens: int
    warmup: int
    speedup: float
    seed: int

    @property
    def scale(self) -> int:
        """Trace tokens per token of the live fleet."""
        return sim_trace.BLOCK_TOKENS // BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. `ttft_ms` of None: refused or failed."""

    ttft_ms: float | None
    reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Silent:
    """A sink for output that nobody reads."""

    async def begin(self, route: Route) -> None:
        """Nothing."""

    async def send(self, payloads: Sequence[bytes]) -> None:
        """Nothing."""


async def replay(
    settings: LiveSettings,
    policy: str,
    requests: Sequence[TraceRequest],
    ports: Sequence[int],
    advance: Callable[[int], None],
) -> list[Outcome]:
    """Outcomes of the requests after the warm-up."""
    arrivals_ms = sim_trace.at_rate(requests, settings.rate * settings.speedup)
    choice = random.Random(settings.seed)
    tasks: list[asyncio.Task[Outcome]] = []
    with _workers(settings, ports, is_fifo=policy != "kvasir"):
        async with _routers(settings, policy, ports) as routers, asyncio.TaskGroup() as group:
            started_s = time.monotonic()
            for index, (request, at_ms) in enumerate(zip(requests, arrivals_ms, strict=True)):
                await asyncio.sleep(max(started_s + at_ms / 1_000 - time.monotonic(), 0))
                serving = _serve(settings, choice.choice(routers), request, index)
                tasks.append(group.create_task(serving))
                tasks[-1].add_done_callback(lambda _: advance(1))
    return [task.result() for task in tasks[settings.warmup :]]


async def _serve(
    settings: LiveSettings, router: Dispatcher, request: TraceRequest, index: int
) -> Outcome:
    tokens = _tokens(request, settings.scale)
    arrived_ms, progress = now_ms(), Progress()
    call = Call(
        request_id=f"{index}-{secrets.token_hex(4)}",
        token_ids=tokens,
        sampling=common_pb2.SamplingParams(max_tokens=1, top_p=1.0, ignore_eos=True),
        tenant_salt=b"",
        tenant_weight=1.0,
        priority=0,
        format=worker_pb2.STREAM_FORMAT_GRPC,
        stream_id="",
        created_s=0,
        model="bench",
        ttft_slo_ms=int(settings.slo_ttft_ms / settings.speedup),
        tpot_slo_ms=0,
        arrived_ms=arrived_ms,
        deadline_ms=arrived_ms + 600_000,
    )
    try:
        done = await router.run(call, Silent(), progress)
    except KvasirError as error:
        if error.reason not in (Reason.OVERLOADED, Reason.BUSY):
            raise
        return Outcome(None, error.reason.value)
    assert progress.first_token_ms is not None
    stats = done.stats
    cached = stats.tokens_cached_local + stats.tokens_cached_fetched
    return Outcome(
        (progress.first_token_ms - arrived_ms) * settings.speedup, "", len(tokens), cached
    )


def _tokens(request: TraceRequest, scale: int) -> tuple[int, ...]:
    """A prompt whose blocks are equal where the trace says so."""
    count = max(request.input_tokens // scale, 1)
    found: list[int] = []
    for name in request.names:
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        block = np.random.default_rng(seed).integers(1, VOCABULARY, BLOCK_TOKENS)
        found += block.tolist()
    return tuple(found[:count])


@asynccontextmanager
async def _routers(
    settings: LiveSettings, policy: str, ports: Sequence[int]
) -> AsyncIterator[list[Dispatcher]]:
    """Router replicas that know all workers."""
    workers = tuple(f"127.0.0.1:{port}" for port in ports)
    routers: list[Dispatcher] = []
    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(asyncio.TaskGroup())
        tasks: list[asyncio.Task[None]] = []
        stack.callback(lambda: [task.cancel() for task in tasks])
        for index in range(settings.num_replicas):
            router = RouterSettings(
                model=settings.model,
                model_name="bench",
                workers=workers,
                local_prefill_tokens_max=0,
                silence_timeout_ms=20_000,
            )
            fleet = Fleet(router, Links(), replica=bytes([index]) * 16, key_limits=KEY_LIMITS)
            client = WorkerClient(Links(), connections_max=8_192, connect_timeout_ms=20_000)
            stack.push_async_callback(client.close)
            choose = POLICIES[policy]()
            routers.append(Dispatcher(router, fleet, client, RouterMetrics(), choose=choose))
            tasks.append(group.create_task(fleet.run()))
            if policy == "kvasir":
                tasks.append(group.create_task(routers[-1].moves.run()))
            async with asyncio.timeout(READY_TIMEOUT_S):
                while len(fleet.view().workers) < len(workers):
                    await fleet.changed()
        yield routers


@contextmanager
def _workers(settings: LiveSettings, ports: Sequence[int], *, is_fifo: bool) -> Iterator[None]:
    """The worker processes: prefill first, then decode."""
    script = Path(__file__).parent / "paced_worker.py"
    processes = []
    try:
        for index, port in enumerate(ports):
            is_prefill = index < settings.num_prefill
            us_per_token = settings.us_per_token * settings.scale / settings.speedup
            cache_mb = 1 + settings.cache_tokens * _kv_bytes_per_token(settings) // (1 << 20)
            arguments = ["--model", str(settings.model), "--name", f"w{index}"]
            arguments += ["--role", "prefill" if is_prefill else "decode"]
            arguments += ["--grpc-port", str(port), "--kv-cache-mb", str(cache_mb)]
            arguments += ["--us-per-token", str(us_per_token if is_prefill else 0)]
            arguments += ["--max-batch-tokens", "64"] + (["--fifo"] if is_fifo else [])
            processes.append(subprocess.Popen([sys.executable, str(script), *arguments]))
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _kv_bytes_per_token(settings: LiveSettings) -> int:
    """Of one trace token, as the live fleet holds it."""
    from kvasir_engine.config import read_config

    config = read_config(settings.model)
    per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2
    return max(per_token // settings.scale, 1)
