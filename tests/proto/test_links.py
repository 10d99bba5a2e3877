"""Links over real sockets: who is let in, who is refused and why, and what a rotation changes."""

import asyncio
import contextlib
import datetime
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kvasir_operator.certificates import Bundle, make_bundle, utc_now
from kvasir_proto.links import AUTHORITIES, CERTIFICATE, KEY, LinkError, Links

NAME = "chat.default.kvasir.internal"
TURNED_AWAY = r"(?i)disconnected|reset|closed|certificate.required|unknown.ca"
"""With TLS 1.3 a client has ended its handshake when the server judges it; what it reads then is
the alert or the end of the connection."""
DENSE_RECONNECTS = (("grpc.initial_reconnect_backoff_ms", 100),)


def write(folder: Path, bundle: Bundle, *, trust: bytes | None = None) -> Path:
    """The files of a Secret, one by one, as `cp` would."""
    folder.mkdir(exist_ok=True)
    (folder / CERTIFICATE).write_bytes(bundle.certificate)
    (folder / KEY).write_bytes(bundle.key)
    (folder / AUTHORITIES).write_bytes(bundle.ca if trust is None else trust)
    return folder


def make(name: str = NAME, *, days_ago: int = 0) -> Bundle:
    return make_bundle(name, now=utc_now() - datetime.timedelta(days=days_ago))


class Health(health_pb2_grpc.HealthServicer):
    """Check answers once; Watch says something for every permit."""

    def __init__(self) -> None:
        self.permits = asyncio.Semaphore(0)

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=1)

    async def Watch(self, request: Any, context: Any) -> Any:
        while True:
            await self.permits.acquire()
            yield health_pb2.HealthCheckResponse(status=1)


@dataclass
class Server:
    """A gRPC and an HTTP server on the same links."""

    links: Links
    health: Health
    grpc_port: int
    http_port: int

    async def check(self, links: Links) -> health_pb2.HealthCheckResponse:
        """One call over gRPC from a new channel."""
        async with links.channel(f"127.0.0.1:{self.grpc_port}", DENSE_RECONNECTS) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)

    async def get(self, links: Links) -> str:
        """One request over HTTP from a new connection."""
        tls = links.client_context()
        how: dict[str, Any] = {"ssl": tls[0], "server_hostname": tls[1]} if tls else {}
        url = f"http{'s' if tls else ''}://127.0.0.1:{self.http_port}/"
        async with aiohttp.ClientSession() as session, session.get(url, **how) as response:
            return await response.text()


async def _answer(_: web.Request) -> web.Response:
    return web.Response(text="served")


@contextlib.asynccontextmanager
async def serving(links: Links) -> AsyncIterator[Server]:
    server, health = grpc.aio.server(options=(("grpc.so_reuseport", 0),)), Health()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    grpc_port = links.listen(server, "127.0.0.1:0")
    await server.start()
    app = web.Application()
    app.router.add_get("/", _answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=links.server_context()).start()
    try:
        yield Server(links, health, grpc_port, runner.addresses[0][1])
    finally:
        await server.stop(None)
        await runner.cleanup()


async def refused(server: Server, links: Links) -> tuple[str, str]:
    """Why a client is refused, over gRPC and over HTTP."""
    with pytest.raises(grpc.aio.AioRpcError) as rpc:
        await server.check(links)
    assert rpc.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises((aiohttp.ClientError, OSError)) as http:
        await server.get(links)
    return str(rpc.value.details()), f"{type(http.value).__name__}: {http.value}"


@pytest.mark.parametrize("is_secure", [True, False], ids=["secure", "plain"])
async def test_parts_of_one_service_reach_each_other(tmp_path: Path, is_secure: bool) -> None:
    folder = write(tmp_path / "tls", make()) if is_secure else None
    async with serving(Links(folder)) as server:
        client = Links(folder)
        assert (await server.check(client)).status == 1
        assert await server.get(client) == "served"


async def test_plain_client_is_refused_by_a_secure_server(tmp_path: Path) -> None:
    async with serving(Links(write(tmp_path / "tls", make()))) as server:
        rpc, http = await refused(server, Links())
        assert "closed" in rpc.lower() or "reset" in rpc.lower()
        assert "ServerDisconnected" in http or "reset" in http or "BadStatus" in http


async def test_secure_client_does_not_fall_back_to_a_plain_server(tmp_path: Path) -> None:
    async with serving(Links()) as server:
        rpc, http = await refused(server, Links(write(tmp_path / "tls", make())))
        assert "handshake" in rpc.lower()
        assert "SSL" in http


async def test_client_without_a_certificate_is_refused(tmp_path: Path) -> None:
    bundle = make()
    async with serving(Links(write(tmp_path / "tls", bundle))) as server:
        credentials = grpc.ssl_channel_credentials(bundle.ca)
        options = (("grpc.ssl_target_name_override", NAME),)
        target = f"127.0.0.1:{server.grpc_port}"
        async with grpc.aio.secure_channel(target, credentials, options) as channel:
            call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        context = ssl.create_default_context(cadata=bundle.ca.decode())
        url = f"https://127.0.0.1:{server.http_port}/"
        async with aiohttp.ClientSession() as session:
            with pytest.raises((aiohttp.ClientError, OSError), match=TURNED_AWAY):
                await session.get(url, ssl=context, server_hostname=NAME)


async def test_client_of_foreign_authorities_is_refused(tmp_path: Path) -> None:
    ours, foreign = make(), make()
    async with serving(Links(write(tmp_path / "tls", ours))) as server:
        trusting = Links(write(tmp_path / "foreign", foreign, trust=ours.ca))
        _, http = await refused(server, trusting)
        assert re.search(TURNED_AWAY, http)


