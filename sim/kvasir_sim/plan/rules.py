"""Rules that decide how many workers there are. Each sees what its namesake would see.

static      numbers that never change
hpa         Kubernetes' HorizontalPodAutoscaler on the queue of each pool
dynamo      the SLA planner of NVIDIA Dynamo: throughput tables, next interval like the last
kvasir      the operator's planner
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvasir_operator.core.planner.decide import plan
from kvasir_operator.core.planner.facts import (
    Inputs,
    Memory,
    Pace,
    PoolFacts,
    PoolTarget,
    Role,
)
from kvasir_operator.core.planner.history import History, Sample

from kvasir_sim.plan.settings import PlanSimSettings

WORKERS_MAX = 200


@dataclass(frozen=True, slots=True)
class Seen:
    """What a rule sees at the end of an interval."""

    sample: Sample
    num_queued: int  # prompts that wait or are computed
    num_decoding: int
    replicas: dict[Role, int]  # ordered workers of each pool
    ready: dict[Role, int]  # workers that serve in each role
    lent: dict[Role, int]
    ttft_ms: float  # mean of the interval; 0: none
    tpot_ms: float


class Rule(Protocol):
    """Decides every `interval_s` seconds; None: no change."""

    interval_s: int

    def initial(self) -> Sequence[PoolTarget]:
        """The fleet at the begin of the trace."""

    def decide(self, seen: Seen) -> Sequence[PoolTarget] | None:
        """The fleet from now on."""


def _targets(prefill: int, decode: int) -> tuple[PoolTarget, PoolTarget]:
    return PoolTarget("prefill", prefill, 0), PoolTarget("decode", decode, 0)


@dataclass(slots=True)
class Static:
    """The same split all day."""

    prefill: int
    decode: int
    interval_s: int = 3_600

    def initial(self) -> Sequence[PoolTarget]:
        """The split."""
        return _targets(self.prefill, self.decode)

    def decide(self, seen: Seen) -> Sequence[PoolTarget] | None:
        """Nothing changes."""
        return None


@dataclass(slots=True)
class QueueHpa:
    """The HorizontalPodAutoscaler with its default behaviour, one per pool.

    desired = ceil(ready * metric / target), tolerance 10 %; the highest of the last 300 s counts
    on the way down; on the way up at most the larger of a doubling and four pods per 15 s.
    """

    prefill_target: float  # prompts waiting or computed, per worker
    decode_target: float  # requests decoded, per worker
    interval_s: int = 15
    wanted: dict[Role, deque[int]] = field(default_factory=dict)

    def initial(self) -> Sequence[PoolTarget]:
        """A small fleet; it grows within minutes."""
        return _targets(2, 2)

    def decide(self, seen: Seen) -> Sequence[PoolTarget]:
        """Each pool for itself."""
        return _targets(
            self._one(Role.PREFILL, seen, seen.num_queued / self.prefill_target),
            self._one(Role.DECODE, seen, seen.num_decoding / self.decode_target),
        )

    def _one(self, role: Role, seen: Seen, needed: float) -> int:
        ready, current = max(seen.ready[role], 1), seen.replicas[role]
        desired = current if abs(needed / ready - 1) <= 0.1 else math.ceil(needed)
        desired = min(desired, max(2 * current, current + 4), WORKERS_MAX)
        window = self.wanted.setdefault(role, deque(maxlen=300 // self.interval_s))
        window.append(max(desired, 1))
        return max(window) if desired < current else window[-1]


@dataclass(slots=True)
class Dynamo:
    """The SLA planner of NVIDIA Dynamo (docs/planner/sla_planner): the next interval like the last.

    prefill = ceil(requests * ISL / interval * min(1, TTFT correction) / throughput);
    decode = ceil(requests * OSL / interval / throughput at the corrected ITL).
    """

    settings: PlanSimSettings
    interval_s: int = 180

    def initial(self) -> Sequence[PoolTarget]:
        """A small fleet; it is corrected after one interval."""
        return _targets(2, 2)

    def decide(self, seen: Seen) -> Sequence[PoolTarget] | None:
        """From the last interval's requests and lengths."""
        sample, settings = seen.sample, self.settings
        if not sample.measured or not sample.arrivals:
            return None
        seconds = sample.span_ms / 1000
        isl = sample.prompt_tokens / sample.measured
        osl = sample.output_tokens / sample.measured
        expected_ttft_ms = isl * settings.prefill_us_per_token / 1000
        correction = min(1.0, seen.ttft_ms / expected_ttft_ms) if seen.ttft_ms else 1.0
        tokens_per_s = 1e6 / settings.prefill_us_per_token
        prefill = sample.arrivals * isl / seconds * correction / tokens_per_s
        decode = sample.arrivals * osl / seconds / self._decode_rate(seen, isl + osl / 2)
        return _targets(
            min(max(math.ceil(prefill), 1), WORKERS_MAX),
            min(max(math.ceil(decode), 1), WORKERS_MAX),
        )

    def _decode_rate(self, seen: Seen, context: float) -> float:
        """Tokens per second of one worker at the largest batch within the corrected ITL."""
        settings = self.settings
        batch = seen.num_decoding / max(seen.ready[Role.DECODE], 1)
        expected_ms = settings.decode_base_ms + settings.decode_ms_per_request * max(batch, 1)
        correction = seen.tpot_ms / expected_ms if seen.tpot_ms else 1.0
        itl_ms = settings.slo_tpot_ms / max(correction, 0.1)
        spare_ms = max(itl_ms - settings.decode_base_ms, 0.0)
        most = spare_ms / max(settings.decode_ms_per_request, 1e-9)
        most = max(min(most, settings.kv_tokens / context), 1.0)
        return 1000 * most / (settings.decode_base_ms + settings.decode_ms_per_request * most)


@dataclass(slots=True)
class Kvasir:
    """The operator's planner, fed with the samples that its collector would take."""

    settings: PlanSimSettings
    pace: Pace = field(default_factory=Pace)
    keep_s: int = 900
    interval_s: int = 15
    memory: Memory = field(default_factory=Memory)
    history: History = field(init=False)

    def __post_init__(self) -> None:
        self.history = History(keep_ms=1000 * self.keep_s)

    def initial(self) -> Sequence[PoolTarget]:
        """A small fleet; it grows with the first samples."""
        return _targets(2, 2)

    def decide(self, seen: Seen) -> Sequence[PoolTarget]:
        """The plan's targets, as a whole."""
        self.history.add(seen.sample)
        pools = tuple(
            PoolFacts(
                name=role.value,
                role=role,
                speed=self.settings.speed,
                replicas=seen.replicas[role],
                lent=seen.lent[role],
                replicas_max=WORKERS_MAX,
            )
            for role in Role
        )
        inputs = Inputs(
            pools=pools,
            now=self.history.now(),
            kept=self.history.kept(),
            slo=self.settings.slo,
            pace=self.pace,
            memory=self.memory,
            observed=self.history.observed(),
        )
        made = plan(inputs, now_ms=seen.sample.end_ms)
        self.memory = made.memory
        return made.targets


def hpa_for(settings: PlanSimSettings, *, fill: float, context_tokens: float) -> QueueHpa:
    """An HPA whose pools are to be filled to this share of what the SLO allows."""
    speed = settings.speed
    spare_ms = settings.slo_tpot_ms - speed.decode_base_ms
    by_time = spare_ms / max(speed.decode_ms_per_request, 1e-9)
    batch = min(by_time, speed.kv_tokens / context_tokens)
    return QueueHpa(prefill_target=fill, decode_target=max(fill * batch, 1.0))
