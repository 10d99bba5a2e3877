"""What a fleet would do under a load: times at the SLO's attainment, utilisation, cost.

Workers of several kinds in one role count as as many of the most frequent kind as cover the same
share of the load.
"""

from collections.abc import Sequence

from kvasir_operator.core.planner.facts import Load, PoolFacts, Prediction, Role, Slo, Speed
from kvasir_operator.core.planner.queueing import (
    batch_max,
    prefill_load,
    requests_in_flight,
    tpot_ms,
    ttft_attainment,
    ttft_ms,
)


def predict(pools: Sequence[PoolFacts], load: Load, slo: Slo) -> Prediction:
    """The prediction for these pools."""
    work = prefill_load(load.prefill)
    speed, workers = _as_one_kind(pools, Role.PREFILL)
    ttft, attainment, used = None, 0.0, 1.0
    if workers:
        us = speed.prefill_us_per_token
        used = min(work.requests_per_s * work.tokens * us / 1e6 / workers, 1.0)
        ttft = ttft_ms(work, speed, workers=workers, share=slo.attainment)
        attainment = ttft_attainment(work, speed, workers=workers, ttft_ms=slo.ttft_ms)
    decode_speed, decoders = _as_one_kind(pools, Role.DECODE)
    tpot, decode_used = None, 1.0
    if decoders:
        tpot = tpot_ms(load.decode, decode_speed, workers=decoders)
        decode_used = _decode_utilisation(load, decode_speed, slo, workers=decoders)
    return Prediction(
        ttft_ms=ttft,
        tpot_ms=tpot,
        prefill_utilisation=used,
        decode_utilisation=decode_used,
        attainment=attainment,
        hourly_cents=sum(pool.replicas * pool.hourly_cents for pool in pools),
        watts=sum(pool.replicas * pool.watts for pool in pools),
        accelerators=sum(pool.replicas * pool.accelerators for pool in pools),
    )


def _as_one_kind(pools: Sequence[PoolFacts], role: Role) -> tuple[Speed, float]:
    """The most frequent kind, and the workers of the role as a number of it."""
    serving = [(pool.serving(role), pool.speed) for pool in pools]
    _, reference = max(serving, key=lambda pair: pair[0])
    rate = _rate(reference, role)
    return reference, sum(count * _rate(speed, role) / rate for count, speed in serving)


def _rate(speed: Speed, role: Role) -> float:
    if role is Role.PREFILL:
        return 1 / speed.prefill_us_per_token
    return 1 / (speed.decode_base_ms + speed.decode_ms_per_request)


def _decode_utilisation(load: Load, speed: Speed, slo: Slo, *, workers: float) -> float:
    """Requests in flight over those that the SLO and the memory allow."""
    requests = requests_in_flight(load.decode, speed, workers=workers)
    room = batch_max(load.decode, speed, slo) * workers
    return 1.0 if requests is None or room <= 0 else min(requests / room, 1.0)
