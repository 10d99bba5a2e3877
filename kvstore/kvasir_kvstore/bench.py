"""Figures of the data plane beside those of the machine: memcpy and a plain TCP socket.

Each row is one path and one block size. `tcp` is a whole pull by name over loopback: checksums made
and verified, straight into the destination block. CPU seconds are of both ends together, which run
in this process; so does what they are compared with.
"""

import json
import logging
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kvasir_kvstore._native import BlockClient, BlockPool, BlockServer

log = logging.getLogger(__name__)

SIZES_BYTES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
BYTES_PER_ROW = 512 << 20
REPEATS_MIN = 20
_LAYERS = 16
_TIMEOUT_MS = 30_000


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One measurement. `gb_per_s` counts payload once; GB are 10^9 bytes."""

    path: str
    size_bytes: int
    gb_per_s: float
    p50_us: float
    cpu_s_per_gb: float


def run_bench_kv(
    json_path: Path | None = None,
    *,
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    bytes_per_row: int = BYTES_PER_ROW,
    report: Callable[[str], None] = log.info,
) -> list[BenchRow]:
    """Measures every path at every size; writes the rows to `json_path` if one is given.

    Args:
        sizes_bytes: of blocks; multiples of 16.
        bytes_per_row: moved for each measurement.
        report: gets one line per row as it is ready.
    """
    rows = []
    for size in sizes_bytes:
        for path, measure in (("memcpy", _memcpy), ("raw-tcp", _raw_tcp), ("tcp", _tcp)):
            row = measure(path, size, max(REPEATS_MIN, bytes_per_row // size))
            rows.append(row)
            report(
                f"{row.path:8} {row.size_bytes >> 10:6} KiB  {row.gb_per_s:6.2f} GB/s  "
                f"p50 {row.p50_us:8.0f} us  {row.cpu_s_per_gb:5.2f} CPU s/GB"
            )
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def _measure(path: str, size: int, num_repeats: int, move: Callable[[int], None]) -> BenchRow:
    """Times `move(i)`, which moves one block, after one round that touches the memory."""
    move(0)
    times_s = []
    cpu_s = time.process_time()
    for i in range(num_repeats):
        start_s = time.perf_counter()
        move(i)
        times_s.append(time.perf_counter() - start_s)
    cpu_s = time.process_time() - cpu_s
    moved_gb = num_repeats * size / 1e9
    return BenchRow(
        path=path,
        size_bytes=size,
        gb_per_s=round(moved_gb / sum(times_s), 3),
        p50_us=round(statistics.median(times_s) * 1e6, 1),
        cpu_s_per_gb=round(cpu_s / moved_gb, 3),
    )


def _memcpy(path: str, size: int, num_repeats: int) -> BenchRow:
    source = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    target = np.zeros_like(source)
    return _measure(path, size, num_repeats, lambda _: np.copyto(target, source))


def _raw_tcp(path: str, size: int, num_repeats: int) -> BenchRow:
    """A request of one byte, answered by one block, without checksums."""
    payload = os.urandom(size)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer = listener.accept()[0]
            with peer:
                while peer.recv(1):
                    peer.sendall(payload)

        thread = threading.Thread(target=serve)
        thread.start()
        view = memoryview(bytearray(size))
        with socket.create_connection(listener.getsockname()) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def move(_: int) -> None:
                client.sendall(b"x")
                received = 0
                while received < size:
                    count = client.recv_into(view[received:])
                    if count == 0:
                        raise ConnectionError("the server of the benchmark has gone")
                    received += count

            row = _measure(path, size, num_repeats, move)
        thread.join()
    return row


def _tcp(path: str, size: int, num_repeats: int) -> BenchRow:
    def make_pool() -> BlockPool:
        return BlockPool(
            num_blocks=1, num_layers=_LAYERS, layer_bytes=size // _LAYERS, layout_digest=bytes(16)
        )

    source, target, name, uid = make_pool(), make_pool(), bytes(16), os.urandom(16)
    source.data[0] = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    source.ready[0] = _LAYERS
    source.publish(name, 0)
    server = BlockServer(source, host="127.0.0.1", port=0, uid=uid, epoch=1)
    client = BlockClient(target)

    def move(_: int) -> None:
        result = client.pull_named(
            host="127.0.0.1",
            port=server.port,
            uid=uid,
            epoch=1,
            names=[name],
            blocks=[0],
            timeout_ms=_TIMEOUT_MS,
        )
        if result.blocks_ok != [True]:
            raise ConnectionError(f"the pull failed: {result.error or 'block missing'}")

    try:
        return _measure(path, size, num_repeats, move)
    finally:
        client.close()
        server.stop()
