"""The Secret of a service with the certificate that its parts show one another: made and rotated.

core/secrets.py decides the steps; here they are carried out. The Secret of somebody else, like
cert-manager, is only looked at.
"""

import base64
import logging
import secrets
from collections.abc import Callable
from datetime import datetime

from kvasir_proto.links import AUTHORITIES, CERTIFICATE, KEY

from kvasir_operator.certificates import make_bundle, read_authorities, read_leaf, utc_now
from kvasir_operator.cluster import Cluster
from kvasir_operator.core.conditions import Problem, Reason
from kvasir_operator.core.manifests import Manifest, Owner, Ref, child, is_owned_by
from kvasir_operator.core.plan import LinkSecrets
from kvasir_operator.core.pods import KV_KEY_FILE
from kvasir_operator.core.secrets import SecretView, Step, next_step
from kvasir_operator.core.service import service_pod_labels

logger = logging.getLogger(__name__)

NEXT_CERTIFICATE, NEXT_KEY = "next.crt", "next.key"  # not mounted into pods
KV_KEY_BYTES = 32
STEP_ANNOTATION = "kvasir.dev/certificate-step"  # when the latest step was taken
Data = dict[str, bytes]


class SecretKeeper:
    """Looks after the Secrets of services."""

    def __init__(self, cluster: Cluster, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._cluster, self._clock = cluster, clock

    async def keep(self, owner: Owner, wanted: LinkSecrets) -> tuple[list[Problem], int]:
        """Take the steps that are due; what is wrong, and the number of writes."""
        name, is_own = wanted.certificate, wanted.is_own
        problems, num_writes = await self._keep_certificate(owner, name, is_own=is_own)
        if wanted.kv_key:
            more, num_more = await self._keep_key(owner, wanted.kv_key)
            problems, num_writes = [*problems, *more], num_writes + num_more
        return problems, num_writes

    async def _keep_key(self, owner: Owner, name: str) -> tuple[list[Problem], int]:
        """A key stays: parts read it when they start, and those of two keys exchange no KV."""
        live = await self._cluster.fetch(Ref("Secret", owner.namespace, name))
        if live is not None and not is_owned_by(live, owner.uid):
            return [_taken_name(owner, name)], 0
        if len(_data(live).get(KV_KEY_FILE, b"")) >= KV_KEY_BYTES:
            return [], 0
        data = {KV_KEY_FILE: base64.b64encode(secrets.token_hex(KV_KEY_BYTES).encode())}
        await self._cluster.apply(_manifest(owner, name, data, live, kind="Opaque"))
        logger.info("made the key of the KV of %s/%s", owner.namespace, owner.name)
        return [], 1

    async def _keep_certificate(
        self, owner: Owner, name: str, *, is_own: bool
    ) -> tuple[list[Problem], int]:
        """`is_own`: the operator makes the Secret; else its owner does."""
        ref = Ref("Secret", owner.namespace, name)
        live = await self._cluster.fetch(ref)
        if not is_own:
            return _problems_of_foreign(ref, live, now=self._clock()), 0
        if live is not None and not is_owned_by(live, owner.uid):
            return [_taken_name(owner, name)], 0
        now, data = self._clock(), _data(live)
        dns_name = f"{owner.name}.{owner.namespace}.kvasir.internal"
        view = view_of(data, stepped=_annotation(live))
        step = next_step(view, name=dns_name, now_ms=int(now.timestamp() * 1000))
        if step is Step.KEEP:
            return [], 0
        data = taken(step, data, dns_name, now=now)
        manifest = _manifest(owner, name, data, live, kind="kubernetes.io/tls")
        stepped = now.isoformat(timespec="seconds")
        manifest["metadata"]["annotations"] = {STEP_ANNOTATION: stepped}
        await self._cluster.apply(manifest)
        logger.info("certificate of %s/%s: %s", owner.namespace, name, step.name.lower())
        return [], 1


def view_of(data: Data, *, stepped: str) -> SecretView:
    """What a Secret holds."""
    return SecretView(
        leaf=read_leaf(data.get(CERTIFICATE, b""), data.get(KEY, b"")),
        upcoming=read_leaf(data.get(NEXT_CERTIFICATE, b""), data.get(NEXT_KEY, b"")),
        authorities=frozenset(read_authorities(data.get(AUTHORITIES, b""))),
        stepped_ms=_time_ms(stepped),
    )


def taken(step: Step, data: Data, dns_name: str, *, now: datetime) -> Data:
    """The data after a step."""
    shown = {key: data[key] for key in (CERTIFICATE, KEY) if key in data}
    trusted = data.get(AUTHORITIES, b"")
    if step is Step.MAKE:
        made = make_bundle(dns_name, now=now)
        old = b"".join(read_authorities(trusted).values())  # pods may still show what it signed
        return {CERTIFICATE: made.certificate, KEY: made.key, AUTHORITIES: old + made.ca}
    if step is Step.PREPARE:
        made = make_bundle(dns_name, now=now)
        coming = {NEXT_CERTIFICATE: made.certificate, NEXT_KEY: made.key}
        return shown | coming | {AUTHORITIES: trusted + made.ca}
    if step is Step.CHANGE:
        changed = {CERTIFICATE: data[NEXT_CERTIFICATE], KEY: data[NEXT_KEY]}
        return changed | {AUTHORITIES: trusted}
    assert step is Step.FORGET, step
    leaf = read_leaf(data[CERTIFICATE], data[KEY])
    assert leaf is not None, "a certificate that cannot be read is made anew"
    return shown | {AUTHORITIES: read_authorities(trusted)[leaf.authority]}


def _problems_of_foreign(ref: Ref, live: Manifest | None, *, now: datetime) -> list[Problem]:
    if live is None:
        return [Problem(Reason.SECRET_INVALID, f"Secret {ref.name} does not exist")]
    data = _data(live)
    missing = [key for key in (CERTIFICATE, KEY, AUTHORITIES) if not data.get(key)]
    if missing:
        text = f"Secret {ref.name} lacks {', '.join(missing)}"
        return [Problem(Reason.SECRET_INVALID, text)]
    leaf = read_leaf(data[CERTIFICATE], data[KEY])
    if leaf is None or not leaf.name:
        text = f"Secret {ref.name}: tls.crt has no DNS name, or tls.key is not its key"
        return [Problem(Reason.SECRET_INVALID, text)]
    if leaf.expires_ms <= now.timestamp() * 1000:
        return [Problem(Reason.SECRET_INVALID, f"Secret {ref.name}: the certificate has expired")]
    return []


def _data(live: Manifest | None) -> Data:
    return {k: base64.b64decode(v) for k, v in ((live or {}).get("data") or {}).items()}


def _annotation(live: Manifest | None) -> str:
    text: str = ((live or {}).get("metadata", {}).get("annotations") or {}).get(STEP_ANNOTATION, "")
    return text


def _time_ms(text: str) -> int:
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1000)
    except ValueError:
        return 0


def _taken_name(owner: Owner, name: str) -> Problem:
    text = f"Secret {name} exists and does not belong to {owner.kind} {owner.name}"
    return Problem(Reason.NAME_CONFLICT, text)


def _manifest(owner: Owner, name: str, data: Data, live: Manifest | None, *, kind: str) -> Manifest:
    manifest = child(
        owner,
        "v1",
        "Secret",
        name=name,
        labels=service_pod_labels(owner),
        type=kind,
        data={key: base64.b64encode(value).decode() for key, value in data.items()},
    )
    if live is not None:  # nobody has changed it since it was read
        manifest["metadata"]["resourceVersion"] = live["metadata"]["resourceVersion"]
    return manifest
