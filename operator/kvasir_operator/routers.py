"""Asks the routers of a ModelService what they know of its workers.

A short answer is better than a complete one: a router that does not answer within ASK_TIMEOUT_S is
left out, and a service without any answer is not asked again for a while. What is not known is
None, and the plan then goes by what Kubernetes says alone.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import grpc.aio
from kvasir_proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc

from kvasir_operator.channels import ChannelError, Channels, why
from kvasir_operator.core.manifests import TLS_ANNOTATION, Manifest, Ref
from kvasir_operator.core.views import Door, WorkerFacts

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 1.0
FRESH_S = 0.5  # several pools of a service are reconciled at about the same time
SILENCE_S = 10.0  # after a failure of all routers of a service
ROUTERS_MAX = 16
SERVICES_MAX = 4096
ROLE_NAMES = {
    common_pb2.ROLE_PREFILL: "prefill",
    common_pb2.ROLE_DECODE: "decode",
    common_pb2.ROLE_BOTH: "both",
}
Facts = Mapping[str, WorkerFacts]


@dataclass(slots=True)
class _Known:
    facts: Facts | None
    until_s: float


class Routers:
    """What routers say, by service; asked at most every FRESH_S."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._known: dict[Ref, _Known] = {}

    async def facts(self, service: Ref, pods: Sequence[Manifest]) -> Facts | None:
        """Facts about the workers of a service by name; None: no router has answered."""
        known = self._known.get(service)
        if known is not None and known.until_s > time.monotonic():
            return known.facts
        doors = router_doors(pods)
        if not doors:
            return None
        views = [v for v in await asyncio.gather(*map(self._ask, doors)) if v is not None]
        facts = merge(views) if views else None
        ttl_s = FRESH_S if views else SILENCE_S
        if len(self._known) >= SERVICES_MAX:
            self._known.clear()
        self._known[service] = _Known(facts, time.monotonic() + ttl_s)
        return facts

    async def _ask(self, door: Door) -> inference_pb2.FleetView | None:
        try:
            async with self._channels.open(door) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                return await stub.Fleet(inference_pb2.FleetRequest(), timeout=ASK_TIMEOUT_S)
        except (grpc.aio.AioRpcError, ChannelError) as error:
            logger.info("router %s: %s", door.address, why(error))
            return None


def router_doors(pods: Iterable[Manifest]) -> list[Door]:
    """Where the router pods that are ready answer the operator."""
    found = []
    for pod in pods:
        status = pod.get("status", {})
        is_ready = any(
            c.get("type") == "Ready" and c.get("status") == "True"
            for c in status.get("conditions", ())
        )
        ports = {
            port.get("name"): port["containerPort"]
            for container in pod.get("spec", {}).get("containers", ())
            for port in container.get("ports", ())
        }
        metadata = pod["metadata"]
        secret = metadata.get("annotations", {}).get(TLS_ANNOTATION, "")
        port = ports.get("peer" if secret else "grpc")
        if is_ready and status.get("podIP") and port:
            found.append(Door(f"{status['podIP']}:{port}", metadata["namespace"], secret))
    return sorted(found, key=lambda door: door.address)[:ROUTERS_MAX]


def merge(views: Sequence[inference_pb2.FleetView]) -> Facts:
    """One fact per worker: it is routable if no router says otherwise or leaves it out."""
    seen: dict[str, list[inference_pb2.FleetMember]] = {}
    for view in views:
        for member in view.members:
            seen.setdefault(member.description.address.name, []).append(member)
    return {name: _facts(members, len(views)) for name, members in seen.items()}


def _facts(members: Sequence[inference_pb2.FleetMember], num_routers: int) -> WorkerFacts:
    problems = [problem for member in members if (problem := _problem(member))]
    failures = [failure for member in members if (failure := _transfer_failure(member))]
    if len(members) < num_routers:
        problems.append(f"{num_routers - len(members)} of {num_routers} routers do not know it")
    load = members[-1].description.load
    in_flight = sum(member.requests_in_flight for member in members)
    return WorkerFacts(
        role=ROLE_NAMES.get(members[-1].description.role, ""),
        num_requests=max(in_flight, load.num_running + load.num_waiting),
        num_blocks_held=max(member.blocks_known for member in members),
        problem=problems[0] if problems else "",
        transfer_failure=failures[0] if failures else "",
    )


def _problem(member: inference_pb2.FleetMember) -> str:
    if not member.reachable:
        return member.problem or "no router reaches it"
    if failure := _transfer_failure(member):
        return failure
    if member.canary == inference_pb2.CANARY_STATE_PENDING:
        return member.problem or member.canary_error
    return str(member.problem)


def _transfer_failure(member: inference_pb2.FleetMember) -> str:
    """Why KV does not cross between the worker and others; empty: it does, or nobody knows."""
    if not member.reachable:
        return ""
    if not member.description.kv_transfer_healthy:
        return f"KV transfers fail: {member.description.kv_transfer_error}"
    if member.canary == inference_pb2.CANARY_STATE_FAILED:
        return f"KV transfers fail: {member.canary_error}"
    return ""
