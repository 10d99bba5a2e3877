"""A worker in front of vLLM: what it asks, what it makes of answers, and what routers are told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from fake_vllm import FakeVllm, fake_vllm
from kvasir_engine.text import Tokenizer
from kvasir_engine.worker.settings import WorkerSettings
from kvasir_proto.errors import Reason
from kvasir_proto.v1 import common_pb2, worker_pb2
from kvasir_router.server import RouterServer
from kvasir_router.settings import RouterSettings
from pydantic import ValidationError
from worker_builders import RunningWorker, make_model_dir, make_request, prompt, started, until

TEXT = worker_pb2.STREAM_FORMAT_TEXT
OUTPUT = prompt(12, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without weights: vLLM has those."""
    folder = make_model_dir(tmp_path_factory.mktemp("models") / "tiny")
    (folder / "model.safetensors").unlink()
    return folder


@asynccontextmanager
async def beside_vllm(
    model: Path, output: list[int] = OUTPUT, **settings: Any
) -> AsyncIterator[tuple[RunningWorker, FakeVllm]]:
    """A worker that is ready, and its vLLM."""
    async with (
        fake_vllm(output, **settings) as vllm,
        started(model, vllm_url=vllm.url) as worker,
    ):
        await until(lambda: not worker.host.problems())
        yield worker, vllm


async def test_tokens_of_vllm_become_the_output(model: Path) -> None:
    async with beside_vllm(model, cached_tokens=32) as (worker, vllm):
        result = await worker.generate(make_request(prompt(40), format=TEXT, max_tokens=8))
    assert result.tokens == OUTPUT[:8]
    assert result.payload.decode() == Tokenizer.load(model).decode(OUTPUT[:8])
    assert result.done.finish_reason == common_pb2.FINISH_REASON_LENGTH
    usage = result.done.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (40, 8, 32)
    assert result.stats.tokens_computed == 8
    [body] = vllm.bodies
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("tiny", prompt(40), 8)


async def test_sampling_and_tenant_reach_vllm(model: Path) -> None:
    wanted = {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "seed": 2**64 - 1}
    async with beside_vllm(model) as (worker, vllm):
        await worker.generate(
            make_request(prompt(4), stop_token_ids=[9], tenant_salt=b"\x01\xff", **wanted)
        )
        await worker.generate(make_request(prompt(4)))
    salted, plain = vllm.bodies
    assert {key: salted[key] for key in wanted} == {**wanted, "seed": 2**63 - 1}
    assert (salted["stop_token_ids"], salted["cache_salt"]) == ([9], "01ff")
    assert (plain["top_k"], "cache_salt" in plain) == (-1, False)


async def test_a_resumed_request_goes_on_where_it_stopped(model: Path) -> None:
    async with beside_vllm(model, OUTPUT[4:]) as (worker, vllm):
        request = make_request(prompt(40), max_tokens=8, resume_token_ids=OUTPUT[:4])
        result = await worker.generate(request)
    assert result.tokens == OUTPUT[4:8]
    assert result.done.usage.completion_tokens == 8
    [body] = vllm.bodies
    assert (body["prompt"], body["max_tokens"]) == (prompt(40) + OUTPUT[:4], 4)


