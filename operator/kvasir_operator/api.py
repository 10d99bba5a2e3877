"""Kvasir's API, group kvasir.dev/v1alpha1: the only source of the CRDs and of docs/api.md.

`python -m kvasir_operator.crdgen` writes both. Every rule that can be said across fields is said
here, so that the API server refuses what the operator could not carry out.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from kvasir_operator.api_base import NAME_PATTERN, ApiModel, Rule, map_list
from kvasir_operator.api_gateway import GatewaySettings
from kvasir_operator.api_kv import KvNodeSettings, KvSocketSettings, KvUseSettings
from kvasir_operator.api_planner import PlannerSettings, WorkerPrice
from kvasir_operator.api_pods import KeyRef, PodSettings, Resources
from kvasir_operator.api_security import ROUTER_PEER_PORT, LinkSettings, SecuritySettings
from kvasir_operator.api_status import ModelServiceStatus, PoolStatus
from kvasir_operator.api_types import (
    REPLICAS_MAX,
    EngineSettings,
    Model,
    Slo,
    WorkerSettings,
)

GROUP = "kvasir.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
SERVICE_NAME_MAX = 40  # leaves room for "-prefill-12" and the revision hash in a label of 63
POOL_NAME_MAX = SERVICE_NAME_MAX + len("-prefill")
SELECTED_MAX = 16  # pools of one role that a ModelService may select
NETWORK_POLICY_TEXT = (
    "Whether a NetworkPolicy admits only Kvasir's pods of this namespace and the operator to gRPC "
    "and KV data; metrics and health stay open. It takes a network that enforces policies."
)

REPLICA_RULES = (
    Rule(
        "self.minReplicas <= self.maxReplicas",
        "minReplicas must not be greater than maxReplicas: lower the one or raise the other",
    ),
    Rule(
        "self.replicas >= self.minReplicas",
        "replicas must not be less than minReplicas: raise replicas or lower minReplicas",
    ),
    Rule(
        "self.replicas <= self.maxReplicas",
        "replicas must not be greater than maxReplicas: lower replicas or raise maxReplicas",
    ),
)
REDIS_URL_PATTERN = r"^(redis|rediss|rediss\+mtls|redis\+sentinel|redis\+cluster)://.+"
MODEL_RULE = Rule(
    "self.model.name == oldSelf.model.name && self.model.source == oldSelf.model.source",
    "model cannot be changed: create another ModelService and move clients to it",
)


def redis_rules(url: str) -> tuple[Rule, ...]:
    """Rules of an object that has a URL of Redis in `url`, or the name of a Secret with one."""
    return (
        Rule(
            f"!has(self.{url}) || !has(self.{url}SecretRef)",
            f"only one of {url} and {url}SecretRef may be set: remove the other",
        ),
        Rule(
            f"!has(self.{url}) || !self.{url}.matches('^[a-z+]+://[^/]*@')",
            f"{url} must not hold a user or password, which everybody could read: put the whole "
            f"URL into a Secret and name its key in {url}SecretRef",
        ),
    )


class Replicas(ApiModel):
    """How many workers, and within which bounds."""

    RULES: ClassVar[tuple[Rule, ...]] = REPLICA_RULES
    replicas: int = Field(
        default=1,
        ge=1,
        le=REPLICAS_MAX,
        description="Number of pods. In a ModelService: the number that a new pool starts with; "
        "afterwards the pool's own `replicas` counts (kubectl scale, an autoscaler).",
    )
    min_replicas: int = Field(
        default=1, ge=1, le=REPLICAS_MAX, description="The pool is never scaled below this."
    )
    max_replicas: int = Field(
        default=100, ge=1, le=REPLICAS_MAX, description="The pool is never scaled above this."
    )


class WorkerPoolTemplate(WorkerSettings, Replicas):
    """A pool of prefill or decode workers that a ModelService owns."""

    price: WorkerPrice = Field(
        default_factory=WorkerPrice, description="What one worker costs, for the planner."
    )


class PoolRef(ApiModel):
    """A pool that stands alone, in the same namespace."""

    name: str = Field(
        pattern=NAME_PATTERN,
        min_length=1,
        max_length=POOL_NAME_MAX,
        description="Name of the PrefillPool or DecodePool.",
    )


class KvCachePoolTemplate(KvNodeSettings, Replicas):
    """A pool of KV nodes that a ModelService owns."""


class RouterSettings(PodSettings):
    """The router: the edge that clients talk to."""

    replicas: int = Field(default=1, ge=1, le=64, description="Number of router pods.")
    http_port: int = Field(
        default=8000, ge=1024, le=65535, description="Port of the OpenAI API, /metrics and health."
    )
    grpc_port: int = Field(
        default=9000, ge=1024, le=65535, description="Port of kvasir.v1.Inference (gRPC)."
    )

    RULES = (
        Rule("self.httpPort != self.grpcPort", "httpPort and grpcPort must differ: change one"),
    )


class RedisSettings(ApiModel):
    """The block index. Without `url` or `urlSecretRef`, the operator runs one in the cluster."""

    RULES = redis_rules("url")
    url: str | None = Field(
        default=None,
        pattern=REDIS_URL_PATTERN,
        max_length=1024,
        description="An existing Redis without a password, redis://HOST:PORT/DB; rediss:// for "
        "TLS, with ?ssl_ca_certs=PATH of a mounted volume where its CA is not a public one; "
        "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB; redis+cluster://HOST:PORT.",
    )
    url_secret_ref: KeyRef | None = Field(
        default=None,
        description="The key of a Secret with the URL of an existing Redis, password and all: "
        "redis://:PASSWORD@HOST:PORT/DB. Pods read it when they start.",
    )
    max_memory_mb: int = Field(
        default=128,
        ge=16,
        le=65536,
        description="Memory of the Redis that the operator runs, in MiB; old entries go first.",
    )
    resources: Resources = Field(
        default_factory=Resources,
        description="Compute resources of the Redis that the operator runs.",
    )


class ImageSettings(ApiModel):
    """Which Kvasir image a part runs."""

    image: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="The Kvasir image; absent: the operator's own.",
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When the kubelet pulls the Kvasir image."
    )
    image_pull_secrets: tuple[str, ...] = Field(
        default=(),
        max_length=8,
        description="Names of Secrets, in the same namespace, that open private registries.",
    )


class IndexSettings(ApiModel):
    """Where a pool finds the index of blocks that all share."""

    RULES: ClassVar[tuple[Rule, ...]] = redis_rules("redisUrl")
    redis_url: str | None = Field(
        default=None,
        pattern=REDIS_URL_PATTERN,
        max_length=1024,
        description="Redis with the index of blocks; absent: there is no shared index. "
        "rediss+mtls://: it shows and demands certificates as other parts do (tlsSecret).",
    )
    redis_url_secret_ref: KeyRef | None = Field(
        default=None, description="The key of a Secret with the URL of Redis, password and all."
    )


class ModelServiceSpec(EngineSettings, KvSocketSettings, ImageSettings):
    """One model, served: a router, prefill and decode workers, and perhaps KV nodes."""

    RULES = (
        MODEL_RULE,
        Rule(
            "self.engine != 'vllm' || !has(self.kvCache)",
            "kvCache needs engine kvasir, for vLLM keeps its KV to itself: remove kvCache",
        ),
        Rule(
            "self.engine != 'vllm' || !has(self.planner)",
            "planner needs engine kvasir, for vLLM does not separate prefill and decode: remove "
            "planner and scale the DecodePool by an autoscaler",
        ),
        Rule(
            "self.engine != 'vllm' || !has(self.prefillPools) || size(self.prefillPools) == 0",
            "prefillPools needs engine kvasir, for vLLM does not separate prefill and decode: "
            "remove prefillPools",
        ),
        Rule(
            "!has(self.prefill) || !has(self.prefillPools) || size(self.prefillPools) == 0",
            "only one of prefill and prefillPools may be set: make a pool or select some "
            "(an older release may have set prefill: null removes it)",
        ),
        Rule(
            "!has(self.decode) || !has(self.decodePools) || size(self.decodePools) == 0",
            "only one of decode and decodePools may be set: make a pool or select some "
            "(an older release may have set decode: null removes it)",
        ),
        Rule(
            "!has(self.gateway) || !has(self.router) || (self.gateway.pickerPort != "
            "self.router.httpPort && self.gateway.pickerPort != self.router.grpcPort)",
            "gateway.pickerPort must differ from the router's httpPort and grpcPort: change one",
        ),
        Rule(
            f"!has(self.gateway) || self.gateway.pickerPort != {ROUTER_PEER_PORT}",
            f"gateway.pickerPort must not be {ROUTER_PEER_PORT}, where routers tell one another "
            "what they know: choose another port",
        ),
        Rule(
            "!has(self.gateway) || !self.gateway.pickerTls || !has(self.security) || "
            "!has(self.security.mtls) || self.security.mtls",
            "gateway.pickerTls needs security.mtls: set mtls, or pickerTls to false",
        ),
        Rule(
            "(has(self.security) && has(self.security.mtls) && !self.security.mtls) || "
            f"!has(self.router) || (self.router.httpPort != {ROUTER_PEER_PORT} && "
            f"self.router.grpcPort != {ROUTER_PEER_PORT})",
            f"router.httpPort and router.grpcPort must not be {ROUTER_PEER_PORT}, where routers "
            "tell one another what they know over TLS: choose another port",
        ),
    )
    model: Model = Field(description="The model that is served. It cannot be changed later.")
    slo: Slo = Field(default_factory=Slo, description="What a request may take.")
    network_policy: bool = Field(default=True, description=NETWORK_POLICY_TEXT)
    router: RouterSettings = Field(
        default_factory=RouterSettings, description="The router and its Service."
    )
    prefill: WorkerPoolTemplate | None = Field(
        default=None,
        description="Workers that compute prompts: PrefillPool NAME-prefill, which the service "
        "owns. Absent: one worker with defaults, unless prefillPools selects pools. "
        "Not used where engine is vllm: the decode workers serve whole requests.",
    )
    decode: WorkerPoolTemplate | None = Field(
        default=None,
        description="Workers that produce tokens: DecodePool NAME-decode, which the service owns. "
        "Absent: one worker with defaults, unless decodePools selects pools.",
    )
    prefill_pools: tuple[PoolRef, ...] = Field(
        default=(),
        max_length=SELECTED_MAX,
        json_schema_extra=map_list("name"),
        description="Existing PrefillPools to use instead of an own one. They may differ in "
        "hardware, serve the same model, and stay when the service goes.",
    )
    decode_pools: tuple[PoolRef, ...] = Field(
        default=(),
        max_length=SELECTED_MAX,
        json_schema_extra=map_list("name"),
        description="Existing DecodePools to use instead of an own one, likewise.",
    )
    kv_cache: KvCachePoolTemplate | None = Field(
        default=None,
        description="Nodes that keep KV blocks beyond the workers: KVCachePool NAME-kv. "
        "Absent: workers keep only their own blocks.",
    )
    redis: RedisSettings = Field(
        default_factory=RedisSettings,
        description="The index of blocks, needed only where kvCache is set.",
    )
    security: SecuritySettings = Field(
        default_factory=SecuritySettings, description="How the parts know one another."
    )
    gateway: GatewaySettings | None = Field(
        default=None,
        description="The service behind a gateway: an InferencePool of its routers, which answer "
        "the gateway where a request is to go. It takes the CRDs of the Gateway API Inference "
        "Extension. Absent: gateways may still route to the router's Service.",
    )
    planner: PlannerSettings | None = Field(
        default=None,
        description="Plans the numbers of workers from load and SLO. Absent: nobody does.",
    )

    def worker_template(self, part: str) -> WorkerPoolTemplate:
        """What the service's own pool of a part, prefill or decode, is made from."""
        return (self.prefill if part == "prefill" else self.decode) or WorkerPoolTemplate()


