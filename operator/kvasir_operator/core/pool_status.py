"""The status of a pool: counts, who drains, and the conditions."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvasir_operator.core.conditions import (
    ConditionType,
    Finding,
    Problem,
    Reason,
    degraded,
    to_conditions,
)
from kvasir_operator.core.manifests import Manifest, selector_text
from kvasir_operator.core.ownership import Ownership, ownership
from kvasir_operator.core.roles import Flip, Phase
from kvasir_operator.core.views import PodView
from kvasir_operator.core.world import World

UNROUTED_SHOWN_MAX = 3


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """How many pods there are, and of which sort."""

    wanted: int
    needed: int  # with fewer that can serve, the pool is not available
    present: int
    ready: int
    outdated: int  # of an older template
    is_created: bool  # the workload of the present template exists
    is_observed: bool  # and its controller has seen it
    revision: str = ""
    unrouted: tuple[str, ...] = ()  # ready for Kubernetes, but routers send them nothing: why

    @property
    def is_settled(self) -> bool:
        """Whether every wanted pod exists, is of the present template and can serve."""
        counts = {self.wanted, self.present, self.ready}
        return self.is_created and self.is_observed and not self.outdated and len(counts) == 1


def pool_status(
    world: World,
    labels: dict[str, str],
    facts: PoolFacts,
    problems: Sequence[Problem],
    *,
    draining: Sequence[PodView] | None = None,
    flips: Sequence[Flip] = (),
) -> Manifest:
    """The whole status; `draining` is None where pods leave without a drain."""
    findings = [
        _available(facts, problems),
        _progressing(facts, draining or ()),
        degraded(problems),
    ]
    if draining is not None:
        findings.append(_draining(draining))
    owners = ownership(world.obj, world.autoscalers)
    findings.append(_contested(owners))
    status: Manifest = {
        "observedGeneration": world.generation,
        "replicas": facts.present,
        "readyReplicas": facts.ready,
        "outdatedReplicas": facts.outdated,
        "selector": selector_text(labels),
        "drainingPods": [_draining_pod(world, pod) for pod in draining or ()],
        "conditions": to_conditions(
            findings, world.conditions, generation=world.generation, now_ms=world.now_ms
        ),
    }
    if draining is not None:
        status["lentReplicas"] = sum(
            flip.phase is Phase.SERVE and flip.pod.role == flip.target for flip in flips
        )
        status["roleFlips"] = [
            {
                "name": flip.pod.name,
                "from": flip.source,
                "to": flip.target,
                "phase": flip.phase.value,
            }
            for flip in flips
        ]
    if owners.owner:
        status["replicasOwner"] = owners.owner
    if facts.revision:
        status["revision"] = facts.revision
    return status


def _draining_pod(world: World, pod: PodView) -> Manifest:
    drain = world.drains.get(pod.uid)
    entry: Manifest = {"name": pod.name}
    if drain is not None and drain.requests_left is not None:
        entry["requestsLeft"] = drain.requests_left
    if drain is not None and drain.blocks_left is not None:
        entry["blocksLeft"] = drain.blocks_left
    return entry


def _available(facts: PoolFacts, problems: Sequence[Problem]) -> Finding:
    text = f"{facts.ready} of {facts.wanted} ready, at least {facts.needed} needed"
    if facts.unrouted:
        text += f"; the router waits for {', '.join(facts.unrouted[:UNROUTED_SHOWN_MAX])}"
    if facts.ready >= facts.needed:
        return Finding(ConditionType.AVAILABLE, True, Reason.READY, text)
    if problems:
        text = f"{text}: {problems[0].message}"
    reason = problems[0].reason if problems else Reason.WORKERS_NOT_READY
    return Finding(ConditionType.AVAILABLE, False, reason, text)


def _progressing(facts: PoolFacts, draining: Sequence[PodView]) -> Finding:
    def under_way(reason: Reason, message: str) -> Finding:
        return Finding(ConditionType.PROGRESSING, True, reason, message)

    if not facts.is_created:
        return under_way(Reason.CREATING, "the pods are being created")
    if facts.outdated or not facts.is_observed:
        text = f"{facts.outdated} of {facts.present} pods are of an older template"
        return under_way(Reason.ROLLING_OUT, text)
    if draining:
        names = ", ".join(pod.name for pod in draining)
        return under_way(Reason.DRAINING, f"waiting for {names} to drain")
    if facts.present != facts.wanted:
        return under_way(Reason.SCALING, f"from {facts.present} to {facts.wanted} pods")
    if facts.ready < facts.wanted:
        text = f"{facts.ready} of {facts.wanted} pods are ready"
        return under_way(Reason.NOT_ROUTABLE if facts.unrouted else Reason.STARTING, text)
    return Finding(ConditionType.PROGRESSING, False, Reason.STABLE, "all pods are as wanted")


def _contested(owners: Ownership) -> Finding:
    kind = ConditionType.REPLICAS_CONTESTED
    if owners.rivals:
        text = f"{' and '.join(owners.rivals)} all set the number of pods: keep one of them"
        return Finding(kind, True, Reason.SEVERAL_OWNERS, text)
    text = f"{owners.owner or 'the ModelService or its author'} sets the number of pods"
    return Finding(kind, False, Reason.ONE_OWNER, text)


def _draining(draining: Sequence[PodView]) -> Finding:
    if not draining:
        return Finding(
            ConditionType.DRAINING, False, Reason.NOT_DRAINING, "no worker is being removed"
        )
    names = ", ".join(pod.name for pod in draining)
    text = f"requests of {names} are finished first"
    return Finding(ConditionType.DRAINING, True, Reason.DRAINING, text)
