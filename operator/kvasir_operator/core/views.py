"""What a plan sees of the cluster: live objects reduced to the facts that decide.

The readers turn API objects into these views; they are total: a field that is not there reads as
its zero.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from kvasir_operator.core.conditions import Problem, Reason
from kvasir_operator.core.manifests import (
    DRAIN_ANNOTATION,
    REVISION_LABEL,
    TLS_ANNOTATION,
    Manifest,
)
from kvasir_operator.core.problems import pod_problem


@dataclass(frozen=True, slots=True)
class PodView:
    """One pod of a part."""

    name: str
    uid: str
    ip: str
    revision: str  # of the template it was made from; empty: none of a worker pool
    is_ready: bool  # it can serve
    is_running: bool  # its main container runs
    is_leaving: bool  # deletion has begun
    drain_started_ms: int | None
    problem: Problem | None
    num_requests: int = 0  # that it works on
    num_blocks_held: int = 0  # KV blocks that it could serve from
    role: str = ""  # that it serves in; empty: not known
    route_problem: str = ""  # why routers do not send it requests, if they do not
    tls_secret: str = ""  # whose certificate it demands of callers; empty: none


@dataclass(frozen=True, slots=True)
class Door:
    """Where a part answers the operator's calls, and what it demands of a caller."""

    address: str
    namespace: str
    tls_secret: str = ""  # the Secret with a certificate that it accepts; empty: it is plain


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What the routers know of a worker."""

    role: str
    num_requests: int
    num_blocks_held: int
    problem: str  # why it is not ready for requests; empty: it is
    transfer_failure: str = ""  # why KV does not cross between it and others


UNKNOWN_TO_ROUTERS = WorkerFacts("", 0, 0, "no router has seen it yet")


@dataclass(frozen=True, slots=True)
class DrainView:
    """How far a worker's drain has come, as this operator process knows it."""

    requests_left: int | None = None
    blocks_left: int | None = None
    is_over: bool = False  # drained, gone, or out of time


@dataclass(frozen=True, slots=True)
class WorkloadView:
    """A Deployment or StatefulSet."""

    replicas_wanted: int
    replicas: int
    replicas_ready: int
    replicas_updated: int
    is_observed: bool  # its controller has seen the latest spec

    @property
    def replicas_outdated(self) -> int:
        """Pods that are not of the latest template."""
        return max(0, self.replicas_wanted - self.replicas_updated)

    @property
    def is_settled(self) -> bool:
        """Whether every wanted pod exists, is of the latest revision and is ready."""
        counts = {self.replicas, self.replicas_ready, self.replicas_updated}
        return self.is_observed and counts == {self.replicas_wanted}


def workload_view(obj: Manifest | None) -> WorkloadView | None:
    """A Deployment or StatefulSet as a view."""
    if obj is None:
        return None
    status = obj.get("status", {})
    generation = obj["metadata"].get("generation", 0)
    return WorkloadView(
        replicas_wanted=obj["spec"].get("replicas", 1),
        replicas=status.get("replicas", 0),
        replicas_ready=status.get("readyReplicas", 0),
        replicas_updated=status.get("updatedReplicas", 0),
        is_observed=status.get("observedGeneration", 0) >= generation,
    )


def pod_views(pods: Iterable[Manifest], warnings: Mapping[str, str]) -> tuple[PodView, ...]:
    """Pods as views, by name; `warnings` holds the latest warning event by UID."""
    views = (pod_view(pod, warnings.get(pod["metadata"]["uid"], "")) for pod in pods)
    return tuple(sorted(views, key=lambda view: view.name))


def worker_views(
    pods: Iterable[Manifest], warnings: Mapping[str, str], facts: Mapping[str, WorkerFacts] | None
) -> tuple[PodView, ...]:
    """Workers as views; if a router tells, ready means: it sends requests, and KV crosses."""
    views = [view for view in pod_views(pods, warnings) if view.revision]
    if facts is None:
        return tuple(views)
    return tuple(_with_facts(view, facts.get(view.name, UNKNOWN_TO_ROUTERS)) for view in views)


def _with_facts(view: PodView, facts: WorkerFacts) -> PodView:
    problem = view.problem
    if problem is None and facts.transfer_failure:
        problem = Problem(Reason.TRANSFER_FAILED, f"{view.name}: {facts.transfer_failure}")
    return replace(
        view,
        problem=problem,
        is_ready=view.is_ready and not facts.problem,
        num_requests=facts.num_requests,
        num_blocks_held=facts.num_blocks_held,
        role=facts.role,
        route_problem=facts.problem if view.is_ready else "",
    )


def pod_view(pod: Manifest, warning: str) -> PodView:
    """One pod as a view."""
    metadata, status = pod["metadata"], pod.get("status", {})
    annotations = metadata.get("annotations", {})
    containers = status.get("containerStatuses", ())
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        ip=status.get("podIP", ""),
        revision=metadata.get("labels", {}).get(REVISION_LABEL, ""),
        is_ready=any(
            c.get("type") == "Ready" and c.get("status") == "True"
            for c in status.get("conditions", ())
        ),
        is_running=any("running" in c.get("state", {}) for c in containers),
        is_leaving="deletionTimestamp" in metadata,
        drain_started_ms=_time_ms(annotations.get(DRAIN_ANNOTATION)),
        problem=pod_problem(pod, warning),
        tls_secret=annotations.get(TLS_ANNOTATION, ""),
    )


def _time_ms(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1000)
    except ValueError:
        return 0  # an unreadable mark counts as a drain that began long ago
