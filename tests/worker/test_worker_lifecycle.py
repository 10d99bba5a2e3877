"""Start, readiness, roles, drain and stop of a worker."""

import asyncio
import json
import signal
import socket
from pathlib import Path

import aiohttp
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from kvasir_engine.worker import main
from kvasir_engine.worker.settings import WorkerSettings
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.frames import FrameKind
from kvasir_proto.v1 import common_pb2, worker_pb2
from worker_builders import make_model_dir, make_request, prompt, started, until, worker_process

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny")


async def test_worker_says_what_it_is(model: Path) -> None:
    async with started(model, "w1", role="decode") as worker:
        about = await worker.stub.Describe(worker_pb2.DescribeRequest(), timeout=10)
        assert (about.address.name, about.model, about.role) == (
            "w1",
            "tiny",
            common_pb2.ROLE_DECODE,
        )
        assert about.address == worker.address
        assert len(about.fingerprint) == 16
        assert about.layout.block_tokens == 32
        assert about.context_length == 1024
        assert about.kv_transfer_healthy
        assert about.load.blocks_total == about.load.blocks_free > 0


async def test_context_is_bounded_by_kv_memory(tmp_path: Path) -> None:
    model = make_model_dir(tmp_path / "long")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    async with started(model, kv_cache_mb=1) as worker:
        about = await worker.stub.Describe(worker_pb2.DescribeRequest(), timeout=10)
        assert about.context_length == about.load.blocks_total * 32 + 1
        ids, max_tokens = prompt(5), about.context_length - 5
        first = (await worker.generate(make_request(ids, max_tokens=1))).tokens
        longest = make_request(ids, max_tokens=max_tokens, stop_token_ids=first)
        assert (await worker.generate(longest)).done is not None
        refused = (await worker.generate(make_request(ids, max_tokens=max_tokens + 1))).error
        assert refused is not None
        assert (refused.reason, refused.param) == (Reason.CONTEXT_LENGTH, "max_tokens")


async def test_ready_worker_says_so_everywhere(model: Path) -> None:
    async with started(model) as worker:
        assert await worker.get_json("/healthz") == (200, {"alive": True})
        assert await worker.get_json("/readyz") == (200, {"ready": True, "problems": []})
        health = health_pb2_grpc.HealthStub(worker.channel)
        for service in ("", "kvasir.v1.Worker"):
            request = health_pb2.HealthCheckRequest(service=service)
            async with asyncio.timeout(10):
                while (await health.Check(request, timeout=10)).status != SERVING:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        assert await worker.metric("kvasir_worker_ready") == 1


async def test_reflection_lists_the_workers_services(model: Path) -> None:
    async with started(model) as worker:
        ask_for = reflection_pb2.ServerReflectionRequest(list_services="")
        listed = reflection_pb2_grpc.ServerReflectionStub(worker.channel).ServerReflectionInfo(
            iter([ask_for]), timeout=10
        )
        services = {s.name for s in (await listed.read()).list_services_response.service}
        assert services >= {"kvasir.v1.Worker", "grpc.health.v1.Health"}
        listed.cancel()


