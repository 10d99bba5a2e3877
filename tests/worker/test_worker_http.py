"""The token stream over HTTP and gRPC: text, stop strings, resumption, refusals, disconnects."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from kvasir_engine.text import Tokenizer
from kvasir_proto import rpc_errors
from kvasir_proto.errors import Reason
from kvasir_proto.frames import FrameKind
from kvasir_proto.v1 import common_pb2, worker_pb2
from worker_builders import RunningWorker, make_model_dir, make_request, prompt, started, until

TEXT = worker_pb2.STREAM_FORMAT_TEXT
CHAT = worker_pb2.STREAM_FORMAT_OPENAI_CHAT
SEEDED = {"temperature": 1.0, "seed": 3, "max_tokens": 24}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
async def worker(model: Path) -> AsyncIterator[RunningWorker]:
    async with started(model) as worker:
        yield worker


async def test_text_is_the_detokenised_output(worker: RunningWorker, model: Path) -> None:
    result = await worker.generate(make_request(prompt(40), format=TEXT, **SEEDED))
    assert result.payload.decode() == Tokenizer.load(model).decode(result.tokens)
    assert result.frames[-1].text_chars == len(result.payload.decode())
    assert len(result.tokens) == 24


async def test_frames_come_one_by_one_with_cumulative_counts(worker: RunningWorker) -> None:
    result = await worker.generate(make_request(prompt(40), format=TEXT, **SEEDED))
    chars = [frame.text_chars for frame in result.frames]
    assert chars == sorted(chars)
    assert result.frames[-1].kind is FrameKind.DONE
    assert all(frame.kind is FrameKind.TOKENS for frame in result.frames[:-1])


async def test_last_frame_holds_usage_and_stats(worker: RunningWorker) -> None:
    result = await worker.generate(make_request(prompt(40)))
    assert result.done.finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert not result.done.text
    assert (result.done.usage.prompt_tokens, result.done.usage.completion_tokens) == (40, 8)
    assert result.stats.tokens_computed == 40
    assert result.stats.ttft_ms > 0
    again = await worker.generate(make_request(prompt(40)))
    assert again.done.usage.cached_tokens == 32
    assert again.stats.tokens_computed == 8
    assert again.tokens == result.tokens


async def test_chat_events_are_what_the_client_receives(worker: RunningWorker) -> None:
    text = await worker.generate(make_request(prompt(40), format=TEXT, **SEEDED))
    chat = await worker.generate(make_request(prompt(40), format=CHAT, **SEEDED))
    events = [
        json.loads(line.removeprefix("data: "))
        for line in chat.payload.decode().split("\n\n")
        if line
    ]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [e["choices"][0]["delta"].get("content", "") for e in events]
    assert "".join(deltas) == text.payload.decode()
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"][0]["finish_reason"] == "length"


async def test_stop_string_ends_the_output_before_it(worker: RunningWorker) -> None:
    whole = (await worker.generate(make_request(prompt(40), format=TEXT, **SEEDED))).payload
    text = whole.decode()
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    result = await worker.generate(make_request(prompt(40), format=TEXT, stop=[stop], **SEEDED))
    assert result.payload.decode() == text[: text.index(stop)]
    assert result.done.finish_reason == common_pb2.FINISH_REASON_STOP
    assert result.done.usage.completion_tokens == len(result.tokens)
    await until(lambda: worker.is_idle)


async def test_stop_string_that_never_completes_is_sent_in_the_end(worker: RunningWorker) -> None:
    whole = (await worker.generate(make_request(prompt(40), format=TEXT, **SEEDED))).payload
    stop = whole.decode()[-2:] + "\x00never"
    result = await worker.generate(make_request(prompt(40), format=TEXT, stop=[stop], **SEEDED))
    assert result.payload == whole
    assert result.done.finish_reason == common_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("num_frames", [1, 3, -1, None])
async def test_resumed_stream_sends_only_what_the_client_lacks(
    worker: RunningWorker, num_frames: int | None
) -> None:
    request = make_request(prompt(40), format=TEXT, stop=["\x00never"], **SEEDED)
    whole = await worker.generate(request)
    frames = [frame for frame in whole.frames if frame.kind is FrameKind.TOKENS][:num_frames]
    num_done = sum(len(frame.token_ids()) for frame in frames)
    had = b"".join(frame.payload for frame in frames)
    rest = await worker.generate(
        make_request(
            prompt(40),
            format=TEXT,
            stop=["\x00never"],
            resume_token_ids=whole.tokens[:num_done],
            resume_text_chars=frames[-1].text_chars,
            **SEEDED,
        )
    )
    assert had + rest.payload == whole.payload
    assert rest.tokens == whole.tokens[num_done:]
    assert rest.frames[-1].text_chars == whole.frames[-1].text_chars
    assert rest.done.usage.completion_tokens == 24


async def test_resumed_chat_does_not_repeat_the_role(worker: RunningWorker) -> None:
    request = make_request(prompt(40), format=CHAT, resume_token_ids=[7], **SEEDED)
    assert b'"role"' not in (await worker.generate(request)).payload


async def test_end_of_sequence_token_stops_unless_ignored(worker: RunningWorker) -> None:
    ignoring = await worker.generate(make_request(prompt(40), **SEEDED))
    stop = ignoring.tokens[5]
    at = ignoring.tokens.index(stop)
    result = await worker.generate(make_request(prompt(40), stop_token_ids=[stop], **SEEDED))
    assert result.tokens == ignoring.tokens[: at + 1]
    assert result.done.finish_reason == common_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize(
    ("changes", "status", "reason", "param"),
    [
        ({"temperature": -1.0}, 400, Reason.INVALID_REQUEST, "sampling.temperature"),
        ({"max_tokens": 0}, 400, Reason.INVALID_REQUEST, "sampling.max_tokens"),
        ({"max_tokens": 1020}, 400, Reason.CONTEXT_LENGTH, "sampling.max_tokens"),
        ({"format": 17}, 400, Reason.UNSUPPORTED, "format"),
    ],
)
async def test_bad_request_is_a_status_with_the_error(
    worker: RunningWorker, changes: dict, status: int, reason: Reason, param: str
) -> None:
    result = await worker.generate(make_request(prompt(40), **changes))
    assert result.http_status == status
    assert (result.error.reason, result.error.param) == (reason, param)
    assert (await worker.generate(make_request(prompt(5)))).error is None


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"\xff\xff\xff", 400, Reason.INVALID_REQUEST),
        (b"", 400, Reason.INVALID_REQUEST),
        (bytes(17 << 20), 413, Reason.TOO_LARGE),
    ],
    ids=["garbage", "empty", "huge"],
)
async def test_bad_body_is_a_status_with_the_error(
    worker: RunningWorker, body: bytes, status: int, reason: Reason
) -> None:
    url = worker.url + "/internal/generate"
    async with worker.session.post(url, data=io.BytesIO(body)) as response:
        error = rpc_errors.error_from_message(common_pb2.Error.FromString(await response.read()))
        assert (response.status, error.reason) == (status, reason)


async def test_client_that_leaves_frees_everything(
    worker: RunningWorker, caplog: pytest.LogCaptureFixture
) -> None:
    request = make_request(prompt(100), max_tokens=900)
    caplog.set_level("WARNING")
    async with worker.session.post(
        worker.url + "/internal/generate", data=request.SerializeToString()
    ) as response:
        await response.content.readany()
        assert not worker.is_idle
        response.close()
    await until(lambda: worker.is_idle)
    assert await worker.metric('kvasir_worker_requests_total{reason="cancelled"') == 1
    assert not caplog.records  # it is nobody's error


async def test_deadline_after_the_first_token_is_an_error_frame(worker: RunningWorker) -> None:
    result = await worker.generate(make_request(prompt(30), max_tokens=990, timeout_ms=150))
    assert result.http_status in (200, 504)
    assert result.error.reason is Reason.TIMEOUT
    await until(lambda: worker.is_idle)


async def test_grpc_stream_is_the_same_request(worker: RunningWorker) -> None:
    over_http = await worker.generate(make_request(prompt(40), **SEEDED))
    chunks = [c async for c in worker.stub.Generate(make_request(prompt(40), **SEEDED), timeout=30)]
    assert [t for chunk in chunks for t in chunk.token_ids] == over_http.tokens
    assert chunks[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert chunks[-1].usage.completion_tokens == 24


async def test_grpc_errors_carry_reason_and_field(worker: RunningWorker) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in worker.stub.Generate(make_request(prompt(5), top_p=2.0), timeout=30):
            pass
    error = rpc_errors.error_from_rpc(caught.value)
    assert (error.reason, error.param) == (Reason.INVALID_REQUEST, "sampling.top_p")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_cancelled_grpc_stream_frees_everything(worker: RunningWorker) -> None:
    call = worker.stub.Generate(make_request(prompt(100), max_tokens=900), timeout=30)
    await call.read()
    call.cancel()
    await until(lambda: worker.is_idle)


async def test_many_requests_at_once_give_what_each_gives_alone(worker: RunningWorker) -> None:
    requests = [make_request(prompt(20 + 9 * i, seed=i), temperature=0.8, seed=i) for i in range(8)]
    together = await asyncio.gather(*map(worker.generate, requests))
    for request, result in zip(requests, together, strict=True):
        assert (await worker.generate(request)).tokens == result.tokens


async def test_without_a_tokenizer_tokens_are_served_and_text_is_refused(tmp_path: Path) -> None:
    async with started(make_model_dir(tmp_path / "bare", tokenizer=False)) as worker:
        assert len((await worker.generate(make_request(prompt(5)))).tokens) == 8
        refused = await worker.generate(make_request(prompt(5), format=CHAT))
        assert (refused.error.reason, refused.error.param) == (Reason.UNSUPPORTED, "format")
