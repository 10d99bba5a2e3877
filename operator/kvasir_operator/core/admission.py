"""What a resource refers to, judged before it is stored: what no rule inside the resource can see.

The status says the same afterwards (Degraded: NameConflict, ModelUnavailable), so that nothing is
lost where the webhook is off or does not answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvasir_operator.core.manifests import Manifest, Owner, Ref, is_owned_by
from kvasir_operator.core.plan import child_refs

CLAIM_KIND = "PersistentVolumeClaim"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why the resource is refused ("": it is not), and what its author should know."""

    refusal: str = ""
    warnings: tuple[str, ...] = ()


def references_of(obj: Manifest) -> tuple[Ref, ...]:
    """All objects that the verdict depends on."""
    claim = _claim_of(obj)
    return (*child_refs(_owner(obj)), *((claim,) if claim else ()))


def review(obj: Manifest, live: Mapping[Ref, Manifest]) -> Verdict:
    """The verdict on a new or changed resource; `live` are those of its references that exist."""
    owner = _owner(obj)
    taken = [
        f"{ref.kind} {ref.name}"
        for ref in child_refs(owner)
        if ref in live and not _is_of(live[ref], owner)
    ]
    if taken:
        text = f"{', '.join(taken)} exists and does not belong to {owner.kind} {owner.name}"
        return Verdict(refusal=f"{text}: choose another name or remove it")
    claim = _claim_of(obj)
    if claim is not None and claim not in live:
        text = f"{CLAIM_KIND} {claim.name} does not exist: no pod starts before it does"
        return Verdict(warnings=(text,))
    return Verdict()


def _is_of(child: Manifest, owner: Owner) -> bool:
    """Whether it is the owner's, or that of a namesake which is being collected."""
    return is_owned_by(child, owner.uid) or any(
        (reference.get("kind"), reference.get("name")) == (owner.kind, owner.name)
        for reference in child["metadata"].get("ownerReferences", ())
    )


def _claim_of(obj: Manifest) -> Ref | None:
    source = obj.get("spec", {}).get("model", {}).get("source", {})
    name = source.get("pvc", {}).get("claimName")
    return Ref(CLAIM_KIND, obj["metadata"]["namespace"], name) if name else None


def _owner(obj: Manifest) -> Owner:
    metadata = obj["metadata"]
    return Owner(
        api_version=obj["apiVersion"],
        kind=obj["kind"],
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata.get("uid", ""),
    )
