"""Certificates of services: when they are made and rotated, and that no two pods ever disagree."""

import base64
import itertools
import ssl
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_operator.certificates import make_bundle
from kvasir_operator.core.conditions import Problem, Reason
from kvasir_operator.core.manifests import Manifest, Owner, Ref
from kvasir_operator.core.plan import LinkSecrets
from kvasir_operator.core.secrets import (
    DAY_MS,
    ROTATE_BEFORE_MS,
    SETTLE_MS,
    Leaf,
    SecretView,
    Step,
    next_step,
)
from kvasir_operator.errors import ClusterError
from kvasir_operator.secrets import SecretKeeper, view_of
from kvasir_proto.links import AUTHORITIES, CERTIFICATE, KEY, Links
from operator_builders import FakeCluster, condition_of, make_object, make_service
from test_reconcile import make_reconciler

NAME = "chat.default.kvasir.internal"
LIFETIME_MS = 90 * DAY_MS
NOW_MS = 1_000 * DAY_MS
OWNER = Owner("kvasir.dev/v1alpha1", "ModelService", "default", "chat", "uid-of-chat")
OWN, THEIRS = LinkSecrets("chat-kvasir-tls", True, ""), LinkSecrets("chat-kvasir-tls", False, "")
REF = Ref("Secret", "default", "chat-kvasir-tls")
GOOD = SecretView(
    leaf=Leaf(NAME, "a", NOW_MS + LIFETIME_MS), authorities=frozenset("a"), stepped_ms=0
)
EXPIRING = Leaf(NAME, "a", NOW_MS + ROTATE_BEFORE_MS)
NEXT = Leaf(NAME, "b", NOW_MS + LIFETIME_MS)


@pytest.mark.parametrize(
    ("secret", "step"),
    {
        "nothing there": (SecretView(), Step.MAKE),
        "good": (GOOD, Step.KEEP),
        "another name": (replace(GOOD, leaf=replace(GOOD.leaf, name="other")), Step.MAKE),
        "expired": (replace(GOOD, leaf=replace(GOOD.leaf, expires_ms=NOW_MS)), Step.MAKE),
        "authority lost": (replace(GOOD, authorities=frozenset("b")), Step.MAKE),
        "expires soon": (replace(GOOD, leaf=EXPIRING), Step.PREPARE),
        "prepared, not settled": (
            SecretView(EXPIRING, NEXT, frozenset("ab"), NOW_MS - SETTLE_MS + 1),
            Step.KEEP,
        ),
        "prepared and settled": (
            SecretView(EXPIRING, NEXT, frozenset("ab"), NOW_MS - SETTLE_MS),
            Step.CHANGE,
        ),
        "next is not trusted": (SecretView(EXPIRING, NEXT, frozenset("a")), Step.PREPARE),
        "changed, not settled": (SecretView(NEXT, None, frozenset("ab"), NOW_MS - 1), Step.KEEP),
        "changed and settled": (SecretView(NEXT, None, frozenset("ab"), 0), Step.FORGET),
    }.values(),
    ids=str,
)
def test_step_that_is_due(secret: SecretView, step: Step) -> None:
    assert next_step(secret, name=NAME, now_ms=NOW_MS) is step


def take(step: Step, secret: SecretView, *, now_ms: int, fresh: str) -> SecretView:
    """What the keeper does, on views."""
    made = Leaf(NAME, fresh, now_ms + LIFETIME_MS)
    if step is Step.MAKE:
        return SecretView(made, None, secret.authorities | {fresh}, now_ms)
    if step is Step.PREPARE:
        return SecretView(secret.leaf, made, secret.authorities | {fresh}, now_ms)
    if step is Step.CHANGE:
        return SecretView(secret.upcoming, None, secret.authorities, now_ms)
    assert step is Step.FORGET
    assert secret.leaf is not None
    return SecretView(secret.leaf, None, frozenset({secret.leaf.authority}), now_ms)


def accepts(one: SecretView, other: SecretView) -> bool:
    return other.leaf is not None and other.leaf.authority in one.authorities


