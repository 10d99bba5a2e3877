"""kvasir.v1.Inference. Generate forwards the workers' serialised chunks as they are."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.rpc_errors import abort
from kvasir_proto.v1 import inference_pb2

from kvasir_router.core.canary import Standing
from kvasir_router.core.choose import Rejected, Route
from kvasir_router.intake import Caller, Intake
from kvasir_router.membership.canary import STATES, CanaryRun
from kvasir_router.membership.fleet import Fleet, now_ms
from kvasir_router.membership.member import Member
from kvasir_router.metrics import RouterMetrics
from kvasir_router.rpc.intake import call_of
from kvasir_router.tenants import Tenants
from kvasir_router.upstream.call import Progress
from kvasir_router.upstream.dispatch import Dispatcher, error_of

SERVICE = "kvasir.v1.Inference"
log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")
NO_CANARY = (Standing.NOT_NEEDED, "")


class RpcSink:
    """Chunks to a gRPC client, as bytes; a slow client makes `send` wait."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def begin(self, route: Route) -> None:
        """Names the workers in the initial metadata."""
        await self._context.send_initial_metadata(
            (
                ("x-kvasir-prefill-worker", route.computes),
                ("x-kvasir-decode-worker", route.decode),
            )
        )

    async def send(self, payloads: Sequence[bytes]) -> None:
        """Forwards serialised GenerateChunks, one message each."""
        for payload in payloads:
            await self._context.write(payload)


class InferenceService:
    """The three calls."""

    def __init__(
        self,
        *,
        intake: Intake,
        dispatcher: Dispatcher,
        fleet: Fleet,
        canaries: CanaryRun,
        tenants: Tenants,
        metrics: RouterMetrics,
    ) -> None:
        self._intake, self._dispatcher, self._fleet = intake, dispatcher, fleet
        self._canaries, self._tenants, self._metrics = canaries, tenants, metrics

    def handler(self) -> grpc.GenericRpcHandler:
        """What to add to a server. Responses of Generate are bytes already: no serialiser."""
        request_of = inference_pb2.InferenceRequest.FromString
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(
                    self.generate, request_deserializer=request_of
                ),
                "Route": grpc.unary_unary_rpc_method_handler(
                    self.route,
                    request_deserializer=request_of,
                    response_serializer=inference_pb2.RouteDecision.SerializeToString,
                ),
                "Fleet": grpc.unary_unary_rpc_method_handler(
                    self.fleet,
                    request_deserializer=inference_pb2.FleetRequest.FromString,
                    response_serializer=inference_pb2.FleetView.SerializeToString,
                ),
                "Telemetry": grpc.unary_unary_rpc_method_handler(
                    self.telemetry,
                    request_deserializer=inference_pb2.TelemetryRequest.FromString,
                    response_serializer=inference_pb2.RouterTelemetry.SerializeToString,
                ),
            },
        )

    async def generate(self, request: inference_pb2.InferenceRequest, context: Context) -> None:
        """Streams chunks; the last one holds finish reason, usage and stats."""

        async def serve() -> None:
            call = await call_of(request, self._intake, self._caller(context))
            done = await self._dispatcher.run(call, RpcSink(context), Progress())
            await context.write(done.SerializeToString())

        await self._guarded(context, serve)

    async def route(
        self, request: inference_pb2.InferenceRequest, context: Context
    ) -> inference_pb2.RouteDecision:
        """The decision alone."""

        async def decide() -> inference_pb2.RouteDecision:
            call = await call_of(request, self._intake, self._caller(context))
            decision = self._dispatcher.pick(self._dispatcher.describe(call))
            if isinstance(decision, Rejected):
                raise error_of(decision)
            return _decision(decision, num_prompt=len(call.token_ids))

        return await self._guarded(context, decide)

    async def fleet(
        self, request: inference_pb2.FleetRequest, context: Context
    ) -> inference_pb2.FleetView:
        """Every member, those that get no requests too."""
        standings = self._canaries.standings()
        return inference_pb2.FleetView(
            members=[
                self._member(member, problem, *standings.get(member.name, NO_CANARY))
                for member, problem in self._fleet.members()
            ],
            ring_version=self._fleet.view().rings.version,
        )

    def _member(
        self, member: Member, problem: str, standing: Standing, canary_error: str
    ) -> inference_pb2.FleetMember:
        view = self._fleet.view()
        return inference_pb2.FleetMember(
            description=member.description,
            reachable=member.reachable,
            blocks_known=view.prefix.num_blocks.get(member.name, 0),
            requests_in_flight=view.ledger.in_flight(member.name),
            problem=problem,
            ttft_factor=view.calibration.factor(member.name),
            ttft_error=view.calibration.error(member.name),
            canary=STATES[standing],
            canary_error=canary_error,
        )

    async def telemetry(
        self, request: inference_pb2.TelemetryRequest, context: Context
    ) -> inference_pb2.RouterTelemetry:
        """What the planner plans by."""
        return self._dispatcher.telemetry.message(now_ms=now_ms())

    def _caller(self, context: Context) -> Caller:
        metadata = dict(context.invocation_metadata() or ())
        authorization = metadata.get("authorization")
        tenant = self._tenants.authenticate(
            authorization if isinstance(authorization, str) else None
        )
        return Caller(secrets.token_hex(16), tenant, now_ms())

    async def _guarded(self, context: Context, serve: Callable[[], Awaitable[T]]) -> T:
        try:
            result = await serve()
        except KvasirError as error:
            self._metrics.answered("grpc", status=error.status.http, reason=error.reason)
            await abort(context, error)
        except asyncio.CancelledError:
            self._metrics.answered("grpc", status=499, reason=Reason.CANCELLED)
            raise
        except Exception:
            log.exception("a gRPC request failed")
            self._metrics.answered("grpc", status=500, reason=Reason.INTERNAL)
            await abort(context, KvasirError(Reason.INTERNAL, "the router failed"))
        self._metrics.answered("grpc", status=200, reason="ok")
        return result


def _decision(route: Route, *, num_prompt: int) -> inference_pb2.RouteDecision:
    return inference_pb2.RouteDecision(
        prefill_worker=route.prefill or "",
        decode_worker=route.decode,
        reason=route.reason.value,
        candidates=[
            inference_pb2.Candidate(
                worker=c.worker, hit_tokens=c.hit_tokens, ttft_estimate_ms=c.ttft_estimate_ms
            )
            for c in route.candidates
        ],
        prompt_tokens=num_prompt,
    )
