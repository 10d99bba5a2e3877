"""What is told as a Kubernetes Event: the changes between the live status and the new one.

Events follow from the status alone, so that none is told twice: once the status is written, there
is no change left to tell of.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvasir_operator.core.conditions import ConditionType, Reason
from kvasir_operator.core.manifests import Manifest

EVENTS_MAX = 8  # of one reconcile
MESSAGE_CHARS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Event:
    """One line of `kubectl describe`."""

    reason: str
    message: str
    is_warning: bool = False


def events_between(before: Manifest, after: Manifest) -> tuple[Event, ...]:
    """The events that lead from one status to the next; a new object has only what went wrong."""
    old, new = _conditions(before), _conditions(after)
    found = [
        *_of_condition(ConditionType.AVAILABLE, old, new),
        *_of_condition(ConditionType.DEGRADED, old, new),
        *_of_condition(ConditionType.REPLICAS_CONTESTED, old, new),
        *_of_progress(old, new),
        *_of_plan(before.get("plan", {}), after.get("plan", {})),
        *_of_workers(before, after),
    ]
    return tuple(found[:EVENTS_MAX])


def _conditions(status: Manifest) -> Mapping[str, Manifest]:
    return {condition["type"]: condition for condition in status.get("conditions", ())}


def _of_condition(
    kind: ConditionType, old: Mapping[str, Manifest], new: Mapping[str, Manifest]
) -> Iterable[Event]:
    before, now = old.get(kind.value, {}), new.get(kind.value)
    if now is None or (before.get("status"), before.get("reason")) == (
        now["status"],
        now["reason"],
    ):
        return
    is_good = (now["status"] == "True") == (kind is ConditionType.AVAILABLE)
    if is_good and before.get("status") in (None, now["status"]) and now["status"] == "False":
        return  # nothing was wrong before
    if not is_good and not before and kind is ConditionType.AVAILABLE:
        return  # it only begins
    reason = kind.value if is_good and kind is ConditionType.AVAILABLE else now["reason"]
    yield Event(reason, now["message"], is_warning=not is_good)


def _of_progress(old: Mapping[str, Manifest], new: Mapping[str, Manifest]) -> Iterable[Event]:
    kind = ConditionType.PROGRESSING.value
    before, now = old.get(kind, {}).get("reason"), new.get(kind, {}).get("reason")
    if before == now or before is None or now is None:
        return
    if before == Reason.ROLLING_OUT:
        yield Event("RolloutFinished", f"no worker of an older template is left: {_text(new)}")
    if now in (Reason.ROLLING_OUT, Reason.SCALING):
        yield Event("RolloutStarted" if now == Reason.ROLLING_OUT else "Scaling", _text(new))


def _text(new: Mapping[str, Manifest]) -> str:
    message: str = new[ConditionType.PROGRESSING.value]["message"]
    return message


def _of_plan(before: Manifest, after: Manifest) -> Iterable[Event]:
    """What a plan changed or would change, and what it wanted and was denied."""
    changes = plan_changes(after)
    if after.get("mode") == "Apply":
        keys = ("scaledAt", "flippedAt")
        if changes and any(after.get(key) != before.get(key) for key in keys):
            yield Event("PlanApplied", f"{', '.join(changes)}: {after['message']}")
    elif changes and changes != plan_changes(before):
        yield Event("PlanRecommended", f"{', '.join(changes)}: {after['message']}")
    known = {rejected["what"] for rejected in before.get("rejected", ())}
    denied = [r for r in after.get("rejected", ()) if r["what"] not in known]
    if denied:
        text = "; ".join(f"{rejected['what']}: {rejected['why']}" for rejected in denied)
        yield Event("PlanRejected", text, is_warning=True)


def plan_changes(plan: Manifest) -> list[str]:
    """What a plan changes of each pool, in words."""
    found = []
    for pool in plan.get("pools", ()):
        if pool["replicas"] != pool["target"]:
            found.append(f"{pool['name']} {pool['replicas']} -> {pool['target']}")
        if pool["lent"] != pool["targetLent"]:
            found.append(f"lent by {pool['name']} {pool['lent']} -> {pool['targetLent']}")
    return found


def _of_workers(before: Manifest, after: Manifest) -> Iterable[Event]:
    old = {entry["name"]: entry for entry in before.get("drainingPods", ())}
    new = {entry["name"]: entry for entry in after.get("drainingPods", ())}
    for name in sorted(set(new) - set(old)):
        yield Event("WorkerDraining", f"{name} finishes its requests before it leaves")
    for name in sorted(set(old) - set(new)):
        left = old[name].get("requestsLeft")
        how = f", {left} requests were left when last seen" if left else ""
        yield Event("WorkerDrained", f"{name} leaves{how}")


def manifest_of(event: Event, obj: Manifest, *, component: str, time: str, name: str) -> Manifest:
    """The event as an object of the API."""
    metadata = obj["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.{name}", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": obj["apiVersion"],
            "kind": obj["kind"],
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
            "resourceVersion": metadata.get("resourceVersion", ""),
        },
        "reason": event.reason,
        "message": event.message[:MESSAGE_CHARS_MAX],
        "type": "Warning" if event.is_warning else "Normal",
        "source": {"component": component},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
