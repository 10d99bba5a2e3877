"""The OpenAI API through the OpenAI SDK and, where the SDK is too polite, by raw HTTP."""

import asyncio
import json
from pathlib import Path

import openai
import pytest
from fake_worker import FakeWorker, Script
from router_fixtures import CONTEXT_LENGTH, RouterUnderTest, running_router

HI = [{"role": "user", "content": "hi"}]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
async def router(tmp_path: Path):
    workers = FakeWorker("p0", "prefill"), FakeWorker("d0", "decode")
    async with running_router(tmp_path, *workers) as running:
        yield running


async def test_chat_without_a_stream(router: RouterUnderTest) -> None:
    raw = await router.openai.chat.completions.with_raw_response.create(
        model="tiny", messages=HI, max_tokens=10
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == ALPHABET[:10]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len("<|user|>hi<|assistant|>")
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 10
    assert answer.model_extra["kvasir"]["kv_bytes_moved"] == 2**40
    assert answer.model_extra["kvasir"]["attempts"] == 1
    assert raw.headers["x-kvasir-prefill-worker"] == "p0"
    assert raw.headers["x-kvasir-decode-worker"] == "d0"
    assert raw.headers["x-request-id"]


async def test_chat_stream_with_usage(router: RouterUnderTest) -> None:
    stream = await router.openai.chat.completions.create(
        model="tiny",
        messages=HI,
        max_completion_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == (
        ALPHABET + ALPHABET[:4]
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 30
    assert chunks[-1].model_extra["kvasir"]["decode_worker"] == "d0"
    assert len({chunk.id for chunk in chunks}) == 1
    assert stream.response.headers["x-kvasir-prefill-worker"] == "p0"
    assert stream.response.headers["x-request-id"]


async def test_stream_without_usage_has_none(router: RouterUnderTest) -> None:
    assert await router.chat_text(max_tokens=3) == "abc"
    body = {"model": "tiny", "messages": HI, "max_tokens": 2, "stream": True}
    async with router.http.post("/v1/chat/completions", json=body) as response:
        text = await response.text()
    assert text.endswith("data: [DONE]\n\n")
    assert "usage" not in text


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("hey", [ALPHABET.index(c) for c in "hey"]),
        (["hey"], [ALPHABET.index(c) for c in "hey"]),
        ([5, 6, 255], [5, 6, 255]),
        ([[5, 6, 255]], [5, 6, 255]),
    ],
    ids=["text", "list-of-one-text", "ids", "list-of-one-ids"],
)
async def test_completions_take_every_form_of_one_prompt(
    router: RouterUnderTest, prompt, token_ids
) -> None:
    answer = await router.openai.completions.create(model="tiny", prompt=prompt, max_tokens=4)
    assert answer.choices[0].text == "abcd"
    assert answer.object == "text_completion"
    sent = list(router.requests()[0].token_ids)
    assert sent == token_ids if isinstance(prompt[0], int | list) else len(sent) == 3


async def test_completion_stream(router: RouterUnderTest) -> None:
    stream = await router.openai.completions.create(model="tiny", prompt="x", stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == ALPHABET[:16]


async def test_sampling_reaches_the_worker(router: RouterUnderTest) -> None:
    await router.openai.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
        max_tokens=7,
        temperature=0.5,
        top_p=0.25,
        seed=-1,
        stop=["x", "yz"],
        user="somebody",
        n=1,
        presence_penalty=0,
        response_format={"type": "text"},
        extra_body={"top_k": 11, "ignore_eos": True},
    )
    (request,) = router.requests()
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.5, 0.25)
    assert (sampling.seed, sampling.top_k, sampling.ignore_eos) == (2**64 - 1, 11, True)
    assert list(sampling.stop) == ["x", "yz"]
    assert len(request.token_ids) == len("<|system|>be brief<|user|>ab<|assistant|>")


async def test_defaults_fill_the_context_and_draw_a_seed(router: RouterUnderTest) -> None:
    for _ in range(2):
        await router.openai.chat.completions.create(model="tiny", messages=HI)
    one, two = router.requests()
    assert one.sampling.max_tokens == CONTEXT_LENGTH - len(one.token_ids)
    assert one.sampling.temperature == one.sampling.top_p == 1.0
    assert one.sampling.seed != two.sampling.seed


async def test_models(router: RouterUnderTest) -> None:
    assert [m.id async for m in router.openai.models.list()] == ["tiny"]
    assert (await router.openai.models.retrieve("tiny")).owned_by == "kvasir"
    with pytest.raises(openai.NotFoundError) as caught:
        await router.openai.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


