"""The pieces that Kvasir's custom resources are made of: models, pod templates, conditions.

A field's description becomes `kubectl explain`, a rule becomes a CEL validation in the API server.
"""

from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
REPLICAS_MAX = 1000


class Rule(NamedTuple):
    """One CEL validation: what must hold, and what the user reads when it does not."""

    rule: str
    message: str


class ApiModel(BaseModel):
    """One object of the API: immutable, camelCase outside, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True
    )
    RULES: ClassVar[tuple[Rule, ...]] = ()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        if cls.RULES:
            schema["x-kubernetes-validations"] = [rule._asdict() for rule in cls.RULES]
        return schema


def map_list(key: str) -> dict[str, Any]:
    """Schema extra of a list whose items are merged by `key`."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


class HostPathSource(ApiModel):
    """A folder on every node that runs the model."""

    path: str = Field(
        pattern=r"^/.+",
        max_length=1024,
        description="Absolute path of a Hugging Face model folder on the node.",
    )


class PvcSource(ApiModel):
    """A folder in a PersistentVolumeClaim of the same namespace, mounted read-only."""

    claim_name: str = Field(
        min_length=1, max_length=253, description="Name of the PersistentVolumeClaim."
    )
    path: str = Field(
        default="",
        max_length=1024,
        pattern=r"^([^/].*)?$",
        description="Folder inside the volume, relative to its root; empty: the root itself.",
    )


class ImageSource(ApiModel):
    """A folder inside a container image; an init container copies it before the engine starts."""

    reference: str = Field(
        min_length=1,
        max_length=512,
        description="The image that carries the model. It must contain `sh` and `cp`.",
    )
    path: str = Field(
        default="/model",
        pattern=r"^/.+",
        max_length=1024,
        description="Absolute path of the model folder inside the image.",
    )
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When the kubelet pulls the model image."
    )
    as_volume: bool = Field(
        default=False,
        description="Mount the image instead of copying it: no disk per pod, and the image needs "
        "no shell. Needs the feature ImageVolume of Kubernetes (1.33 or newer) and of the runtime.",
    )


class ModelSource(ApiModel):
    """Where the model's files come from: exactly one of the fields is set."""

    RULES = (
        Rule(
            "[has(self.hostPath), has(self.pvc), has(self.image)].filter(x, x).size() == 1",
            "exactly one of hostPath, pvc and image must be set",
        ),
    )
    host_path: HostPathSource | None = Field(
        default=None, description="A folder on every node that runs the model."
    )
    pvc: PvcSource | None = Field(
        default=None, description="A folder in a PersistentVolumeClaim, mounted read-only."
    )
    image: ImageSource | None = Field(
        default=None, description="A folder inside a container image, copied before the start."
    )


class Model(ApiModel):
    """A model under the name that clients use."""

    name: str = Field(
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$",
        description="The name that clients put into the `model` field of their requests.",
    )
    source: ModelSource = Field(
        description="Where the model's folder (config.json, safetensors, tokenizer.json) is."
    )
    memory_mb: int | None = Field(
        default=None,
        ge=1,
        le=16_777_216,
        description="Memory of a worker for weights and one step, KV blocks aside, in MiB, as "
        "`kvasir kube plan --model FOLDER` tells. No pod is made that its memory limit cannot "
        "hold. Absent: not checked.",
    )


class Slo(ApiModel):
    """What a request may take, in milliseconds."""

    ttft_ms: int = Field(
        default=2000, ge=1, le=600_000, description="Time to first token, in milliseconds."
    )
    tpot_ms: int = Field(
        default=100, ge=1, le=60_000, description="Time per output token, in milliseconds."
    )


Quantity = dict[str, int | str]
QUANTITIES: dict[str, Any] = {
    "additionalProperties": {
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "pattern": QUANTITY_PATTERN,
        "maxLength": 32,  # bounds the cost of the rules
        "x-kubernetes-int-or-string": True,
    },
    "maxProperties": 16,
}


class Resources(ApiModel):
    """Compute resources of the pod's main container."""

    RULES = (
        Rule(
            "!has(self.requests) || !has(self.limits) || self.requests.all(name, "
            "!(name in self.limits) || quantity(string(self.requests[name]"
            ")).compareTo(quantity(string(self.limits[name]))) <= 0)",
            "requests must not be greater than limits",
        ),
    )

    requests: Quantity = Field(
        default_factory=dict,
        json_schema_extra=QUANTITIES,
        description="What the scheduler sets aside, by resource name (cpu, memory, ...).",
    )
    limits: Quantity = Field(
        default_factory=dict,
        json_schema_extra=QUANTITIES,
        description="What the container may use at most, by resource name.",
    )


class Toleration(ApiModel):
    """A taint that the pods accept."""

    RULES = (
        Rule(
            "self.operator != 'Exists' || !has(self.value)",
            "value must not be set where operator is Exists",
        ),
        Rule(
            "has(self.key) || self.operator == 'Exists'",
            "operator must be Exists where key is absent",
        ),
        Rule(
            "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            "tolerationSeconds needs effect NoExecute",
        ),
    )

    key: str | None = Field(
        default=None, max_length=317, description="Key of the taint; absent: every key."
    )
    operator: Literal["Exists", "Equal"] = Field(
        default="Equal", description="How key and value are compared with the taint."
    )
    value: str | None = Field(
        default=None, max_length=63, description="Value of the taint, for operator Equal."
    )
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint; absent: every effect."
    )
    toleration_seconds: int | None = Field(
        default=None, ge=0, description="How long a NoExecute taint is tolerated, in seconds."
    )