async def test_loading_worker_is_alive_not_ready_and_refuses(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    check = main.canary.check

    async def held_check(host):
        await gate.wait()
        return await check(host)

    monkeypatch.setattr(main.canary, "check", held_check)
    settings = WorkerSettings(model=model, model_name="tiny", name="w", kv_cache_mb=4, threads=1)
    async with main.worker(settings) as parts, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{parts.host.address.http_port}"
        async with session.get(url + "/healthz") as response:
            assert response.status == 200
        async with session.get(url + "/readyz") as response:
            assert response.status == 503
        body = make_request(prompt(5)).SerializeToString()
        async with session.post(url + "/internal/generate", data=body) as response:
            error = common_pb2.Error.FromString(await response.read())
            assert (response.status, error.reason) == (503, Reason.NO_WORKER)
        gate.set()
        await parts.loaded
        async with session.get(url + "/readyz") as response:
            assert response.status == 200


async def test_data_plane_that_peers_cannot_reach_kills_the_canary(model: Path) -> None:
    elsewhere = "127.0.0.9"  # nobody listens there
    async with started(model, host="127.0.0.1", advertise_host=elsewhere) as worker:
        url = f"http://127.0.0.1:{worker.address.http_port}/readyz"
        async with worker.session.get(url) as response:
            assert response.status == 503
            (problem,) = (await response.json())["problems"]
        assert f"cannot be pulled from {elsewhere}:{worker.address.data_port}" in problem
        assert not worker.host.describe().kv_transfer_healthy


async def test_dead_canary_makes_the_worker_unready_and_it_recovers(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = main.canary.check

    async def dead(host):
        return "the canary block cannot be pulled"

    monkeypatch.setattr(main.canary, "check", dead)
    async with started(model, transfer_recheck_ms=20) as worker:
        status, body = await worker.get_json("/readyz")
        assert (status, body["problems"]) == (
            503,
            ["KV transfers fail: the canary block cannot be pulled"],
        )
        monkeypatch.setattr(main.canary, "check", check)
        await until(lambda: worker.host.health.healthy)
        assert (await worker.get_json("/readyz"))[0] == 200


async def test_role_changes_without_restart_and_the_cache_stays(model: Path) -> None:
    async with started(model, role="decode") as worker:
        await worker.generate(make_request(prompt(100)))
        about = await worker.stub.SetRole(
            worker_pb2.SetRoleRequest(role=common_pb2.ROLE_PREFILL), timeout=10
        )
        assert about.role == common_pb2.ROLE_PREFILL
        refused = await worker.generate(make_request(prompt(100)))
        assert refused.error.reason is Reason.NO_WORKER
        await worker.stub.SetRole(worker_pb2.SetRoleRequest(role=common_pb2.ROLE_BOTH), timeout=10)
        again = await worker.generate(make_request(prompt(100)))
        assert again.stats.tokens_cached_local == 96


async def test_running_request_survives_a_role_change(model: Path) -> None:
    async with started(model, role="decode") as worker:
        frames = worker.frames(make_request(prompt(50), max_tokens=100))
        first = await anext(frames)
        await worker.stub.SetRole(
            worker_pb2.SetRoleRequest(role=common_pb2.ROLE_PREFILL), timeout=10
        )
        rest = [frame async for frame in frames]
        assert rest[-1].kind is FrameKind.DONE
        assert sum(len(f.token_ids()) for f in [first, *rest]) == 100


async def test_drain_lets_requests_end_and_takes_no_new_ones(model: Path) -> None:
    async with started(model) as worker:
        frames = worker.frames(make_request(prompt(50), max_tokens=200))
        await anext(frames)
        drain = aiter(worker.stub.Drain(worker_pb2.DrainRequest(timeout_ms=30_000), timeout=60))
        first = await anext(drain)
        assert (first.num_requests_left, first.drained) == (1, False)
        refused = await worker.generate(make_request(prompt(5)))
        assert refused.error.reason is Reason.DRAINING
        assert (await worker.get_json("/readyz"))[1]["problems"] == ["draining"]
        assert [f async for f in frames][-1].kind is FrameKind.DONE
        last = [progress async for progress in drain][-1]
        assert (last.num_requests_left, last.drained) == (0, True)


async def test_drain_ends_what_takes_too_long(model: Path) -> None:
    async with started(model) as worker:
        frames = worker.frames(make_request(prompt(5), max_tokens=1000, timeout_ms=60_000))
        await anext(frames)
        drain = worker.stub.Drain(worker_pb2.DrainRequest(timeout_ms=1), timeout=60)
        last = [progress async for progress in drain][-1]
        assert (last.num_requests_left, last.drained) == (0, True)
        end = [frame async for frame in frames][-1]
        assert end.kind is FrameKind.ERROR
        assert common_pb2.Error.FromString(end.payload).reason == Reason.DRAINING
        await until(lambda: worker.is_idle)


async def test_watcher_learns_blocks_and_role(model: Path) -> None:
    async with started(model) as worker:
        watch = worker.stub.WatchEvents(worker_pb2.WatchEventsRequest(), timeout=60)
        first = await watch.read()
        assert first.snapshot
        known = set(first.stored)
        await worker.generate(make_request(prompt(100)))
        wanted = set(worker.host.served().names(prompt(100), tenant_salt=b""))
        async with asyncio.timeout(10):
            while not wanted <= known:
                event = await watch.read()
                known = (known - set(event.removed)) | set(event.stored)
        held = await worker.stub.HasBlocks(
            worker_pb2.HasBlocksRequest(names=[*wanted, b"x" * 16]), timeout=10
        )
        assert list(held.held) == [True, True, True, False]
        watch.cancel()


async def test_taken_port_is_an_error(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for field in ("http_port", "grpc_port", "data_port"):
            with pytest.raises(OSError, match=r"(?i)address|listen|bind"):
                async with started(model, **{field: port}):
                    pass


async def test_cache_that_cannot_fit_is_refused_with_what_is_needed(model: Path) -> None:
    with pytest.raises(KvasirError, match=r"not enough memory: .* are needed"):
        async with started(model, kv_cache_mb=100_000_000):
            pass


async def test_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises((KvasirError, OSError), match="nothing-here"):
        async with started(tmp_path / "nothing-here"):
            pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_process_drains_and_exits_with_status_0_on_a_signal(
    model: Path, number: signal.Signals
) -> None:
    with worker_process(model, "w", "both") as process:
        process.popen.send_signal(number)
        _, log = process.popen.communicate(timeout=20)
        assert process.popen.returncode == 0, log
        assert "drained: 0 requests" in log


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"role": "router"}, "role"),
        ({"host": "0.0.0.0"}, "advertise_host"),
        ({"grpc_port": 70_000}, "grpc_port"),
        ({"grpc_port": 5, "http_port": 5}, "must differ"),
        ({"stream_port": 5}, "needs tls_dir"),
        ({"stream_port": 5, "data_port": 5, "tls_dir": Path("t")}, "must differ"),
        ({"kv_cache_mb": 0}, "kv_cache_mb"),
        ({"kv_nodes": ("nowhere",)}, "HOST:PORT"),
        ({"uid": b"short"}, "16 bytes"),
        ({"model_nam": "x"}, "model_nam"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes: dict, match: str) -> None:
    good = {"model": Path("m"), "model_name": "tiny", "name": "w"}
    WorkerSettings(**good)
    with pytest.raises(ValueError, match=match):
        WorkerSettings(**{**good, **changes})