async def test_sdk_sees_its_own_exceptions(router: RouterUnderTest) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await router.openai.chat.completions.create(model="gpt-9", messages=HI)
    assert caught.value.param == "model"
    with pytest.raises(openai.BadRequestError) as caught:
        await router.openai.chat.completions.create(model="tiny", messages=HI, temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    assert router.requests() == []


def chat(**fields) -> dict:
    return {"model": "tiny", "messages": HI, **fields}


def complete(**fields) -> dict:
    return {"model": "tiny", "prompt": "x", **fields}


async def test_metrics_tell_what_happened(router: RouterUnderTest) -> None:
    await router.chat_text(max_tokens=2)
    await router.post(CHAT, b"{")
    async with router.http.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    for line in (
        'kvasir_router_requests_total{protocol="http",reason="ok",status="200"} 1.0',
        'kvasir_router_requests_total{protocol="http",reason="invalid_request",status="400"} 1.0',
        'kvasir_router_routes_total{reason="only_candidate"} 1.0',
        "kvasir_router_ttft_seconds_count 1.0",
        "kvasir_router_ttft_actual_to_predicted_count 1.0",
        "kvasir_router_requests_in_flight 0.0",
        'kvasir_router_workers{use="prefill"} 1.0',
        'kvasir_router_workers{use="excluded"} 0.0',
    ):
        assert line in lines


CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
REFUSED = {
    "not-json": (CHAT, b"{", 400, None),
    "not-utf8": (CHAT, b'{"model": "\xff"}', 400, None),
    "nan": (CHAT, b'{"model": "tiny", "temperature": NaN}', 400, None),
    "huge-number": (CHAT, b'{"seed": ' + b"9" * 5_000 + b"}", 400, None),
    "deep": (CHAT, b"[" * 100_000, 400, None),
    "empty": (CHAT, b"", 400, None),
    "list": (CHAT, b"[]", 400, None),
    "no-model": (CHAT, {"messages": HI}, 400, "model"),
    "model-type": (CHAT, chat(model=7), 400, "model"),
    "unknown-model": (CHAT, chat(model="gpt-9"), 404, "model"),
    "no-messages": (CHAT, {"model": "tiny"}, 400, "messages"),
    "empty-messages": (CHAT, chat(messages=[]), 400, "messages"),
    "messages-type": (CHAT, chat(messages="hi"), 400, "messages"),
    "role": (CHAT, chat(messages=[{"role": "x", "content": ""}]), 400, "messages[0].role"),
    "content-type": (
        CHAT,
        chat(messages=[*HI, {"role": "user", "content": 5}]),
        400,
        "messages[1].content",
    ),
    "image": (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
        "messages[0].content",
    ),
    "half-surrogate": (
        CHAT,
        rb'{"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}',
        400,
        "messages[0].content",
    ),
    "temperature-negative": (CHAT, chat(temperature=-0.1), 400, "temperature"),
    "temperature-high": (CHAT, chat(temperature=2.1), 400, "temperature"),
    "temperature-type": (CHAT, chat(temperature="warm"), 400, "temperature"),
    "temperature-bool": (CHAT, chat(temperature=True), 400, "temperature"),
    "top-p": (CHAT, chat(top_p=1.5), 400, "top_p"),
    "top-k": (CHAT, chat(top_k=-2), 400, "top_k"),
    "seed": (CHAT, chat(seed=2**64), 400, "seed"),
    "seed-type": (CHAT, chat(seed=1.5), 400, "seed"),
    "stream-type": (CHAT, chat(stream="yes"), 400, "stream"),
    "max-tokens-zero": (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    "max-tokens-type": (CHAT, chat(max_tokens="7"), 400, "max_tokens"),
    "max-tokens-beyond": (CHAT, chat(max_tokens=CONTEXT_LENGTH), 400, "max_tokens"),
    "completion-tokens-beyond": (
        CHAT,
        chat(max_completion_tokens=10**9),
        400,
        "max_completion_tokens",
    ),
    "prompt-beyond": (
        CHAT,
        chat(messages=[{"role": "user", "content": "x" * 600}]),
        400,
        "messages",
    ),
    "stop-many": (CHAT, chat(stop=list("abcde")), 400, "stop"),
    "stop-empty": (CHAT, chat(stop=[""]), 400, "stop[0]"),
    "stop-type": (CHAT, chat(stop=7), 400, "stop"),
    "tools": (CHAT, chat(tools=[{"type": "function"}]), 400, "tools"),
    "functions": (CHAT, chat(functions=[{"name": "f"}]), 400, "functions"),
    "logprobs": (CHAT, chat(logprobs=True), 400, "logprobs"),
    "n": (CHAT, chat(n=2), 400, "n"),
    "response-format": (
        CHAT,
        chat(response_format={"type": "json_object"}),
        400,
        "response_format",
    ),
    "penalty": (CHAT, chat(presence_penalty=0.5), 400, "presence_penalty"),
    "logit-bias": (CHAT, chat(logit_bias={"5": 1}), 400, "logit_bias"),
    "unknown-field": (CHAT, chat(no_such_field=1), 400, "no_such_field"),
    "completion-best-of": (COMPLETE, complete(best_of=3), 400, "best_of"),
    "completion-suffix": (COMPLETE, complete(suffix="end"), 400, "suffix"),
    "completion-echo": (COMPLETE, complete(echo=True), 400, "echo"),
    "completion-logprobs": (COMPLETE, complete(logprobs=0), 400, "logprobs"),
    "prompt-many": (COMPLETE, complete(prompt=["a", "b"]), 400, "prompt"),
    "prompt-type": (COMPLETE, complete(prompt={"a": 1}), 400, "prompt"),
    "prompt-empty": (COMPLETE, complete(prompt=""), 400, "prompt"),
    "prompt-no-ids": (COMPLETE, complete(prompt=[]), 400, "prompt"),
    "prompt-bad-id": (COMPLETE, complete(prompt=[1, 256]), 400, "prompt"),
    "prompt-negative-id": (COMPLETE, complete(prompt=[-1]), 400, "prompt"),
    "prompt-bool-id": (COMPLETE, complete(prompt=[True]), 400, "prompt"),
    "prompt-beyond-ids": (COMPLETE, complete(prompt=[1] * CONTEXT_LENGTH), 400, "prompt"),
    "unknown-route": ("/v1/embeddings", {}, 404, None),
    "wrong-method": ("/v1/models", {}, 405, None),
}


async def test_bad_input_is_refused_by_name_and_reaches_no_worker(router: RouterUnderTest) -> None:
    for case, (path, body, status, param) in REFUSED.items():
        seen, answer = await router.post(path, body)
        error = answer["error"]
        assert (seen, error["param"]) == (status, param), f"{case}: {error}"
        assert error["message"], case
        assert set(error) == {"message", "type", "param", "code"}, case
        assert error["type"] == "invalid_request_error", case
    assert router.requests() == []
    assert await router.chat_text(max_tokens=2) == "ab"


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("prompt-beyond", "context_length_exceeded"),
        ("max-tokens-beyond", "context_length_exceeded"),
        ("prompt-beyond-ids", "context_length_exceeded"),
        ("unknown-model", "model_not_found"),
        ("tools", "unsupported"),
        ("image", "unsupported"),
        ("unknown-route", "unknown_url"),
    ],
)
async def test_error_codes(router: RouterUnderTest, case: str, code: str) -> None:
    path, body, _, _ = REFUSED[case]
    assert (await router.post(path, body))[1]["error"]["code"] == code


