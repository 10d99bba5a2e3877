"""The planner's part of the API: `spec.planner` and `status.plan` of a ModelService."""

from typing import Literal

from pydantic import Field

from kvasir_operator.api_base import ApiModel, Rule, map_list

SIGNIFICANT = "Figures are rounded to two digits, so that noise writes no status."


class WorkerPrice(ApiModel):
    """What one worker costs; the planner prefers the cheapest mix."""

    hourly_cents: int = Field(
        default=0, ge=0, le=10_000_000, description="Price of one worker, in cents per hour."
    )
    watts: int = Field(default=0, ge=0, le=1_000_000, description="Power of one worker, in watts.")


class PlannerBudget(ApiModel):
    """What all workers of a service together may take. Absent: no limit."""

    replicas: int | None = Field(
        default=None, ge=2, le=2000, description="Most prefill and decode workers together."
    )
    accelerators: int | None = Field(
        default=None, ge=1, le=100_000, description="Most accelerators (nvidia.com/gpu) together."
    )
    hourly_cents: int | None = Field(
        default=None, ge=1, description="Most cents per hour, by the pools' `price`."
    )
    watts: int | None = Field(default=None, ge=1, description="Most watts, by the pools' `price`.")


class WorkerProfile(ApiModel):
    """How fast a worker is, where none has been measured."""

    prefill_us_per_token: int = Field(
        ge=1, le=10_000_000, description="Time to compute one prompt token, in microseconds."
    )
    decode_base_us: int = Field(
        ge=1,
        le=60_000_000,
        description="Time of a decode step without its requests, in microseconds.",
    )
    decode_us_per_request: int = Field(
        ge=0, le=10_000_000, description="Time that each request adds to a step, in microseconds."
    )
    kv_tokens: int = Field(ge=1, description="Tokens whose KV one worker's memory holds.")


class PlannerSettings(ApiModel):
    """Plans the numbers of prefill and decode workers from the load and the SLO."""

    RULES = (
        Rule(
            "self.prefillPercentMin <= self.prefillPercentMax",
            "prefillPercentMin must not be greater than prefillPercentMax: lower the one or raise "
            "the other",
        ),
        Rule(
            "self.keepWindowSeconds >= self.intervalSeconds",
            "keepWindowSeconds must not be less than intervalSeconds: raise the one or lower the "
            "other",
        ),
    )
    mode: Literal["Observe", "Recommend", "Apply"] = Field(
        default="Recommend",
        description="Observe: show the load and how the present fleet fares. Recommend: show the "
        "fleet that the load needs, too. Apply: set the pools' replicas.",
    )
    attainment_percent: int = Field(
        default=95,
        ge=50,
        le=99,
        description="Share of requests that should meet the SLO, in percent.",
    )
    headroom_percent: int = Field(
        default=15, ge=0, le=200, description="Spare capacity over the present load, in percent."
    )
    interval_seconds: int = Field(
        default=15, ge=1, le=600, description="How often the routers are asked and a plan is made."
    )
    keep_window_seconds: int = Field(
        default=900,
        ge=10,
        le=14_400,
        description="Workers are given up only if fewer would have done all along this time.",
    )
    shrink_dwell_seconds: int = Field(
        default=300, ge=0, le=86_400, description="Least time from a change to giving up workers."
    )
    flip_dwell_seconds: int = Field(
        default=60, ge=1, le=86_400, description="Least time between two role flips."
    )
    role_flips: bool = Field(
        default=True, description="Whether workers may change between prefill and decode."
    )
    prefill_percent_min: int = Field(
        default=0, ge=0, le=100, description="Least share of prefill among the workers, in percent."
    )
    prefill_percent_max: int = Field(
        default=100, ge=0, le=100, description="Largest share of prefill, in percent."
    )
    budget: PlannerBudget = Field(
        default_factory=PlannerBudget, description="Limits that no plan exceeds."
    )
    assumed_profile: WorkerProfile | None = Field(
        default=None,
        description="A worker's speed until it has been measured. Absent: no plan until then.",
    )


class PlanLoad(ApiModel):
    """A load as the planner sees it."""

    requests_per_minute: int = Field(default=0, description="Arrivals. " + SIGNIFICANT)
    prompt_tokens: int = Field(default=0, description="Mean length of a prompt.")
    uncached_tokens: int = Field(default=0, description="Mean of what had to be computed of it.")
    output_tokens: int = Field(default=0, description="Mean length of an output.")
    queued_tokens: int = Field(default=0, description="Prompt tokens that wait at workers.")


