"""Finds watches that have fallen silent: what a read shows, a watch must have delivered.

Every reconcile reads objects anyway. A version that is read, and that the watch of its kind has
not delivered WATCH_LAG_MAX_S later, means that the watch is dead though its connection may look
alive. Only objects that the watches select are looked at.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvasir_operator.api import KINDS
from kvasir_operator.core.manifests import FIELD_MANAGER, Manifest

WATCH_LAG_MAX_S = 90.0  # kopf itself reconnects a stream without bookmarks after 70 seconds
FORGET_AFTER_S = 600.0
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
UNLABELLED_KINDS = tuple(kind.kind for kind in KINDS)  # watched whatever their labels are
WATCHED_KINDS = (
    *UNLABELLED_KINDS,
    "ReplicaSet",
    "StatefulSet",
    "Deployment",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Service",
    "Pod",
)


@dataclass(frozen=True, slots=True)
class _Missing:
    """An object whose present version no watch has brought: when reads showed it."""

    kind: str
    first_s: float
    last_s: float


class WatchAudit:
    """What the watches delivered against what reads showed. One entry per object."""

    def __init__(self, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._delivered: dict[str, str] = {}  # resourceVersion by UID
        self._missing: dict[str, _Missing] = {}  # by UID

    def delivered(self, obj: Manifest, *, is_gone: bool) -> None:
        """A watch has brought this object."""
        metadata = obj["metadata"]
        self._missing.pop(metadata["uid"], None)
        if is_gone:
            self._delivered.pop(metadata["uid"], None)
        else:
            self._delivered[metadata["uid"]] = metadata.get("resourceVersion", "")

    def observed(self, obj: Manifest, *, kind: str) -> bool:
        """A read has shown this object; False: no watch has brought this version yet."""
        metadata = obj["metadata"]
        labels = metadata.get("labels", {})
        if kind not in UNLABELLED_KINDS and labels.get(MANAGED_BY_LABEL) != FIELD_MANAGER:
            return True
        if self._delivered.get(metadata["uid"]) == metadata.get("resourceVersion", ""):
            self._missing.pop(metadata["uid"], None)
            return True
        now_s = self._now_s()
        first = self._missing.get(metadata["uid"], _Missing(kind, now_s, now_s))
        self._missing[metadata["uid"]] = replace(first, last_s=now_s)
        return False

    def silent(self) -> dict[str, float]:
        """Kinds whose watch is silent, with the seconds that it lags behind.

        Two reads must have shown the object: one that is deleted meanwhile is not read again.
        """
        found = dict[str, float]()
        for uid, missing in list(self._missing.items()):
            if self._now_s() - missing.last_s > FORGET_AFTER_S:
                del self._missing[uid]
            elif missing.last_s - missing.first_s > WATCH_LAG_MAX_S:
                lag_s = missing.last_s - missing.first_s
                found[missing.kind] = max(lag_s, found.get(missing.kind, 0.0))
        return found
