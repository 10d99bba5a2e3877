"""Workers lent to the other role: who, how far, and back; and what routers know of workers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_operator import roles as roles_module
from kvasir_operator.core.manifests import Manifest, Ref
from kvasir_operator.core.roles import Phase, plan_roles
from kvasir_operator.core.views import Door, PodView, WorkerFacts
from kvasir_operator.roles import RoleSetter
from kvasir_operator.routers import Routers, merge, router_doors
from kvasir_proto.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from operator_builders import (
    condition_of,
    make_channels,
    make_decode_pool,
    make_pod,
    make_pod_view,
    make_replica_set,
    make_workers,
    plan_for,
)

POOL = Ref("DecodePool", "default", "chat-decode")


def flips_of(
    *pods: PodView, num_lent: int, told: dict[str, str] | None = None
) -> list[tuple[str, str, str]]:
    """Name, target and phase of every flip of a decode pool."""
    flips = plan_roles(
        pods, own_role="decode", other_role="prefill", num_lent=num_lent, told=told or {}
    )
    return [(flip.pod.name, flip.target, flip.phase.value) for flip in flips]


def make_decode(name: str, **facts: Any) -> PodView:
    return make_pod_view(name, **{"role": "decode", **facts})


def test_the_least_busy_worker_is_lent() -> None:
    busy, idle = make_decode("a", num_requests=5), make_decode("b")
    assert flips_of(busy, idle, num_lent=1) == [("b", "prefill", "Cordon")]
    assert flips_of(busy, idle, num_lent=0) == []


def test_a_flip_passes_through_its_phases_and_nobody_else_is_chosen() -> None:
    other = make_decode("a")
    chosen = make_decode("b", num_requests=9)
    told = {"uid-of-b": "prefill"}
    assert flips_of(other, chosen, num_lent=1, told=told) == [("b", "prefill", "Flip")]
    warm = make_decode("b", role="prefill", is_ready=False, route_problem="unreachable")
    assert flips_of(other, warm, num_lent=1) == [("b", "prefill", "Warm")]
    done = make_decode("b", role="prefill")
    assert flips_of(other, done, num_lent=1) == [("b", "prefill", "Serve")]


def test_a_worker_comes_back() -> None:
    pods = make_decode("a"), make_decode("b", role="prefill")
    assert flips_of(*pods, num_lent=0) == [("b", "decode", "Cordon")]
    assert flips_of(*pods, num_lent=0, told={"uid-of-b": "decode"}) == [("b", "decode", "Flip")]


def test_a_lent_worker_that_restarted_in_its_first_role_is_told_again() -> None:
    pods = make_decode("a", num_requests=1), make_decode("b")
    assert flips_of(*pods, num_lent=1, told={}) == [("b", "prefill", "Cordon")]


def test_workers_whose_role_nobody_knows_are_left_alone() -> None:
    assert flips_of(make_decode("a", role=""), make_decode("b", role=""), num_lent=1) == []


@given(
    roles=st.lists(st.sampled_from(["decode", "prefill"]), max_size=6), num_lent=st.integers(0, 9)
)
def test_one_worker_always_keeps_the_pools_role(roles: list[str], num_lent: int) -> None:
    pods = [make_decode(f"p{n}", role=role) for n, role in enumerate(roles)]
    after = {pod.name: pod.role for pod in pods}
    for name, target, phase in flips_of(*pods, num_lent=num_lent):
        if phase == Phase.CORDON:
            after[name] = target
    num_other = sum(role == "prefill" for role in after.values())
    assert num_other == min(num_lent, max(0, len(pods) - 1))


def facts(problem: str = "", role: str = "decode") -> WorkerFacts:
    return WorkerFacts(role, num_requests=0, num_blocks_held=0, problem=problem)


def settled_pool(known: dict[str, WorkerFacts] | None, **spec: Any) -> Manifest:
    """The status of a pool with two workers that are ready for Kubernetes."""
    pool = make_decode_pool(replicas=2, **spec)
    pods = make_workers(pool, make_pod("w-0"), make_pod("w-1"))
    return plan_for(pool, make_replica_set(pool, replicas=2), pods=pods, facts=known).status


def test_ready_means_that_the_router_sends_requests() -> None:
    fine = settled_pool({"w-0": facts(), "w-1": facts()})
    assert fine["readyReplicas"] == 2
    waiting = settled_pool({"w-0": facts()})
    assert waiting["readyReplicas"] == 1
    progressing = condition_of(waiting, "Progressing")
    assert (progressing["status"], progressing["reason"]) == ("True", "NotRoutable")
    assert "w-1: no router has seen it yet" in condition_of(waiting, "Available")["message"]


def test_without_an_answer_of_a_router_kubernetes_decides() -> None:
    assert settled_pool(None)["readyReplicas"] == 2


def test_lent_workers_are_shown() -> None:
    status = settled_pool({"w-0": facts(), "w-1": facts(role="prefill")}, lentReplicas=1)
    assert status["lentReplicas"] == 1
    assert status["roleFlips"] == [
        {"name": "w-1", "from": "decode", "to": "prefill", "phase": "Serve"}
    ]


def make_member(
    name: str,
    *,
    reachable: bool = True,
    healthy: bool = True,
    in_flight: int = 0,
    **canary: Any,
) -> inference_pb2.FleetMember:
    return inference_pb2.FleetMember(
        **canary,
        description=worker_pb2.WorkerDescription(
            address=common_pb2.PeerAddress(name=name),
            role=common_pb2.ROLE_DECODE,
            kv_transfer_healthy=healthy,
            load=worker_pb2.WorkerLoad(num_running=1),
        ),
        reachable=reachable,
        requests_in_flight=in_flight,
        blocks_known=7,
    )


def test_a_worker_is_routable_if_every_router_says_so() -> None:
    one = inference_pb2.FleetView(
        members=[make_member("a", in_flight=2), make_member("b"), make_member("c", healthy=False)]
    )
    two = inference_pb2.FleetView(
        members=[make_member("a", in_flight=3), make_member("c", healthy=False)]
    )
    known = merge([one, two])
    assert known["a"] == WorkerFacts("decode", 5, 7, "")
    assert "1 of 2 routers" in known["b"].problem
    assert "KV transfers fail" in known["c"].problem
    gone = inference_pb2.FleetView(members=[make_member("a", reachable=False)])
    assert merge([gone])["a"].problem == "no router reaches it"


def test_a_worker_is_ready_when_a_canary_has_crossed() -> None:
    crossed, pending, failed = (
        inference_pb2.CANARY_STATE_CROSSED,
        inference_pb2.CANARY_STATE_PENDING,
        inference_pb2.CANARY_STATE_FAILED,
    )
    one = inference_pb2.FleetView(
        members=[
            make_member("a", canary=crossed),
            make_member("b", canary=pending, canary_error="no KV block has crossed yet"),
            make_member("c", canary=crossed),
        ]
    )
    two = inference_pb2.FleetView(
        members=[
            make_member("a", canary=crossed),
            make_member("b", canary=crossed),
            make_member("c", canary=failed, canary_error="no canary from p: unreachable"),
        ]
    )
    known = merge([one, two])
    assert (known["a"].problem, known["a"].transfer_failure) == ("", "")
    assert (known["b"].problem, known["b"].transfer_failure) == ("no KV block has crossed yet", "")
    assert known["c"].problem == known["c"].transfer_failure
    assert known["c"].problem == "KV transfers fail: no canary from p: unreachable"


def test_a_pool_whose_canaries_do_not_cross_says_so() -> None:
    why = "KV transfers fail: no canary from p: unreachable"
    broken = WorkerFacts("decode", 0, 0, why, why)
    status = settled_pool({"w-0": facts(), "w-1": broken}, minReplicas=2)
    available, degraded = condition_of(status, "Available"), condition_of(status, "Degraded")
    assert (available["status"], available["reason"]) == ("False", "TransferFailed")
    assert (degraded["status"], degraded["reason"]) == ("True", "TransferFailed")
    assert degraded["message"] == f"w-1: {why}"
    assert condition_of(settled_pool({"w-0": facts(), "w-1": facts()}), "Degraded")["status"] == (
        "False"
    )


class FakeRouter(inference_pb2_grpc.InferenceServicer):
    """Knows one worker."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def Fleet(
        self, request: inference_pb2.FleetRequest, context: Any
    ) -> inference_pb2.FleetView:
        self.num_asked += 1
        return inference_pb2.FleetView(members=[make_member("a")])


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """Takes any role."""

    def __init__(self) -> None:
        self.roles: list[int] = []

    async def SetRole(
        self, request: worker_pb2.SetRoleRequest, context: Any
    ) -> worker_pb2.WorkerDescription:
        self.roles.append(request.role)
        return worker_pb2.WorkerDescription(role=request.role)


