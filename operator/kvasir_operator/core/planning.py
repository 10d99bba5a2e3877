"""The planner in the cluster: from a ModelService and its telemetry to inputs, and from a plan to
`status.plan`, the condition PlanApplied and, in mode Apply, the pools' numbers.

Invariant: a plan is made once per reconcile; what it says stays in the status until it says
something else, or its figures have changed and a minute has passed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kvasir_operator.api import ModelServiceSpec, WorkerPoolSpec, WorkerPoolTemplate
from kvasir_operator.api_planner import (
    PlanInputs,
    PlanLoad,
    PlannerSettings,
    PlanPool,
    PlanPrediction,
    PlanRejection,
    PlanStatus,
    PlanTerm,
)
from kvasir_operator.core.conditions import ConditionType, Finding, Reason
from kvasir_operator.core.drift import quantity
from kvasir_operator.core.manifests import Manifest
from kvasir_operator.core.ownership import autoscaler_owner
from kvasir_operator.core.planner.decide import plan
from kvasir_operator.core.planner.facts import (
    Demand,
    FleetPlan,
    Inputs,
    Limits,
    Load,
    Memory,
    Observed,
    Pace,
    PoolFacts,
    PoolTarget,
    Prediction,
    Role,
    Slo,
    Speed,
)
from kvasir_operator.core.slots import Slot, selection_problem, slots_of

if TYPE_CHECKING:
    from kvasir_operator.core.world import World

ACCELERATOR = "nvidia.com/gpu"
REFRESH_MS = 60_000  # figures alone are written at most this often


@dataclass(frozen=True, slots=True)
class TelemetryView:
    """What the collector knows of one service. `now` is None until two looks have been taken."""

    now: Load | None = None
    kept: Load | None = None
    observed: Observed = field(default_factory=Observed)
    speeds: Mapping[str, Speed] = field(default_factory=dict)  # measured, by the pool's key
    problem: str = ""  # why nothing is known


@dataclass(frozen=True, slots=True)
class PlannedFleet:
    """The outcome for one ModelService. `targets` are to be applied; empty: none."""

    status: Manifest
    finding: Finding
    targets: Mapping[str, PoolTarget]
    interval_ms: int
    may_lend: bool = False


def plan_fleet(world: "World", spec: ModelServiceSpec) -> PlannedFleet | None:
    """The plan for a service; None: it has no planner."""
    settings = spec.planner
    if settings is None:
        return None
    before = world.obj.get("status", {}).get("plan", {})
    view = world.telemetry or TelemetryView(problem="the routers have not been asked yet")
    inputs = _inputs(world, spec, settings, view)
    if isinstance(inputs, str):
        status = PlanStatus(
            mode=settings.mode,
            reason=Reason.NO_MEASUREMENTS.value,
            message=inputs,
            made_at=time_text(world.now_ms),
            scaled_at=before.get("scaledAt"),
            flipped_at=before.get("flippedAt"),
        )
        finding = Finding(ConditionType.PLAN_APPLIED, False, Reason.NO_MEASUREMENTS, inputs)
        return _planned(world, settings, status, finding, {})
    made = plan(inputs, now_ms=world.now_ms)
    return _outcome(world, spec, inputs, made)


def _outcome(
    world: "World", spec: ModelServiceSpec, inputs: Inputs, made: FleetPlan
) -> PlannedFleet:
    settings = spec.planner
    assert settings is not None, "there is a plan"
    changes = _changes(inputs, made)
    since = _differs_since(world, spec, made) if settings.mode != "Observe" else None
    status = _status(settings, inputs, made, since=since, now_ms=world.now_ms)
    if settings.mode == "Apply":
        finding = Finding(ConditionType.PLAN_APPLIED, True, Reason.PLAN_APPLIED, made.message)
        targets = {target.name: target for target in made.targets}
        return _planned(world, settings, status, finding, targets)
    if settings.mode == "Observe":
        text = "mode Observe: nothing is recommended"
        finding = Finding(ConditionType.PLAN_APPLIED, False, Reason.OBSERVING, text)
    elif changes:
        text = f"recommended: {changes}"
        finding = Finding(ConditionType.PLAN_APPLIED, False, Reason.RECOMMENDING, text)
    else:
        finding = Finding(ConditionType.PLAN_APPLIED, True, Reason.PLAN_APPLIED, made.message)
    return _planned(world, settings, status, finding, {})


def _planned(
    world: "World",
    settings: PlannerSettings,
    status: PlanStatus,
    finding: Finding,
    targets: Mapping[str, PoolTarget],
) -> PlannedFleet:
    new = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    before = world.obj.get("status", {}).get("plan", {})
    return PlannedFleet(
        status=before if _says_the_same(before, new, now_ms=world.now_ms) else new,
        finding=finding,
        targets=targets,
        interval_ms=1000 * settings.interval_seconds,
        may_lend=settings.role_flips,
    )


DECISION = ("mode", "reason", "message", "scaledAt", "flippedAt", "differsSince")


def _says_the_same(before: Manifest, new: Manifest, *, now_ms: int) -> bool:
    """Whether the plan in the status may stay as it is."""
    if not before:
        return False
    if {**before, "madeAt": ""} == {**new, "madeAt": ""}:
        return True
    is_same = all(before.get(key) == new.get(key) for key in DECISION)
    numbers = [
        [(p["name"], p["replicas"], p["lent"], p["target"], p["targetLent"]) for p in pools]
        for pools in (before.get("pools", ()), new.get("pools", ()))
    ]
    made_ms = _parse(before.get("madeAt")) or 0
    return is_same and numbers[0] == numbers[1] and now_ms - made_ms < REFRESH_MS


def _inputs(
    world: "World", spec: ModelServiceSpec, settings: PlannerSettings, view: TelemetryView
) -> Inputs | str:
    """The planner's inputs, or what is missing."""
    if view.now is None:
        return view.problem or "the load has not been measured yet"
    pools = []
    for slot in slots_of(world.owner, spec):
        if slot.part == "kv" or selection_problem(world, slot, spec) is not None:
            continue
        speed = view.speeds.get(slot.key) or _assumed(settings)
        if speed is None:
            return f"no {slot.part} worker has measured its speed yet"
        pools.append(_pool(world, slot, spec, speed))
    if {pool.role for pool in pools} != set(Role):
        return "a role has no pool that can be planned: see the condition Degraded"
    budget = settings.budget
    before = world.obj.get("status", {}).get("plan", {})
    return Inputs(
        pools=tuple(pools),
        now=view.now,
        kept=view.kept,
        slo=Slo(spec.slo.ttft_ms, spec.slo.tpot_ms, settings.attainment_percent / 100),
        limits=Limits(
            prefill_percent_min=settings.prefill_percent_min,
            prefill_percent_max=settings.prefill_percent_max,
            replicas=budget.replicas,
            accelerators=budget.accelerators,
            hourly_cents=budget.hourly_cents,
            watts=budget.watts,
        ),
        pace=Pace(
            headroom=settings.headroom_percent / 100,
            shrink_dwell_ms=1000 * settings.shrink_dwell_seconds,
            flip_dwell_ms=1000 * settings.flip_dwell_seconds,
            flips_allowed=settings.role_flips,
        ),
        memory=Memory(_parse(before.get("scaledAt")), _parse(before.get("flippedAt"))),
        observed=view.observed,
    )


