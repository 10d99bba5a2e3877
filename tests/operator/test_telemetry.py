"""The collector: differences of counters, restarts, profiles, silent routers."""

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from kvasir_operator.core.manifests import Manifest, Ref
from kvasir_operator.core.planner.facts import Role
from kvasir_operator.core.planner.history import History
from kvasir_operator.core.planner.profile import StepSample, decode_profile
from kvasir_operator.telemetry import Collector, Look, _Known, note, view_of
from kvasir_proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc, worker_pb2
from operator_builders import make_channels

SERVICE = Ref("ModelService", "default", "chat")
POOLS = {"prefill": "chat-prefill", "decode": "chat-decode"}


def make_counts(arrivals: int, *, epoch_ms: int = 1) -> inference_pb2.RouterTelemetry:
    """Requests with 1,000 prompt tokens, of which 400 were cached, and 50 output tokens."""
    return inference_pb2.RouterTelemetry(
        epoch_ms=epoch_ms,
        arrivals=arrivals,
        measured=arrivals,
        prompt_tokens=1_000 * arrivals,
        uncached_tokens=600 * arrivals,
        uncached_tokens_squared=600.0**2 * arrivals,
        output_tokens=50 * arrivals,
        judged=arrivals,
        attained=arrivals // 2,
    )


def make_member(name: str, **load: Any) -> inference_pb2.FleetMember:
    """A worker with 100 blocks of 32 tokens."""
    return inference_pb2.FleetMember(
        description=worker_pb2.WorkerDescription(
            address=common_pb2.PeerAddress(name=name),
            layout=common_pb2.KvLayout(block_tokens=32),
            load=worker_pb2.WorkerLoad(blocks_total=100, **load),
        ),
        reachable=True,
    )


MEMBERS = (
    make_member("chat-prefill-x-1", prefill_us_per_token=200.0, prefill_tokens_queued=700),
    make_member("chat-decode-x-1", num_running=4, decode_ms_per_step=30.0),
)


def look(router: str, arrivals: int, **facts: Any) -> Look:
    """What a router says; all routers know the same workers."""
    view = inference_pb2.FleetView(members=MEMBERS)
    return Look(router, make_counts(arrivals, **facts), view)


def make_known(*, keep_ms: int = 60_000) -> _Known:
    return _Known(History(keep_ms=keep_ms), keep_ms=keep_ms)


def test_first_look_gives_no_load() -> None:
    known = make_known()
    note(known, [look("a", 100)], POOLS, now_ms=0)
    assert view_of(known, POOLS).now is None


def test_load_is_the_growth_over_all_routers() -> None:
    known = make_known()
    note(known, [look("a", 100), look("b", 10)], POOLS, now_ms=0)
    note(known, [look("a", 130), look("b", 40)], POOLS, now_ms=15_000)
    view = view_of(known, POOLS)
    assert view.now is not None
    demand = view.now.prefill
    assert demand.requests_per_s == pytest.approx(4.0)
    assert (demand.uncached_tokens, demand.output_tokens) == (600, 50)
    assert demand.queued_tokens == 700
    assert view.observed.hit_rate == pytest.approx(0.4)
    assert view.observed.attainment == pytest.approx(0.5)


def test_restarted_router_counts_from_zero_and_a_new_one_only_from_its_second_look() -> None:
    known = make_known()
    note(known, [look("a", 1_000)], POOLS, now_ms=0)
    note(known, [look("a", 15, epoch_ms=2), look("new", 5_000)], POOLS, now_ms=15_000)
    view = view_of(known, POOLS)
    assert view.now is not None
    assert view.now.prefill.requests_per_s == pytest.approx(1.0)


def test_kept_load_is_known_after_a_whole_window_and_forgets_what_is_older() -> None:
    known, total = make_known(keep_ms=600_000), 0
    note(known, [look("a", 0)], POOLS, now_ms=0)
    rates = [600] * 10 + [60] * 60
    for step, arrivals in enumerate(rates, start=1):
        total += arrivals
        note(known, [look("a", total)], POOLS, now_ms=15_000 * step)
        view = view_of(known, POOLS)
        assert (view.kept is None) == (step < 40)
        if step == 45:
            assert view.kept is not None
            assert view.kept.prefill.requests_per_s >= 40
    assert view.kept is not None
    assert view.kept.prefill.requests_per_s < 10


