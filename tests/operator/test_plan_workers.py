"""Steps of scaling and rollout, alone and played through with a ReplicaSet controller."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_operator.core.views import PodView
from kvasir_operator.core.workers import Goal, Step, leaving_order, plan_step
from operator_builders import make_pod_view

STEPS_MAX = 400


def step_of(goal: Goal, *pods: PodView, drained: Sequence[str] = ()) -> Step:
    """The step for these pods; those named are drained."""
    revisions = {pod.revision for pod in pods}
    return plan_step(
        goal,
        pods,
        revisions=revisions,
        is_drained=lambda pod: not pod.is_running or pod.name in drained,
    )


LEAST = {
    "requests": (make_pod_view("a", num_requests=2), make_pod_view("b", num_requests=1)),
    "blocks": (make_pod_view("a", num_blocks_held=9), make_pod_view("b", num_blocks_held=3)),
    "requests before blocks": (
        make_pod_view("a", num_requests=1),
        make_pod_view("b", num_blocks_held=99),
    ),
    "one that cannot serve": (make_pod_view("a"), make_pod_view("b", is_ready=False)),
}


@pytest.mark.parametrize("pods", LEAST.values(), ids=LEAST)
def test_the_worker_of_least_value_leaves(pods: tuple[PodView, PodView]) -> None:
    step = step_of(Goal(replicas=1, newest="new"), *pods)
    assert [pod.name for pod in step.draining] == ["b"]
    assert step.replicas == {"new": 2}
    marked = replace(pods[1], drain_started_ms=1)
    done = step_of(Goal(replicas=1, newest="new"), pods[0], marked, drained="b")
    assert done.replicas == {"new": 1}


def test_a_worker_that_drains_stays_the_one_that_leaves() -> None:
    busy = make_pod_view("a", num_requests=9, drain_started_ms=1)
    step = step_of(Goal(replicas=1, newest="new"), busy, make_pod_view("b"))
    assert [pod.name for pod in step.draining] == ["a"]


def test_rollout_begins_with_a_new_worker_not_with_the_end_of_an_old_one() -> None:
    old = [make_pod_view(name, revision="old") for name in "ab"]
    step = step_of(Goal(replicas=2, newest="new"), *old)
    assert step.replicas == {"old": 2, "new": 1}
    assert (step.draining, step.num_outdated) == ((), 2)


def test_an_old_worker_leaves_once_a_new_one_serves() -> None:
    old = [make_pod_view("a", revision="old", num_requests=3), make_pod_view("b", revision="old")]
    goal = Goal(replicas=2, newest="new")
    waiting = step_of(goal, *old, make_pod_view("n", is_ready=False))
    assert waiting.draining == ()
    step = step_of(goal, *old, make_pod_view("n"))
    assert [pod.name for pod in step.draining] == ["b"]
    assert step.replicas == {"old": 2, "new": 1}


def test_rollout_waits_for_the_other_pool() -> None:
    pods = [make_pod_view("a", revision="old"), make_pod_view("b", revision="old")]
    goal = Goal(replicas=3, newest="new", updated_max=1)
    step = step_of(goal, *pods, make_pod_view("n"))
    assert step.replicas == {"old": 2, "new": 1}
    assert step.draining == ()
    lost = step_of(goal, pods[0], make_pod_view("n"))
    assert lost.replicas == {"old": 1, "new": 2}, "capacity counts more than the pace"


def test_a_revert_takes_back_the_workers_of_the_given_up_template() -> None:
    """Which of the two templates is the newest is all that changes."""
    pods = [make_pod_view("a", revision="old"), make_pod_view("n", is_ready=False)]
    step = step_of(Goal(replicas=2, newest="old"), *pods)
    assert step.replicas["old"] == 2
    assert [pod.name for pod in step.draining] == ["n"]


def test_without_surge_an_old_worker_makes_room_first() -> None:
    old = [make_pod_view(name, revision="old") for name in "ab"]
    goal = Goal(replicas=2, newest="new", max_surge=0, max_unavailable=1)
    step = step_of(goal, *old)
    assert step.replicas == {"old": 2, "new": 0}
    assert len(step.draining) == 1


def test_a_drained_worker_that_is_wanted_again_is_replaced() -> None:
    pods = [make_pod_view("a"), make_pod_view("b", drain_started_ms=1)]
    goal = Goal(replicas=2, newest="new")
    assert step_of(goal, *pods).replicas == {"new": 3}, "while it still has work"
    step = step_of(goal, *pods, drained="b")
    assert [pod.name for pod in step.restarts] == ["b"]
    assert step.replicas == {"new": 2}


@dataclass
class Play:
    """A pool as its controller and the kubelets treat it; `choose(n)` decides who is quick."""

    choose: Callable[[int], int]
    pods: list[PodView] = field(default_factory=list)
    sets: dict[str, int] = field(default_factory=dict)
    drained: set[str] = field(default_factory=set)
    num_made: int = 0

    def step(self, goal: Goal) -> Step:
        """One reconcile."""
        step = plan_step(goal, self.pods, revisions=self.sets, is_drained=self.is_drained)
        for pod in step.draining:
            if pod.drain_started_ms is None:
                index = self.pods.index(pod)
                self.pods[index] = replace(pod, drain_started_ms=1)
        for pod in step.restarts:
            self.pods.remove(pod)
        self.sets = dict(step.replicas)
        return step

    def is_drained(self, pod: PodView) -> bool:
        """Whether nobody misses the pod."""
        return not pod.is_running or pod.name in self.drained

    def control(self) -> None:
        """Do as the ReplicaSet controller does, in its order of removal."""
        for revision, wanted in self.sets.items():
            mine = [pod for pod in self.pods if pod.revision == revision]
            for _ in range(wanted - len(mine)):
                self.num_made += 1
                made = make_pod_view(
                    f"p{self.num_made}", revision=revision, is_ready=False, is_running=False
                )
                self.pods.append(made)
            surplus = sorted(
                mine, key=lambda p: (p.is_running, p.is_ready, p.drain_started_ms is None)
            )
            for pod in surplus[: max(0, len(mine) - wanted)]:
                assert self.is_drained(pod) or not pod.is_ready, f"{pod} was cut off"
                self.pods.remove(pod)

    def live(self) -> None:
        """One worker gets on: it starts, or it drains to its end (and is not ready then)."""
        slow = [p for p in self.pods if not p.is_ready or p.drain_started_ms is not None]
        slow = [p for p in slow if p.name not in self.drained]
        if not slow:
            return
        pod = slow[self.choose(len(slow))]
        if pod.drain_started_ms is not None:
            self.drained.add(pod.name)
        self.pods[self.pods.index(pod)] = replace(
            pod, is_running=True, is_ready=pod.drain_started_ms is None
        )

    def num_serving(self) -> int:
        """Workers that take new requests."""
        return sum(p.is_ready and p.drain_started_ms is None for p in self.pods)

    def is_settled(self, goal: Goal) -> bool:
        """Whether exactly the wanted workers are there."""
        counts = {len(self.pods), self.num_serving(), goal.replicas}
        return len(counts) == 1 and {p.revision for p in self.pods} == {goal.newest}


def play(run: Play, goal: Goal, *, serving_min: int = 0, num_steps: int = STEPS_MAX) -> bool:
    """Go on until the goal is reached; the workers that serve never fall below a number."""
    for _ in range(num_steps):
        run.step(goal)
        assert run.num_serving() >= serving_min
        run.control()
        assert run.num_serving() >= serving_min
        num_staying = sum(p.drain_started_ms is None for p in run.pods)
        assert num_staying <= max(goal.replicas, serving_min) + goal.max_surge
        if run.is_settled(goal):
            return True
        run.live()
    return False


sizes = st.integers(1, 6)


@settings(deadline=None, max_examples=150)
@given(before=sizes, after=sizes, surge=st.integers(0, 3), data=st.data())
def test_every_rollout_and_scaling_ends_and_keeps_the_capacity(
    before: int, after: int, surge: int, data: st.DataObject
) -> None:
    run = Play(lambda n: data.draw(st.integers(0, n - 1)))
    assert play(run, Goal(replicas=before, newest="old"))
    unavailable = 0 if surge else 1
    goal = Goal(replicas=after, newest="new", max_surge=surge, max_unavailable=unavailable)
    assert play(run, goal, serving_min=min(before, after) - unavailable)


@settings(deadline=None, max_examples=100)
@given(size=sizes, num_steps=st.integers(0, 12), data=st.data())
def test_a_rollout_is_reversible_at_any_step(
    size: int, num_steps: int, data: st.DataObject
) -> None:
    run = Play(lambda n: data.draw(st.integers(0, n - 1)))
    assert play(run, Goal(replicas=size, newest="old"))
    play(run, Goal(replicas=size, newest="new"), serving_min=size, num_steps=num_steps)
    assert play(run, Goal(replicas=size, newest="old"), serving_min=size)


@given(
    pods=st.lists(
        st.builds(
            make_pod_view,
            st.uuids().map(str),
            num_requests=st.integers(0, 3),
            num_blocks_held=st.integers(0, 3),
            is_ready=st.booleans(),
        ),
        max_size=8,
    ),
    replicas=sizes,
)
def test_who_stays_is_worth_more_than_who_leaves(pods: list[PodView], replicas: int) -> None:
    step = step_of(Goal(replicas=replicas, newest="new"), *pods)
    stay = [leaving_order(pod) for pod in pods if pod not in step.draining]
    assert len(step.draining) == max(0, len(pods) - replicas)
    assert all(leaving_order(pod) < min(stay) for pod in step.draining)
