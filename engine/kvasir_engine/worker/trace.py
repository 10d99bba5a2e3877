"""What one request cost and who served it: collected along its way, reported in its last chunk."""

import time
from dataclasses import dataclass, field

from kvasir_proto.v1 import common_pb2, worker_pb2

from kvasir_engine.blend import Blend
from kvasir_engine.core.types import RequestTiming
from kvasir_engine.worker.metrics import WorkerMetrics


def _now_ms() -> float:
    return time.monotonic() * 1000


@dataclass(slots=True)
class Trace:
    """Written by the parts that serve a request; owned by its task."""

    prompt_tokens: int
    received_ms: float = field(default_factory=_now_ms)
    first_token_ms: float | None = None
    last_token_ms: float | None = None
    num_output: int = 0
    """Tokens produced here."""
    num_resumed: int = 0
    """Tokens produced elsewhere, before."""
    prefill_worker: str = ""
    decode_worker: str = ""
    tokens_cached_local: int = 0
    tokens_cached_fetched: int = 0
    tokens_cached_decode: int = 0
    tokens_computed: int = 0
    tokens_from_chunks: int = 0
    tokens_recomputed: int = 0
    blend_ms: float = 0.0
    kv_bytes_moved: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_ms: float = 0.0

    def tokens_out(self, num_tokens: int) -> None:
        """Tokens leave for the client now."""
        if num_tokens == 0:
            return
        self.last_token_ms = _now_ms()
        if self.first_token_ms is None:
            self.first_token_ms = self.last_token_ms
        self.num_output += num_tokens

    @property
    def ttft_ms(self) -> float:
        """Request received to first token; 0 if there was none."""
        return self.first_token_ms - self.received_ms if self.first_token_ms is not None else 0.0

    @property
    def tpot_ms(self) -> float:
        """Mean time of a token after the first; 0 if there was none."""
        if self.num_output < 2 or self.first_token_ms is None or self.last_token_ms is None:
            return 0.0
        return (self.last_token_ms - self.first_token_ms) / (self.num_output - 1)

    def prefilled_here(
        self, timing: RequestTiming, metrics: WorkerMetrics, *, waited_ms: float = 0.0
    ) -> None:
        """The first event of a prompt that this worker prefilled, `waited_ms` after it came."""
        self.queue_ms = waited_ms + timing.queue_ms
        self.prefill_ms = self.blend_ms + timing.prefill_ms
        self.tokens_cached_local += timing.tokens_cached
        self.tokens_computed += timing.tokens_computed
        metrics.queue_seconds.observe(self.queue_ms / 1000)
        metrics.prompt_tokens.add("computed", timing.tokens_computed)
        metrics.prompt_tokens.add("cached", timing.tokens_cached)
        metrics.prompt_tokens.add("fetched", self.tokens_cached_fetched)

    def chunk_computed(self, alone: "Trace") -> None:
        """A chunk's KV was not here; `alone` is what it cost."""
        self.tokens_computed += alone.tokens_computed
        self.kv_bytes_moved += alone.kv_bytes_moved

    def blended(self, blend: Blend, metrics: WorkerMetrics) -> None:
        """Part of the prompt was blended of chunks."""
        num_exact = sum(part.count for part in blend.parts if part.is_exact)
        num_computed = blend.end - blend.start - blend.tokens_reused
        self.tokens_cached_local += num_exact
        self.tokens_from_chunks = blend.tokens_reused - num_exact
        self.tokens_recomputed = sum(blend.num_recomputed(part) for part in blend.parts)
        self.tokens_computed += num_computed
        metrics.prompt_tokens.add("cached", num_exact)
        metrics.prompt_tokens.add("chunks", self.tokens_from_chunks)
        metrics.prompt_tokens.add("computed", num_computed)

    def prefilled_by_peer(self, finished: worker_pb2.PrefillFinished, *, name: str) -> None:
        """A prefill worker has finished this prompt."""
        self.prefill_worker = name
        self.queue_ms = finished.queue_ms
        self.prefill_ms = finished.prefill_ms
        self.tokens_cached_local = finished.tokens_cached_local
        self.tokens_cached_fetched = finished.tokens_cached_fetched
        self.tokens_computed = finished.tokens_computed
        self.tokens_from_chunks = finished.tokens_from_chunks
        self.tokens_recomputed = finished.tokens_recomputed
        self.kv_bytes_moved += finished.kv_bytes_fetched

    def usage(self) -> common_pb2.Usage:
        """Token counts as clients are billed for them."""
        reused = self.tokens_cached_local + self.tokens_cached_fetched
        if self.tokens_from_chunks:  # no saving where chunks were computed alone for this request
            computed_max = min(self.tokens_computed, self.prompt_tokens)
            reused = min(reused + self.tokens_from_chunks, self.prompt_tokens - computed_max)
        reused = max(reused, self.tokens_cached_decode)
        return common_pb2.Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.num_resumed + self.num_output,
            cached_tokens=min(reused, self.prompt_tokens),
        )

    def stats(self) -> common_pb2.RequestStats:
        """All of it."""
        return common_pb2.RequestStats(
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            tokens_cached_local=self.tokens_cached_local,
            tokens_cached_fetched=self.tokens_cached_fetched,
            tokens_cached_decode=self.tokens_cached_decode,
            tokens_computed=self.tokens_computed,
            kv_bytes_moved=self.kv_bytes_moved,
            queue_ms=self.queue_ms,
            prefill_ms=self.prefill_ms,
            transfer_ms=self.transfer_ms,
            ttft_ms=self.ttft_ms,
            tpot_ms=self.tpot_ms,
            tokens_from_chunks=self.tokens_from_chunks,
            tokens_recomputed=self.tokens_recomputed,
        )

    def observe(self, metrics: WorkerMetrics) -> None:
        """Adds a finished request to the metrics."""
        if self.first_token_ms is not None:
            metrics.ttft_seconds.observe(self.ttft_ms / 1000)
        if self.num_output > 1:
            metrics.tpot_seconds.observe(self.tpot_ms / 1000)
        metrics.output_tokens.inc(self.num_output)
