"""What plans say, as metrics: how long fleets differ from them, and how much they change."""

from datetime import datetime

from kvasir_operator import metrics
from kvasir_operator.core.manifests import Manifest, Ref


class PlanMetrics:
    """The plans of the services that this process reconciles."""

    def __init__(self) -> None:
        self._modes: dict[Ref, str] = {}

    def note(self, service: Ref, before: Manifest, plan: Manifest) -> None:
        """A service's plan after a reconcile, and the one before; empty: it has none."""
        mode = plan.get("mode", "")
        if self._modes.get(service, mode) != mode or not plan:
            self.forget(service)
        if not plan:
            return
        self._modes[service] = mode
        since = plan.get("differsSince")
        since_s = datetime.fromisoformat(since).timestamp() if since else 0.0
        metrics.PLAN_DIFFERS_SINCE.labels(service.namespace, service.name, mode).set(since_s)
        if mode == "Apply":
            self._count(service, before, plan)

    def forget(self, service: Ref) -> None:
        """The service is gone, or has no planner any more."""
        mode = self._modes.pop(service, None)
        if mode is not None:
            metrics.PLAN_DIFFERS_SINCE.remove(service.namespace, service.name, mode)

    def _count(self, service: Ref, before: Manifest, plan: Manifest) -> None:
        labels = (service.namespace, service.name)
        for change, at, now, target in (
            ("replicas", "scaledAt", "replicas", "target"),
            ("flips", "flippedAt", "lent", "targetLent"),
        ):
            if plan.get(at) is not None and plan.get(at) != before.get(at):
                changed = sum(abs(pool[target] - pool[now]) for pool in plan.get("pools", ()))
                metrics.PLAN_CHANGES.labels(*labels, change).inc(changed)
