"""What the picker answers, as Envoy's messages."""

import json
from collections.abc import Iterable, Iterator, Mapping

from google.protobuf import struct_pb2
from kvasir_proto.errors import KvasirError
from kvasir_proto.v1 import ext_proc_pb2 as envoy

from kvasir_router.openai.errors import error_body, error_headers

ENDPOINT = "x-gateway-destination-endpoint"
"""Header, and key of dynamic metadata, that name the endpoint."""

ENDPOINT_NAMESPACE = "envoy.lb"
SUBSET = "x-gateway-destination-endpoint-subset"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"
"""Where a gateway lists the endpoints that it would take."""

CHUNK_BYTES = 60_000
"""Of a body that is handed back: below 64 KiB, which some gateways take at most."""

OVERWRITE = envoy.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


def headers_of(headers: envoy.HeaderMap) -> dict[str, str]:
    """By name, in lower case; the values of a repeated one are joined."""
    found: dict[str, str] = {}
    for header in headers.headers:
        name = header.key.lower()
        value = header.value or header.raw_value.decode("utf-8", "replace")
        found[name] = f"{found[name]},{value}" if name in found else value
    return found


def subset_of(metadata: envoy.Metadata) -> frozenset[str] | None:
    """The endpoints that a gateway would take; None: any."""
    fields = (
        metadata.filter_metadata[SUBSET_NAMESPACE].fields
        if (SUBSET_NAMESPACE in metadata.filter_metadata)
        else {}
    )
    if SUBSET not in fields:
        return None
    return frozenset(value.string_value for value in fields[SUBSET].list_value.values)


def endpoint_open() -> envoy.CommonResponse:
    """The choice is yet to come: whatever a client says in its place does not count."""
    return envoy.CommonResponse(header_mutation=envoy.HeaderMutation(remove_headers=[ENDPOINT]))


def endpoint_chosen(endpoint: str) -> tuple[envoy.CommonResponse, struct_pb2.Struct]:
    """The choice: a header, and metadata for load balancers that go by them."""
    common = envoy.CommonResponse(
        header_mutation=envoy.HeaderMutation(set_headers=_options({ENDPOINT: endpoint})),
        clear_route_cache=True,
    )
    metadata = struct_pb2.Struct()
    metadata.update({ENDPOINT_NAMESPACE: {ENDPOINT: endpoint}})
    return common, metadata


def body_unchanged(body: bytes, *, ends: bool) -> Iterator[envoy.BodyResponse]:
    """A body that Envoy gave away, for it to send on."""
    for start in range(0, max(len(body), 1), CHUNK_BYTES):
        chunk = body[start : start + CHUNK_BYTES]
        is_last = start + CHUNK_BYTES >= len(body)
        streamed = envoy.StreamedBodyResponse(body=chunk, end_of_stream=is_last and ends)
        mutation = envoy.BodyMutation(streamed_response=streamed)
        yield envoy.BodyResponse(response=envoy.CommonResponse(body_mutation=mutation))


def refusal(error: KvasirError) -> envoy.ProcessingResponse:
    """The gateway answers the client itself, as the HTTP API would."""
    headers = {"content-type": "application/json; charset=utf-8", **error_headers(error)}
    return envoy.ProcessingResponse(
        immediate_response=envoy.ImmediateResponse(
            status=envoy.HttpStatus(code=error.status.http),
            headers=envoy.HeaderMutation(set_headers=_options(headers)),
            body=json.dumps(error_body(error)).encode(),
            details=f"kvasir_{error.reason.value}",
        )
    )


def _options(headers: Mapping[str, str]) -> Iterable[envoy.HeaderValueOption]:
    return [
        envoy.HeaderValueOption(
            header=envoy.HeaderValue(key=name.lower(), raw_value=value.encode()),
            append_action=OVERWRITE,
        )
        for name, value in headers.items()
    ]
