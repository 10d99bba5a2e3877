"""The index on what Redis may be: one server, one that Sentinels watch, a cluster."""

import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
from conftest import RedisServer
from kvasir_kvstore.index import RedisIndex
from kvasir_kvstore.redis_url import check_redis_url
from kvstore_builders import eventually, free_port, wait_until
from test_index import A, B, brief, make_names


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host", "not a URL of Redis"),
        ("redis+sentinel://host:26379", "SERVICE"),
        ("redis+sentinel://host:x/main", "HOST:PORT"),
        ("redis+sentinel://host/main/x", "SERVICE/DB"),
    ],
    ids=["scheme", "service", "port", "database"],
)
def test_a_url_that_cannot_work_is_refused_without_telling_the_password(
    url: str, message: str
) -> None:
    secret = url.replace("://", "://user:geheim@")
    with pytest.raises(ValueError, match=message) as caught:
        check_redis_url(secret)
    assert "geheim" not in str(caught.value)


@pytest.fixture
def sentinel_url(own_redis: RedisServer, tmp_path: Path) -> Iterator[str]:
    own_redis.start()
    port = free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {own_redis.port} 1\n"
    )
    with (tmp_path / "sentinel.log").open("wb") as log:
        process = subprocess.Popen(
            [own_redis.binary, str(config), "--sentinel"], cwd=tmp_path, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: _answers(port), "Sentinel", timeout_s=30)
        yield f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{port}/main"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def cluster_url(own_redis: RedisServer) -> str:
    own_redis.start({"cluster-enabled": "yes"})
    with redis.Redis(port=own_redis.port) as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_until(
            lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"), "cluster"
        )
    return f"redis+cluster://127.0.0.1:{own_redis.port}"


def _answers(port: int) -> bool:
    try:
        with redis.Redis(port=port) as client:
            return bool(client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main"))
    except redis.RedisError:
        time.sleep(0.01)
        return False


@pytest.fixture(params=["sentinel_url", "cluster_url"])
async def index(request: pytest.FixtureRequest) -> AsyncIterator[RedisIndex]:
    opened = RedisIndex(request.getfixturevalue(request.param), timeout_ms=10_000, retry_ms=50)
    yield opened
    await opened.close()


async def test_blocks_are_announced_found_and_withdrawn(index: RedisIndex) -> None:
    names = make_names(300)
    assert await eventually(lambda: index.announce(names, A), bool, 30)
    await index.announce(names[2:4], B)
    assert brief(await index.locate(names)) == [("a", 0, 2), ("b", 2, 2), ("a", 4, 296)]
    assert await index.withdraw(names, A)
    assert brief(await index.locate(names[2:])) == [("b", 0, 2)]
    assert await index.locate(names) == []
    assert index.healthy


async def test_when_it_is_away_the_index_says_so_and_comes_back(
    index: RedisIndex, own_redis: RedisServer
) -> None:
    names = make_names(2)
    assert await eventually(lambda: index.announce(names, A), bool, 30)
    own_redis.stop()
    assert await index.locate(names) == []
    assert not index.healthy
    assert "Redis" in index.problem
