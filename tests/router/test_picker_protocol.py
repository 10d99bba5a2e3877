"""What gateways say of requests, over a real socket: parts that a test cannot make Envoy send."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from fake_worker import FakeWorker
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kvasir_proto.v1 import ext_proc_pb2 as envoy
from kvasir_proto.v1 import ext_proc_pb2_grpc
from kvasir_router.picker import service
from kvasir_router.picker.messages import ENDPOINT, SUBSET, SUBSET_NAMESPACE
from kvasir_router.settings import RouterSettings
from pydantic import ValidationError
from router_fixtures import RouterUnderTest, running_router

HOST = "10.0.0.1"
BODY = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 1}).encode()
DUPLEX = envoy.ProtocolConfiguration(
    request_body_mode=envoy.FULL_DUPLEX_STREAMED, response_body_mode=envoy.FULL_DUPLEX_STREAMED
)
PARTIAL = envoy.ProtocolConfiguration(request_body_mode=envoy.BUFFERED_PARTIAL)
BUFFERED = envoy.ProtocolConfiguration(request_body_mode=envoy.BUFFERED)


class Asking:
    """One request at a gateway."""

    def __init__(self, router: RouterUnderTest) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{router.server.picker_port}")
        self.call = ext_proc_pb2_grpc.ExternalProcessorStub(self._channel).Process(timeout=20)
        self.replicas = router.server.replicas
        self.own = f"{HOST}:{router.server.http_port}"

    async def send(self, **part: Any) -> None:
        await self.call.write(envoy.ProcessingRequest(**part))

    async def head(
        self, path: str = "/v1/completions", *, more: dict[str, str] | None = None, **part: Any
    ) -> None:
        fields = {":method": "POST", ":path": path, **(more or {})}
        headers = [envoy.HeaderValue(key=k, raw_value=v.encode()) for k, v in fields.items()]
        head = envoy.HttpHeaders(headers=envoy.HeaderMap(headers=headers))
        await self.send(request_headers=head, **part)

    async def body(self, data: bytes, *, ends: bool) -> None:
        await self.send(request_body=envoy.HttpBody(body=data, end_of_stream=ends))

    async def hear(self) -> envoy.ProcessingResponse:
        answer = await self.call.read()
        assert isinstance(answer, envoy.ProcessingResponse), "the stream has ended"
        return answer

    async def refusal(self) -> tuple[int, str]:
        refused = (await self.hear()).immediate_response
        return refused.status.code, json.loads(refused.body)["error"]["code"]

    async def ended(self) -> None:
        async with asyncio.timeout(10):
            while self.replicas.num_open:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.call.cancel()
        await self._channel.close()


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterUnderTest]:
    async with running_router(
        tmp_path, FakeWorker("w"), picker_port=0, advertise_host=HOST, body_bytes_max=100_000
    ) as found:
        yield found


@pytest.fixture
async def asking(router: RouterUnderTest) -> AsyncIterator[Asking]:
    found = Asking(router)
    yield found
    await found.close()


def endpoint_of(response: envoy.CommonResponse) -> str:
    (option,) = response.header_mutation.set_headers
    assert option.header.key == ENDPOINT
    return option.header.raw_value.decode()


async def test_streamed_body_with_trailers_is_answered_whole_and_in_order(asking: Asking) -> None:
    await asking.head(protocol_config=DUPLEX)
    await asking.body(BODY[:10], ends=False)
    await asking.body(BODY[10:], ends=False)
    await asking.send(request_trailers=envoy.HttpTrailers())
    first = await asking.hear()
    assert endpoint_of(first.request_headers.response) == asking.own
    assert first.dynamic_metadata["envoy.lb"][ENDPOINT] == asking.own
    streamed = (await asking.hear()).request_body.response.body_mutation.streamed_response
    assert (streamed.body, streamed.end_of_stream) == (BODY, False), "trailers end it"
    assert (await asking.hear()).WhichOneof("response") == "request_trailers"
    assert asking.replicas.num_open == 1
    await asking.send(response_headers=envoy.HttpHeaders())
    assert (await asking.hear()).WhichOneof("response") == "response_headers"
    await asking.send(response_body=envoy.HttpBody(body=b"a" * 70_000))
    pieces = [(await asking.hear()).response_body.response.body_mutation.streamed_response]
    pieces.append((await asking.hear()).response_body.response.body_mutation.streamed_response)
    assert b"".join(piece.body for piece in pieces) == b"a" * 70_000
    assert asking.replicas.num_open == 1
    await asking.send(response_trailers=envoy.HttpTrailers())
    assert (await asking.hear()).WhichOneof("response") == "response_trailers"
    assert asking.replicas.num_open == 0


async def test_gateway_that_does_not_say_how_it_sends_is_taken_to_stream(asking: Asking) -> None:
    await asking.head()
    await asking.body(BODY, ends=True)
    assert endpoint_of((await asking.hear()).request_headers.response) == asking.own


async def test_endpoint_that_a_client_names_is_removed_until_there_is_a_choice(
    asking: Asking,
) -> None:
    await asking.head(protocol_config=BUFFERED, more={ENDPOINT: "169.254.169.254:80"})
    told = (await asking.hear()).request_headers.response
    assert list(told.header_mutation.remove_headers) == [ENDPOINT]


async def test_stream_that_breaks_off_ends_the_request(asking: Asking) -> None:
    await asking.head(protocol_config=BUFFERED)
    assert (await asking.hear()).WhichOneof("response") == "request_headers"
    await asking.body(BODY, ends=True)
    assert endpoint_of((await asking.hear()).request_body.response) == asking.own
    assert asking.replicas.num_open == 1
    asking.call.cancel()
    await asking.ended()


async def test_router_that_leaves_serves_on_while_there_is_no_other(
    router: RouterUnderTest, asking: Asking
) -> None:
    router.server.leaving.begin()
    await asking.head(protocol_config=DUPLEX)
    await asking.body(BODY, ends=True)
    assert endpoint_of((await asking.hear()).request_headers.response) == asking.own


@pytest.mark.parametrize(
    ("others", "is_chosen"), [(["10.9.9.9:80"], True), (["10.9.9.9:80"], False), ([], False)]
)
async def test_choice_is_among_those_that_the_gateway_would_take(
    asking: Asking, others: list[str], is_chosen: bool
) -> None:
    subset = Struct()
    subset.update({SUBSET: [asking.own, *others] if is_chosen else others})
    metadata = envoy.Metadata(filter_metadata={SUBSET_NAMESPACE: subset})
    await asking.head(protocol_config=DUPLEX, metadata_context=metadata)
    await asking.body(BODY, ends=True)
    if is_chosen:
        assert endpoint_of((await asking.hear()).request_headers.response) == asking.own
    else:
        assert await asking.refusal() == (503, "no_worker")


async def test_body_beyond_the_bound_is_refused_before_it_is_whole(asking: Asking) -> None:
    await asking.head(protocol_config=DUPLEX)
    for _ in range(3):
        await asking.body(b"x" * 40_000, ends=False)
    assert await asking.refusal() == (413, "request_too_large")
    assert await asking.call.read() is grpc.aio.EOF, "there is nothing more to say"


async def test_body_of_which_the_gateway_kept_a_part_is_refused(asking: Asking) -> None:
    await asking.head(protocol_config=PARTIAL)
    await asking.hear()
    await asking.body(BODY, ends=False)
    assert await asking.refusal() == (413, "request_too_large")


async def test_compressed_body_is_refused_by_name(asking: Asking) -> None:
    await asking.head(protocol_config=DUPLEX, more={"content-encoding": "gzip"})
    await asking.body(b"\x1f\x8b", ends=True)
    assert await asking.refusal() == (400, "unsupported")


async def test_body_that_never_ends_is_given_up(
    asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "BODY_TIMEOUT_S", 0.05)
    await asking.head(protocol_config=DUPLEX)
    assert await asking.refusal() == (504, "timeout")


async def test_mirrored_traffic_is_neither_answered_nor_counted(asking: Asking) -> None:
    await asking.head(protocol_config=DUPLEX, observability_mode=True)
    await asking.call.done_writing()
    assert await asking.call.read() is grpc.aio.EOF
    assert asking.replicas.num_open == 0


async def test_empty_message_is_refused(asking: Asking) -> None:
    await asking.send()
    assert await asking.refusal() == (400, "unsupported")


async def test_keys_are_asked_for_at_the_gateway_already(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("good-key alice\n")
    async with running_router(
        tmp_path, FakeWorker("w"), picker_port=0, advertise_host=HOST, api_key_file=keys
    ) as router:
        for header, expected in {"Bearer bad": 401, "Bearer good-key": 0}.items():
            asking = Asking(router)
            await asking.head(protocol_config=DUPLEX, more={"authorization": header})
            if not expected:  # others are refused before they show a body
                await asking.body(BODY, ends=True)
            answer = await asking.hear()
            assert answer.immediate_response.status.code == expected
            if not expected:
                assert endpoint_of(answer.request_headers.response) == asking.own
            await asking.close()


async def test_replica_that_cannot_serve_yet_is_not_told_of(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    picking = {"picker_port": 0, "advertise_host": HOST}
    async with running_router(tmp_path / "other", **picking) as other:
        peers = (f"127.0.0.1:{other.server.grpc_port}",)
        async with running_router(
            tmp_path / "one", FakeWorker("w"), peers=peers, **picking
        ) as router:
            await router.until(lambda: router.server.peers.num_connected == 1)
            asking = Asking(router)
            for number in range(8):
                await asking.close()
                asking = Asking(router)
                await asking.head(protocol_config=DUPLEX)
                await asking.body(BODY.replace(b"hello", b"%d" % number), ends=True)
                chosen = (await asking.hear()).request_headers.response
                assert endpoint_of(chosen) == asking.own
            await asking.close()


async def test_health_says_whether_the_router_can_serve(router: RouterUnderTest) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{router.server.picker_port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service=service.SERVICE)
        call = stub.Watch(asked, timeout=20)
        while (await call.read()).status != service.STATUS_SERVING:
            pass
        call.cancel()
    assert service.SERVICE == "envoy.service.ext_proc.v3.ExternalProcessor"


@pytest.mark.parametrize(
    "fields",
    [
        {"picker_port": 0, "host": "0.0.0.0"},
        {"picker_port": 0, "advertise_host": "::"},
        {"picker_port": 0, "picker_tls": True},
    ],
    ids=["any address", "any address advertised", "no certificate"],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RouterSettings(model=tmp_path, model_name="m", **fields)
