"""Tenants' shares of one worker, by virtual time (start-time fair queueing; VTC, OSDI 2024).

Each tenant is charged what it queues over its weight. The clock runs with what is served over the
weights of all who asked lately, so it shows what a tenant would have had by now, had it asked for
all of its share. Who is ahead of it by more than a horizon is beyond its share.
"""

from collections import deque
from dataclasses import dataclass

HORIZON_MS = 5_000.0
"""A tenant is beyond its share when it would take the worker longer than this to serve the others
as much: shorter, and one long prompt would mark its tenant. Who asked so lately counts as asking,
whether it was given a place or not."""

AHEAD_MS_MAX = 60_000.0
"""More than this is forgiven: who used an idle worker does not pay for it for ever."""


@dataclass(slots=True)
class _Account:
    charged_ms: float
    weight: float
    asked_ms: float = 0.0
    num_queued: int = 0


class Shares:
    """The accounts of one queue: of tenants that asked lately, or have something queued."""

    def __init__(self) -> None:
        self._clock_ms = 0.0
        self._accounts: dict[str | bytes, _Account] = {}
        self._asked: deque[tuple[float, str | bytes]] = deque()
        self._weight = 0.0

    def is_beyond(self, tenant: str | bytes, *, now_ms: float) -> bool:
        """Whether the tenant has had more than its share while others want theirs."""
        self._forget(now_ms)
        account = self._accounts.get(tenant)
        if account is None or len(self._accounts) == 1:
            return False
        return (account.charged_ms - self._clock_ms) * self._weight > HORIZON_MS

    def queue(
        self, tenant: str | bytes, *, weight: float, compute_ms: float, now_ms: float
    ) -> None:
        """A request of the tenant is queued."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(self._clock_ms, weight)
            self._weight += weight
        account.asked_ms = now_ms
        account.num_queued += 1
        self._asked.append((now_ms, tenant))
        charged_ms = max(account.charged_ms, self._clock_ms) + compute_ms / account.weight
        account.charged_ms = min(charged_ms, self._clock_ms + AHEAD_MS_MAX / account.weight)

    def correct(self, tenant: str | bytes, *, compute_ms: float) -> None:
        """One of the tenant's queued requests costs so much more, or less."""
        account = self._accounts[tenant]
        account.charged_ms += compute_ms / account.weight

    def leave(self, tenant: str | bytes, *, compute_ms: float, is_served: bool) -> None:
        """One of the tenant's requests has left the queue; what is not served is not charged."""
        account = self._accounts[tenant]
        account.num_queued -= 1
        if is_served:
            self._clock_ms += compute_ms / self._weight
        else:
            account.charged_ms -= compute_ms / account.weight
        self._drop_if_idle(tenant, account)

    def _forget(self, now_ms: float) -> None:
        """Tenants that have not asked within the horizon."""
        while self._asked and self._asked[0][0] < now_ms - HORIZON_MS:
            asked_ms, tenant = self._asked.popleft()
            account = self._accounts.get(tenant)
            if account is not None and account.asked_ms == asked_ms:
                account.asked_ms = float("-inf")
                self._drop_if_idle(tenant, account)

    def _drop_if_idle(self, tenant: str | bytes, account: _Account) -> None:
        if account.num_queued == 0 and account.asked_ms == float("-inf"):
            del self._accounts[tenant]
            self._weight = self._weight - account.weight if self._accounts else 0.0
