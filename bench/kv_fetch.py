"""Fetch or recompute over links of different speeds: TTFT beside that of recomputing everything.

The transfer is real (BlockServer, BlockClient, and the worker's own choice and watch); a token
bucket between the two limits its rate. Computing is not run: it takes `--us-per-token`, so that a
busy machine does not disturb what is compared. Each link serves a new worker several requests,
among them one retry of a path that was not worth it; the first, for which the path is not known, is
also told apart. Links faster than loopback is here cannot be throttled: such a row is of loopback
itself. `reached_gb_per_s` is what the fastest fetch of a row saw.

    python bench/kv_fetch.py --json bench/results/kv_fetch.json
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kvasir_engine.worker.rates import FetchRates
from kvasir_kvstore._native import BlockPool, BlockServer
from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_kvstore.core.fetch import RETRY_EVERY, FetchWatch
from kvasir_kvstore.path_probe import PROBE_BLOCKS
from kvasir_kvstore.peers import DataPlane
from kvasir_kvstore.pulls import GoesOn, NamedPuller
from kvasir_proto.v1 import common_pb2

LINKS_GB_PER_S = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
LAYERS = 16
REQUESTS = RETRY_EVERY + 4
LOOPBACK_PULLS = 8
PIECE_BYTES = 256 << 10
BURST_S = 0.002
HOST = "127.0.0.1"


class Bucket:
    """Tokens that all connections of one link share."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._tokens, self._filled_s = 0.0, time.monotonic()
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> None:
        """Returns when so much may pass."""
        rate = self._bytes_per_s
        with self._lock:
            now_s = time.monotonic()
            tokens = self._tokens + (now_s - self._filled_s) * rate
            self._tokens, self._filled_s = min(tokens, BURST_S * rate) - num_bytes, now_s
            wait_s = -self._tokens / rate
        if wait_s > 0:
            time.sleep(wait_s)


