"""What the router tells Prometheus. Labels are enums, worker names are not among them."""

from kvasir_proto.errors import KvasirError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvasir_router.core.choose import Rejected, Route
from kvasir_router.upstream.call import Call, Progress

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
RATIOS = (0.1, 0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 10.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class RouterMetrics:
    """All metrics of one router process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "kvasir_router_requests_total",
            "Requests answered, by protocol, HTTP status and reason",
            ("protocol", "status", "reason"),
            registry=registry,
        )
        self.in_flight = Gauge(
            "kvasir_router_requests_in_flight", "Requests being served", registry=registry
        )
        self.ttft = Histogram(
            "kvasir_router_ttft_seconds",
            "From a request's arrival to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.ttft_predicted = Histogram(
            "kvasir_router_ttft_predicted_seconds",
            "What the route that brought the first token predicted",
            buckets=SECONDS,
            registry=registry,
        )
        self.ttft_ratio = Histogram(
            "kvasir_router_ttft_actual_to_predicted",
            "Actual time to first token, as a multiple of the predicted",
            buckets=RATIOS,
            registry=registry,
        )
        self.routes = Counter(
            "kvasir_router_routes_total", "Routes chosen, by reason", ("reason",), registry=registry
        )
        self.rejections = Counter(
            "kvasir_router_rejections_total",
            "Requests without a route, by reason",
            ("reason",),
            registry=registry,
        )
        self.retries = Counter(
            "kvasir_router_retries_total",
            "Attempts that failed before the first token, by reason",
            ("reason",),
            registry=registry,
        )
        self.continuations = Counter(
            "kvasir_router_continuations_total",
            "Attempts that failed after the first token, by reason",
            ("reason",),
            registry=registry,
        )
        self.hit_tokens = Counter(
            "kvasir_router_hit_tokens_total",
            "Prompt tokens expected in the cache of the worker routed to",
            registry=registry,
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def answered(self, protocol: str, *, status: int, reason: str) -> None:
        """A request has its answer; `reason` is "ok" or a Reason."""
        self.requests.labels(protocol, str(status), reason).inc()

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
