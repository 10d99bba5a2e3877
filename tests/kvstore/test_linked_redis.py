"""The index in a Redis that shows and demands certificates, run as the operator runs it."""

import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from kvasir_kvstore.index import RedisIndex, make_index
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_operator.certificates import Bundle, make_bundle
from kvasir_operator.core.redis import renewing_command, tls_args
from kvasir_proto.links import AUTHORITIES, CERTIFICATE, KEY, Links
from kvasir_proto.v1 import common_pb2
from kvstore_builders import free_port, wait_until

SERVICE = "chat.default.kvasir.internal"
NAMES = [bytes([n]) * 16 for n in range(3)]
HOLDER = common_pb2.PeerAddress(name="w", host="10.0.0.1", uid=b"u", epoch=1)


def bundle(name: str = SERVICE) -> Bundle:
    return make_bundle(name, now=datetime.now(UTC) - timedelta(days=1))


def write(folder: Path, made: Bundle, *, authorities: bytes = b"") -> Path:
    """As the kubelet does: files are replaced, not written over."""
    folder.mkdir(exist_ok=True)
    files = {CERTIFICATE: made.certificate, KEY: made.key, AUTHORITIES: authorities or made.ca}
    for name, data in files.items():
        (folder / "new").write_bytes(data)
        (folder / "new").rename(folder / name)
    return folder


class LinkedRedis:
    """redis-server, told of renewed certificates by the command that runs it."""

    def __init__(self, folder: Path, made: Bundle, *, interval_s: float = 0.1) -> None:
        self.tls = write(folder / "server", made)
        self.log = folder / "redis.log"
        port, socket = free_port(), str(folder / "redis.sock")
        self.url = f"rediss+mtls://127.0.0.1:{port}/0"
        command = (
            *renewing_command(str(self.tls), socket, interval_s=interval_s),
            *tls_args(str(self.tls), socket, port=port),
            *("--bind", "127.0.0.1", "--save", ""),
        )
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
        self.wait_for("Ready to accept connections")

    def wait_for(self, words: str, *, times: int = 1) -> None:
        wait_until(lambda: self.log.read_text().count(words) >= times, f"redis-server: {words}")

    def renew(self, made: Bundle, *, authorities: bytes, times: int) -> None:
        write(self.tls, made, authorities=authorities)
        self.wait_for("certificates changed: OK", times=times)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture
def made() -> Bundle:
    return bundle()


@pytest.fixture
def server(tmp_path: Path, made: Bundle) -> Iterator[LinkedRedis]:
    found = LinkedRedis(tmp_path, made)
    yield found
    found.stop()
    assert found.process.returncode == 0, "it passes SIGTERM on"


async def answers(url: str, links: Links | None) -> str:
    """Whether a new connection can be used; "" or the problem."""
    index = RedisIndex(url, links=links, timeout_ms=5000)
    try:
        await index.generation()
        return index.problem
    finally:
        await index.close()


@pytest.fixture
async def index(tmp_path: Path, server: LinkedRedis, made: Bundle) -> AsyncIterator[RedisIndex]:
    links = Links(write(tmp_path / "client", made))
    found = RedisIndex(server.url, links=links, timeout_ms=5000)
    yield found
    await found.close()


async def test_index_works_over_tls(index: RedisIndex) -> None:
    assert await index.announce(NAMES, HOLDER), index.problem
    [run] = await index.locate(NAMES)
    assert (run.holder.name, run.count) == ("w", 3)
    assert await index.withdraw(NAMES[:1], HOLDER)
    assert await index.locate(NAMES) == []


async def test_strangers_are_refused(tmp_path: Path, server: LinkedRedis, made: Bundle) -> None:
    other = bundle()
    trusting = write(tmp_path / "other", other, authorities=other.ca + made.ca)
    assert await answers(server.url, Links(trusting)), "a certificate of another authority"
    plain = server.url.replace("rediss+mtls", "redis")
    assert await answers(plain, None), "no TLS"
    nameless = server.url.replace("rediss+mtls", "rediss")
    found = f"{nameless}?ssl_ca_certs={trusting / AUTHORITIES}&ssl_check_hostname=False"
    assert await answers(found, None), "no certificate"


async def test_server_must_show_the_name_of_the_service(tmp_path: Path) -> None:
    made, other = bundle("other.default.kvasir.internal"), bundle()
    server = LinkedRedis(tmp_path, made)
    write(server.tls, made, authorities=made.ca + other.ca)
    server.wait_for("certificates changed: OK")
    links = Links(write(tmp_path / "client", other, authorities=other.ca + made.ca))
    assert "certificate" in (await answers(server.url, links)).lower()
    server.stop()


async def test_both_sides_follow_a_rotation(
    tmp_path: Path, server: LinkedRedis, index: RedisIndex, made: Bundle
) -> None:
    """The three steps of a rotation, Redis ahead of the client or behind it."""
    coming, client = bundle(), tmp_path / "client"
    both = made.ca + coming.ca
    assert await index.announce(NAMES, HOLDER)
    server.renew(made, authorities=both, times=1)
    write(client, made, authorities=both)
    write(client, coming, authorities=both)
    assert await answers(server.url, Links(client)) == "", "the client is ahead"
    server.renew(coming, authorities=both, times=2)
    server.renew(coming, authorities=coming.ca, times=3)
    assert await answers(server.url, Links(client)) == ""
    assert len(await index.locate(NAMES)) == 1, "connections that live go on"
    await index._redis.connection_pool.disconnect()
    assert len(await index.locate(NAMES)) == 1, "and are made anew with the files of now"
    assert await answers(server.url, Links(write(tmp_path / "old", made, authorities=both)))


def test_a_stop_does_not_wait_for_the_next_look(tmp_path: Path, made: Bundle) -> None:
    LinkedRedis(tmp_path, made, interval_s=3600).stop()


async def test_half_written_certificates_are_tried_again(server: LinkedRedis) -> None:
    coming = bundle()
    (server.tls / KEY).write_bytes(coming.key)
    server.wait_for("certificates changed: ERR")
    server.renew(coming, authorities=coming.ca, times=1)


def test_certificates_must_be_there() -> None:
    for links in (None, Links()):
        with pytest.raises(ValueError, match="tls_dir"):
            make_index("rediss+mtls://r:6379/0", links=links)
    assert KvNodeSettings(name="n", redis="rediss+mtls://r:6379/0").redis
