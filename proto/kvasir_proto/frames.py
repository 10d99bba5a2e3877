"""The internal token stream between a worker and a router: frames in an HTTP body.

A worker answers ``POST /internal/generate`` (body: a serialised GenerateRequest) with a sequence
of frames. A frame's payload is exactly what the client is to receive, so the router forwards it
without parsing; the token ids beside it are what another worker needs to continue the request.

    header, little endian, 16 bytes:
      u8   kind         FrameKind
      u8   reserved     0
      u16  num_tokens   token ids that follow the header, 4 bytes each
      u32  payload_len  bytes that follow the token ids
      u32  text_chars   characters of output text sent so far, this frame included; a resumed
                        request counts on from its resume_text_chars
      u32  reserved     0

TOKENS frames come first; then exactly one DONE (payload: a GenerateChunk without text, with
finish_reason, usage and stats) or ERROR (payload: an Error). A body that ends without either
means that the worker died.
"""

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

HEADER = struct.Struct("<BBHIII")
PAYLOAD_BYTES_MAX = 1 << 20
"""A longer payload is a protocol error: no worker sends a megabyte for one step."""


class FrameKind(enum.IntEnum):
    """What a frame holds."""

    TOKENS = 1
    DONE = 2
    ERROR = 3


class FrameError(ValueError):
    """The stream does not follow the format; the connection is of no further use."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. `token_bytes` are little-endian u32 ids, kept packed until someone needs them."""

    kind: FrameKind
    token_bytes: bytes
    payload: bytes
    text_chars: int

    def token_ids(self) -> tuple[int, ...]:
        """The token ids of this frame."""
        return struct.unpack(f"<{len(self.token_bytes) // 4}I", self.token_bytes)


def encode_frame(
    kind: FrameKind, payload: bytes, *, token_ids: tuple[int, ...] = (), text_chars: int = 0
) -> bytes:
    """One frame as bytes."""
    header = HEADER.pack(kind, 0, len(token_ids), len(payload), text_chars, 0)
    return header + struct.pack(f"<{len(token_ids)}I", *token_ids) + payload


class FrameDecoder:
    """Cuts a byte stream, arriving in any pieces, into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Frames completed by `data`, in order.

        Raises:
            FrameError: an unknown kind or a payload over PAYLOAD_BYTES_MAX.
        """
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            kind, _, num_tokens, payload_len, text_chars, _ = HEADER.unpack_from(
                self._buffer, start
            )
            if payload_len > PAYLOAD_BYTES_MAX or kind not in FrameKind._value2member_map_:
                raise FrameError(f"bad frame: kind {kind}, payload of {payload_len} bytes")
            tokens_at = start + HEADER.size
            payload_at = tokens_at + 4 * num_tokens
            end = payload_at + payload_len
            if len(self._buffer) < end:
                break
            yield Frame(
                FrameKind(kind),
                bytes(self._buffer[tokens_at:payload_at]),
                bytes(self._buffer[payload_at:end]),
                text_chars,
            )
            start = end
        del self._buffer[:start]

    def pending_bytes(self) -> int:
        """Bytes of an unfinished frame; not zero at the end of a stream: it was cut off."""
        return len(self._buffer)
