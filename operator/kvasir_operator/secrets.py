"""The Secret of a service with the certificate that its parts show one another: made and rotated.

core/secrets.py decides the steps; here they are carried out. The Secret of somebody else, like
cert-manager, is only looked at. A Secret goes with its service, unless pools that stand alone use
it: they own it, too, and a service of the same name takes it over.
"""

import base64
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from kvasir_proto.links import AUTHORITIES, CERTIFICATE, KEY

from kvasir_operator.certificates import make_bundle, read_authorities, read_leaf, utc_now
from kvasir_operator.cluster import Cluster
from kvasir_operator.core.conditions import Problem, Reason
from kvasir_operator.core.drift import is_as_desired
from kvasir_operator.core.manifests import Manifest, Owner, Ref, child, is_owned_by
from kvasir_operator.core.plan import CERTIFICATE_TYPE, KEY_TYPE, LinkSecrets
from kvasir_operator.core.pods import KV_KEY_FILE
from kvasir_operator.core.secrets import SecretView, Step, next_step
from kvasir_operator.core.service import service_pod_labels

logger = logging.getLogger(__name__)

NEXT_CERTIFICATE, NEXT_KEY = "next.crt", "next.key"  # not mounted into pods
KV_KEY_BYTES = 32
SECRET_FIELDS = ("tlsSecret", "kvKeySecret")  # where a pool names the Secrets that it mounts
STEP_ANNOTATION = "kvasir.dev/certificate-step"  # when the latest step was taken
Data = dict[str, bytes]


class SecretKeeper:
    """Looks after the Secrets of services."""

    def __init__(self, cluster: Cluster, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._cluster, self._clock = cluster, clock

    async def keep(
        self, owner: Owner, wanted: LinkSecrets, *, users: Sequence[Manifest] = ()
    ) -> tuple[list[Problem], int]:
        """Take the steps that are due; what is wrong, and the number of writes.

        `users` are pools that stand alone: those that name a Secret keep it.
        """
        certificate = _Place(owner, wanted.certificate, users)
        problems, num_writes = await self._keep_certificate(certificate, is_own=wanted.is_own)
        if wanted.kv_key:
            more, num_more = await self._keep_key(_Place(owner, wanted.kv_key, users))
            problems, num_writes = [*problems, *more], num_writes + num_more
        return problems, num_writes

    async def _keep_key(self, place: "_Place") -> tuple[list[Problem], int]:
        """A key stays: parts read it when they start, and those of two keys exchange no KV."""
        live = await self._cluster.fetch(place.ref)
        if not place.may_hold(live):
            return [place.taken_name()], 0
        data = {KV_KEY_FILE: _data(live).get(KV_KEY_FILE, b"")}
        if len(data[KV_KEY_FILE]) < KV_KEY_BYTES:
            data = {KV_KEY_FILE: base64.b64encode(secrets.token_hex(KV_KEY_BYTES).encode())}
        return [], await self._apply(place.manifest(data, live, kind=KEY_TYPE), live)

    async def _keep_certificate(
        self, place: "_Place", *, is_own: bool
    ) -> tuple[list[Problem], int]:
        """`is_own`: the operator makes the Secret; else its owner does."""
        owner, live = place.owner, await self._cluster.fetch(place.ref)
        if not is_own:
            return _problems_of_foreign(place.ref, live, now=self._clock()), 0
        if not place.may_hold(live):
            return [place.taken_name()], 0
        now, data, stepped = self._clock(), _data(live), _annotation(live)
        dns_name = f"{owner.name}.{owner.namespace}.kvasir.internal"
        view = view_of(data, stepped=stepped)
        step = next_step(view, name=dns_name, now_ms=int(now.timestamp() * 1000))
        if step is not Step.KEEP:
            data, stepped = taken(step, data, dns_name, now=now), now.isoformat(timespec="seconds")
            logger.info("certificate %s/%s: %s", *place.ref[1:], step.name.lower())
        manifest = place.manifest(data, live, kind=CERTIFICATE_TYPE)
        manifest["metadata"]["annotations"] = {STEP_ANNOTATION: stepped}
        return [], await self._apply(manifest, live)

    async def _apply(self, manifest: Manifest, live: Manifest | None) -> int:
        """Apply what differs; the number of writes."""
        if is_as_desired(manifest, live):
            return 0
        await self._cluster.apply(manifest)
        return 1


@dataclass(frozen=True, slots=True)
class _Place:
    """One Secret of a service, and who uses it."""

    owner: Owner
    name: str
    pools: Sequence[Manifest]  # that stand alone and take part in the service

    @property
    def ref(self) -> Ref:
        """Where it is."""
        return Ref("Secret", self.owner.namespace, self.name)

    def _users(self) -> list[Manifest]:
        """References to the pools whose pods cannot start without the Secret."""
        named = (p for p in self.pools if self.name in map(p["spec"].get, SECRET_FIELDS))
        return [
            {
                "apiVersion": pool["apiVersion"],
                "kind": pool["kind"],
                "name": pool["metadata"]["name"],
                "uid": pool["metadata"]["uid"],
            }
            for pool in named
        ]

    def may_hold(self, live: Manifest | None) -> bool:
        """Whether the Secret is the service's, or an earlier one of its name left it to pools."""
        if live is None or is_owned_by(live, self.owner.uid):
            return True
        owners = live["metadata"].get("ownerReferences", ())
        controllers = [(o["kind"], o["name"]) for o in owners if o.get("controller")]
        is_orphan = set(controllers) <= {(self.owner.kind, self.owner.name)}
        users = {user["uid"] for user in self._users()}
        return is_orphan and any(reference["uid"] in users for reference in owners)

    def taken_name(self) -> Problem:
        """Somebody else has a Secret of this name."""
        owner = f"{self.owner.kind} {self.owner.name}"
        text = f"Secret {self.name} exists and does not belong to {owner}"
        return Problem(Reason.NAME_CONFLICT, text)

    def manifest(self, data: Data, live: Manifest | None, *, kind: str) -> Manifest:
        """The Secret with this data; refused if somebody has changed it since it was read."""
        manifest = child(
            self.owner,
            "v1",
            "Secret",
            name=self.name,
            labels=service_pod_labels(self.owner),
            type=kind,
            data={key: base64.b64encode(value).decode() for key, value in data.items()},
        )
        manifest["metadata"]["ownerReferences"] += self._users()
        if live is not None:
            version = live["metadata"]["resourceVersion"]
            manifest["metadata"] |= {"resourceVersion": version}
        return manifest


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
