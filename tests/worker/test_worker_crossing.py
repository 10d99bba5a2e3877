"""Canaries between workers: what crosses, what does not, and whose fault that is said to be."""

import asyncio
from pathlib import Path

import grpc.aio
import pytest
from kvasir_engine.text import Tokenizer
from kvasir_engine.worker import crossing
from kvasir_proto.v1 import worker_pb2
from kvasir_router.core.canary import Standing
from kvasir_router.server import RouterServer
from kvasir_router.settings import RouterSettings
from worker_builders import RunningWorker, make_model_dir, make_request, prompt, started, until

Check = worker_pb2.TransferCheck


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("canaries") / "tiny")


async def check(decode: RunningWorker, *peers: RunningWorker) -> list[Check]:
    request = worker_pb2.CheckTransferRequest(peers=[peer.address for peer in peers])
    return list((await decode.stub.CheckTransfer(request, timeout=60)).checks)


async def test_a_canary_crosses_and_leaves_nothing(model: Path) -> None:
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        assert not prefill.host.describe().kv_crossed
        assert not decode.host.describe().kv_crossed
        num_published = prefill.host.served().pool.num_published
        (found,) = await check(decode, prefill)
        assert (found.outcome, found.error) == (Check.OUTCOME_CROSSED, "")
        await until(lambda: prefill.host.describe().kv_crossed)
        assert decode.host.describe().kv_crossed
        assert prefill.host.served().pool.num_published == num_published
        await until(lambda: prefill.is_idle and decode.is_idle)
        block_bytes = decode.host.served().layout.block_bytes
        assert await decode.metric('kvasir_worker_kv_bytes_total{use="canary"') == block_bytes
        assert await decode.metric("kvasir_worker_kv_crossed") == 1


async def test_a_hand_off_shows_that_kv_crosses(model: Path) -> None:
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        for seed in range(20):  # a puller that has all may end the call before its lender looks
            request = make_request(prompt(100, seed=seed), prefill_peer=prefill.address)
            await decode.generate(request)
            assert decode.host.describe().kv_crossed
            if prefill.host.describe().kv_crossed:
                break
        assert prefill.host.describe().kv_crossed


async def test_a_blocked_data_port_makes_a_new_worker_unready_until_it_opens(model: Path) -> None:
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        port = prefill.address.data_port
        prefill.address.data_port = 1
        (found,) = await check(decode, prefill)
        assert found.outcome == Check.OUTCOME_FAILED
        assert "no canary from p (127.0.0.1:1): unreachable" in found.error
        status, body = await decode.get_json("/readyz")
        assert (status, body["problems"]) == (503, [f"KV transfers fail: {found.error}"])
        assert decode.host.describe().kv_transfer_error == found.error
        prefill.address.data_port = port
        (found,) = await check(decode, prefill)
        assert found.outcome == Check.OUTCOME_CROSSED
        assert (await decode.get_json("/readyz"))[0] == 200


async def test_a_worker_that_has_pulled_before_is_believed_for_some_failures(model: Path) -> None:
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode", transfer_failures_max=2) as decode,
    ):
        await check(decode, prefill)
        prefill.address.data_port = 1
        await check(decode, prefill)
        assert decode.host.describe().kv_transfer_healthy
        await check(decode, prefill)
        assert not decode.host.describe().kv_transfer_healthy


async def test_one_bad_peer_is_not_the_workers_fault(model: Path) -> None:
    async with (
        started(model, "bad", role="prefill") as bad,
        started(model, "good", role="prefill") as good,
        started(model, "d", role="decode") as decode,
    ):
        bad.address.data_port = 1
        found = await check(decode, bad, good)
        assert [c.outcome for c in found] == [Check.OUTCOME_FAILED, Check.OUTCOME_CROSSED]
        assert decode.host.describe().kv_transfer_healthy


async def test_other_bytes_than_were_lent_are_no_canary(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = crossing._fill

    def other(pool, block, pattern):
        fill(pool, block, pattern[::-1])

    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        monkeypatch.setattr(crossing, "_fill", other)
        (found,) = await check(decode, prefill)
        assert found.outcome == Check.OUTCOME_FAILED
        assert "bad_canary" in found.error


async def test_a_peer_without_memory_proves_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        monkeypatch.setattr(crossing, "LENT_MAX", 0)
        (found,) = await check(decode, prefill)
        assert found.outcome == Check.OUTCOME_BUSY
        assert decode.host.describe().kv_transfer_healthy
        prefill.host.state.draining = True
        (found,) = await check(decode, prefill)
        assert found.outcome == Check.OUTCOME_BUSY


async def test_a_puller_that_leaves_frees_the_canary(model: Path) -> None:
    async with started(model, "p", role="prefill") as prefill:
        call = prefill.stub.LendCanary(worker_pb2.LendCanaryRequest(session_id=7), timeout=30)
        assert (await call.read()).pattern
        assert prefill.host.served().pool.num_sessions == 1
        call.cancel()
        await until(lambda: prefill.is_idle)
        assert not prefill.host.describe().kv_crossed


async def test_peers_are_bounded(model: Path) -> None:
    async with started(model, "d", role="decode") as decode:
        for peers in ([], [decode.address] * (crossing.CHECK_PEERS_MAX + 1)):
            request = worker_pb2.CheckTransferRequest(peers=peers)
            with pytest.raises(grpc.aio.AioRpcError, match="peers must hold 1 to"):
                await decode.stub.CheckTransfer(request, timeout=30)


async def test_checks_of_several_routers_take_turns(model: Path) -> None:
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        found = await asyncio.gather(*(check(decode, prefill) for _ in range(8)))
        assert {c.outcome for (c,) in found} == {Check.OUTCOME_CROSSED}
        await until(lambda: prefill.is_idle and decode.is_idle)


def standings(router: RouterServer) -> dict[str, Standing]:
    return {name: standing for name, (standing, _) in router.canaries.standings().items()}


async def test_a_router_sees_a_blocked_data_port_and_that_it_opens(model: Path) -> None:
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        port = prefill.address.data_port
        prefill.address.data_port = 1
        workers = tuple(f"127.0.0.1:{w.address.grpc_port}" for w in (prefill, decode))
        settings = RouterSettings(
            model=model, model_name="tiny", workers=workers, http_port=0, grpc_port=0
        )
        router = RouterServer(settings, Tokenizer.load(model))
        await router.start()
        try:
            failed = {"p": Standing.FAILED, "d": Standing.FAILED}
            await until(lambda: standings(router) == failed, timeout_s=60)
            prefill.address.data_port = port
            prefill.host.hub.description_changed()
            crossed = {"p": Standing.CROSSED, "d": Standing.CROSSED}
            await until(lambda: standings(router) == crossed, timeout_s=60)
            assert (await decode.get_json("/readyz"))[0] == 200
        finally:
            await router.stop()
