"""What a codec of KV blocks costs this model: perplexity through a compressed round trip.

Decides which codecs a model allows. After each block of a text its KV is encoded and decoded where
it lies, so that all later tokens see what a peer would have got, and what is computed from it errs
as it would there. The record lies in the model's folder; it counts for the fingerprint and the
version of the codecs that it names, and for no other.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from kvasir_kvstore import _native
from kvasir_kvstore.core.block import BLOCK_TOKENS, KvLayout
from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import KvArrays, LoadedModel
from kvasir_engine.quality import perplexity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RISE_MAX = {"int8": 0.003, "int4": 0.02, "entropy": 0.02}
"""By codec: the rise of perplexity, of that without one, up to which it is allowed."""
RECORD_NAME = "kvasir-kv-codecs.json"


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """One codec."""

    codec: str
    perplexity: float
    change: float
    """0.01: one per cent more than without a codec."""
    change_max: float
    ratio: float
    """Bytes of a block over bytes of a block encoded."""

    @property
    def is_allowed(self) -> bool:
        """Whether the model stands it."""
        return self.change <= self.change_max


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured."""

    fingerprint: bytes
    num_tokens: int
    perplexity: float
    """Without a codec."""
    rows: tuple[ProbeRow, ...]

    def as_json(self) -> dict[str, Any]:
        """The record."""
        return {
            "fingerprint": self.fingerprint.hex(),
            "codec_version": _native.CODEC_VERSION,
            "tokens": self.num_tokens,
            "perplexity": self.perplexity,
            "codecs": [{**asdict(row), "allowed": row.is_allowed} for row in self.rows],
        }


def run_probe(
    model: LoadedModel, ids: np.ndarray, progress: Callable[[int, int], None] = lambda *_: None
) -> Probe:
    """Every codec over the same text; `progress` is told of tokens done, and of all.

    Raises KvasirError for a model whose KV no codec takes.
    """
    if not is_encodable(model.layout):
        raise KvasirError(
            Reason.UNSUPPORTED,
            f"KV of {model.layout.dtype} and heads of {model.layout.head_dim} always travels raw:"
            " codecs take bfloat16 and heads that are multiples of 32",
        )
    total = len(ids) * (1 + len(RISE_MAX))
    plain = perplexity(model, ids, lambda done: progress(done, total))
    rows = []
    for index, (codec, change_max) in enumerate(RISE_MAX.items(), start=1):
        trip = RoundTrip(model, codec)

        def report(done: int, start: int = index * len(ids)) -> None:
            progress(start + done, total)

        value = perplexity(model, ids, report, trip.logits)
        rows.append(ProbeRow(codec, value, value / plain - 1, change_max, trip.ratio))
    return Probe(model.fingerprint, len(ids), plain, tuple(rows))


def is_encodable(layout: KvLayout) -> bool:
    """Whether codecs take such KV."""
    return layout.dtype == "bfloat16" and layout.head_dim % 32 == 0


class RoundTrip:
    """Logits of sequences whose KV has gone through a codec, and how small that made it."""

    def __init__(self, model: LoadedModel, codec: str) -> None:
        layout = model.layout
        self._codec = codec
        self._shape = {"num_heads": layout.num_kv_heads, "head_dim": layout.head_dim}
        size = _native.codec_bytes_max(codec, **self._shape, num_layers=layout.num_layers)
        self._encoded = np.empty(size, np.uint8)
        self._bytes_raw = self._bytes_encoded = 0

    @property
    def ratio(self) -> float:
        """Bytes before over bytes encoded."""
        return self._bytes_raw / max(1, self._bytes_encoded)

    def logits(self, model: LoadedModel, ids: np.ndarray) -> np.ndarray:
        """As sequence_logits, of blocks that went through the codec as soon as they were full."""
        return sequence_logits(model, ids, chunk=BLOCK_TOKENS, after_chunk=self._apply)

    def _apply(self, arrays: KvArrays, num_tokens: int) -> None:
        if num_tokens % BLOCK_TOKENS:
            return
        block = arrays.data[num_tokens // BLOCK_TOKENS - 1]
        size = _native.codec_encode(self._codec, block, self._encoded, **self._shape)
        self._bytes_raw += len(block)
        self._bytes_encoded += size or len(block)
        if size:
            fault = _native.codec_decode(self._encoded[:size], block, **self._shape)
            assert not fault, f"{self._codec} does not take back what it gave: {fault}"


def write_record(probe: Probe, path: Path) -> None:
    """Raises OSError if it cannot."""
    path.write_text(json.dumps(probe.as_json(), indent=2) + "\n")


def allowed_codecs(path: Path, fingerprint: bytes) -> tuple[str, ...]:
    """The codecs that the record at `path` allows; none if it is of another model or version.

    Raises:
        KvasirError: the file is there and is no record.
    """
    if not path.is_file():
        return ()
    try:
        record = json.loads(path.read_text())
        is_ours = bytes.fromhex(record["fingerprint"]) == fingerprint
        is_current = record["codec_version"] == _native.CODEC_VERSION
        allowed = {row["codec"] for row in record["codecs"] if row["allowed"] is True}
    except (ValueError, KeyError, TypeError) as error:
        raise KvasirError(Reason.INVALID_REQUEST, f"{path}: no record of a probe") from error
    return tuple(codec for codec in RISE_MAX if codec in allowed and is_ours and is_current)


def draw_probe(probe: Probe) -> "Figure":
    """Rise of perplexity over size, with each codec's bound.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for row in probe.rows:
        colour = "#1f5fa8" if row.is_allowed else "#b3001b"
        axes.plot(row.ratio, 100 * row.change, "o", color=colour)
        axes.plot(row.ratio, 100 * row.change_max, "_", color="#7f7f7f", markersize=18)
        axes.annotate(
            f"{row.codec} {row.change:+.2%}",
            (row.ratio, 100 * row.change),
            xytext=(8, 4),
            textcoords="offset points",
        )
    axes.axhline(0, color="#7f7f7f", linewidth=0.8)
    axes.set_xlabel("times smaller than bfloat16")
    axes.set_ylabel("rise of perplexity, % (dash: allowed)")
    axes.set_xlim(left=1)
    axes.margins(x=0.25)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
