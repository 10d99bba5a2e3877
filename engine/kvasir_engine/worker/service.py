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

from kvasir_engine.worker.crossing import CHECK_PEERS_MAX, Crossing
from kvasir_engine.worker.drain import Drain
from kvasir_engine.worker.generate import Delta, Generator
from kvasir_engine.worker.host import PROTO_ROLE, Host
from kvasir_engine.worker.prefill import Prefiller

_ROLE_OF_PROTO = {proto: role for role, proto in PROTO_ROLE.items()}
NAMES_MAX = 65_536
HAND_BACKS_MAX = 1_024

Context = grpc.aio.ServicerContext[Any, Any]


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """kvasir.v1.Worker."""

    def __init__(
        self,
        host: Host,
        generator: Generator,
        prefiller: Prefiller,
        drain: Drain,
        crossing: Crossing,
    ) -> None:
        self._host = host
        self._crossing = crossing
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
        self, commands: AsyncIterator[worker_pb2.PrefillCommand], context: Context
    ) -> None:
        """Accepted, turn, finished; ends when the KV is pulled or given up."""

        async def start() -> worker_pb2.PrefillStart:
            return (await _next_command(context, "start")).start

        async with _statuses(context):
            request = (await _next_command(context, "request")).request
            async with self._prefiller.opened(request, start) as updates:
                async for update in updates:
                    await context.write(update)

    async def HandBack(
        self, request: worker_pb2.HandBackRequest, context: Context
    ) -> worker_pb2.HandBackResponse:
        """Ends these requests as busy if they still wait for their turn."""
        async with _statuses(context):
            if len(request.request_ids) > HAND_BACKS_MAX:
                message = f"request_ids may hold {HAND_BACKS_MAX}"
                raise KvasirError(Reason.INVALID_REQUEST, message, param="request_ids")
        num_handed_back = self._host.admission.hand_back(request.request_ids)
        return worker_pb2.HandBackResponse(num_handed_back=num_handed_back)

    async def LendCanary(  # type: ignore[override]
        self, request: worker_pb2.LendCanaryRequest, context: Context
    ) -> None:
        """A block that can be pulled under this session; ends when it was."""
        lending = self._crossing.lend(request.session_id)
        async with _statuses(context), aclosing(lending) as updates:
            async for update in updates:
                await context.write(update)

    async def CheckTransfer(
        self, request: worker_pb2.CheckTransferRequest, context: Context
    ) -> worker_pb2.CheckTransferResponse:
        """Whether KV of one of these peers arrives here."""
        async with _statuses(context):
            if not 0 < len(request.peers) <= CHECK_PEERS_MAX:
                message = f"peers must hold 1 to {CHECK_PEERS_MAX}"
                raise KvasirError(Reason.INVALID_REQUEST, message, param="peers")
            checks = await self._crossing.check(request.peers)
        return worker_pb2.CheckTransferResponse(checks=checks)

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
        """A snapshot or what was missed, then changes; ends if the watcher falls behind."""
        watch = self._host.hub.watch(load_interval_ms=request.load_interval_ms, after=request.after)
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


async def _next_command(context: Context, kind: str) -> worker_pb2.PrefillCommand:
    """The next command of a Prefill call, which must be of this kind.

    Raises:
        KvasirError: CANCELLED: the decode worker has left; INVALID_REQUEST.
    """
    command = await context.read()
    if not isinstance(command, worker_pb2.PrefillCommand):
        raise KvasirError(Reason.CANCELLED, f"the call ended before `{kind}`")
    if command.WhichOneof("command") != kind:
        raise KvasirError(Reason.INVALID_REQUEST, f"`{kind}` is expected now", param="command")
    return command


@asynccontextmanager
async def _statuses(context: Context) -> AsyncIterator[None]:
    """Ends the call with the status of the KvasirError raised inside."""
    try:
        yield
    except KvasirError as error:
        await rpc_errors.abort(context, error)
