"""Which members may be given requests, and why the others may not. Pure.

Workers of one fleet must share one fingerprint, else blocks of one mean nothing to another. The
majority decides which (ties: the smaller digest), so replicas that see the same members agree.
"""

from collections import Counter
from collections.abc import Iterable

from kvasir_proto.v1 import common_pb2, worker_pb2

from kvasir_router.core.fleet import WorkerState
from kvasir_router.membership.member import Member


def majority_fingerprint(members: Iterable[Member], *, model_name: str) -> bytes | None:
    """The fingerprint that most reachable workers of this model have."""
    votes = Counter(
        m.description.fingerprint
        for m in members
        if m.reachable
        and m.description
        and m.description.model == model_name
        and m.description.fingerprint
    )
    return min(votes, key=lambda fp: (-votes[fp], fp)) if votes else None


def problem_of(member: Member, *, model_name: str, fingerprint: bytes | None) -> str:
    """Why a member gets no new request; empty: it does."""
    about = member.description
    if not member.reachable or about is None:
        return f"unreachable: {member.error}"
    if about.model != model_name:
        return f"serves model {about.model!r}, not {model_name!r}"
    if not about.fingerprint:
        return "it is still loading its model"
    if about.fingerprint != fingerprint:
        return (
            f"fingerprint mismatch: {about.fingerprint.hex()[:12]}, "
            f"the fleet has {(fingerprint or b'').hex()[:12]}"
        )
    if about.draining:
        return "draining"
    return ""


def likeness(member: Member) -> object:
    """What the judgement of all members depends on: while it is equal, nothing needs judging."""
    about = member.description
    if about is None:
        return None
    return (
        member.reachable,
        about.address.name,
        about.address.epoch,
        about.model,
        about.fingerprint,
        about.draining,
        about.context_length,
    )


def newest_by_name(members: Iterable[Member]) -> dict[str, Member]:
    """One member per worker name: the one of the latest life, if two addresses claim it."""
    newest: dict[str, Member] = {}
    for member in members:
        other = newest.get(member.name)
        if other is None or _life(member) > _life(other):
            newest[member.name] = member
    return newest


def _life(member: Member) -> tuple[bool, int, str]:
    epoch = member.description.address.epoch if member.description else 0
    return member.reachable, epoch, member.target


def state_of(about: worker_pb2.WorkerDescription) -> WorkerState:
    """What the core wants to know of a worker."""
    load, both = about.load, common_pb2.ROLE_BOTH
    return WorkerState(
        name=about.address.name,
        can_prefill=about.role in (common_pb2.ROLE_PREFILL, both),
        can_decode=about.role in (common_pb2.ROLE_DECODE, both),
        transfer_healthy=about.kv_transfer_healthy,
        num_waiting=load.num_waiting,
        num_running=load.num_running,
        prefill_tokens_queued=load.prefill_tokens_queued,
        blocks_total=load.blocks_total,
        blocks_free=load.blocks_free,
        prefill_us_per_token=load.prefill_us_per_token,
        decode_ms_per_step=load.decode_ms_per_step,
        store_us_per_token=load.store_us_per_token,
    )
