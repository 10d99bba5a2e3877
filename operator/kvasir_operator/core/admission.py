"""What a resource refers to, judged before it is stored: what no rule inside the resource can see.

The status says the same afterwards (Degraded: NameConflict, ModelUnavailable, PoolNotFound), so
that nothing is lost where the webhook is off or does not answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvasir_operator.core.manifests import Manifest, Owner, Ref, is_owned_by
from kvasir_operator.core.plan import child_refs
from kvasir_operator.core.slots import selected_refs

CLAIM_KIND = "PersistentVolumeClaim"
PARTS = ("router", "prefill", "decode", "kvCache")  # of a ModelService; pools have none


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why the resource is refused ("": it is not), and what its author should know."""

    refusal: str = ""
    warnings: tuple[str, ...] = ()


def references_of(obj: Manifest) -> tuple[Ref, ...]:
    """All objects that the verdict depends on."""
    return (*child_refs(_owner(obj)), *selected_refs(obj), *_claims_of(obj))


def review(obj: Manifest, live: Mapping[Ref, Manifest]) -> Verdict:
    """The verdict on a new or changed resource; `live` are those of its references that exist."""
    owner, selected = _owner(obj), selected_refs(obj)
    taken = [
        f"{ref.kind} {ref.name}"
        for ref in child_refs(owner)
        if ref not in selected and ref in live and not _is_of(live[ref], owner)
    ]
    if taken:
        text = f"{', '.join(taken)} exists and does not belong to {owner.kind} {owner.name}"
        return Verdict(refusal=f"{text}: choose another name or remove it")
    claims = [f"{CLAIM_KIND} {claim.name}" for claim in _claims_of(obj) if claim not in live]
    pools = [f"{pool.kind} {pool.name}" for pool in selected if pool not in live]
    return Verdict(
        warnings=(
            *(f"{claim} does not exist: no pod starts before it does" for claim in claims),
            *(f"{pool} does not exist: nothing is served by it before it does" for pool in pools),
        )
    )


def _is_of(child: Manifest, owner: Owner) -> bool:
    """Whether it is the owner's, or that of a namesake which is being collected."""
    return is_owned_by(child, owner.uid) or any(
        (reference.get("kind"), reference.get("name")) == (owner.kind, owner.name)
        for reference in child["metadata"].get("ownerReferences", ())
    )


def _claims_of(obj: Manifest) -> tuple[Ref, ...]:
    """The claims that its pods mount, each once: the model's, then those of volumes."""
    spec = obj.get("spec", {})
    sources = [spec.get("model", {}).get("source", {}).get("pvc", {})]
    for part in (spec, *(spec.get(name) or {} for name in PARTS)):
        sources += [v.get("persistentVolumeClaim") or {} for v in part.get("volumes") or ()]
    names = dict.fromkeys(s["claimName"] for s in sources if s.get("claimName"))
    return tuple(Ref(CLAIM_KIND, obj["metadata"]["namespace"], name) for name in names)


def _owner(obj: Manifest) -> Owner:
    metadata = obj["metadata"]
    return Owner(
        api_version=obj["apiVersion"],
        kind=obj["kind"],
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata.get("uid", ""),
    )
