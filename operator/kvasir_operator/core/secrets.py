"""When the certificate of a service is made, prepared, changed and forgotten.

A Secret reaches the pods of a service one after the other, each within SETTLE_MS. So a rotation
takes three steps, and at any time two pods differ by one step at most: first all learn to trust the
new authority, then all show the certificate that it signed, then all forget the old authority. The
key of an authority is never kept: whoever needs another certificate gets another authority.
"""

import enum
from dataclasses import dataclass

SETTLE_MS = 10 * 60_000  # the kubelet brings a changed Secret within some two minutes
DAY_MS = 86_400_000
ROTATE_BEFORE_MS = 30 * DAY_MS


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate of parts."""

    name: str  # that callers demand
    authority: str  # which signed it
    expires_ms: int


@dataclass(frozen=True, slots=True)
class SecretView:
    """What a service's Secret holds. A certificate whose key does not fit is None."""

    leaf: Leaf | None = None
    upcoming: Leaf | None = None
    authorities: frozenset[str] = frozenset()  # that parts trust
    stepped_ms: int = 0  # when the latest step was taken


class Step(enum.Enum):
    """What is to be done with a Secret now."""

    KEEP = enum.auto()
    MAKE = enum.auto()  # a certificate, shown at once: there is none that serves
    PREPARE = enum.auto()  # the next one, and trust in its authority
    CHANGE = enum.auto()  # to the next one
    FORGET = enum.auto()  # authorities that have signed nothing that is shown


def next_step(secret: SecretView, *, name: str, now_ms: int) -> Step:
    """The step that is due for a Secret of the service with this name."""
    leaf, upcoming = secret.leaf, secret.upcoming
    if leaf is None or not _serves(leaf, secret, name=name, now_ms=now_ms):
        return Step.MAKE
    if now_ms - secret.stepped_ms < SETTLE_MS:
        return Step.KEEP
    if upcoming is not None and _serves(upcoming, secret, name=name, now_ms=now_ms):
        return Step.CHANGE
    if leaf.expires_ms - now_ms <= ROTATE_BEFORE_MS:
        return Step.PREPARE
    if secret.authorities != {leaf.authority} or upcoming is not None:
        return Step.FORGET
    return Step.KEEP


def _serves(leaf: Leaf, secret: SecretView, *, name: str, now_ms: int) -> bool:
    return leaf.name == name and leaf.expires_ms > now_ms and leaf.authority in secret.authorities
