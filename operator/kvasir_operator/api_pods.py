"""What users may say about pods: resources, placement, volumes, environment.

Volumes and mounts have the names that they have in a Pod, so that they can be copied from one.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from kvasir_operator.api_base import ApiModel, Rule, map_list

QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"

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
            "requests must not be greater than limits: raise the limit or lower the request",
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
            "value must not be set where operator is Exists: remove it, or use operator Equal",
        ),
        Rule(
            "has(self.key) || self.operator == 'Exists'",
            "operator must be Exists where key is absent: name a key or set the operator",
        ),
        Rule(
            "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            "tolerationSeconds needs effect NoExecute: set the effect or remove tolerationSeconds",
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


class KeyRef(ApiModel):
    """One key of a Secret or ConfigMap in the same namespace."""

    name: str = Field(min_length=1, max_length=253, description="Name of the Secret or ConfigMap.")
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253, description="Which of its keys.")


class EnvSource(ApiModel):
    """Where the value of an environment variable is."""

    RULES = (
        Rule(
            "has(self.secretKeyRef) != has(self.configMapKeyRef)",
            "exactly one of secretKeyRef and configMapKeyRef must be set: name one of them",
        ),
    )
    secret_key_ref: KeyRef | None = Field(default=None, description="A key of a Secret.")
    config_map_key_ref: KeyRef | None = Field(default=None, description="A key of a ConfigMap.")


class EnvVar(ApiModel):
    """An environment variable of the main container."""

    RULES = (
        Rule(
            "has(self.value) != has(self.valueFrom)",
            "exactly one of value and valueFrom must be set: give one, remove the other",
        ),
    )
    name: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256, description="Name of the variable."
    )
    value: str | None = Field(default=None, max_length=4096, description="Value of the variable.")
    value_from: EnvSource | None = Field(
        default=None, description="Where the value is; the pod reads it when it starts."
    )


class HostPathVolume(ApiModel):
    """A file or folder of the node. The Pod Security level `baseline` forbids it."""

    path: str = Field(pattern=r"^/.*", max_length=1024, description="Absolute path on the node.")
    type: (
        Literal[
            "DirectoryOrCreate",
            "Directory",
            "FileOrCreate",
            "File",
            "Socket",
            "CharDevice",
            "BlockDevice",
        ]
        | None
    ) = Field(default=None, description="What must be there; absent: not checked.")


class ClaimVolume(ApiModel):
    """A PersistentVolumeClaim of the same namespace. All pods of the part share it."""

    claim_name: str = Field(
        min_length=1, max_length=253, description="Name of the PersistentVolumeClaim."
    )
    read_only: bool = Field(
        default=False, description="Whether the volume is attached for reading only."
    )


class EmptyDirVolume(ApiModel):
    """An empty folder that lives as long as its pod."""

    medium: Literal["Memory"] | None = Field(
        default=None, description="Memory: a tmpfs, which counts as memory; absent: the disk."
    )
    size_limit: str | None = Field(
        default=None,
        pattern=QUANTITY_PATTERN,
        max_length=32,
        description="A pod that writes more is evicted; absent: no limit.",
    )


class ConfigMapVolume(ApiModel):
    """A folder with a file for every key of a ConfigMap."""

    name: str = Field(min_length=1, max_length=253, description="Name of the ConfigMap.")
    optional: bool = Field(
        default=False, description="Whether pods start without the ConfigMap, too."
    )


class SecretVolume(ApiModel):
    """A folder with a file for every key of a Secret."""

    secret_name: str = Field(min_length=1, max_length=253, description="Name of the Secret.")
    optional: bool = Field(default=False, description="Whether pods start without the Secret, too.")


class ImageVolume(ApiModel):
    """The files of a container image, for reading only (feature ImageVolume, Kubernetes 1.33)."""

    reference: str = Field(min_length=1, max_length=512, description="The image.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When the kubelet pulls the image."
    )


VOLUME_SOURCES = (
    "hostPath",
    "persistentVolumeClaim",
    "emptyDir",
    "configMap",
    "secret",
    "image",
)


class Volume(ApiModel):
    """A volume of the pods, as in a Pod: a name and exactly one source."""

    RULES = (
        Rule(
            f"[{', '.join(f'has(self.{source})' for source in VOLUME_SOURCES)}]"
            ".filter(x, x).size() == 1",
            f"exactly one of {', '.join(VOLUME_SOURCES[:-1])} and image must be set: "
            "name one, remove the others",
        ),
        Rule(
            "!(self.name in ['tmp', 'model']) && !self.name.startsWith('kvasir-')",
            "name must not be tmp or model, or begin with kvasir-: Kvasir's own volumes have "
            "these names; choose another",
        ),
    )
    name: str = Field(
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        max_length=63,
        description="Name of the volume, for volumeMounts.",
    )
    host_path: HostPathVolume | None = Field(
        default=None, description="A file or folder of the node."
    )
    persistent_volume_claim: ClaimVolume | None = Field(
        default=None, description="A PersistentVolumeClaim, shared by all pods of the part."
    )
    empty_dir: EmptyDirVolume | None = Field(
        default=None, description="An empty folder per pod; {} for one on the disk."
    )
    config_map: ConfigMapVolume | None = Field(
        default=None, description="The keys of a ConfigMap as files."
    )
    secret: SecretVolume | None = Field(default=None, description="The keys of a Secret as files.")
    image: ImageVolume | None = Field(default=None, description="The files of a container image.")


class VolumeMount(ApiModel):
    """Where the main container sees a volume."""

    RULES = (
        Rule(
            "!self.mountPath.matches('^/(tmp$|(tls|kv-key|kv-disk|kv-sockets|model)(/|$))"
            "|(^|/)[.][.]?(/|$)|//|/$|:')",
            "mountPath must not hide /tmp, /tls, /kv-key, /kv-disk, /kv-sockets or /model, which "
            "Kvasir mounts itself: choose a plain absolute path, without . or .. or ':' in it and "
            "without '/' at its end",
        ),
        Rule(
            "!has(self.subPath) || !self.subPath.matches('(^|/)[.][.](/|$)')",
            "subPath must not have .. in it: name a file or folder inside the volume",
        ),
    )
    name: str = Field(min_length=1, max_length=63, description="Name of one of the part's volumes.")
    mount_path: str = Field(
        pattern=r"^/.+", max_length=512, description="Absolute path inside the container."
    )
    sub_path: str | None = Field(
        default=None,
        pattern=r"^[^/].*$",
        max_length=512,
        description="A file or folder inside the volume; absent: all of it.",
    )
    read_only: bool = Field(default=False, description="Whether the container may only read.")


class PodSettings(ApiModel):
    """What the pods of one part have in common, whatever the part."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.volumeMounts.all(m, self.volumes.exists(v, v.name == m.name))",
            "every one of volumeMounts must have the name of one of volumes: add the volume or "
            "correct the name",
        ),
    )
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
    volumes: tuple[Volume, ...] = Field(
        default=(),
        max_length=16,
        json_schema_extra=map_list("name"),
        description="Volumes of the pods beyond those of Kvasir, as in a Pod.",
    )
    volume_mounts: tuple[VolumeMount, ...] = Field(
        default=(),
        max_length=16,
        json_schema_extra=map_list("mountPath"),
        description="Where the main container sees the volumes, as in a Pod.",
    )
