"""Collects what the planner plans by: counters of routers and the measured speed of workers.

Looked at when a ModelService is reconciled, at most once per interval. What is kept here is lost
with the process, and nothing depends on it: a new operator sees a load after two looks and gives
up no worker before it has watched a whole keep window.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc.aio
from kvasir_proto.v1 import inference_pb2, inference_pb2_grpc

from kvasir_operator.channels import ChannelError, Channels, why
from kvasir_operator.core.manifests import Manifest, Ref
from kvasir_operator.core.planner.facts import Speed
from kvasir_operator.core.planner.history import History, Sample
from kvasir_operator.core.planner.profile import StepSample, decode_profile, typical
from kvasir_operator.core.planning import TelemetryView
from kvasir_operator.core.views import Door
from kvasir_operator.routers import router_doors

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 2.0
SERVICES_MAX = 4096
STEPS_MAX = 512  # samples of decode steps kept per pool
EARLY_S = 0.5  # a reconcile this little before the interval's end counts as its end
SUMS = (
    "arrivals",
    "measured",
    "prompt_tokens",
    "uncached_tokens",
    "uncached_tokens_squared",
    "output_tokens",
    "judged",
    "attained",
)


@dataclass(frozen=True, slots=True)
class Look:
    """What one router said at one time."""

    address: str
    counts: inference_pb2.RouterTelemetry
    fleet: inference_pb2.FleetView


@dataclass(slots=True)
class _Known:
    """What is known of one service."""

    history: History
    keep_ms: int
    looked_ms: int | None = None
    counts: dict[str, inference_pb2.RouterTelemetry] = field(default_factory=dict)
    steps: dict[str, deque[StepSample]] = field(default_factory=dict)  # by the pool's key
    members: dict[str, inference_pb2.FleetMember] = field(default_factory=dict)
    problem: str = ""


class Collector:
    """Telemetry by service."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._known: dict[Ref, _Known] = {}

    async def view(
        self,
        service: Ref,
        pods: Sequence[Manifest],
        *,
        pools: Mapping[str, str],
        interval_s: int,
        keep_s: int,
    ) -> TelemetryView:
        """What is known, after a new look at the routers if it is time for one.

        `pools` are the names of the service's worker pools by what plans call them.
        """
        known = self._known.get(service)
        if known is None or known.keep_ms != 1000 * keep_s:
            if len(self._known) >= SERVICES_MAX:
                self._known.clear()
            known = _Known(History(keep_ms=1000 * keep_s), keep_ms=1000 * keep_s)
            self._known[service] = known
        now_ms = time.monotonic_ns() // 1_000_000
        due_ms = 1000 * (interval_s - EARLY_S)
        if known.looked_ms is None or now_ms - known.looked_ms >= due_ms:
            await self._look(known, router_doors(pods), pools, now_ms=now_ms)
        return view_of(known, pools)

    async def _look(
        self, known: _Known, doors: Sequence[Door], pools: Mapping[str, str], *, now_ms: int
    ) -> None:
        looks = [look for look in await asyncio.gather(*map(self._ask, doors)) if look is not None]
        if not looks or len(looks) < len(doors):
            silent = len(doors) - len(looks)
            known.problem = f"{silent} of {len(doors)} routers do not answer"
            if not looks:
                known.problem = known.problem if doors else "no router is ready"
                return
        else:
            known.problem = ""
        note(known, looks, pools, now_ms=now_ms)

    async def _ask(self, door: Door) -> Look | None:
        try:
            async with self._channels.open(door) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                counts, fleet = await asyncio.gather(
                    stub.Telemetry(inference_pb2.TelemetryRequest(), timeout=ASK_TIMEOUT_S),
                    stub.Fleet(inference_pb2.FleetRequest(), timeout=ASK_TIMEOUT_S),
                )
        except (grpc.aio.AioRpcError, ChannelError) as error:
            logger.info("telemetry of %s: %s", door.address, why(error))
            return None
        return Look(door.address, counts, fleet)


