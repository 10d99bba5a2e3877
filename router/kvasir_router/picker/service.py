"""envoy.service.ext_proc.v3.ExternalProcessor, and its server: one stream for each HTTP request."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from kvasir_kvstore.peers import join_target
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.links import Links
from kvasir_proto.v1 import ext_proc_pb2, ext_proc_pb2_grpc

from kvasir_router.metrics import RouterMetrics
from kvasir_router.openai.body import BODY_TIMEOUT_S
from kvasir_router.picker.endpoints import EndpointPicker
from kvasir_router.picker.exchange import Exchange, Stage
from kvasir_router.rpc.server import STATUS_NOT_SERVING, STATUS_SERVING
from kvasir_router.settings import RouterSettings

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
SERVICE = ext_proc_pb2.DESCRIPTOR.services_by_name["ExternalProcessor"].full_name
MESSAGE_BYTES_EXTRA = 1 << 20
"""Beside a buffered body: headers, attributes and metadata."""


class PickerService(ext_proc_pb2_grpc.ExternalProcessorServicer):
    """Answers gateways."""

    def __init__(
        self, settings: RouterSettings, picker: EndpointPicker, metrics: RouterMetrics
    ) -> None:
        self._settings, self._picker, self._metrics = settings, picker, metrics

    async def Process(  # type: ignore[override]
        self, request_iterator: AsyncIterator[ext_proc_pb2.ProcessingRequest], context: Context
    ) -> None:
        """One HTTP request, from its headers until the gateway closes the stream."""
        exchange = Exchange(self._picker, body_bytes_max=self._settings.body_bytes_max)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S) as limit:
                async for part in request_iterator:
                    if part.observability_mode:
                        continue  # nobody would go where the choice says
                    is_asking = exchange.stage is Stage.ASKING
                    for answer in await self._answers(exchange, part):
                        await context.write(answer)
                    if exchange.stage is Stage.ENDED:
                        return
                    if is_asking and exchange.stage is Stage.UNDER_WAY:
                        limit.reschedule(self._latest_s())
        except TimeoutError:
            if exchange.stage is Stage.ASKING:
                late = KvasirError(Reason.TIMEOUT, "the body did not arrive in time")
                await context.write(self._refusal(exchange, late))
        finally:
            exchange.close()

    def _latest_s(self) -> float:
        """When a request that has an endpoint must have ended."""
        return asyncio.get_running_loop().time() + self._settings.request_timeout_ms / 1_000

    async def _answers(
        self, exchange: Exchange, part: ext_proc_pb2.ProcessingRequest
    ) -> list[ext_proc_pb2.ProcessingResponse]:
        was_asking = exchange.stage is Stage.ASKING
        try:
            found = await exchange.answers(part)
        except KvasirError as error:
            return [self._refusal(exchange, error)]
        except Exception:
            log.exception("a request of a gateway failed")
            return [self._refusal(exchange, KvasirError(Reason.INTERNAL, "the router failed"))]
        if was_asking and exchange.stage is not Stage.ASKING:
            self._metrics.answered("ext_proc", status=200, reason="ok")
        return found

    def _refusal(self, exchange: Exchange, error: KvasirError) -> ext_proc_pb2.ProcessingResponse:
        self._metrics.answered("ext_proc", status=error.status.http, reason=error.reason)
        return exchange.refuse(error)


class PickerServer:
    """The port for gateways."""

    def __init__(self, settings: RouterSettings, service: PickerService, links: Links) -> None:
        self._settings, self._links = settings, links
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", settings.body_bytes_max + MESSAGE_BYTES_EXTRA),
                ("grpc.so_reuseport", 0),
            ),
            maximum_concurrent_rpcs=settings.requests_in_flight_max,
        )
        ext_proc_pb2_grpc.add_ExternalProcessorServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self) -> int:
        """The port.

        Raises:
            OSError: it is taken.
        """
        settings = self._settings
        assert settings.picker_port is not None, "no picker is asked for"
        links = self._links if settings.picker_tls else Links()
        target = join_target(settings.host, settings.picker_port)
        port = links.listen(self._server, target, for_anyone=True)
        await self._server.start()
        await self.set_ready(False)
        return port

    async def set_ready(self, is_ready: bool) -> None:
        """What grpc.health.v1 answers, for the server and for the service."""
        status = STATUS_SERVING if is_ready else STATUS_NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def stop(self, grace_ms: int) -> None:
        """Takes no new request; gateways may follow the running ones for `grace_ms`."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_ms / 1_000)
