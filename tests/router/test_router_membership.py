"""Who is in the fleet: joining, leaving, draining, other models, and what blocks are where."""

import asyncio
import socket
from pathlib import Path

import openai
import pytest
from fake_worker import FakeWorker, random_name
from kvasir_kvstore.events import EventHub
from kvasir_proto.v1 import worker_pb2
from kvasir_router.membership import discovery
from kvasir_router.settings import RouterSettings
from pydantic import ValidationError
from router_fixtures import running_router


async def test_a_worker_that_dies_leaves_and_returns(tmp_path: Path) -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    async with running_router(tmp_path, a, b) as router:
        await a.stop()
        async with asyncio.timeout(2):
            await router.has_members("b")
        assert await router.chat_text() == "abcdefghijklmnopqrst"
        async with router.http.get("/readyz") as response:
            assert response.status == 200
            assert "worker a: unreachable" in (await response.json())["degraded"][0]
        await a.start()
        await router.has_members("a", "b")


async def test_a_request_waits_while_the_only_worker_restarts(tmp_path: Path) -> None:
    worker = FakeWorker("a")
    async with running_router(tmp_path, worker, worker_wait_ms=10_000) as router:
        await worker.stop()
        await router.has_members()
        answer = asyncio.create_task(router.chat_text(max_tokens=3))
        await worker.start()
        assert await answer == "abc"


async def test_a_request_does_not_wait_for_ever_for_a_worker(tmp_path: Path) -> None:
    worker = FakeWorker("a")
    async with running_router(tmp_path, worker, worker_wait_ms=100) as router:
        await worker.stop()
        await router.has_members()
        with pytest.raises(openai.InternalServerError) as caught:
            await router.chat_text()
        assert caught.value.code == "no_worker"


@pytest.mark.parametrize("patience_ms", [3_600_000, 0], ids=["short", "long"])
async def test_a_router_without_workers_is_unready_only_after_a_while(
    tmp_path: Path, patience_ms: int
) -> None:
    worker = FakeWorker("a")
    async with running_router(tmp_path, worker, unready_after_ms=patience_ms) as router:
        async with router.http.get("/readyz") as response:
            assert response.status == 200
        await worker.stop()
        await router.has_members()
        async with router.http.get("/readyz") as response:
            body = await response.json()
        said = "no decode-capable worker is ready"
        if patience_ms:
            assert (response.status, body["ready"], said in body["degraded"]) == (200, True, True)
        else:
            assert (response.status, body["ready"], said in body["problems"]) == (503, False, True)


async def test_a_silent_worker_leaves(tmp_path: Path) -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    async with running_router(tmp_path, a, b, silence_timeout_ms=300) as router:
        a.mute = True
        await router.has_members("b")
        a.mute = False
        await router.has_members("a", "b")


async def test_a_draining_worker_gets_no_new_request_and_other_changes_show(tmp_path: Path) -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    async with running_router(tmp_path, a, b) as router:
        a.draining = True
        a.tell()
        await router.has_members("b")
        a.draining, a.role = False, "prefill"
        a.tell()
        await router.has_members("a", "b")
        assert not router.server.fleet.view().workers["a"].can_decode


async def test_workers_of_another_model_or_fingerprint_are_left_out_with_a_problem(
    tmp_path: Path,
) -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    odd = FakeWorker("odd", fingerprint=b"g" * 16)
    other = FakeWorker("other", model="large")
    young = FakeWorker("young", fingerprint=b"")
    async with running_router(tmp_path, a, b, odd, other, young, ready=False) as router:
        await router.has_members("a", "b")
        fleet = router.server.fleet
        await router.until(lambda: all(member.reachable for member, _ in fleet.members()))
        problems = {member.name: problem for member, problem in fleet.members()}
        assert problems["a"] == problems["b"] == ""
        assert "fingerprint mismatch" in problems["odd"]
        assert "serves model 'large'" in problems["other"]
        assert "loading" in problems["young"]


async def test_failing_kv_transfer_is_shown_and_avoided(tmp_path: Path) -> None:
    decode = FakeWorker("d", "decode", transfer_healthy=False)
    async with running_router(tmp_path, FakeWorker("p", "prefill"), decode) as router:
        async with router.http.get("/readyz") as response:
            assert response.status == 200
            assert "canary failed" in (await response.json())["degraded"][0]
        assert await router.chat_text(max_tokens=3) == "abc"
        assert not decode.requests[0].HasField("prefill_peer")


