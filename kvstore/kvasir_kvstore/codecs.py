"""Codecs on the links of one process: which codec the next pull from a peer asks for.

Keeps what was measured of each link and of this machine; the choice itself is core/codecs.py's.
Invariant: a codec is asked for only if the model's owner allows it, and never over shared memory.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypedDict

import numpy as np
from kvasir_proto.v1 import common_pb2

from kvasir_kvstore import _native
from kvasir_kvstore.core.codecs import CODECS, FRAME_BYTES, RAW, CodecRate, choose_codec

KvCodec = Literal["raw", "auto", "int8", "int4", "entropy"]
PEERS_MAX = 1024
SMOOTHING = 0.3
"""Weight of a new measurement of a link."""
BYTES_MEASURED_MIN = 64 << 10
"""Of a pull that tells how fast a link is: less sits in a socket's buffer."""
_TRIALS = 3


class CodecShape(TypedDict):
    """What the native part must know of a block's layout; heads of 0: all travels raw."""

    num_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class CodecTerms:
    """What this process may do to KV on its way."""

    mode: KvCodec = "raw"
    allowed: tuple[str, ...] = ()
    """Codecs that the model stands."""
    num_heads: int = 0
    head_dim: int = 0

    @property
    def shape(self) -> CodecShape:
        """For a BlockClient."""
        used = bool(self.usable)
        return CodecShape(
            num_heads=self.num_heads if used else 0, head_dim=self.head_dim if used else 0
        )

    @property
    def usable(self) -> tuple[str, ...]:
        """What may be asked for beside raw."""
        if self.mode == "auto":
            return self.allowed
        return tuple(codec for codec in self.allowed if codec == self.mode)


@dataclass(slots=True)
class Link:
    """What is known of the way from a peer."""

    peer: str
    bytes_per_s: float = 0.0
    """On the wire by TCP; 0: too little has come that way."""
    transport: str = ""
    """Of the last transfer, as PullResult's; none: there was none."""
    codec: str = RAW
    """In which the last transfer came, whatever was asked for."""
    chosen: str = RAW
    """What was asked for last."""


class LinkCodecs:
    """The choice for each peer. Used from one thread."""

    def __init__(self, terms: CodecTerms) -> None:
        """Measures this machine's codecs if they are to be chosen among."""
        self._terms = terms
        is_auto = terms.mode == "auto" and terms.usable
        self._rates = measured_rates(terms.num_heads, terms.head_dim) if is_auto else ()
        self._links: OrderedDict[bytes, Link] = OrderedDict()

    def choose(self, source: common_pb2.PeerAddress, *, num_bytes: int) -> str:
        """For a pull of so many raw bytes."""
        terms = self._terms
        if not terms.usable:
            return RAW
        link = self._link(source)
        if terms.mode != "auto":
            return terms.mode
        link.chosen = choose_codec(
            link.bytes_per_s, num_bytes, self._rates, terms.usable, current=link.chosen
        )
        return link.chosen

    def pulled(
        self,
        source: common_pb2.PeerAddress,
        *,
        transport: str,
        codec: str,
        bytes_wire: int,
        wire_s: float,
    ) -> None:
        """Learns from a pull that brought something how, and how fast by TCP."""
        link = self._link(source)
        link.transport, link.codec = transport, codec
        if wire_s <= 0 or bytes_wire < BYTES_MEASURED_MIN:
            return
        measured = bytes_wire / wire_s
        before = link.bytes_per_s
        link.bytes_per_s = before + SMOOTHING * (measured - before) if before else measured

    def known(self) -> list[Link]:
        """Links that something came over, the latest last."""
        return [link for link in self._links.values() if link.transport]

    def _link(self, source: common_pb2.PeerAddress) -> Link:
        link = self._links.setdefault(source.uid, Link(source.name))
        self._links.move_to_end(source.uid)
        if len(self._links) > PEERS_MAX:
            self._links.popitem(last=False)
        return link


@cache
def measured_rates(num_heads: int, head_dim: int) -> tuple[CodecRate, ...]:
    """What each codec does here with such heads, on values like a model's; takes some ms, once."""
    layer_values = 2 * num_heads * 32 * head_dim
    num_layers = max(1, FRAME_BYTES // (2 * layer_values))
    values = np.random.default_rng(0).standard_normal(num_layers * layer_values, np.float32)
    source = (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    target = np.empty_like(source)
    shape = CodecShape(num_heads=num_heads, head_dim=head_dim)
    rates = []
    for codec in CODECS:
        encoded = np.empty(_native.codec_bytes_max(codec, **shape, num_layers=num_layers), np.uint8)
        encode_s = decode_s = float("inf")
        size = 0
        for _ in range(_TRIALS):
            started_s = time.perf_counter()
            size = _native.codec_encode(codec, source, encoded, **shape)
            between_s = time.perf_counter()
            _native.codec_decode(encoded[:size], target, **shape)
            encode_s = min(encode_s, between_s - started_s)
            decode_s = min(decode_s, time.perf_counter() - between_s)
        rates.append(
            CodecRate(
                name=codec,
                ratio=len(source) / size,
                encode_bytes_per_s=len(source) / encode_s,
                decode_bytes_per_s=len(source) / decode_s,
            )
        )
    return tuple(rates)
