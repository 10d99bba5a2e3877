"""kvasir.v1.Inference, health, reflection, and the tenants of both protocols."""

import asyncio
from pathlib import Path

import grpc.aio
import openai
import pytest
from fake_worker import FakeWorker, Script
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from kvasir_proto.errors import Reason
from kvasir_proto.rpc_errors import error_from_rpc
from kvasir_proto.v1 import common_pb2, inference_pb2
from kvasir_router.tenants import Tenants
from router_fixtures import running_router

HI = [{"role": "user", "content": "hi"}]
ALIEN = inference_pb2.ChatMessage(role="alien", content="hi")


def ask(**fields) -> inference_pb2.InferenceRequest:
    sampling = common_pb2.SamplingParams(max_tokens=5)
    return inference_pb2.InferenceRequest(
        **{"model": "tiny", "prompt": "hello", "sampling": sampling, **fields}
    )


@pytest.fixture
async def served(tmp_path: Path):
    workers = FakeWorker("p", "prefill"), FakeWorker("d", "decode")
    async with running_router(tmp_path, *workers) as router:
        yield router, router.stub, router.channel


async def test_generate_streams_chunks_and_ends_with_stats(served) -> None:
    router, stub, _ = served
    call = stub.Generate(ask(), timeout=10)
    chunks = [chunk async for chunk in call]
    assert "".join(chunk.text for chunk in chunks) == "abcde"
    assert [i for chunk in chunks for i in chunk.token_ids] == list(b"abcde")
    assert chunks[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert chunks[-1].usage.prompt_tokens == 5
    assert chunks[-1].stats.decode_worker == "d"
    metadata = dict(await call.initial_metadata())
    assert metadata["x-kvasir-prefill-worker"] == "p"
    assert router.requests()[0].sampling.top_p == 1.0


async def test_chat_and_token_ids_are_taken_too(served) -> None:
    router, stub, _ = served
    message = inference_pb2.ChatMessage(role="user", content="hi")
    chat = inference_pb2.ChatMessages(messages=[message])
    async for _ in stub.Generate(ask(chat=chat), timeout=10):
        pass
    async for _ in stub.Generate(ask(tokens=inference_pb2.TokenIds(ids=[1, 2])), timeout=10):
        pass
    assert [len(r.token_ids) for r in router.requests()] == [len("<|user|>hi<|assistant|>"), 2]


@pytest.mark.parametrize(
    ("fields", "reason", "param"),
    [
        ({"model": "x"}, Reason.UNKNOWN_MODEL, "model"),
        ({"prompt": ""}, Reason.INVALID_REQUEST, "prompt"),
        ({"prompt": "x" * 600}, Reason.CONTEXT_LENGTH, "prompt"),
        ({"tokens": inference_pb2.TokenIds(ids=[999])}, Reason.INVALID_REQUEST, "tokens.ids"),
        ({"chat": inference_pb2.ChatMessages()}, Reason.INVALID_REQUEST, "chat.messages"),
        (
            {"chat": inference_pb2.ChatMessages(messages=[ALIEN])},
            Reason.INVALID_REQUEST,
            "chat.messages[0].role",
        ),
        (
            {"sampling": common_pb2.SamplingParams(stop_token_ids=[999])},
            Reason.INVALID_REQUEST,
            "sampling.stop_token_ids",
        ),
        (
            {"sampling": common_pb2.SamplingParams(temperature=-1)},
            Reason.INVALID_REQUEST,
            "sampling.temperature",
        ),
        (
            {"sampling": common_pb2.SamplingParams(max_tokens=9_999)},
            Reason.CONTEXT_LENGTH,
            "sampling.max_tokens",
        ),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_bad_input_names_its_field(served, fields, reason, param) -> None:
    router, stub, _ = served
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(ask(**fields), timeout=10):
            pass
    error = error_from_rpc(caught.value)
    assert (error.reason, error.param) == (reason, param)
    assert router.requests() == []


async def test_a_failing_worker_is_replaced_in_a_grpc_stream(tmp_path: Path) -> None:
    script = Script(die_after=2, times=1)
    workers = [FakeWorker(name, script=script) for name in "ab"]
    async with running_router(tmp_path, *workers) as router:
        chunks = [chunk async for chunk in router.stub.Generate(ask(), timeout=10)]
    assert "".join(chunk.text for chunk in chunks) == "abcde"


async def test_cancelling_a_grpc_call_frees_the_worker(tmp_path: Path) -> None:
    worker = FakeWorker("a", script=Script(stall_after=1))
    async with running_router(tmp_path, worker) as router:
        registry = router.server.metrics.registry
        call = router.stub.Generate(ask(), timeout=10)
        assert (await call.read()).text == "a"
        call.cancel()
        async with asyncio.timeout(5):
            await worker.cancelled.wait()
            while registry.get_sample_value("kvasir_router_requests_in_flight"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_route_tells_the_decision_and_sends_nothing(served) -> None:
    router, stub, _ = served
    decision = await stub.Route(ask(prompt="x" * 100), timeout=10)
    assert (decision.prefill_worker, decision.decode_worker) == ("p", "d")
    assert (decision.reason, decision.prompt_tokens) == ("only_candidate", 100)
    assert [c.worker for c in decision.candidates] == ["p"]
    assert router.requests() == []


async def test_fleet_lists_every_member(served) -> None:
    router, stub, _ = served
    fleet = await stub.Fleet(inference_pb2.FleetRequest(), timeout=10)
    assert [m.description.address.name for m in fleet.members] == ["d", "p"]
    assert all(m.reachable and not m.problem for m in fleet.members)
    assert fleet.ring_version == router.server.fleet.view().rings.version


async def test_a_fault_of_the_router_is_internal_and_counted(
    served, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, stub, _ = served

    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(router.server.dispatcher, "pick", fail)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Route(ask(), timeout=10)
    assert error_from_rpc(refused.value).reason == Reason.INTERNAL
    async with router.http.get("/metrics") as response:
        assert 'reason="internal"' in await response.text()


async def test_health_and_reflection(served) -> None:
    _, _, channel = served
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="kvasir.v1.Inference"), timeout=10
    )
    async for answer in watch:
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            break
    ask_for = reflection_pb2.ServerReflectionRequest(list_services="")
    listed = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([ask_for]), timeout=10
    )
    services = [s.name for s in (await listed.read()).list_services_response.service]
    assert "kvasir.v1.Inference" in services
    watch.cancel()
    listed.cancel()


async def test_api_keys_separate_tenants(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# keys\nsk-one alpha\nsk-two beta\nsk-three alpha\n")
    worker = FakeWorker("a")
    async with running_router(tmp_path, worker, api_key_file=keys) as router:
        for key in ("sk-one", "sk-two", "sk-three"):
            client = router.openai.with_options(api_key=key)
            await client.chat.completions.create(model="tiny", messages=HI, max_tokens=1)
        one, two, three = (request.tenant_salt for request in worker.requests)
        assert one == three != two
        assert len(one) == 16
        for key in ("sk-four", "alpha"):
            with pytest.raises(openai.AuthenticationError):
                await router.openai.with_options(api_key=key).models.list()
        async with router.http.get("/healthz") as response:
            assert response.status == 200
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Route(ask(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", "Bearer sk-one"),)
        await router.stub.Route(ask(), metadata=metadata, timeout=10)


def test_malformed_key_file_is_refused_without_showing_the_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-secret\n")
    with pytest.raises(ValueError, match="keys:1") as caught:
        Tenants.load(keys)
    assert "sk-secret" not in str(caught.value)