@given(
    st.lists(st.integers(1, 40 * DAY_MS), min_size=5, max_size=40),
    st.lists(st.integers(0, SETTLE_MS - 1), min_size=2, max_size=4),
)
def test_pods_that_lag_accept_one_another_through_every_rotation(
    pauses_ms: list[int], lags_ms: list[int]
) -> None:
    """The operator looks at any times; each pod sees the Secret as it was a while ago."""
    now_ms, secret, fresh = NOW_MS, SecretView(), map(str, itertools.count())
    history: list[tuple[int, SecretView]] = []
    for pause_ms in pauses_ms:
        for _ in range(4):  # looks while a rotation is under way
            step = next_step(secret, name=NAME, now_ms=now_ms)
            if step is not Step.KEEP:
                was_serving = step is not Step.MAKE
                secret = take(step, secret, now_ms=now_ms, fresh=next(fresh))
                history = [*history, (now_ms, secret)] if was_serving else [(now_ms, secret)]
            assert next_step(secret, name=NAME, now_ms=now_ms) is Step.KEEP
            for look_ms in (now_ms, now_ms + 1, now_ms + SETTLE_MS - 1):
                seen = [_as_of(history, look_ms - lag_ms) for lag_ms in lags_ms]
                assert all(accepts(*pair) for pair in itertools.permutations(seen, 2))
            now_ms += SETTLE_MS
        now_ms += pause_ms


def _as_of(history: list[tuple[int, SecretView]], look_ms: int) -> SecretView:
    return next((s for at, s in reversed(history) if at <= look_ms), history[0][1])


