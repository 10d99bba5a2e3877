"""The gRPC servers around the services: limits, health, reflection.

One server is for clients. Where links are secure, a second one, on a port of its own, is for those
who show the service's certificate: the other replicas and the operator.
"""

import asyncio

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from kvasir_kvstore.peers import join_target
from kvasir_proto.links import Links
from kvasir_proto.v1 import inference_pb2, peering_pb2, peering_pb2_grpc

from kvasir_router.peering.service import RouterPeerService
from kvasir_router.rpc.service import SERVICE, InferenceService
from kvasir_router.settings import RouterSettings

STATUS_SERVING = health_pb2.HealthCheckResponse.SERVING
STATUS_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class RpcServer:
    """Serves kvasir.v1.Inference and, to the other replicas, kvasir.v1.RouterPeer."""

    def __init__(
        self,
        settings: RouterSettings,
        service: InferenceService,
        peering: RouterPeerService,
        links: Links,
    ) -> None:
        self._settings, self._links = settings, links
        self._health = health.aio.HealthServicer()
        self._edge = self._inner = _make_server(settings)
        if links.is_secure:
            self._inner = _make_server(settings)
        for server in {self._edge, self._inner}:
            server.add_generic_rpc_handlers((service.handler(),))
        peering_pb2_grpc.add_RouterPeerServicer_to_server(peering, self._inner)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._edge)
        names = [inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name]
        if self._edge is self._inner:
            names.append(peering_pb2.DESCRIPTOR.services_by_name["RouterPeer"].full_name)
        names += [health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._edge)

    async def start(self) -> tuple[int, int]:
        """The ports for clients and for peers; they may be one.

        Raises:
            OSError: a port is taken.
        """
        settings = self._settings
        port = Links().listen(self._edge, join_target(settings.host, settings.grpc_port))
        peer_port = port
        if self._inner is not self._edge:
            target = join_target(settings.host, settings.peer_port)
            peer_port = self._links.listen(self._inner, target)
            await self._inner.start()
        await self._edge.start()
        await self.set_ready(False)
        return port, peer_port

    async def set_ready(self, is_ready: bool) -> None:
        """What grpc.health.v1 answers, for the server and for the service."""
        status = STATUS_SERVING if is_ready else STATUS_NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def stop(self, grace_ms: int) -> None:
        """Takes no new call; running ones may finish for `grace_ms`."""
        await self._health.enter_graceful_shutdown()
        servers = {self._edge, self._inner}
        await asyncio.gather(*(server.stop(grace_ms / 1_000) for server in servers))


def _make_server(settings: RouterSettings) -> grpc.aio.Server:
    return grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", settings.body_bytes_max),
            ("grpc.so_reuseport", 0),
        ),
        maximum_concurrent_rpcs=settings.requests_in_flight_max,
    )
