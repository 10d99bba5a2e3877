"""One request on its way: what the client asked, and how far its output has come."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvasir_proto.frames import Frame
from kvasir_proto.v1 import common_pb2, worker_pb2

from kvasir_router.core.choose import Route
from kvasir_router.core.rebalance import MOVES_MAX

CONTINUED_PRIORITY = 100
"""Above whatever clients and sessions reach."""


@dataclass(frozen=True, slots=True)
class Call:
    """A checked request, tokenised."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: common_pb2.SamplingParams
    tenant_salt: bytes
    tenant_weight: float
    priority: int
    """The client's, and what its session adds."""
    format: "worker_pb2.StreamFormat.ValueType"
    stream_id: str
    created_s: int
    model: str
    ttft_slo_ms: int
    tpot_slo_ms: int
    """0: none is asked for."""
    arrived_ms: int
    deadline_ms: int
    """Monotonic, like `arrived_ms`."""
    chunks: common_pb2.Chunks | None = None
    """Parts of the prompt whose KV may be reused."""


@dataclass(slots=True)
class Progress:
    """What has happened to a call so far; the edge reads it for headers and usage."""

    route: Route | None = None
    """The route that brought the first token."""

    num_attempts: int = 0
    num_refused: int = 0
    """Times that a worker handed it back."""

    num_continued: int = 0
    token_bytes: list[bytes] = field(default_factory=list)
    text_chars: int = 0
    first_token_ms: int | None = None

    sent_ms: int = 0
    """When the attempt that brought the first token began."""

    @property
    def has_output(self) -> bool:
        """Whether the client has, or is about to have, part of the output."""
        return self.first_token_ms is not None

    def add(self, frame: Frame, *, now_ms: int) -> None:
        """Takes note of a TOKENS frame."""
        if self.first_token_ms is None:
            self.first_token_ms = now_ms
        if frame.token_bytes:
            self.token_bytes.append(frame.token_bytes)
        self.text_chars = frame.text_chars

    def token_ids(self) -> tuple[int, ...]:
        """All output tokens so far."""
        joined = b"".join(self.token_bytes)
        return tuple(memoryview(joined).cast("I"))


class Sink(Protocol):
    """Where a call's output goes."""

    async def begin(self, route: Route) -> None:
        """Output is about to come; called once."""

    async def send(self, payloads: Sequence[bytes]) -> None:
        """The next payloads for the client, as the worker made them."""


def generate_request(
    call: Call,
    progress: Progress,
    peer: common_pb2.PeerAddress | None,
    *,
    now_ms: int,
) -> bytes:
    """What the decode worker is sent, serialised."""
    return worker_pb2.GenerateRequest(
        request_id=call.request_id,
        token_ids=call.token_ids,
        resume_token_ids=progress.token_ids(),
        resume_text_chars=progress.text_chars,
        sampling=call.sampling,
        tenant_salt=call.tenant_salt,
        prefill_peer=peer,
        timeout_ms=max(call.deadline_ms - now_ms, 1),
        terms=queue_terms(call, progress, now_ms=now_ms),
        format=call.format,
        stream_id=call.stream_id,
        created_s=call.created_s,
        model=call.model,
        chunks=call.chunks,
    ).SerializeToString()


def queue_terms(call: Call, progress: Progress, *, now_ms: int) -> common_pb2.QueueTerms:
    """How the call stands in a worker's queue: a client that has half an answer comes first."""
    weight = call.tenant_weight
    if progress.has_output:
        return common_pb2.QueueTerms(priority=CONTINUED_PRIORITY, tenant_weight=weight)
    left_ms = call.arrived_ms + call.ttft_slo_ms - now_ms
    return common_pb2.QueueTerms(
        ttft_left_ms=max(left_ms, 1),
        priority=call.priority,
        tenant_weight=weight,
        may_move=progress.num_refused < MOVES_MAX,
    )
