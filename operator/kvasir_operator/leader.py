"""Leader election by a Lease: of several operator processes one reconciles.

A leader that cannot renew stops writing before anyone else may take the lease: every write asks
`left_s` and is given up when that time is over. A lost lease ends the process; a stop gives the
lease back, so that the next leader need not wait for it to run out.
"""

import asyncio
import logging
import time
from typing import Protocol

from kvasir_operator.core import lease as rules
from kvasir_operator.core.manifests import Manifest, Ref
from kvasir_operator.errors import ClusterError

logger = logging.getLogger(__name__)

LEASE_NAME = "kvasir-operator"
CLAIM_TIMEOUT_S = 5.0  # of an attempt; an API server under load is slow rather than away


class Leases(Protocol):
    """What an election needs of a cluster. Calls raise ClusterError."""

    async def get(self, ref: Ref) -> Manifest | None:
        """The object, or None."""
        ...

    async def put(self, manifest: Manifest) -> Manifest:
        """Create the object, or replace it if it still has the resourceVersion it was read with."""
        ...


class Elector:
    """One candidate."""

    def __init__(self, leases: Leases, *, namespace: str, identity: str) -> None:
        self._leases = leases
        self._ref = Ref("Lease", namespace, LEASE_NAME)
        self._identity = identity
        self._seen: rules.Seen | None = None
        self._held: Manifest | None = None  # the lease as this process wrote it last
        self._renewed_at_s: float | None = None  # start of the last renewal that succeeded

    @property
    def holder(self) -> str:
        """Who led when the lease was last read."""
        return self._seen.holder if self._seen is not None else ""

    def left_s(self) -> float:
        """How long this process may still write without a further renewal; 0: not at all."""
        if self._renewed_at_s is None:
            return 0.0
        end_s = self._renewed_at_s + rules.DURATION_S - rules.WRITE_MARGIN_S
        return max(0.0, end_s - time.monotonic())

    async def campaign(self) -> None:
        """Return when this process leads."""
        while not await self._try_claim():  # noqa: ASYNC110 (nobody else tells)
            await asyncio.sleep(rules.RETRY_INTERVAL_S)
        logger.info("leading as %s", self._identity)

    async def keep(self) -> None:
        """Renew until the lease is lost; after a failure the next attempt follows soon."""
        pause_s = rules.RENEW_INTERVAL_S
        while self.left_s() > 0:
            await asyncio.sleep(min(pause_s, self.left_s()))
            is_renewed = await self._try_claim()
            if not is_renewed and self.holder != self._identity:
                break
            pause_s = rules.RENEW_INTERVAL_S if is_renewed else rules.RETRY_INTERVAL_S
        self._renewed_at_s = None
        logger.error("the lease %s is lost, its holder is %r", self._ref.name, self.holder)

    async def give_back(self) -> None:
        """Let another process lead at once; nothing may be written afterwards."""
        if self.left_s() <= 0:
            return
        self._renewed_at_s = None
        try:
            async with asyncio.timeout(CLAIM_TIMEOUT_S):
                lease = await self._leases.get(self._ref)
                if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
                    await self._leases.put(rules.give_back(lease, now_ms=_wall_ms()))
        except (ClusterError, TimeoutError) as error:
            logger.warning("the lease is not given back, it runs out: %s", error)

    async def _try_claim(self) -> bool:
        """One attempt to take or renew the lease; False: somebody else has it, or it failed."""
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(CLAIM_TIMEOUT_S):
                lease = self._held or await self._leases.get(self._ref)
                lease = lease or rules.new_lease(self._ref)
                self._seen = rules.observe(self._seen, lease, now_s=time.monotonic())
                if not rules.may_take(self._seen, identity=self._identity, now_s=time.monotonic()):
                    return False
                claimed = rules.claim(lease, identity=self._identity, now_ms=_wall_ms())
                self._held = await self._leases.put(claimed)
        except (ClusterError, TimeoutError) as error:
            self._held = None  # somebody may have written it meanwhile: read it again
            text = str(error) or f"no answer within {CLAIM_TIMEOUT_S:.0f} s"
            logger.info("the lease %s cannot be taken: %s", self._ref.name, text)
            return False
        self._seen = rules.observe(self._seen, self._held, now_s=time.monotonic())
        self._renewed_at_s = started_s
        return True


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
