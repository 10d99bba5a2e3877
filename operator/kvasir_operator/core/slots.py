"""The pools of a ModelService: those that it makes from a template, and those that it selects.

A selected pool stands alone: it has no owner reference, goes on without the service, and belongs to
its author but for what a planner in mode Apply sets. Invariant: a pool takes part in one service
only, in the oldest that selects it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvasir_operator.api import MODEL_SERVICE, ModelServiceSpec
from kvasir_operator.core.conditions import Problem, Reason
from kvasir_operator.core.manifests import REDIS_PORT, TLS_ANNOTATION, Manifest, Owner, Ref

if TYPE_CHECKING:
    from kvasir_operator.core.world import World

LINKED_REDIS = "rediss+mtls"  # see kvasir_kvstore.redis_url
PARTS = {"prefill": "PrefillPool", "decode": "DecodePool", "kv": "KVCachePool"}
AGREED = {"kvCodec": "raw", "weights": "bf16"}  # of a pool that leaves them open
SELECTED_FIELDS = {"prefillPools": "PrefillPool", "decodePools": "DecodePool"}


@dataclass(frozen=True, slots=True)
class Slot:
    """One pool of a service."""

    part: str  # prefill, decode or kv
    name: str
    is_own: bool

    @property
    def kind(self) -> str:
        """Its kind."""
        return PARTS[self.part]

    @property
    def key(self) -> str:
        """What a plan calls it: its part if the service owns it, else its name."""
        if self.is_own:
            return self.part
        return self.name if self.name not in PARTS else f"{self.part}:{self.name}"

    def ref(self, owner: Owner) -> Ref:
        """Where it is."""
        return Ref(self.kind, owner.namespace, self.name)

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def link_secret(service: str, spec: ModelServiceSpec) -> str:
    """The Secret with the certificate of a service's parts; "": links are plain."""
    security = spec.security
    return (security.secret_name or f"{service}-kvasir-tls") if security.has_certificates else ""


def own_redis_url(owner: Owner, spec: ModelServiceSpec) -> str:
    """The Redis that the operator runs for a service."""
    scheme = LINKED_REDIS if link_secret(owner.name, spec) else "redis"
    return f"{scheme}://{owner.name}-redis.{owner.namespace}.svc:{REDIS_PORT}/0"


def with_links_kept(obj: Manifest, router: Manifest | None) -> Manifest:
    """A ModelService that leaves `mtls` open and runs without it stays without.

    Old and new pods would not talk to one another: that is for its author to choose.
    """
    if obj["kind"] != MODEL_SERVICE.kind or router is None:
        return obj
    spec = obj.get("spec", {})
    security = spec.get("security") or {}
    marks = router["spec"]["template"]["metadata"].get("annotations") or {}
    if security.get("mtls") is not None or TLS_ANNOTATION in marks:
        return obj
    return {**obj, "spec": {**spec, "security": {**security, "mtls": False}}}


def kv_key_secret(service: str, spec: ModelServiceSpec) -> str:
    """The Secret with the key of a service's KV blocks; "": they are not encrypted."""
    return f"{service}-kvasir-kv-key" if spec.security.has_kv_key else ""


def slots_of(owner: Owner, spec: ModelServiceSpec) -> tuple[Slot, ...]:
    """All pools of a service, prefill first."""
    found: list[Slot] = []
    for part, references in (("prefill", spec.prefill_pools), ("decode", spec.decode_pools)):
        if part == "prefill" and spec.engine == "vllm":
            continue  # its workers serve whole requests
        found += [Slot(part, reference.name, is_own=False) for reference in references]
        if not references:
            found.append(Slot(part, f"{owner.name}-{part}", is_own=True))
    if spec.kv_cache is not None:
        found.append(Slot("kv", f"{owner.name}-kv", is_own=True))
    return tuple(found)


