"""Workers that cannot fit into their memory limit are not made."""

import pytest
from kvasir_operator.core.planner.memory import PROCESS_MB, MemoryFit
from operator_builders import MODEL, condition_of, make_decode_pool, plan_for


def make_pool_of(memory: str | None, **model: int):
    limits = {"memory": memory} if memory else {}
    return make_decode_pool(
        model={**MODEL, **model}, kvCacheMb=1_000, resources={"limits": limits}, replicas=2
    )


@pytest.mark.parametrize(
    ("memory", "model", "is_made"),
    [
        (f"{2_000 + 1_000 + PROCESS_MB}Mi", {"memoryMb": 2_000}, True),
        (f"{2_000 + 1_000 + PROCESS_MB - 1}Mi", {"memoryMb": 2_000}, False),
        ("2G", {"memoryMb": 2_000}, False),
        ("2G", {}, True),
        (None, {"memoryMb": 2_000}, True),
    ],
    ids=["just fits", "one MiB short", "far too small", "model unknown", "no limit"],
)
def test_worker_is_made_only_if_it_fits(
    memory: str | None, model: dict[str, int], is_made: bool
) -> None:
    plan = plan_for(make_pool_of(memory, **model))
    assert ("ReplicaSet" in {child["kind"] for child in plan.children}) == is_made
    degraded = condition_of(plan.status, "Degraded")
    assert (degraded["reason"] == "MemoryTooSmall") == (not is_made)
    if not is_made:
        assert "model 2000, KV cache 1000" in degraded["message"]
        assert not plan.deletions


def test_fit_adds_up() -> None:
    assert MemoryFit(100, 50, limit_bytes=(150 + PROCESS_MB) << 20).fits
    assert not MemoryFit(100, 51, limit_bytes=(150 + PROCESS_MB) << 20).fits
