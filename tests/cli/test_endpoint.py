"""The commands that talk to a server, against a small one of the test's own."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from kvasir_cli.endpoint import Answer, Endpoint
from kvasir_cli.errors import CommandError
from kvasir_cli.load.prompts import PromptShape, TokenCounter, make_prompts
from kvasir_cli.load.serve import LoadSettings, percentiles, run_load
from kvasir_cli.models.making import make_model

USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 2,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def text_event(text: str, finish: str | None = None) -> dict:
    return {"choices": [{"text": text, "finish_reason": finish}]}


GOOD = [
    {"choices": [{"delta": {"role": "assistant"}}]},
    {"choices": [{"delta": {"content": "Pa"}}]},
    text_event("ris", "stop"),
    {"choices": [], "usage": USAGE, "kvasir": {"decode_worker": "d"}},
]


@asynccontextmanager
async def serving(answer: Callable, path: str = "/v1/completions") -> AsyncIterator[Endpoint]:
    """An endpoint whose completions are made by `answer(request) -> events or response`."""

    async def complete(request: web.Request) -> web.StreamResponse:
        events = await answer(request)
        if isinstance(events, web.StreamResponse):
            return events
        response = web.StreamResponse()
        await response.prepare(request)
        for event in events:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    app = web.Application()
    app.add_routes([web.post(path, complete), web.get("/v1/models", models)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with aiohttp.ClientSession() as session:
            yield Endpoint(session, f"http://127.0.0.1:{port}/v1")
    finally:
        await runner.cleanup()


async def read(endpoint: Endpoint, answer: Answer) -> str:
    return "".join([piece async for piece in endpoint.stream("/v1/completions", {}, answer)])


async def good(_: web.Request) -> list[dict]:
    return GOOD


async def test_stream_gives_text_usage_and_stats() -> None:
    answer = Answer()
    async with serving(good) as endpoint:
        assert await endpoint.model() == "m"
        assert await read(endpoint, answer) == "Paris"
    assert (answer.text, answer.finish_reason) == ("Paris", "stop")
    assert (answer.num_tokens, answer.num_cached) == (2, 4)
    assert answer.stats == {"decode_worker": "d"}
    assert answer.ttft_ms > 0


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([text_event("a")], "ended before the answer did"),
        ([text_event("a"), {"error": {"message": "worker died"}}], "worker died"),
    ],
    ids=["cut off", "error event"],
)
async def test_stream_that_does_not_end_well_is_an_error(events: list[dict], message: str) -> None:
    async def broken(_: web.Request) -> list[dict]:
        return events

    async with serving(broken) as endpoint:
        with pytest.raises(CommandError, match=message):
            await read(endpoint, Answer())


async def test_refusal_shows_the_servers_message_and_field() -> None:
    async def refuse(_: web.Request) -> web.Response:
        error = {"message": "must be positive", "param": "max_tokens"}
        return web.json_response({"error": error}, status=400)

    async with serving(refuse) as endpoint:
        with pytest.raises(CommandError, match="max_tokens: must be positive"):
            await read(endpoint, Answer())


async def test_server_that_is_not_there_is_named() -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(CommandError, match="nothing answers at http"):
            await Endpoint(session, "http://127.0.0.1:9").model()


async def test_ctrl_c_stops_an_answer_and_the_chat_goes_on() -> None:
    bodies: list[dict] = []
    stopped = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        response = web.StreamResponse()
        await response.prepare(request)
        events = [GOOD[1]] if len(bodies) == 1 else GOOD
        for event in events:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        if len(bodies) == 1:
            await stopped.wait()
        return response

    async with serving(slow, path="/v1/chat/completions") as endpoint:
        args = ("chat", "--url", endpoint.url, "--system", "Be brief.")
        chat = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kvasir_cli", *args),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write(b"Capital of France?\n")
        assert await chat.stdout.readexactly(2) == b"Pa"
        chat.send_signal(signal.SIGINT)
        assert await chat.stdout.readline() == b" [stopped]\n"
        stopped.set()
        rest, _ = await chat.communicate(b"Once more?\n/exit\n")
    assert (rest, chat.returncode) == (b"Paris\n", 0)
    assert [message["content"] for message in bodies[1]["messages"]] == [
        *("Be brief.", "Capital of France?", "Pa", "Once more?"),
    ]


def make_settings(**changes: object) -> LoadSettings:
    values: dict = {
        "concurrency": 3,
        "num_requests": 8,
        "num_warmup": 2,
        "input_tokens": 4,
        "output_tokens": 2,
        "shared_ratio": 0.0,
        "seed": 0,
    }
    return LoadSettings(**(values | changes))


async def test_load_keeps_its_concurrency_and_counts_failures() -> None:
    running = peak = served = 0

    async def count(request: web.Request) -> list[dict]:
        nonlocal running, peak, served
        running += 1
        peak = max(peak, running)
        body = await request.json()
        for _ in range(5):
            await asyncio.sleep(0)
        running -= 1
        served += 1
        assert body["ignore_eos"] is True
        return GOOD if body["prompt"] != "bad" else [{"error": {"message": "no"}}]

    prompts = ["warm", "warm", "bad", *["x"] * 7]
    ticks: list[int] = []
    async with serving(count) as endpoint:
        result = await run_load(endpoint.url, None, prompts, make_settings(), ticks.append)
    assert (served, sum(ticks), peak) == (10, 10, 3)
    assert (result.num_ok, result.errors) == (7, {"no": 1})
    assert result.input_tokens_mean == 9
    assert result.output_tokens_mean == 2
    assert result.output_tokens_per_s > 0
    json.dumps(result.as_json())


async def test_load_of_which_nothing_succeeds_is_an_error() -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "broken"}}, status=500)

    async with serving(refuse) as endpoint:
        with pytest.raises(CommandError, match=r"every request failed: .*broken"):
            await run_load(endpoint.url, "m", ["a"] * 4, make_settings(), lambda _: None)


def test_percentiles_are_nearest_rank() -> None:
    found = percentiles([float(value) for value in range(1, 101)])
    assert found == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "mean": 50.5}
    assert percentiles([7.0]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0, "mean": 7.0}
    assert percentiles([]) == {}


def test_prompts_have_their_length_and_share_their_start(tmp_path: Path) -> None:
    make_model("tiny", tmp_path / "m")
    counter = TokenCounter(tmp_path / "m")
    shape = PromptShape(num_prompts=3, num_tokens=64, shared_ratio=0.5, seed=1)
    prompts = make_prompts(shape, counter)
    assert [counter.count(prompt) for prompt in prompts] == [64, 64, 64]
    starts = {" ".join(prompt.split()[:32]) for prompt in prompts}
    assert len(starts) == 1
    assert len(set(prompts)) == 3
    assert make_prompts(shape, counter) == prompts
