"""Prometheus metrics of the operator, in a registry of their own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

API_REQUESTS = Counter(
    "kvasir_operator_api_requests",
    "Calls to the Kubernetes API by verb, kind and status.",
    ["verb", "kind", "status"],
    registry=REGISTRY,
)
API_WRITES = Counter(
    "kvasir_operator_api_writes",
    "Calls to the Kubernetes API that write, by verb and kind.",
    ["verb", "kind"],
    registry=REGISTRY,
)
RECONCILES = Counter(
    "kvasir_operator_reconciles",
    "Reconciles by kind and result.",
    ["kind", "result"],
    registry=REGISTRY,
)
RECONCILE_SECONDS = Histogram(
    "kvasir_operator_reconcile_seconds",
    "Time of one reconcile, by kind.",
    ["kind"],
    registry=REGISTRY,
)
QUEUE_SECONDS = Histogram(
    "kvasir_operator_queue_seconds",
    "Time from the news about an object to the start of its reconcile.",
    registry=REGISTRY,
)
CACHED_OBJECTS = Gauge(
    "kvasir_operator_cached_objects", "Objects in the watch caches.", ["kind"], registry=REGISTRY
)
QUEUE_DEPTH = Gauge(
    "kvasir_operator_queue_depth", "Objects that wait for a reconcile.", registry=REGISTRY
)
DRAINS = Counter(
    "kvasir_operator_drains", "Drains of workers by outcome.", ["outcome"], registry=REGISTRY
)
ROLE_FLIPS = Counter(
    "kvasir_operator_role_flips",
    "Workers told another role, by outcome.",
    ["outcome"],
    registry=REGISTRY,
)
PLAN_LABELS = ("service_namespace", "service_name")
PLAN_DIFFERS_SINCE = Gauge(
    "kvasir_operator_plan_differs_since_seconds",
    "Unix time since which a ModelService's fleet has not been as planned; 0: it is.",
    [*PLAN_LABELS, "mode"],
    registry=REGISTRY,
)
PLAN_CHANGES = Counter(
    "kvasir_operator_plan_changes",
    "Workers added or removed (replicas), or lent or taken back (flips), by applied plans.",
    [*PLAN_LABELS, "change"],
    registry=REGISTRY,
)
LEADING = Gauge("kvasir_operator_leading", "Whether this process leads.", registry=REGISTRY)
WATCH_LAG_SECONDS = Gauge(
    "kvasir_operator_watch_lag_seconds",
    "How long the watch of a kind has been silent while others were not.",
    ["kind"],
    registry=REGISTRY,
)