@pytest.mark.parametrize("is_chunked", [False, True], ids=["with-length", "chunked"])
async def test_a_body_of_50_mb_is_refused_in_openais_shape(
    router: RouterUnderTest, is_chunked: bool
) -> None:
    piece = b"x" * (1 << 20)

    async def pieces():
        for _ in range(50):
            yield piece

    headers = {} if is_chunked else {"Content-Length": str(50 * len(piece))}
    async with router.http.post(CHAT, data=pieces(), headers=headers) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "request_too_large"
    assert await router.chat_text(max_tokens=2) == "ab"


async def test_a_body_that_is_not_encoded_as_its_headers_say_is_refused(
    router: RouterUnderTest,
) -> None:
    headers = {"Content-Encoding": "gzip"}
    async with router.http.post(CHAT, data=b"{}", headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "invalid_request"


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
async def test_a_client_that_disconnects_frees_the_worker(tmp_path: Path, is_stream: bool) -> None:
    worker = FakeWorker("w0", script=Script(stall_after=3))
    async with running_router(tmp_path, worker) as router:
        body = chat(max_tokens=20, stream=is_stream)
        async with (
            router.http.post(CHAT, json=body) if is_stream else _impatient(router, body) as r
        ):
            if is_stream:
                await r.content.readuntil(b"\n\n")
                r.close()
        async with asyncio.timeout(5):
            await worker.cancelled.wait()
            await router.server.leaving.idle()
        assert router.server.fleet.ledger.in_flight("w0") == 0


class _impatient:  # noqa: N801
    """Sends a request and hangs up before the answer."""

    def __init__(self, router: RouterUnderTest, body: dict) -> None:
        self._port, self._body = router.server.http_port, json.dumps(body).encode()

    async def __aenter__(self) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(self._body)}\r\n\r\n"
        writer.write(head.encode() + self._body)
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.close()
        await writer.wait_closed()

    async def __aexit__(self, *_: object) -> None:
        pass
