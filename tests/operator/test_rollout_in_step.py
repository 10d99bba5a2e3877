"""Prefill and decode roll in step: neither is more than one worker ahead, and both arrive."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_operator.core.manifests import Manifest
from kvasir_operator.core.rollout import Progress, updated_max
from kvasir_operator.core.workers import Goal
from operator_builders import child_of, make_object, make_service, plan_for
from test_plan_workers import STEPS_MAX, Play, play, sizes

OWNED = [{"uid": "uid-of-chat", "controller": True}]


def num_outdated(run: Play) -> int:
    """Workers of the old template that do not leave yet."""
    return sum(p.revision == "old" and p.drain_started_ms is None for p in run.pods)


def num_new(run: Play) -> int:
    """Workers of the new template, ready or not."""
    return sum(p.revision == "new" for p in run.pods)


@settings(deadline=None, max_examples=60)
@given(prefill=sizes, decode=sizes, seed=st.integers(0, 2**32))
def test_neither_pool_is_more_than_a_worker_ahead(prefill: int, decode: int, seed: int) -> None:
    choose = Random(seed).randrange
    wanted = (prefill, decode)
    runs = [Play(choose) for _ in wanted]
    for run, replicas in zip(runs, wanted, strict=True):
        assert play(run, Goal(replicas=replicas, newest="old"))
    for _ in range(STEPS_MAX):
        goals = []
        for own, other in ((0, 1), (1, 0)):
            progress = Progress(wanted[other], num_outdated(runs[other]))
            limit = updated_max(wanted[own], other=progress)
            goals.append(Goal(replicas=wanted[own], newest="new", updated_max=limit))
            share = 1 - progress.outdated / progress.wanted
            runs[own].step(goals[-1])
            runs[own].control()
            assert num_new(runs[own]) <= wanted[own] * share + 2
        if all(run.is_settled(goal) for run, goal in zip(runs, goals, strict=True)):
            return
        runs[choose(2)].live()
    raise AssertionError("the rollout does not end")


def test_limit_follows_the_other_pool() -> None:
    assert updated_max(4, other=Progress(wanted=4, outdated=4)) == 1
    assert updated_max(4, other=Progress(wanted=4, outdated=2)) == 3
    assert updated_max(4, other=Progress(wanted=4, outdated=1)) is None
    assert updated_max(4, other=Progress(wanted=4, outdated=0)) is None


def make_pool(kind: str, name: str, **facts: int) -> Manifest:
    """A live pool of four workers as the service would apply it."""
    pool = make_object(kind, name, {}, ownerReferences=OWNED)
    made = child_of(plan_for(make_service(image="kvasir:old")), kind, name)
    pool["spec"] = made["spec"] | {"replicas": 4}
    pool["status"] = {"observedGeneration": 1, "outdatedReplicas": 0, **facts}
    return pool


def limits_of(image: str, *pools: Manifest) -> dict[str, int | None]:
    """`updatedMax` that the service gives to both pools."""
    plan = plan_for(make_service(image=image), *pools)
    names = {"PrefillPool": "chat-prefill", "DecodePool": "chat-decode"}
    return {
        kind: child_of(plan, kind, name)["spec"].get("updatedMax") for kind, name in names.items()
    }


def test_a_new_image_begins_with_one_worker_of_each_pool() -> None:
    pools = make_pool("PrefillPool", "chat-prefill"), make_pool("DecodePool", "chat-decode")
    assert limits_of("kvasir:old", *pools) == {"PrefillPool": None, "DecodePool": None}
    assert limits_of("kvasir:new", *pools) == {"PrefillPool": 1, "DecodePool": 1}


def test_the_pool_that_is_ahead_waits() -> None:
    pools = (
        make_pool("PrefillPool", "chat-prefill", outdatedReplicas=2),
        make_pool("DecodePool", "chat-decode", outdatedReplicas=4),
    )
    assert limits_of("kvasir:old", *pools) == {"PrefillPool": 1, "DecodePool": 3}


def test_a_status_that_is_behind_changes_no_limit() -> None:
    prefill = make_pool("PrefillPool", "chat-prefill")
    prefill["spec"]["updatedMax"] = 2
    decode = make_pool("DecodePool", "chat-decode", observedGeneration=0)
    assert limits_of("kvasir:old", prefill, decode)["PrefillPool"] == 2
