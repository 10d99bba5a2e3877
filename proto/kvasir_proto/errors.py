"""The reasons for which a request can fail, and their statuses: one table for every protocol.

    KvasirError
      carries `reason` (Reason), `message`, `param`, `retry_after_ms`

A reason is the same string in logs, metrics, gRPC details, OpenAI error bodies and frames.
"""

import enum
from dataclasses import dataclass


class Reason(enum.StrEnum):
    """Why a request was not served."""

    INVALID_REQUEST = "invalid_request"  # a field is malformed or out of range
    UNSUPPORTED = "unsupported"  # a known parameter that Kvasir does not serve
    UNAUTHENTICATED = "unauthenticated"
    UNKNOWN_MODEL = "model_not_found"
    CONTEXT_LENGTH = "context_length_exceeded"
    TOO_LARGE = "request_too_large"
    BUSY = "busy"  # this worker cannot serve it in time; another may
    OVERLOADED = "overloaded"  # no candidate can: the client should come back later
    DRAINING = "draining"
    NO_WORKER = "no_worker"  # nobody of a needed role is ready
    STALE_PEER = "stale_peer"  # the address belongs to an earlier life of the peer
    KV_TRANSFER = "kv_transfer_failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


PEER_PARAM = "prefill_peer"
"""`param` of a worker's error when not it but its prefill peer refused or failed: the router then
re-forwards to the other prefill candidate and may keep the decode worker."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a reason shows in each protocol."""

    http: int
    grpc: str  # name of a grpc.StatusCode
    openai_type: str


STATUS: dict[Reason, Status] = {
    Reason.INVALID_REQUEST: Status(400, "INVALID_ARGUMENT", "invalid_request_error"),
    Reason.UNSUPPORTED: Status(400, "UNIMPLEMENTED", "invalid_request_error"),
    Reason.UNAUTHENTICATED: Status(401, "UNAUTHENTICATED", "authentication_error"),
    Reason.UNKNOWN_MODEL: Status(404, "NOT_FOUND", "invalid_request_error"),
    Reason.CONTEXT_LENGTH: Status(400, "INVALID_ARGUMENT", "invalid_request_error"),
    Reason.TOO_LARGE: Status(413, "RESOURCE_EXHAUSTED", "invalid_request_error"),
    Reason.BUSY: Status(429, "RESOURCE_EXHAUSTED", "rate_limit_error"),
    Reason.OVERLOADED: Status(429, "RESOURCE_EXHAUSTED", "rate_limit_error"),
    Reason.DRAINING: Status(503, "UNAVAILABLE", "server_error"),
    Reason.NO_WORKER: Status(503, "UNAVAILABLE", "server_error"),
    Reason.STALE_PEER: Status(503, "UNAVAILABLE", "server_error"),
    Reason.KV_TRANSFER: Status(503, "UNAVAILABLE", "server_error"),
    Reason.TIMEOUT: Status(504, "DEADLINE_EXCEEDED", "server_error"),
    Reason.CANCELLED: Status(499, "CANCELLED", "server_error"),
    Reason.INTERNAL: Status(500, "INTERNAL", "server_error"),
}


class KvasirError(Exception):
    """A request cannot be served. `retry_after_ms` of 0 means: not as it is."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        param: str | None = None,
        retry_after_ms: int = 0,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.param = param
        self.retry_after_ms = retry_after_ms

    @property
    def status(self) -> Status:
        """How this error shows in each protocol."""
        return STATUS[self.reason]