class TopologySpread(ApiModel):
    """How evenly the pods of a part are spread over zones or nodes."""

    topology_key: str = Field(
        min_length=1,
        max_length=317,
        description="Label of nodes that tells the domains apart: topology.kubernetes.io/zone, "
        "kubernetes.io/hostname.",
    )
    max_skew: int = Field(
        default=1, ge=1, le=1000, description="By how many pods two domains may differ."
    )
    when_unsatisfiable: Literal["ScheduleAnyway", "DoNotSchedule"] = Field(
        default="ScheduleAnyway", description="Whether a pod waits if it cannot be kept."
    )


class EnvVar(ApiModel):
    """An environment variable of the main container."""

    name: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256, description="Name of the variable."
    )
    value: str = Field(max_length=4096, description="Value of the variable.")


class PodSettings(ApiModel):
    """What the pods of one part have in common, whatever the part."""

    resources: Resources = Field(
        default_factory=Resources, description="Compute resources of the main container."
    )
    node_selector: dict[str, str] = Field(
        default_factory=dict,
        json_schema_extra={"maxProperties": 32},
        description="Labels that a node must have to run the pods.",
    )
    tolerations: tuple[Toleration, ...] = Field(
        default=(), max_length=32, description="Taints that the pods accept."
    )
    topology_spread: tuple[TopologySpread, ...] = Field(
        default=(),
        max_length=8,
        json_schema_extra=map_list("topologyKey"),
        description="How the pods of this part are spread over zones or nodes.",
    )
    env: tuple[EnvVar, ...] = Field(
        default=(),
        max_length=64,
        json_schema_extra=map_list("name"),
        description="Environment variables of the main container.",
    )
    args: tuple[str, ...] = Field(
        default=(),
        max_length=64,
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
        description="Flags added after those that Kvasir sets; the last one of a name wins.",
    )


class Rollout(ApiModel):
    """How workers are replaced when their template changes."""

    RULES = (
        Rule(
            "self.maxSurge + self.maxUnavailable > 0",
            "maxSurge and maxUnavailable must not both be 0",
        ),
    )
    max_surge: int = Field(
        default=1, ge=0, le=100, description="Workers that may exist beyond `replicas` meanwhile."
    )
    max_unavailable: int = Field(
        default=0,
        ge=0,
        le=100,
        description="Workers that may be missing meanwhile; 0: the capacity never falls below "
        "what `replicas` asks for.",
    )


KV_FITS_RULE = Rule(
    "!has(self.resources.limits) || !('memory' in self.resources.limits) || "
    "quantity(string(self.resources.limits['memory']))"
    ".asApproximateFloat() > double(self.kvCacheMb) * 1048576.0",
    "the memory limit must be greater than kvCacheMb",
)
NODE_FITS_RULE = Rule(
    "!has(self.resources.limits) || !('memory' in self.resources.limits) || "
    "quantity(string(self.resources.limits['memory']))"
    ".asApproximateFloat() > double(self.memoryMb) * 1048576.0",
    "the memory limit must be greater than memoryMb",
)


class WorkerSettings(PodSettings):
    """A prefill or decode worker."""

    near_topology_key: str | None = Field(
        default=None,
        min_length=1,
        max_length=317,
        description="Prefer nodes that share this label with workers of the other role, so that KV "
        "crosses a short link: topology.kubernetes.io/zone, kubernetes.io/hostname.",
    )

    threads: int = Field(
        default=1, ge=1, le=512, description="Compute threads of the engine in one worker."
    )
    kv_cache_mb: int = Field(
        default=512,
        ge=1,
        le=4_194_304,
        description="Memory for KV blocks in one worker, in MiB; the memory limit must cover it.",
    )
    drain_timeout_seconds: int = Field(
        default=60,
        ge=1,
        le=3600,
        description="How long a worker may finish its requests before it is removed, in seconds.",
    )
    rollout: Rollout = Field(
        default_factory=Rollout,
        description="How workers are replaced when the image or another setting of them changes.",
    )


class KvNodeSettings(PodSettings):
    """A KV node."""

    memory_mb: int = Field(
        default=512,
        ge=1,
        le=4_194_304,
        description="Memory for KV blocks in one node, in MiB; the memory limit must cover it.",
    )


class Condition(ApiModel):
    """One condition of the status, in Kubernetes' usual form."""

    type: str = Field(description="What the condition is about.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(description="Why, as one CamelCase word from a fixed set.")
    message: str = Field(description="Why, in a sentence: names the pod and its last words.")
    last_transition_time: str = Field(
        json_schema_extra={"format": "date-time"},
        description="When `status` last changed.",
    )
    observed_generation: int = Field(
        description="The generation of the object that this condition describes."
    )
