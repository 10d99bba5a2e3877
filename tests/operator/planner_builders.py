"""Builders of pools, loads and inputs of the planner."""

from typing import Any

from kvasir_operator.core.planner.facts import (
    Demand,
    FleetPlan,
    Inputs,
    Load,
    PoolFacts,
    Role,
    Slo,
    Speed,
)

SPEED = Speed(
    prefill_us_per_token=160.0, decode_base_ms=20.0, decode_ms_per_request=0.5, kv_tokens=500_000
)
SLO = Slo(ttft_ms=2_000, tpot_ms=50)


def make_pool(role: str = "prefill", **facts: Any) -> PoolFacts:
    """A pool of two workers, named after its role."""
    return PoolFacts(**{"name": role, "role": Role(role), "speed": SPEED, "replicas": 2, **facts})


def make_demand(requests_per_s: float, **facts: Any) -> Demand:
    """Prompts of 2,000 uncached tokens, outputs of 200."""
    shape = {
        "uncached_tokens": 2_000.0,
        "uncached_cv2": 1.0,
        "prompt_tokens": 4_000.0,
        "output_tokens": 200.0,
    }
    return Demand(requests_per_s=requests_per_s, **{**shape, **facts})


def make_load(requests_per_s: float, **facts: Any) -> Load:
    """The same demand on both roles."""
    demand = make_demand(requests_per_s, **facts)
    return Load(demand, demand)


def make_inputs(requests_per_s: float = 5.0, **facts: Any) -> Inputs:
    """One pool per role under a load that has been the same all along."""
    load = make_load(requests_per_s)
    return Inputs(
        **{
            "pools": (make_pool("prefill"), make_pool("decode")),
            "now": load,
            "kept": load,
            "slo": SLO,
            **facts,
        }
    )


def counts_of(plan: FleetPlan) -> list[tuple[int, int]]:
    """Workers and lent workers per pool."""
    return [(target.replicas, target.lent) for target in plan.targets]
