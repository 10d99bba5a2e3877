"""Pools, peers and a disturbing wire for the tests of the KV tier."""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from kvasir_kvstore._native import BlockClient, BlockPool, BlockServer, PullResult

T = TypeVar("T")
DIGEST = bytes(range(16))
UID = b"u" * 16
EPOCH = 1_700_000_000_000


def make_pool(
    num_blocks: int = 8,
    *,
    num_layers: int = 3,
    layer_bytes: int = 256,
    digest: bytes = DIGEST,
    shared: bool = False,
) -> BlockPool:
    return BlockPool(
        num_blocks=num_blocks,
        num_layers=num_layers,
        layer_bytes=layer_bytes,
        layout_digest=digest,
        shared=shared,
    )


def name_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def fill(pool: BlockPool, block: int, *, seed: int) -> np.ndarray:
    """Random contents, whole."""
    content = np.random.default_rng(seed).integers(0, 256, pool.data.shape[1], dtype=np.uint8)
    pool.data[block] = content
    pool.ready[block] = pool.num_layers
    return content


@dataclass
class Pair:
    """A source with a server and a target with a client; `port` may be that of a proxy."""

    source: BlockPool
    target: BlockPool
    server: BlockServer
    client: BlockClient
    port: int = 0
    names: list[bytes] = field(default_factory=list)

    def publish(self, count: int) -> list[bytes]:
        for block in range(count):
            fill(self.source, block, seed=block + 1)
            self.source.publish(name_of(block + 1), block)
            self.names.append(name_of(block + 1))
        return self.names

    def pull_named(
        self,
        names: list[bytes] | None = None,
        blocks: list[int] | None = None,
        *,
        uid: bytes = UID,
        epoch: int = EPOCH,
        timeout_ms: int = 20_000,
        cancel_id: int = 0,
        background: bool = False,
        local: bool = True,
    ) -> PullResult:
        names = self.names if names is None else names
        return self.client.pull_named(
            host="127.0.0.1",
            port=self.port or self.server.port,
            uid=uid,
            epoch=epoch,
            names=names,
            blocks=list(range(len(names))) if blocks is None else blocks,
            timeout_ms=timeout_ms,
            cancel_id=cancel_id,
            background=background,
            local=local,
        )

    def pull_session(
        self,
        session_id: int,
        blocks: list[int],
        *,
        timeout_ms: int = 20_000,
        cancel_id: int = 0,
    ) -> PullResult:
        return self.client.pull_session(
            host="127.0.0.1",
            port=self.port or self.server.port,
            uid=UID,
            epoch=EPOCH,
            session_id=session_id,
            blocks=blocks,
            timeout_ms=timeout_ms,
            cancel_id=cancel_id,
        )

    def assert_only_right_bytes_are_ready(self, blocks: list[int], sources: list[int]) -> None:
        """Whatever `ready` covers in the target equals the source."""
        layer_bytes = self.source.layer_bytes
        for block, source in zip(blocks, sources, strict=True):
            size = int(self.target.ready[block]) * layer_bytes
            assert np.array_equal(self.target.data[block][:size], self.source.data[source][:size])


@contextlib.contextmanager
def make_pair(
    num_blocks: int = 8,
    *,
    num_layers: int = 3,
    layer_bytes: int = 256,
    socket_dir: str = "",
    key: bytes = b"",
) -> Iterator[Pair]:
    """`socket_dir`: transfers go through shared memory. `key`: they are encrypted."""
    source = make_pool(
        num_blocks, num_layers=num_layers, layer_bytes=layer_bytes, shared=bool(socket_dir)
    )
    target = make_pool(num_blocks, num_layers=num_layers, layer_bytes=layer_bytes)
    server = BlockServer(
        source, host="127.0.0.1", port=0, uid=UID, epoch=EPOCH, socket_dir=socket_dir, key=key
    )
    client = BlockClient(target, socket_dir=socket_dir, key=key)
    try:
        yield Pair(source, target, server, client)
    finally:
        client.close()
        server.stop()


class InThread:
    """Runs a call in a thread and hands back its result."""

    def __init__(self, call: Callable[[], PullResult]) -> None:
        self._results: list[PullResult] = []
        self._thread = threading.Thread(target=lambda: self._results.append(call()), daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def result(self, timeout_s: float = 10) -> PullResult:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the pull hangs"
        return self._results[0]


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 10) -> None:
    """Waits for a condition that another thread or process brings about."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.001)


async def eventually(
    ask: Callable[[], Awaitable[T]], is_right: Callable[[T], bool], timeout_s: float = 10
) -> T:
    """Asks until the answer is right."""
    end = time.monotonic() + timeout_s
    answer = await ask()
    while not is_right(answer):
        assert time.monotonic() < end, f"waited in vain; last answer: {answer!r}"
        await asyncio.sleep(0.005)
        answer = await ask()
    return answer


class Wire:
    """A TCP proxy that may change, cut or stall what the server sends.

    `change(offset, data)` gets each piece of the stream from the server, with its offset in the
    connection, and returns what to pass on; None cuts the connection. New ones go to `target`.
    """

    def __init__(
        self,
        port: int,
        change: Callable[[int, bytes], bytes | None],
        *,
        at: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        self.target = port
        self._change = change
        self._listener = socket.create_server(at)
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(5)
        for sock in self._sockets:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            self._sockets += [near, far]
            for args in ((near, far, None), (far, near, self._change)):
                thread = threading.Thread(target=self._pump, args=args, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        change: Callable[[int, bytes], bytes | None] | None,
    ) -> None:
        offset = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                passed = data if change is None else change(offset, data)
                if passed is None:
                    break
                offset += len(data)
                target.sendall(passed)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def random_uid() -> bytes:
    return os.urandom(16)