class WorkerPoolSpec(
    KvUseSettings,
    KvSocketSettings,
    WorkerSettings,
    EngineSettings,
    Replicas,
    ImageSettings,
    IndexSettings,
    LinkSettings,
):
    """Workers of one role for one model."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        MODEL_RULE,
        Rule(
            "self.engine != 'vllm' || (self.kvNodes.size() == 0 && self.lentReplicas == 0)",
            "kvNodes and lentReplicas need engine kvasir, for vLLM keeps its KV to itself: remove "
            "them",
        ),
    )
    model: Model = Field(description="The model that the workers serve. It cannot be changed.")
    price: WorkerPrice = Field(
        default_factory=WorkerPrice,
        description="What one worker costs, for the planner of a ModelService that selects the "
        "pool. A ModelService's own pools have it in their template.",
    )
    network_policy: bool = Field(default=False, description=NETWORK_POLICY_TEXT)
    peer_pool: str | None = Field(
        default=None,
        max_length=POOL_NAME_MAX,
        description="The pool of the other role, for nearTopologyKey.",
    )
    lent_replicas: int = Field(
        default=0,
        ge=0,
        le=REPLICAS_MAX,
        description="How many of the pool's workers serve in the other role (a PrefillPool's as "
        "decode workers, a DecodePool's as prefill workers). They change without a restart and "
        "keep their KV; one always stays. Set by the planner.",
    )
    updated_max: int | None = Field(
        default=None,
        ge=0,
        le=REPLICAS_MAX,
        description="Workers that may be of the present template yet; absent: all. A ModelService "
        "sets it during a rollout, so that its prefill and decode workers change in step.",
    )


class PrefillPoolSpec(WorkerPoolSpec):
    """Workers that compute prompts and hand their KV to decode workers."""

    RULES = (
        Rule(
            "self.engine == 'kvasir'",
            "engine must be kvasir, for vLLM hands no KV off: use a DecodePool",
        ),
    )


class DecodePoolSpec(WorkerPoolSpec):
    """Workers that take over a prompt's KV and produce tokens."""


