"""What routers hear of the blocks of vLLM, from a publisher that speaks as vLLM's does."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_vllm import fake_vllm
from fake_vllm_events import CLEARED, fake_events, hashes_of, removed, stored
from kvasir_engine.text import Tokenizer
from kvasir_engine.worker.settings import WorkerSettings
from kvasir_kvstore.core import block
from kvasir_proto.v1 import worker_pb2
from kvasir_router.server import RouterServer
from kvasir_router.settings import RouterSettings
from pydantic import ValidationError
from worker_builders import RunningWorker, make_model_dir, make_request, prompt, started, until

OUTPUT = prompt(4, seed=5)
PROMPT = prompt(100)  # three blocks and a bit
SALT = b"\x01\xff"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_dir(tmp_path_factory.mktemp("models") / "tiny")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def folder() -> Any:
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as short:  # a socket's path is short
        yield Path(short)


def batch_of(event: Any) -> bytes:
    return msgspec.msgpack.encode([1.5, [event], 0])


@asynccontextmanager
async def beside_vllm(model: Path, folder: Path, **settings: Any) -> AsyncIterator[RunningWorker]:
    urls = {"vllm_events": f"ipc://{folder}/events", "vllm_replay": f"ipc://{folder}/replay"}
    async with (
        fake_vllm(OUTPUT) as vllm,
        started(model, vllm_url=vllm.url, **(urls | settings)) as worker,
    ):
        await until(lambda: not worker.host.problems())
        yield worker


def names(worker: RunningWorker, token_ids: list[int], salt: bytes = b"") -> list[bytes]:
    assert worker.host.outside is not None
    return block.chain(block.root(worker.host.outside.fingerprint, salt), token_ids)


def held(worker: RunningWorker) -> list[bytes]:
    return list(worker.host.hub.held)


async def follows(worker: RunningWorker) -> None:
    await until(lambda: worker.host.tells_blocks)


@pytest.mark.parametrize("as_arrays", [False, True], ids=["objects", "arrays"])
async def test_blocks_of_vllm_have_the_names_that_routers_know(
    model: Path, folder: Path, as_arrays: bool
) -> None:
    async with (
        fake_events(folder, as_arrays=as_arrays) as vllm,
        beside_vllm(model, folder) as worker,
    ):
        await follows(worker)
        await vllm.publish(stored(PROMPT[:64]))
        await vllm.publish(stored(PROMPT, since=2))
        expected = names(worker, PROMPT)
        await until(lambda: held(worker) == expected)
        await vllm.publish(removed(hashes_of(PROMPT)[-1]))
        await until(lambda: held(worker) == expected[:2])
        await vllm.publish(CLEARED)
        await until(lambda: not held(worker))


async def test_what_was_cached_before_the_worker_came_is_asked_for(
    model: Path, folder: Path
) -> None:
    async with fake_events(folder) as vllm:
        await vllm.publish(stored(PROMPT))
        async with beside_vllm(model, folder) as worker:
            await follows(worker)
            assert held(worker) == names(worker, PROMPT)


async def test_a_lost_batch_is_asked_for(
    model: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with fake_events(folder) as vllm, beside_vllm(model, folder) as worker:
        await follows(worker)
        await vllm.publish(stored(PROMPT[:32]))
        await until(lambda: len(held(worker)) == 1)
        await vllm.publish(stored(PROMPT[:64], since=1), lost=True)
        await vllm.publish(stored(PROMPT, since=2))
        await until(lambda: held(worker) == names(worker, PROMPT))
        assert "starting over" not in caplog.text
        await vllm.publish(removed(*hashes_of(PROMPT)[1:]))
        await until(lambda: held(worker) == names(worker, PROMPT)[:1])


@pytest.mark.parametrize("has_replay", [True, False])
async def test_a_batch_that_is_lost_for_good_makes_it_start_over(
    model: Path, folder: Path, has_replay: bool
) -> None:
    settings = {} if has_replay else {"vllm_replay": None}
    async with fake_events(folder) as vllm, beside_vllm(model, folder, **settings) as worker:
        await follows(worker)
        await vllm.publish(stored(PROMPT))
        await until(lambda: len(held(worker)) == 3)
        await vllm.publish(removed(*hashes_of(PROMPT)), lost=True)
        vllm.buffer.clear()
        other = prompt(40, seed=9)
        await vllm.publish(stored(other))
        await until(lambda: not set(names(worker, PROMPT)) & set(held(worker)))
        await follows(worker)
        expected = names(worker, other) if has_replay else []
        await until(lambda: held(worker) == expected)


async def test_what_a_replay_leaves_out_is_asked_for_again(
    model: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with fake_events(folder) as vllm:
        for event in (stored(PROMPT), removed(*hashes_of(PROMPT)), stored(prompt(40, seed=9))):
            await vllm.publish(event)
        vllm.left_out = {1}
        async with beside_vllm(model, folder) as worker:
            await follows(worker)
            assert held(worker) == names(worker, prompt(40, seed=9))
            assert (vllm.num_replays, "starting over" in caplog.text) == (2, False)


async def test_a_replay_that_leaves_a_batch_out_is_not_believed(model: Path, folder: Path) -> None:
    async with fake_events(folder) as vllm:
        for event in (stored(PROMPT), removed(*hashes_of(PROMPT)), stored(prompt(40, seed=9))):
            await vllm.publish(event)
        left_out = vllm.buffer[1]
        del vllm.buffer[1]
        async with beside_vllm(model, folder) as worker:
            await until(lambda: vllm.num_replays > 1)
            assert not worker.host.tells_blocks
            vllm.buffer.insert(1, left_out)
            await until(lambda: held(worker) == names(worker, prompt(40, seed=9)))


async def test_without_a_replay_it_is_followed_from_where_it_is(model: Path, folder: Path) -> None:
    async with fake_events(folder) as vllm:
        await vllm.publish(stored(PROMPT))
        async with beside_vllm(model, folder, vllm_replay=None) as worker:
            await follows(worker)
            await vllm.publish(removed(*hashes_of(PROMPT)), stored(prompt(40, seed=9)))
            await until(lambda: held(worker) == names(worker, prompt(40, seed=9)))


async def test_a_server_that_starts_anew_holds_nothing(model: Path, folder: Path) -> None:
    async with fake_events(folder) as vllm:
        starting = beside_vllm(model, folder)
        worker = await starting.__aenter__()
        await follows(worker)
        await vllm.publish(stored(PROMPT))
        await until(lambda: len(held(worker)) == 3)
    try:
        await until(lambda: not worker.host.tells_blocks)
        assert not held(worker)
        async with fake_events(folder) as vllm:
            await follows(worker)
            await vllm.publish(stored(PROMPT[:40]))
            await until(lambda: held(worker) == names(worker, PROMPT[:40]))
    finally:
        await starting.__aexit__(None, None, None)


async def test_a_tenants_blocks_are_its_own(model: Path, folder: Path) -> None:
    async with fake_events(folder) as vllm, beside_vllm(model, folder) as worker:
        await follows(worker)
        await worker.generate(make_request(PROMPT, tenant_salt=SALT))
        await vllm.publish(stored(PROMPT, salt=SALT.hex()), stored(PROMPT[:40]))
        expected = [*names(worker, PROMPT, SALT), *names(worker, PROMPT[:40])]
        await until(lambda: held(worker) == expected)
        stranger = stored(prompt(40, seed=3), salt="aa")
        await vllm.publish(stranger)
        await vllm.publish(stored(PROMPT[:70], since=1))
        await until(lambda: held(worker) == [*expected, names(worker, PROMPT[:70])[1]])
        assert worker.host.tells_blocks


async def test_a_server_that_keeps_salts_to_itself_is_not_followed_for_tenants(
    model: Path, folder: Path
) -> None:
    async with fake_events(folder) as vllm, beside_vllm(model, folder) as worker:
        await follows(worker)
        await vllm.publish(stored(PROMPT[:40], tells_salts=False))
        await until(lambda: len(held(worker)) == 1)
        await worker.generate(make_request(PROMPT, tenant_salt=SALT))
        await vllm.publish(stored(PROMPT, salt=SALT.hex(), tells_salts=False))
        await until(lambda: not worker.host.tells_blocks)
        assert worker.host.describe().blocks_unannounced


@pytest.mark.parametrize(
    "bad",
    [
        b"\xc1",
        b"\x90",
        b"\x93\x01\x91\x91\xa1x\x00",
        batch_of([]),
        batch_of(stored(PROMPT) | {"token_ids": 3}),
        batch_of(stored(PROMPT) | {"token_ids": ["x"] * 96}),
        batch_of(stored(PROMPT) | {"block_hashes": [[1], [2], [3]]}),
        batch_of(stored(PROMPT) | {"block_size": None}),
    ],
    ids=[
        *("not MessagePack", "empty", "another event", "event of nothing", "tokens are no list"),
        *("tokens are no numbers", "hashes are no hashes", "no size"),
    ],
)
async def test_what_cannot_be_understood_is_not_followed(
    model: Path, folder: Path, bad: bytes
) -> None:
    async with fake_events(folder) as vllm, beside_vllm(model, folder) as worker:
        await follows(worker)
        await vllm.publish(stored(PROMPT))
        await vllm.publish_raw(bad)
        await until(lambda: not worker.host.tells_blocks)
        assert not held(worker)
        assert not worker.host.problems(), "it serves all the same"


async def test_blocks_of_another_size_are_told_by_name(
    model: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with fake_events(folder) as vllm, beside_vllm(model, folder) as worker:
        await follows(worker)
        await vllm.publish(stored(PROMPT, size=16))
        await until(lambda: not worker.host.tells_blocks)
    assert "--block-size 32" in caplog.text


async def test_routers_route_by_what_vllm_holds(model: Path, folder: Path) -> None:
    async with beside_vllm(model, folder) as worker:
        router = RouterServer(
            RouterSettings(
                model=model,
                model_name="tiny",
                workers=(f"127.0.0.1:{worker.address.grpc_port}",),
                http_port=0,
                grpc_port=0,
                drain_timeout_ms=100,
            ),
            Tokenizer.load(model),
        )
        await router.start()
        try:
            view = router.fleet.view
            await until(lambda: set(view().workers) == {"w"})
            guessed = names(worker, prompt(64, seed=8))
            view().prefix.routed("w", guessed, now_ms=0, blocks_max=100)
            assert view().prefix.leading(guessed) == {"w": 2}, "by what it sent"
            known = names(worker, PROMPT)
            async with fake_events(folder) as vllm:
                await follows(worker)
                await vllm.publish(stored(PROMPT))
                await until(lambda: view().prefix.leading(known) == {"w": 3})
                assert view().prefix.leading(guessed) == {}, "vLLM does not hold it"
            await until(lambda: view().prefix.leading(known) == {})
        finally:
            await router.stop()


async def test_a_long_past_cuts_no_watcher_off(model: Path, folder: Path) -> None:
    past = [[token] * 32 for token in range(1_200)]
    async with (
        beside_vllm(model, folder, watch_queue_max=50) as worker,
        fake_events(folder) as vllm,
    ):
        watching = worker.stub.WatchEvents(worker_pb2.WatchEventsRequest(), timeout=60)
        assert (await watching.read()).description.blocks_unannounced
        for token_ids in past:
            await vllm.publish(stored(token_ids), lost=True)
        await follows(worker)
        while (event := await watching.read()).description.blocks_unannounced:
            pass
        assert event.snapshot
        assert len(set(event.stored)) == len(past)
        watching.cancel()


@pytest.mark.parametrize(
    "wrong",
    [
        {"vllm_url": None, "vllm_events": "ipc:///tmp/e"},
        {"vllm_replay": "ipc:///tmp/r"},
        {"vllm_events": "http://localhost:1"},
        {"vllm_events": "ipc:///tmp/e", "block_events": False},
    ],
    ids=["no vLLM", "replay alone", "not ZeroMQ", "no events"],
)
def test_settings_that_do_not_go_together_are_refused(model: Path, wrong: dict[str, Any]) -> None:
    fields = {"name": "w", "model": model, "model_name": "tiny", "vllm_url": "http://a:1"}
    with pytest.raises(ValidationError):
        WorkerSettings(**(fields | wrong))
