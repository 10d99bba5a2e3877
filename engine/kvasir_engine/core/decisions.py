"""What the core decides: the next step, and what its owner has to do for requests."""

from dataclasses import dataclass

import numpy as np

from kvasir_engine.core.types import Refusal, Reservation, Sampling, TokenEvent


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """The part of one request that a step computes: consecutive known tokens."""

    request_id: str
    start: int
    """Position of the first token."""
    token_ids: np.ndarray
    """int32, a view."""
    block_table: np.ndarray
    """int32, a view: the blocks of positions 0 .. start + len(token_ids) - 1."""
    completes: tuple[int, ...]
    """Blocks whose last needed token is in this slice."""
    sampling: Sampling | None
    """Set: the slice ends with the last known token, and a token is drawn after it."""

    @property
    def end(self) -> int:
        """Position after the last token: that of the token to draw."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Step:
    """One run of the model over a mixed batch."""

    slices: tuple[Slice, ...]
    arrived: tuple[int, ...] = ()
    """Blocks with KV from elsewhere that no step has seen yet."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return sum(len(part.token_ids) for part in self.slices)

    @property
    def sampled(self) -> tuple[Slice, ...]:
        """Slices after which a token is drawn, in order."""
        return tuple(part for part in self.slices if part.sampling is not None)


@dataclass(frozen=True, slots=True)
class Emitted:
    """New tokens for the consumer of a request."""

    request_id: str
    event: TokenEvent
    arrival: int
    """Number of the request: ids come again, numbers do not."""


@dataclass(frozen=True, slots=True)
class Granted:
    """A reservation was made."""

    request_id: str
    reservation: Reservation
    arrival: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A request ended before its output did."""

    request_id: str
    refusal: Refusal
    arrival: int


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The blocks of a prefill-only request may be pulled as they become ready."""

    request_id: str
    session_id: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SessionHeld:
    """A prefill-only request ended: close its session, then tell the core to free its blocks."""

    request_id: str
    session_id: int
    is_aborted: bool
    """The KV will not be whole."""


Decision = Emitted | Granted | Ended | SessionOpened | SessionHeld
