"""The source side of hand-offs: data-plane sessions of prefill-only requests.

Invariant: blocks of a session are given back only when no sender reads them any more, which
`close_session` says; until then the session is asked again.
"""

from typing import Protocol

from kvasir_engine.core.decisions import SessionHeld, SessionOpened

CLOSE_POLL_MS = 5.0
"""Senders of an aborted session stop within some ten milliseconds."""


class SessionPool(Protocol):
    """`kvasir_kvstore._native.BlockPool`, as far as sessions need it."""

    def open_session(self, session_id: int) -> None:
        """Pullers may come."""

    def extend_session(self, session_id: int, blocks: list[int]) -> None:
        """The next blocks in order."""

    def finish_session(self, session_id: int) -> None:
        """No more blocks will follow."""

    def abort_session(self, session_id: int) -> None:
        """The puller gets an error."""

    def session_pulled(self, session_id: int) -> bool:
        """Whether the puller has it all."""

    def close_session(self, session_id: int) -> bool:
        """False: a sender still reads."""


class Sessions:
    """All sessions of one engine."""

    def __init__(self, pool: SessionPool) -> None:
        self._pool = pool
        self._refused: set[str] = set()  # requests whose session id is another's
        self._held: dict[str, int] = {}  # by request: ended, the puller may still be at it
        self._closing: dict[str, int] = {}
        self._done: list[str] = []

    @property
    def num_held(self) -> int:
        """Requests whose blocks wait to be pulled or let go."""
        return len(self._held) + len(self._closing)

    @property
    def is_closing(self) -> bool:
        """Whether `closed` has to be asked again soon."""
        return bool(self._closing or self._done)

    def open(self, decision: SessionOpened) -> bool:
        """Lets pullers come; the request's blocks are all allocated. False: the id is in use."""
        try:
            self._pool.open_session(decision.session_id)
        except ValueError:
            self._refused.add(decision.request_id)
            return False
        self._pool.extend_session(decision.session_id, list(decision.blocks))
        self._pool.finish_session(decision.session_id)
        return True

    def hold(self, decision: SessionHeld) -> None:
        """The request ended: its session stays until it is let go, which an abort does at once."""
        if decision.request_id in self._refused:
            self._refused.remove(decision.request_id)
            self._done.append(decision.request_id)
            return
        self._held[decision.request_id] = decision.session_id
        if decision.is_aborted:
            self.let_go(decision.request_id)

    def let_go(self, request_id: str) -> bool:
        """Close the session, whether it was pulled or not. False: the request holds none."""
        session_id = self._held.pop(request_id, None)
        if session_id is not None:
            if not self._pool.session_pulled(session_id):
                self._pool.abort_session(session_id)
            self._closing[request_id] = session_id
        return request_id in self._closing

    def closed(self) -> list[str]:
        """Requests whose sessions are closed now: their blocks are free."""
        done, self._done = self._done, []
        done += [
            request_id
            for request_id, session_id in self._closing.items()
            if self._pool.close_session(session_id)
        ]
        for request_id in done:
            self._closing.pop(request_id, None)
        return done