def selected_refs(obj: Manifest) -> tuple[Ref, ...]:
    """The pools that a ModelService selects, as far as its spec can be read."""
    if obj["kind"] != MODEL_SERVICE.kind:
        return ()
    spec, namespace = obj.get("spec", {}), obj["metadata"]["namespace"]
    return tuple(
        Ref(kind, namespace, reference["name"])
        for field, kind in SELECTED_FIELDS.items()
        for reference in spec.get(field) or ()
    )


def selected_pools(world: "World") -> list[Manifest]:
    """The pools that stand alone and take part in this service, as far as they are there."""
    found = (world.live.get(ref) for ref in selected_refs(world.obj))
    return [pool for pool in found if pool is not None]


def selecting(pool: Ref, services: Iterable[Manifest]) -> Manifest | None:
    """The service that a pool takes part in: the oldest that selects it."""
    found = [service for service in services if pool in selected_refs(service)]
    return min(found, key=_age, default=None)


def _age(service: Manifest) -> tuple[str, str]:
    metadata = service["metadata"]
    return metadata.get("creationTimestamp", ""), metadata["name"]


def selection_problems(
    world: "World", slots: Sequence[Slot], spec: ModelServiceSpec
) -> list[Problem]:
    """What is wrong with the selected pools."""
    found = (selection_problem(world, slot, spec) for slot in slots)
    return [problem for problem in found if problem is not None]


def selection_problem(world: "World", slot: Slot, spec: ModelServiceSpec) -> Problem | None:
    """Why the service cannot use a selected pool."""
    if slot.is_own:
        return None
    pool = world.live.get(slot.ref(world.owner))
    if pool is None or "deletionTimestamp" in pool["metadata"]:
        return Problem(Reason.POOL_NOT_FOUND, f"{slot} does not exist")
    served = pool["spec"].get("model", {}).get("name", "")
    if served != spec.model.name:
        text = f"{slot} serves model {served}, not {spec.model.name}: select another one"
        return Problem(Reason.MODEL_MISMATCH, text)
    engine = pool["spec"].get("engine", "kvasir")
    if engine != spec.engine:
        text = f"{slot} runs engine {engine}, not {spec.engine}: select another one"
        return Problem(Reason.MODEL_MISMATCH, text)
    if holder := holder_of(world, slot):
        return Problem(Reason.POOL_TAKEN, f"{slot} takes part in ModelService {holder}")
    secrets = {
        "tlsSecret": link_secret(world.owner.name, spec),
        "kvKeySecret": kv_key_secret(world.owner.name, spec),
    }
    for field, wanted in secrets.items():
        if (pool["spec"].get(field) or "") != wanted:
            text = f"{slot}: {field} must be {wanted or 'absent'}, as its ModelService has it"
            return Problem(Reason.LINK_MISMATCH, text)
    for field, wanted in (("kvCodec", spec.kv_codec), ("weights", spec.weights)):
        if pool["spec"].get(field, AGREED[field]) != wanted:
            text = f"{slot}: {field} must be {wanted}, as its ModelService has it"
            return Problem(Reason.LINK_MISMATCH, text)
    url, own = pool["spec"].get("redisUrl") or "", own_redis_url(world.owner, spec)
    if url != own and url.partition("://")[2] == own.partition("://")[2]:
        text = f"{slot}: redisUrl must be {own}, as that Redis takes no other connections"
        return Problem(Reason.LINK_MISMATCH, text)
    return None


def holder_of(world: "World", slot: Slot) -> str:
    """The other service that a selected pool takes part in; empty: none."""
    pool = world.live.get(slot.ref(world.owner))
    if slot.is_own or pool is None:
        return ""
    for reference in pool["metadata"].get("ownerReferences", ()):
        is_service = reference.get("controller") and reference.get("kind") == MODEL_SERVICE.kind
        if is_service:
            return "" if reference["uid"] == world.owner.uid else str(reference["name"])
    first = selecting(slot.ref(world.owner), [*world.services, world.obj])
    assert first is not None, "the service at hand selects it"
    name: str = first["metadata"]["name"]
    return "" if name == world.owner.name else name
