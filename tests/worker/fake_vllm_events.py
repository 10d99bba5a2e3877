"""Publishes KV events as vLLM does: PUB and ROUTER sockets, numbered MessagePack batches, a buffer.

Blocks are named by vLLM's own hashes; here the hash of a block is that of all tokens up to its end.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

BLOCK = 32
END = (-1).to_bytes(8, "big", signed=True)


def hashes_of(token_ids: Sequence[int], *, size: int = BLOCK, salt: str = "") -> list[bytes]:
    """vLLM's names of the full blocks of a prompt."""
    ends = range(size, len(token_ids) + 1, size)
    return [hashlib.sha256(f"{salt}{list(token_ids[:end])}".encode()).digest() for end in ends]


def stored(
    token_ids: Sequence[int],
    *,
    since: int = 0,
    salt: str = "",
    size: int = BLOCK,
    tells_salts: bool = True,
    **fields: Any,
) -> dict[str, Any]:
    """BlockStored of a prompt's blocks, from number `since` on."""
    hashes = hashes_of(token_ids, size=size, salt=salt)
    extra: list[Any] = [None] * len(hashes[since:])
    if salt and not since:
        extra[0] = [salt]
    return {
        "type": "BlockStored",
        "block_hashes": hashes[since:],
        "parent_block_hash": hashes[since - 1] if since else None,
        "token_ids": list(token_ids[since * size : len(hashes) * size]),
        "block_size": size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **({"extra_keys": extra} if tells_salts else {}),
        **fields,
    }


def removed(*hashes: bytes) -> dict[str, Any]:
    """BlockRemoved."""
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU"}


CLEARED = {"type": "AllBlocksCleared"}


class FakeEvents:
    """One life of a publisher."""

    def __init__(self, folder: Path, *, as_arrays: bool = False) -> None:
        self.url, self.replay_url = f"ipc://{folder}/events", f"ipc://{folder}/replay"
        self._as_arrays = as_arrays
        self._context = zmq.asyncio.Context()
        self._publisher = self._context.socket(zmq.PUB)
        self._replay = self._context.socket(zmq.ROUTER)
        self._publisher.bind(self.url)
        self._replay.bind(self.replay_url)
        self.buffer: deque[tuple[int, bytes]] = deque(maxlen=10_000)
        self._sequence = 0
        self.num_replays = 0
        self.left_out: set[int] = set()
        """Of the next replay: a socket drops what it cannot send at once."""
        self._task = asyncio.create_task(self._answer())

    async def publish(self, *events: dict[str, Any], lost: bool = False) -> None:
        """One batch; a lost one does not arrive, but may be asked for."""
        if self._as_arrays:
            batch: Any = [1.5, [list(event.values()) for event in events], 0]
        else:
            batch = {"ts": 1.5, "events": list(events), "data_parallel_rank": 0}
        payload = msgspec.msgpack.encode(batch)
        number = self._sequence.to_bytes(8, "big")
        if not lost:
            await self._publisher.send_multipart([b"", number, payload])
        self.buffer.append((self._sequence, payload))
        self._sequence += 1

    async def publish_raw(self, payload: bytes) -> None:
        """Whatever it is."""
        number = self._sequence.to_bytes(8, "big")
        await self._publisher.send_multipart([b"", number, payload])
        self._sequence += 1

    async def _answer(self) -> None:
        while True:
            client, _, since = await self._replay.recv_multipart()
            self.num_replays += 1
            left_out, self.left_out = self.left_out, set()
            for number, payload in list(self.buffer):
                if number >= int.from_bytes(since, "big") and number not in left_out:
                    frames = [client, b"", number.to_bytes(8, "big"), payload]
                    await self._replay.send_multipart(frames)
            await self._replay.send_multipart([client, b"", END, b""])

    async def close(self) -> None:
        """It ends, and forgets."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._context.destroy(linger=0)


@asynccontextmanager
async def fake_events(folder: Path, **settings: Any) -> AsyncIterator[FakeEvents]:
    """A publisher at the same address as any before it."""
    found = FakeEvents(folder, **settings)
    try:
        yield found
    finally:
        await found.close()
