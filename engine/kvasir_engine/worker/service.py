"""The worker's gRPC service: messages in and out; what they mean is decided elsewhere.

Streams are written by `context.write`, not yielded: then a call that is cancelled cancels this
code where it stands, in its own task, and what it held is freed at once.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc.aio
from kvasir_proto import rpc_errors
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import worker_pb2, worker_pb2_grpc

from kvasir_engine.worker.drain import Drain
from kvasir_engine.worker.generate import Delta, Generator
from kvasir_engine.worker.host import PROTO_ROLE, Host
from kvasir_engine.worker.prefill import Prefiller

_ROLE_OF_PROTO = {proto: role for role, proto in PROTO_ROLE.items()}
NAMES_MAX = 65_536

Context = grpc.aio.ServicerContext[Any, Any]


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """kvasir.v1.Worker."""

    def __init__(
        self, host: Host, generator: Generator, prefiller: Prefiller, drain: Drain
    ) -> None:
        self._host = host
        self._generator = generator
        self._prefiller = prefiller
        self._drain = drain

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: Context
    ) -> worker_pb2.WorkerDescription:
        """What this worker is, also while it loads."""
        return self._host.describe()

    async def Generate(  # type: ignore[override]
        self, request: worker_pb2.GenerateRequest, context: Context
    ) -> None:
        """The same stream as POST /internal/generate, as messages."""
        async with _statuses(context), self._generator.opened(request) as outputs:
            async for output in outputs:
                if isinstance(output, Delta):
                    chunk = worker_pb2.GenerateChunk(text=output.text, token_ids=output.token_ids)
                else:
                    chunk = output.chunk()
                await context.write(chunk)

    async def Prefill(  # type: ignore[override]
        self, request: worker_pb2.PrefillRequest, context: Context
    ) -> None:
        """Accepted, finished; ends when the KV is pulled or given up."""
        async with _statuses(context), self._prefiller.opened(request) as updates:
            async for update in updates:
                await context.write(update)

    async def HasBlocks(
        self, request: worker_pb2.HasBlocksRequest, context: Context
    ) -> worker_pb2.HasBlocksResponse:
        """Which names are held whole."""
        async with _statuses(context):
            if len(request.names) > NAMES_MAX:
                message = f"names may hold {NAMES_MAX}"
                raise KvasirError(Reason.INVALID_REQUEST, message, param="names")
        serving = self._host.serving
        held = serving.engine.holds(request.names) if serving else [False] * len(request.names)
        return worker_pb2.HasBlocksResponse(held=held, address=self._host.address)

    async def WatchEvents(  # type: ignore[override]
        self, request: worker_pb2.WatchEventsRequest, context: Context
    ) -> None:
        """A snapshot, then changes; ends with OVERLOADED if the watcher falls behind."""
        watch = self._host.hub.watch(load_interval_ms=request.load_interval_ms)
        async with _statuses(context), aclosing(watch) as events:
            async for event in events:
                await context.write(event)

    async def SetRole(
        self, request: worker_pb2.SetRoleRequest, context: Context
    ) -> worker_pb2.WorkerDescription:
        """Serves another role from now on; what runs goes on, the cache stays."""
        async with _statuses(context):
            role = _ROLE_OF_PROTO.get(request.role)
            if role is None:
                raise KvasirError(Reason.INVALID_REQUEST, "role is not known", param="role")
            self._host.set_role(role)
        return self._host.describe()

    async def Drain(  # type: ignore[override]
        self, request: worker_pb2.DrainRequest, context: Context
    ) -> None:
        """Takes no new request; ends when the last one has ended and hot blocks are offered."""
        async with aclosing(self._drain.run(timeout_ms=request.timeout_ms)) as steps:
            async for progress in steps:
                await context.write(progress)


@asynccontextmanager
async def _statuses(context: Context) -> AsyncIterator[None]:
    """Ends the call with the status of the KvasirError raised inside."""
    try:
        yield
    except KvasirError as error:
        await rpc_errors.abort(context, error)
