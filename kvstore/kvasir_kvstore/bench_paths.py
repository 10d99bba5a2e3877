"""The paths of the data plane's benchmark: each moves one block from one place to another.

`memcpy`, `raw-tcp` and `grpc` are what the machine and the usual ways give; the others are whole
pulls by name, with checksums made and verified, into the destination block.
"""

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import grpc
import numpy as np

from kvasir_kvstore._native import BlockClient, BlockPool, BlockServer
from kvasir_kvstore.bench_peers import PEERS as LIBRARIES
from kvasir_kvstore.bench_peers import Path, Rounds, in_process, make_peer_paths

PEERS = ("grpc", *LIBRARIES)

_LAYERS = 16
_TIMEOUT_MS = 30_000
_GRPC_CHUNK_BYTES = 1 << 20
_GRPC_METHOD = "/bench/Pull"
_LOOPBACK = "127.0.0.1"


def make_paths(
    report: Callable[[str], None], *, peers: Sequence[str] | None = None
) -> dict[str, Path]:
    """All paths that can be measured here; `report` gets a line for each that cannot.

    Args:
        peers: which of PEERS; None: all.

    Raises:
        ValueError: one of `peers` cannot be measured.
    """
    others = {"grpc": _grpc} | make_peer_paths(report)
    missing = set(peers or ()) - set(others)
    if missing:
        raise ValueError(f"cannot be measured here: {', '.join(sorted(missing))}")
    paths: dict[str, Path] = {
        "memcpy": _memcpy,
        "raw-tcp": _raw_tcp,
        "shm": partial(_pull, shared=True),
        "tcp": _pull,
        "tcp-encrypted": partial(_pull, key=os.urandom(32)),
    }
    return paths | {name: path for name, path in others.items() if peers is None or name in peers}


@contextmanager
def _memcpy(size: int) -> Iterator[Rounds]:
    source = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    target = np.zeros_like(source)
    yield in_process(lambda: np.copyto(target, source))


@contextmanager
def _raw_tcp(size: int) -> Iterator[Rounds]:
    """A request of one byte, answered by one block, without checksums."""
    payload = os.urandom(size)
    view = memoryview(bytearray(size))

    def serve(listener: socket.socket) -> None:
        peer = listener.accept()[0]
        with peer:
            while peer.recv(1):
                peer.sendall(payload)

    with socket.create_server((_LOOPBACK, 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        with socket.create_connection(listener.getsockname()) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def move() -> None:
                client.sendall(b"x")
                received = 0
                while received < size:
                    count = client.recv_into(view[received:])
                    if count == 0:
                        raise ConnectionError("the server of the benchmark has gone")
                    received += count

            yield in_process(move)
        thread.join()


@contextmanager
def _grpc(size: int) -> Iterator[Rounds]:
    """A stream of chunks, each copied into the destination."""
    payload = os.urandom(size)
    view = memoryview(bytearray(size))
    chunks = [payload[i : i + _GRPC_CHUNK_BYTES] for i in range(0, size, _GRPC_CHUNK_BYTES)]
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(
        lambda _request, _context: iter(chunks)
    )
    service, method = _GRPC_METHOD.strip("/").split("/")
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = server.add_insecure_port(f"{_LOOPBACK}:0")
    server.start()
    with grpc.insecure_channel(f"{_LOOPBACK}:{port}") as channel:
        pull: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(_GRPC_METHOD)

        def move() -> None:
            received = 0
            for chunk in pull(b"", timeout=_TIMEOUT_MS / 1000):
                view[received : received + len(chunk)] = chunk
                received += len(chunk)

        yield in_process(move)
    server.stop(None).wait()


@contextmanager
def _pull(size: int, *, shared: bool = False, key: bytes = b"") -> Iterator[Rounds]:
    """A pull by name. A block's own checksum in shared memory is made once, before."""

    def make_pool(*, shared: bool) -> BlockPool:
        return BlockPool(
            num_blocks=1,
            num_layers=_LAYERS,
            layer_bytes=size // _LAYERS,
            layout_digest=bytes(16),
            shared=shared,
        )

    source, target = make_pool(shared=shared), make_pool(shared=False)
    name, uid = bytes(16), os.urandom(16)
    source.data[0] = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    source.ready[0] = _LAYERS
    source.publish(name, 0)
    with tempfile.TemporaryDirectory() as folder:
        socket_dir = folder if shared else ""
        server = BlockServer(
            source, host=_LOOPBACK, port=0, uid=uid, epoch=1, socket_dir=socket_dir, key=key
        )
        client = BlockClient(target, socket_dir=socket_dir, key=key)

        def move() -> None:
            result = client.pull_named(
                host=_LOOPBACK,
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
            yield in_process(move)
        finally:
            client.close()
            server.stop()
