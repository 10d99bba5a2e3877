"""Who leads: one process at a time, soon after the other is gone, and no write after the lease."""

import asyncio
import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_operator import leader
from kvasir_operator.cluster import KubeCluster
from kvasir_operator.core import lease as rules
from kvasir_operator.core.manifests import Manifest, Ref
from kvasir_operator.errors import ClusterError
from kvasir_operator.leader import Elector

LEASE = Ref("Lease", "system", "kvasir-operator")


class FakeLeases:
    """One lease with optimistic locking, as the API server keeps it."""

    def __init__(self) -> None:
        self.lease: Manifest | None = None
        self.is_away = False
        self.version = 0
        self.num_reads = 0

    async def get(self, ref: Ref) -> Manifest | None:
        """See Leases."""
        assert ref == LEASE
        self._answer()
        self.num_reads += 1
        return copy.deepcopy(self.lease)

    async def put(self, manifest: Manifest) -> Manifest:
        """See Leases."""
        self._answer()
        live = self.lease["metadata"]["resourceVersion"] if self.lease else None
        if manifest["metadata"].get("resourceVersion") != live:
            raise ClusterError(409, "Conflict", "the object has been modified")
        self.version += 1
        self.lease = copy.deepcopy(manifest)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return copy.deepcopy(self.lease)

    def _answer(self) -> None:
        if self.is_away:
            raise ClusterError(0, "Away", "no answer")


def make_elector(leases: FakeLeases, name: str) -> Elector:
    return Elector(leases, namespace="system", identity=name)


async def test_only_one_of_two_candidates_leads() -> None:
    leases = FakeLeases()
    a, b = make_elector(leases, "a"), make_elector(leases, "b")
    await a.campaign()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(b.campaign(), 0.05)
    assert (a.left_s() > 0, b.left_s(), b.holder) == (True, 0.0, "a")


async def test_a_lease_that_is_given_back_is_taken_at_once() -> None:
    leases = FakeLeases()
    a, b = make_elector(leases, "a"), make_elector(leases, "b")
    await a.campaign()
    await a.give_back()
    assert a.left_s() == 0.0
    await asyncio.wait_for(b.campaign(), 1)
    assert leases.lease is not None
    assert leases.lease["spec"]["leaseTransitions"] == 1


async def test_leader_that_cannot_renew_ends_before_the_lease_can_be_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rules, "DURATION_S", 0.5)
    monkeypatch.setattr(rules, "WRITE_MARGIN_S", 0.2)
    monkeypatch.setattr(rules, "RENEW_INTERVAL_S", 0.05)
    monkeypatch.setattr(rules, "RETRY_INTERVAL_S", 0.01)
    leases = FakeLeases()
    a, b = make_elector(leases, "a"), make_elector(leases, "b")
    await a.campaign()
    with pytest.raises(TimeoutError):  # b sees the lease of a
        await asyncio.wait_for(b.campaign(), 0.02)
    loop = asyncio.get_running_loop()

    class Away:
        get = staticmethod(_no_answer)
        put = staticmethod(_no_answer)

    monkeypatch.setattr(a, "_leases", Away())
    ended_s: dict[str, float] = {}

    async def note(name: str, call: "asyncio.Future[None] | asyncio.Task[None]") -> None:
        await call
        ended_s[name] = loop.time()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(note("lost", asyncio.ensure_future(a.keep())))
        tasks.create_task(note("taken", asyncio.ensure_future(b.campaign())))
    assert ended_s["lost"] < ended_s["taken"]
    assert a.left_s() == 0.0


async def _no_answer(*_: object) -> Manifest:
    raise ClusterError(0, "Away", "no answer")


async def test_leader_whose_lease_was_taken_stops_at_once() -> None:
    leases = FakeLeases()
    a = make_elector(leases, "a")
    await a.campaign()
    assert leases.lease is not None
    leases.lease["spec"]["holderIdentity"] = "b"
    leases.lease["metadata"]["resourceVersion"] = "99"
    await asyncio.wait_for(a.keep(), rules.RENEW_INTERVAL_S + rules.RETRY_INTERVAL_S + 5)
    assert a.left_s() == 0.0


async def test_a_renewal_is_one_call() -> None:
    leases = FakeLeases()
    a = make_elector(leases, "a")
    await a.campaign()
    leases.num_reads = 0
    assert await a._try_claim()
    assert leases.num_reads == 0
    leases.is_away = True
    assert not await a._try_claim()
    leases.is_away = False
    assert await a._try_claim()
    assert leases.num_reads == 1, "after a failure the lease is read again"


async def test_nothing_is_written_without_the_lease() -> None:
    cluster = KubeCluster(timeout_s=1, write_left_s=lambda: 0.0)
    service = {"kind": "Service", "metadata": {"name": "x", "namespace": "ns"}}
    with pytest.raises(ClusterError, match="NotLeading"):
        await cluster._send(None, _write_of(service))  # type: ignore[arg-type]


def _write_of(service: Manifest) -> object:
    from kvasir_operator.cluster import _Request

    return _Request("apply", "Service", "PATCH", "/x", body=service)


def test_takeover_is_within_fifteen_seconds() -> None:
    start_s = 1.5
    assert rules.DURATION_S + rules.RETRY_INTERVAL_S + start_s < 15
    assert rules.WRITE_MARGIN_S > 0
    attempts_s = rules.RENEW_INTERVAL_S + leader.CLAIM_TIMEOUT_S + rules.RETRY_INTERVAL_S
    assert attempts_s < rules.DURATION_S - rules.WRITE_MARGIN_S, "one attempt may fail"


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.floats(0, 9), st.booleans()), max_size=60
    )
)
def test_two_processes_never_may_write_at_the_same_time(
    steps: list[tuple[str, float, bool]],
) -> None:
    """Any order of readings and claims, with claims that fail to arrive."""
    now_s = 0.0
    lease: Manifest = rules.new_lease(LEASE)
    seen: dict[str, rules.Seen | None] = {"a": None, "b": None}
    until_s = {"a": 0.0, "b": 0.0}
    for name, pause_s, is_lost in steps:
        now_s += pause_s
        seen[name] = known = rules.observe(seen[name], lease, now_s=now_s)
        if rules.may_take(known, identity=name, now_s=now_s) and not is_lost:
            lease = rules.claim(lease, identity=name, now_ms=int(now_s * 1000))
            seen[name] = rules.observe(known, lease, now_s=now_s)
            until_s[name] = now_s + rules.DURATION_S - rules.WRITE_MARGIN_S
            other = "b" if name == "a" else "a"
            assert until_s[other] <= now_s