def note(known: _Known, looks: Sequence[Look], pools: Mapping[str, str], *, now_ms: int) -> None:
    """Take note of the routers' answers; the first look at a router only gives its base."""
    members = {m.description.address.name: m for look in looks for m in look.fleet.members}
    known.members = members
    known.steps = {key: s for key, s in known.steps.items() if key in pools}
    for key, own in _by_pool(members, pools).items():
        known.steps.setdefault(key, deque(maxlen=STEPS_MAX)).extend(_steps(own))
    sums = dict.fromkeys(SUMS, 0.0)
    for look in looks:
        for name, grown in _growth(known.counts.get(look.address), look.counts).items():
            sums[name] += grown
    known.counts = {look.address: look.counts for look in looks}
    if known.looked_ms is not None and now_ms > known.looked_ms:
        sample = Sample(
            start_ms=known.looked_ms,
            end_ms=now_ms,
            arrivals=int(sums["arrivals"]),
            measured=int(sums["measured"]),
            prompt_tokens=sums["prompt_tokens"],
            uncached_tokens=sums["uncached_tokens"],
            uncached_tokens_squared=sums["uncached_tokens_squared"],
            output_tokens=sums["output_tokens"],
            judged=int(sums["judged"]),
            attained=int(sums["attained"]),
            queued_tokens=sum(m.description.load.prefill_tokens_queued for m in members.values()),
            queue_age_ms=max(look.counts.queue_age_ms for look in looks),
        )
        known.history.add(sample)
    known.looked_ms = now_ms


def _growth(
    before: inference_pb2.RouterTelemetry | None, now: inference_pb2.RouterTelemetry
) -> Mapping[str, float]:
    """What was added since the last look; a router that has restarted counts from zero."""
    if before is None:
        return {}
    is_same = before.epoch_ms == now.epoch_ms
    return {name: getattr(now, name) - (getattr(before, name) if is_same else 0) for name in SUMS}


def _steps(members: Iterable[inference_pb2.FleetMember]) -> list[StepSample]:
    loads = (member.description.load for member in members)
    return [
        StepSample(load.num_running, load.decode_ms_per_step)
        for load in loads
        if load.num_running and load.decode_ms_per_step > 0
    ]


def view_of(known: _Known, pools: Mapping[str, str]) -> TelemetryView:
    """What is known, as the planner's adapter takes it."""
    if known.history.is_empty:
        return TelemetryView(problem=known.problem or "the load has been looked at only once")
    return TelemetryView(
        now=known.history.now(),
        kept=known.history.kept(),
        observed=known.history.observed(),
        speeds=_speeds(known, pools),
        problem=known.problem,
    )


def _speeds(known: _Known, pools: Mapping[str, str]) -> Mapping[str, Speed]:
    """Per pool; what its own workers have not measured is taken from all of the service."""
    all_steps = decode_profile([step for steps in known.steps.values() for step in steps])
    everyone = _prefill_us(known.members.values())
    speeds = {}
    for key, own in _by_pool(known.members, pools).items():
        prefill_us = _prefill_us(own) or everyone
        base_and_slope = decode_profile(list(known.steps.get(key, ()))) or all_steps
        kv_tokens = typical([_kv_tokens(member) for member in own])
        if prefill_us and base_and_slope and kv_tokens:
            speeds[key] = Speed(prefill_us, *base_and_slope, kv_tokens=int(kv_tokens))
    return speeds


def _by_pool(
    members: Mapping[str, inference_pb2.FleetMember], pools: Mapping[str, str]
) -> Mapping[str, list[inference_pb2.FleetMember]]:
    """Members by the key of their pool: a worker's name begins with the pool's."""
    found: dict[str, list[inference_pb2.FleetMember]] = {key: [] for key in pools}
    longest_first = sorted(pools.items(), key=lambda item: -len(item[1]))
    for worker, member in members.items():
        key = next((k for k, name in longest_first if worker.startswith(f"{name}-")), None)
        if key is not None:
            found[key].append(member)
    return found


def _prefill_us(members: Iterable[inference_pb2.FleetMember]) -> float:
    return typical([m.description.load.prefill_us_per_token for m in members])


def _kv_tokens(member: inference_pb2.FleetMember) -> int:
    described = member.description
    return int(described.load.blocks_total * described.layout.block_tokens)