def _assumed(settings: PlannerSettings) -> Speed | None:
    profile = settings.assumed_profile
    if profile is None:
        return None
    return Speed(
        profile.prefill_us_per_token,
        profile.decode_base_us / 1000,
        profile.decode_us_per_request / 1000,
        profile.kv_tokens,
    )


def _pool(world: "World", slot: Slot, service: ModelServiceSpec, speed: Speed) -> PoolFacts:
    """A pool as it is. What an autoscaler sets is taken as given."""
    live = world.live.get(slot.ref(world.owner))
    spec = live["spec"] if live else {}
    template: WorkerPoolTemplate | WorkerPoolSpec
    if slot.is_own:
        template = service.worker_template(slot.part)
    else:
        template = WorkerPoolSpec.model_validate(spec)
    replicas = spec.get("replicas", template.replicas)
    is_fixed = live is not None and autoscaler_owner(live) is not None
    amount = {**template.resources.requests, **template.resources.limits}.get(ACCELERATOR, 0)
    return PoolFacts(
        name=slot.key,
        role=Role(slot.part),
        speed=speed,
        replicas=replicas,
        lent=min(spec.get("lentReplicas", 0), replicas),
        replicas_min=replicas if is_fixed else template.min_replicas,
        replicas_max=replicas if is_fixed else template.max_replicas,
        hourly_cents=template.price.hourly_cents,
        watts=template.price.watts,
        accelerators=int(quantity(amount)),
    )


def _changes(inputs: Inputs, made: FleetPlan) -> str:
    """What the plan would change, in words; empty: nothing."""
    texts = []
    for pool, target in zip(inputs.pools, made.targets, strict=True):
        if pool.replicas != target.replicas:
            texts.append(f"{pool.name} {pool.replicas} -> {target.replicas}")
        if pool.lent != target.lent:
            texts.append(f"lent by {pool.name} {pool.lent} -> {target.lent}")
    return ", ".join(texts)