async def test_a_stop_token_is_counted_but_not_shown(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    eos = tokenizer.eos_token_ids[0]
    async with beside_vllm(model, [*OUTPUT[:3], eos], finish="stop") as (worker, _):
        request = make_request(prompt(4), format=TEXT, ignore_eos=False)
        result = await worker.generate(request)
    assert result.payload.decode() == tokenizer.decode(OUTPUT[:3])
    assert result.done.finish_reason == common_pb2.FINISH_REASON_STOP
    assert result.tokens == [*OUTPUT[:3], eos]


async def test_a_stop_token_that_vllm_keeps_to_itself_hides_no_text(model: Path) -> None:
    async with beside_vllm(model, OUTPUT[:3], finish="stop") as (worker, _):
        result = await worker.generate(make_request(prompt(4), format=TEXT, ignore_eos=False))
    assert result.payload.decode() == Tokenizer.load(model).decode(OUTPUT[:3])
    assert result.done.finish_reason == common_pb2.FINISH_REASON_STOP


async def test_a_stop_string_ends_the_request_at_vllm_too(model: Path) -> None:
    text = Tokenizer.load(model).decode(OUTPUT[:6])
    async with beside_vllm(model, holds_after=6) as (worker, vllm):
        request = make_request(prompt(4), format=TEXT, max_tokens=12, stop=[text[-2:]])
        result = await worker.generate(request)
        await until(lambda: vllm.num_left_early == 1)
        assert worker.host.state.num_in_flight == 0
    assert result.payload.decode() == text[: text.index(text[-2:])]
    assert result.done.finish_reason == common_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize(
    ("status", "reason"),
    [(400, Reason.INVALID_REQUEST), (503, Reason.OVERLOADED), (500, Reason.NO_WORKER)],
)
async def test_refusals_keep_their_meaning(model: Path, status: int, reason: Reason) -> None:
    async with beside_vllm(model, refusal=(status, "not today")) as (worker, _):
        result = await worker.generate(make_request(prompt(4)))
    assert result.error.reason is reason
    assert "not today" in result.error.message


async def test_a_broken_stream_is_a_lost_worker(model: Path) -> None:
    async with beside_vllm(model, cuts_after=3) as (worker, _):
        result = await worker.generate(make_request(prompt(4)))
    assert result.tokens == OUTPUT[:3]
    assert result.error.reason is Reason.NO_WORKER


async def test_a_server_without_token_ids_is_refused_by_name(model: Path) -> None:
    async with beside_vllm(model, gives_token_ids=False) as (worker, _):
        result = await worker.generate(make_request(prompt(4)))
    assert result.error.reason is Reason.UNSUPPORTED
    assert "vLLM 0.10.2" in result.error.message


async def test_an_event_may_repeat_a_long_prompt(model: Path) -> None:
    async with beside_vllm(model, echoed=[100_000] * 200_000) as (worker, _):
        result = await worker.generate(make_request(prompt(4)))
    assert result.tokens == OUTPUT[:8]


async def test_routers_are_told_of_vllms_load_and_context(model: Path) -> None:
    async with beside_vllm(model) as (worker, _):
        await worker.generate(make_request(prompt(40)))
        about = await worker.stub.Describe(worker_pb2.DescribeRequest(), timeout=10)
    assert (about.model, about.context_length, about.isa) == ("tiny", 256, "vllm")
    assert about.blocks_unannounced
    assert about.kv_transfer_healthy
    assert len(about.fingerprint) == 16
    assert (about.load.blocks_total, about.load.blocks_free) == (800, 200)
    assert about.load.num_waiting == 1


async def test_the_worker_is_ready_only_while_vllm_is(model: Path) -> None:
    async with fake_vllm(OUTPUT, is_healthy=False) as vllm:
        starting = started(model, vllm_url=vllm.url)
        entering = asyncio.create_task(starting.__aenter__())
        await until(lambda: vllm.num_not_ready > 0)
        assert not entering.done()
        vllm.is_healthy = True
        worker = await entering
        try:
            await until(lambda: not worker.host.problems())
            vllm.is_healthy = False
            await until(lambda: bool(worker.host.problems()))
            status, body = await worker.get_json("/readyz")
            assert status == 503
            assert "vLLM cannot be used" in body["problems"][0]
            assert (await worker.get_json("/healthz"))[0] == 200
            result = await worker.generate(make_request(prompt(4)))
            assert result.error.reason is Reason.NO_WORKER
            vllm.is_healthy = True
            await until(lambda: not worker.host.problems())
        finally:
            await starting.__aexit__(None, None, None)


async def test_a_peer_is_not_asked_and_prompts_are_not_handed_off(model: Path) -> None:
    peer = common_pb2.PeerAddress(name="other", uid=b"u" * 16, epoch=1, host="192.0.2.1")
    async with beside_vllm(model) as (worker, _):
        result = await worker.generate(make_request(prompt(40), prefill_peer=peer))
        assert result.stats.prefill_worker == "w"
        role = worker_pb2.SetRoleRequest(role=common_pb2.ROLE_DECODE)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await worker.stub.SetRole(role, timeout=10)
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_drain_waits_for_what_runs(model: Path) -> None:
    async with beside_vllm(model, holds_after=2) as (worker, vllm):
        running = asyncio.create_task(worker.generate(make_request(prompt(4))))
        await until(lambda: vllm.num_running == 1)
        steps = [p async for p in worker.stub.Drain(worker_pb2.DrainRequest(timeout_ms=300))]
        result = await running
    assert steps[0].num_requests_left == 1
    assert steps[-1].drained
    assert result.error.reason is Reason.DRAINING


@asynccontextmanager
async def chat_client(model: Path, *workers: RunningWorker) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a router that knows these workers."""
    targets = tuple(f"127.0.0.1:{worker.address.grpc_port}" for worker in workers)
    settings = RouterSettings(
        model=model,
        model_name="tiny",
        workers=targets,
        http_port=0,
        grpc_port=0,
        drain_timeout_ms=2_000,
    )
    server = RouterServer(settings, Tokenizer.load(model))
    await server.start()
    base_url = f"http://127.0.0.1:{server.http_port}/v1"
    try:
        async with asyncio.timeout(30):
            while len(server.fleet.view().workers) < len(workers):
                await server.fleet.changed()
            async with openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=20) as client:
                yield client
    finally:
        await server.stop()


async def test_a_chat_goes_through_the_router_to_vllm_and_on_after_a_loss(model: Path) -> None:
    fields = {"model": "tiny", "prompt": "the first of many", "max_tokens": 12}
    async with (
        beside_vllm(model) as (worker, vllm),
        chat_client(model, worker) as client,
    ):
        answer = await client.completions.create(**fields)
        assert answer.choices[0].text == Tokenizer.load(model).decode(OUTPUT)
        assert answer.usage.completion_tokens == 12
        # the stream breaks once: the router goes on from the tokens that the client has
        vllm.cuts_after, vllm.bodies[:] = 5, []
        stream = await client.completions.create(**fields, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text if chunk.choices else ""
            if text and vllm.cuts_after:
                vllm.cuts_after, vllm.output = None, OUTPUT[5:]
        assert text == Tokenizer.load(model).decode(OUTPUT)
    first, second = vllm.bodies
    assert second["prompt"] == first["prompt"] + OUTPUT[:5]
    assert second["max_tokens"] == 7


@pytest.mark.parametrize(
    "wrong", [{"role": "decode"}, {"kv_nodes": ("kv:1",)}, {"vllm_url": "localhost:8000"}]
)
def test_settings_that_vllm_cannot_keep_are_refused(model: Path, wrong: dict[str, Any]) -> None:
    fields = {"name": "w", "model": model, "model_name": "tiny", "vllm_url": "http://a:1"}
    with pytest.raises(ValidationError):
        WorkerSettings(**(fields | wrong))
