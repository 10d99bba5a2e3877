"""Fetch or recompute over links of different speeds: TTFT beside that of recomputing everything.

The transfer is real (BlockServer, BlockClient, and the worker's own choice and watch); a token
bucket between the two limits its rate. Computing is not run: it takes `--us-per-token`, so that a
busy machine does not disturb what is compared. Each link serves a new worker several requests; the
first, which learns the path, is told apart from the rest, which include one retry of a path that
was not worth it.

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvasir_engine.worker.rates import FetchRates
from kvasir_kvstore._native import BlockPool, BlockServer
from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_kvstore.core.fetch import RETRY_EVERY, FetchWatch
from kvasir_kvstore.peers import DataPlane
from kvasir_kvstore.pulls import NamedPuller
from kvasir_proto.v1 import common_pb2

LINKS_GB_PER_S = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 10.0)
LAYERS = 16
REQUESTS = RETRY_EVERY + 4
PIECE_BYTES = 256 << 10
BURST_S = 0.002
HOST = "127.0.0.1"


def throttle(near: socket.socket, far: socket.socket, bytes_per_s: float) -> None:
    """Passes on what comes from `far`, by a token bucket."""
    tokens, filled_s = 0.0, time.monotonic()
    buffer = memoryview(bytearray(PIECE_BYTES))
    with suppress(OSError):
        while count := far.recv_into(buffer):
            now_s = time.monotonic()
            tokens = min(tokens + (now_s - filled_s) * bytes_per_s, BURST_S * bytes_per_s) - count
            filled_s = now_s
            if tokens < 0:
                time.sleep(-tokens / bytes_per_s)
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
    """The port of a link to `port`; one faster than loopback itself is no link at all."""
    if gb_per_s >= max(LINKS_GB_PER_S):
        yield port
        return
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
            threading.Thread(target=throttle, args=(near, far, gb_per_s * 1e9), daemon=True).start()
            threading.Thread(target=forward, args=(near, far), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


async def ttfts_ms(args: argparse.Namespace, gb_per_s: float) -> list[float]:
    """Of the requests of one worker, in order."""
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
    puller, rates, result = NamedPuller(target, DataPlane(), pulls_max=4), FetchRates(), []
    with link(server.port, gb_per_s) as port:
        peer = common_pb2.PeerAddress(host=HOST, data_port=port, uid=uid, epoch=1)
        for _ in range(REQUESTS):
            result.append(await ttft_ms(args, puller, rates, peer, names))
    await puller.close()
    server.stop()
    return result


async def ttft_ms(
    args: argparse.Namespace,
    puller: NamedPuller,
    rates: FetchRates,
    peer: common_pb2.PeerAddress,
    names: list[bytes],
) -> float:
    """What is not fetched is computed afterwards, as in the worker."""
    ms_per_block = float(args.us_per_token) * BLOCK_TOKENS / 1000
    plan = rates.plan(num_blocks=len(names), compute_ms_per_block=ms_per_block)
    if plan is None:
        return len(names) * ms_per_block
    watch, started_s = FetchWatch(plan), time.monotonic()

    def elapsed_ms() -> float:
        return (time.monotonic() - started_s) * 1000

    rates.num_running += 1
    pulled = await puller.pull(
        peer,
        names=names,
        blocks=list(range(len(names))),
        timeout_ms=60_000,
        goes_on=lambda arrived: watch.goes_on(elapsed_ms=elapsed_ms(), num_arrived=arrived),
    )
    spent_ms = elapsed_ms()
    num_fetched = next((i for i, ok in enumerate(pulled.blocks_ok) if not ok), len(names))
    arrived = max(num_fetched, watch.num_arrived)
    rates.fetched(locate_ms=0, transfer_ms=spent_ms, num_arrived=arrived)
    rates.num_running -= 1
    return spent_ms + (len(names) - num_fetched) * ms_per_block


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
    rows = []
    for gb_per_s in LINKS_GB_PER_S:
        first, *rest = asyncio.run(ttfts_ms(args, gb_per_s))
        row = {
            "link_gb_per_s": gb_per_s,
            "recompute_ms": round(recompute_ms, 1),
            "first_ratio": round(first / recompute_ms, 3),
            "median_ratio": round(statistics.median(rest) / recompute_ms, 3),
            "worst_ratio": round(max(rest) / recompute_ms, 3),
        }
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
