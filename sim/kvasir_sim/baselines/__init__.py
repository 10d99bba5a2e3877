"""Routing rules that others have published, each as its source states it; none is weakened.

What a rule needs and a trace or this model does not have is replaced by the nearest thing, which
its docstring names. All are given workers that serve in order of arrival.
"""

from kvasir_sim.baselines.chwbl import Chwbl
from kvasir_sim.baselines.dualmap import DualMap
from kvasir_sim.baselines.preble import Preble
from kvasir_sim.baselines.scores import Dynamo, LlmD, LMetric
from kvasir_sim.baselines.sglang import SglangCacheAware
from kvasir_sim.baselines.simple import Affinity, LeastLoaded, MinTtft, RoundRobin
from kvasir_sim.policy import RoutingPolicy

BASELINES: dict[str, type[RoutingPolicy]] = {
    "dualmap": DualMap,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "affinity": Affinity,
    "min-ttft": MinTtft,
    "preble": Preble,
    "chwbl": Chwbl,
    "sglang": SglangCacheAware,
    "dynamo": Dynamo,
    "llm-d": LlmD,
    "lmetric": LMetric,
}
