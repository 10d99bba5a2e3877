"""Lends workers of a pool to the other role, and takes them back, without a restart.

A worker that changes its role keeps its KV and ends what it has begun. Which worker has which role
is read from the workers; nothing is remembered. Invariant: at least one worker of a pool keeps the
pool's own role.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvasir_operator.core.views import PodView
from kvasir_operator.core.workers import leaving_order


class Phase(enum.StrEnum):
    """How far a change of role has come."""

    CORDON = "Cordon"  # chosen; the worker is being told
    FLIP = "Flip"  # the worker has changed; routers still take it for what it was
    WARM = "Warm"  # routers know its new role, but cannot send it requests yet
    SERVE = "Serve"  # it serves in its new role


@dataclass(frozen=True, slots=True)
class Flip:
    """A worker that serves, or is about to serve, another role than its pool's."""

    pod: PodView
    source: str
    target: str
    phase: Phase


def plan_roles(
    pods: Sequence[PodView],
    *,
    own_role: str,
    other_role: str,
    num_lent: int,
    told: Mapping[str, str],
) -> tuple[Flip, ...]:
    """All changes under way and done; `told` are the roles that workers were given, by UID.

    Workers whose role no router knows are left alone. Phase Cordon means: tell the worker.
    """
    known = [
        pod
        for pod in sorted(pods, key=leaving_order)
        if pod.is_running and not pod.is_leaving and pod.drain_started_ms is None and pod.role
    ]
    lent = [pod for pod in known if _heads_for(pod, told) == other_role]
    own = [pod for pod in known if pod not in lent]
    wanted = min(num_lent, max(0, len(known) - 1))
    give = [pod for pod in own if pod.is_ready][: max(0, wanted - len(lent))]
    take = lent[: max(0, len(lent) - wanted)]
    flips = []
    for pod in lent:
        if pod not in take:
            flips.append(Flip(pod, own_role, other_role, _phase(pod, other_role, told)))
    flips += [Flip(pod, own_role, other_role, Phase.CORDON) for pod in give]
    flips += [Flip(pod, other_role, own_role, Phase.CORDON) for pod in take]
    flips += [
        Flip(pod, other_role, own_role, Phase.FLIP)
        for pod in own
        if pod.role == other_role and pod not in give
    ]
    return tuple(sorted(flips, key=lambda flip: flip.pod.name))


def _heads_for(pod: PodView, told: Mapping[str, str]) -> str:
    """The role that a worker has or was given last."""
    return told.get(pod.uid, pod.role)


def _phase(pod: PodView, target: str, told: Mapping[str, str]) -> Phase:
    if pod.role != target:
        return Phase.FLIP if told.get(pod.uid) == target else Phase.CORDON
    return Phase.SERVE if not pod.route_problem else Phase.WARM
