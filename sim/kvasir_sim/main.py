"""One simulation, from its settings to its figures."""

from collections.abc import Sequence
from dataclasses import replace

from kvasir_sim.baselines import BASELINES
from kvasir_sim.engine import Engine, Progress
from kvasir_sim.kvasir_policy import KvasirPolicy
from kvasir_sim.policy import RoutingPolicy
from kvasir_sim.readers import load_trace
from kvasir_sim.result import SimResult, summarise, summarise_decode
from kvasir_sim.settings import SimSettings
from kvasir_sim.trace import TraceRequest, at_rate

POLICIES: dict[str, type[RoutingPolicy]] = {"kvasir": KvasirPolicy, **BASELINES}


def run_sim(settings: SimSettings, *, progress: Progress | None = None) -> SimResult:
    """Replays the trace; `progress(done, total)` is called now and then.

    Raises:
        OSError: the trace cannot be read.
        ValueError: the trace is malformed, or nothing is left to count.
    """
    requests = load_trace(settings.trace, max_input=settings.max_input, count=settings.requests)
    return simulate(settings, requests, progress=progress)


def simulate(
    settings: SimSettings,
    requests: Sequence[TraceRequest],
    *,
    progress: Progress | None = None,
) -> SimResult:
    """As `run_sim`, of a trace that has been read.

    Raises:
        ValueError: nothing is left to count.
    """
    engine = Engine(settings, POLICIES[settings.policy], progress=progress)
    engine.run(requests, at_rate(requests, settings.rate))
    served = [job for job in engine.served if job.index >= settings.warmup]
    refused = [job for job in engine.refused if job.index >= settings.warmup]
    busy_ms = [worker.busy_ms for worker in engine.fleet.all_workers()]
    result = summarise(served, refused=refused, busy_ms=busy_ms)
    if not settings.decode_workers:
        return result
    decode = summarise_decode(served, num_refused=len(refused), slo_tpot_ms=settings.slo_tpot_ms)
    return replace(result, decode=decode)
