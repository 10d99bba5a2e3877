"""What the router tells Prometheus. Labels are enums, worker names are not among them."""

import contextlib
from collections import Counter as Counts
from collections.abc import Iterable, Iterator, Sequence

from kvasir_proto.errors import KvasirError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvasir_router.core.canary import Standing
from kvasir_router.core.choose import Rejected, Route
from kvasir_router.core.fleet import FleetView
from kvasir_router.upstream.call import Call, Progress

PREFIX = "kvasir_router_"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
RATIOS = (0.1, 0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 10.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class RouterMetrics:
    """All metrics of one router process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", "Requests answered", "protocol", "status", "reason"
        )
        self.routes = self._counter("routes", "Routes chosen", "reason")
        self.rejections = self._counter("rejections", "Requests without a route", "reason")
        self.retries = self._counter(
            "retries", "Attempts that failed before the first token", "reason"
        )
        self.continuations = self._counter(
            "continuations", "Attempts that failed after the first token", "reason"
        )
        self.handed_back = self._counter(
            "handed_back", "Requests that a worker gave up, by what came of it", "outcome"
        )
        self.moves = self._counter("moves", "Waiting requests moved away from hot workers")
        self.hit_tokens = self._counter(
            "hit_tokens", "Prompt tokens expected in the cache of the worker routed to"
        )
        self.in_flight = self._gauge("requests_in_flight", "Requests being served")
        self.picks_open = self._gauge(
            "picks_open", "Requests under way to an endpoint that a gateway was told"
        )
        self.peers = self._gauge("peers", "Router replicas whose extended keys are followed")
        self.kv_nodes = self._gauge("kv_nodes", "KV nodes whose blocks are known")
        self.keys_extended = self._gauge("keys_extended", "Prefixes whose keys are longer")
        self.workers = self._gauge(
            "workers", "Workers, by what they are to this router: prefill, decode, excluded", "use"
        )
        self.kv_canaries = self._gauge(
            "kv_canaries",
            "Workers, by whether KV crosses between them and those of the other role",
            "standing",
        )
        self.ttft = self._histogram(
            "ttft_seconds", "From a request's arrival to its first token", SECONDS
        )
        self.ttft_predicted = self._histogram(
            "ttft_predicted_seconds", "What the route that brought the first token said", SECONDS
        )
        self.ttft_ratio = self._histogram(
            "ttft_actual_to_predicted", "Actual time to first token over the predicted", RATIOS
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}{name}_total", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"{PREFIX}{name}", text, buckets=buckets, registry=self.registry)

    def text(self, view: FleetView, *, num_members: int, num_peers: int) -> bytes:
        """The exposition format; the fleet is counted as it is now."""
        workers = view.workers.values()
        self.peers.set(num_peers)
        self.kv_nodes.set(len(view.stores))
        self.keys_extended.set(view.keys.num_extended)
        self.workers.labels("prefill").set(sum(w.can_prefill for w in workers))
        self.workers.labels("decode").set(sum(w.can_decode for w in workers))
        self.workers.labels("excluded").set(num_members - len(workers))
        return generate_latest(self.registry)

    def canaries(self, standings: Iterable[tuple[Standing, str]]) -> None:
        """What is known of the workers' transfers now."""
        found = Counts(standing for standing, _ in standings)
        for standing in Standing:
            self.kv_canaries.labels(standing.value).set(found[standing])

    def answered(self, protocol: str, *, status: int, reason: str) -> None:
        """A request has its answer; `reason` is "ok" or a Reason."""
        self.requests.labels(protocol, str(status), reason).inc()

    @contextlib.contextmanager
    def picked(self) -> Iterator[None]:
        """While it lasts, a gateway has a request at the endpoint that it was told."""
        self.picks_open.inc()
        try:
            yield
        finally:
            self.picks_open.dec()

    def routed(self, route: Route) -> None:
        """The core chose."""
        self.routes.labels(route.reason).inc()
        self.hit_tokens.inc(route.hit_tokens)

    def rejected(self, rejected: Rejected) -> None:
        """The core refused."""
        self.rejections.labels(rejected.reason).inc()

    def failed_attempt(self, failure: KvasirError, *, continued: bool) -> None:
        """A worker failed a request; `continued`: after part of the output."""
        (self.continuations if continued else self.retries).labels(failure.reason).inc()

    def served(self, call: Call, progress: Progress) -> None:
        """A request was served to its end."""
        if progress.first_token_ms is None or progress.route is None:
            return
        self.ttft.observe((progress.first_token_ms - call.arrived_ms) / 1_000)
        predicted_ms = progress.route.ttft_estimate_ms
        self.ttft_predicted.observe(predicted_ms / 1_000)
        self.ttft_ratio.observe((progress.first_token_ms - progress.sent_ms) / max(predicted_ms, 1))
