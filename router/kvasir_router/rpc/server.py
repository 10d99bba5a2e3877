"""The gRPC server around the service: limits, health, reflection."""

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from kvasir_proto.v1 import inference_pb2, peering_pb2, peering_pb2_grpc

from kvasir_router.peering.service import RouterPeerService
from kvasir_router.rpc.service import SERVICE, InferenceService
from kvasir_router.settings import RouterSettings

STATUS_SERVING = health_pb2.HealthCheckResponse.SERVING
STATUS_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class RpcServer:
    """Serves kvasir.v1.Inference and, to the other replicas, kvasir.v1.RouterPeer."""

    def __init__(
        self, settings: RouterSettings, service: InferenceService, peering: RouterPeerService
    ) -> None:
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", settings.body_bytes_max),
                ("grpc.so_reuseport", 0),
            ),
            maximum_concurrent_rpcs=settings.requests_in_flight_max,
        )
        self._server.add_generic_rpc_handlers((service.handler(),))
        peering_pb2_grpc.add_RouterPeerServicer_to_server(peering, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (
            inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
            peering_pb2.DESCRIPTOR.services_by_name["RouterPeer"].full_name,
            health.SERVICE_NAME,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._server)
        self._address = f"{settings.host}:{settings.grpc_port}"

    async def start(self) -> int:
        """The port it listens on.

        Raises:
            OSError: the port is taken.
        """
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}: {error}") from error
        await self._server.start()
        await self.set_ready(False)
        return port

    async def set_ready(self, is_ready: bool) -> None:
        """What grpc.health.v1 answers, for the server and for the service."""
        status = STATUS_SERVING if is_ready else STATUS_NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def stop(self, grace_ms: int) -> None:
        """Takes no new call; running ones may finish for `grace_ms`."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_ms / 1_000)