class Clock:
    """Begins two months ago: at the end, all certificates are valid at the real time."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC) - timedelta(days=61)

    def __call__(self) -> datetime:
        return self.now


def data_of(secret: Manifest) -> dict[str, bytes]:
    return {name: base64.b64decode(value) for name, value in secret["data"].items()}


async def test_secret_is_made_once_and_belongs_to_its_service() -> None:
    cluster = FakeCluster()
    keeper = SecretKeeper(cluster)
    assert await keeper.keep(OWNER, OWN) == ([], 1)
    assert await keeper.keep(OWNER, OWN) == ([], 0)
    secret = cluster.objects[REF]
    assert secret["type"] == "kubernetes.io/tls"
    assert secret["metadata"]["ownerReferences"][0]["uid"] == OWNER.uid
    assert sorted(secret["data"]) == [AUTHORITIES, CERTIFICATE, KEY]
    view = view_of(data_of(secret), stepped="")
    assert view.leaf is not None
    assert view.leaf.name == NAME
    assert view.authorities == {view.leaf.authority}


async def test_rotation_takes_three_steps_between_which_all_pods_talk(tmp_path: Path) -> None:
    cluster, clock = FakeCluster(), Clock()
    keeper = SecretKeeper(cluster, clock=clock)
    await keeper.keep(OWNER, OWN)
    versions = [data_of(cluster.objects[REF])]
    clock.now += timedelta(days=60, minutes=1)
    for _ in range(3):
        assert (await keeper.keep(OWNER, OWN))[1] == 1
        assert (await keeper.keep(OWNER, OWN))[1] == 0
        versions.append(data_of(cluster.objects[REF]))
        clock.now += timedelta(milliseconds=SETTLE_MS)
    assert (await keeper.keep(OWNER, OWN))[1] == 0
    assert [sorted(set(v) - {CERTIFICATE, KEY, AUTHORITIES}) for v in versions] == [
        [],
        ["next.crt", "next.key"],
        [],
        [],
    ]
    assert versions[1][CERTIFICATE] == versions[0][CERTIFICATE] != versions[2][CERTIFICATE]
    assert versions[3][CERTIFICATE] == versions[2][CERTIFICATE]
    pods = [_pod(tmp_path / str(number), version) for number, version in enumerate(versions)]
    for one, other in itertools.pairwise(pods):
        assert shakes_hands(one, other)
        assert shakes_hands(other, one)
    assert not shakes_hands(pods[0], pods[3])


def _pod(folder: Path, data: dict[str, bytes]) -> Links:
    folder.mkdir()
    for name in (CERTIFICATE, KEY, AUTHORITIES):
        (folder / name).write_bytes(data[name])
    return Links(folder)


def shakes_hands(client: Links, server: Links) -> bool:
    """Whether a TLS handshake without a network comes to its end on both sides."""
    context, secure = server.server_context(), client.client_context()
    assert context is not None
    assert secure is not None
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        secure[0].wrap_bio(down, up, server_hostname=secure[1]),
        context.wrap_bio(up, down, server_side=True),
    ]
    try:
        for _ in range(4):
            for side in sides:
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLError:
        return False
    return sides[1].version() == "TLSv1.3" and sides[1].getpeercert() is not None


@pytest.mark.parametrize("broken", [CERTIFICATE, KEY, AUTHORITIES])
async def test_secret_that_cannot_serve_is_made_anew(broken: str) -> None:
    cluster = FakeCluster()
    keeper = SecretKeeper(cluster)
    await keeper.keep(OWNER, OWN)
    cluster.objects[REF]["data"][broken] = base64.b64encode(b"nonsense").decode()
    assert await keeper.keep(OWNER, OWN) == ([], 1)
    view = view_of(data_of(cluster.objects[REF]), stepped="")
    assert view.leaf is not None
    assert view.leaf.authority in view.authorities


def foreign(**data: bytes) -> Manifest:
    encoded = {name: base64.b64encode(value).decode() for name, value in data.items()}
    metadata = {"name": "chat-kvasir-tls", "namespace": "default", "uid": "theirs"}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": encoded}


async def test_secret_of_somebody_else_is_never_overwritten() -> None:
    cluster = FakeCluster()
    cluster.add(foreign())
    [problem], num_writes = await SecretKeeper(cluster).keep(OWNER, OWN)
    assert (problem.reason, num_writes) == (Reason.NAME_CONFLICT, 0)
    assert cluster.writes == []


def made_files(name: str = NAME, *, days_ago: int = 0) -> dict[str, bytes]:
    made = make_bundle(name, now=datetime.now(UTC) - timedelta(days=days_ago))
    return {CERTIFICATE: made.certificate, KEY: made.key, AUTHORITIES: made.ca}


@pytest.mark.parametrize(
    ("files", "words"),
    {
        "good": (made_files(), None),
        "another name": (made_files("anything.example"), None),
        "absent": (None, "does not exist"),
        "incomplete": ({**made_files(), AUTHORITIES: b""}, "lacks ca.crt"),
        "wrong key": ({**made_files(), KEY: made_files()[KEY]}, "not its key"),
        "expired": (made_files(days_ago=100), "expired"),
    }.values(),
    ids=["good", "another name", "absent", "incomplete", "wrong key", "expired"],
)
async def test_secret_of_a_certificate_manager_is_checked(
    files: dict[str, bytes] | None, words: str | None
) -> None:
    cluster = FakeCluster()
    if files is not None:
        cluster.add(foreign(**files))
    found: tuple[list[Problem], int] = await SecretKeeper(cluster).keep(OWNER, THEIRS)
    problems, num_writes = found
    assert num_writes == 0
    assert cluster.writes == []
    assert [p.reason for p in problems] == ([Reason.SECRET_INVALID] if words else [])
    assert words is None or words in problems[0].message


def test_nobody_keeps_the_key_of_an_authority() -> None:
    made: Any = make_bundle(NAME, now=datetime.now(UTC))
    assert made.ca.count(b"PRIVATE") == 0
    assert made.key.count(b"PRIVATE KEY-----") == 2


async def test_secret_that_the_api_server_refuses_is_a_condition() -> None:
    cluster = FakeCluster()
    cluster.add(make_service(security={"mtls": True}))
    cluster.refused[REF] = ClusterError(403, "Forbidden", "secrets is forbidden")
    await make_reconciler(cluster).reconcile(Ref("ModelService", "default", "chat"))
    status = cluster.objects[Ref("ModelService", "default", "chat")]["status"]
    degraded = condition_of(status, "Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "ApplyFailed")
    assert "Secret chat-kvasir-tls cannot be read or made" in degraded["message"]


async def test_key_of_kv_is_made_once_and_stays() -> None:
    cluster = FakeCluster()
    keeper = SecretKeeper(cluster)
    wanted = LinkSecrets("chat-kvasir-tls", True, "chat-kvasir-kv-key")
    assert await keeper.keep(OWNER, wanted) == ([], 2)
    key = Ref("Secret", "default", "chat-kvasir-kv-key")
    made = data_of(cluster.objects[key])
    assert len(base64.b64decode(made["kv.key"])) == 64  # hexadecimal
    assert await keeper.keep(OWNER, wanted) == ([], 0)
    assert cluster.objects[key]["metadata"]["ownerReferences"][0]["uid"] == OWNER.uid
    cluster.objects[key]["data"]["kv.key"] = base64.b64encode(b"short").decode()
    assert await keeper.keep(OWNER, wanted) == ([], 1)
    assert data_of(cluster.objects[key])["kv.key"] not in (made["kv.key"], b"short")


def selected(**spec: Any) -> Manifest:
    """A pool that stands alone and takes part in the service."""
    return make_object("PrefillPool", "l40", spec)


def owners_of(secret: Manifest) -> list[tuple[str, bool]]:
    references = secret["metadata"]["ownerReferences"]
    return [(r["name"], r.get("controller", False)) for r in references]


async def test_pools_that_stand_alone_keep_the_secrets_that_they_name() -> None:
    cluster = FakeCluster()
    keeper = SecretKeeper(cluster)
    wanted = LinkSecrets("chat-kvasir-tls", True, "chat-kvasir-kv-key")
    key = Ref("Secret", "default", "chat-kvasir-kv-key")
    pool = selected(tlsSecret="chat-kvasir-tls")
    assert await keeper.keep(OWNER, wanted) == ([], 2)
    certificate = data_of(cluster.objects[REF])
    assert await keeper.keep(OWNER, wanted, users=[pool]) == ([], 1)
    assert await keeper.keep(OWNER, wanted, users=[pool]) == ([], 0)
    assert owners_of(cluster.objects[REF]) == [("chat", True), ("l40", False)]
    assert owners_of(cluster.objects[key]) == [("chat", True)], "the pool does not name it"
    assert await keeper.keep(OWNER, wanted) == ([], 1), "selected no longer"
    assert owners_of(cluster.objects[REF]) == [("chat", True)]
    assert data_of(cluster.objects[REF]) == certificate


@pytest.mark.parametrize("is_collected", [True, False])
async def test_service_made_anew_takes_over_what_its_pools_kept(is_collected: bool) -> None:
    cluster = FakeCluster()
    keeper, users = SecretKeeper(cluster), [selected(tlsSecret="chat-kvasir-tls")]
    await keeper.keep(OWNER, OWN, users=users)
    kept = data_of(cluster.objects[REF])
    metadata = cluster.objects[REF]["metadata"]
    if is_collected:  # by Kubernetes: the reference to what is gone
        metadata["ownerReferences"] = metadata["ownerReferences"][1:]
    again = replace(OWNER, uid="another life")
    [problem], _ = await keeper.keep(again, OWN)
    assert problem.reason is Reason.NAME_CONFLICT, "no pool of its own keeps it"
    assert await keeper.keep(again, OWN, users=users) == ([], 1)
    assert data_of(cluster.objects[REF]) == kept
    references = cluster.objects[REF]["metadata"]["ownerReferences"]
    assert [r["uid"] for r in references] == ["another life", "uid-of-l40"]


async def test_secret_of_another_service_is_not_taken_over() -> None:
    cluster = FakeCluster()
    keeper, users = SecretKeeper(cluster), [selected(tlsSecret="chat-kvasir-tls")]
    other = replace(OWNER, name="other", uid="uid-of-other")
    await keeper.keep(other, OWN, users=users)
    [problem], num_writes = await keeper.keep(OWNER, OWN, users=users)
    assert (problem.reason, num_writes) == (Reason.NAME_CONFLICT, 0)


async def test_key_of_somebody_else_is_never_overwritten() -> None:
    cluster = FakeCluster()
    theirs = foreign()
    theirs["metadata"]["name"] = "chat-kvasir-kv-key"
    cluster.add(theirs)
    wanted = LinkSecrets("chat-kvasir-tls", True, "chat-kvasir-kv-key")
    [problem], num_writes = await SecretKeeper(cluster).keep(OWNER, wanted)
    assert (problem.reason, num_writes) == (Reason.NAME_CONFLICT, 1)
    assert [ref.name for _, ref in cluster.writes] == ["chat-kvasir-tls"]
