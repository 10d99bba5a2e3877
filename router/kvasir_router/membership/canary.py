"""Has canaries cross between workers of the fleet; when and between whom is the core's choice.

Routing does not wait for them: a decode worker that KV does not reach computes prompts itself.
"""

import asyncio
import contextlib
import logging

import grpc
import grpc.aio
from kvasir_proto.v1 import common_pb2, inference_pb2, worker_pb2

from kvasir_router.core.canary import Canaries, Check, Outcome, Result, Seat, Standing
from kvasir_router.membership.fleet import Fleet, now_ms

log = logging.getLogger(__name__)

TICK_S = 0.5
CHECK_TIMEOUT_S = 60.0
"""The worker gives each peer ten seconds, and may first finish a check for another router."""

OUTCOMES = {
    worker_pb2.TransferCheck.OUTCOME_CROSSED: Outcome.CROSSED,
    worker_pb2.TransferCheck.OUTCOME_FAILED: Outcome.FAILED,
    worker_pb2.TransferCheck.OUTCOME_UNSUPPORTED: Outcome.UNSUPPORTED,
}
STATES = {
    Standing.NOT_NEEDED: inference_pb2.CANARY_STATE_NOT_NEEDED,
    Standing.PENDING: inference_pb2.CANARY_STATE_PENDING,
    Standing.CROSSED: inference_pb2.CANARY_STATE_CROSSED,
    Standing.FAILED: inference_pb2.CANARY_STATE_FAILED,
}


class CanaryRun:
    """The checks of one router."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._core = Canaries()
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Begins what is due until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                for check in self._seated().due(now_ms()):
                    group.create_task(self._run(check), name=f"canary to {check.decode}")
                self._ended.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await self._ended.wait()

    def standings(self) -> dict[str, tuple[Standing, str]]:
        """What is known of each worker that may be given requests, as of now."""
        core = self._seated()
        return {name: core.standing(name) for name in self._fleet.view().workers}

    def degraded(self) -> list[str]:
        """Workers that no canary crosses to or from."""
        return [
            f"worker {name}: {error}"
            for name, (standing, error) in sorted(self.standings().items())
            if standing is Standing.FAILED
        ]

    def _seated(self) -> Canaries:
        members = [member for member, problem in self._fleet.members() if not problem]
        seats = [_seat(about) for about in (m.description for m in members) if about is not None]
        self._core.seat(seats, now_ms=now_ms())
        return self._core

    async def _run(self, check: Check) -> None:
        results = [Result(Outcome.BUSY, "the check was cancelled")]
        try:
            results = await self._ask(check)
        except grpc.aio.AioRpcError as error:
            is_old = error.code() is grpc.StatusCode.UNIMPLEMENTED
            why = error.details() or error.code().name.lower()
            results = [Result(Outcome.UNSUPPORTED if is_old else Outcome.BUSY, why)]
        except grpc.aio.UsageError:  # its channel was closed meanwhile
            results = [Result(Outcome.BUSY, "unreachable")]
        finally:
            self._core.ended(check, results, now_ms=now_ms())
            self._ended.set()
        for result in results:
            if result.outcome is Outcome.FAILED:
                log.warning("%s: %s", check.decode, result.error)

    async def _ask(self, check: Check) -> list[Result]:
        member = self._fleet.member(check.decode)
        lenders = [self._fleet.member(name) for name in check.lenders]
        peers = [m.description.address for m in lenders if m is not None and m.description]
        if member is None or len(peers) < len(check.lenders):
            return [Result(Outcome.BUSY, "a worker has left")]
        checks = await member.check_transfer(peers, timeout_s=CHECK_TIMEOUT_S)
        found = [Result(OUTCOMES.get(c.outcome, Outcome.BUSY), c.error) for c in checks]
        return found or [Result(Outcome.BUSY, "no answer")]


def _seat(about: worker_pb2.WorkerDescription) -> Seat:
    return Seat(
        name=about.address.name,
        life=(about.address.uid, about.address.epoch),
        is_prefill=about.role == common_pb2.ROLE_PREFILL,
        is_decode=about.role == common_pb2.ROLE_DECODE,
        has_crossed=about.kv_crossed,
    )
