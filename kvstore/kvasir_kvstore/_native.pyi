"""The native data plane: KV memory, the server that lends it out and the client that pulls.

Names, digests and uids are 16 bytes. Calls that wait release the GIL and always have a deadline.
Wrong arguments raise ValueError or IndexError; what the network does never raises.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypedDict, overload

import numpy as np
from numpy.typing import NDArray

class BlockPool:
    """KV memory of one process (mmap, huge pages advised, zeroed lazily). Thread-safe.

    The arrays share its memory and keep it alive.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        num_layers: int,
        layer_bytes: int,
        layout_digest: bytes,
        shared: bool = False,
    ) -> None:
        """`shared`: in a memory file that a BlockServer with a `socket_dir` can lend out."""
    @property
    def data(self) -> NDArray[np.uint8]:
        """[num_blocks, num_layers * layer_bytes]."""
    @property
    def ready(self) -> NDArray[np.uint32]:
        """[num_blocks]: layers of the block that are final; == num_layers: the block is whole."""
    @property
    def progress(self) -> NDArray[np.uint32]:
        """[1]: futex word; whoever raises `ready` increments it, then FUTEX_WAKE (not _PRIVATE)."""
    @property
    def uses(self) -> NDArray[np.uint32]:
        """[num_blocks]: how often a peer pulled the block by name; wraps around."""
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def layer_bytes(self) -> int: ...
    @property
    def layout_digest(self) -> bytes: ...
    @property
    def num_published(self) -> int: ...
    @property
    def num_sessions(self) -> int: ...
    def reset(self, block: int) -> None:
        """Set `ready` to 0: the block is being reused. ValueError if it is still published."""
    def checksum(self, block: int) -> int:
        """CRC-32C of the block's bytes as they are now."""
    def publish(self, name: bytes, block: int) -> bool:
        """Let the (whole) block be pulled by name.

        False: the name already stands for another block with the same contents, and stays there.
        ValueError: the block is not whole, or is published under another name.
        """
    def unpublish(self, name: bytes) -> bool:
        """False: pinned by a running transfer, so try another victim. True: not published."""
    def lookup(self, name: bytes) -> int | None:
        """The block published under this name."""
    def open_session(self, session_id: int) -> None:
        """Begin a hand-off: a puller may come before or after. ValueError if it is open."""
    def extend_session(self, session_id: int, blocks: Sequence[int]) -> None:
        """Add the next blocks, in order; their layers are sent as `ready` grows."""
    def finish_session(self, session_id: int) -> None:
        """No more blocks will be added."""
    def abort_session(self, session_id: int) -> None:
        """The puller gets an error; senders stop soon."""
    def session_pulled(self, session_id: int) -> bool:
        """All blocks were sent, verified by the puller and acknowledged."""
    def close_session(self, session_id: int) -> bool:
        """Forget the session; its blocks may be reused after True (also if it was not open).

        False: a sender still reads its blocks. After abort_session it stops within 100 ms.
        """

class RemoteReads(Protocol):
    """What moves the bytes of pulls from other nodes, in place of TCP."""

    bytes_max: int
    """Of one read."""
    def read(
        self,
        agent: bytes,
        pieces: list[tuple[int, int]],
        timeout_ms: int,
        is_ended: Callable[[], bool],
        /,
    ) -> int:
        """Read pieces (address, bytes) of the peer whose `remote_agent` this is.

        Where they lie, one behind the other, until `release`; 0: the read failed, or its time is
        over. Called by many threads; ends soon when `is_ended` says so.
        """
    def release(self, address: int, /) -> None:
        """The bytes have been taken."""

class ServerStats(TypedDict):
    """Counters since the start, except `connections`, which are open now."""

    connections: int
    connections_refused: int
    stale_refused: int
    layout_refused: int
    unauthenticated: int
    bad_requests: int
    blocks_sent: int
    blocks_missed: int
    bytes_sent: int
    sessions_sent: int
    background_waits: int
    """Pieces of background transfers, from and into the pool, that let urgent ones pass."""

