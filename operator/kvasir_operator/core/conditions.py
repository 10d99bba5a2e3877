"""The conditions of a status: their types, their reasons, and how they carry over.

Invariant: `lastTransitionTime` changes exactly when `status` does, so an unchanged condition is
equal to the live one and costs no write.
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from kvasir_operator.core.manifests import Manifest

MESSAGE_CHARS_MAX = 1024
PROBLEMS_SHOWN_MAX = 3


class ConditionType(enum.StrEnum):
    """What a condition is about."""

    AVAILABLE = "Available"  # it can serve now
    PROGRESSING = "Progressing"  # a change is under way
    DEGRADED = "Degraded"  # something is wrong; the message says what
    DRAINING = "Draining"  # workers finish their requests before they go
    PLAN_APPLIED = "PlanApplied"  # the fleet is as the planner wants it
    REPLICAS_CONTESTED = "ReplicasContested"  # several writers set the number of workers


class Reason(enum.StrEnum):
    """Why a condition is as it is."""

    READY = "Ready"
    WORKERS_NOT_READY = "WorkersNotReady"
    POOLS_NOT_READY = "PoolsNotReady"
    ROUTER_NOT_READY = "RouterNotReady"
    REDIS_NOT_READY = "RedisNotReady"
    STABLE = "Stable"
    CREATING = "Creating"
    SCALING = "Scaling"
    ROLLING_OUT = "RollingOut"
    STARTING = "Starting"
    NOT_ROUTABLE = "NotRoutable"  # pods are ready, but routers do not send them requests yet
    TRANSFER_FAILED = "TransferFailed"  # KV does not cross between workers of the two roles
    DRAINING = "Draining"
    NOT_DRAINING = "NotDraining"
    SEVERAL_OWNERS = "SeveralOwners"
    ONE_OWNER = "OneOwner"
    PLAN_APPLIED = "PlanApplied"
    RECOMMENDING = "Recommending"  # the planner wants another fleet and may not apply it
    OBSERVING = "Observing"
    NO_MEASUREMENTS = "NoMeasurements"  # the planner knows no load or no worker's speed yet
    NO_PROBLEM = "NoProblem"
    MODEL_UNAVAILABLE = "ModelUnavailable"  # its volume, image or folder is not there or not right
    IMAGE_UNAVAILABLE = "ImageUnavailable"
    UNSCHEDULABLE = "Unschedulable"
    POD_NOT_STARTING = "PodNotStarting"
    PODS_REFUSED = "PodsRefused"  # no pod may be made: a quota, the namespace's Pod Security
    CONTAINER_FAILED = "ContainerFailed"
    MEMORY_TOO_SMALL = "MemoryTooSmall"  # a worker would not fit into its memory limit
    POOL_NOT_FOUND = "PoolNotFound"  # a ModelService selects a pool that does not exist
    POOL_TAKEN = "PoolTaken"  # or one that takes part in another ModelService
    MODEL_MISMATCH = "ModelMismatch"  # or one that serves another model
    LINK_MISMATCH = "LinkMismatch"  # or one whose links are not those of the service
    SECRET_INVALID = "SecretInvalid"  # the certificate of a service is not there or cannot serve
    GATEWAY_API_MISSING = "GatewayApiMissing"  # the cluster lacks kinds that gateways need
    NAME_CONFLICT = "NameConflict"  # a child's name is taken by an object of somebody else
    INVALID_SPEC = "InvalidSpec"
    APPLY_FAILED = "ApplyFailed"  # the API server refused a child


@dataclass(frozen=True, slots=True)
class Finding:
    """The present state of one condition."""

    type: ConditionType
    holds: bool
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong, in words for the user."""

    reason: Reason
    message: str


def degraded(problems: Sequence[Problem]) -> Finding:
    """The condition Degraded for what was found; the first problem gives the reason."""
    if not problems:
        return Finding(ConditionType.DEGRADED, False, Reason.NO_PROBLEM, "no problem found")
    messages = list(dict.fromkeys(problem.message for problem in problems))
    text = "; ".join(messages[:PROBLEMS_SHOWN_MAX])
    if len(messages) > PROBLEMS_SHOWN_MAX:
        text += f"; and {len(messages) - PROBLEMS_SHOWN_MAX} more"
    return Finding(ConditionType.DEGRADED, True, problems[0].reason, text)


def to_conditions(
    findings: Iterable[Finding], live: Iterable[Manifest], *, generation: int, now_ms: int
) -> list[Manifest]:
    """The findings as conditions; a status that has not changed keeps its transition time."""
    before = {condition.get("type"): condition for condition in live}
    now = datetime.fromtimestamp(now_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    conditions = []
    for finding in findings:
        status = "True" if finding.holds else "False"
        old = before.get(finding.type.value, {})
        is_same = old.get("status") == status
        conditions.append(
            {
                "type": finding.type.value,
                "status": status,
                "reason": finding.reason.value,
                "message": finding.message[:MESSAGE_CHARS_MAX],
                "lastTransitionTime": old["lastTransitionTime"] if is_same else now,
                "observedGeneration": generation,
            }
        )
    return conditions


def is_condition_true(status: Manifest, kind: ConditionType) -> bool:
    """Whether a live status has this condition with status True."""
    return any(
        condition.get("type") == kind.value and condition.get("status") == "True"
        for condition in status.get("conditions", ())
    )
