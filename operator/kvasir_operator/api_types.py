"""The pieces that Kvasir's custom resources are made of: models, workers, KV nodes, conditions."""

from typing import ClassVar, Literal

from pydantic import Field

from kvasir_operator.api_base import ApiModel, Rule
from kvasir_operator.api_pods import PodSettings, Resources

Weights = Literal["bf16", "int8", "int4"]  # as the worker's settings
KvCodec = Literal["raw", "auto", "int8", "int4", "entropy"]
REPLICAS_MAX = 1000


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
            "exactly one of hostPath, pvc and image must be set: name one, remove the others",
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
        description="Memory of a worker for weights (in the format of `weights`) and one step, KV "
        "blocks aside, in MiB, as `kvasir kube plan --model FOLDER` tells. No pod is made that its "
        "memory limit cannot hold. Absent: not checked.",
    )


class Slo(ApiModel):
    """What a request may take, in milliseconds."""

    ttft_ms: int = Field(
        default=2000, ge=1, le=600_000, description="Time to first token, in milliseconds."
    )
    tpot_ms: int = Field(
        default=100, ge=1, le=60_000, description="Time per output token, in milliseconds."
    )


class Rollout(ApiModel):
    """How workers are replaced when their template changes."""

    RULES = (
        Rule(
            "self.maxSurge + self.maxUnavailable > 0",
            "maxSurge and maxUnavailable must not both be 0: raise one",
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
    "the memory limit must be greater than kvCacheMb: raise resources.limits.memory or lower "
    "kvCacheMb",
)


class WorkerSettings(PodSettings):
    """A prefill or decode worker."""

    RULES: ClassVar[tuple[Rule, ...]] = (KV_FITS_RULE,)
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


class VllmSettings(ApiModel):
    """The vLLM server beside each worker."""

    image: str = Field(
        min_length=1,
        max_length=512,
        description="An image with the command `vllm`, 0.10.2 or newer: vllm/vllm-openai:v0.11.0.",
    )
    worker_resources: Resources = Field(
        default_factory=Resources,
        description="Compute resources of the Kvasir worker beside vLLM; the pool's `resources` "
        "are vLLM's.",
    )


class EngineSettings(ApiModel):
    """Which engine computes."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "(self.engine == 'vllm') == has(self.vllm)",
            "vllm must be set if and only if engine is vllm: name vllm.image, or remove vllm",
        ),
        Rule(
            "self.engine != 'vllm' || self.weights == 'bf16'",
            "weights needs engine kvasir: remove it, and give vLLM --quantization by args",
        ),
        Rule(
            "self.engine != 'vllm' || self.kvCodec == 'raw'",
            "kvCodec needs engine kvasir, for vLLM keeps its KV to itself: remove kvCodec",
        ),
        Rule(
            "self.engine != 'vllm' || !has(self.kvSocketHostPath)",
            "kvSocketHostPath needs engine kvasir, for vLLM keeps its KV to itself: remove it",
        ),
        Rule(
            "self.engine == oldSelf.engine",
            "engine cannot be changed: create another ModelService and move clients to it",
        ),
    )
    engine: Literal["kvasir", "vllm"] = Field(
        default="kvasir",
        description="kvasir: the bundled engine. vllm: each worker is a pod of `vllm serve` and a "
        "Kvasir worker that routers talk to; it serves whole requests, `resources`, `env`, `args` "
        "and `volumeMounts` are vLLM's, and `threads` and `kvCacheMb` are not used.",
    )
    vllm: VllmSettings | None = Field(
        default=None, description="The vLLM server, where engine is vllm."
    )
    weights: Weights = Field(
        default="bf16",
        description="How workers keep and multiply weights: bf16 (2 bytes a weight), int8 (1) or "
        "int4 (0.625), quantised when they load the model, on CPUs only. All workers of a service "
        "agree on it, for KV of one format is of no use to another: a change replaces them all, "
        "and old and new ones exchange none meanwhile.",
    )
    kv_codec: KvCodec = Field(
        default="raw",
        description="How KV travels over TCP to workers, in hand-offs and from KV nodes. raw: "
        "exactly. int8, int4, entropy: a half, a third or a quarter of the bytes, losing a "
        "little. auto: per link, whichever of them is soonest there. A codec needs the record of "
        "`kvasir kv probe` in the model's folder: workers refuse to start with one that has not "
        "passed, and auto leaves it out. All workers of a service agree on it: a change replaces "
        "them all, and those that take raw exchange no KV with others meanwhile.",
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
