"""A router and its canaries: who is checked, what is shown, and that routing does not wait."""

from pathlib import Path

from fake_worker import FakeWorker
from kvasir_proto.v1 import inference_pb2
from router_fixtures import RouterUnderTest, running_router

STATES = inference_pb2.CanaryState


async def standings(router: RouterUnderTest) -> dict[str, str]:
    view = await router.stub.Fleet(inference_pb2.FleetRequest(), timeout=10)
    prefix = "CANARY_STATE_"
    return {
        m.description.address.name: STATES.Name(m.canary).removeprefix(prefix) for m in view.members
    }


async def until_standings(router: RouterUnderTest, **wanted: str) -> None:
    """Waits until the router says so; its members tell several times a second."""
    while await standings(router) != wanted:
        await router.server.fleet.changed()


async def test_each_worker_is_checked_with_one_of_the_other_role(tmp_path: Path) -> None:
    prefill = [FakeWorker(name, "prefill", crossed=False) for name in ("p1", "p2", "p3")]
    decode = FakeWorker("d", "decode", canaries={})
    async with running_router(tmp_path, *prefill, decode) as router:
        for worker in prefill:
            await router.until(lambda name=worker.name: name in {c[0] for c in decode.checked})
            worker.crossed = True  # as a lender says of itself
        await until_standings(router, p1="CROSSED", p2="CROSSED", p3="CROSSED", d="CROSSED")


async def test_a_failing_path_shows_everywhere_heals_and_routing_goes_on(tmp_path: Path) -> None:
    prefill, decode = FakeWorker("p", "prefill"), FakeWorker("d", "decode", canaries={"p": "no"})
    async with running_router(tmp_path, prefill, decode) as router:
        await until_standings(router, p="FAILED", d="FAILED")
        async with router.http.get("/readyz") as response:
            assert response.status == 200
            assert (await response.json())["degraded"] == ["worker d: no", "worker p: no"]
        async with router.http.get("/metrics") as response:
            text = await response.text()
        assert 'kvasir_router_kv_canaries{standing="failed"} 2.0' in text
        assert await router.chat_text(max_tokens=3) == "abc"
        decode.canaries = {}
        prefill.crossed = True
        await until_standings(router, p="CROSSED", d="CROSSED")


async def test_nobody_is_asked_where_nothing_need_cross(tmp_path: Path) -> None:
    both, decode = FakeWorker("b", canaries={}), FakeWorker("d", "decode", canaries={})
    async with running_router(tmp_path, both, decode) as router:
        assert await standings(router) == {"b": "NOT_NEEDED", "d": "NOT_NEEDED"}
        assert not both.checked
        assert not decode.checked


async def test_workers_of_an_earlier_release_are_ready_without(tmp_path: Path) -> None:
    async with running_router(
        tmp_path, FakeWorker("p", "prefill"), FakeWorker("d", "decode")
    ) as router:
        await until_standings(router, p="NOT_NEEDED", d="NOT_NEEDED")
