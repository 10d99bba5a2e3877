"""Agent sessions: what the later steps of one gain over other requests. Pure.

A session that has come far has more to lose: each further step raises its priority, up to a bound,
so that a queue under pressure gives up first steps rather than last ones. A session with a deadline
shares what is left of it evenly between this step's first token and all that follows, so a late
step is due earlier; a deadline that has passed makes nothing more urgent, as nothing can meet it.

Invariant: at most `sessions_max` are remembered, the longest unheard goes first. A router that has
forgotten, or never saw, a session treats its next step as the first.
Sources: HEXGEN-TEXT2SQL (arXiv 2505.05286), urgency of workflow steps; Continuum (arXiv
2511.02230), precedence of programs that have begun.
"""

from collections import OrderedDict
from dataclasses import dataclass

STEP_PRIORITY_MAX = 4
"""Steps after which a session gains nothing more: client priorities must still matter."""

TTFT_SHARE = 0.5
"""Of the time left until a session's deadline: its step's first token is due by then."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bounds of the table."""

    sessions_max: int = 16_384
    idle_ms_max: int = 600_000
    """A session unheard of for this long is over."""


@dataclass(frozen=True, slots=True)
class Urgency:
    """How a step stands."""

    step: int
    """From 1."""
    priority: int
    """To be added to what the client asked for."""
    ttft_slo_ms: int


@dataclass(slots=True)
class _Session:
    num_steps: int
    seen_ms: int
    deadline_at_ms: int | None


class SessionTable:
    """The sessions of one router."""

    def __init__(self, limits: SessionLimits | None = None) -> None:
        self._limits = limits or SessionLimits()
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()  # longest unheard first

    def __len__(self) -> int:
        return len(self._sessions)

    def arrived(
        self, key: bytes, *, deadline_ms: int | None, ttft_slo_ms: int, now_ms: int
    ) -> Urgency:
        """A step of session `key` begins; `deadline_ms` from now replaces what was known."""
        session = self._known(key, now_ms)
        session.num_steps += 1
        session.seen_ms = now_ms
        if deadline_ms is not None:
            session.deadline_at_ms = now_ms + deadline_ms
        if session.deadline_at_ms is not None:
            left_ms = session.deadline_at_ms - now_ms
            if left_ms > 0:
                ttft_slo_ms = min(ttft_slo_ms, max(int(TTFT_SHARE * left_ms), 1))
        priority = min(session.num_steps - 1, STEP_PRIORITY_MAX)
        return Urgency(session.num_steps, priority, ttft_slo_ms)

    def _known(self, key: bytes, now_ms: int) -> _Session:
        session = self._sessions.pop(key, None)
        if session is None or now_ms - session.seen_ms > self._limits.idle_ms_max:
            session = _Session(0, now_ms, None)
        self._sessions[key] = session
        if len(self._sessions) > self._limits.sessions_max:
            self._sessions.popitem(last=False)
        return session
