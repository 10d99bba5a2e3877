"""Who leads: decisions over one Lease, as several operator processes see it.

Invariant: a lease is taken only if it is free, or if nobody has renewed it for its whole duration
by the clock of the taker. Clocks of other machines are never compared.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kvasir_operator.core.manifests import Manifest, Ref

DURATION_S = 12
RENEW_INTERVAL_S = 2.0
RETRY_INTERVAL_S = 1.0  # DURATION_S + RETRY_INTERVAL_S is the longest time without a leader
WRITE_MARGIN_S = 1.0  # a leader sends its last write so long before the lease can be taken


@dataclass(frozen=True, slots=True)
class Seen:
    """A lease as it was last read, and since when it looks like this."""

    spec: Manifest
    since_s: float

    @property
    def holder(self) -> str:
        """Who holds it; empty: it was given back."""
        return str(self.spec.get("holderIdentity") or "")


def observe(before: Seen | None, lease: Manifest, *, now_s: float) -> Seen:
    """What is known after a reading; an unchanged lease keeps the time of its first sight."""
    spec = lease.get("spec", {})
    if before is not None and before.spec == spec:
        return before
    return Seen(spec, now_s)


def may_take(seen: Seen, *, identity: str, now_s: float) -> bool:
    """Whether this process may make itself the holder."""
    if seen.holder in ("", identity):
        return True
    duration_s = seen.spec.get("leaseDurationSeconds") or DURATION_S
    return now_s - seen.since_s > duration_s


def claim(lease: Manifest, *, identity: str, now_ms: int) -> Manifest:
    """The lease as held by `identity`; its resourceVersion makes two claims exclude each other."""
    old = lease.get("spec", {})
    now = _micro_time(now_ms)
    spec: dict[str, Any] = {
        "holderIdentity": identity,
        "leaseDurationSeconds": DURATION_S,
        "acquireTime": old.get("acquireTime", now),
        "renewTime": now,
        "leaseTransitions": old.get("leaseTransitions", 0),
    }
    if old.get("holderIdentity") != identity:
        spec["acquireTime"] = now
        spec["leaseTransitions"] += 1 if old else 0
    return {**lease, "spec": spec}


def give_back(lease: Manifest, *, now_ms: int) -> Manifest:
    """The lease without a holder: the next one need not wait."""
    spec = {**lease.get("spec", {}), "holderIdentity": "", "renewTime": _micro_time(now_ms)}
    return {**lease, "spec": spec}


def new_lease(ref: Ref) -> Manifest:
    """A lease that nobody holds yet."""
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": ref.kind,
        "metadata": {"name": ref.name, "namespace": ref.namespace},
    }


def _micro_time(now_ms: int) -> str:
    return datetime.fromtimestamp(now_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