async def test_measured_speeds_reach_the_view(tmp_path: Path) -> None:
    load = {"prefill_us_per_token": 90.0, "decode_ms_per_step": 7.0, "store_us_per_token": 3.0}
    async with running_router(tmp_path, FakeWorker("a", load=load)) as router:
        state = router.server.fleet.view().workers["a"]
        assert {name: getattr(state, name) for name in load} == load
        assert state.peer_us_per_token == 0


async def test_block_events_reach_the_prefix_view(tmp_path: Path) -> None:
    names = sorted(random_name() for _ in range(4))
    worker = FakeWorker("a", held=set(names[:2]))
    async with running_router(tmp_path, worker) as router:
        known = router.server.fleet.view().prefix
        assert known.leading(names) == {"a": 2}
        worker.tell(stored=names[2:])
        await router.until(lambda: known.leading(names) == {"a": 4})
        worker.tell(removed=names[1:2])
        await router.until(lambda: known.leading(names) == {"a": 1})


async def test_a_gap_in_the_sequence_brings_a_new_snapshot(tmp_path: Path) -> None:
    names = [random_name(), random_name()]
    worker = FakeWorker("a", held={names[0]})
    async with running_router(tmp_path, worker) as router:
        known = router.server.fleet.view().prefix
        worker.held = {names[1]}
        worker.tell(sequence=99)
        await router.until(lambda: known.leading(names[1:]) == {"a": 1})
        assert known.leading(names) == {}


async def test_a_stream_that_broke_goes_on_with_what_was_missed(tmp_path: Path) -> None:
    names, starts = [random_name() for _ in range(4)], []
    worker = FakeWorker("a")
    worker.hub = EventHub(
        worker_pb2.WorkerEvent,
        lambda: worker_pb2.WorkerEvent(description=worker.description()),
        queue_max=100,
        on_started=starts.append,
        on_dropped=lambda: None,
    )
    worker.hub.blocks_changed(stored=names[:2], removed=())
    async with running_router(tmp_path, worker) as router:
        known = router.server.fleet.view().prefix
        assert known.leading(names) == {"a": 2}
        worker.breaks_stream = True  # before the next event
        worker.hub.blocks_changed(stored=names[2:], removed=())
        await router.until(lambda: known.leading(names) == {"a": 4})
        await router.has_members("a")
        assert starts == ["snapshot", "replay"]


async def test_a_worker_that_stays_away_is_forgotten(tmp_path: Path) -> None:
    names = [random_name()]
    worker = FakeWorker("a")
    worker.hub = EventHub(
        worker_pb2.WorkerEvent,
        lambda: worker_pb2.WorkerEvent(description=worker.description()),
        queue_max=100,
        on_started=lambda _: None,
        on_dropped=lambda: None,
    )
    worker.hub.blocks_changed(stored=names, removed=())
    async with running_router(tmp_path, worker, FakeWorker("b")) as router:
        known = router.server.fleet.view().prefix
        assert known.leading(names) == {"a": 1}
        await worker.stop()
        await router.has_members("b")
        await router.until(lambda: not known.leading(names))


async def test_dns_names_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    answers: list[frozenset[str] | None] = [frozenset()]

    async def resolve(host: str, port: int) -> frozenset[str] | None:
        assert (host, port) == ("workers.test", 7000)
        return answers[0]

    monkeypatch.setattr(discovery, "resolve", resolve)
    settings = {"workers": ("dns:workers.test:7000",), "resolve_interval_ms": 50}
    async with running_router(tmp_path, a, b, ready=False, **settings) as router:
        answers[0] = frozenset({a.target})
        await router.has_members("a")
        answers[0] = frozenset({a.target, b.target})
        await router.has_members("a", "b")
        answers[0] = None  # the name server is down: nothing is forgotten
        await asyncio.sleep(0.2)
        assert set(router.server.fleet.view().workers) == {"a", "b"}
        answers[0] = frozenset({b.target})
        await router.has_members("b")


async def test_resolve_finds_loopback_and_tells_no_name_from_no_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = await discovery.resolve("localhost", 7000)
    assert found is not None
    assert "127.0.0.1:7000" in found

    def fail_with(number: int) -> None:
        def getaddrinfo(*_: object, **__: object) -> None:
            raise socket.gaierror(number, "scripted")

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    fail_with(socket.EAI_NONAME)
    assert await discovery.resolve("gone.test", 7000) == frozenset()
    fail_with(socket.EAI_AGAIN)
    assert await discovery.resolve("gone.test", 7000) is None


@pytest.mark.parametrize("spec", ["", "host", "host:", ":7000", "host:0", "host:65536", "dns:x"])
def test_malformed_worker_addresses_are_refused(spec: str) -> None:
    with pytest.raises(ValidationError, match="neither HOST:PORT"):
        RouterSettings(model=Path("m"), model_name="m", workers=(spec,))
