"""Metrics of the KV tier: of a KV node's process, and of a worker's use of the tier.

Reasons are those of kvasir_proto.errors and of the data plane (`PullResult.error`); "ok": none.
"""

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Mapping, Sequence

from kvasir_proto.v1 import kvnode_pb2
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

NODE_GAUGES = {
    "blocks_total": "Slots for blocks",
    "blocks_used": "Slots that hold a block",
    "blocks_reserved": "Slots being filled",
    "offers_running": "Offers being pulled or waiting",
    "index_healthy": "1: the block index answers",
    "connections": "Open data-plane connections",
}
NODE_COUNTERS = {
    "blocks_offered": "Blocks that workers offered",
    "blocks_pulled": "Offered blocks pulled",
    "blocks_known": "Offered blocks that were here already",
    "blocks_unavailable": "Offered blocks that the source had no more, or whose frames were bad",
    "blocks_refused": "Offered blocks that found no room in time: those in memory await the disk",
    "bytes_pulled": "KV bytes pulled from workers",
    "blocks_evicted": "Blocks given up for others that needed their slots at once",
    "blocks_trimmed": "Blocks given up in the background, above the high watermark",
    "blocks_moved": "Blocks that other nodes took over, since their chains belong there",
    "blocks_expired": "Blocks given up because their time was over",
    "frames_quarantined": "Frames whose checksum or form was wrong",
    "blocks_served": "Blocks sent to peers",
    "bytes_served": "KV bytes sent to peers",
    "blocks_missed": "Blocks asked for and not held",
    "stale_refused": "Connections meant for an earlier life of this node",
    "layout_refused": "Connections of another KV layout",
    "unauthenticated": "Data-plane connections without the key, or with another",
    "bad_requests": "Data-plane messages that were not intact",
    "connections_refused": "Data-plane connections over the limit",
}

TIER_GAUGES = {
    "blocks_used": "Blocks held, by tier",
    "bytes_used": "KV bytes held, by tier",
    "objects_foreign": "Objects last listed among the blocks that are none, by tier",
}
TIER_COUNTERS = {
    "blocks_written": "Blocks written, by tier",
    "blocks_read": "Blocks read, by tier",
    "blocks_bad": "Blocks that were not whole when read, by tier; they are given up",
    "blocks_dropped": "Blocks that were not written, by tier: too many waited, or it refused",
}


class _Scraped(Collector):
    """Values that are read at every scrape."""

    def __init__(
        self,
        read: Callable[[], Mapping[str, float]],
        tiers: Callable[[], Sequence[kvnode_pb2.TierDescription]],
    ) -> None:
        self._read, self._tiers = read, tiers

    def collect(self) -> Iterable[Metric]:
        values = self._read()
        for name, text in NODE_GAUGES.items():
            yield GaugeMetricFamily(f"kvasir_kvnode_{name}", text, values.get(name, 0))
        for name, text in NODE_COUNTERS.items():
            yield CounterMetricFamily(f"kvasir_kvnode_{name}", text, values.get(name, 0))
        yield from self._of_tiers(GaugeMetricFamily, TIER_GAUGES)
        yield from self._of_tiers(CounterMetricFamily, TIER_COUNTERS)

    def _of_tiers(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        texts: Mapping[str, str],
    ) -> Iterable[Metric]:
        for name, text in texts.items():
            family = kind(f"kvasir_kvnode_tier_{name}", text, labels=["tier"])
            for tier in self._tiers():
                family.add_metric([tier.name], getattr(tier, name))
            yield family


class NodeMetrics:
    """All metrics of one KV node, in a registry of its own."""

    def __init__(
        self,
        read: Callable[[], Mapping[str, float]],
        tiers: Callable[[], Sequence[kvnode_pb2.TierDescription]],
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Scraped(read, tiers))
        self.offers = Counter(
            "kvasir_kvnode_offers", "Offers, by reason", ["reason"], registry=self.registry
        )
        self.watches = Counter(
            "kvasir_kvnode_watches",
            "Event streams opened, by what they began with",
            ["start"],
            registry=self.registry,
        )
        self.watchers_dropped = Counter(
            "kvasir_kvnode_watchers_dropped",
            "Event streams closed because their reader fell behind",
            registry=self.registry,
        )
        self.work_failed = Counter(
            "kvasir_kvnode_work_failed",
            "Background work that failed unexpectedly and was begun again, by what it is",
            ["work"],
            registry=self.registry,
        )
        self.transport_bytes = Counter(
            "kvasir_kvnode_transport_bytes",
            "KV bytes pulled from workers, by transport",
            ["transport"],
            registry=self.registry,
        )
        self.pull_seconds = Histogram(
            "kvasir_kvnode_pull_seconds",
            "Time to pull one offer",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class Tally:
    """A counter with one label that can be read here, too."""

    def __init__(self, metric: Counter) -> None:
        self._metric = metric
        self.counts = Counts[str]()

    def add(self, label: str, count: int) -> None:
        """Counts; nothing leaves no trace."""
        if count:
            self._metric.labels(label).inc(count)
            self.counts[label] += count


class TierMetrics:
    """A worker's use of the KV tier, in the worker's registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.offers = Counter(
            "kvasir_kvtier_offers",
            "Offers to KV nodes, by reason (dropped: too many waited)",
            ["reason"],
            registry=registry,
        )
        self.blocks = Tally(
            Counter(
                "kvasir_kvtier_blocks",
                "Blocks wanted of the tier: fetched (loaded: from a node's disk), or why not",
                ["result"],
                registry=registry,
            )
        )
        self.frames_bad = Counter(
            "kvasir_kvtier_frames_bad",
            "Frames whose checksum or form was wrong; their blocks were not used",
            registry=registry,
        )
        self.bytes = Counter(
            "kvasir_kvtier_fetched_bytes",
            "KV bytes fetched from KV nodes, by transport",
            ["transport"],
            registry=registry,
        )
        self.wire_bytes = Counter(
            "kvasir_kvtier_wire_bytes",
            "KV bytes fetched from KV nodes as they came over TCP: encoded (in part) or raw",
            ["encoding"],
            registry=registry,
        )
        self.locate_seconds = Histogram(
            "kvasir_kvtier_locate_seconds",
            "Time to ask the index",
            buckets=_SECONDS,
            registry=registry,
        )
