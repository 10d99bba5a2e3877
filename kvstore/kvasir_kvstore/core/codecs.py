"""Which codec a pull over a link asks for: the one that brings the bytes soonest. Pure.

A codec is worth it where the time that its smaller size saves on the link is more than the time to
encode and decode, so on slow links only (the break-even rule). Invariant: only allowed codecs are
chosen, and none where raw would be as fast. What is allowed is the quality probe's word.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

RAW = "raw"
CODECS = ("int8", "int4", "entropy")
LEAD = 0.1
"""Another codec must be faster by this part than the one in use: links jitter."""
FRAME_BYTES = 256 << 10
FRAME_S = 20e-6
"""Of an encoded frame, beside the rates: buffers, and one more pass of the scheduler."""


@dataclass(frozen=True, slots=True)
class CodecRate:
    """What a codec does on this machine, in raw bytes."""

    name: str
    ratio: float
    """Raw bytes over encoded bytes."""
    encode_bytes_per_s: float
    decode_bytes_per_s: float


def transfer_s(num_bytes: float, link_bytes_per_s: float, rate: CodecRate | None) -> float:
    """Time to bring `num_bytes` of KV; without a rate, raw. One step after the other."""
    if rate is None:
        return num_bytes / link_bytes_per_s
    num_frames = max(1.0, num_bytes / FRAME_BYTES)
    coding_s = num_bytes / rate.encode_bytes_per_s + num_bytes / rate.decode_bytes_per_s
    return num_bytes / rate.ratio / link_bytes_per_s + coding_s + num_frames * FRAME_S


def choose_codec(
    link_bytes_per_s: float,
    num_bytes: float,
    rates: Sequence[CodecRate],
    allowed: Collection[str],
    *,
    current: str = RAW,
) -> str:
    """The codec for the next pull; raw where the link's speed is not known (0)."""
    if link_bytes_per_s <= 0 or num_bytes <= 0:
        return RAW
    times = {RAW: transfer_s(num_bytes, link_bytes_per_s, None)} | {
        rate.name: transfer_s(num_bytes, link_bytes_per_s, rate)
        for rate in rates
        if rate.name in allowed
    }
    best = min(times, key=lambda name: times[name])
    if current in times and times[current] <= times[best] * (1 + LEAD):
        return current
    return best
