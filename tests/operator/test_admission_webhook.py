"""The validating webhook: its verdicts, its certificates, and their rotation."""

import asyncio
import base64
import ssl
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from kvasir_operator.core.admission import references_of, review
from kvasir_operator.core.manifests import Manifest, Ref, ref_of
from kvasir_operator.errors import ClusterError
from operator_builders import make_decode_pool, make_service, make_stateful_set

pytest.importorskip("cryptography", reason="the webhook's certificates need cryptography")
from kvasir_operator.certificates import (
    LIFETIME,
    ROTATE_BEFORE,
    is_good_for,
    make_bundle,
    utc_now,
)
from kvasir_operator.webhook import AUTHORITIES, CERTIFICATE, Webhook

CLAIM = Ref("PersistentVolumeClaim", "default", "models")
SECRET = Ref("Secret", "system", "hook")
SERVICE = Ref("Service", "system", "hook")
CONFIGURATION = Ref("ValidatingWebhookConfiguration", "", "system-hook")
NAME = "hook.system.svc"


def make_pvc_service() -> Manifest:
    source = {"pvc": {"claimName": "models"}}
    return make_service(model={"name": "tiny", "source": source})


def test_names_of_others_are_refused() -> None:
    foreign = make_stateful_set("chat-router", replicas=1) | {"kind": "Deployment"}
    foreign["metadata"]["ownerReferences"] = []
    verdict = review(make_service(), {ref_of(foreign): foreign})
    assert "Deployment chat-router exists" in verdict.refusal


def test_own_children_and_those_of_a_namesake_that_goes_are_no_conflict() -> None:
    own = make_stateful_set("chat-router", replicas=1) | {"kind": "Deployment"}
    own["metadata"]["ownerReferences"] = [{"uid": "uid-of-chat", "controller": True}]
    assert not review(make_service(), {ref_of(own): own}).refusal
    reference = {"uid": "before", "controller": True, "kind": "ModelService", "name": "chat"}
    own["metadata"]["ownerReferences"] = [reference]
    assert not review(make_service(), {ref_of(own): own}).refusal


def test_a_missing_volume_is_a_warning_only() -> None:
    service = make_pvc_service()
    assert CLAIM in references_of(service)
    verdict = review(service, {})
    assert (verdict.refusal, len(verdict.warnings)) == ("", 1)
    claim = {"kind": CLAIM.kind, "metadata": {"name": "models", "namespace": "default"}}
    assert review(service, {CLAIM: claim}).warnings == ()
    assert review(make_decode_pool(), {}).warnings == ()


def test_certificates_are_good_until_they_are_to_be_rotated() -> None:
    now = utc_now()
    made = make_bundle(NAME, now=now)
    assert is_good_for(made.certificate, NAME, now=now)
    assert not is_good_for(made.certificate, "other.system.svc", now=now)
    rotate_at = now + LIFETIME - ROTATE_BEFORE
    assert is_good_for(made.certificate, NAME, now=rotate_at - timedelta(seconds=2))
    assert not is_good_for(made.certificate, NAME, now=rotate_at + timedelta(seconds=2))
    assert not is_good_for(b"nonsense", NAME, now=now)


class FakeObjects:
    """Objects by reference, with or without an answer."""

    def __init__(self) -> None:
        self.objects: dict[Ref, Manifest] = {
            SERVICE: {"kind": "Service", "metadata": {"name": "hook", "uid": "uid-of-hook"}},
            CONFIGURATION: {
                "kind": CONFIGURATION.kind,
                "metadata": {"name": CONFIGURATION.name, "resourceVersion": "1"},
                "webhooks": [{"clientConfig": {}}],
            },
        }
        self.num_writes = 0
        self.is_away = False

    async def get(self, ref: Ref) -> Manifest | None:
        """See Objects."""
        if self.is_away:
            raise ClusterError(0, "Away", "no answer")
        return self.objects.get(ref)

    async def put(self, manifest: Manifest) -> Manifest:
        """See Objects."""
        self.num_writes += 1
        self.objects[ref_of(manifest)] = manifest
        return manifest

    def data(self, key: str) -> bytes:
        """One entry of the Secret."""
        return base64.b64decode(self.objects[SECRET]["data"][key])


@pytest.fixture
def objects() -> FakeObjects:
    return FakeObjects()


def make_webhook(objects: FakeObjects) -> Webhook:
    return Webhook(objects, namespace="system", service="hook")


async def test_certificates_are_made_once_and_told_to_the_api_server(objects: FakeObjects) -> None:
    await make_webhook(objects)._renew()
    assert objects.num_writes == 2
    [owner] = objects.objects[SECRET]["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("Service", "uid-of-hook"), "it goes with the chart"
    [hook] = objects.objects[CONFIGURATION]["webhooks"]
    assert base64.b64decode(hook["clientConfig"]["caBundle"]) == objects.data(AUTHORITIES)
    await make_webhook(objects)._renew()
    assert objects.num_writes == 2, "a second look writes nothing"


async def test_nothing_is_made_without_a_configuration(objects: FakeObjects) -> None:
    """The chart is being uninstalled: a Secret made now would stay."""
    del objects.objects[CONFIGURATION]
    assert not await make_webhook(objects)._renew()
    assert objects.num_writes == 0


async def test_a_rotation_keeps_the_authority_before_trusted(
    objects: FakeObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_webhook(objects)._renew()
    first = objects.data(AUTHORITIES)
    later = utc_now() + LIFETIME
    monkeypatch.setattr("kvasir_operator.webhook.utc_now", lambda: later)
    await make_webhook(objects)._renew()
    assert objects.data(AUTHORITIES).endswith(first)
    assert objects.data(AUTHORITIES).count(b"BEGIN CERTIFICATE") == 2
    much_later = later + LIFETIME
    monkeypatch.setattr("kvasir_operator.webhook.utc_now", lambda: much_later)
    await make_webhook(objects)._renew()
    assert objects.data(AUTHORITIES).count(b"BEGIN CERTIFICATE") == 2, "the oldest is dropped"
    assert is_good_for(objects.data(CERTIFICATE), NAME, now=much_later)


async def test_an_answer_over_tls_that_the_authority_vouches_for(
    objects: FakeObjects, unused_tcp_port: int
) -> None:

    webhook = make_webhook(objects)
    await webhook._renew()
    serving = asyncio.create_task(webhook.serve_forever(host="127.0.0.1", port=unused_tcp_port))
    trust = ssl.create_default_context(cadata=objects.data(AUTHORITIES).decode())
    foreign = make_stateful_set("chat-router", replicas=1) | {"kind": "Deployment"}
    foreign["metadata"]["ownerReferences"] = []

    async def ask() -> Any:
        body = {"request": {"uid": "u", "object": make_pvc_service()}}
        url = f"https://localhost:{unused_tcp_port}/validate"
        async with aiohttp.ClientSession() as session, asyncio.timeout(20):
            while True:
                try:
                    async with session.post(url, json=body, ssl=trust) as response:
                        return (await response.json())["response"]
                except aiohttp.ClientConnectorError:
                    await asyncio.sleep(0.05)

    try:
        passed = await ask()
        assert (passed["uid"], passed["allowed"]) == ("u", True)
        assert "does not exist" in passed["warnings"][0]
        objects.objects[ref_of(foreign)] = foreign
        refused = await ask()
        assert refused["allowed"] is False
        assert "chat-router" in refused["status"]["message"]
        objects.is_away = True
        unknown = await ask()
        assert unknown["allowed"] is True
        assert "could not check" in unknown["warnings"][0]
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