def throttle(near: socket.socket, far: socket.socket, bucket: Bucket) -> None:
    """Passes on what comes from `far`, by a token bucket."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    with suppress(OSError):
        while count := far.recv_into(buffer):
            bucket.take(count)
            near.sendall(buffer[:count])
    near.close()


def forward(near: socket.socket, far: socket.socket) -> None:
    """Passes on what comes from `near`, at once."""
    with suppress(OSError):
        while data := near.recv(PIECE_BYTES):
            far.sendall(data)
    with suppress(OSError):
        far.shutdown(socket.SHUT_RDWR)


@contextmanager
def link(port: int, gb_per_s: float) -> Iterator[int]:
    """The port of a link to `port`; 0: loopback as it is."""
    if not gb_per_s:
        yield port
        return
    bucket = Bucket(gb_per_s * 1e9)
    listener = socket.create_server((HOST, 0))

    def accept() -> None:
        while True:
            try:
                near = listener.accept()[0]
            except OSError:
                return
            far = socket.socket()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE_BYTES)
            far.connect((HOST, port))
            threading.Thread(target=throttle, args=(near, far, bucket), daemon=True).start()
            threading.Thread(target=forward, args=(near, far), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


@dataclass
class Worker:
    """What one worker fetched with, and saw."""

    args: argparse.Namespace
    puller: NamedPuller
    peer: common_pb2.PeerAddress
    names: list[bytes]
    rates: FetchRates = field(default_factory=FetchRates)
    bytes_per_s_max: float = 0.0

    async def pull(self, num_blocks: int, goes_on: GoesOn | None = None) -> tuple[int, float]:
        """Leading blocks that came, and the time they took, in ms."""
        started_s = time.monotonic()
        pulled = await self.puller.pull(
            self.peer,
            names=self.names[:num_blocks],
            blocks=list(range(num_blocks)),
            timeout_ms=60_000,
            goes_on=goes_on,
        )
        spent_s = time.monotonic() - started_s
        self.bytes_per_s_max = max(self.bytes_per_s_max, pulled.bytes_moved / spent_s)
        num_fetched = next((i for i, ok in enumerate(pulled.blocks_ok) if not ok), num_blocks)
        return num_fetched, spent_s * 1000


@asynccontextmanager
async def running_worker(args: argparse.Namespace, gb_per_s: float) -> AsyncIterator[Worker]:
    """A worker that knows nothing of a link so fast; 0: of loopback."""
    shape = {
        "num_blocks": args.blocks,
        "num_layers": LAYERS,
        "layer_bytes": args.block_kib * 1024 // LAYERS,
        "layout_digest": bytes(16),
    }
    source, target, uid = BlockPool(**shape), BlockPool(**shape), os.urandom(16)
    names = [i.to_bytes(16, "big") for i in range(args.blocks)]
    for block, name in enumerate(names):
        source.data[block] = block
        source.ready[block] = LAYERS
        source.publish(name, block)
    server = BlockServer(source, host=HOST, port=0, uid=uid, epoch=1)
    puller = NamedPuller(target, DataPlane(), pulls_max=4)
    with link(server.port, gb_per_s) as port:
        peer = common_pb2.PeerAddress(host=HOST, data_port=port, uid=uid, epoch=1)
        yield Worker(args, puller, peer, names)
    await puller.close()
    server.stop()


async def measured(args: argparse.Namespace, gb_per_s: float) -> tuple[list[float], float]:
    """TTFT of the requests of one worker in ms, in order, and the fastest fetch in GB/s."""
    async with running_worker(args, gb_per_s) as worker:
        ttfts_ms = [await ttft_ms(worker) for _ in range(REQUESTS)]
        return ttfts_ms, worker.bytes_per_s_max / 1e9


async def loopback_gb_per_s(args: argparse.Namespace) -> float:
    """The fastest of some fetches that nothing throttles."""
    async with running_worker(args, 0) as worker:
        for _ in range(LOOPBACK_PULLS):
            await worker.pull(args.blocks)
        return worker.bytes_per_s_max / 1e9


async def ttft_ms(worker: Worker) -> float:
    """What is not fetched is computed afterwards, as in the worker."""
    rates, num_blocks = worker.rates, len(worker.names)
    ms_per_block = float(worker.args.us_per_token) * BLOCK_TOKENS / 1000
    plan = rates.plan(num_blocks=num_blocks, compute_ms_per_block=ms_per_block)
    ttft_ms = num_blocks * ms_per_block
    if plan is not None:
        watch, started_s = FetchWatch(plan), time.monotonic()

        def goes_on(num_arrived: float) -> bool:
            elapsed_ms = (time.monotonic() - started_s) * 1000
            return watch.goes_on(elapsed_ms=elapsed_ms, num_arrived=num_arrived)

        rates.num_running += 1
        num_fetched, spent_ms = await worker.pull(num_blocks, goes_on)
        arrived = max(num_fetched, watch.num_arrived)
        rates.fetched(locate_ms=0, transfer_ms=spent_ms, num_arrived=arrived)
        rates.num_running -= 1
        ttft_ms = spent_ms + (num_blocks - num_fetched) * ms_per_block
    if rates.path.wants_probe:  # beside computing: no request waits for it
        num_fetched, spent_ms = await worker.pull(PROBE_BLOCKS)
        rates.probed(0, spent_ms, num_fetched)
    return ttft_ms


def main() -> None:
    """Prints one line per link."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=64, help="of 32 tokens, in each prompt")
    parser.add_argument("--block-kib", type=int, default=1024)
    parser.add_argument("--us-per-token", type=float, default=160)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    recompute_ms = args.blocks * BLOCK_TOKENS * args.us_per_token / 1000
    break_even = args.blocks * args.block_kib * 1024 / recompute_ms / 1e6
    print(f"recompute {recompute_ms:.0f} ms; break-even at {break_even:.2f} GB/s")
    limit_gb_per_s = asyncio.run(loopback_gb_per_s(args))
    print(f"loopback: {limit_gb_per_s:.1f} GB/s")
    rows = []
    for gb_per_s in LINKS_GB_PER_S:
        is_throttled = gb_per_s < limit_gb_per_s
        ttfts_ms, reached = asyncio.run(measured(args, gb_per_s if is_throttled else 0))
        row = {
            "link_gb_per_s": gb_per_s,
            "recompute_ms": round(recompute_ms, 1),
            "first_ratio": round(ttfts_ms[0] / recompute_ms, 3),
            "median_ratio": round(statistics.median(ttfts_ms) / recompute_ms, 3),
            "worst_ratio": round(max(ttfts_ms) / recompute_ms, 3),
            "reached_gb_per_s": round(reached, 3),
            "limited_by": "token bucket" if is_throttled else "loopback of this machine",
        }
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