def _differs_since(world: "World", spec: ModelServiceSpec, made: FleetPlan) -> str | None:
    """Since when the fleet has not been as planned; kept in the status meanwhile."""
    targets = {target.name: target for target in made.targets}
    slots = [slot for slot in slots_of(world.owner, spec) if slot.key in targets]
    is_applied = spec.planner is not None and spec.planner.mode == "Apply"
    if all(_is_met(world, slot, targets[slot.key], is_applied=is_applied) for slot in slots):
        return None
    before = world.obj.get("status", {}).get("plan", {}).get("differsSince")
    return before or time_text(world.now_ms)


def _is_met(world: "World", slot: Slot, target: PoolTarget, *, is_applied: bool) -> bool:
    """Whether a pool has the target's numbers; in mode Apply also workers that serve by them."""
    pool = world.live.get(slot.ref(world.owner), {})
    spec, status = pool.get("spec", {}), pool.get("status", {})
    found = (spec.get("replicas"), spec.get("lentReplicas", 0))
    ready = (status.get("readyReplicas", 0), status.get("lentReplicas", 0))
    wanted = (target.replicas, target.lent)
    return found == wanted and (not is_applied or ready == wanted)


def _status(
    settings: PlannerSettings,
    inputs: Inputs,
    made: FleetPlan,
    *,
    since: str | None,
    now_ms: int,
) -> PlanStatus:
    observed = inputs.observed
    is_observing = settings.mode == "Observe"
    is_applied = settings.mode == "Apply"
    memory = made.memory if is_applied else inputs.memory
    return PlanStatus(
        mode=settings.mode,
        reason=made.reason.value,
        message=made.message,
        made_at=time_text(now_ms),
        scaled_at=_optional_text(memory.scaled_ms),
        flipped_at=_optional_text(memory.flipped_ms),
        differs_since=since,
        inputs=PlanInputs(
            now=_load(inputs.now.prefill),
            kept=_load(inputs.kept.prefill) if inputs.kept else None,
            hit_percent=_percent(observed.hit_rate),
            attainment_percent=_percent(observed.attainment),
            queue_age_ms=coarse(observed.queue_age_ms),
        ),
        terms=tuple(
            PlanTerm(pool=term.pool, load=term.load, workers=f"{term.workers:.1f}")
            for term in made.terms
        ),
        pools=tuple(
            PlanPool(
                name=pool.name,
                replicas=pool.replicas,
                lent=pool.lent,
                target=pool.replicas if is_observing else target.replicas,
                target_lent=pool.lent if is_observing else target.lent,
                prefill_us_per_token=coarse(pool.speed.prefill_us_per_token),
                decode_step_us=coarse(
                    1000 * (pool.speed.decode_base_ms + pool.speed.decode_ms_per_request)
                ),
            )
            for pool, target in zip(inputs.pools, made.targets, strict=True)
        ),
        present=_prediction(made.present),
        predicted=None if is_observing else _prediction(made.predicted),
        rejected=tuple(PlanRejection(what=r.what, why=r.why) for r in made.rejected),
    )


def _load(demand: Demand) -> PlanLoad:
    return PlanLoad(
        requests_per_minute=coarse(60 * demand.requests_per_s),
        prompt_tokens=coarse(demand.prompt_tokens),
        uncached_tokens=coarse(demand.uncached_tokens),
        output_tokens=coarse(demand.output_tokens),
        queued_tokens=coarse(demand.queued_tokens),
    )


def _prediction(prediction: Prediction) -> PlanPrediction:
    return PlanPrediction(
        ttft_ms=None if prediction.ttft_ms is None else coarse(prediction.ttft_ms),
        tpot_ms=None if prediction.tpot_ms is None else coarse(prediction.tpot_ms),
        attainment_percent=round(100 * prediction.attainment),
        prefill_percent=coarse(100 * prediction.prefill_utilisation),
        decode_percent=coarse(100 * prediction.decode_utilisation),
        hourly_cents=prediction.hourly_cents,
        watts=prediction.watts,
        accelerators=prediction.accelerators,
    )


def coarse(value: float) -> int:
    """Rounded to two significant digits."""
    return int(float(f"{value:.2g}"))


def _percent(share: float | None) -> int | None:
    return None if share is None else round(100 * share)


def time_text(at_ms: int) -> str:
    """A time as the API writes it."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _optional_text(at_ms: int | None) -> str | None:
    return None if at_ms is None else time_text(at_ms)


def _parse(text: str | None) -> int | None:
    return int(datetime.fromisoformat(text).timestamp() * 1000) if text else None
