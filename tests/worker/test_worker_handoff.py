"""A prompt prefilled elsewhere gives the tokens that one worker alone gives, come what may."""

import asyncio
from pathlib import Path

import pytest
from kvasir_engine.worker import handoff
from kvasir_engine.worker.transfer import Pull, Pulled
from kvasir_proto.errors import Reason
from kvasir_proto.frames import FrameKind
from worker_builders import RunningWorker, make_model_dir, make_request, prompt, started, until

LENGTHS = (1, 5, 31, 32, 33, 64, 200)
GREEDY: dict = {}
SEEDED = {"temperature": 1.1, "top_p": 0.95, "top_k": 50, "seed": 12345}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny")


async def alone(model: Path, requests: list, **changes: object) -> list[list[int]]:
    """Tokens of requests served by one worker with role both, one after another."""
    async with started(model, "alone", **changes) as worker:
        results = [await worker.generate(request) for request in requests]
    for result in results:
        assert result.error is None
        assert len(result.tokens) == 8
    return [result.tokens for result in results]


def handed_off(request, prefill: RunningWorker):
    """The same request, to be prefilled by a peer."""
    request.prefill_peer.CopyFrom(prefill.address)
    return request


@pytest.mark.parametrize("chunk_tokens", [7, 32, 512])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_handed_off_output_is_token_identical(
    model: Path, sampling: dict, chunk_tokens: int
) -> None:
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    expected = await alone(model, [make_request(p, **sampling) for p in prompts])
    async with (
        started(model, "p", role="prefill", max_batch_tokens=chunk_tokens) as prefill,
        started(model, "d", role="decode") as decode,
    ):
        computed = decode.host.served().engine.counters
        for tokens, p in zip(expected, prompts, strict=True):
            before = computed().tokens_computed
            result = await decode.generate(handed_off(make_request(p, **sampling), prefill))
            assert result.error is None
            assert result.tokens == tokens
            assert computed().tokens_computed - before == 7  # all but the first, no prompt
            assert result.stats.prefill_worker == "p"
            assert result.stats.decode_worker == "d"
            assert result.stats.kv_bytes_moved > 0
            assert result.stats.tokens_computed == len(p)
        await until(lambda: prefill.is_idle and decode.is_idle)
        assert await decode.metric('kvasir_worker_kv_transfers_total{error="ok"') == len(LENGTHS)


@pytest.mark.parametrize(
    "golden", ["llama3-rope-scaled", "mixtral-moe", "qwen2-bias", "qwen3-qknorm"]
)
async def test_every_architecture_is_handed_off(tmp_path: Path, golden: str) -> None:
    model = make_model_dir(tmp_path / "model", golden=golden)
    prompts = [prompt(length, seed=length) for length in (33, 100)]
    expected = await alone(model, [make_request(p) for p in prompts])
    async with (
        started(model, "p", role="prefill", max_batch_tokens=48) as prefill,
        started(model, "d", role="decode") as decode,
    ):
        for tokens, p in zip(expected, prompts, strict=True):
            result = await decode.generate(handed_off(make_request(p), prefill))
            assert result.tokens == tokens