class PlanInputs(ApiModel):
    """What the plan was made from."""

    now: PlanLoad = Field(default_factory=PlanLoad, description="The present load.")
    kept: PlanLoad | None = Field(
        default=None,
        description="The most that prefill had to do in the keep window; absent: not yet full.",
    )
    hit_percent: int | None = Field(
        default=None, description="Prompt tokens found in a cache, in percent."
    )
    attainment_percent: int | None = Field(
        default=None, description="Requests of the last five minutes within the SLO, in percent."
    )
    queue_age_ms: int = Field(
        default=0, description="Age of the oldest request without a first token, in milliseconds."
    )


class PlanTerm(ApiModel):
    """What a load needs of one pool if the pool served it alone."""

    pool: str = Field(description="The pool.")
    load: str = Field(description="now or kept.")
    workers: str = Field(description="Workers needed, a decimal number.")


class PlanPool(ApiModel):
    """One pool in the plan."""

    name: str = Field(description="Name of the pool.")
    replicas: int = Field(description="Workers at present.")
    lent: int = Field(default=0, description="Of these, workers in the other role.")
    target: int = Field(description="Workers planned.")
    target_lent: int = Field(default=0, description="Of these, workers in the other role.")
    prefill_us_per_token: int = Field(default=0, description="Measured speed, in microseconds.")
    decode_step_us: int = Field(
        default=0, description="Measured decode step with one request, in microseconds."
    )


class PlanPrediction(ApiModel):
    """What a fleet would do under the present load."""

    ttft_ms: int | None = Field(
        default=None,
        description="Time to first token that attainmentPercent of the requests keep, in "
        "milliseconds; absent: the queue would only grow.",
    )
    tpot_ms: int | None = Field(
        default=None, description="Time per output token in milliseconds; absent: without end."
    )
    attainment_percent: int = Field(
        default=0, description="Requests whose first token comes in time, in percent."
    )
    prefill_percent: int = Field(default=0, description="Use of the prefill workers, in percent.")
    decode_percent: int = Field(default=0, description="Use of the decode workers, in percent.")
    hourly_cents: int = Field(default=0, description="Price in cents per hour.")
    watts: int = Field(default=0, description="Power in watts.")
    accelerators: int = Field(default=0, description="Accelerators in use.")


class PlanRejection(ApiModel):
    """Something that the planner wanted, and what spoke against it."""

    what: str = Field(description="What was wanted.")
    why: str = Field(description="What spoke against it.")


class PlanStatus(ApiModel):
    """The latest plan: what went in, what came out, what was rejected."""

    mode: str = Field(description="The mode that the plan was made in.")
    reason: str = Field(
        description="Steady, Growing, Flipping, Shrinking, Holding, Limited, or NoMeasurements."
    )
    message: str = Field(description="The reason in a sentence.")
    made_at: str = Field(
        json_schema_extra={"format": "date-time"}, description="When the plan was made."
    )
    scaled_at: str | None = Field(
        default=None,
        json_schema_extra={"format": "date-time"},
        description="When a plan last changed a number of workers.",
    )
    flipped_at: str | None = Field(
        default=None,
        json_schema_extra={"format": "date-time"},
        description="When a plan last changed a role.",
    )
    differs_since: str | None = Field(
        default=None,
        json_schema_extra={"format": "date-time"},
        description="Since when the fleet has not been as planned: pools have other numbers or, in "
        "mode Apply, fewer workers are ready or lent. Absent: it is, or the mode is Observe.",
    )
    inputs: PlanInputs | None = Field(default=None, description="What the plan was made from.")
    terms: tuple[PlanTerm, ...] = Field(default=(), description="What the loads need.")
    pools: tuple[PlanPool, ...] = Field(
        default=(), json_schema_extra=map_list("name"), description="The pools, now and as planned."
    )
    present: PlanPrediction | None = Field(
        default=None, description="What the present fleet would do."
    )
    predicted: PlanPrediction | None = Field(
        default=None, description="What the planned fleet would do."
    )
    rejected: tuple[PlanRejection, ...] = Field(
        default=(), description="What was wanted and not planned, and why."
    )
