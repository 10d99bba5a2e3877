"""A worker as it is, on an emulated accelerator: a step takes a set time per token.

Several workers on a few cores would share them, and be fast or slow with each other's load. Here
each step of the engine computes a tiny model, which costs next to nothing, and then sleeps until
the time is over that its tokens would take. All else is the production worker. With `--fifo` its
queue is in order of arrival, as published policies assume.
"""

import argparse
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from kvasir_engine.core.admission import Waiting
from kvasir_engine.core.decisions import Step
from kvasir_engine.step import StepRunner
from kvasir_engine.worker import admission, main
from kvasir_engine.worker.settings import WorkerSettings


class FifoQueue:
    """`AdmissionQueue`, in order of arrival; nobody is given up."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[int | str, Waiting] = OrderedDict()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._waiting

    def push(self, waiting: Waiting, **_: float) -> list[Any]:
        """Takes a request."""
        self._waiting[waiting.request_id] = waiting
        self.tokens += waiting.tokens
        return []

    def pop(self, **_: float) -> tuple[Waiting | None, list[Any]]:
        """The oldest."""
        return (self.remove(next(iter(self._waiting))) if self._waiting else None), []

    def remove(self, request_id: int | str) -> Waiting | None:
        """Takes one out."""
        waiting = self._waiting.pop(request_id, None)
        self.tokens -= waiting.tokens if waiting else 0
        return waiting

    def pop_short(self, **_: float) -> None:
        """Nobody passes."""

    def review(self, **_: float) -> list[Any]:
        """Nobody is given up."""
        return []

    def update(self, request_id: int | str, **_: float) -> None:
        """Order does not depend on estimates."""


def pace(us_per_token: float) -> None:
    """Makes each step take its time."""
    compute = StepRunner.run

    def paced(runner: StepRunner, step: Step) -> list[int]:
        until_s = time.monotonic() + step.num_tokens * us_per_token / 1e6
        token_ids = compute(runner, step)
        time.sleep(max(until_s - time.monotonic(), 0.0))
        return token_ids

    StepRunner.run = paced  # type: ignore[method-assign]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--role", required=True)
    parser.add_argument("--grpc-port", type=int, required=True)
    parser.add_argument("--kv-cache-mb", type=int, required=True)
    parser.add_argument("--max-batch-tokens", type=int, required=True)
    parser.add_argument("--us-per-token", type=float, required=True)
    parser.add_argument("--fifo", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    asked = arguments()
    if asked.us_per_token:
        pace(asked.us_per_token)
    if asked.fifo:
        admission.AdmissionQueue = FifoQueue  # type: ignore[assignment,misc]
    main.run(
        WorkerSettings(
            model=asked.model,
            model_name="bench",
            name=asked.name,
            role=asked.role,
            grpc_port=asked.grpc_port,
            kv_cache_mb=asked.kv_cache_mb,
            max_batch_tokens=asked.max_batch_tokens,
            threads=1,
            local_prefill_tokens_max=0,
            drain_timeout_ms=1,
        )
    )
