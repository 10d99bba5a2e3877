"""Which workers of a pool stay, which come and which leave, in scaling and in a rollout alike.

Workers of one template (one revision) belong to one ReplicaSet. Invariants: workers that can serve
never fall below `replicas - max_unavailable` by our doing; no more than `replicas + max_surge`
exist besides those that drain in their last moments; a worker leaves only when it is drained, is
not running, or its time is over; and of those that may leave, the one of least value goes first.
All state is in the pods: which revision they have, and which of them are marked to drain.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvasir_operator.core.views import PodView


@dataclass(frozen=True, slots=True)
class Goal:
    """How many workers there should be, and how a rollout may go about it."""

    replicas: int
    newest: str  # revision of the present template
    updated_max: int | None = None  # workers that may be of it yet; None: all
    max_surge: int = 1
    max_unavailable: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """What to do now."""

    replicas: Mapping[str, int]  # of the ReplicaSet of each revision
    draining: tuple[PodView, ...] = ()  # they leave, but still have work
    restarts: tuple[PodView, ...] = ()  # drained, and to be replaced by an empty worker
    num_outdated: int = 0  # workers of older revisions that do not leave yet


def plan_step(
    goal: Goal,
    pods: Sequence[PodView],
    *,
    revisions: Iterable[str],
    is_drained: Callable[[PodView], bool],
) -> Step:
    """The next step; `revisions` are those that have a ReplicaSet."""
    present = [pod for pod in pods if not pod.is_leaving]
    kept = sorted((p for p in present if p.drain_started_ms is None), key=leaving_order)
    new = [pod for pod in kept if pod.revision == goal.newest]
    old = [pod for pod in kept if pod.revision != goal.newest]
    # 1. How many of each; a gap that old workers leave is filled with new ones in any case.
    allowed = goal.replicas if goal.updated_max is None else goal.updated_max
    new_goal = max(min(goal.replicas, allowed), goal.replicas - len(old))
    room = goal.replicas + goal.max_surge - sum(p.revision != goal.newest for p in present)
    new_wanted = min(new_goal, max(len(new), room))
    # 2. Who leaves.
    leavers = new[: max(0, len(new) - new_goal)]
    stay = [pod for pod in kept if pod not in leavers]
    leavers += _old_leavers(goal, old, stay, num_max=len(old) - (goal.replicas - new_goal))
    # 3. What the ReplicaSets have meanwhile: those that stay, and those that still have work.
    marked = [pod for pod in present if pod.drain_started_ms is not None]
    busy = tuple(pod for pod in (*marked, *leavers) if not is_drained(pod))
    drained_new = [p for p in marked if p.revision == goal.newest and p not in busy]
    counts = Counter(pod.revision for pod in (*busy, *(p for p in old if p not in leavers)))
    counts[goal.newest] += new_wanted
    return Step(
        replicas={revision: counts[revision] for revision in {*revisions, goal.newest}},
        draining=busy,
        restarts=tuple(drained_new[: max(0, new_wanted - len(new))]),
        num_outdated=sum(pod not in leavers for pod in old),
    )


def _old_leavers(
    goal: Goal, old: Sequence[PodView], stay: Sequence[PodView], *, num_max: int
) -> list[PodView]:
    """Old workers that may go: those that do not serve, then as many as others stand in for."""
    idle = [pod for pod in old if not pod.is_ready][: max(0, num_max)]
    num_ready = sum(pod.is_ready for pod in stay)
    num_spare = num_ready - (goal.replicas - goal.max_unavailable)
    ready = [pod for pod in old if pod.is_ready]
    return [*idle, *ready[: max(0, min(num_spare, num_max - len(idle)))]]


def leaving_order(pod: PodView) -> tuple[bool, int, int, str]:
    """The worker of least value first: it cannot serve, has little work, few blocks."""
    return pod.is_ready, pod.num_requests, pod.num_blocks_held, pod.name