class BlockServer:
    """Lends a pool's blocks to peers over TCP, on threads of its own."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        host: str,
        port: int,
        uid: bytes,
        epoch: int,
        connections_max: int = 256,
        socket_dir: str = "",
        key: bytes = b"",
        remote_agent: bytes = b"",
    ) -> None:
        """Listen at once; port 0 takes a free one. OSError if it cannot.

        `socket_dir`: peers of this node find the server there by its uid and read the pool's
        memory themselves, which must be shared; "": they use TCP like others.
        `key`: of 32 bytes or more, that peers must hold; transfers are encrypted. RuntimeError if
        OpenSSL's libcrypto is missing.
        `remote_agent`: what peers whose library reads the pool from afar must know; none: such are
        refused. Not with a key: what they read is not encrypted.
        """
    @property
    def port(self) -> int: ...
    def stop(self) -> None:
        """Close every connection and join the threads. Idempotent."""
    def stats(self) -> ServerStats: ...

class PullResult:
    """What a pull achieved."""

    @property
    def blocks_ok(self) -> list[bool]:
        """Per block asked for: whole, verified, its `ready` raised. Others have `ready` 0."""
    @property
    def bytes_moved(self) -> int:
        """Verified payload bytes."""
    @property
    def error(self) -> str:
        """Why the pull ended early, or "".

        stale_peer, other_layout, timeout, refused, aborted, bad_frame, cancelled, unreachable,
        unauthenticated (the peer has another key, or only one of the two has any),
        other_transport (the peer's pool cannot be read from afar), transport_failed.
        A block that the peer does not have is no error.
        """
    @property
    def frames_bad(self) -> int:
        """Frames whose checksum or form was wrong; nothing of them became ready."""

    @property
    def bytes_wire(self) -> int:
        """Payload bytes as they came over TCP: fewer than `bytes_moved` where they were encoded."""
    @property
    def wire_s(self) -> float:
        """Time in which they came, without waiting for them to be ready."""
    @property
    def is_lossy(self) -> bool:
        """Some came encoded: the blocks are near to what the peer holds, not equal to it."""
    @property
    def transport(self) -> str:
        """How the blocks came: tcp, tcp-encrypted, shm, nixl, or "" if no peer was reached."""

class BlockClient:
    """Pulls blocks of peers straight into a pool. Thread-safe; pulls run in parallel.

    A pull writes to its blocks only until it returns. They must not be published (ValueError).
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        connections_per_peer_max: int = 4,
        socket_dir: str = "",
        key: bytes = b"",
        num_heads: int = 0,
        head_dim: int = 0,
        remote: RemoteReads | None = None,
    ) -> None:
        """`socket_dir`: where peers of this node are looked for; others are reached by TCP.

        `key`: as BlockServer's. `num_heads`, `head_dim`: of the pool's blocks, bfloat16; without
        them all travels raw. `remote`: moves the bytes
        of peers that are not of this node; they travel raw, and there can be no key.
        """
    def pull_session(
        self,
        *,
        host: str,
        port: int,
        uid: bytes,
        epoch: int,
        session_id: int,
        blocks: Sequence[int],
        timeout_ms: int,
        cancel_id: int = 0,
        codec: str = "raw",
    ) -> PullResult:
        """Pull a hand-off session, layer by layer as the source computes; blocks until its end.

        `codec`: raw, int8, int4 or entropy, for what comes over TCP.

        Waits for a session that is not open yet.
        """
    def pull_named(
        self,
        *,
        host: str,
        port: int,
        uid: bytes,
        epoch: int,
        names: Sequence[bytes],
        blocks: Sequence[int],
        timeout_ms: int,
        cancel_id: int = 0,
        codec: str = "raw",
        background: bool = False,
        local: bool = True,
    ) -> PullResult:
        """Pull published blocks by name, names[i] into blocks[i].

        `background`: nobody waits for it. At both ends it lets all other transfers pass, with a
        bound, and it uses connections of its own: half as many, one at least.
        `local`: False goes by TCP even to a peer of this node.
        """
    def cancel(self, cancel_id: int) -> None:
        """End the pull that was, or soon will be, started with this id (nonzero, used once)."""
    def close(self) -> None:
        """Cancel every pull, now and later, and close idle connections. Idempotent."""

@overload
def crc32c(data: bytes, seed: int = 0) -> int:
    """The checksum of frames (Castagnoli), by the fastest path of this CPU."""

@overload
def crc32c(data: NDArray[np.uint8]) -> int:
    """The same of memory; other threads run meanwhile."""

def crc32c_reference(data: bytes, seed: int = 0) -> int:
    """The same by table look-ups: what tests compare the fast path with."""

def crc32c_copy(data: bytes) -> tuple[int, bytes]:
    """Checksum and copy, made in one pass as pulls from shared memory do."""

def chain_names(parent: bytes, data: bytes, block_bytes: int) -> list[bytes]:
    """Names of the whole blocks in `data`, each BLAKE2b-128 of the name before it and its bytes.

    ValueError: `parent` is not 16 bytes, or `block_bytes` not positive.
    """

CODEC_VERSION: int
"""Of the codecs' formats and of what they lose: probes of another version say nothing."""

def codec_encode(
    codec: str,
    source: NDArray[np.uint8],
    target: NDArray[np.uint8],
    *,
    num_heads: int,
    head_dim: int,
    layer_first: int = 0,
    layers_total: int = 0,
) -> int:
    """Encode whole layers of one block, bfloat16, as int8, int4 or entropy; the bytes written.

    0: a value is not finite or beyond 2^100, so these layers must travel raw. `layer_first`,
    `layers_total`: which of the model's layers they are; 0: all there are.
    ValueError: no such codec, a head_dim that is no multiple of 32, or a target that is too short.
    """

def codec_decode(
    source: NDArray[np.uint8], target: NDArray[np.uint8], *, num_heads: int, head_dim: int
) -> str:
    """Decode into whole layers; "", or why not, and then the target is of no use.

    truncated, bad_header, other_shape, bad_checksum, bad_payload.
    """

def codec_bytes_max(codec: str, *, num_heads: int, head_dim: int, num_layers: int) -> int:
    """Bytes of so many layers, header included: exact for int8 and int4, a bound for entropy."""

def codec_paths() -> list[str]:
    """The paths that run on this CPU, the fastest last: scalar, avx2, avx512."""

def use_codec_path(name: str) -> None:
    """Take this path from now on; "": the fastest. For tests and measurements."""
