"""`kvasir up --tls`: the same answers as a plain fleet, and nobody else is let in."""

import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
from fleet_process import FleetProcess, fleet_process, kvasir
from kvasir_cli.models.making import make_model
from kvasir_operator.certificates import make_bundle, utc_now
from kvasir_proto.links import Links
from kvasir_proto.v1 import kvnode_pb2, kvnode_pb2_grpc, worker_pb2, worker_pb2_grpc

SMALL = ("--kv-cache-mb", "8", "--kv-node-mb", "8", "--threads", "1")
PROMPT = " ".join(["cab", "dab", "fab", "gab"] * 40)
ASKED: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "ignore_eos": True, "temperature": 0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FleetProcess, FleetProcess]]:
    """A fleet with TLS and a plain one."""
    model = tmp_path_factory.mktemp("models") / "tiny"
    make_model("tiny", model)
    runtime = tmp_path_factory.mktemp("runtime")
    args = ("--model", str(model), *SMALL)
    with (
        fleet_process(runtime, free_port(), *args, "--tls") as secure,
        fleet_process(runtime, free_port(), *args) as plain,
    ):
        for fleet in (secure, plain):
            fleet.wait_line(r"^ready: http")
        yield secure, plain


def part(fleet: FleetProcess, role: str) -> dict[str, Any]:
    return next(part for part in fleet.state()["parts"] if part["role"] == role)


def test_answers_are_those_of_a_plain_fleet(fleets: tuple[FleetProcess, FleetProcess]) -> None:
    secure, plain = (fleet.post("/v1/completions", prompt=PROMPT, **ASKED) for fleet in fleets)
    assert secure["choices"][0]["text"] == plain["choices"][0]["text"] != ""
    assert secure["kvasir"]["prefill_worker"] == "prefill-0"
    assert secure["kvasir"]["kv_bytes_moved"] > 0


def test_status_asks_over_tls(fleets: tuple[FleetProcess, FleetProcess]) -> None:
    secure = fleets[0]
    result = kvasir(secure.runtime, "status", "--port", str(secure.port))
    assert result.returncode == 0, result.stderr
    assert "kv-0" in result.stdout
    assert "no answer" not in result.stdout


def test_keys_are_readable_by_their_owner_alone(fleets: tuple[FleetProcess, FleetProcess]) -> None:
    folder = fleets[0].folder / "tls"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "tls.key").stat().st_mode) == 0o600


async def test_health_and_metrics_need_no_certificate_and_streams_do(
    fleets: tuple[FleetProcess, FleetProcess],
) -> None:
    worker = part(fleets[0], "decode")
    url = f"http://127.0.0.1:{worker['http_port']}"
    async with aiohttp.ClientSession() as session:
        for path in ("/healthz", "/readyz", "/metrics"):
            async with session.get(url + path) as response:
                assert response.status == 200, path
        async with session.post(f"{url}/internal/generate") as response:
            assert response.status == 404
        links = Links(fleets[0].folder / "tls")
        async with links.channel(f"127.0.0.1:{worker['grpc_port']}") as channel:
            about = await _describe(channel)
        assert about.address.stream_port not in (0, worker["http_port"])
        streams = f"://127.0.0.1:{about.address.stream_port}/internal/generate"
        for scheme in ("http", "https"):
            with pytest.raises(aiohttp.ClientError):
                await session.post(scheme + streams, ssl=False)


async def test_no_part_answers_a_stranger(
    fleets: tuple[FleetProcess, FleetProcess], tmp_path: Path
) -> None:
    own = fleets[0].folder / "tls"
    foreign = make_bundle("fleet.kvasir.internal", now=utc_now())
    (tmp_path / "tls.crt").write_bytes(foreign.certificate)
    (tmp_path / "tls.key").write_bytes(foreign.key)
    (tmp_path / "ca.crt").write_bytes((own / "ca.crt").read_bytes())
    for links in (Links(), Links(tmp_path)):
        for role, describe in (("decode", _describe), ("kvnode", _describe_node)):
            target = f"127.0.0.1:{part(fleets[0], role)['grpc_port']}"
            async with links.channel(target) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await describe(channel)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def _describe(channel: grpc.aio.Channel) -> worker_pb2.WorkerDescription:
    return await worker_pb2_grpc.WorkerStub(channel).Describe(
        worker_pb2.DescribeRequest(), timeout=10
    )


async def _describe_node(channel: grpc.aio.Channel) -> kvnode_pb2.KvNodeDescription:
    return await kvnode_pb2_grpc.KvNodeStub(channel).Describe(
        kvnode_pb2.DescribeKvNodeRequest(), timeout=10
    )
