"""One HTTP request at a gateway, told part by part, and what the gateway is answered to each.

How the gateway shows a body depends on its settings; the first message says:

    FULL_DUPLEX_STREAMED  nothing is answered until the body is whole: then headers and body at once
    BUFFERED              headers wait at the gateway; the choice is the answer to the body
    NONE, STREAMED        the headers leave before the body: the choice is made without it

The answer to the request is passed on as it comes; its end is the end of the request.
Invariants: a request is refused, or gets one endpoint; every part is answered in order.
"""

import enum

from google.protobuf.struct_pb2 import Struct
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import ext_proc_pb2 as envoy

from kvasir_router.picker.endpoints import Asked, EndpointPicker, Pick
from kvasir_router.picker.messages import (
    body_unchanged,
    endpoint_chosen,
    endpoint_open,
    headers_of,
    refusal,
    subset_of,
)

Answer = envoy.ProcessingResponse


class Stage(enum.Enum):
    """How far it has come."""

    ASKING = "asking"  # no endpoint yet
    UNDER_WAY = "under way"
    ENDED = "ended"


class Exchange:
    """From the headers of a request to the end of its answer."""

    def __init__(self, picker: EndpointPicker, *, body_bytes_max: int) -> None:
        self._picker, self._body_bytes_max = picker, body_bytes_max
        self._asked = Asked({}, None)
        self._body = bytearray()
        self._modes = envoy.ProtocolConfiguration(
            request_body_mode=envoy.FULL_DUPLEX_STREAMED,  # what the protocol asks of gateways
            response_body_mode=envoy.FULL_DUPLEX_STREAMED,
        )
        self._pick: Pick | None = None
        self.stage = Stage.ASKING

    def close(self) -> None:
        """The stream has ended: so has the request."""
        self.stage = Stage.ENDED
        if self._pick is not None:
            self._pick.close()

    def refuse(self, error: KvasirError) -> Answer:
        """Ends it: the gateway tells the client."""
        self.close()
        return refusal(error)

    async def answers(self, part: envoy.ProcessingRequest) -> list[Answer]:
        """What the gateway is told on a part of the request or of its answer.

        Raises:
            KvasirError: the request is to be refused.
        """
        if part.HasField("protocol_config"):
            self._modes = part.protocol_config
        match part.WhichOneof("request"):
            case "request_headers":
                return await self._headers(part)
            case "request_body":
                return await self._request_body(part.request_body)
            case "request_trailers":
                rest = await self._whole(ends=False) if self._is_awaited else []
                return [*rest, Answer(request_trailers=envoy.TrailersResponse())]
            case "response_headers":
                self._end_if(part.response_headers.end_of_stream)
                return [Answer(response_headers=envoy.HeadersResponse())]
            case "response_body":
                return self._response_body(part.response_body)
            case "response_trailers":
                self._end_if(True)
                return [Answer(response_trailers=envoy.TrailersResponse())]
            case _:
                raise KvasirError(Reason.UNSUPPORTED, "a part of a request that is not known")

    @property
    def _is_awaited(self) -> bool:
        """Whether the gateway has heard nothing yet."""
        mode = self._modes.request_body_mode
        return self.stage is Stage.ASKING and mode == envoy.FULL_DUPLEX_STREAMED

    async def _headers(self, part: envoy.ProcessingRequest) -> list[Answer]:
        headers = headers_of(part.request_headers.headers)
        self._asked = Asked(headers, None, subset_of(part.metadata_context))
        mode = self._modes.request_body_mode
        if not part.request_headers.end_of_stream:
            self._picker.check(self._asked)
            if mode == envoy.FULL_DUPLEX_STREAMED:
                return []
            if mode in (envoy.BUFFERED, envoy.BUFFERED_PARTIAL):
                return [Answer(request_headers=envoy.HeadersResponse(response=endpoint_open()))]
        common, metadata = await self._choose(self._asked)
        chosen = envoy.HeadersResponse(response=common)
        return [Answer(request_headers=chosen, dynamic_metadata=metadata)]

    async def _request_body(self, part: envoy.HttpBody) -> list[Answer]:
        if self.stage is not Stage.ASKING:
            return [Answer(request_body=envoy.BodyResponse())]
        self._body += part.body
        if len(self._body) > self._body_bytes_max:
            message = f"the body exceeds {self._body_bytes_max} bytes"
            raise KvasirError(Reason.TOO_LARGE, message)
        if self._modes.request_body_mode == envoy.FULL_DUPLEX_STREAMED:
            return await self._whole(ends=True) if part.end_of_stream else []
        if self._modes.request_body_mode == envoy.BUFFERED_PARTIAL and not part.end_of_stream:
            raise KvasirError(Reason.TOO_LARGE, "the body exceeds what the gateway keeps of it")
        common, metadata = await self._choose(self._asked_whole())
        self._body.clear()
        chosen = envoy.BodyResponse(response=common)
        return [Answer(request_body=chosen, dynamic_metadata=metadata)]

    async def _whole(self, *, ends: bool) -> list[Answer]:
        """The body has come to its end: the choice, and the body back."""
        common, metadata = await self._choose(self._asked_whole())
        chosen = envoy.HeadersResponse(response=common)
        body = bytes(self._body)
        self._body.clear()
        return [
            Answer(request_headers=chosen, dynamic_metadata=metadata),
            *(Answer(request_body=part) for part in body_unchanged(body, ends=ends)),
        ]

    def _asked_whole(self) -> Asked:
        return Asked(self._asked.headers, bytes(self._body), self._asked.among)

    async def _choose(self, asked: Asked) -> tuple[envoy.CommonResponse, Struct]:
        self._pick = await self._picker.pick(asked)
        self.stage = Stage.UNDER_WAY
        return endpoint_chosen(self._pick.endpoint)

    def _response_body(self, part: envoy.HttpBody) -> list[Answer]:
        self._end_if(part.end_of_stream)
        if self._modes.response_body_mode != envoy.FULL_DUPLEX_STREAMED:
            return [Answer(response_body=envoy.BodyResponse())]
        passed = body_unchanged(part.body, ends=part.end_of_stream)
        return [Answer(response_body=response) for response in passed]

    def _end_if(self, ends: bool) -> None:
        if ends:
            self.close()
