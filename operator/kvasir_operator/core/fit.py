"""Whether a pool's workers fit into their memory limit, before any of them is made."""

from kvasir_operator.api import WorkerPoolSpec
from kvasir_operator.core.conditions import Problem, Reason
from kvasir_operator.core.drift import quantity
from kvasir_operator.core.planner.memory import MemoryFit


def memory_fit(spec: WorkerPoolSpec) -> MemoryFit | None:
    """The memory of one worker against its limit; None: not known, or vLLM's business."""
    limit = quantity(spec.resources.limits.get("memory", ""))
    if spec.model.memory_mb is None or isinstance(limit, str) or spec.vllm is not None:
        return None
    return MemoryFit(spec.model.memory_mb, spec.kv_cache_mb, limit_bytes=int(limit))


def memory_problem(spec: WorkerPoolSpec) -> Problem | None:
    """Why no worker of this template may be made, if so."""
    fit = memory_fit(spec)
    if fit is None or fit.fits:
        return None
    return Problem(Reason.MEMORY_TOO_SMALL, f"no worker is made: {fit.describe()}")