def test_speeds_of_both_pools_come_from_all_workers() -> None:
    known = make_known()
    note(known, [look("a", 0)], POOLS, now_ms=0)
    note(known, [look("a", 10)], POOLS, now_ms=15_000)
    speeds = view_of(known, POOLS).speeds
    assert set(speeds) == set(Role)
    assert speeds[Role.DECODE].prefill_us_per_token == 200.0
    assert speeds[Role.DECODE].kv_tokens == 3_200
    step_ms = speeds[Role.PREFILL].decode_base_ms + 4 * speeds[Role.PREFILL].decode_ms_per_request
    assert step_ms == pytest.approx(30.0)


def test_pools_of_different_hardware_are_measured_apart() -> None:
    def member(name: str, *, prefill_us: float, step_ms: float) -> inference_pb2.FleetMember:
        load = {"num_running": 1, "blocks_total": 100}
        speed = {"prefill_us_per_token": prefill_us, "decode_ms_per_step": step_ms}
        return inference_pb2.FleetMember(
            description=worker_pb2.WorkerDescription(
                address=common_pb2.PeerAddress(name=name),
                layout=common_pb2.KvLayout(block_tokens=32),
                load=worker_pb2.WorkerLoad(**load, **speed),
            )
        )

    pools = {"gpu": "gpu", "gpu-big": "gpu-big", "young": "young", "none": "none"}
    members = [
        member("gpu-a1-x", prefill_us=90.0, step_ms=40.0),
        member("gpu-big-b2-y", prefill_us=30.0, step_ms=10.0),
        member("young-c3-z", prefill_us=0.0, step_ms=0.0),
    ]
    fleet = inference_pb2.FleetView(members=members)
    known = make_known()
    for step in range(2):
        looks = [Look("a", make_counts(10 * step), fleet)]
        note(known, looks, pools, now_ms=15_000 * step)
    speeds = view_of(known, pools).speeds
    assert set(speeds) == {"gpu", "gpu-big", "young"}
    assert [speeds[key].prefill_us_per_token for key in ("gpu", "gpu-big")] == [90.0, 30.0]
    steps_ms = {k: s.decode_base_ms + s.decode_ms_per_request for k, s in speeds.items()}
    assert steps_ms["gpu"] == pytest.approx(40.0)
    assert steps_ms["gpu-big"] == pytest.approx(10.0)
    assert speeds["young"].prefill_us_per_token == 60.0, "as all of the service"


def test_profile_is_the_line_through_the_steps() -> None:
    steps = [StepSample(n, 20 + 0.5 * n) for n in (1, 4, 9, 20)]
    assert decode_profile(steps) == (pytest.approx(20.0), pytest.approx(0.5))
    assert decode_profile([]) is None
    falling = decode_profile([StepSample(1, 30.0), StepSample(9, 10.0)])
    assert falling == (pytest.approx(20.0), 0.0)


class FakeRouter(inference_pb2_grpc.InferenceServicer):
    """Answers as a router with growing counters."""

    arrivals = 0

    async def Telemetry(self, request: Any, context: Any) -> inference_pb2.RouterTelemetry:
        self.arrivals += 10
        return make_counts(self.arrivals)

    async def Fleet(self, request: Any, context: Any) -> inference_pb2.FleetView:
        return inference_pb2.FleetView(members=MEMBERS)


@pytest.fixture
async def router_port() -> AsyncIterator[int]:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    inference_pb2_grpc.add_InferenceServicer_to_server(FakeRouter(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield port
    await server.stop(None)


def make_router_pod(port: int) -> Manifest:
    """A ready router pod."""
    container = {"name": "router", "ports": [{"name": "grpc", "containerPort": port}]}
    ready = {"type": "Ready", "status": "True"}
    return {
        "metadata": {"name": "chat-router-1", "namespace": "default"},
        "spec": {"containers": [container]},
        "status": {"podIP": "127.0.0.1", "conditions": [ready]},
    }


async def test_collector_asks_routers_once_per_interval(router_port: int) -> None:
    collector, pods = Collector(make_channels()), [make_router_pod(router_port)]

    async def seen(interval_s: int) -> Any:
        view = await collector.view(SERVICE, pods, pools=POOLS, interval_s=interval_s, keep_s=60)
        return view.now.prefill.requests_per_s if view.now else None

    assert await seen(60) is None
    assert await seen(60) is None
    rate = await seen(0)
    assert rate is not None
    assert await seen(60) == rate


async def test_silent_routers_are_told(router_port: int) -> None:
    gone = [make_router_pod(1)]
    view = await Collector(make_channels()).view(
        SERVICE, gone, pools=POOLS, interval_s=1, keep_s=60
    )
    assert "1 of 1 routers do not answer" in view.problem
    nobody = await Collector(make_channels()).view(
        SERVICE, [], pools=POOLS, interval_s=1, keep_s=60
    )
    assert nobody.problem == "no router is ready"
