"""What the planner asks a router: counts since its start, and how long requests wait now.

Counters only grow, so that any number of readers take differences of their own; `epoch_ms` tells
them of a restart. Lengths are those of requests that were served to their end.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kvasir_proto.errors import KvasirError
from kvasir_proto.v1 import inference_pb2, worker_pb2

from kvasir_router.upstream.call import Call, Progress


@dataclass(slots=True, eq=False)
class _Waiting:
    call: Call
    progress: Progress


class Telemetry:
    """Counters of one router process."""

    def __init__(self, *, tpot_slo_ms: int) -> None:
        self._tpot_slo_ms = tpot_slo_ms
        self._counts = inference_pb2.RouterTelemetry(epoch_ms=time.time_ns() // 1_000_000)
        self._open: set[_Waiting] = set()  # bounded by the requests in flight

    @contextlib.contextmanager
    def watched(self, call: Call, progress: Progress) -> Iterator[None]:
        """While it lasts, the request is open; one that fails has missed its SLO."""
        self._counts.arrivals += 1
        entry = _Waiting(call, progress)
        self._open.add(entry)
        try:
            yield
        except KvasirError:
            self._counts.judged += 1
            self._counts.refused += not progress.has_output
            raise
        finally:
            self._open.discard(entry)

    def served(self, call: Call, progress: Progress, done: worker_pb2.GenerateChunk) -> None:
        """A request came to its end."""
        counts, stats, usage = self._counts, done.stats, done.usage
        counts.measured += 1
        counts.prompt_tokens += usage.prompt_tokens
        counts.uncached_tokens += stats.tokens_computed
        counts.uncached_tokens_squared += stats.tokens_computed**2
        counts.output_tokens += usage.completion_tokens
        counts.judged += 1
        is_first_in_time = (
            progress.first_token_ms is not None
            and progress.first_token_ms - call.arrived_ms <= call.ttft_slo_ms
        )
        tpot_slo_ms = call.tpot_slo_ms or self._tpot_slo_ms
        counts.attained += is_first_in_time and stats.tpot_ms <= tpot_slo_ms

    def message(self, *, now_ms: int) -> inference_pb2.RouterTelemetry:
        """The counters as they are, and the age of the oldest request without a first token."""
        waiting = [e.call.arrived_ms for e in self._open if not e.progress.has_output]
        told = inference_pb2.RouterTelemetry()
        told.CopyFrom(self._counts)
        told.requests_waiting = len(waiting)
        told.queue_age_ms = max(now_ms - min(waiting), 0) if waiting else 0
        return told
