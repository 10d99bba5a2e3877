"""Offers of full blocks to the KV tier; the tier sends them in the background.

Decides what is offered: what a finished request leaves in the cache and, in a drain, all that the
cache holds of requests, the newest chains first. Blocks of one chain go to one node, so a block is
offered under its chain's head. Invariant: none is offered without its tenant, which quotas count
by; a block of no request (the canary's) is not offered.
"""

from collections.abc import Sequence

from kvasir_kvstore.core.block import tenant_of
from kvasir_kvstore.core.cache import Origin

from kvasir_engine.worker.chunks import Message, names_salt
from kvasir_engine.worker.host import Host, Serving, proto_layout

NAMES_PER_OFFER = 256
NAMES_KNOWN_MAX = 1 << 20


class Offers:
    """What one worker offers."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._origins: dict[bytes, Origin] = {}
        """Of names that requests have used; forgotten with the blocks."""
        self._offered_in_drain: set[bytes] = set()

    def begun(self, message: Message) -> None:
        """Notes whose blocks the prompt's are, whatever becomes of the request."""
        self._note(message, message.token_ids)

    async def ended(self, message: Message, produced: Sequence[int] = ()) -> None:
        """Offers what the request leaves; what was blended of chunks goes in a drain alone."""
        token_ids = [*message.token_ids, *produced]
        self._note(message, token_ids)
        await self.add(token_ids, tenant_salt=message.tenant_salt)

    async def add(self, token_ids: Sequence[int], *, tenant_salt: bytes) -> None:
        """Offers the full blocks of these tokens that are held here."""
        serving = self._host.served()
        if serving.tier is None:
            return
        chain = serving.names(token_ids, tenant_salt=tenant_salt)
        is_held = serving.engine.holds(chain)
        held = [name for name, holds in zip(chain, is_held, strict=True) if holds]
        if held:
            origin = Origin(tenant=tenant_of(tenant_salt), chain_head=chain[0])
            self._remember(held, origin)
            for start in range(0, len(held), NAMES_PER_OFFER):
                await self._offer(serving, held[start : start + NAMES_PER_OFFER], origin)

    async def advance_held(self) -> int:
        """Offers more of what is held, as far as the tier takes it; blocks still to go."""
        serving = self._host.serving
        if serving is None or serving.tier is None or not serving.tier.healthy:
            return 0
        room = self._host.settings.offer_blocks_max - serving.tier.num_offers_pending
        known = [name for name in self._host.hub.held if name in self._origins]
        left = [name for name in known if name not in self._offered_in_drain]
        for names in self._chains(left):
            part = names[: min(room, NAMES_PER_OFFER)]
            if not part:
                break
            await self._offer(serving, part, self._origins[part[0]])
            self._offered_in_drain.update(part)
            room -= len(part)
        num_offered = sum(name in self._offered_in_drain for name in left)
        return len(left) - num_offered + serving.tier.num_offers_pending

    def _chains(self, names: Sequence[bytes]) -> list[list[bytes]]:
        """The names by chain, parents first; the chain stored last comes first."""
        chains: dict[bytes, list[bytes]] = {}
        for name in names:
            head = self._origins[name].chain_head
            chain = chains.pop(head, [])
            chain.append(name)
            chains[head] = chain
        return list(reversed(chains.values()))

    async def _offer(self, serving: Serving, names: list[bytes], origin: Origin) -> None:
        assert serving.tier is not None
        await serving.tier.offer(
            names,
            self._host.address,
            proto_layout(serving.layout),
            chain_head=origin.chain_head,
            tenant=origin.tenant,
        )
        self._host.metrics.blocks_offered.inc(len(names))

    def _note(self, message: Message, token_ids: Sequence[int]) -> None:
        """The names are those under which the blocks lie, also those of an approximation."""
        serving = self._host.served()
        if serving.tier is None:
            return
        names = serving.names(token_ids, tenant_salt=names_salt(message))
        if names:
            tenant = tenant_of(message.tenant_salt)
            self._remember(names, Origin(tenant=tenant, chain_head=names[0]))

    def _remember(self, names: list[bytes], origin: Origin) -> None:
        self._origins.update(dict.fromkeys(names, origin))
        if len(self._origins) > NAMES_KNOWN_MAX:
            held = self._host.hub.held
            self._origins = {name: of for name, of in self._origins.items() if name in held}
