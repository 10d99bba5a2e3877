"""One request inside the engine: what is known, what is computed, and what it holds.

Invariant: `num_computed < num_known` while it runs, and its blocks cover at least the computed
tokens. The scheduler alone changes it.
"""

import enum

import numpy as np
from kvasir_kvstore.core.block import BLOCK_TOKENS, chain

from kvasir_engine.core.types import (
    EngineRequest,
    FinishReason,
    Refusal,
    RequestTiming,
    Reservation,
)


class Phase(enum.Enum):
    """Where a request stands."""

    WAITING = enum.auto()  # holds nothing
    RESERVED = enum.auto()  # holds blocks that are being filled from elsewhere
    RUNNING = enum.auto()  # is computed
    HELD = enum.auto()  # ended; its blocks are kept for the puller of its session


class IntBuffer:
    """A growing array of int32; views stay valid while it grows."""

    def __init__(self, values: tuple[int, ...] = ()) -> None:
        self._data = np.empty(max(64, 2 * len(values)), dtype=np.int32)
        self._size = 0
        self.extend(values)

    def __len__(self) -> int:
        return self._size

    def extend(self, values: tuple[int, ...] | list[int]) -> None:
        """Appends these values."""
        end = self._size + len(values)
        if end > len(self._data):
            self._data = np.concatenate([self._data, np.empty(end, dtype=np.int32)])
        self._data[self._size : end] = values
        self._size = end

    def last(self) -> int:
        """The value appended last."""
        return int(self._data[self._size - 1])

    def clear(self) -> None:
        """Forgets all values; views keep theirs."""
        self._data = np.empty(64, dtype=np.int32)
        self._size = 0

    def view(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """Values [start, end), not copied."""
        return self._data[start : self._size if end is None else end]


class SequenceState:
    """The mutable state of one request."""

    def __init__(self, request: EngineRequest, *, root: bytes, wants_reservation: bool) -> None:
        """`root`: the parent of its first block's name."""
        self.request = request
        self.wants_reservation = wants_reservation
        self.arrival = 0
        self.phase = Phase.WAITING
        self.is_in_flight = False
        self.end_refusal: Refusal | None = None  # how it ends as soon as that is safe
        self.hold_until_ms = 0.0  # HELD: the puller has this long
        self.is_session_aborted = False
        self.tokens = IntBuffer(request.prompt + request.resume_tokens)
        self.num_initial = len(self.tokens)
        self.num_computed = 0
        self.blocks = IntBuffer()
        self.num_named = 0  # leading blocks that were named or matched
        self._root = root
        self._names: list[bytes] = []
        self._extend_names()
        self.num_cached = 0
        self.num_fetched = 0
        self.num_preemptions = 0
        self.queued_ms = 0.0
        self.started_ms: float | None = None
        self.first_token_ms: float | None = None

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_known(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.tokens)

    @property
    def num_pending(self) -> int:
        """Known tokens that are not computed."""
        return self.num_known - self.num_computed

    @property
    def num_generated(self) -> int:
        """Output tokens so far, those of other workers included."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def is_prefill_only(self) -> bool:
        """Computed for a puller."""
        return self.request.prefill_only_session is not None

    def names(self) -> list[bytes]:
        """Names of the full blocks of the known tokens, in chain order."""
        self._extend_names()
        return self._names

    def finish_reason(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why the output ends with its last token, if it does."""
        sampling = self.request.sampling
        num_generated = self.num_generated
        if num_generated > 0:
            last = self.tokens.last()
            is_eos = not sampling.ignore_eos and last in eos_token_ids
            if is_eos or last in sampling.stop_token_ids:
                return FinishReason.STOP
        return FinishReason.LENGTH if num_generated >= sampling.max_tokens else None

    def reservation(self) -> Reservation:
        """What the owner of a reservation needs to know."""
        num_full = self.num_initial // BLOCK_TOKENS
        return Reservation(
            request_id=self.request_id,
            blocks=tuple(self.blocks.view().tolist()),
            tokens_cached=self.num_computed,
            names=tuple(self._names[:num_full]),
        )

    def timing(self, now_ms: float) -> RequestTiming:
        """What it cost so far."""
        started_ms = self.queued_ms if self.started_ms is None else self.started_ms
        first_ms = now_ms if self.first_token_ms is None else self.first_token_ms
        return RequestTiming(
            queue_ms=started_ms - self.queued_ms,
            prefill_ms=first_ms - started_ms,
            tokens_cached=self.num_cached,
            tokens_fetched=self.num_fetched,
            tokens_computed=self.num_initial - self.num_cached - self.num_fetched,
            num_preemptions=self.num_preemptions,
        )

    def _extend_names(self) -> None:
        start = len(self._names) * BLOCK_TOKENS
        if self.num_known - start >= BLOCK_TOKENS:
            parent = self._names[-1] if self._names else self._root
            self._names += chain(parent, self.tokens.view(start))
