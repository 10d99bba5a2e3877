"""Metrics of one worker. Reasons are those of kvasir_proto.errors and of the data plane."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvasir_kvstore.metrics import Tally
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TPOT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is read, not counted, at every scrape."""

    running: int = 0
    waiting: int = 0
    in_flight: int = 0
    prefill_tokens_queued: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    ready: bool = False
    kv_transfer_healthy: bool = True
    kv_crossed: bool = False


_GAUGE_TEXT = {
    "running": "Requests that hold KV memory",
    "waiting": "Requests not yet prefilled",
    "in_flight": "Requests in any state, hand-offs included",
    "prefill_tokens_queued": "Prompt tokens accepted and not yet computed",
    "blocks_total": "KV blocks",
    "blocks_free": "KV blocks free or evictable",
    "ready": "1: the worker can serve",
    "kv_transfer_healthy": "1: KV hand-offs work",
    "kv_crossed": "1: in this life KV has been pulled from a peer, or by one",
}


class _GaugeCollector(Collector):
    def __init__(self, read: Callable[[], Gauges]) -> None:
        self.read = read

    def collect(self) -> Iterable[Metric]:
        gauges = self.read()
        for name, text in _GAUGE_TEXT.items():
            yield GaugeMetricFamily(f"kvasir_worker_{name}", text, float(getattr(gauges, name)))


class WorkerMetrics:
    """All metrics of one worker, in a registry of its own."""

    def __init__(self, read_gauges: Callable[[], Gauges]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_GaugeCollector(read_gauges))
        self.ttft_seconds = self._histogram(
            "ttft_seconds", "Request received to first token", _SECONDS
        )
        self.tpot_seconds = self._histogram(
            "tpot_seconds", "Mean time between tokens of a request, after the first", _TPOT_SECONDS
        )
        self.queue_seconds = self._histogram(
            "queue_seconds", "Request accepted to its first engine step", _SECONDS
        )
        self.requests = self._counter(
            "requests", "Requests ended, by work and finish or error reason", "work", "reason"
        )
        self.given_up = self._counter(
            "given_up", "Requests given up by the queue: hand_back, refuse or recalled", "why"
        )
        self.prompt_tokens = Tally(
            self._counter(
                "prompt_tokens",
                "Prompt tokens by source: computed, cached, fetched, chunks",
                "source",
            )
        )
        self.output_tokens = self._counter("output_tokens", "Tokens generated")
        self.kv_bytes = self._counter(
            "kv_bytes",
            "KV bytes received over the data plane, by use: handoff, fetch, canary",
            "use",
        )
        self.handoff_bytes = self._counter(
            "handoff_bytes", "KV bytes handed off to this worker, by transport", "transport"
        )
        self.codec_bytes = self._counter(
            "handoff_wire_bytes", "KV bytes of hand-offs as they came over TCP, by codec", "codec"
        )
        self.transfers = self._counter(
            "kv_transfers", "KV transfers ended, by use and error (ok: none)", "use", "error"
        )
        self.local_prefills = self._counter(
            "local_prefills",
            "Hand-offs computed here instead, by reason: short or a transfer error",
            "reason",
        )
        self.blocks_offered = self._counter("blocks_offered", "Blocks offered to the KV tier")
        self.watches = self._counter(
            "watches", "Event streams opened, by what they began with", "start"
        )
        self.watchers_dropped = self._counter(
            "watchers_dropped", "Event streams closed because their reader fell behind"
        )

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"kvasir_worker_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"kvasir_worker_{name}", text, buckets=buckets, registry=self.registry)
