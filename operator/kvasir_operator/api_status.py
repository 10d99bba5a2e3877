"""What the statuses of Kvasir's kinds say."""

from typing import Literal

from pydantic import Field

from kvasir_operator.api_base import ApiModel, map_list
from kvasir_operator.api_gateway import GatewayStatus
from kvasir_operator.api_planner import PlanStatus
from kvasir_operator.api_types import Condition


class DrainingPod(ApiModel):
    """A worker on its way out."""

    name: str = Field(description="Name of the pod.")
    requests_left: int | None = Field(
        default=None, description="Requests that it still serves; absent: not yet known."
    )
    blocks_left: int | None = Field(
        default=None, description="Hot KV blocks that it has not yet handed to a KV node."
    )


class RoleFlip(ApiModel):
    """A worker that serves, or is about to serve, in another role than its pool's."""

    name: str = Field(description="Name of the pod.")
    from_role: str = Field(alias="from", description="The role that it had.")
    to: str = Field(description="The role that it gets.")
    phase: Literal["Cordon", "Flip", "Warm", "Serve"] = Field(
        description="Cordon: it is being told. Flip: it has changed, routers have yet to hear of "
        "it. Warm: routers know, but cannot send it requests yet. Serve: it serves."
    )


class Conditions(ApiModel):
    """The part of a status that all kinds share."""

    observed_generation: int | None = Field(
        default=None, description="The generation of the spec that this status describes."
    )
    conditions: tuple[Condition, ...] = Field(
        default=(),
        json_schema_extra=map_list("type"),
        description="Available: it can serve. Progressing: a change is under way. Degraded: "
        "something is wrong; the message says what. Draining: workers finish before they go. "
        "PlanApplied: the fleet is as the planner wants it. "
        "ReplicasContested: several autoscalers set the number of pods.",
    )


class PoolStatus(Conditions):
    """What a pool is doing."""

    replicas: int | None = Field(default=None, description="Pods that exist.")
    ready_replicas: int | None = Field(default=None, description="Pods that can serve.")
    outdated_replicas: int | None = Field(
        default=None, description="Pods of an older template that a rollout has yet to replace."
    )
    revision: str | None = Field(
        default=None,
        description="Name of the workers' present template, as in label kvasir.dev/revision.",
    )
    replicas_owner: str | None = Field(
        default=None,
        description="Who sets `spec.replicas`, if it is not the operator: an autoscaler or the "
        "field manager that wrote it last (kubectl scale). The ModelService then leaves it alone.",
    )
    selector: str | None = Field(
        default=None, description="Label selector of the pods, for autoscalers."
    )
    lent_replicas: int | None = Field(
        default=None, description="Workers that serve in the other role at present."
    )
    role_flips: tuple[RoleFlip, ...] = Field(
        default=(),
        json_schema_extra=map_list("name"),
        description="Workers that are lent to the other role, or on their way there or back.",
    )
    draining_pods: tuple[DrainingPod, ...] = Field(
        default=(),
        json_schema_extra=map_list("name"),
        description="Workers that finish their requests before they are removed.",
    )


class PartStatus(ApiModel):
    """How many pods of a part there should be and how many can serve."""

    replicas: int = Field(default=0, description="Pods wanted.")
    ready_replicas: int = Field(default=0, description="Pods that can serve.")
    summary: str = Field(default="", description="The same as text: ready/wanted.")


class ModelServiceStatus(Conditions):
    """What a service is doing."""

    endpoint: str | None = Field(
        default=None, description="Base URL of the OpenAI API inside the cluster."
    )
    router: PartStatus | None = Field(default=None, description="The router's pods.")
    prefill: PartStatus | None = Field(default=None, description="The prefill workers.")
    decode: PartStatus | None = Field(default=None, description="The decode workers.")
    kv_cache: PartStatus | None = Field(default=None, description="The KV nodes.")
    gateway: GatewayStatus | None = Field(
        default=None, description="What gateways see; absent without `spec.gateway`."
    )
    plan: PlanStatus | None = Field(
        default=None, description="The planner's latest plan; absent without `spec.planner`."
    )
