"""Routing rules that others have published, each as its source states it."""

from kvasir_sim.baselines.simple import LeastLoaded, RoundRobin
from kvasir_sim.policy import RoutingPolicy

BASELINES: dict[str, type[RoutingPolicy]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
}
