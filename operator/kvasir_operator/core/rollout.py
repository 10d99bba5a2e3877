"""Rolls prefill and decode workers in step: how far each may be ahead of the other.

Invariant: the share of new workers in one pool exceeds that in the other by one worker at most.
Nothing is remembered: the limit follows from how many outdated workers each pool still has.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the rollout of one pool has come."""

    wanted: int
    outdated: int


def updated_max(wanted: int, *, other: Progress) -> int | None:
    """Workers of a pool that may be of the new template, given the other pool; None: all."""
    if other.outdated <= 0 or other.wanted <= 0:
        return None
    num_new = max(0, other.wanted - other.outdated)
    limit = -(-wanted * num_new // other.wanted) + 1
    return None if limit >= wanted else limit
