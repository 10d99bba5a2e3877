"""Builders for tests of the engine's core: limits, requests, a registry without memory."""

from collections.abc import Iterable

from kvasir_engine.core.scheduler import Scheduler
from kvasir_engine.core.types import EngineLimits, EngineRequest, Sampling

FINGERPRINT = bytes(16)


class FakeRegistry:
    """Remembers what is published; `pinned` names cannot be taken back."""

    def __init__(self) -> None:
        self.published: dict[bytes, int] = {}
        self.pinned: set[bytes] = set()

    def reset(self, block: int) -> None:
        assert block not in self.published.values(), "a published block is being reused"

    def publish(self, name: bytes, block: int) -> None:
        assert name not in self.published
        self.published[name] = block

    def unpublish(self, name: bytes) -> bool:
        if name in self.pinned:
            return False
        del self.published[name]
        return True


def make_limits(**changes: int) -> EngineLimits:
    values = {
        "num_blocks": 8,
        "context_length": 1000,
        "vocab_size": 100,
        "max_batch_tokens": 64,
        "max_running": 4,
        "max_waiting": 4,
    }
    return EngineLimits(**(values | changes))


def make_scheduler(
    *, registry: FakeRegistry | None = None, eos: Iterable[int] = (99,), **changes: int
) -> Scheduler:
    return Scheduler(
        make_limits(**changes),
        registry or FakeRegistry(),
        fingerprint=FINGERPRINT,
        eos_token_ids=eos,
    )


def make_request(
    request_id: str,
    num_tokens: int = 40,
    *,
    first: int = 0,
    max_tokens: int = 4,
    deadline_ms: float | None = None,
    session: int | None = None,
    skip_blocks: int = 0,
    **sampling: object,
) -> EngineRequest:
    return EngineRequest(
        request_id,
        tuple((first + index) % 90 for index in range(num_tokens)),
        Sampling(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
        deadline_ms=deadline_ms,
        prefill_only_session=session,
        skip_blocks=skip_blocks,
    )