async def test_server_of_foreign_authorities_is_refused(tmp_path: Path) -> None:
    ours, foreign = make(), make()
    async with serving(Links(write(tmp_path / "foreign", foreign, trust=ours.ca))) as server:
        rpc, http = await refused(server, Links(write(tmp_path / "tls", ours)))
        assert "CERTIFICATE_VERIFY_FAILED" in rpc
        assert "certificate verify failed" in http


async def test_server_of_another_name_is_refused(tmp_path: Path) -> None:
    """Two services whose certificates come from one authority of the platform."""
    ours, other = make(), make("other.default.kvasir.internal")
    both = ours.ca + other.ca
    async with serving(Links(write(tmp_path / "other", other, trust=both))) as server:
        rpc, http = await refused(server, Links(write(tmp_path / "tls", ours, trust=both)))
        assert "Hostname Verification Check failed" in rpc
        assert "Hostname mismatch" in http


async def test_expired_certificate_is_refused(tmp_path: Path) -> None:
    async with serving(Links(write(tmp_path / "tls", make(days_ago=365)))) as server:
        rpc, http = await refused(server, Links(tmp_path / "tls"))
        assert "CERTIFICATE_VERIFY_FAILED" in rpc
        assert "expired" in http


async def test_rotation_changes_new_connections_and_leaves_old_streams(tmp_path: Path) -> None:
    before, after = make(), make()
    folder = write(tmp_path / "server", before)
    old_client = Links(write(tmp_path / "old", before))
    new_client = Links(write(tmp_path / "new", after))
    async with (
        serving(Links(folder)) as server,
        old_client.channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        server.health.permits.release()
        assert (await watch.read()).status == 1
        assert await server.get(old_client) == "served"
        await refused(server, new_client)
        # The files change under the running server.
        write(folder, after)
        assert (await server.check(new_client)).status == 1
        assert await server.get(new_client) == "served"
        await refused(server, old_client)
        server.health.permits.release()
        assert (await watch.read()).status == 1


async def test_parts_that_learn_of_a_rotation_one_after_the_other_still_talk(
    tmp_path: Path,
) -> None:
    """First everybody trusts both authorities, then certificates change."""
    before, after = make(), make()
    both = before.ca + after.ca
    folders = [write(tmp_path / name, before) for name in ("a", "b")]
    async with serving(Links(folders[0])) as server:
        client = Links(folders[1])
        for folder, bundle, trust in (
            (folders[0], before, both),
            (folders[1], before, both),
            (folders[1], after, both),
            (folders[0], after, both),
            (folders[0], after, after.ca),
            (folders[1], after, after.ca),
        ):
            version = client.version
            write(folder, bundle, trust=trust)
            assert client.version == version + (folder is folders[1])
            assert (await server.check(client)).status == 1
            assert await server.get(client) == "served"


SERVER = """
import asyncio, sys, grpc.aio
from pathlib import Path
from kvasir_proto.links import Links

async def main():
    server = grpc.aio.server()
    print(Links(Path(sys.argv[1])).listen(server, "127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()

asyncio.run(main())
"""


def test_many_handshakes_at_once_do_not_end_the_server(tmp_path: Path) -> None:
    """gRPC frees what a handshake uses if it is given a configuration meanwhile."""
    folder = write(tmp_path / "tls", make())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    context.load_verify_locations(folder / AUTHORITIES)
    context.set_alpn_protocols(["h2"])

    def shake_hands(port: int) -> None:
        with (
            socket.create_connection(("127.0.0.1", port), 10) as plain,
            context.wrap_socket(plain, server_hostname=NAME),
        ):
            pass

    command = [sys.executable, "-c", SERVER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(shake_hands, [port] * 1_500))
            assert server.poll() is None
        finally:
            server.kill()


async def test_files_that_do_not_fit_are_not_taken_up(tmp_path: Path) -> None:
    good, other = make(), make()
    folder = write(tmp_path / "tls", good)
    async with serving(Links(folder)) as server:
        client = Links(write(tmp_path / "client", good))
        (folder / KEY).write_bytes(other.key)
        assert (await server.check(client)).status == 1
        assert await server.get(client) == "served"
        assert server.links.version == 0
        write(folder, good)
        assert (await server.check(client)).status == 1


def test_mounted_secret_is_read_as_one_version(tmp_path: Path) -> None:
    """kubelet's layout: the files are links through `..data`, which changes in one step."""
    folder = tmp_path / "tls"
    folder.mkdir()
    write(folder / "..1", make())
    (folder / "..data").symlink_to("..1")
    for name in (CERTIFICATE, KEY, AUTHORITIES):
        (folder / name).symlink_to(Path("..data") / name)
    links = Links(folder)
    write(folder / "..2", make())
    (folder / "..next").symlink_to("..2")
    (folder / "..next").rename(folder / "..data")
    assert links.version == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    {
        "missing key": (KEY, None, "No such file.*tls.key"),
        "key of another": (KEY, make().key, "do not fit"),
        "no certificate": (CERTIFICATE, b"nothing", "do not fit"),
        "no authority": (AUTHORITIES, b"", "do not fit"),
    }.values(),
    ids=["missing key", "key of another", "no certificate", "no authority"],
)
def test_folder_that_cannot_serve_is_refused_at_the_start(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    folder = write(tmp_path / "tls", make())
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(LinkError, match=words):
        Links(folder)