@pytest.fixture
async def server() -> AsyncIterator[tuple[FakeRouter, FakeWorker, int]]:
    made = grpc.aio.server()
    router, worker = FakeRouter(), FakeWorker()
    inference_pb2_grpc.add_InferenceServicer_to_server(router, made)
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, made)
    port = made.add_insecure_port("127.0.0.1:0")
    await made.start()
    yield router, worker, port
    await made.stop(None)


def make_router_pod(port: int, *, ready: bool = True) -> Manifest:
    pod = make_pod("chat-router-x", ready=ready, podIP="127.0.0.1")
    ports = [{"name": "http", "containerPort": 1}, {"name": "grpc", "containerPort": port}]
    return pod | {"spec": {"containers": [{"ports": ports}]}}


async def test_routers_are_asked_once_in_a_while(
    server: tuple[FakeRouter, FakeWorker, int],
) -> None:
    router, _, port = server
    asked, service = Routers(make_channels()), Ref("ModelService", "default", "chat")
    for _ in range(3):
        known = await asked.facts(service, [make_router_pod(port)])
        assert known is not None
        assert known["a"].problem == ""
    assert router.num_asked == 1
    not_ready = [make_router_pod(port, ready=False)]
    assert await Routers(make_channels()).facts(service, not_ready) is None
    assert router_doors([make_router_pod(port)]) == [Door(f"127.0.0.1:{port}", "default")]


async def test_a_router_that_does_not_answer_is_unknown() -> None:
    asked, service = Routers(make_channels()), Ref("ModelService", "default", "chat")
    assert await asked.facts(service, [make_router_pod(1)]) is None


async def test_a_worker_is_told_its_role_and_believed_for_a_while(
    server: tuple[FakeRouter, FakeWorker, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, worker, port = server
    monkeypatch.setattr(roles_module, "WORKER_GRPC_PORT", port)
    told = asyncio.Event()
    setter = RoleSetter(make_channels(), on_progress=lambda _: told.set())
    pod = make_pod_view("a", ip="127.0.0.1")
    assert setter.start(POOL, pod, "prefill")
    assert not setter.start(POOL, pod, "prefill"), "one call at a time"
    await asyncio.wait_for(told.wait(), 20)
    assert worker.roles == [common_pb2.ROLE_PREFILL]
    assert setter.told() == {"uid-of-a": "prefill"}
    monkeypatch.setattr(roles_module.time, "monotonic", lambda: 1e12)
    assert setter.told() == {}
    await setter.close()