class KVCachePoolSpec(
    KvNodeSettings, KvSocketSettings, Replicas, ImageSettings, IndexSettings, LinkSettings
):
    """Nodes that keep KV blocks for workers to fetch instead of computing them again."""

    network_policy: bool = Field(default=False, description=NETWORK_POLICY_TEXT)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of `kubectl get`."""

    name: str
    path: str
    type: str = "string"
    description: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Kind:
    """One custom resource: its names, its models and what `kubectl get` shows of it."""

    kind: str
    plural: str
    short_name: str
    description: str
    spec: type[ApiModel]
    status: type[ApiModel]
    columns: tuple[Column, ...]
    is_scalable: bool
    name_max: int


def condition_column(name: str, field: str = "status", *, priority: int = 0) -> Column:
    """A column that shows a field of one condition."""
    title = name if field == "status" else "Reason"
    return Column(
        title,
        f'.status.conditions[?(@.type=="{name}")].{field}',
        description=f"The {field} of condition {name}.",
        priority=priority,
    )


AGE = Column("Age", ".metadata.creationTimestamp", "date", "Time since creation.")
POOL_COLUMNS = (
    Column("Desired", ".spec.replicas", "integer", "Pods wanted."),
    Column("Current", ".status.replicas", "integer", "Pods that exist."),
    Column("Ready", ".status.readyReplicas", "integer", "Pods that can serve."),
    condition_column("Available"),
    condition_column("Draining"),
    condition_column("Degraded", "reason", priority=1),
    AGE,
)
SERVICE_COLUMNS = (
    Column("Model", ".spec.model.name", description="The name that clients use."),
    Column("Router", ".status.router.summary", description="Router pods, ready/wanted."),
    Column("Prefill", ".status.prefill.summary", description="Prefill workers, ready/wanted."),
    Column("Decode", ".status.decode.summary", description="Decode workers, ready/wanted."),
    Column("KV", ".status.kvCache.summary", description="KV nodes, ready/wanted."),
    condition_column("Available"),
    condition_column("Available", "reason"),
    Column("Endpoint", ".status.endpoint", description="Base URL of the API.", priority=1),
    AGE,
)
MODEL_SERVICE = Kind(
    "ModelService",
    "modelservices",
    "msvc",
    "A model served by a router, prefill workers, decode workers and perhaps KV nodes.",
    ModelServiceSpec,
    ModelServiceStatus,
    SERVICE_COLUMNS,
    is_scalable=False,
    name_max=SERVICE_NAME_MAX,
)
PREFILL_POOL = Kind(
    "PrefillPool",
    "prefillpools",
    "pfp",
    "Workers that compute prompts and hand their KV to decode workers.",
    PrefillPoolSpec,
    PoolStatus,
    POOL_COLUMNS,
    is_scalable=True,
    name_max=POOL_NAME_MAX,
)
DECODE_POOL = Kind(
    "DecodePool",
    "decodepools",
    "dcp",
    "Workers that take over a prompt's KV and produce tokens.",
    DecodePoolSpec,
    PoolStatus,
    POOL_COLUMNS,
    is_scalable=True,
    name_max=POOL_NAME_MAX,
)
KV_CACHE_POOL = Kind(
    "KVCachePool",
    "kvcachepools",
    "kvp",
    "Nodes that keep KV blocks for workers to fetch instead of computing them again.",
    KVCachePoolSpec,
    PoolStatus,
    POOL_COLUMNS,
    is_scalable=True,
    name_max=POOL_NAME_MAX,
)
KINDS = (MODEL_SERVICE, PREFILL_POOL, DECODE_POOL, KV_CACHE_POOL)
POOL_KINDS = (PREFILL_POOL, DECODE_POOL, KV_CACHE_POOL)
