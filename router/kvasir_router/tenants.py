"""Who is asking: API keys to tenants, and the salt that keeps tenants' cached blocks apart.

The salt is derived from the tenant's name alone, so that replicas agree; a client never sends it.
Keys are kept as digests only.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvasir_proto.errors import KvasirError, Reason

SALT_BYTES = 16
WEIGHT_MIN, WEIGHT_MAX = 0.01, 1000.0


@dataclass(frozen=True, slots=True)
class Tenant:
    """An authenticated client. The default tenant has no salt."""

    name: str
    salt: bytes
    weight: float = 1.0
    """Its share of a busy worker, relative to other tenants."""


DEFAULT_TENANT = Tenant("default", b"")


def tenant(name: str, weight: float = 1.0) -> Tenant:
    """The tenant of this name, with its salt."""
    digest = hashlib.blake2b(name.encode(), digest_size=SALT_BYTES, person=b"kvasir-tenant")
    return Tenant(name, digest.digest(), weight)


class Tenants:
    """The key file, or the one default tenant without it."""

    def __init__(self, by_key: Mapping[bytes, Tenant] | None) -> None:
        self._by_key = by_key

    @classmethod
    def load(cls, path: Path | None) -> "Tenants":
        """Reads lines `KEY TENANT [WEIGHT]`; empty lines and those that begin with # do not count.

        Raises:
            ValueError: a line is malformed, a key occurs twice or a tenant has two weights; the
                key itself is not shown.
        """
        if path is None:
            return cls(None)
        by_key: dict[bytes, Tenant] = {}
        weights: dict[str, float] = {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) not in (2, 3) or _digest(words[0]) in by_key:
                raise ValueError(
                    f"{path}:{number}: not `KEY TENANT [WEIGHT]`, or a key given twice"
                )
            weight = _weight(words[2] if len(words) == 3 else "1", f"{path}:{number}")
            if weights.setdefault(words[1], weight) != weight:
                raise ValueError(f"{path}:{number}: {words[1]} has another weight above")
            by_key[_digest(words[0])] = tenant(words[1], weight)
        return cls(by_key)

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant behind an Authorization header.

        Raises:
            KvasirError: UNAUTHENTICATED.
        """
        if self._by_key is None:
            return DEFAULT_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        found = self._by_key.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if found is None:
            raise KvasirError(
                Reason.UNAUTHENTICATED, "a valid key is needed: Authorization: Bearer KEY"
            )
        return found


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not WEIGHT_MIN <= weight <= WEIGHT_MAX:
        raise ValueError(f"{where}: a weight is a number from {WEIGHT_MIN} to {WEIGHT_MAX}")
    return weight


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=32).digest()