@pytest.mark.parametrize("chunk_tokens", [7, 512])
async def test_handed_off_int8_kv_gives_the_tokens_of_undisturbed_int8_kv(
    model: Path, chunk_tokens: int
) -> None:
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    expected = await alone(model, [make_request(p) for p in prompts], kv="int8")
    async with (
        started(model, "p", role="prefill", kv="int8", max_batch_tokens=chunk_tokens) as prefill,
        started(model, "d", role="decode", kv="int8") as decode,
    ):
        layout = decode.host.served().layout
        assert layout.dtype == "int8"
        for tokens, p in zip(expected, prompts, strict=True):
            result = await decode.generate(handed_off(make_request(p), prefill))
            assert result.error is None
            assert result.tokens == tokens
            assert result.stats.kv_bytes_moved == -(-len(p) // 32) * layout.block_bytes


async def test_first_token_does_not_wait_for_the_kv(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = asyncio.Event()
    finish = Pull.finish

    async def slow_finish(pull: Pull, *, timeout_s: float) -> Pulled:
        await arrived.wait()
        return await finish(pull, timeout_s=timeout_s)

    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        monkeypatch.setattr(Pull, "finish", slow_finish)
        frames = decode.frames(handed_off(make_request(prompt(70)), prefill))
        first = await anext(frames)
        assert len(first.token_ids()) == 1
        arrived.set()
        rest = [frame async for frame in frames]
        assert sum(len(frame.token_ids()) for frame in rest) == 7


async def test_second_turn_skips_blocks_that_are_held_at_both_ends(model: Path) -> None:
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        first = await decode.generate(handed_off(make_request(prompt(100)), prefill))
        turn = [*prompt(100), *first.tokens, *prompt(70, seed=2)]
        second = await decode.generate(handed_off(make_request(turn), prefill))
    (expected,) = await alone(model, [make_request(turn)])
    assert second.tokens == expected
    assert second.stats.tokens_cached_decode == 96
    assert second.stats.tokens_cached_local == 96
    assert second.stats.kv_bytes_moved < first.stats.kv_bytes_moved
    assert second.done.usage.cached_tokens == 96


async def test_short_rest_is_computed_by_the_decode_worker(model: Path) -> None:
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode", local_prefill_tokens_max=64) as decode,
    ):
        result = await decode.generate(handed_off(make_request(prompt(60)), prefill))
        assert result.stats.prefill_worker == "d"
        assert result.stats.kv_bytes_moved == 0
        assert await prefill.metric("kvasir_worker_requests_total{") == 0
        assert await decode.metric('kvasir_worker_local_prefills_total{reason="short"') == 1


async def test_first_token_is_sent_once(model: Path) -> None:
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        for max_tokens in (1, 2, 3):
            request = make_request(prompt(70), max_tokens=max_tokens)
            result = await decode.generate(handed_off(request, prefill))
            assert len(result.tokens) == max_tokens
            assert result.done.usage.completion_tokens == max_tokens


async def test_stop_token_as_first_token_ends_the_output(model: Path) -> None:
    (tokens,) = await alone(model, [make_request(prompt(50))])
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        request = make_request(prompt(50), stop_token_ids=[tokens[0]])
        result = await decode.generate(handed_off(request, prefill))
        assert result.tokens == tokens[:1]
        assert result.done.finish_reason == 1  # STOP
        await until(lambda: prefill.is_idle and decode.is_idle)


async def test_resumed_request_continues_with_the_same_tokens(model: Path) -> None:
    (tokens,) = await alone(model, [make_request(prompt(70), **SEEDED)])
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        for num_done in (1, 4, 7, 8):
            request = make_request(prompt(70), resume_token_ids=tokens[:num_done], **SEEDED)
            result = await decode.generate(handed_off(request, prefill))
            assert result.tokens == tokens[num_done:]
            assert result.done.usage.completion_tokens == 8


async def test_prefill_worker_that_is_gone_is_named_so_that_another_is_picked(model: Path) -> None:
    async with started(model, "d", role="decode") as decode:
        async with started(model, "p", role="prefill") as prefill:
            request = handed_off(make_request(prompt(70)), prefill)
        result = await decode.generate(request)
        assert result.http_status == 503
        assert (result.error.reason, result.error.param) == (Reason.NO_WORKER, "prefill_peer")
        await until(lambda: decode.is_idle)


@pytest.mark.parametrize("field", ["epoch", "uid"])
async def test_earlier_life_of_a_prefill_worker_is_refused(model: Path, field: str) -> None:
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        request = handed_off(make_request(prompt(70)), prefill)
        if field == "epoch":
            request.prefill_peer.epoch -= 1
        else:
            request.prefill_peer.uid = b"x" * 16
        result = await decode.generate(request)
        assert result.error.reason is Reason.STALE_PEER
        await until(lambda: prefill.is_idle and decode.is_idle)


async def test_busy_prefill_worker_hands_the_request_back(model: Path) -> None:
    async with (
        started(model, "p", role="prefill", max_requests=1) as prefill,
        started(model, "d", role="decode") as decode,
    ):
        ticket = prefill.host.state.admit("prefill", request_id="x", end=lambda error: None)
        result = await decode.generate(handed_off(make_request(prompt(70)), prefill))
        assert result.http_status == 429
        assert result.error.reason is Reason.OVERLOADED
        assert result.error.param == "prefill_peer"
        prefill.host.state.leave(ticket)
        result = await decode.generate(handed_off(make_request(prompt(70)), prefill))
        assert len(result.tokens) == 8


async def test_wrong_role_is_refused(model: Path) -> None:
    async with started(model, "p", role="prefill") as prefill:
        result = await prefill.generate(make_request(prompt(5)))
        assert result.error.reason is Reason.NO_WORKER


async def test_unreachable_data_port_costs_time_never_tokens_and_shows(model: Path) -> None:
    (expected,) = await alone(model, [make_request(prompt(200))])
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode", transfer_failures_max=2) as decode,
    ):
        assert (await decode.get_json("/readyz"))[0] == 200
        prefill.host.served().block_server.stop()
        for seed in (1, 2):
            request = handed_off(make_request(prompt(200, seed=seed)), prefill)
            result = await decode.generate(request)
            assert len(result.tokens) == 8
            assert result.stats.tokens_computed >= 200
            if seed == 1:
                assert result.tokens == expected
        status, body = await decode.get_json("/readyz")
        assert status == 503
        assert "KV transfers fail" in body["problems"][0]
        assert not decode.host.describe().kv_transfer_healthy
        assert await decode.metric('kvasir_worker_kv_transfers_total{error="unreachable"') == 2
        await until(lambda: prefill.is_idle and decode.is_idle)


async def test_what_is_computed_again_after_a_failed_transfer_is_counted(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoff, "PEER_VERDICT_S", 30.0)  # the peer always finishes first
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        prefill.host.served().block_server.stop()
        result = await decode.generate(handed_off(make_request(prompt(200)), prefill))
        assert result.stats.prefill_worker == "p"
        assert result.stats.tokens_computed == 400, "200 at the peer, and again here"
        assert await decode.metric('kvasir_worker_prompt_tokens_total{source="computed"') == 200


async def test_transfer_that_breaks_in_the_middle_keeps_what_arrived(model: Path) -> None:
    (expected,) = await alone(model, [make_request(prompt(200))])
    async with (
        started(model, "p", role="prefill", max_batch_tokens=16) as prefill,
        started(model, "d", role="decode") as decode,
    ):
        frames = decode.frames(handed_off(make_request(prompt(200)), prefill))
        stop_server = prefill.host.served().block_server.stop
        sent = prefill.host.served().block_server.stats
        collecting = [frame async for frame in _stopping(frames, sent, stop_server)]
        tokens = [t for frame in collecting for t in frame.token_ids()]
        assert tokens == expected
        assert collecting[-1].kind is FrameKind.DONE
        await until(lambda: prefill.is_idle and decode.is_idle)


async def _stopping(frames, sent, stop_server):
    """The frames; the source's data plane stops at the first one."""
    first = True
    async for frame in frames:
        if first:
            stop_server()
            first = False
        yield frame
