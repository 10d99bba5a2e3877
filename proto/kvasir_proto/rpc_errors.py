"""KvasirError on the wire: as a kvasir.v1.Error message, and as the end of a gRPC call.

A gRPC call that fails carries the whole error in one binary trailer beside its status, so that
the caller gets the same reason, field and retry hint that an HTTP caller gets. A call that fails
without the trailer failed below Kvasir (nobody listens, the deadline passed, the process died).
"""

from typing import Any, NoReturn

import grpc
import grpc.aio

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2

ERROR_TRAILER = "kvasir-error-bin"

_REASON_OF_STATUS: dict[grpc.StatusCode, Reason] = {
    grpc.StatusCode.UNAVAILABLE: Reason.NO_WORKER,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.TIMEOUT,
    grpc.StatusCode.CANCELLED: Reason.CANCELLED,
    grpc.StatusCode.UNIMPLEMENTED: Reason.UNSUPPORTED,
}


def error_to_message(error: KvasirError) -> common_pb2.Error:
    """The error as a message."""
    return common_pb2.Error(
        reason=error.reason.value,
        message=error.message,
        param=error.param or "",
        retry_after_ms=error.retry_after_ms,
    )


def error_from_message(message: common_pb2.Error) -> KvasirError:
    """The error that a message describes; a reason that is not known here becomes INTERNAL."""
    known = message.reason in Reason._value2member_map_
    return KvasirError(
        Reason(message.reason) if known else Reason.INTERNAL,
        message.message,
        param=message.param or None,
        retry_after_ms=message.retry_after_ms,
    )


def error_from_rpc(error: grpc.aio.AioRpcError) -> KvasirError:
    """Why a gRPC call failed: the callee's own error if it sent one, else what the status says."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_TRAILER and isinstance(value, bytes):
            return error_from_message(common_pb2.Error.FromString(value))
    reason = _REASON_OF_STATUS.get(error.code(), Reason.INTERNAL)
    return KvasirError(reason, error.details() or error.code().name.lower())


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: KvasirError) -> NoReturn:
    """Ends a call of a grpc.aio server with this error."""
    trailer = (ERROR_TRAILER, error_to_message(error).SerializeToString())
    await context.abort(grpc.StatusCode[error.status.grpc], error.message, (trailer,))
    raise AssertionError("abort raises")
