"""The fleet as this router sees it: members come and go, a view is there for every decision.

Owns the view that the core reads. A report of a worker changes its entry alone; only when somebody
joins, leaves or becomes another's like are all members judged anew. Which worker serves a request
is left to the core.
"""

import asyncio
import time
from collections.abc import Sequence

from kvasir_proto.links import Links
from kvasir_proto.v1 import common_pb2, worker_pb2

from kvasir_router.core.fleet import FleetView, Policy, Request
from kvasir_router.core.keys import KeyLimits, KeyTree
from kvasir_router.core.ledger import Ledger
from kvasir_router.core.prefix import PrefixView
from kvasir_router.membership import eligible
from kvasir_router.membership.discovery import follow_targets
from kvasir_router.membership.member import Member
from kvasir_router.membership.stores import Stores
from kvasir_router.settings import RouterSettings


def now_ms() -> int:
    """The clock that the core is driven with."""
    return time.monotonic_ns() // 1_000_000


class Fleet:
    """Members by target, and what was learned from them."""

    def __init__(
        self,
        settings: RouterSettings,
        links: Links,
        *,
        replica: bytes,
        key_limits: KeyLimits | None = None,
    ) -> None:
        """`replica`: names this life of this router to the others."""
        self._settings, self._links = settings, links
        self._members: dict[str, Member] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup
        self._prefix = PrefixView(blocks_max=settings.blocks_known_max)
        self._keys = KeyTree(key_limits, replica=replica)
        self.ledger = Ledger()
        self._view = FleetView(
            prefix=self._prefix,
            keys=self._keys,
            ledger=self.ledger,
            policy=Policy(local_prefill_tokens_max=settings.local_prefill_tokens_max),
        )
        self.stores = Stores(
            settings.kv_nodes,
            self._view,
            links=links,
            interval_ms=settings.resolve_interval_ms,
            silence_timeout_ms=settings.silence_timeout_ms,
        )
        self._stale = False  # members must be judged anew
        self._likeness: dict[str, object] = {}  # target -> what its judgement depends on
        self._context_length: int | None = None
        self._by_name: dict[str, Member] = {}
        self._problems: dict[str, str] = {}
        self._changed = asyncio.Event()
        self.fingerprint: bytes | None = None

    async def run(self) -> None:
        """Follows all members and KV nodes until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            self._group.create_task(self.stores.run(), name="KV nodes")
            await follow_targets(
                self._settings.workers,
                interval_ms=self._settings.resolve_interval_ms,
                on_targets=self._set_targets,
            )

    def _set_targets(self, wanted: frozenset[str]) -> None:
        for target in self._members.keys() - wanted:
            self._tasks.pop(target).cancel()
            self._forget(self._members.pop(target))
        for target in sorted(wanted - self._members.keys()):
            silence_ms = self._settings.silence_timeout_ms
            member = Member(target, self, links=self._links, silence_timeout_ms=silence_ms)
            self._members[target] = member
            self._tasks[target] = self._group.create_task(member.run(), name=f"watch {target}")
        self._touch()

    def on_event(self, member: Member, event: worker_pb2.WorkerEvent) -> None:
        """Learns from a member's event."""
        if member.description is not None and member.description.blocks_unannounced:
            if event.snapshot:  # its cache is imitated from now on, see `routed`
                self._prefix.forget(member.name)
        elif event.snapshot:
            self._prefix.snapshot(member.name, event.stored)
        else:
            self._prefix.removed(member.name, event.removed)
            self._prefix.stored(member.name, event.stored)
        if event.HasField("description"):
            self.ledger.reported(member.name, now_ms=now_ms())
            self._on_report(member)

    def _on_report(self, member: Member) -> None:
        about, likeness = member.description, eligible.likeness(member)
        if self._stale or about is None or self._likeness.get(member.target) != likeness:
            self._likeness[member.target] = likeness
            self._touch()
            return
        if self._by_name.get(member.name) is member and not self._problems[member.name]:
            self._view.put(eligible.state_of(about), now_ms=now_ms())
        self._tell()

    def on_lost(self, member: Member) -> None:
        """Takes a member out of the rings."""
        self._likeness.pop(member.target, None)
        if not self._has_namesake(member):
            self.ledger.forget(member.name)
        self._touch()

    def on_forgotten(self, member: Member) -> None:
        """Forgets a member's blocks."""
        if not self._has_namesake(member):
            self._prefix.forget(member.name)

    def _forget(self, member: Member) -> None:
        self.on_lost(member)
        self.on_forgotten(member)

    def _has_namesake(self, member: Member) -> bool:
        return any(m is not member and m.name == member.name for m in self._members.values())

    def _touch(self) -> None:
        self._stale = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Returns at the next change of any member."""
        await self._changed.wait()

    def view(self) -> FleetView:
        """What a decision looks at; always the same object, brought up to date."""
        if self._stale:
            self._judge()
            self._stale = False
        return self._view

    def _judge(self) -> None:
        name = self._settings.model_name
        self._by_name = eligible.newest_by_name(self._members.values())
        members = self._by_name.values()
        self.fingerprint = eligible.majority_fingerprint(members, model_name=name)
        self._problems = {
            m.name: eligible.problem_of(m, model_name=name, fingerprint=self.fingerprint)
            for m in members
        }
        abouts = [m.description for m in members if m.description and not self._problems[m.name]]
        for gone in self._view.workers.keys() - {about.address.name for about in abouts}:
            self._view.remove(gone)
        for about in abouts:
            self._view.put(eligible.state_of(about), now_ms=now_ms())
        self._context_length = min((about.context_length for about in abouts), default=None)

    def observe(self, request: Request) -> None:
        """Counts a request into the shares by which keys are extended."""
        num_workers = len(self.view().rings.members)
        self._keys.observe(request.names, num_workers=num_workers, now_ms=now_ms())

    def address(self, worker: str) -> common_pb2.PeerAddress:
        """Where a worker of the current view is reached."""
        self.view()
        about = self._by_name[worker].description
        assert about is not None, worker
        return about.address

    async def hand_back(self, worker: str, request_ids: Sequence[str], *, timeout_s: float) -> int:
        """Asks a worker to hand requests back; returns how many it did.

        Raises:
            AioRpcError: it cannot be asked now.
        """
        member = self._by_name.get(worker)
        return await member.hand_back(request_ids, timeout_s=timeout_s) if member else 0

    def member(self, worker: str) -> Member | None:
        """The member of this name, if it may be given requests."""
        self.view()
        return None if self._problems.get(worker, "unknown") else self._by_name.get(worker)

    def routed(self, request: Request, worker: str) -> None:
        """A prompt goes to a worker: its blocks will be there, if it does not say so itself."""
        member = self._by_name.get(worker)
        about = member.description if member else None
        if about is not None and about.blocks_unannounced:
            self._prefix.routed(
                worker, request.names, now_ms=now_ms(), blocks_max=about.load.blocks_total
            )

    def is_lost(self, worker: str) -> bool:
        """Whether a member is unreachable. Who has left the fleet may still finish its streams."""
        self.view()
        member = self._by_name.get(worker)
        return member is not None and not member.reachable

    def context_length(self) -> int | None:
        """Tokens that every worker of the view can hold; None while there is none."""
        self.view()
        return self._context_length

    def problems(self) -> list[str]:
        """What keeps the router from serving; empty: it can."""
        workers = self.view().workers.values()
        missing = []
        if not any(w.can_prefill for w in workers):
            missing.append("no prefill-capable worker is ready")
        if not any(w.can_decode for w in workers):
            missing.append("no decode-capable worker is ready")
        return missing

    def degraded(self) -> list[str]:
        """What is wrong with single workers and KV nodes."""
        self.view()
        faults = [f"worker {name}: {p}" for name, p in sorted(self._problems.items()) if p]
        for name, member in sorted(self._by_name.items()):
            about = member.description
            if member.reachable and about and not about.kv_transfer_healthy:
                faults.append(f"worker {name}: KV transfer fails: {about.kv_transfer_error}")
        return [*faults, *self.stores.degraded()]

    def members(self) -> list[tuple[Member, str]]:
        """Every member and why it is not routed to, by name."""
        self.view()
        return [(m, self._problems[name]) for name, m in sorted(self._by_name.items())]
